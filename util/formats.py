"""What a checkpoint, ours or another project's, says about its model: names and sizes.

FINETUNE.md lists the formats. util/weights.py reads the files, util/convert.py writes them.
Shapes: C channels, L tokens, D width; patch kernels are [D, C, t, p, p].
"""

import argparse
import json
import math
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from util.errors import UserError
from util.pos_embed import Grid
from util.targets import TARGETS, values_per_frame
from util.video_vit import POOLS

OURS = "MAE"  # names of this project and of the reference implementation
PYSLOWFAST = "PySlowFast"
FIRST_RELEASE = "first release"
IMAGE_MAE = "image MAE"
VIDEOMAES = VIDEOMAE, HF_VIDEOMAE = "VideoMAE", "Hugging Face VideoMAE"

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation
ON_IMAGENET = (IMAGE_MAE, *VIDEOMAES)  # trained on clips with that normalisation
# Constructor arguments that the files of a project leave unsaid; see find_arguments for others.
UNSAID: dict[str, dict[str, Any]] = {
    OURS: {"decoder_num_heads": 16},
    PYSLOWFAST: {"cls_through_decoder": True, "strided_targets": True},
    FIRST_RELEASE: {"decoder_num_heads": 16, "sincos_pos_embed": True},
    IMAGE_MAE: {"decoder_num_heads": 16, "cls_through_decoder": True},
    VIDEOMAE: {"target": "channel"},
    HF_VIDEOMAE: {"target": "channel", "layer_norm_eps": 1e-12},
}
METADATA = "mae_video"  # entry of a .safetensors header that holds what tensors cannot say

# Defaults where a file records nothing: every project uses 16 frames of 224 x 224 pixels.
NUM_FRAMES, IMG_SIZE, T_PATCH_SIZE = 16, 224, 2
# Published models have 64 channels per head except for these widths.
HEADS_OF_WIDTH = {640: 8, 1152: 16, 1280: 16, 1408: 16, 1664: 16}

DECODER_ARGUMENTS = """
    decoder_embed_dim decoder_depth decoder_num_heads decoder_sep_pos_embed cls_through_decoder
    strided_targets pred_t_dim target target_norm
""".split()
HEAD_ARGUMENTS = ("num_classes", "pool")
CLIP_SIZE = {"num_frames", "img_size"}
# These follow from the names and shapes of tensors, whatever a file records.
SHAPE_ARGUMENTS = """
    num_frames img_size t_patch_size patch_size in_chans embed_dim depth num_classes mlp_ratio
    decoder_embed_dim decoder_depth pred_t_dim
""".split()
CHOICES = {"target": TARGETS, "pool": POOLS}
MAX_TOKENS = 2**16  # of positions that are computed from recorded sizes


def _table(text: str) -> dict[str, str]:
    """Parse pairs THEIRS=OURS."""
    return dict(pair.split("=") for pair in text.split())


# Entries of Hugging Face's config.json = our constructor arguments.
HF_CONFIG = _table("""
    num_frames=num_frames image_size=img_size tubelet_size=t_patch_size patch_size=patch_size
    num_channels=in_chans hidden_size=embed_dim decoder_hidden_size=decoder_embed_dim
    num_hidden_layers=depth decoder_num_hidden_layers=decoder_depth
    num_attention_heads=num_heads decoder_num_attention_heads=decoder_num_heads
    layer_norm_eps=layer_norm_eps
""")
# Flags of training runs, the same way.
FLAGS = _table("""
    num_frames=num_frames input_size=img_size decoder_num_heads=decoder_num_heads target=target
""")
# Records of whether targets are normalised: by MAE and Hugging Face, VideoMAE, PySlowFast.
NORMALISED = ("norm_pix_loss", "normlize_target", "MASK.NORM_PRED_PIXEL")
# Entries of PySlowFast's cfg, the same way; those of the second table only repeat the tensors.
CFG = _table("""
    DATA.NUM_FRAMES=num_frames DATA.TRAIN_CROP_SIZE=img_size MVIT.NUM_HEADS=num_heads
    MVIT.USE_FIXED_SINCOS_POS=sincos_pos_embed
""")
CFG_OF_TENSORS = _table("""
    MVIT.EMBED_DIM=embed_dim MVIT.DEPTH=depth MVIT.CLS_EMBED_ON=cls_embed
    MASK.DECODER_EMBED_DIM=decoder_embed_dim MASK.DECODER_DEPTH=decoder_depth
""")
# Switches of that cfg that change what the encoder, and what only the decoder computes.
CFG_OF_ENCODER = """
    MVIT.NORM_STEM MVIT.REL_POS_SPATIAL MVIT.REL_POS_TEMPORAL MVIT.REV.ENABLE MVIT.PATCH_2D
    MVIT.DIM_MUL MVIT.HEAD_MUL MVIT.POOL_Q_STRIDE MVIT.POOL_KV_STRIDE MVIT.POOL_KV_STRIDE_ADAPTIVE
    MVIT.RESIDUAL_POOLING DATA.REVERSE_INPUT_CHANNEL
""".split()
CFG_OF_DECODER = ("MASK.PRED_HOG", "MASK.DEC_KV_KERNEL", "MASK.DEC_KV_STRIDE")
# files of a Hugging Face folder: the weights (one of these), and the configs beside them
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
HF_WEIGHTS += tuple(f"{name}.index.json" for name in HF_WEIGHTS)  # of several files
HF_FILES = ("config.json", "preprocessor_config.json")

