"""Features of videos by a frozen encoder: clips as its model takes them, and files of features.

Shapes: V views of a video, T frames, H W pixels.
"""

import os
from typing import Any

from torch import Tensor

from util.errors import UserError
from util.kinetics import Kinetics, VideoIndex
from util.video.transforms import channels_first, normalize
from util.video_vit import Encoder


def load_clips(
    path: str | os.PathLike[str], model: Encoder, num_clips: int = 1, num_crops: int = 1
) -> Tensor:
    """Read the views of a video that main_test.py scores: float32 [V, 3, T, H, W], on the CPU.

    The pixels are normalised, and the clips have the size and the sampling that the model was
    trained with (model.sampling_rate and model.sampling, which loading a checkpoint sets).

    Args:
        path: path or address.
        num_clips: clips spread evenly over the video; a single one is centred.
        num_crops: crops of each clip along the longer side of the frames; a single one is centred.

    Raises:
        UserError: the video cannot be read, or the numbers are not positive; it names the file.
    """
    path, embed = os.fspath(path), model.patch_embed
    if min(num_clips, num_crops) < 1:
        raise UserError(f"{path}: num_clips = {num_clips}, num_crops = {num_crops} give no view")
    sizes = embed.img_size, embed.num_frames, model.sampling_rate
    views: dict[str, Any] = {"num_clips": num_clips, "num_crops": num_crops}
    views["sampling"] = model.sampling
    sample = Kinetics(VideoIndex.of_files([path]), "test", *sizes, **views)[0, 0]
    if sample.errors:
        raise UserError("; ".join(sample.errors.values()))
    return normalize(channels_first(sample.clips).contiguous())
