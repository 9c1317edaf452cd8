"""What a masked autoencoder sees and what it predicts, as pictures.

Shapes: N clips, C channels, T frames of a clip, t of them predicted, H W pixels, L tokens, K of
them visible.
Pictures are uint8 RGB, channels last; a video is [t, H, W, C].
"""

import io
from argparse import Namespace
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from util.dist import print0
from util.kinetics import Kinetics
from util.meters import RunLog, last_x
from util.optim import autocast
from util.pos_embed import Grid
from util.report import draw_confusion, report_classes, worst_classes
from util.video.transforms import MEAN, STD, normalize

MASK_TYPES = ("random", "tube", "time", "block")
REMOVED = 128  # grey level of removed patches
GAP, WHITE = 4, 255  # pixels between pictures, and their level


class Masks(NamedTuple):
    """Which patches of every clip are removed, in the form that the autoencoder takes."""

    mask: Tensor  # float32 [N, L], 1 = removed
    ids_restore: Tensor  # int64 [N, L]
    ids_keep: Tensor  # int64 [N, K]


class Reconstruction(NamedTuple):
    """The predicted frames of N clips in three versions, and how wrong the prediction is."""

    original: Tensor  # uint8 [N, t, H, W, C]
    masked: Tensor  # uint8 [N, t, H, W, C], removed patches grey
    reconstruction: Tensor  # uint8 [N, t, H, W, C]
    loss: Tensor  # float32 [N, L], mean square of each patch; training averages the removed ones
    mask: Tensor  # float32 [N, L], 1 = removed


