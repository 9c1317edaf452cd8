"""Understand checkpoints of any project, and load their weights into models.

util/file_io.py reads the files, util/formats.py knows their names. util/checkpoint.py writes the
checkpoints of a run.
"""

import functools
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from util import formats, pos_embed
from util.dist import print0
from util.errors import UserError
from util.file_io import fetch, read_checkpoint, read_json
from util.formats import KERNEL, KERNEL_BIAS, VIDEOMAES, Weights, is_decoder, is_head, token_grid
from util.pos_embed import Grid, resize_kernel, sincos_pos_embed
from util.video.transforms import MEAN, STD

MODEL_FLAGS = """
    input_size num_frames sampling_rate sampling t_patch_size sep_pos_embed sincos_pos_embed
    cls_embed no_qkv_bias num_classes pool
""".split()

# errors from using names, shapes and records that make no sense
ODD = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
PRED, PRED_BIAS = "decoder_pred.weight", "decoder_pred.bias"
SINCOS = "VideoMAE's sine-cosine table"
# flags that decide which tensors a model has, and what --model decides of their shapes
WHOLE = ("cls_embed", "sep_pos_embed", "no_qkv_bias", "sincos_pos_embed")
SIZES = ("patch_size", "embed_dim", "depth", "num_heads")
CLASS_TOKEN = ("cls_token", "pos_embed_class")  # may be left out, if a model has none
NO_CLASS_ROW = "the class token's row is missing and left as drawn"

# --- reading --------------------------------------------------------------------------------------


def read_weights(path: str, use_ema: bool = False, trust: bool = False) -> Weights:
    """Read a checkpoint of any known format under this project's names.

    Local files are mapped (see read_checkpoint): load the tensors into a model, which copies them,
    or copy them. A file that checkpoint_flags has just read is not read again.

    Args:
        path: a path, an address, the name of a released checkpoint, or a Hugging Face folder.
        use_ema: read the moving average of the weights; UserError if the file has none.
        trust: see read_checkpoint.
    """
    if trust:
        path = _versioned(path)[0]
        checkpoint = read_checkpoint(path, mmap=True, trust=True)
        for name in checkpoint.keys() & {"args", "arguments", "classes"}:
            checkpoint[name] = formats.plain(checkpoint[name])
        return interpret(checkpoint, path, use_ema)
    weights = _read(*_versioned(path), use_ema)
    _read.cache_clear()  # the caller may change them
    return weights


@functools.lru_cache(maxsize=1)
def _read(path: str, version: tuple[int, ...], use_ema: bool) -> Weights:
    return interpret(read_checkpoint(path, mmap=True), path, use_ema)


def _versioned(path: str) -> tuple[str, tuple[int, ...]]:
    """Return the file of a path or Hugging Face folder, and numbers that change when it does."""
    inside = (os.path.join(path, name) for name in formats.HF_WEIGHTS)
    path = next(filter(os.path.isfile, inside), path)
    files = filter(os.path.isfile, (fetch(path), *_configs_beside(path)))
    return path, tuple(n for s in map(os.stat, files) for n in (s.st_ino, s.st_size, s.st_mtime_ns))


def _configs_beside(path: str) -> list[str]:
    beside = (os.path.join(os.path.dirname(path), name) for name in formats.HF_FILES)
    return [config for config in beside if os.path.isfile(config)]


def checkpoint_flags(
    path: str, names: Sequence[str] = MODEL_FLAGS, use_ema: bool = False
) -> list[str]:
    """Return the named flags of a checkpoint's model and clips, as on a command line.

    The weights stay in memory for the next read_weights of the same path.
    """
    weights = _read(*_versioned(path), use_ema)
    values = weights.flags | weights.arguments | {"input_size": weights.arguments["img_size"]}
    if weights.doubt:  # the user must give them
        values |= {"input_size": None, "num_frames": None}
    return _as_flags({name: values.get(name) for name in names})


