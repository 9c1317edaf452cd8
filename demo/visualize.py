"""Draw what a masked autoencoder sees and predicts: original, masked, reconstruction.

    python -m demo.visualize
    python -m demo.visualize VIDEO --checkpoint k400/vit_large --mask_ratio 0.95 0.98

This writes an animated GIF and an MP4 for every video, with the mask ratios side by side. They show
the frames that the model predicts, 8 of 16 with the paper's recipe. A CPU is enough. See
demo/README.md.
"""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from models_mae import MaskedAutoencoderViT
from util import args as flags
from util.checkpoint import newest_checkpoint
from util.errors import UserError
from util.file_io import local_path, make_dirs, write_atomically
from util.kinetics import cut_views, dense_frames
from util.masking import MASK_TYPES
from util.run import run, usage_errors
from util.synthetic import write_dataset
from util.video.decode import Video, VideoError
from util.video.sampling import Box, uniform_crop_box
from util.visualize import (
    WHITE,
    encode_gif,
    encode_mp4,
    enlarge,
    reconstruct,
    require_pictures,
    tile,
)
from util.weights import apply_weights, read_weights

ROOT = Path(__file__).resolve().parent.parent
DEMO_RUN = ROOT / "output/demo/pretrain"  # of `make demo`
RELEASED = "k400/vit_large"
SAMPLING_RATE = 4  # of models whose file does not record it
MIN_SIDE = 128  # pixels; smaller pictures are enlarged
ROWS = ("original", "masked", "reconstruction")  # fields of a Reconstruction
NOTE = {
    "patch": "mean and contrast of every patch are the original's",
    "channel": "mean and contrast of every patch's colours are the original's",
    "motion": "differences to the frame before; grey: no change",
}
mask_ratio = flags.number(
    float, "a share above 0 and below 1, such as 0.95", lambda value: 0 < value < 1
)


class Autoencoder(NamedTuple):
    """A model and what it expects of a clip."""

    model: MaskedAutoencoderViT
    sampling_rate: int  # a clip spans num_frames * sampling_rate frames at 30 fps

    @property
    def fps(self) -> float:
        """Frames per second at which the predicted frames show the video's own speed."""
        return 30 / self.sampling_rate * self.model.pred_t_dim / self.model.patch_embed.num_frames


def default_checkpoint() -> str:
    """Return the newest checkpoint of `make demo`, or else the name of a released one."""
    return newest_checkpoint(str(DEMO_RUN)) or RELEASED


def load_autoencoder(checkpoint: str | None = None) -> Autoencoder:
    """Rebuild the autoencoder of a checkpoint from its file alone, on the CPU.

    Args:
        checkpoint: path, address or name of a released one; None: default_checkpoint.

    Raises:
        UserError: the checkpoint cannot be found, downloaded or read, it has no decoder, or its
            predictions have no pictures.
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
    if not weights.has_decoder:
        raise weights.lacks("decoder", "to reconstruct, give a pre-trained checkpoint")
    with torch.device("meta"), usage_errors():  # random weights would take seconds
        model = MaskedAutoencoderViT(**weights.autoencoder_arguments())
        require_pictures(model)
    apply_weights(model, weights, keep_head=False)
    return Autoencoder(model.eval(), int(weights.flags.get("sampling_rate", SAMPLING_RATE)))


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


def load_clip(path: str | Path, autoencoder: Autoencoder, start: float = 0.5) -> Tensor:
    """Read a clip of the model's size from the centre square of a video: uint8 [1, T, H, W, C].

    Args:
        path: path or address.
        start: position of the clip, from 0 (the start of the video) to 1 (its end).

    Raises:
        UserError: the video cannot be read; the message names it.
    """
    embed = autoencoder.model.patch_embed
    clip = torch.empty((1, embed.num_frames, embed.img_size, embed.img_size, 3), dtype=torch.uint8)

    def centre_square(height: int, width: int) -> list[Box]:
        return [uniform_crop_box(height, width, min(height, width), 0, 1)]

    def place(total: float, length: float) -> float:
        return start * max(total - length, 0)

    try:
        with Video(local_path(str(path))) as video:
            frames = dense_frames(video, embed.num_frames, autoencoder.sampling_rate, place)
            cut_views(video, frames[np.newaxis], centre_square, clip)
    except VideoError as error:
        raise UserError(str(error)) from error
    return clip


def draw(
    autoencoder: Autoencoder,
    clip: Tensor,
    mask_ratios: Sequence[float],
    mask_type: str = "random",
    seed: int = 0,
    paste_visible: bool = True,
) -> Tensor:
    """Draw a clip's three rows with captions, a column for each ratio: uint8 [t, height, width, 3].

    The captions state the share of patches that is really removed, after rounding.

    Args:
        clip: uint8 [1, T, H, W, C].

    Raises:
        ValueError: util.masking.fixed_masks does not accept the ratio, the type or the seed.
    """
    # A reconstruction for each ratio
    model = autoencoder.model
    columns = [
        reconstruct(model, clip, ratio, mask_type, seed, paste_visible) for ratio in mask_ratios
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


def save(video: Tensor, stem: Path, fps: float) -> list[Path]:
    """Write a video [t, height, width, 3] to stem.gif and stem.mp4 and return these paths.

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
        paths.append(path)
    return paths


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.visualize",
        description="Draw original, masked and reconstructed frames of videos as GIF and MP4.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "videos", nargs="*", metavar="VIDEO", help="files; none: the embedded synthetic videos"
    )
    add = flags.adder(parser)
    add(
        "--checkpoint",
        None,
        "path, address or name of a pre-trained model; None: the newest one of `make demo`, or "
        f"else {RELEASED}",
    )
    ratios = "shares of patches to remove, a column for each"
    add("--mask_ratio", [0.95, 0.98], ratios, mask_ratio, nargs="+")
    add(
        "--mask_type",
        "random",
        "what to remove: random patches, the same places at all times (tube), time steps, or "
        "cuboids (block)",
        choices=MASK_TYPES,
    )
    add(
        "--seed",
        0,
        "seed of the first video's masks; one more for each video after it",
        flags.natural_int,
    )
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
    autoencoder = load_autoencoder(args.checkpoint)
    fps = args.fps or autoencoder.fps
    make_dirs(args.output_dir)
    sheets, names = [], Counter()
    for number, path in enumerate(videos):
        clip = load_clip(path, autoencoder, args.clip_start)
        masks = args.mask_ratio, args.mask_type, args.seed + number
        with usage_errors():
            sheet = draw(autoencoder, clip, *masks, args.paste_visible)
        if args.grid:
            sheets.append(sheet)
            continue
        stem = os.path.splitext(os.path.basename(path))[0]
        names[stem] += 1
        name = stem if names[stem] == 1 else f"{stem}_{names[stem]}"
        print(*save(sheet, Path(args.output_dir, name), fps))
    if args.grid:
        rows = [sheets[i : i + args.grid] for i in range(0, len(sheets), args.grid)]
        print(*save(tile(rows, gap=16), Path(args.output_dir, "grid"), fps))


if __name__ == "__main__":
    run(main, parse_args)