def draw_masks(
    num_clips: int, grid: Grid, mask_ratio: float, mask_type: str = "random", seed: int = 0
) -> Masks:
    """Draw masks of the kinds that the paper compares; the ith clip's comes from (seed, i) alone.

    With the same seed, what is visible at a higher ratio is visible at a lower one.

    Args:
        grid: tokens along t, h, w.
        mask_ratio: share removed, above 0 and below 1; at least one patch, tube or step stays.
        mask_type: "random" patches, as in pre-training; "tube": the same places at all times;
            "time": whole steps; "block": cuboids of half the clip's extents, until enough is gone.

    Raises:
        ValueError: a ratio or type that is not among those, or a negative seed.
    """
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio = {mask_ratio:g} is not above 0 and below 1")
    if mask_type not in MASK_TYPES:
        raise ValueError(f"mask_type {mask_type!r} is none of {', '.join(MASK_TYPES)}")
    if seed < 0:
        raise ValueError(f"seed = {seed} is negative")
    t, h, w = grid
    unit = {"tube": t, "time": h * w}.get(mask_type, 1)  # tokens that go or stay together
    L = t * h * w
    K = max(1, int(L // unit * (1 - mask_ratio))) * unit  # truncated, as in pre-training
    rngs = [np.random.default_rng((seed, i)) for i in range(num_clips)]
    noise = torch.stack([torch.from_numpy(_noise(rng, grid, mask_type)) for rng in rngs])
    # stable: equal noise, that of a tube or step, keeps its tokens together
    ids_shuffle = noise.flatten(1).argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    return Masks((ids_restore >= K).float(), ids_restore, ids_shuffle[:, :K])


def _noise(rng: np.random.Generator, grid: Grid, mask_type: str) -> np.ndarray:
    """Return float64 [t, h, w]: the tokens with the smallest values stay visible."""
    t, h, w = grid
    if mask_type == "block":
        return _block_noise(rng, grid)
    shape = {"random": (t, h, w), "tube": (1, h, w), "time": (t, 1, 1)}[mask_type]
    return np.broadcast_to(rng.random(shape), grid).copy()


def _block_noise(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    """Cover the grid with cuboids one after the other; what is covered first has most noise."""
    half = (np.array(grid) + 1) // 2
    noise = np.zeros(grid)
    cuboid = 0
    while (noise == 0).any():
        cuboid += 1
        start = rng.integers(1 - half, grid)  # they may stick out: corners are not favoured
        stop = start + half
        covered = noise[tuple(slice(max(a, 0), b) for a, b in zip(start, stop, strict=True))]
        covered[covered == 0] = -cuboid
    return noise


@torch.inference_mode()
def reconstruct(
    model: Any,
    clips: Tensor,
    mask_ratio: float,
    mask_type: str = "random",
    seed: int = 0,
    paste_visible: bool = True,
) -> Reconstruction:
    """Remove patches of clips and let a masked autoencoder predict them.

    A model of normalised targets (norm_pix_loss) does not know brightness and contrast of a patch:
    its predictions get the mean and the deviation of the true patch.

    Args:
        model: a MaskedAutoencoderViT, on any device; its training mode and the global random state
            are left as they are. Call under autocast for another precision.
        clips: uint8 [N, T, H, W, C], of the model's size, on any device.
        mask_ratio, mask_type, seed: as in draw_masks.
        paste_visible: show the true pixels of the visible patches in the reconstruction; else the
            prediction there too, which no loss has trained.

    Returns:
        everything on the CPU; t is the model's pred_t_dim.

    Raises:
        ValueError: a ratio or type that draw_masks refuses, or clips of another size.
    """
    side, frames = model.patch_embed.img_size, model.patch_embed.num_frames
    if tuple(clips.shape[1:]) != (frames, side, side, 3):
        raise ValueError(
            f"clips of shape {list(clips.shape)} are not the model's: [N, {frames}, {side}, "
            f"{side}, 3]"
        )
    device = next(model.parameters()).device
    imgs = normalize(clips.to(device))  # (N, C, T, H, W)
    masks = draw_masks(len(imgs), model.patch_embed.input_size, mask_ratio, mask_type, seed)
    mask, ids_restore, ids_keep = (tensor.to(device) for tensor in masks)
    latent = model.encode(imgs, ids_keep)
    if model.cls_embed and not model.cls_through_decoder:
        latent = latent[:, 1:]
    pred = model.forward_decoder(latent, ids_restore).float()  # (N, L, u*p*p*C)

    loss = model.patch_losses(imgs, pred)  # (N, L)

    target = model.patchify(model.target_frames(imgs))
    if model.norm_pix_loss:
        var, mean = torch.var_mean(target, dim=-1, keepdim=True)  # unbiased
        pred = pred * (var + 1e-6).sqrt() + mean
    removed = mask.bool().unsqueeze(-1)
    grey = torch.full_like(target, (REMOVED / 255 - MEAN) / STD)
    original, masked, reconstruction = (
        _to_uint8(model.unpatchify(x))
        for x in (
            target,
            torch.where(removed, grey, target),
            torch.where(removed, pred, target) if paste_visible else pred,
        )
    )
    return Reconstruction(original, masked, reconstruction, loss.cpu(), mask.cpu())


def _to_uint8(imgs: Tensor) -> Tensor:
    """Undo normalize: float [N, C, t, H, W] -> uint8 [N, t, H, W, C] on the CPU."""
    levels = (imgs * STD + MEAN).mul(255).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous().cpu()


def enlarge(video: Tensor, factor: int) -> Tensor:
    """Repeat every pixel of a video [t, H, W, C] factor times in both directions."""
    return video.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def tile(rows: Sequence[Sequence[Tensor]], gap: int = GAP) -> Tensor:
    """Lay videos [t, H, W, C] out in rows and columns with white gaps between: one video.

    Videos of a row have the same height, those of a column the same width; rows may be shorter than
    the first one, which leaves white at their ends.
    """
    heights = [row[0].shape[1] for row in rows]
    widths = [video.shape[2] for video in rows[0]]
    t, C = rows[0][0].shape[0], rows[0][0].shape[3]
    size = [sum(extents) + gap * (len(extents) - 1) for extents in (heights, widths)]
    sheet = torch.full((t, *size, C), WHITE, dtype=torch.uint8)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for video, width in zip(row, widths, strict=False):
            sheet[:, top : top + height, left : left + width] = video
            left += width + gap
        top += height + gap
    return sheet


def encode_gif(video: Tensor, fps: float) -> bytes:
    """Encode a video [t, H, W, 3] as a GIF that plays for ever, its 256 colours chosen once.

    GIF counts hundredths of a second: the frame rate is rounded to that.
    """
    # one palette for all frames, from a quarter of the pixels: what stands still does not flicker
    everything = Image.fromarray(video[:, ::2, ::2].flatten(0, 1).numpy())
    palette = everything.quantize(254, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    colours = palette.getpalette() or []
    indexed = []
    for frame in video.numpy():
        # Pillow takes a near colour, not the nearest: ours would be off, and are put in by hand
        index = np.array(Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE))
        for number, level in enumerate((REMOVED, WHITE)):
            index[(frame == level).all(axis=-1)] = len(colours) // 3 + number
        indexed.append(Image.fromarray(index))
        indexed[-1].putpalette([*colours, *[REMOVED] * 3, *[WHITE] * 3])
    file = io.BytesIO()
    indexed[0].save(
        file,
        "GIF",
        save_all=True,
        append_images=indexed[1:],
        duration=max(2, round(100 / fps)) * 10,  # ms; browsers slow down what is below 20
        loop=0,
    )
    return file.getvalue()


def encode_mp4(video: Tensor, fps: float) -> bytes:
    """Encode a video [t, H, W, 3] as H.264 in an MP4; odd sides get a white line, as they must."""
    _, height, width, _ = video.shape
    even = F.pad(video, (0, 0, 0, width % 2, 0, height % 2), value=WHITE)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1000)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
        stream.height, stream.width = even.shape[1:3]
        stream.pix_fmt = "yuv420p"  # what every player takes
        for frame in even.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


NUM_CLIPS = 4  # that are shown


MAX_READS = 4 * NUM_CLIPS  # videos that are tried for them


MASK_SEED = 0


STRIP_FRAMES = 4  # of a clip in a still picture


MIN_SIDE = 96  # pixels: smaller frames are enlarged


class FixedClips:
    """Show what a masked autoencoder makes of the same clips and masks, epoch after epoch.

    They are the centres of the first readable videos of the csv. Only the main process works; the
    others wait for it at their next exchange. Nothing of the training changes: neither the random
    state nor the model's mode, and the loader is not used.

    Args:
        dataset: in mode "test", with one view per video.
        args: with mask_ratio, vis_period (epochs, 0: never), epochs, precision, repeat_aug,
            num_frames and sampling_rate.
    """

    def __init__(self, dataset: Kinetics, args: Namespace, device: torch.device):
        self.dataset = dataset
        self.args = args
        self.device = device
        self.clips: torch.Tensor | None = None  # uint8 [N, T, H, W, C], read when first needed

    def show(self, model: nn.Module, epoch: int, log: RunLog) -> None:
        """Log pictures and the loss of every removed patch every vis_period epochs and at the end.

        Args:
            model: a MaskedAutoencoderViT without wrappers.
            epoch: that has just been trained.
        """
        period = self.args.vis_period
        due = period and ((epoch + 1) % period == 0 or epoch + 1 == self.args.epochs)
        if not due or log.writer is None:
            return
        if self.clips is None:
            self.clips = self._read()
        if not len(self.clips):
            return
        with autocast(self.device, self.args.precision):
            result = reconstruct(model, self.clips, self.args.mask_ratio, seed=MASK_SEED)
        x = last_x(epoch, self.args.repeat_aug)
        losses = result.loss[result.mask.bool()]
        log.scalar("fixed_clips/loss", losses.mean().item(), x)
        log.histogram("fixed_clips/patch_loss", losses.numpy(), x)
        versions = zip(result.original, result.masked, result.reconstruction, strict=True)
        factor = max(1, MIN_SIDE // self.clips.shape[2])
        for i, clip in enumerate(versions):
            rows = [enlarge(frames, factor) for frames in clip]
            video = tile([rows])  # side by side
            log.gif(f"fixed_clips/video_{i}", encode_gif(video, self._fps(len(video))), x)
            step = -(-len(rows[0]) // STRIP_FRAMES)
            strip = tile([list(row[::step, None]) for row in rows])[0]
            log.image(f"fixed_clips/frames_{i}", strip.numpy(), x)

    def _fps(self, num_frames: int) -> float:
        """Return the speed at which predicted frames move as in the video."""
        return 30 / self.args.sampling_rate * num_frames / self.args.num_frames

    def _read(self) -> torch.Tensor:
        """Read the first videos of the csv that can be read; others are reported."""
        clips: list[torch.Tensor] = []
        for row in range(min(MAX_READS, len(self.dataset))):
            sample = self.dataset[0, row]
            if sample.errors:
                reason = "; ".join(sample.errors.values())
                print0(f"unreadable video, not shown in TensorBoard: {reason}")
            else:
                clips.append(sample.clips[0])
            if len(clips) == NUM_CLIPS:
                break
        shape = self.dataset.clips_shape[1:]
        return torch.stack(clips) if clips else torch.empty((0, *shape), dtype=torch.uint8)


def show_classes(confusion: np.ndarray, names: list[str], log: RunLog, x: int) -> None:
    """Log the confusion matrix, the spread of the classes' accuracy and the worst of them.

    Args:
        confusion: int [C, C], labels by predictions.
        x: place on TensorBoard's x axis.
    """
    if log.writer is None or not confusion.any():
        return
    reports = report_classes(confusion)
    log.image("val/confusion", draw_confusion(confusion), x)
    accuracies = np.array([report.accuracy for report in reports if report.videos])
    log.histogram("val/class_acc", accuracies, x)
    log.text("val/worst_classes", worst_classes(reports, names), x)
