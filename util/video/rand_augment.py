"""RandAugment (arXiv 1909.13719) of whole clips, with the grammar and the operations of timm.

All frames of a clip share what is drawn: operations, whether each happens, strength and direction.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from util.errors import UserError
from util.video import clip_ops

Drawn = tuple[str, tuple[float, ...]]  # the name of an operation, and its arguments

OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "AutoContrast": clip_ops.auto_contrast, "Equalize": clip_ops.equalize,
    "Invert": clip_ops.invert, "Rotate": clip_ops.rotate, "Posterize": clip_ops.posterize,
    "Solarize": clip_ops.solarize, "SolarizeAdd": clip_ops.solarize_add,
    "Color": clip_ops.color, "Contrast": clip_ops.contrast,
    "Brightness": clip_ops.brightness, "Sharpness": clip_ops.sharpness,
    "ShearX": clip_ops.shear_x, "ShearY": clip_ops.shear_y,
    "TranslateX": clip_ops.translate_x, "TranslateY": clip_ops.translate_y,
}  # fmt: skip
# Operations on single pixels: the result is the same before and after a crop.
POINTWISE = {"Invert", "Posterize", "Solarize", "SolarizeAdd", "Color", "Brightness"}
# Arguments at magnitude 10, in either direction: degrees, shears, shares of the width or height.
SPANS = {"Rotate": 30, "ShearX": 0.3, "ShearY": 0.3, "TranslateX": 0.45, "TranslateY": 0.45}
WEIGHTS = {  # timm's relative frequencies of operations
    "Rotate": 3.0,
    **dict.fromkeys(["ShearX", "ShearY"], 2.0),
    **dict.fromkeys(["TranslateX", "TranslateY"], 1.0),
    **dict.fromkeys(["Color", "Sharpness", "AutoContrast"], 0.25),
    **dict.fromkeys(["Solarize", "SolarizeAdd", "Contrast", "Brightness", "Equalize"], 0.05),
}
OPERATION_SETS = {  # section of the config -> weights
    "": dict.fromkeys(OPERATIONS, 1.0),
    "w0": WEIGHTS,  # as in earlier versions of timm
    "tweights": {**WEIGHTS, "Posterize": 0.05, "Invert": 0.05},
}


class Config(NamedTuple):
    """The meaning of a config string."""

    weights: dict[str, float]  # how often each operation is drawn, relative to the others
    replace: bool  # whether one operation may be drawn twice for a clip
    increasing: bool  # whether a larger magnitude makes every operation stronger
    magnitude: float
    magnitude_std: float  # infinite: uniform in [0, magnitude]
    magnitude_max: float
    num_layers: int  # operations per clip
    probability: float  # of each of them


def parse_config(config: str) -> Config:
    """Parse a config string in the grammar of timm.data.auto_augment, like rand-m7-mstd0.5-inc1.

    Sections after "rand", in any order: m magnitude (default 10), n number of operations (2), p
    probability of each (0.5), mstd deviation of the magnitude (0; above 100: uniform in [0, m]),
    mmax bound of the magnitude (10), inc1 for increasing operations (inc0 means the same, as in the
    reference), w0 or tweights to draw operations by timm's weights, none of them twice.
    """
    policy, *sections = config.split("-")
    if policy != "rand":
        raise UserError(f"RandAugment config {config!r} does not start with 'rand'")
    numbers, chosen = {"m": 10.0, "n": 2.0, "p": 0.5, "mstd": 0.0, "mmax": 10.0}, ""
    for section in sections:
        match = re.fullmatch(r"(m|p|mstd|mmax|(?:n|inc)(?=\d+$))(\d+\.?\d*)", section)
        if match:
            numbers[match[1]] = float(match[2])
        elif section and section in OPERATION_SETS:
            chosen = section
        else:
            raise UserError(
                f"section {section!r} of RandAugment config {config!r} is none of m, p, mstd, mmax "
                "with a number, n, inc with an integer, w0, tweights"
            )
    weights = OPERATION_SETS[chosen]
    if numbers["p"] > 1:
        raise UserError(f"RandAugment config {config!r} has a probability above 1")
    if max(numbers.values()) > 1000:
        raise UserError(f"RandAugment config {config!r} has a number above 1000")
    if chosen and numbers["n"] > len(weights):
        raise UserError(f"RandAugment config {config!r} has only {len(weights)} operations")
    return Config(
        weights=weights,
        replace=not chosen,
        increasing=chosen == "tweights" or "inc" in numbers,
        magnitude=numbers["m"],
        magnitude_std=numbers["mstd"] if numbers["mstd"] <= 100 else math.inf,
        magnitude_max=numbers["mmax"] or 10,
        num_layers=int(numbers["n"]),
        probability=numbers["p"],
    )


class RandAugment:
    """Draw operations for clips by the rules of a config string."""

    def __init__(self, config: str):
        self.config = parse_config(config)
        self.names = list(self.config.weights)
        weights = np.array(list(self.config.weights.values()))
        self.shares = weights / weights.sum()

    def draw(self, rng: np.random.Generator) -> list[Drawn]:
        """Draw the operations for one clip, in their order, with their arguments."""

        def sign() -> float:
            return -1.0 if rng.random() > 0.5 else 1.0

        c, drawn = self.config, []
        for i in rng.choice(len(self.names), c.num_layers, replace=c.replace, p=self.shares):
            if rng.random() > c.probability:
                continue
            magnitude = c.magnitude
            if c.magnitude_std == math.inf:
                magnitude = rng.uniform(0, magnitude)
            elif c.magnitude_std > 0:
                magnitude = rng.normal(magnitude, c.magnitude_std)
            name, magnitude = self.names[i], min(max(magnitude, 0.0), c.magnitude_max)
            drawn.append((name, operation_arguments(name, magnitude, sign, c.increasing)))
        return drawn


def apply(clip: np.ndarray, drawn: list[Drawn], box: clip_ops.Box | None = None) -> np.ndarray:
    """Apply operations to a uint8 clip [T, H, W, 3] and crop it, computing only the crop."""
    last = max((i for i, (name, _) in enumerate(drawn) if name not in POINTWISE), default=-1)
    if last < 0:
        clip = clip_ops.crop(clip, box)
    for i, (name, arguments) in enumerate(drawn):
        cropping = {"box": box} if i == last else {}
        clip = OPERATIONS[name](clip, *arguments, **cropping)
    return clip


def operation_arguments(
    name: str, magnitude: float, sign: Callable[[], float], increasing: bool
) -> tuple[float, ...]:
    """Return the arguments of operation `name` at `magnitude`, which is usually 0 to 10.

    `sign` draws 1 or -1; it is called only for operations that have two directions.
    """
    level = magnitude / 10
    if name in SPANS:
        return (level * SPANS[name] * sign(),)
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return (max(0.1, 1 + level * 0.9 * sign()) if increasing else level * 1.8 + 0.1,)
    if name == "Posterize":
        bits = 4 - int(level * 4) if increasing else int(level * 4)
        return (max(1, bits),)  # at the extreme timm asks for 0 bits, which Pillow refuses
    if name == "Solarize":
        threshold = min(256, int(level * 256))
        return (256 - threshold if increasing else threshold,)
    if name == "SolarizeAdd":
        return (min(128, int(level * 110)),)
    return ()
