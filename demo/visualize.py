"""Draw what a model makes of videos: reconstructions, the five best classes, or its attention.

    python -m demo.visualize
    python -m demo.visualize VIDEO --checkpoint k400/vit_large --mask_ratio 0.95 0.98
    python -m demo.visualize VIDEO --checkpoint output/finetune/checkpoint-00049.pth

This writes an animated GIF and an MP4 for every video. An autoencoder's show the frames that it
predicts, 8 of 16 with the paper's recipe, with the mask ratios side by side. A CPU is enough. See
demo/README.md.
"""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import main_features
from models_vit import VisionTransformer
from util import args as flags
from util.cache import Cache
from util.checkpoint import newest_checkpoint
from util.errors import UserError
from util.file_io import make_dirs, path_to_text, print_any, printable, write_atomically
from util.kinetics import cut_views, dense_frames
from util.masking import MASK_TYPES
from util.run import run, usage_errors
from util.synthetic import write_dataset
from util.video.decode import Video, VideoError
from util.video.sampling import Box, segment_indices, uniform_crop_box
from util.video.transforms import channels_first
from util.visualize import (
    GAP,
    WHITE,
    encode_gif,
    encode_mp4,
    enlarge,
    last_attention,
    lay_over,
    reconstruct,
    require_pictures,
    tile,
)
from util.weights import read_weights

ROOT = Path(__file__).resolve().parent.parent
DEMO_RUN = ROOT / "output/demo/pretrain"  # of `make demo`
RELEASED = "k400/vit_large"
MIN_SIDE = 128  # pixels; smaller pictures are enlarged
MIN_FPS = 2.0
NUM_BARS, BARS_WIDTH = 5, 220  # classes shown, and pixels for them
MASK_FLAGS = ("mask_ratio", "mask_type", "seed", "paste_visible")
ROWS = ("original", "masked", "reconstruction")  # fields of a Reconstruction
NOTE = {
    "patch": "mean and contrast of every patch are the original's",
    "channel": "mean and contrast of every patch's colours are the original's",
    "motion": "differences to the frame before; grey: no change",
}
mask_ratio = flags.number(
    float, "a share above 0 and below 1, such as 0.95", lambda value: 0 < value < 1
)


class Clip(NamedTuple):
    """A clip of a video, as a model takes it."""

    pixels: Tensor  # uint8 [1, T, H, W, C]
    seconds: float  # that it lasts
    frames: str  # which frames of the video these are, as one line

    def fps(self, num_shown: int) -> float:
        """Return the frames per second at which num_shown frames show the video's own speed.

        This is at least MIN_FPS, because segments of a long video lie far apart.
        """
        return max(num_shown / self.seconds, MIN_FPS)


def default_checkpoint() -> str:
    """Return the newest checkpoint of `make demo`, or else the name of a released one."""
    return newest_checkpoint(str(DEMO_RUN)) or RELEASED


def load_model(checkpoint: str | None = None, for_attention: bool = False) -> Any:
    """Rebuild the model of a checkpoint from its file alone; see main_features.load_model.

    Names for the classes of a classifier become its attribute `classes`.

    Args:
        checkpoint: path, address or name of a released one; None: default_checkpoint.
        for_attention: the encoder is enough.

    Raises:
        UserError: the checkpoint cannot be found, downloaded or read, it has neither decoder nor
            head, or its predictions have no pictures.
    """
    path = checkpoint or default_checkpoint()
    try:
        weights = read_weights(path)
    except UserError as error:
        if path != RELEASED or checkpoint:
            raise
        raise UserError(
            f"`make demo` has left no checkpoint in {DEMO_RUN}, and {error}; give --checkpoint"
        ) from error
    if not (weights.has_decoder or weights.has_head or for_attention):
        hint = "to reconstruct, give a pre-trained checkpoint, and to classify, a fine-tuned one"
        raise weights.lacks("decoder", hint)
    model: Any = main_features.load_model(weights)
    if not (for_attention or is_classifier(model)):
        with usage_errors():
            require_pictures(model)
    numbers = map(str, range(weights.arguments.get("num_classes", 0)))
    model.classes = list(map(printable, weights.classes or numbers))
    return model


