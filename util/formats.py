"""Weights of this family's checkpoints and its neighbours', read into our names and our models.

FINETUNE.md lists the formats; util/convert.py writes them.
Shapes: C channels, T frames, L tokens, D width; kernels are [D, C, t, p, p].
"""

import argparse
import json
import math
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from util.errors import UserError
from util.pos_embed import (
    Grid,
    sincos_pos_embed,
    widen,
)
from util.video.transforms import MEAN, STD

OURS = "MAE"  # this project's and the reference implementation's names
PYSLOWFAST = "PySlowFast"
FIRST_RELEASE = "first release"
IMAGE_MAE = "image MAE"
VIDEOMAE = "VideoMAE"
HF_VIDEOMAE = "Hugging Face VideoMAE"

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation
METADATA = "mae_video"  # entry of a .safetensors header that holds what tensors cannot say

# What checkpoints do not store and everyone assumes: clips of 16 frames of 224 x 224 pixels.
NUM_FRAMES, IMG_SIZE, T_PATCH_SIZE = 16, 224, 2
# Published models have 64 channels per head except for these widths.
HEADS_OF_WIDTH = {640: 8, 1280: 16, 1408: 16}

DECODER_ARGUMENTS = (
    "decoder_embed_dim",
    "decoder_depth",
    "decoder_num_heads",
    "decoder_sep_pos_embed",
    "cls_through_decoder",
    "strided_targets",
    "norm_pix_loss",
    "pred_t_dim",
)

# Other projects' names, in the order in which they are replaced.
RENAMES = [
    (re.compile(pattern), ours)
    for pattern, ours in (
        # Hugging Face VideoMAE
        (r"^videomae\.", ""),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^encoder\.layer\.", "blocks."),
        (r"^decoder\.decoder_layers\.", "decoder_blocks."),
        (r"\.attention\.attention\.query\.", ".attn.q."),
        (r"\.attention\.attention\.key\.", ".attn.k."),
        (r"\.attention\.attention\.value\.", ".attn.v."),
        (r"\.attention\.attention\.([qv])_bias$", r".attn.\1.bias"),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"^layernorm\.", "norm."),
        (r"^classifier\.", "head."),
        # VideoMAE
        (r"^encoder_to_decoder\.", "decoder_embed."),
        (r"^decoder\.(blocks|norm)\.", r"decoder_\1."),
        (r"^decoder\.head\.", "decoder_pred."),
        (r"^encoder\.", ""),
        (r"\.attn\.([qv])_bias$", r".attn.\1.bias"),
        # PySlowFast
        (r"^pred_head\.transforms\.0\.\d+\.(weight|bias)$", r"decoder_norm.\1"),
        (r"^pred_head\.transforms\.0\.", "decoder_blocks."),
        (r"^pred_head\.projections\.0\.", "decoder_pred."),
        (r"^head\.projection\.", "head."),
        # fine-tuned image MAE and VideoMAE
        (r"^fc_norm\.", "norm."),
    )
]
OUR_NAMES = re.compile(
    r"(decoder_)?cls_token|mask_token|(decoder_)?pos_embed(_spatial|_temporal|_class)?|"
    r"(patch_embed\.proj|(decoder_)?norm|decoder_embed|decoder_pred|head|"
    r"(decoder_)?blocks\.\d+\.(norm1|norm2|attn\.(q|k|v|proj)|mlp\.fc[12]))\.(weight|bias)"
)
WRAPPERS = ("model", "model_state", "module", "state_dict")
PREFIXES = re.compile(r"^((module|backbone)\.)+")  # what training wrappers put before a name
# "encoder." is such a prefix, too, except in VideoMAE's files, which tell their names beside it
OWN_ENCODER = re.compile(r"decoder\.|encoder_to_decoder\.|encoder\.layer\.")
FC1 = re.compile(r"blocks\.\d+\.mlp\.fc1\.weight")
SINCOS = "VideoMAE's sine-cosine table"
# tensors with as many rows as the encoder and the decoder are wide
ENCODER_ROWS = ("patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight")
DECODER_ROWS = ("decoder_embed.weight", "decoder_embed.bias", "decoder_norm.weight")
# what names, shapes and records that make no sense raise where they are used
NONSENSE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
NO_CLASS_ROW = "its row of the class token is missing and left as drawn"