# Other projects' names = ours. Reading applies them in this order; writing swaps the two sides.
# Names that begin with a dot are replaced anywhere in a name, the others only at its start.
HF_NAMES = _table("""
    embeddings.patch_embeddings.projection.=patch_embed.proj.
    encoder.layer.=blocks. decoder.decoder_layers.=decoder_blocks.
    encoder_to_decoder.=decoder_embed. decoder.norm.=decoder_norm. decoder.head.=decoder_pred.
    .attention.attention.q_bias=.attn.q.bias .attention.attention.v_bias=.attn.v.bias
    .attention.attention.query.=.attn.q. .attention.attention.key.=.attn.k.
    .attention.attention.value.=.attn.v. .attention.output.dense.=.attn.proj.
    .intermediate.dense.=.mlp.fc1. .output.dense.=.mlp.fc2.
    .layernorm_before.=.norm1. .layernorm_after.=.norm2. classifier.=head.
""")
PYSLOWFAST_NAMES = _table("""
    pred_head.transforms.0.=decoder_blocks. pred_head.projections.0.=decoder_pred.
    head.projection.=head. dec_pos_embed_=decoder_pos_embed_
""")
VIDEOMAE_NAMES = _table("""
    decoder.blocks.=decoder_blocks. encoder.= .attn.q_bias=.attn.q.bias .attn.v_bias=.attn.v.bias
""")
RENAMES = {"videomae.": "", "layernorm.": "norm.", "fc_norm.": "norm."}
RENAMES |= {".ls1.gamma": ".gamma_1", ".ls2.gamma": ".gamma_2"}
RENAMES |= {"embeddings.position_embeddings": "pos_embed"}
RENAMES |= HF_NAMES | PYSLOWFAST_NAMES | VIDEOMAE_NAMES
# PySlowFast numbers the decoder norm as if it were one more block
DECODER_NORM = re.compile(r"^decoder_blocks\.\d+\.(weight|bias)$")
OUR_NAMES = re.compile(
    r"(decoder_)?cls_token|mask_token|(decoder_)?pos_embed(_spatial|_temporal|_class)?|"
    r"(patch_embed\.proj|(decoder_)?norm|decoder_embed|decoder_pred|head|"
    r"(decoder_)?blocks\.\d+\.(norm1|norm2|attn\.(q|k|v|proj)|mlp\.fc[12]))\.(weight|bias)|"
    r"(decoder_)?blocks\.\d+\.gamma_[12]"  # layer scale, which fold_layer_scale removes
)
# What tensors without a place here are called in the projects that have them.
SWITCHES = {
    "scale$": "cosine attention",
    "norm_embed|patch_embed.norm": "a norm in the stem, MVIT.NORM_STEM",
    "rel_pos|relative_position": "relative positions, MVIT.REL_POS_SPATIAL and REL_POS_TEMPORAL",
    "[qk]_norm|norm_[qk]": "a norm of queries and keys",
    "pool_|blocks.[0-9]+.proj": "a multi-scale transformer such as MViT or Hiera",
}
WRAPPERS = ("model", "model_state", "module", "state_dict")
AVERAGES = ("model_ema", "state_dict_ema", "ema_state_dict", "ema_model", "ema")
PREFIXES = re.compile(r"^((module|backbone|model)\.)+")  # what training wrappers put before a name
WRAPPED = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# "encoder." is also such a prefix, except in VideoMAE's files, which have one of these names
OWN_ENCODER = re.compile(r"decoder\.|encoder_to_decoder\.|encoder\.layer\.")
KERNEL, KERNEL_BIAS = "patch_embed.proj.weight", "patch_embed.proj.bias"
FC1 = "blocks.0.mlp.fc1.weight"


