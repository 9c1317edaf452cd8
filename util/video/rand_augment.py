"""RandAugment (arXiv 1909.13719) of whole clips, with the grammar and the operations of timm.

What happens to a clip is drawn once and done to every frame: which operations, whether each
happens, how strongly and in which direction.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from util.errors import UserError
from util.video import clip_ops

Drawn = tuple[str, tuple[float, ...]]  # an operation with its arguments

OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "AutoContrast": clip_ops.auto_contrast,
    "Equalize": clip_ops.equalize,
    "Invert": clip_ops.invert,
    "Rotate": clip_ops.rotate,
    "Posterize": clip_ops.posterize,
    "Solarize": clip_ops.solarize,
    "SolarizeAdd": clip_ops.solarize_add,
    "Color": clip_ops.color,
    "Contrast": clip_ops.contrast,
    "Brightness": clip_ops.brightness,
    "Sharpness": clip_ops.sharpness,
    "ShearX": clip_ops.shear_x,
    "ShearY": clip_ops.shear_y,
    "TranslateX": clip_ops.translate_x,
    "TranslateY": clip_ops.translate_y,
    "Desaturate": clip_ops.desaturate,
    "GaussianBlur": clip_ops.gaussian_blur,
}
OF_3A = ["Solarize", "Desaturate", "GaussianBlur"]  # 3-Augment (DeiT III, arXiv 2204.07118)

# Operations on single pixels give the same before and after a crop.
POINTWISE = {"Invert", "Posterize", "Solarize", "SolarizeAdd", "Color", "Brightness", "Desaturate"}

# timm's weights of operations that are not drawn equally often.
WEIGHTS = {
    **dict.fromkeys(["Rotate"], 3.0),
    **dict.fromkeys(["ShearX", "ShearY"], 2.0),
    **dict.fromkeys(["TranslateX", "TranslateY"], 1.0),
    **dict.fromkeys(["Color", "Sharpness", "AutoContrast"], 0.25),
    **dict.fromkeys(["Solarize", "SolarizeAdd", "Contrast", "Brightness", "Equalize"], 0.05),
}
OPERATION_SETS = {  # section of the config -> weights
    "all": dict.fromkeys(list(OPERATIONS)[:15], 1.0),
    "w0": WEIGHTS,  # of earlier versions of timm
    "tweights": {**WEIGHTS, "Posterize": 0.05, "Invert": 0.05},
    "t3a": dict.fromkeys(OF_3A, 1.0),
    "t3aw": {
        **dict.fromkeys(OF_3A, 6.0),
        **dict.fromkeys(["Rotate"], 3.0),
        **dict.fromkeys(["ShearX", "ShearY"], 2.0),
        **dict.fromkeys(["Posterize", "AutoContrast", "Color", "Sharpness", "Contrast"], 1.0),
        **dict.fromkeys(["Brightness", "Equalize", "Invert"], 1.0),
    },
}


class Config(NamedTuple):
    """The meaning of a config string."""

    weights: dict[str, float]  # operations and how often each is drawn, relative to the others
    replace: bool  # may one operation be drawn twice for a clip
    increasing: bool  # does a larger magnitude mean a stronger change for every operation
    magnitude: float
    magnitude_std: float  # infinite: uniform in [0, magnitude]
    magnitude_max: float
    num_layers: int
    probability: float


def parse_config(config: str) -> Config:
    """Parse a config string in the grammar of timm.data.auto_augment, such as rand-m7-mstd0.5-inc1.

    Sections after "rand", in any order: m magnitude (default 10), n number of operations (2), p
    probability of each (0.5), mstd deviation of the magnitude (0; above 100: uniform in [0, m]),
    mmax bound of the magnitude (10), inc1 for increasing operations, and a set of operations: w0 or
    tweights to draw them by timm's weights, none twice; t3a the three of 3-Augment; t3aw more, with
    weights. As in the reference, any inc means yes, inc0 too. Raise UserError for anything else.
    """
    policy, *sections = config.split("-")
    if policy != "rand":
        raise UserError(f"RandAugment config {config!r} does not start with 'rand'")
    numbers = {"m": 10.0, "n": 2.0, "p": 0.5, "mstd": 0.0, "mmax": 10.0}
    chosen = "all"
    for section in sections:
        match = re.fullmatch(r"(m|p|mstd|mmax|(?:n|inc)(?=\d+$))(\d+\.?\d*)", section)
        if match:
            numbers[match[1]] = float(match[2])
        elif section in OPERATION_SETS.keys() - {"all"}:
            chosen = section
        else:
            raise UserError(
                f"section {section!r} of RandAugment config {config!r} is none of m, p, mstd, mmax "
                "with a number, n, inc with an integer, w0, tweights, t3a, t3aw"
            )
    weights = OPERATION_SETS[chosen]
    if numbers["p"] > 1:
        raise UserError(f"RandAugment config {config!r} has a probability above 1")
    replace = len(set(weights.values())) == 1  # none twice where there are weights
    if not replace and numbers["n"] > len(weights):
        raise UserError(f"RandAugment config {config!r} has only {len(weights)} operations")
    return Config(
        weights=weights,
        replace=replace,
        increasing=chosen.startswith("t") or "inc" in numbers,
        magnitude=numbers["m"],
        magnitude_std=numbers["mstd"] if numbers["mstd"] <= 100 else math.inf,
        magnitude_max=numbers["mmax"] or 10,
        num_layers=int(numbers["n"]),
        probability=numbers["p"],
    )


class RandAugment:
    """Apply randomly drawn operations to a clip, the same to all of its frames."""

    def __init__(self, config: str):
        self.config = parse_config(config)
        self.names = list(self.config.weights)
        weights = np.array(list(self.config.weights.values()))
        self.shares = weights / weights.sum()

    def __call__(self, clip: Tensor, rng: np.random.Generator) -> Tensor:
        """Return the augmented uint8 clip [T, H, W, 3]; the given one is left as it is."""
        return torch.from_numpy(apply(clip.numpy(), self.draw(rng)))

    def draw(self, rng: np.random.Generator) -> list[Drawn]:
        """Draw the operations that happen to one clip, with their arguments, in order."""
        c = self.config
        drawn = []
        for i in rng.choice(len(self.names), c.num_layers, replace=c.replace, p=self.shares):
            if rng.random() > c.probability:
                continue
            magnitude = c.magnitude
            if c.magnitude_std == math.inf:
                magnitude = rng.uniform(0, magnitude)
            elif c.magnitude_std > 0:
                magnitude = rng.normal(magnitude, c.magnitude_std)
            magnitude = min(max(magnitude, 0.0), c.magnitude_max)
            name = self.names[i]
            arguments = operation_arguments(name, magnitude, lambda: _sign(rng), c.increasing)
            drawn.append((name, arguments))
        return drawn


def apply(clip: np.ndarray, drawn: list[Drawn], box: clip_ops.Box | None = None) -> np.ndarray:
    """Do operations to a uint8 clip [T, H, W, 3], then crop it; what the crop drops is not made."""
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
    """Return the arguments of operation `name` at `magnitude`, usually 0 to 10.

    `sign` is called, to draw 1 or -1, by operations that have two directions.
    """
    level = magnitude / 10
    if name == "Rotate":
        return (level * 30 * sign(),)  # degrees
    if name in ("ShearX", "ShearY"):
        return (level * 0.3 * sign(),)
    if name in ("TranslateX", "TranslateY"):
        return (level * 0.45 * sign(),)  # share of the width or height
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return (max(0.1, 1 + level * 0.9 * sign()) if increasing else level * 1.8 + 0.1,)
    if name == "Posterize":
        bits = 4 - int(level * 4) if increasing else int(level * 4)
        return (max(1, bits),)  # timm asks for 0 bits at the extreme, which Pillow refuses
    if name == "Solarize":
        threshold = min(256, int(level * 256))
        return (256 - threshold if increasing else threshold,)
    if name == "SolarizeAdd":
        return (min(128, int(level * 110)),)
    if name == "Desaturate":
        return (min(0.5 + 0.5 * level, 1.0),)  # share of the colour that goes
    if name == "GaussianBlur":
        return (min(0.1 + 1.9 * level, 2.0),)  # pixels
    return ()


def _sign(rng: np.random.Generator) -> float:
    return -1.0 if rng.random() > 0.5 else 1.0