def is_classifier(model: Any) -> bool:
    """Return whether a model of load_model classifies clips."""
    return isinstance(model, VisionTransformer)


def embedded_videos() -> list[Path]:
    """Return a held-out synthetic video of every class; write the videos if they are missing.

    Raises:
        UserError: they cannot be written.
    """
    try:
        folder = write_dataset(
            ROOT / "data/visualize", num_videos=8, num_labelled=8, num_val=8, num_test=8
        )
    except OSError as error:
        raise UserError(f"the embedded videos cannot be written: {error}") from error
    return sorted(folder.glob("videos/*/test_*.mp4"))


def load_clip(path: str | Path, model: Any, start: float = 0.5) -> Clip:
    """Read a clip of a video as the model was trained to see it, from the centre square.

    With start = 0.5, this is the only view of main_test.py --num_clips 1 --num_crops 1.

    Args:
        path: path or address.
        start: position of the clip, from 0 (the start of the video) to 1 (its end); of a model of
            --sampling segments, position of every frame in its segment.

    Raises:
        UserError: the video cannot be read; the message names it.
    """
    T, size = model.patch_embed.num_frames, model.patch_embed.img_size
    pixels = torch.empty((1, T, size, size, 3), dtype=torch.uint8)

    def centre_square(height: int, width: int) -> list[Box]:
        return [uniform_crop_box(height, width, size, 0, 1)]

    def place(total: float, length: float) -> float:
        return start * max(total - length, 0) // 1

    try:
        with Cache().hold(str(path)) as local, Video(local) as video:
            if model.sampling == "segments":
                frames = segment_indices(video.num_frames, T, min(start, 1 - 1e-6))
                seconds = video.num_frames / video.fps
            else:
                frames = dense_frames(video, T, model.sampling_rate, place)
                seconds = T * model.sampling_rate / 30
            cut_views(video, frames[np.newaxis], centre_square, pixels, size)
            times = frames / video.fps if video.times is None else video.times[frames]
            total = video.num_frames
    except VideoError as error:
        raise UserError(str(error)) from error
    return Clip(pixels, seconds, describe_frames(frames, total, times))


def describe_frames(frames: np.ndarray, total: int, times: np.ndarray) -> str:
    """Say in one line which frames (numbers [T], counted from 0) of a video are used, and when.

    If the video is shorter than the clip or has fewer frames per second, some are used repeatedly.
    """
    numbers = frames.tolist()
    shown = numbers if len(numbers) <= 5 else [*numbers[:3], "...", numbers[-1]]
    distinct = len(set(numbers))
    few = f" ({distinct} different)" if distinct < len(numbers) else ""
    text = f"frames {', '.join(map(str, shown))} of {total}{few}"
    return f"{text}, {times[0]:.2f} to {times[-1]:.2f} s"


@torch.inference_mode()
def classify(model: Any, pixels: Tensor) -> list[tuple[str, float]]:
    """Return the best classes of a clip uint8 [1, T, H, W, C] with their probabilities.

    Raises:
        UserError: the probabilities are not numbers.
    """
    scores = model(channels_first(pixels))[0].softmax(dim=0)
    require_finite(scores)
    best = scores.argsort(descending=True, stable=True)[:NUM_BARS].tolist()
    return [(model.classes[label], scores[label].item()) for label in best]


def require_finite(values: Tensor) -> None:
    """Raise UserError if a model's results are not numbers."""
    if not values.isfinite().all():
        raise UserError("what the model computes is not a number: its weights are damaged")