def _as_flags(values: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in values.items():
        if name == "no_qkv_bias":
            flags += ["--no_qkv_bias"] if value else []
        elif isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags += [f"--{name}", str(value)]
    return flags


# --- understanding --------------------------------------------------------------------------------


def interpret(checkpoint: dict[str, Any], path: str, use_ema: bool = False) -> Weights:
    """Interpret the contents of a checkpoint file of any known format.

    Hints in its name and Hugging Face's files beside it complete what the file does not record.

    Raises:
        UserError: it holds no vision transformer, or tensors that are incomplete or make no sense.
    """
    try:
        return _interpret(checkpoint, path, use_ema)
    except ODD as odd:
        reason = (str(odd).splitlines() or [type(odd).__name__])[0]
        raise UserError(f"{path} is damaged or not a known checkpoint: {reason}") from odd


def _interpret(checkpoint: dict[str, Any], path: str, use_ema: bool) -> Weights:
    theirs, unused = formats.unwrap(checkpoint, path, use_ema)
    cfg, flags = formats.read_cfg(checkpoint, path), formats.read_flags(checkpoint)
    flags["sampling_rate"] = cfg.get("DATA.SAMPLING_RATE", flags.get("sampling_rate"))
    if not isinstance(flags["sampling_rate"], int) or not 1 <= flags["sampling_rate"] <= 1000:
        del flags["sampling_rate"]
    if flags.get("sampling") not in ("dense", "segments"):
        flags.pop("sampling", None)
    source = formats.find_source(theirs, cfg)
    state, converted = formats.our_names(theirs)
    if not any(name.startswith("blocks.") for name in state):
        names = f"{', '.join(list(theirs)[:6])} ..."
        raise UserError(f"{path} holds no vision transformer known here; it holds {names}")
    weights = Weights(state, source, path, converted, unused, flags)
    reads_mean = any(name.startswith("fc_norm.") for name in theirs)
    _keep_understood(weights, cfg, reads_mean)
    if not use_ema and (average := formats.find_average(checkpoint)):
        by = "which --use_ema of the main_*.py scripts and of util.convert reads"
        weights.notes.append(f"it also has a moving average of its weights, {average}, {by}")
    if source == formats.IMAGE_MAE:
        video_layout(weights)
    _check_tensors(weights)

    # convert half precision to single here: rounding after every later conversion would add up
    weights.stored = {k: v.dtype for k, v in weights.state.items()}
    for name, tensor in weights.state.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} holds {tensor.dtype}, not floating-point numbers")
        weights.state[name] = tensor if tensor.dtype == torch.float64 else tensor.float()
    fold_layer_scale(weights)
    if source == formats.IMAGE_MAE:
        kernel = resize_kernel(weights.state[KERNEL], formats.T_PATCH_SIZE)
        weights.put({KERNEL: kernel}, weights.converted[KERNEL])

    # find the model from the tensors and the records in this file and in those beside it
    config: dict[str, Any] = {}
    for beside in _configs_beside(path) if source == formats.HF_VIDEOMAE else ():
        config |= read_json(beside)
    records = formats.read_records(checkpoint, source, path, config, cfg)
    if source in formats.ON_IMAGENET:  # without fc_norm, norm and head read the first token
        records["pool"] = "mean" if reads_mean else "cls"
    formats.find_arguments(weights, records)
    arguments = weights.arguments
    for entry, name in formats.CFG_OF_TENSORS.items():
        if entry in cfg and cfg[entry] != arguments.get(name, cfg[entry]):
            says = f"{entry} {cfg[entry]}, but it holds a model with {arguments[name]}"
            raise UserError(f"the cfg of {path} says {says}")
    _settle_normalisation(weights, records["mean"], records["std"])

    # write out the positions that VideoMAE computes
    tokens = math.prod(token_grid(arguments))
    for name, width in (("pos_embed", "embed_dim"), ("decoder_pos_embed", "decoder_embed_dim")):
        if source in VIDEOMAES and width in arguments and name not in weights.state:
            table = sincos_pos_embed(tokens, arguments[width]).unsqueeze(0)
            weights.put({name: table}, SINCOS)

    weights.notes += _assumptions(weights)
    formats.find_classes(weights, checkpoint, config)
    return weights


