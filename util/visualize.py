"""What a masked autoencoder sees and predicts, and where an encoder looks, as pictures.

Shapes: N clips, C channels, T frames of a clip, t of them predicted, H W pixels, L tokens, K of
them visible. Pictures are uint8 RGB, channels last; a video is [t, H, W, C].
"""

import io
import math
from argparse import Namespace
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from util.dist import print0
from util.file_io import printable
from util.masking import fixed_masks
from util.meters import is_vis_epoch, last_x
from util.optim import autocast
from util.report import draw_confusion, report_classes, warned, worst_classes
from util.synthetic import write_video
from util.video.transforms import MEAN, STD, channels_first

if TYPE_CHECKING:
    from util.kinetics import Kinetics
    from util.meters import RunLog

REMOVED = 128  # grey level of removed patches
GAP, WHITE = 4, 255  # pixels between pictures, and their grey level

# The clips that TensorBoard shows:
NUM_CLIPS = 4
MAX_READS = 4 * NUM_CLIPS  # videos to try
STRIP_FRAMES = 4  # frames of a still picture
MIN_SIDE = 96  # pixels; smaller frames are enlarged


# --- reconstructions ----------------------------------------------------------------------------


class Reconstruction(NamedTuple):
    """The predicted frames of N clips in three versions, and the loss of every patch."""

    original: Tensor  # uint8 [N, t, H, W, C]
    masked: Tensor  # uint8 [N, t, H, W, C], removed patches grey
    reconstruction: Tensor  # uint8 [N, t, H, W, C]
    loss: Tensor  # float32 [N, L], mean squared error; training averages the removed patches
    mask: Tensor  # float32 [N, L], 1 = removed


def require_pictures(model: Any) -> None:
    """Raise ValueError if what a masked autoencoder predicts cannot be shown as pixels."""
    if model.target == "hog":
        raise ValueError("a model of target 'hog' predicts histograms of gradients, not pictures")


@torch.inference_mode()
def reconstruct(
    model: Any,
    clips: Tensor,
    mask_ratio: float,
    mask_type: str = "random",
    seed: int = 0,
    paste_visible: bool = True,
) -> Reconstruction:
    """Remove patches of clips and let a masked autoencoder predict them; the result is on the CPU.

    A model that was trained on normalised targets knows neither the brightness nor the contrast of
    a patch, or of its channels: its predictions get the mean and the deviation of the true ones.

    Args:
        model: a MaskedAutoencoderViT on any device. Its training mode and the global random state
            stay as they are. For another precision, call this under autocast.
        clips: uint8 [N, T, H, W, C], of the model's size, on any device.
        mask_ratio, mask_type, seed: see util.masking.fixed_masks.
        paste_visible: show visible patches' true pixels, not predictions that no loss has trained.

    With target "motion", all versions show differences to the frame before, and grey is none.

    Raises:
        ValueError: see fixed_masks and require_pictures; or the clips have another size.
    """
    require_pictures(model)
    imgs, pred, loss, mask = _predict(model, clips, mask_ratio, mask_type, seed)

    # Turn targets and predictions back into pixels.
    target = model.target_patches(imgs)
    mean, scale = model.target_statistics(target)
    pred = pred * scale + mean
    grey = (REMOVED / 255 - MEAN) / STD
    if model.target == "motion":
        target, pred = target + grey, pred + grey
    removed = mask.bool().unsqueeze(-1)
    masked = torch.where(removed, grey, target)
    reconstruction = torch.where(removed, pred, target) if paste_visible else pred
    versions = [_to_uint8(model.unpatchify(x)) for x in (target, masked, reconstruction)]
    return Reconstruction(*versions, loss=loss.cpu(), mask=mask.cpu())


