"""Models for torch.hub: torch.hub.load("OWNER/REPO", "mae_vit_large_patch16", pretrained="k400").

`pretrained` is the name of a data set with released weights (k400, k600, k700; ViT-L and ViT-H), or
the path or address of a checkpoint in a format that util/weights.py reads. Clips are uint8
[N, 3, T, H, W], or float, normalised by mean 0.45 and standard deviation 0.225. `load_clips` reads
them from a video, and `features, tokens = model.encode_features(clips)` encodes them. The features
[N, D] are the mean of an autoencoder's tokens after its norm, and what the head of a classifier
sees: the norm of the tokens' mean, or of the class token. The patch tokens [N, L, D], which
`model.forward_features(clips)` returns as well, have passed the norm of an autoencoder, but none in
a classifier.
"""

import contextlib
import functools
import importlib.util
import os
import re
import sys
import types
import typing

import torch
from torch import nn

# Only modules are imported here, because torch.hub.list shows every public callable of this file.

_FOLDER = os.path.dirname(os.path.realpath(__file__))
_NAMES = ("util", "models_mae", "models_vit")
_PREFIX = re.sub(r"\W", "_", f"hub{_FOLDER}_")


def _take(prefix: str = "") -> dict[str, typing.Any]:
    """Remove PREFIX + the project's modules from sys.modules; return them without the prefix."""
    tops = [prefix + name for name in _NAMES]
    names = [name for name in sys.modules if name.partition(".")[0] in tops]
    return {name.removeprefix(prefix): sys.modules.pop(name) for name in names}


def _is_ours(name: str, loaded: dict[str, typing.Any]) -> bool:
    """Return whether the caller's `import NAME` gives the module of this folder."""
    find = importlib.util.find_spec
    spec = getattr(loaded[name], "__spec__", None) if name in loaded else find(name)
    origin = getattr(spec, "origin", None) or os.sep  # none for a folder without __init__.py
    return os.path.realpath(origin).startswith(_FOLDER + os.sep)


@contextlib.contextmanager
def _our_modules() -> typing.Iterator[None]:
    """Import the project's modules from this folder in the body; the caller's imports stay theirs.

    If the caller's `import util` gives another module, or none, ours are kept in sys.modules under
    names with a prefix, where the next call, pickle and torch.compile find them.
    """
    path, theirs, shared = sys.path, _take(), False
    try:
        # torch.hub has put this folder first on the path
        sys.path = path[1:] if __name__ == "hubconf.py" else path
        shared = all(_is_ours(name, theirs) for name in _NAMES)
        sys.modules.update(theirs if shared else _take(_PREFIX))
        sys.path = [_FOLDER, *path]
        yield
    finally:
        sys.path = path
        for name, module in ({} if shared else _take()).items():
            for value in vars(module).values():
                if isinstance(value, type | types.FunctionType) and value.__module__ == name:
                    value.__module__ = _PREFIX + name
            module.__name__ = _PREFIX + name
            sys.modules[_PREFIX + name] = module
        sys.modules.update(theirs)


with _our_modules():
    import models_mae
    import models_vit
    from util import errors, file_io, run, weights

dependencies = ["cv2", "torch", "timm", "numpy", "iopath", "safetensors", "yaml"]

SIZES = ("patch_size", "embed_dim", "depth")
HEADS = ("num_heads", "decoder_num_heads")


@_our_modules()  # for imports within functions
@run.usage_errors()  # for ValueErrors of the constructors
def _load(name: str, pretrained: str | None = None, **arguments: typing.Any) -> nn.Module:
    """Build a model by name.

    Args:
        pretrained: k400, k600 or k700, or the path or address of a checkpoint; None: fresh weights.
        arguments: constructor arguments; with `pretrained` they default to the checkpoint's, and
            positions are resized to another img_size or num_frames.

    Raises:
        UserError: the weights do not exist or have other sizes, or sizes do not divide.
    """
    build: typing.Any = (models_mae.MODELS | models_vit.MODELS)[name]
    if pretrained is None:
        return build(**arguments)
    if not isinstance(pretrained, str):
        raise errors.UserError(f"pretrained = {pretrained!r} must be k400, k600, k700 or a path")
    if f"{pretrained}/vit_large" in file_io.MD5:
        pretrained = f"{pretrained}/{name.removeprefix('mae_').removesuffix('_patch16')}"
        if pretrained not in file_io.MD5:
            there = "there are some of mae_vit_large_patch16 and mae_vit_huge_patch16"
            raise errors.UserError(f"no released weights of {name}; {there}")
    found = weights.read_weights(pretrained)
    wanted = {k: build.keywords[k] for k in SIZES}
    sizes = {k: found.arguments[k] for k in SIZES}
    if wanted != sizes:
        models = models_mae.MODELS if name in models_mae.MODELS else models_vit.MODELS
        hint = "".join(f"; load {known}" for known in weights.models_of(sizes, models))
        raise errors.UserError(f"{pretrained} is not a {name}: it has {sizes}, not {wanted}{hint}")
    # shapes do not show the number of heads: if the file does not state it, the name gives it
    heads = {k: build.keywords[k] for k in HEADS if k in build.keywords}
    arguments = {k: v for k, v in heads.items() if k not in found.stated} | arguments
    if name in models_mae.MODELS:
        model = models_mae.MaskedAutoencoderViT(**found.autoencoder_arguments(**arguments))
    else:
        model = models_vit.VisionTransformer(**found.classifier_arguments(**arguments))
    keep_head = name in models_vit.MODELS and weights.has_head_for(found, model)
    weights.apply_weights(model, found, keep_head)
    return model.eval()


@_our_modules()
def load_clips(
    path: str | os.PathLike[str], model: typing.Any, num_clips: int = 1, num_crops: int = 1
) -> torch.Tensor:
    """Read a video as a model's clips: float32 [V, 3, T, H, W], normalised, on the CPU.

    The clips have the size and the sampling that the model was trained with; the V views are those
    that main_test.py scores.

    Args:
        path: path or address of a video.
        model: a model of this file.
        num_clips: clips spread evenly over the video; a single one is centred.
        num_crops: crops of each clip along the longer side of the frames; a single one is centred.

    Raises:
        UserError: the video cannot be read; the message names it.
    """
    from util import features  # here, because models need no decoder of videos

    return features.load_clips(path, model, num_clips, num_crops)


for _name in [*models_mae.MODELS, *models_vit.MODELS]:
    _entry: typing.Any = functools.partial(_load, _name)
    _entry.__doc__ = _load.__doc__  # torch.hub.help shows it
    globals()[_name] = _entry