def _settle_normalisation(weights: Weights, mean: Any, std: Any) -> None:
    """Set mean and std unless they are ours; note them for targets normalised by patch."""
    channels = weights.arguments["in_chans"]
    is_ours = (mean, std) == ((MEAN,) * channels, (STD,) * channels)
    if not mean or not std or (is_ours and not weights.predicts_unit_pixels):
        return
    is_finite = all(map(math.isfinite, (*mean, *std))) and min(std) > 0
    if not len(mean) == len(std) == channels or not is_finite:
        raise ValueError(f"mean {mean} and std {std} do not normalise {channels} channels")
    weights.mean, weights.std = mean, std
    if weights.arguments.get("target") == "patch":
        weights.arguments["target_norm"] = [list(mean), list(std)]


def _keep_understood(weights: Weights, cfg: dict[str, Any], reads_mean: bool) -> None:
    """Leave out a decoder or a head of which a part has no place here; say so in notes.

    Raises UserError if a part of the encoder has none: its model computes something else.
    """
    state, path = weights.state, weights.path
    lacking = [f"{k} {cfg[k]}" for k in formats.CFG_OF_ENCODER if _is_on(cfg.get(k))]
    if any(padding := cfg.get("MVIT.PATCH_PADDING") or []):
        lacking.append(f"MVIT.PATCH_PADDING {padding}")
    kernel, stride = cfg.get("MVIT.PATCH_KERNEL"), cfg.get("MVIT.PATCH_STRIDE")
    if kernel and stride and kernel != stride:
        lacking.append(f"MVIT.PATCH_KERNEL {kernel} and PATCH_STRIDE {stride}")
    if lacking:
        raise UserError(f"{path} was trained with {' and '.join(lacking)}, which models here lack")

    # heads that read the mean of tokens that each have passed the norm, which models here lack
    odd_head = []
    if cfg.get("MVIT.USE_MEAN_POOLING", 1) is cfg.get("MVIT.CLS_EMBED_ON", 1) is False:
        odd_head.append("MVIT.USE_MEAN_POOLING False without a class token")
    elif weights.source == formats.IMAGE_MAE and "cls_token" not in state and not reads_mean:
        odd_head.append("the norm before its mean")
    unknown = [k for k in state if not formats.OUR_NAMES.fullmatch(k)]
    odd_decoder = [k for k in formats.CFG_OF_DECODER if _is_on(cfg.get(k))]
    if weights.source in VIDEOMAES and {PRED, KERNEL} <= state.keys():
        outputs, values = len(state[PRED]), state[KERNEL][0].numel()
        if outputs != values:  # it predicts features of another model, say
            odd_decoder.append(f"{outputs} outputs for {values} values of a patch")
    parts = (("decoder", is_decoder, odd_decoder), ("head", is_head, odd_head))
    for part, belongs, more in parts:
        odd = [name for name in unknown if belongs(name)] + more
        unknown = [name for name in unknown if name not in odd]
        whole = [name for name in weights.state if belongs(name)]
        if odd and whole:
            note = f"its {part} has {odd[0]}, which models here lack, and is left out"
            weights.notes.append(note)
            weights.unused += whole
            weights.state = {k: v for k, v in weights.state.items() if k not in whole}
    if unknown:
        known = (text for k, text in formats.SWITCHES.items() if re.search(k, unknown[0]))
        what = "".join(f" ({text})" for text in known)
        raise UserError(f"{path} has {unknown[0]}{what}, for which models here have no place")