@torch.inference_mode()
def _predict(
    model: Any, clips: Tensor, mask_ratio: float, mask_type: str = "random", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return clips as imgs [N, C, T, H, W], pred [N, L, P], loss and mask [N, L]: see reconstruct.

    P values are predicted of a patch, before the statistics of its target are applied.
    """
    embed = model.patch_embed
    size = [len(clips), embed.num_frames, embed.img_size, embed.img_size, 3]
    if list(clips.shape) != size:
        raise ValueError(f"clips of shape {list(clips.shape)} are not the model's: {size}")
    # Predict the removed patches.
    device = next(model.parameters()).device
    imgs = channels_first(clips.to(device))  # (N, C, T, H, W)
    masks = fixed_masks(len(imgs), embed.input_size, mask_ratio, mask_type, seed)
    mask, ids_restore, ids_keep = (tensor.to(device) for tensor in masks)
    latent = model.encode(imgs, ids_keep)
    if model.cls_embed and not model.cls_through_decoder:
        latent = latent[:, 1:]
    pred = model.forward_decoder(latent, ids_restore).float()  # (N, L, P)
    return imgs, pred, model.patch_losses(imgs, pred), mask


def _to_uint8(imgs: Tensor) -> Tensor:
    """Undo normalize: float [N, C, t, H, W] -> uint8 [N, t, H, W, C] on the CPU."""
    levels = (imgs * STD + MEAN).mul(255).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous().cpu()


# --- attention ----------------------------------------------------------------------------------


@torch.inference_mode()
def last_attention(model: Any, clips: Tensor) -> Tensor:
    """Return the shares of attention that the last block of an encoder gives to every token.

    They are softmax(q k^T / sqrt(hd)), averaged over the heads and over the tokens that the
    features come from: all patches or, with pool = "cls", the first token alone. A row sums to 1.

    Args:
        model: a masked autoencoder or a classifier in evaluation mode, on any device.
        clips: uint8 [N, T, H, W, C]; no patch is removed.

    Returns:
        float32 [N, (1 +) L] on the CPU, the class token first if there is one.
    """
    block, inputs = model.blocks[-1], []
    hook = block.register_forward_pre_hook(lambda _, arguments: inputs.extend(arguments))
    model.forward_features(channels_first(clips.to(next(model.parameters()).device)))
    hook.remove()
    x, attn = block.norm1(inputs[0]), block.attn  # (N, (1 +) L, D)
    q, k = (layer(x).unflatten(2, (attn.num_heads, -1)) for layer in (attn.q, attn.k))
    q = q[:, :1] if getattr(model, "pool", "") == "cls" else q[:, int(model.cls_embed) :]
    logits = torch.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(q.shape[-1])
    return logits.float().softmax(dim=-1).mean(dim=(1, 2)).cpu()


def lay_over(video: Tensor, heat: Tensor) -> Tensor:
    """Lay heat [t, h, w] over a grey video, uint8 [T, H, W, 3], from black (least) to yellow.

    Time steps are repeated; space is interpolated.
    """
    T, H, W, _ = video.shape
    heat = heat.repeat_interleave(T // len(heat), dim=0) - heat.min()
    heat = heat / heat.max().clamp(min=1e-20)  # all alike: black
    levels = (
        F.interpolate(heat.unsqueeze(1), (H, W), mode="bilinear")[:, 0].mul(255).to(torch.uint8)
    )
    colours = [cv2.applyColorMap(x.numpy(), cv2.COLORMAP_INFERNO)[..., ::-1] for x in levels]
    grey = video.float().mean(dim=3, keepdim=True)
    return (0.4 * grey + 0.6 * torch.from_numpy(np.stack(colours))).to(torch.uint8)


# --- pictures -----------------------------------------------------------------------------------


def enlarge(video: Tensor, factor: int) -> Tensor:
    """Repeat every pixel of a video [t, H, W, C] factor times in both directions."""
    return video.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def tile(rows: Sequence[Sequence[Tensor]], gap: int = GAP) -> Tensor:
    """Lay videos [t, H, W, C] out in rows and columns, with white gaps, as one video.

    Videos in a row have the same height, and those in a column the same width. A row may have fewer
    videos than the first one; the rest of it is white.
    """
    margins = (0, 0, 0, gap, 0, gap)  # of channels, width, height
    strips = [torch.cat([F.pad(v, margins, value=WHITE) for v in row], dim=2) for row in rows]
    width = strips[0].shape[2]
    strips = [F.pad(strip, (0, 0, 0, width - strip.shape[2]), value=WHITE) for strip in strips]
    sheet = torch.cat(strips, dim=1)
    return sheet[:, : sheet.shape[1] - gap, : width - gap].contiguous()


def encode_gif(video: Tensor, fps: float) -> bytes:
    """Encode a video [t, H, W, 3] as a GIF of 256 colours that repeats for ever.

    The time of a frame is rounded to hundredths of a second, as GIF needs.
    """
    # All frames share a palette, from a quarter of the pixels, so that still parts do not flicker.
    everything = Image.fromarray(video[:, ::2, ::2].flatten(0, 1).numpy())
    palette = everything.quantize(254, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    colours = palette.getpalette() or []
    indexed = []
    for frame in video.numpy():
        # Pillow does not always take the nearest colour, so grey and white are set here
        index = np.array(Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE))
        for number, level in enumerate((REMOVED, WHITE)):
            index[(frame == level).all(axis=-1)] = len(colours) // 3 + number
        indexed.append(Image.fromarray(index))
        indexed[-1].putpalette([*colours, *[REMOVED] * 3, *[WHITE] * 3])
    file = io.BytesIO()
    time = max(2, round(100 / fps)) * 10  # ms; browsers slow down GIFs with less than 20
    indexed[0].save(file, "GIF", save_all=True, append_images=indexed[1:], duration=time, loop=0)
    return file.getvalue()


def encode_mp4(video: Tensor, fps: float) -> bytes:
    """Encode a video [t, H, W, 3] as H.264 in MP4; a white line makes odd sides even."""
    _, height, width, _ = video.shape
    even = F.pad(video, (0, 0, 0, width % 2, 0, height % 2), value=WHITE)
    file = io.BytesIO()
    write_video(file, even.numpy(), Fraction(fps).limit_denominator(1000), {"crf": "18"})
    return file.getvalue()


# --- in TensorBoard -----------------------------------------------------------------------------


class FixedClips:
    """Show reconstructions of the same clips with the same masks, epoch after epoch.

    The clips are the centres of the first readable videos of the csv, and the masks have the run's
    --mask_type and --mask_ratio, even with --mask_ratio_end. Only the main process draws; the other
    ranks wait for it at their next exchange. Training is not affected: the random state and the
    model's mode stay as they are, and the loader is not used. `dataset` is one in mode "test" with
    one view per video, and `args` are the flags of pre-training.
    """

    def __init__(self, dataset: "Kinetics", args: Namespace, device: torch.device):
        self.dataset, self.args, self.device = dataset, args, device
        self.clips: Tensor | None = None  # uint8 [N, T, H, W, C], read at the first use

    def show(self, model: nn.Module, epoch: int, log: "RunLog") -> None:
        """Log what the unwrapped model predicts, every vis_period epochs and after the last one."""
        if not is_vis_epoch(epoch, self.args) or log.writer is None:
            return
        if self.clips is None:
            self.clips = self._read()
            if model.target == "hog":
                print0("--target hog has no pictures: TensorBoard only shows the clips' losses")
        if not len(self.clips):
            return
        with warned("reconstructions are not shown in TensorBoard"):
            self._log(model, self.clips, epoch, log)

    def _log(self, model: nn.Module, clips: Tensor, epoch: int, log: "RunLog") -> None:
        # Compiled blocks would be compiled again for this number of clips.
        eager = torch.compiler.set_stance("force_eager")
        with eager, autocast(self.device, self.args.precision):
            masks = self.args.mask_ratio, self.args.mask_type
            if model.target == "hog":
                result, (*_, loss, mask) = None, _predict(model, clips, *masks)
            else:
                result = reconstruct(model, clips, *masks)
                loss, mask = result.loss, result.mask

        # Log the losses of the removed patches.
        x = last_x(epoch, self.args.repeat_aug)
        losses = loss[mask.bool()].cpu()
        log.scalar("fixed_clips/loss", losses.mean().item(), x)
        log.histogram("fixed_clips/patch_loss", losses.numpy(), x)

        # Log original, masked and reconstruction side by side: a GIF and some frames as a picture.
        if result is None:
            return
        versions = zip(result.original, result.masked, result.reconstruction, strict=True)
        factor = max(1, MIN_SIDE // clips.shape[2])
        t = result.original.shape[1]
        fps = 30 / self.args.sampling_rate * t / self.args.num_frames
        step = -(-t // STRIP_FRAMES)
        for i, clip in enumerate(versions):
            rows = [enlarge(frames, factor) for frames in clip]
            log.gif(f"fixed_clips/video_{i}", encode_gif(tile([rows]), fps), x)
            strip = tile([list(row[::step, None]) for row in rows])[0]
            log.image(f"fixed_clips/frames_{i}", strip.numpy(), x)

    def _read(self) -> Tensor:
        """Read the first readable videos of the csv and report the unreadable ones."""
        clips: list[Tensor] = []
        for row in range(min(MAX_READS, len(self.dataset))):
            sample = self.dataset[0, row]
            if not sample.errors:
                clips.append(sample.clips[0])
            for reason in sample.errors.values():
                print0(f"unreadable video, not shown in TensorBoard: {reason}")
            if len(clips) == NUM_CLIPS:
                break
        return torch.stack(clips) if clips else torch.empty(0)


def show_validation(
    stats: dict[str, float], counts: np.ndarray, names: list[str], log: "RunLog", x: int
) -> None:
    """Log what `evaluate` returns: statistics, confusion matrix, accuracies, the worst classes.

    Args:
        counts: of labels by predictions, int [C, C + 1] (see count_confusions).
        names: of the classes; [] shows their numbers.
    """
    for name, value in stats.items():
        log.scalar(f"val/{name}", value, x)
    confusion, unpredicted = counts[:, :-1], counts[:, -1]
    if log.writer is None or not confusion.any():
        return
    reports = report_classes(confusion, unpredicted)
    with warned("the accuracies of the classes are not shown in TensorBoard"):
        shown = list(map(printable, names)) or [str(label) for label in range(len(confusion))]
        log.image("val/confusion", draw_confusion(confusion, shown), x)
        accuracies = np.array([report.accuracy for report in reports if report.videos])
        log.histogram("val/class_acc", accuracies, x)
        log.text("val/worst_classes", worst_classes(reports, shown), x)