# Types of what a file records; the other arguments are whole numbers above zero.
ON_OFF = (
    "no_qkv_bias",
    "sep_pos_embed",
    "cls_embed",
    "sincos_pos_embed",
    "decoder_sep_pos_embed",
    "cls_through_decoder",
    "strided_targets",
    "norm_pix_loss",
)
FRACTIONS = ("mlp_ratio", "layer_norm_eps")


@dataclass
class Weights:
    """What a checkpoint file holds, under this project's names.

    Attributes:
        state: tensors by parameter name.
        arguments: constructor arguments, as plain data (layer_norm_eps stands for norm_layer).
        source: the file's format, one of the names above.
        path: the file, for messages.
        recorded: those arguments that the file states; the others follow from shapes or custom.
        flags: the flags of the training run, where the file has them.
        converted: how a tensor was made, for those that are not simply renamed.
        unused: names in the file that have no place here.
        mean, std: per-channel normalisation of the clips it was trained on; None: ours.
        notes: sentences for the user.
        grid_stated: the file says of how many tokens along t, h and w its positions are; else
            they are first of all taken to be of the grid of the model that they are loaded into.
        doubt: why no model can be built of the file alone; empty when one can.
    """

    state: dict[str, Tensor]
    arguments: dict[str, Any]
    source: str
    path: str
    recorded: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    converted: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    notes: list[str] = field(default_factory=list)
    grid_stated: bool = True
    doubt: str = ""

    @property
    def has_decoder(self) -> bool:
        return "decoder_depth" in self.arguments

    @property
    def has_head(self) -> bool:
        return "num_classes" in self.arguments

    @property
    def grid(self) -> Grid:
        """Count the tokens along t, h, w."""
        side = self.arguments["img_size"] // self.arguments["patch_size"]
        return self.arguments["num_frames"] // self.arguments["t_patch_size"], side, side

    def autoencoder_arguments(self, **overrides: Any) -> dict[str, Any]:
        """Return the arguments of the MaskedAutoencoderViT in the file; overrides replace some.

        Another num_frames keeps the frames predicted per patch.

        Raises:
            UserError: the file does not say the size of its clips, nor do the overrides.
        """
        self.refuse_doubt(overrides)
        arguments = {k: v for k, v in self.arguments.items() if k != "num_classes"}
        if "num_frames" in overrides and "pred_t_dim" in arguments:
            scaled = arguments["pred_t_dim"] * overrides["num_frames"] / arguments["num_frames"]
            arguments["pred_t_dim"] = int(scaled)
        return _with_norm_layer(arguments | overrides)

    def classifier_arguments(self, **overrides: Any) -> dict[str, Any]:
        """Return the arguments of the VisionTransformer in the file; overrides replace some.

        Raises:
            UserError: the file does not say the size of its clips, nor do the overrides.
        """
        self.refuse_doubt(overrides)
        arguments = {k: v for k, v in self.arguments.items() if k not in DECODER_ARGUMENTS}
        return _with_norm_layer(arguments | overrides)

    def refuse_doubt(self, said: Collection[str] = ()) -> None:
        """Raise UserError when the size of the clips is neither in the file nor said."""
        if self.doubt and not {"num_frames", "img_size"} <= set(said):
            raise UserError(self.doubt)

    @property
    def predicts_unit_pixels(self) -> bool:
        """Tell whether the decoder predicts pixels of 0 to 1, as VideoMAE's does."""
        is_videomae = self.source in (VIDEOMAE, HF_VIDEOMAE)
        return is_videomae and self.arguments.get("norm_pix_loss") is False

    def with_our_normalisation(self) -> "Weights":
        """Fold the file's normalisation into the patch embedding, and into predictions of pixels.

        The result takes clips normalised by (0.45, 0.225) and computes what the original computes
        from the same pixels. Targets that are normalised patch by patch (norm_pix_loss) stay.
        """
        if self.mean is None or self.std is None:
            return self
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float64)
        # (pixel - mean) / std = scale * (pixel - MEAN) / STD + shift
        folded = _fold_input(self.state, STD / std, (MEAN - mean) / std)
        converted = dict.fromkeys(folded, "input normalisation folded in")
        if self.arguments.get("norm_pix_loss") is False:
            if self.predicts_unit_pixels:
                mean, std = torch.zeros_like(mean), torch.ones_like(std)
            pred = fold_output(self.state, std / STD, (mean - MEAN) / STD)
            folded |= pred
            converted |= dict.fromkeys(pred, "normalisation of the targets folded in")
        return replace(
            self,
            state=self.state | folded,
            converted=self.converted | converted,
            mean=None,
            std=None,
        )