def _check_tensors(weights: Weights) -> None:
    """Raise UserError if a file lacks tensors that define its model, ValueError for odd shapes."""
    state, path = weights.state, weights.path
    needed = [KERNEL, KERNEL_BIAS, formats.FC1]
    if "pos_embed_class" in state or "decoder_cls_token" in state:
        needed.append("cls_token")
    if any(name.startswith("decoder_") for name in state):
        needed.append("decoder_embed.weight")
    if "pos_embed_spatial" in state or "pos_embed_temporal" in state:
        needed += ["pos_embed_spatial", "pos_embed_temporal"]
    elif "pos_embed" not in state and weights.source not in VIDEOMAES:
        raise UserError(f"{path} has no position embeddings; without them it cannot be used")
    if missing := [name for name in needed if name not in state]:
        raise UserError(f"{path} lacks {', '.join(missing)}: the checkpoint is incomplete")
    for name, tensor in state.items():
        shape = list(tensor.shape)
        positions_fit = len(shape) == 3 and shape[0] == 1 and 0 not in shape
        kernel_fits = len(shape) == 5 and shape[-1] == shape[-2]
        if ("pos_embed" in name and not positions_fit) or (name == KERNEL and not kernel_fits):
            raise ValueError(f"{name} has the shape {shape}")


def _is_on(value: Any) -> bool:
    """Return whether a switch of PySlowFast is on: true, or lists of strides or factors above 1."""
    if isinstance(value, list):
        return any(_is_on(x[1:] if isinstance(x, list) else x) for x in value)  # x[0]: the layer
    return value is True or (isinstance(value, int | float) and value > 1)


def _assumptions(weights: Weights) -> Iterator[str]:
    """Say what the file does not, and what becomes of its normalisation."""
    arguments, stated = weights.arguments, weights.stated
    if weights.converted.get("pos_embed") == SINCOS and not stated >= formats.CLIP_SIZE:
        yield (
            "it stores neither positions nor the size of its clips: a model built from it alone "
            "takes {num_frames} frames of {img_size} x {img_size} pixels".format(**arguments)
        )
    width, decoder_width = arguments["embed_dim"], arguments.get("decoder_embed_dim", 512)
    guessed = ["num_heads"] if width % 64 and width not in formats.HEADS_OF_WIDTH else []
    guessed += ["decoder_num_heads"] if decoder_width < 256 else []  # published ones are wider
    if guessed := [f"{name} {arguments[name]}" for name in guessed if name not in stated]:
        yield f"it does not record its heads: {' and '.join(guessed)} is a guess from the width"
    if weights.source == formats.PYSLOWFAST and "pool" in arguments.keys() - stated:
        yield "it does not say what its head reads: here the mean of the tokens, unless --pool cls"
    is_theirs = weights.source == formats.OURS and "num_heads" not in stated  # ours state it
    if is_theirs and weights.has_head and not arguments["cls_embed"]:
        yield "the reference implementation would leave the first patch out of the head's mean"
    if weights.mean is not None:
        clips = f"clips normalised by mean {weights.mean} and std {weights.std}"
        yield f"it was trained on {clips}; here this is folded into the patch embedding"


# --- folds: what other projects compute, in our tensors -------------------------------------------


def fold_layer_scale(weights: Weights) -> None:
    """Multiply the last layer of every branch of a block by the branch's layer scale."""
    for name in [k for k in weights.state if ".gamma_" in k]:
        layer = name.replace("gamma_1", "attn.proj").replace("gamma_2", "mlp.fc2")
        scale = weights.state.pop(name).double()
        for key in (f"{layer}.weight", f"{layer}.bias"):
            rows = weights.state[key]
            scaled = torch.einsum("d...,d->d...", rows.double(), scale).to(rows.dtype)
            weights.put({key: scaled}, "layer scale folded in")