@dataclass
class Weights:
    """A checkpoint file's weights under this project's names, and what it says about its model."""

    state: dict[str, Tensor]  # by parameter name, at least in single precision
    source: str  # the file's format, one of the names above
    path: str  # the file, for messages
    converted: dict[str, str]  # how a tensor was made, unless it was only renamed
    unused: list[str]  # names in the file that have no place here
    flags: dict[str, Any]  # of the training run, if recorded
    # of the constructor, plain data (layer_norm_eps, not norm_layer)
    arguments: dict[str, Any] = field(default_factory=dict)
    stated: set[str] = field(default_factory=set)  # by the file; others are its format's defaults
    stored: dict[str, torch.dtype] = field(default_factory=dict)  # in the file
    notes: list[str] = field(default_factory=list)  # sentences for the user
    doubt: str = ""  # why no model can be built from the file alone; empty when one can
    classes: list[str] = field(default_factory=list)  # of the head, in order; empty if unknown
    # per-channel normalisation of the clips that it was trained on; None: ours
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def has_decoder(self) -> bool:
        return "decoder_depth" in self.arguments

    @property
    def has_head(self) -> bool:
        return "num_classes" in self.arguments

    @property
    def predicts_unit_pixels(self) -> bool:
        """Whether the decoder predicts pixels from 0 to 1, as VideoMAE's does."""
        return self.source in VIDEOMAES and self.arguments.get("target") == "pixels"

    def autoencoder_arguments(self, **overrides: Any) -> dict[str, Any]:
        """Return the arguments of the file's MaskedAutoencoderViT; overrides replace some of them.

        Another num_frames keeps the frames predicted per patch. UserError: see refuse_doubt.
        """
        if "num_frames" in overrides and self.has_decoder:
            predicted = self.arguments["pred_t_dim"] * overrides["num_frames"]
            overrides = {"pred_t_dim": int(predicted / self.arguments["num_frames"])} | overrides
        if "norm_pix_loss" in overrides:  # chooses a target if none is given
            overrides = {"target": None, "target_norm": None} | overrides
        return self._without(HEAD_ARGUMENTS, overrides)

    def classifier_arguments(self, **overrides: Any) -> dict[str, Any]:
        """Return the arguments of the file's VisionTransformer; see autoencoder_arguments."""
        return self._without(DECODER_ARGUMENTS, overrides)

    def _without(self, others: Collection[str], overrides: dict[str, Any]) -> dict[str, Any]:
        self.refuse_doubt(overrides)
        arguments = {k: v for k, v in self.arguments.items() if k not in others} | overrides
        norm_layer = partial(nn.LayerNorm, eps=arguments.pop("layer_norm_eps"))
        return {"norm_layer": norm_layer} | arguments

    def refuse_doubt(self, given: Collection[str] = ()) -> None:
        """Raise UserError when the size of the clips is neither known nor given."""
        if self.doubt and not set(given) >= CLIP_SIZE:
            raise UserError(self.doubt)

    def lacks(self, part: str, hint: str) -> UserError:
        """Return the error about a file without a decoder or head: why, and what to do."""
        why = "".join(f" ({note})" for note in self.notes if note.startswith(f"its {part} "))
        return UserError(f"{self.path} has no {part}{why}: {hint}")

    def put(self, made: dict[str, Tensor], how: str) -> None:
        """Add or replace tensors that are not the file's own, and say how they were made."""
        self.state |= made
        self.converted |= dict.fromkeys(made, how)
        self.stored = {k: v for k, v in self.stored.items() if k not in made}

    def as_stored(self) -> dict[str, Tensor]:
        """Return the tensors in the precision that they have in the file."""
        return {k: v.to(self.stored.get(k, v.dtype)) for k, v in self.state.items()}

    def rounding(self, name: str) -> float:
        """Return the relative rounding error of a tensor as it is stored in the file."""
        dtype = self.stored.get(name, torch.float32)
        return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def token_grid(arguments: dict[str, Any]) -> Grid:
    """Count the tokens along t, h, w of a model with these constructor arguments."""
    side = arguments["img_size"] // arguments["patch_size"]
    return arguments["num_frames"] // arguments["t_patch_size"], side, side