def _fold_input(state: dict[str, Tensor], scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
    """Return the patch embedding that sees x as the file's sees scale * x + shift, by channel."""
    folded = {}
    if "patch_embed.proj.weight" in state:
        weight = widen(state["patch_embed.proj.weight"])
        wide = weight.double()  # (D, C, t, p, p)
        folded["patch_embed.proj.weight"] = (wide * scale.view(-1, 1, 1, 1)).to(weight.dtype)
        if "patch_embed.proj.bias" in state:
            bias = widen(state["patch_embed.proj.bias"])
            folded["patch_embed.proj.bias"] = (bias + wide.sum((2, 3, 4)) @ shift).to(bias.dtype)
    return folded


def fold_output(state: dict[str, Tensor], scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
    """Return the decoder_pred that predicts scale * x + shift, by channel, where the file's does x.

    Its rows run over (frame, row, column, C).
    """
    folded = {}
    for name in ("decoder_pred.weight", "decoder_pred.bias"):
        if name in state:
            pred = widen(state[name])
            rows = pred.double().unflatten(0, (-1, len(scale)))  # (u*p*p, C) or (u*p*p, C, D)
            rows = rows * scale.view(-1, *[1] * (rows.ndim - 2))
            if name.endswith("bias"):
                rows = rows + shift
            folded[name] = rows.flatten(0, 1).to(pred.dtype)
    return folded


def _with_norm_layer(arguments: dict[str, Any]) -> dict[str, Any]:
    """Replace layer_norm_eps by norm_layer, which is what the constructors take."""
    arguments = dict(arguments)
    return {"norm_layer": partial(nn.LayerNorm, eps=arguments.pop("layer_norm_eps"))} | arguments


# --- reading ------------------------------------------------------------------------------------


def unwrap(checkpoint: dict[str, Any], path: str) -> dict[str, Tensor]:
    """Take the tensors out of a checkpoint, under the file's own names less training prefixes.

    Raises:
        UserError: there are none, or some without plain numbers.
    """
    inner = checkpoint
    while wrapper := next((k for k in WRAPPERS if isinstance(inner.get(k), dict)), None):
        inner = inner[wrapper]
    state = {k: v for k, v in inner.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not state:
        raise UserError(f"{path} holds no weights; its keys are {', '.join(map(str, checkpoint))}")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise UserError(
                f"{path} cannot be used: {name} is sparse, quantised or without numbers"
            )
    names = [name.replace("_orig_mod.", "") for name in state]
    return dict(zip(_without_prefixes(names), state.values(), strict=True))


def _without_prefixes(names: list[str]) -> list[str]:
    """Remove what wrappers put before the names, one layer after the other."""
    shorter = [PREFIXES.sub("", name) for name in names]
    if not any(OWN_ENCODER.match(name) for name in shorter):
        shorter = [name.removeprefix("encoder.") for name in shorter]
    return names if shorter == names else _without_prefixes(shorter)


def our_names(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename tensors to ours and split fused q, k, v; a missing key bias is zero.

    Returns:
        the tensors, and how those that are not simply renamed were made.
    """
    renamed: dict[str, Tensor] = {}
    converted: dict[str, str] = {}
    for theirs, tensor in state.items():
        name = theirs
        for pattern, ours in RENAMES:
            name = pattern.sub(ours, name)
        if ".attn.qkv." in name:
            if len(tensor) % 3:
                raise ValueError(f"{theirs} has {len(tensor)} rows: no q, k and v of one width")
            for part, value in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace("qkv", part)] = value
                converted[name.replace("qkv", part)] = "split from qkv"
        else:
            renamed[name] = tensor
    for name in [k for k in renamed if k.endswith(".attn.q.bias")]:
        key_bias = name.replace(".q.", ".k.")
        if key_bias not in renamed:
            renamed[key_bias] = torch.zeros_like(renamed[name])
            converted[key_bias] = "zero: the file has none"
    return renamed, converted


def model_state(checkpoint: dict[str, Any], path: str) -> dict[str, Tensor]:
    """Extract the weights of a checkpoint under this project's parameter names.

    Raises:
        UserError: there are no tensors in it.
    """
    return our_names(unwrap(checkpoint, path))[0]


def find_source(state: dict[str, Tensor]) -> str:
    """Tell the format of a file from its names and shapes."""
    names = " ".join(state)
    kernel = state.get("patch_embed.proj.weight")
    if "layernorm_before" in names:
        return HF_VIDEOMAE
    if "q_bias" in names or "encoder_to_decoder" in names:
        return VIDEOMAE
    if "pred_head." in names or "head.projection." in names:
        return PYSLOWFAST
    if kernel is not None and kernel.ndim == 4:
        return IMAGE_MAE
    if "pos_embed" in state and "cls_token" not in state and ".attn.qkv." in names:
        return FIRST_RELEASE
    return OURS


def interpret(
    checkpoint: dict[str, Any], path: str, config: dict[str, Any] | None = None
) -> Weights:
    """Read a checkpoint of any known format.

    Args:
        checkpoint: what the file holds (util.weights.read_checkpoint).
        path: names the file in messages; hints in its name are used where the file is silent.
        config: Hugging Face's config.json and preprocessor_config.json beside the file, in one.

    Raises:
        UserError: it holds no video transformer, or contents that make no sense.
    """
    try:
        return _interpret(checkpoint, path, config)
    except NONSENSE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or not a known checkpoint: {reason}") from error


def _interpret(checkpoint: dict[str, Any], path: str, config: dict[str, Any] | None) -> Weights:
    theirs = unwrap(checkpoint, path)
    source = find_source(theirs)
    state, converted = our_names(theirs)
    flags = checkpoint_args(checkpoint)
    config = config if config and source == HF_VIDEOMAE else {}
    recorded, mean, std = _recorded(checkpoint, path, flags, config)
    if source in (IMAGE_MAE, VIDEOMAE, HF_VIDEOMAE):
        mean, std = mean or IMAGENET[0], std or IMAGENET[1]
    weights = Weights(
        state=state,
        arguments={},
        source=source,
        path=path,
        recorded=recorded,
        flags=flags,
        converted=converted,
        mean=mean,
        std=std,
    )
    for name in [k for k in state if not OUR_NAMES.fullmatch(k)]:
        weights.unused.append(name)
        del state[name]
    if not _count_blocks(state, "blocks") or not _find_width(state, ENCODER_ROWS):
        raise UserError(
            f"{path} holds no vision transformer that is known here; its names are "
            f"{', '.join(list(theirs)[:6])} ..."
        )
    _check_shapes(state)
    if source == IMAGE_MAE:
        _inflate(weights)
    _drop_class_token_head(weights, theirs)
    if source in (VIDEOMAE, HF_VIDEOMAE) and "decoder_embed.weight" in state:
        weight = state["decoder_embed.weight"]
        state["decoder_embed.bias"] = weight.new_zeros(len(weight))
        converted["decoder_embed.bias"] = "zero: the file has none"
    weights.arguments = _find_arguments(weights, path)
    if source in (VIDEOMAE, HF_VIDEOMAE):
        _add_sincos_positions(weights)
    channels = weights.arguments["in_chans"]
    if mean and std and not len(mean) == len(std) == channels:
        raise ValueError(f"mean {mean} and std {std} are not of {channels} channels")
    if (mean, std) == ((MEAN,) * channels, (STD,) * channels):
        if not weights.predicts_unit_pixels:
            weights.mean = weights.std = None
    elif weights.mean is not None:
        weights.notes.append(
            f"it was trained on clips normalised by mean {weights.mean} and std {weights.std}; "
            "models here get that folded into their patch embedding"
        )
    return weights


def checkpoint_args(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the flags a checkpoint was trained with, empty where it does not say."""
    return _as_dict(checkpoint.get("args"))


def _as_dict(value: Any) -> dict[str, Any]:
    """Return the contents of a dict or a Namespace, those of anything else as empty."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    return dict(value) if isinstance(value, dict) else {}


def _recorded(
    checkpoint: dict[str, Any], path: str, flags: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, Any], tuple[float, ...] | None, tuple[float, ...] | None]:
    """Collect what a file, or Hugging Face's config.json beside it, says about its model."""
    own = ("num_frames", "decoder_num_heads", "norm_pix_loss")
    recorded = {k: flags[k] for k in own if k in flags}
    recorded |= {"img_size": flags["input_size"]} if "input_size" in flags else {}
    theirs = {
        "image_size": "img_size",
        "num_frames": "num_frames",
        "num_attention_heads": "num_heads",
        "decoder_num_attention_heads": "decoder_num_heads",
        "layer_norm_eps": "layer_norm_eps",
        "norm_pix_loss": "norm_pix_loss",
    }
    recorded |= {ours: config[name] for name, ours in theirs.items() if name in config}
    if isinstance(config.get("image_size"), list):
        recorded["img_size"], width = config["image_size"]
        if recorded["img_size"] != width:
            raise UserError(f"{path} is of frames that are not square: {config['image_size']}")
    if config.get("hidden_act", "gelu") not in ("gelu", "gelu_python"):
        raise UserError(f"{path} has {config['hidden_act']} for activation, models here have gelu")
    written = _as_dict(json.loads(_as_dict(checkpoint.get("metadata")).get(METADATA, "{}")))
    recorded |= _as_dict(written.get("arguments")) | _as_dict(checkpoint.get("arguments"))
    mean, std = (config.get(k) or written.get(k) for k in ("image_mean", "image_std"))
    if config.get("do_normalize") is False:
        mean, std = 0.0, 1.0
    sane = {k: v for k, v in recorded.items() if _is_sane(k, v)}
    return sane, _per_channel(mean), _per_channel(std)


def _is_sane(name: str, value: Any) -> bool:
    """Tell whether a recorded argument can be one; others are as good as not recorded."""
    if name in ON_OFF or isinstance(value, bool):
        return name in ON_OFF and isinstance(value, bool)
    return isinstance(value, (int, float) if name in FRACTIONS else int) and value > 0


def _per_channel(value: Any) -> tuple[float, ...] | None:
    if isinstance(value, (int, float)):
        value = [value] * 3
    return value and tuple(float(number) for number in value)


def _inflate(weights: Weights) -> None:
    """Turn an image model into one of videos that sees a still video as the image it shows."""
    state, converted = weights.state, weights.converted
    kernel = state["patch_embed.proj.weight"]
    state["patch_embed.proj.weight"] = resize_kernel(kernel.unsqueeze(2), T_PATCH_SIZE)
    converted["patch_embed.proj.weight"] = f"repeated over {T_PATCH_SIZE} frames and divided"
    for prefix in ("", "decoder_"):
        joint = state.pop(f"{prefix}pos_embed", None)
        if joint is None:
            continue
        rows = joint.shape[1]
        cls = int(rows > 1 and math.isqrt(rows - 1) ** 2 == rows - 1)  # one more than a square
        parts = {"spatial": joint[:, cls:]}
        parts["temporal"] = joint.new_zeros(1, NUM_FRAMES // T_PATCH_SIZE, joint.shape[-1])
        if cls:
            parts["class"] = joint[:, :1]
        for part, value in parts.items():
            state[f"{prefix}pos_embed_{part}"] = value
            how = "zero: all frames as the image" if part == "temporal" else "from the image's"
            converted[f"{prefix}pos_embed_{part}"] = how


def resize_kernel(kernel: Tensor, t: int) -> Tensor:
    """Resize a patch kernel [D, C, t, p, p] in time so that still clips keep their tokens.

    Frames are repeated and averaged, and scaled so that the sum over time stays.
    """
    old = kernel.shape[2]
    if old == t:
        return kernel
    steps = math.lcm(old, t)
    fine = widen(kernel).repeat_interleave(steps // old, dim=2) / (steps // old)
    return fine.unflatten(2, (t, steps // t)).sum(dim=3)


def _drop_class_token_head(weights: Weights, theirs: dict[str, Tensor]) -> None:
    """Leave out heads that read the first token: ours reads the mean of the patches."""
    pools_tokens = any(name.startswith("fc_norm.") for name in theirs) or weights.source not in (
        IMAGE_MAE,
        VIDEOMAE,
        HF_VIDEOMAE,
    )
    if "head.weight" in weights.state and not pools_tokens:
        for name in ("head.weight", "head.bias"):
            weights.state.pop(name, None)
            weights.unused.append(name)
        weights.notes.append(
            "its head reads one token, not the mean over the patches, and is left out"
        )


def num_heads(width: int) -> int:
    """Return the heads of a published transformer of this width."""
    return HEADS_OF_WIDTH.get(width, max(1, width // 64))


def _check_shapes(state: dict[str, Tensor]) -> None:
    """Raise ValueError for positions and a patch kernel that are of no format."""
    for name, tensor in state.items():
        shape = list(tensor.shape)
        right = True
        if "pos_embed" in name:
            right = len(shape) == 3 and shape[0] == 1 and 0 not in shape
        elif name == "patch_embed.proj.weight":
            right = len(shape) in (4, 5) and shape[-1] == shape[-2]
        if not right:
            raise ValueError(f"{name} is {shape}")


def _find_patch(weights: Weights) -> tuple[int, int, int]:
    """Tell channels, frames and pixels of a patch; without the kernel there is doubt."""
    kernel = weights.state.get("patch_embed.proj.weight")
    if kernel is not None:
        return kernel.shape[1], kernel.shape[2], kernel.shape[3]
    weights.doubt = f"{weights.path} lacks patch_embed.proj.weight"
    usual = {"in_chans": 3, "t_patch_size": T_PATCH_SIZE, "patch_size": 16} | weights.recorded
    return usual["in_chans"], usual["t_patch_size"], usual["patch_size"]


def _find_width(state: dict[str, Tensor], names: Sequence[str]) -> int:
    """Return the rows of the first of the tensors that there is, 0 without any."""
    return next((len(state[name]) for name in names if name in state), 0)


def _find_class_token(weights: Weights) -> bool:
    """Tell whether the model of the file has a class token, be the token itself lost."""
    signs = {"cls_token", "pos_embed_class", "decoder_cls_token"}
    return weights.recorded.get("cls_embed", not signs.isdisjoint(weights.state))


def _find_arguments(weights: Weights, path: str) -> dict[str, Any]:
    """Tell the constructor arguments from names and shapes, and from what the file records.

    A tensor that is missing must not be taken for another architecture: apply_weights names it.
    """
    state, source = weights.state, weights.source
    D = _find_width(state, ENCODER_ROWS)
    C, t_patch, p = _find_patch(weights)
    t, side = _find_grid(weights, path, t_patch, p)
    hidden = _find_width(state, [k for k in state if FC1.match(k)]) or 4 * D
    videomae = source in (VIDEOMAE, HF_VIDEOMAE)
    cls_embed = _find_class_token(weights)
    arguments = {
        "img_size": side * p,
        "patch_size": p,
        "in_chans": C,
        "embed_dim": D,
        "depth": _count_blocks(state, "blocks"),
        "num_heads": num_heads(D),
        # nextafter: constructors truncate the product
        "mlp_ratio": hidden / D if int(hidden / D * D) == hidden else math.nextafter(hidden / D, 9),
        "layer_norm_eps": 1e-12 if source == HF_VIDEOMAE else 1e-6,
        "num_frames": t * t_patch,
        "t_patch_size": t_patch,
        "no_qkv_bias": not any(k.endswith((".attn.q.bias", ".attn.v.bias")) for k in state),
        "sep_pos_embed": "pos_embed" not in state and not videomae,
        "cls_embed": cls_embed,
        "sincos_pos_embed": videomae or source == FIRST_RELEASE,
    }
    if classes := _find_width(state, ("head.weight", "head.bias")):
        arguments["num_classes"] = classes
    if width := _find_width(state, DECODER_ROWS):
        sixteen = source in (OURS, FIRST_RELEASE, IMAGE_MAE) and width % 16 == 0
        rows = _find_width(state, ("decoder_pred.weight", "decoder_pred.bias"))
        frames = max(1, rows // (p * p * C))  # per patch
        raw_pixels = any(word in os.path.basename(path) for word in ("nonorm", "visualize"))
        arguments |= {
            "decoder_embed_dim": width,
            "decoder_depth": _count_blocks(state, "decoder_blocks"),
            "decoder_num_heads": 16 if sixteen else num_heads(width),
            "decoder_sep_pos_embed": any(k.startswith("decoder_pos_embed_") for k in state),
            "cls_through_decoder": cls_embed and source in (PYSLOWFAST, IMAGE_MAE),
            "strided_targets": source == PYSLOWFAST,
            "norm_pix_loss": not raw_pixels,
            "pred_t_dim": frames * t,
        }
    guessed = []
    if D % 64 and D not in HEADS_OF_WIDTH:
        guessed.append("num_heads")
    if arguments.get("decoder_embed_dim", 512) < 256:  # no published one is as narrow
        guessed.append("decoder_num_heads")
    if guessed := [name for name in guessed if weights.recorded.get(name) is None]:
        said = " and ".join(f"{name} {arguments[name]}" for name in guessed)
        weights.notes.append(
            f"it does not say its numbers of heads: {said} is a guess by width, "
            "for models that are built of the file alone"
        )
    from_shapes = ("img_size", "num_frames", "num_classes", "embed_dim", "depth")
    said = {k: v for k, v in weights.recorded.items() if k in arguments and k not in from_shapes}
    return arguments | {k: v for k, v in said.items() if v is not None}


def _count_blocks(state: dict[str, Tensor], name: str) -> int:
    numbers = [int(k.split(".")[1]) for k in state if k.startswith(name + ".")]
    return max(numbers, default=-1) + 1


def _find_grid(weights: Weights, path: str, t_patch: int, p: int) -> tuple[int, int]:
    """Tell the grid of tokens: steps in time, and patches along a side.

    What the file does not say is guessed, and `grid_stated` and `doubt` of weights are set.

    Raises:
        UserError: the positions are not those of square frames.
    """
    state, recorded = weights.state, weights.recorded
    frames, pixels = recorded.get("num_frames"), recorded.get("img_size")
    said = (frames or NUM_FRAMES) // t_patch, (pixels or IMG_SIZE) // p
    spatial, temporal = state.get("pos_embed_spatial"), state.get("pos_embed_temporal")
    if spatial is not None:
        patches = spatial.shape[1]
        if math.isqrt(patches) ** 2 != patches:
            raise UserError(f"{path} has {patches} spatial positions: its frames are not square")
        if temporal is None:
            weights.doubt = f"{path} lacks pos_embed_temporal: it has positions in space alone"
        return said[0] if temporal is None else temporal.shape[1], math.isqrt(patches)
    if temporal is not None:
        weights.doubt = f"{path} lacks pos_embed_spatial: it has positions in time alone"
        return temporal.shape[1], said[1]
    if "pos_embed" not in state:
        if weights.source in (VIDEOMAE, HF_VIDEOMAE):  # they compute their positions
            weights.grid_stated = frames is not None and pixels is not None
            if not weights.grid_stated:
                weights.notes.append(
                    "it stores neither positions nor the size of its clips, which is taken to be "
                    f"the model's, or {said[0] * t_patch} frames of {said[1] * p} x {said[1] * p} "
                    "pixels where the file alone makes the model"
                )
        else:
            weights.doubt = f"{path} has no position embeddings; without them it cannot be used"
        return said
    patches = state["pos_embed"].shape[1] - int(_find_class_token(weights))
    sides = [g for g in range(1, math.isqrt(patches) + 1) if patches % (g * g) == 0]
    grids = [(patches // (g * g), g) for g in sides]
    fitting = [
        (t, g)
        for t, g in grids
        if frames in (None, t * t_patch) and pixels in (None, g * p)  # as far as they are stated
    ]
    weights.grid_stated = len(fitting) == 1 and (frames, pixels) != (None, None)
    usual = [grid for grid in fitting if grid == said]
    likely = usual or fitting or grids
    # one column of single patches is what is left of a number that lacks or has a class token
    if not fitting or len(likely) != 1 or (likely[0][1] == 1 and not weights.grid_stated):
        sizes = ", ".join(f"{t * t_patch} x {g * p} x {g * p}" for t, g in likely)
        weights.doubt = (
            f"{path} has {patches} joint positions and does not say the size of its clips; it may "
            f"be {sizes} (frames x height x width)"
        )
    return likely[0]


def _add_sincos_positions(weights: Weights) -> None:
    """Write out the positions that VideoMAE computes."""
    tokens = math.prod(weights.grid)
    for prefix, width in (("", "embed_dim"), ("decoder_", "decoder_embed_dim")):
        if width in weights.arguments and f"{prefix}pos_embed" not in weights.state:
            table = sincos_pos_embed(tokens, weights.arguments[width]).unsqueeze(0)
            weights.state[f"{prefix}pos_embed"] = table
            weights.converted[f"{prefix}pos_embed"] = SINCOS


# --- fitting to a model --------------------------------------------------------------------------