def video_layout(weights: Weights) -> None:
    """Give an image model's tensors the layout of a video model with patches of one frame.

    Positions become separable, zero in time: once the kernel is repeated and divided, the model
    sees a still video as it sees the image.
    """
    kernel = {KERNEL: weights.state[KERNEL].unsqueeze(2)}
    weights.put(kernel, f"repeated over {formats.T_PATCH_SIZE} frames and divided")
    for name in [k for k in weights.state if k.endswith("pos_embed")]:
        joint = weights.state.pop(name)
        rows, steps = joint.shape[1], formats.NUM_FRAMES // formats.T_PATCH_SIZE
        cls = int(rows > 1 and math.isqrt(rows - 1) ** 2 == rows - 1)  # one more than a square
        parts = {f"{name}_class": joint[:, :1]} if cls else {}
        if name == "pos_embed" and not cls and "cls_token" in weights.state:
            parts = {f"{name}_class": torch.zeros_like(joint[:, :1])}
        weights.put({f"{name}_spatial": joint[:, cls:]} | parts, "from the image model")
        zeros = {f"{name}_temporal": joint.new_zeros(1, steps, joint.shape[-1])}
        weights.put(zeros, "zero: every frame is like the image")


def with_our_normalisation(weights: Weights) -> Weights:
    """Let a model take clips and predict pixels normalised by (0.45, 0.225); see renormalise."""
    if weights.mean is None:
        return weights
    channels = len(weights.mean)
    ours = (MEAN,) * channels, (STD,) * channels
    return replace(renormalise(weights, ours, ours), mean=None, std=None)