def num_heads(width: int) -> int:
    """Return the number of heads of a published transformer of this width."""
    return HEADS_OF_WIDTH.get(width, max(1, width // 64))


def decoder_heads(width: int, source: str) -> int:
    """Return the number of heads of a decoder of this width; PySlowFast's have 64 channels each."""
    return max(1, width // 64) if source == PYSLOWFAST else num_heads(width)


def is_decoder(name: str) -> bool:
    """Return whether a parameter belongs to the decoder."""
    return name.startswith(("decoder", "mask_token", "pred_head."))


def is_head(name: str) -> bool:
    """Return whether a parameter belongs to a classification head."""
    return re.match(r"(\w*_)?(head|fc|linear|classifier)\w*\.", name) is not None


# --- names ----------------------------------------------------------------------------------------


def find_average(checkpoint: dict[str, Any]) -> str:
    """Return the entry of a checkpoint that holds a moving average of its weights, or ""."""
    found = (k for k in AVERAGES if isinstance(checkpoint.get(k), dict))
    return next((k for k in found if _tensors(checkpoint[k])), "")


def _tensors(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, which may be wrapped."""
    while wrapper := next((k for k in WRAPPERS if isinstance(checkpoint.get(k), dict)), None):
        checkpoint = checkpoint[wrapper]
    return {k: v for k, v in checkpoint.items() if isinstance(k, str) and isinstance(v, Tensor)}


def unwrap(
    checkpoint: dict[str, Any], path: str, use_ema: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Return a checkpoint's tensors, or the moving average of them, under the file's names.

    Prefixes of training wrappers are removed. The second result names tensors of other modules.
    Raises UserError when there are no tensors, or some are not plain.
    """
    average = find_average(checkpoint)
    if use_ema and not average:
        raise UserError(f"{path} holds no moving average of its weights: leave --use_ema out")
    state = _tensors(checkpoint[average] if use_ema else checkpoint)
    if not state:
        hint = f"; --use_ema reads {average}" if average and not use_ema else ""
        keys = ", ".join(map(str, checkpoint))
        raise UserError(f"{path} holds no weights; its keys are {keys}{hint}")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise UserError(f"{path} has a tensor that is sparse, quantised or empty: {name}")

    # Lightning saves the model beside losses and metrics, PyTorch's average a counter
    names = {k: WRAPPED.sub("", k) for k in state if k != "n_averaged"}
    start = "model." if any(name.startswith("model.") for name in names.values()) else ""
    kept = [k for k, v in names.items() if v.startswith(start) or is_head(v)]
    names = _without_prefixes([names[k] for k in kept])
    if len(set(names)) < len(names):
        raise UserError(f"{path} has two tensors of one name, after the prefixes of wrappers")
    others = [k for k in state if k not in kept]
    return dict(zip(names, [state[k] for k in kept], strict=True)), others


def _without_prefixes(names: list[str]) -> list[str]:
    """Remove the prefixes of training wrappers, one wrapper after the other."""
    shorter = [PREFIXES.sub("", name) for name in names]
    if not any(OWN_ENCODER.match(name) for name in shorter):
        shorter = [name.removeprefix("encoder.") for name in shorter]
    return names if shorter == names else _without_prefixes(shorter)


def rename(name: str, names: dict[str, str]) -> str:
    """Translate a parameter name by a table of names such as RENAMES."""
    for theirs, ours in names.items():
        if theirs.startswith("."):
            name = name.replace(theirs, ours)
        elif name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
    return name


def our_names(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename tensors to ours, split fused q, k, v, and add zeros for biases that VideoMAE omits.

    The second result says how each tensor was made that was not simply renamed.
    """
    renamed: dict[str, Tensor] = {}
    converted: dict[str, str] = {}
    for theirs, tensor in state.items():
        name = DECODER_NORM.sub(r"decoder_norm.\1", rename(theirs, RENAMES))
        parts = {name: tensor}
        if ".attn.qkv." in name:
            if len(tensor) % 3:
                raise ValueError(f"{theirs} has {len(tensor)} rows, not q, k and v of one width")
            thirds = zip("qkv", tensor.chunk(3), strict=True)
            parts = {name.replace("qkv", part): value for part, value in thirds}
            converted |= dict.fromkeys(parts, "split from qkv")
        if twice := renamed.keys() & parts.keys():
            raise ValueError(f"{theirs} and another tensor are both {min(twice)} here")
        renamed |= parts
    zeros = {k.replace(".q.", ".k."): v for k, v in renamed.items() if k.endswith(".attn.q.bias")}
    if "encoder_to_decoder.weight" in state:
        zeros["decoder_embed.bias"] = state["encoder_to_decoder.weight"][:, 0]
    for name in [k for k in zeros if k not in renamed]:
        renamed[name] = torch.zeros_like(zeros[name])
        converted[name] = "zero: not in the file"
    return renamed, converted


def model_state(checkpoint: dict[str, Any], path: str, use_ema: bool = False) -> dict[str, Tensor]:
    """Return the weights of a checkpoint under our parameter names; see unwrap for errors."""
    return our_names(unwrap(checkpoint, path, use_ema)[0])[0]


def find_source(state: dict[str, Tensor], cfg: dict[str, Any]) -> str:
    """Return the format of a file, from its names and shapes and PySlowFast's cfg."""
    names = " ".join(state)
    if "layernorm_before" in names:
        return HF_VIDEOMAE
    if "q_bias" in names or "encoder_to_decoder" in names:
        return VIDEOMAE
    if "pred_head." in names or "head.projection." in names or "MVIT.DEPTH" in cfg:
        return PYSLOWFAST
    if KERNEL in state and state[KERNEL].ndim == 4:
        return IMAGE_MAE
    if "cls_token" in state or ".attn.qkv." not in names:
        return OURS
    if "fc_norm." in names or "head.weight" in state:  # without biases of q and v
        return VIDEOMAE
    return FIRST_RELEASE if "pos_embed" in state else OURS


# --- the model of a file --------------------------------------------------------------------------


def checkpoint_args(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the flags of the run that wrote a checkpoint, or {} if it does not record them."""
    return _as_dict(checkpoint.get("args"))


def plain(records: Any) -> Any:
    """Turn records of a trusted file into what JSON can say: NumPy's numbers, text for the rest."""
    records = vars(records) if isinstance(records, argparse.Namespace) else records
    text = json.dumps(records, default=lambda x: getattr(x, "tolist", x.__str__)(), skipkeys=True)
    return json.loads(text)


def read_flags(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the flags that a checkpoint, or the header of a .safetensors file, records."""
    return _as_dict(_written(checkpoint).get("flags")) | checkpoint_args(checkpoint)


def _as_dict(value: Any) -> dict[str, Any]:
    """Return the contents of a dict or a Namespace, and an empty dict for anything else."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    return dict(value) if isinstance(value, dict) else {}


def read_cfg(checkpoint: dict[str, Any], path: str) -> dict[str, Any]:
    """Return PySlowFast's configuration in a file as {"MVIT.DEPTH": 24, ...}, {} without one."""
    cfg = checkpoint.get("cfg")
    try:
        cfg = yaml.safe_load(cfg) if isinstance(cfg, str) else cfg
    except yaml.YAMLError as error:
        raise UserError(f"{path} has a damaged cfg: {str(error).splitlines()[0]}") from error
    sections = {k: _as_dict(section) for k, section in _as_dict(cfg).items()}
    flat = {f"{k}.{name}": v for k, section in sections.items() for name, v in section.items()}
    return flat | {"MVIT.REV.ENABLE": _as_dict(flat.get("MVIT.REV")).get("ENABLE")}


def read_records(
    checkpoint: dict[str, Any], source: str, path: str, config: dict[str, Any], cfg: dict[str, Any]
) -> dict[str, Any]:
    """Return what a file or its Hugging Face config records: unchecked arguments, mean and std."""
    if config.get("hidden_act", "gelu") not in ("gelu", "gelu_python"):
        raise UserError(f"{path} has the activation {config['hidden_act']}; models here use gelu")
    written = _written(checkpoint)
    arguments = _as_dict(written.get("arguments")) | _as_dict(checkpoint.get("arguments"))
    said = checkpoint_args(checkpoint) | config | cfg | arguments
    names = (FLAGS | HF_CONFIG | CFG).items()
    records = {ours: said[theirs] for theirs, ours in names if theirs in said}
    normalised = [said[name] for name in NORMALISED if said.get(name) in (False, True)]
    if normalised and records.get("target") not in TARGETS:
        records["target"] = UNSAID[source].get("target", "patch") if normalised[-1] else "pixels"
    if isinstance(cfg.get("MVIT.USE_MEAN_POOLING"), bool):
        records["pool"] = "mean" if cfg["MVIT.USE_MEAN_POOLING"] else "cls"
    if isinstance(config.get("image_size"), list):
        records["img_size"], width = config["image_size"]
        if records["img_size"] != width:
            raise UserError(f"{path} has frames that are not square: {config['image_size']}")
    records |= arguments
    if config.get("do_normalize") is False:
        config = config | {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    rescale = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1
    usual = IMAGENET if source in ON_IMAGENET else ((), ())
    for name, default in zip(("mean", "std"), usual, strict=True):
        value = config.get(f"image_{name}") or written.get(f"image_{name}")
        value = value or cfg.get(f"DATA.{name.upper()}")
        value = [value] * 3 if isinstance(value, int | float) else value or default
        records[name] = tuple(float(x) / (255 * rescale) for x in value) or None
    return records


def find_classes(weights: Weights, checkpoint: dict[str, Any], config: dict[str, Any]) -> None:
    """Find the names of a head's classes in a file or its Hugging Face config, if they fit it."""
    count, labels = weights.arguments.get("num_classes", 0), _as_dict(config.get("id2label"))
    names: Any = [labels.get(str(i)) for i in range(count)] if labels else None
    names = names or _written(checkpoint).get("classes") or checkpoint.get("classes")
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not names or not are_names or not count or names[0] == "LABEL_0":
        return
    if len(set(names)) == len(names) == count:
        weights.classes = names
    else:
        weights.notes.append(f"its names of classes do not fit its head of {count}: left out")


def _written(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return what util/convert.py has written into the header of a .safetensors file."""
    return _as_dict(json.loads(_as_dict(checkpoint.get("metadata")).get(METADATA, "{}")))


def _is_like(value: Any, found: Any) -> bool:
    """Return whether a recorded argument is valid: it is then used instead of the one found."""
    if isinstance(found, bool) or isinstance(value, bool):
        return isinstance(found, bool) and isinstance(value, bool)
    if isinstance(found, str):
        return any(value in choices for choices in CHOICES.values() if found in choices)
    return isinstance(value, (int, float) if isinstance(found, float) else int) and value > 0


def _find_grid(
    state: dict[str, Tensor], records: dict[str, Any], cls_embed: bool, path: str
) -> tuple[tuple[int, int], bool, str]:
    """Find the tokens along time and along a side, whether the file states them, and any doubt."""
    t_patch, p = state[KERNEL].shape[2:4]
    if "pos_embed_spatial" in state:
        patches = state["pos_embed_spatial"].shape[1]
        side = math.isqrt(patches)
        if side**2 != patches:
            raise UserError(f"{path} has {patches} spatial positions: its frames are not square")
        return (state["pos_embed_temporal"].shape[1], side), True, ""

    sizes = (records.get(name) for name in ("num_frames", "img_size"))
    frames, pixels = (size if _is_like(size, 1) else None for size in sizes)
    usual = ((frames or NUM_FRAMES) // t_patch, (pixels or IMG_SIZE) // p)
    if "pos_embed" not in state:  # VideoMAE computes its positions
        if (count := usual[0] * usual[1] ** 2) > MAX_TOKENS:
            raise ValueError(f"it records clips of {count:,} tokens")
        return usual, bool(frames and pixels), ""
    # joint positions: all grids with this many tokens that do not contradict the records
    patches = state["pos_embed"].shape[1] - int(cls_embed)
    sides = [g for g in range(1, math.isqrt(patches) + 1) if patches % (g * g) == 0]
    grids = [(patches // (g * g), g) for g in sides]
    fits = [(t, g) for t, g in grids if frames in (None, t * t_patch) and pixels in (None, g * p)]
    stated = len(fits) == 1 and (frames, pixels) != (None, None)
    likely = [usual] if usual in fits else fits or grids
    # frames one patch wide usually mean that the number wrongly includes a class token
    if fits and len(likely) == 1 and (likely[0][1] > 1 or stated):
        return likely[0], stated, ""
    clips = ", ".join(f"{t * t_patch} x {g * p} x {g * p}" for t, g in likely)
    problem = f"{path} has {patches} joint positions and does not say the size of its clips"
    return likely[0], stated, f"{problem}; it may be {clips} (frames x height x width)"


def find_arguments(weights: Weights, records: dict[str, Any]) -> None:
    """Find arguments, stated and doubt of Weights: from shapes, records and format defaults."""
    state, usual = weights.state, UNSAID[weights.source]
    D, C, t_patch, p, _ = state[KERNEL].shape
    hidden = len(state[FC1])
    computes_positions = weights.source in VIDEOMAES and "pos_embed" not in state
    cls_embed = records.get("cls_embed")
    cls_embed = cls_embed if isinstance(cls_embed, bool) else "cls_token" in state
    (t, side), is_stated, weights.doubt = _find_grid(state, records, cls_embed, weights.path)
    # nextafter: constructors truncate the product
    ratio = hidden / D if int(hidden / D * D) == hidden else math.nextafter(hidden / D, 9)
    has_biases = any(name.endswith((".attn.q.bias", ".attn.v.bias")) for name in state)
    arguments = {
        "img_size": side * p, "patch_size": p, "num_frames": t * t_patch, "t_patch_size": t_patch,
        "in_chans": C, "embed_dim": D, "depth": _count_blocks(state, "blocks"),
        "num_heads": num_heads(D), "mlp_ratio": ratio, "no_qkv_bias": not has_biases,
        "layer_norm_eps": usual.get("layer_norm_eps", 1e-6), "cls_embed": cls_embed,
        "sep_pos_embed": "pos_embed" not in state and not computes_positions,
        "sincos_pos_embed": computes_positions or usual.get("sincos_pos_embed", False),
    }  # fmt: skip
    if "head.weight" in state:
        arguments |= {"num_classes": len(state["head.weight"]), "pool": "mean"}
    if "decoder_embed.weight" in state:
        width = len(state["decoder_embed.weight"])
        has_sixteen = usual.get("decoder_num_heads") == 16 and width % 16 == 0
        pred = len(state.get("decoder_pred.weight", state.get("decoder_pred.bias", ())))
        values = max(1, values_per_frame(records.get("target"), p, C))  # no cells: refused later
        raw_pixels = any(word in os.path.basename(weights.path) for word in ("nonorm", "visualize"))
        arguments |= {
            "decoder_embed_dim": width, "decoder_depth": _count_blocks(state, "decoder_blocks"),
            "decoder_num_heads": 16 if has_sixteen else decoder_heads(width, weights.source),
            "decoder_sep_pos_embed": any(k.startswith("decoder_pos_embed_") for k in state),
            "cls_through_decoder": cls_embed and usual.get("cls_through_decoder", False),
            "strided_targets": usual.get("strided_targets", False),
            "pred_t_dim": max(1, pred // values) * t,
            "target": "pixels" if raw_pixels else usual.get("target", "patch"),
            "target_norm": records.get("target_norm"),
        }  # fmt: skip
    free = arguments.keys() - SHAPE_ARGUMENTS
    stated = {name for name in free if _is_like(records.get(name), arguments[name])}
    arguments |= {k: records[k] for k in stated}
    arguments["sincos_pos_embed"] &= not arguments["sep_pos_embed"]
    weights.arguments, weights.stated = arguments, stated | (CLIP_SIZE if is_stated else set())


def _count_blocks(state: dict[str, Tensor], name: str) -> int:
    return max([int(k.split(".")[1]) + 1 for k in state if k.startswith(f"{name}.")], default=0)