def draw(
    model: Any,
    pixels: Tensor,
    mask_ratios: Sequence[float],
    mask_type: str = "random",
    seed: int = 0,
    paste_visible: bool = True,
) -> Tensor:
    """Draw a clip's three rows with captions, a column for each ratio: uint8 [t, height, width, 3].

    The captions state the share of patches that is really removed, after rounding.

    Args:
        pixels: a clip, uint8 [1, T, H, W, C].

    Raises:
        ValueError: util.masking.fixed_masks does not accept the ratio, the type or the seed.
    """
    # A reconstruction for each ratio
    columns = [
        reconstruct(model, pixels, ratio, mask_type, seed, paste_visible) for ratio in mask_ratios
    ]
    factor = -(-MIN_SIDE // model.patch_embed.img_size)  # rounded up
    rows = [[enlarge(getattr(column, name)[0], factor) for column in columns] for name in ROWS]

    # Captions above and to the left
    t, side = rows[0][0].shape[:2]
    kind = "" if mask_type == "random" else f", {mask_type}"
    heads = [f"{column.mask.mean():.0%} masked{kind}" for column in columns]
    captions = _same_height([_caption(head, side, t) for head in heads])
    left = [_caption(name, side, t).rot90(1, (1, 2)) for name in ROWS]
    corner = torch.full((t, captions[0].shape[1], left[0].shape[2], 3), WHITE, dtype=torch.uint8)
    sheet = tile(
        [[corner, *captions], *([head, *row] for head, row in zip(left, rows, strict=True))]
    )
    if note := NOTE.get(model.target):
        sheet = tile([[sheet], [_caption(note, sheet.shape[2], t)]])
    return sheet


def draw_attention(model: Any, pixels: Tensor) -> Tensor:
    """Draw a clip uint8 [1, T, H, W, C] and where the last block looks: [T, height, width, 3].

    Raises:
        UserError: the attention is not a number.
    """
    heat = last_attention(model, pixels)[0, int(model.cls_embed) :]  # (L,)
    require_finite(heat)
    clip = enlarge(pixels[0], -(-MIN_SIDE // pixels.shape[2]))
    t, side, _, _ = clip.shape
    heads = [_caption(text, side, t) for text in ("clip", f"attention, block {len(model.blocks)}")]
    pair = [clip, lay_over(clip, heat.view(model.patch_embed.input_size))]
    shares = f"a patch gets {heat.min():.2%} (black) to {heat.max():.2%} (yellow) of the attention"
    sheet = tile([heads, pair])
    return tile([[sheet], [_caption(shares, sheet.shape[2], t)]])


def draw_classes(pixels: Tensor, best: Sequence[tuple[str, float]]) -> Tensor:
    """Draw a clip uint8 [1, T, H, W, C] and bars of its classes beside it: [T, height, width, 3].

    Args:
        best: names, which may be cut, and probabilities.
    """
    clip = enlarge(pixels[0], -(-MIN_SIDE // pixels.shape[2]))
    t, height, row = len(clip), clip.shape[1], 26
    panel = Image.new("RGB", (BARS_WIDTH, max(height, row * len(best))), "white")
    canvas, font = ImageDraw.Draw(panel), ImageFont.load_default(13)
    for number, (name, probability) in enumerate(best):
        y, percent = row * number, f"{probability:.1%}"
        width, short = BARS_WIDTH - font.getlength(f" {percent}"), name[:BARS_WIDTH]
        while font.getlength(short) > width:
            short = f"{short.removesuffix('...')[:-1]}..."
        canvas.text((0, y + 8), short, "black", font, anchor="lm")
        canvas.text((BARS_WIDTH, y + 8), percent, "black", font, anchor="rm")
        canvas.rectangle((0, y + 17, BARS_WIDTH - 1, y + 22), (225, 225, 225))
        canvas.rectangle((0, y + 17, round(probability * (BARS_WIDTH - 1)), y + 22), (30, 90, 160))
    bars = torch.from_numpy(np.array(panel)).expand(t, -1, -1, -1)
    return tile([_same_height([clip, bars])], gap=2 * GAP)


def _caption(text: str, width: int, num_frames: int) -> Tensor:
    """Write text on a white strip, in as many lines as it needs: uint8 [t, height, width, 3]."""
    font = ImageFont.load_default(13)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    line_height = 17
    strip = Image.new("RGB", (width, line_height * len(lines)), "white")
    canvas = ImageDraw.Draw(strip)
    for number, line in enumerate(lines):
        place = width / 2, line_height * (number + 0.5)
        canvas.text(place, line, "black", font, anchor="mm")
    return torch.from_numpy(np.array(strip)).expand(num_frames, -1, -1, -1)


def _same_height(strips: list[Tensor]) -> list[Tensor]:
    """Add white below strips [t, height, width, 3] until all are as high as the highest."""
    height = max(strip.shape[1] for strip in strips)
    return [F.pad(s, (0, 0, 0, 0, 0, height - s.shape[1]), value=WHITE) for s in strips]


def save(video: Tensor, stem: Path, fps: float) -> None:
    """Write a video [t, height, width, 3] to stem.gif and stem.mp4 and print these paths.

    Raises:
        UserError: a file cannot be written; the message names it.
    """
    paths = []
    for suffix, content in ((".gif", encode_gif(video, fps)), (".mp4", encode_mp4(video, fps))):
        path = stem.with_name(stem.name + suffix)
        try:
            write_atomically(str(path), lambda file, content=content: file.write(content))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        paths.append(path_to_text(str(path)))
    print_any(printable(" ".join(paths)))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.visualize",
        description="Draw reconstructions of videos, the best classes or attention as GIF and MP4.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "videos", nargs="*", metavar="VIDEO", help="files; none: the embedded synthetic videos"
    )
    add = flags.adder(parser)
    text = (
        "path, address or name of a pre-trained or fine-tuned model; None: the newest pre-trained "
    )
    add("--checkpoint", None, text + f"one of `make demo`, or else {RELEASED}")
    add("--attention", False, "draw where the last block of the encoder looks")
    ratios = "shares of patches to remove, a column for each"
    add("--mask_ratio", [0.95, 0.98], ratios, mask_ratio, nargs="+")
    text = "what to remove: random patches, the same places at all times (tube), time steps, or "
    add("--mask_type", "random", text + "cuboids (block)", choices=MASK_TYPES)
    text = "seed of the first video's masks; one more for each video after it"
    add("--seed", 0, text, flags.natural_int)
    add("--paste_visible", True, "show the true pixels of visible patches in the reconstruction")
    start = "position of the clip, from 0 (the start of a video) to 1 (its end)"
    add("--clip_start", 0.5, start, flags.share)
    fps = "frames per second of the pictures; None: the video's own speed"
    add("--fps", None, fps, flags.positive_float)
    grid = "put all videos into one picture with this many columns; None: one picture each"
    add("--grid", None, grid, flags.positive_int, metavar="COLUMNS")
    add("--output_dir", "./output/visualize", "folder of the pictures")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Load the model, draw every video and write the pictures."""
    videos = args.videos or embedded_videos()
    model = load_model(args.checkpoint, args.attention)
    if args.attention or is_classifier(model):
        defaults = parse_args([])
        given = [n for n in MASK_FLAGS if getattr(args, n) != getattr(defaults, n)]
        if given:
            raise UserError(f"--{given[0]} is for reconstructions; here nothing is masked")
    make_dirs(args.output_dir)
    sheets, names, fps = [], Counter(), args.fps
    for number, path in enumerate(videos):
        clip = load_clip(path, model, args.clip_start)
        print_any(f"{printable(path_to_text(str(path)))}: {clip.frames}")
        if args.attention:
            sheet = draw_attention(model, clip.pixels)
        elif is_classifier(model):
            best = classify(model, clip.pixels)
            print_any("\n".join(f"  {probability:.4f}  {name}" for name, probability in best))
            sheet = draw_classes(clip.pixels, best)
        else:
            masks = args.mask_ratio, args.mask_type, args.seed + number
            with usage_errors():
                sheet = draw(model, clip.pixels, *masks, args.paste_visible)
        if args.grid:
            sheets.append(sheet)
            fps = fps or clip.fps(len(sheet))  # of the first video
            continue
        stem = os.path.splitext(os.path.basename(path))[0]
        names[stem] += 1
        name = stem if names[stem] == 1 else f"{stem}_{names[stem]}"
        save(sheet, Path(args.output_dir, name), args.fps or clip.fps(len(sheet)))
    if args.grid:
        rows = [sheets[i : i + args.grid] for i in range(0, len(sheets), args.grid)]
        save(tile(rows, gap=16), Path(args.output_dir, "grid"), fps)


if __name__ == "__main__":
    run(main, parse_args)