def renormalise(weights: Weights, clips: Sequence, pixels: Sequence) -> Weights:
    """Fold another normalisation (mean and standard deviation by channel) into a model.

    The result takes `clips` and computes what the original computes from the same pixels. Pixels
    that it predicts are normalised by `pixels`; targets normalised patch by patch stay.
    """
    channels, state = weights.arguments["in_chans"], weights.state
    then = weights.mean or (MEAN,) * channels, weights.std or (STD,) * channels
    (m, s), (mean, std) = (torch.tensor(x, dtype=torch.float64) for x in (then, clips))
    new = replace(weights, state=dict(state), converted=dict(weights.converted))
    new.mean, new.std = map(tuple, clips)

    # (pixel - m) / s = scale * (pixel - mean) / std + shift, by channel
    scale, shift = (std / s).view(-1, 1, 1, 1), (mean - m) / s
    weight, bias = state[KERNEL], state[KERNEL_BIAS]  # (D, C, t, p, p), (D,)
    folded = {
        KERNEL: (weight.double() * scale).to(weight.dtype),
        KERNEL_BIAS: (bias + weight.double().sum((2, 3, 4)) @ shift).to(bias.dtype),
    }
    new.put(folded, "input normalisation folded in")
    if weights.arguments.get("target") == "pixels" and {PRED, PRED_BIAS} <= state.keys():
        if weights.predicts_unit_pixels:
            m, s = torch.zeros_like(m), torch.ones_like(s)
        mean, std = torch.tensor(pixels, dtype=torch.float64)
        weight, bias = state[PRED], state[PRED_BIAS]  # rows run over (frame, row, column, C)
        scale, shift = (x.repeat(len(bias) // channels) for x in (s / std, (m - mean) / std))
        folded = {
            PRED: (weight.double() * scale.unsqueeze(1)).to(weight.dtype),
            PRED_BIAS: (bias.double() * scale + shift).to(bias.dtype),
        }
        new.put(folded, "normalisation of the targets folded in")
    return new


# --- loading --------------------------------------------------------------------------------------


def apply_weights(
    model: nn.Module,
    weights: Weights,
    keep_head: bool,
    allow_missing: bool = False,
    keep_decoder: bool = True,
) -> None:
    """Load a checkpoint into a classifier or an autoencoder and print a loading report.

    Positions and patch kernels are resized to the model's clips; input normalisation other than
    ours is folded into the patch embedding. A classifier leaves the decoder out. All tensors are
    copied, so that the model does not depend on the file afterwards.

    Args:
        model: a model of this project. One on the meta device moves to the CPU with the weights:
            for a large model this is seconds faster than drawing weights first.
        keep_head: load the classification head too; otherwise it stays as drawn.
        allow_missing: leave weights that the file lacks as drawn, with a warning.
        keep_decoder: load an autoencoder's decoder too; otherwise it stays as drawn.

    Raises:
        UserError: weights are missing or have another shape, or the file is of another model.
    """
    weights, here = with_our_normalisation(weights), vars(model)["arguments"]
    own = model.state_dict()
    wanted = {k: v for k, v in own.items() if keep_head or not is_head(k)}
    if not keep_decoder:
        wanted = {k: v for k, v in wanted.items() if not is_decoder(k)}
        here = {k: v for k, v in here.items() if k not in formats.DECODER_ARGUMENTS}
    needs = _needs(weights, model, keep_head)
    try:
        state, how, used = fit_state(weights, wanted, here)
    except UserError as error:
        raise UserError(f"{error}; {needs}" if needs else str(error)) from error

    # shapes do not show everything, and the first blocks of a deeper model would fit
    wrong = []
    decides = weights.stated & {"num_heads", "decoder_num_heads", "pool" if keep_head else ""}
    for name, theirs in weights.arguments.items():
        ours = here.get(name, theirs)
        if (name in decides and theirs != ours) or (name.endswith("depth") and theirs > ours):
            wrong.append(f"{name} is {theirs} in the file and {ours} here")
    dropped = [k for k in weights.state if k not in state and k not in used]
    if odd := [k for k in dropped if not (is_decoder(k) or is_head(k) or k in CLASS_TOKEN)]:
        wrong.append(f"{some(odd)} of the file has no place here")
    for k, mine in own.items():
        if k in state and state[k].shape != mine.shape:
            wrong.append(f"{k} is {list(state[k].shape)} in the file and {list(mine.shape)} here")
    if wrong:
        problem = f"{weights.path} does not fit the model: {some(wrong, joint='; ')}"
        raise UserError(f"{problem}; {needs or 'check --model'}")
    missing = [k for k in wanted if k not in state]
    missing += [f"{k}_class" for k in wanted if how.get(k) == NO_CLASS_ROW]
    if missing:
        problem = f"{weights.path} lacks {len(missing)} weights of the model"
        if not allow_missing:
            hint = "check --model, or load the rest with main_finetune.py --allow_missing"
            raise UserError(f"{problem} ({some(missing)}); {needs or hint}")
        print0(f"WARNING: {problem}: {some(missing)} stay as drawn (--allow_missing)")

    # the meta device has no memory to copy to: the model takes copies for its own tensors
    is_meta = any(tensor.is_meta for tensor in own.values())
    state = {k: v.to(own[k].dtype, copy=is_meta) for k, v in state.items()}
    model.load_state_dict(state, strict=False, assign=is_meta)
    vars(model).update((k, v) for k, v in weights.flags.items() if k.startswith("sampling"))

    # report what became of every tensor of the model and of the file
    rows: dict[str, list[str]] = {"loaded": []}
    for name in own:
        row = how.get(name, "loaded") if name in state else "missing, left as drawn"
        rows.setdefault(row, []).append(name)
    if dropped := dropped + weights.unused:
        rows["dropped"] = dropped
    source = f"{weights.path} ({weights.source} format)"
    print0(f"loaded {len(state)} of {len(own)} tensors from {source}")
    for note in weights.notes:
        print0(f"  note: {note}")
    for row, names in rows.items():
        shown = some(brief(names), 8 if row == "loaded" else len(names))
        print0(f"  {len(names):4}  {row}: {shown}")


def _needs(weights: Weights, model: nn.Module, with_head: bool) -> str:
    """Name all flags in which a file's model differs from the model here, but for its clips."""
    here = vars(model)["arguments"]
    theirs = {k: v for k, v in weights.arguments.items() if k in here and v != here[k]}
    names = [*WHOLE, *formats.HEAD_ARGUMENTS] if with_head else WHOLE
    names = [k for k in names if k != "pool" or k in weights.stated]
    needs = [" ".join(_as_flags({k: theirs[k] for k in names if k in theirs}))]
    sizes = {k: weights.arguments[k] for k in SIZES if k != "num_heads" or k in weights.stated}
    if theirs.keys() & sizes:
        known = models_of(sizes, vars(sys.modules[type(model).__module__])["MODELS"])
        described = "a --model with " + ", ".join(f"{k} {v}" for k, v in sizes.items())
        needs.append(" or ".join(f"--model {name}" for name in known) or described)
    text = " and ".join(filter(None, needs))
    return f"the file needs {text}" if text else ""


def models_of(sizes: dict[str, Any], models: dict[str, Any]) -> list[str]:
    """Return the names of MODELS that have these sizes."""
    return [name for name, build in models.items() if sizes.items() <= build.keywords.items()]


def has_head_for(weights: Weights, model: nn.Module) -> bool:
    """Return whether a file has a head for the model's number of classes."""
    head = weights.state.get("head.weight")
    return head is not None and head.shape == model.state_dict()["head.weight"].shape


def brief(names: list[str]) -> list[str]:
    """Write the same name in many blocks once."""
    return list(dict.fromkeys(re.sub(r"blocks\.\d+\.", "blocks.*.", name) for name in names))


def some(names: list[str], count: int = 4, joint: str = ", ") -> str:
    """Join the first few names and say how many more there are."""
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return (joint.join(names[:count]) or "none") + rest


def fit_state(
    weights: Weights, own: dict[str, Tensor], arguments: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str], set[str]]:
    """Convert a file's tensors to the layout of a model's (own), as far as that needs no guess.

    Returns:
        the tensors, how they were made, and the names of the positions in the file that were used.
    """
    state, used = dict(weights.state), set()
    how = {name: f"converted: {text}" for name, text in weights.converted.items()}
    for name in ("pos_embed", "decoder_pos_embed"):
        parts = pos_embed.take_positions(state, name, weights.arguments["cls_embed"])
        if not parts or not any(k.startswith(name) for k in own):
            continue
        if not arguments["cls_embed"]:
            parts.pop("class", None)
        is_joint, to_joint = "joint" in parts, name in own
        taken = {name} if is_joint else {f"{name}_{part}" for part in parts}
        old, new = token_grid(weights.arguments), token_grid(arguments)

        # if the file does not state the grid of joint positions, use the model's where it fits
        if is_joint and not weights.stated >= formats.CLIP_SIZE:
            rows = parts["joint"]
            if weights.converted.get(name) == SINCOS:  # computed for a guess: use the model's
                rows = sincos_pos_embed(math.prod(new), rows.shape[-1]).unsqueeze(0)
            if rows.shape[1] == math.prod(new):
                parts["joint"], old = rows, new
            else:
                weights.refuse_doubt()

        # keep the model's own class row (zeros for a model on the meta device)
        lacks_row = to_joint and arguments["cls_embed"] and "class" not in parts
        if lacks_row:
            row = own[name][:, :1]
            parts["class"] = torch.zeros_like(row, device="cpu") if row.is_meta else row
        try:
            rounding = weights.rounding(name)
            fitted = pos_embed.put_positions(parts, name, old, new, to_joint, rounding)
        except RuntimeError as error:  # the grid is a wrong guess, or the file contradicts itself
            wrong = f"{weights.path}: {name} does not have {_times(old)} tokens"
            raise UserError(weights.doubt or wrong) from error
        except ValueError as error:
            raise UserError(f"{weights.path}: {error}") from error
        state = {k: v for k, v in state.items() if k not in taken} | fitted
        used |= taken
        for key in fitted:
            if lacks_row:
                how[key] = NO_CLASS_ROW
            elif old != new and not key.endswith("_class"):
                how[key] = f"resized: {_times(old)} -> {_times(new)} tokens"
            elif to_joint != is_joint:
                how[key] = f"converted: from {'joint' if is_joint else 'separable'} positions"
    t_patch, frames = arguments["t_patch_size"], state[KERNEL].shape[2]
    if frames != t_patch:
        how[KERNEL] = f"resized: {frames} -> {t_patch} frames"
        state[KERNEL] = resize_kernel(state[KERNEL], t_patch)
    return {k: v for k, v in state.items() if k in own}, how, used


def _times(grid: Grid) -> str:
    return " x ".join(map(str, grid))
