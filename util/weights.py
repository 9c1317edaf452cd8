"""Reading anyone's checkpoint, and loading its weights into a model.

Files are read with weights_only, so that loading never runs code from them; util/formats.py knows
their names. util/checkpoint.py writes the checkpoints of a run.
"""

import argparse
import json
import math
import os
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import IO, Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from util import formats
from util.dist import print0
from util.errors import UserError
from util.file_io import fetch, forget, is_remote, open_file, refuse_other_kinds
from util.formats import HF_VIDEOMAE, IMAGE_MAE, KERNEL, SINCOS, VIDEOMAE, Weights, token_grid
from util.pos_embed import (
    Grid,
    put_positions,
    resize_kernel,
    resize_positions,
    sincos_pos_embed,
    take_positions,
)
from util.video.transforms import MEAN, STD

# what a Hugging Face folder holds: weights in one of these, and descriptions beside them
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
HF_CONFIGS = ("config.json", "preprocessor_config.json")
NO_CLASS_ROW = "its row of the class token is missing and left as drawn"

MODEL_FLAGS = """
    input_size num_frames sampling_rate sampling t_patch_size sep_pos_embed sincos_pos_embed
    cls_embed no_qkv_bias num_classes
""".split()

# --- reading --------------------------------------------------------------------------------------


def read_checkpoint(path: str, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint file on the CPU without running code from it.

    Args:
        path: a path, an address, or the name of a released checkpoint; PyTorch's format or
            .safetensors, which gives {"model": tensors, "metadata": the header's strings}.
        mmap: map a local or downloaded file into memory: what is never used stays on the disk.
            Its tensors are views of the file, valid until it is overwritten in place. PyTorch's
            format of before 2020 cannot be mapped and is read whole.

    Raises:
        UserError: missing, damaged, not a checkpoint, or one that asks to run code.
    """
    if not is_remote(path) and os.path.isdir(path):
        raise UserError(f"{path} is a folder; give the checkpoint file in it")
    local = fetch(path)
    with open_file(local, "rb") as file:
        start = file.read(64)
        file.seek(0)
        refuse_other_kinds(start, path)
        try:
            if start[8:9] == b"{":
                return _read_safetensors(local, file)
            is_zip = start.startswith(b"PK\x03\x04")
            mmap = mmap and is_zip and not is_remote(local)
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = torch.load(
                    local if mmap else file, "cpu", weights_only=True, mmap=mmap
                )
        except Exception as error:  # torch's readers raise every kind of them for damaged files
            code = re.search(r"GLOBAL ([\w.]+)", str(error))
            if code:
                raise UserError(
                    f"{path} is not loaded: it asks to run code ({code[1]}), not only for weights"
                ) from error
            reason = (str(error).splitlines() or ["empty file"])[0]
            if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
                reason = "PyTorch does not recognise it"  # its own advice is to run the file's code
            reason += forget(path, local)
            raise UserError(f"{path} is damaged or not a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def _read_safetensors(local: str, file: IO) -> dict[str, Any]:
    """Read a .safetensors file: mapped into memory, or from the stream of one that is remote."""
    if is_remote(local):
        data = file.read()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return {"model": safetensors.torch.load(data), "metadata": header.get("__metadata__", {})}
    with safetensors.safe_open(local, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return {"model": tensors, "metadata": opened.metadata() or {}}


def read_weights(path: str) -> Weights:
    """Read a checkpoint of any known format under this project's names.

    Local files are mapped (see read_checkpoint): load the tensors into a model, which copies them,
    or copy them. A file that checkpoint_flags has just read is not read again.

    Args:
        path: a path, an address, the name of a released checkpoint, or a Hugging Face folder.

    Raises:
        UserError: it cannot be read, holds no video transformer, or lacks tensors that tell which.
    """
    version, weights = _handed_over.pop(path, (None, None))
    if weights is not None and version == _version(path):
        return weights
    inside = [] if is_remote(path) else [os.path.join(path, name) for name in HF_WEIGHTS]
    path = next(filter(os.path.isfile, inside), path)
    return interpret(read_checkpoint(path, mmap=True), path, lambda: _read_configs(path))


# what checkpoint_flags read last, for read_weights: weights by path, with the file's version
_handed_over: dict[str, tuple[list[tuple[int, ...]], Weights]] = {}


def _version(path: str) -> list[tuple[int, ...]]:
    """Return what changes when a file, or one of those beside it, is replaced; empty if unknown."""
    local = fetch(path)
    if is_remote(local):
        return []
    folder = local if os.path.isdir(local) else os.path.dirname(local)
    paths = [local, *(os.path.join(folder, name) for name in (*HF_WEIGHTS, *HF_CONFIGS))]
    stats = [os.stat(name) for name in paths if os.path.exists(name)]
    return [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in stats]


def checkpoint_flags(path: str, names: Sequence[str] = MODEL_FLAGS) -> list[str]:
    """Return the named flags of a checkpoint's model and clips, as on a command line.

    The weights stay in memory for the next read_weights of the same path.
    """
    version, weights = _version(path), read_weights(path)
    _handed_over.clear()
    if version:
        _handed_over[path] = version, weights
    values = weights.flags | weights.arguments | {"input_size": weights.arguments["img_size"]}
    if weights.doubt:  # the user must say
        values |= {"input_size": None, "num_frames": None}
    flags = []
    for name in names:
        value = values.get(name)
        if name == "no_qkv_bias":
            flags += ["--no_qkv_bias"] if value else []
        elif isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags += [f"--{name}", str(value)]
    return flags


def _read_configs(path: str) -> dict[str, Any]:
    """Read what Hugging Face's files beside a file record, as one dict; empty where there are none.

    Raises:
        UserError: one is damaged.
    """
    config: dict[str, Any] = {}
    for name in () if is_remote(path) else HF_CONFIGS:
        beside = os.path.join(os.path.dirname(path), name)
        if os.path.isfile(beside):
            with open_file(beside, "rb") as file:
                try:
                    config = config | json.load(file)
                except (TypeError, ValueError) as error:  # TypeError: no names and values
                    raise UserError(f"{beside} is damaged: {error}") from error
    return config


# --- understanding --------------------------------------------------------------------------------


def interpret(
    checkpoint: dict[str, Any], path: str, read_config: Callable[[], dict[str, Any]] = dict
) -> Weights:
    """Understand a checkpoint of any known format.

    Args:
        checkpoint: the file's contents (util.weights.read_checkpoint).
        path: names the file in messages; hints in its name are used where the file is silent.
        read_config: reads Hugging Face's config.json and preprocessor_config.json, which lie beside
            the file, as one dict; called for Hugging Face's files only.

    Raises:
        UserError: it holds no video transformer, lacks tensors that tell the model, or has contents
            that make no sense.
    """
    try:
        return _interpret(checkpoint, path, read_config)
    # raised by names, shapes and records that make no sense, where they are used
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as odd:
        reason = (str(odd).splitlines() or [type(odd).__name__])[0]
        raise UserError(f"{path} is damaged or not a known checkpoint: {reason}") from odd


def _interpret(
    checkpoint: dict[str, Any], path: str, read_config: Callable[[], dict[str, Any]]
) -> Weights:
    theirs = formats.unwrap(checkpoint, path)
    source = formats.find_source(theirs)
    is_videomae = source in (VIDEOMAE, HF_VIDEOMAE)
    state, converted = formats.our_names(theirs)
    notes: list[str] = []

    # leave out what has no place here, and heads that read the first token: ours reads the mean
    unused = [name for name in state if not formats.OUR_NAMES.fullmatch(name)]
    has_fc_norm = any(name.startswith("fc_norm.") for name in theirs)
    if "head.weight" in state and not has_fc_norm and (is_videomae or source == IMAGE_MAE):
        unused += ["head.weight", "head.bias"]
        notes.append("its head reads one token, not the mean over the patches, and is left out")
    state = {k: v for k, v in state.items() if k not in unused}
    if not any(name.startswith("blocks.") for name in state):
        names = f"{', '.join(list(theirs)[:6])} ..."
        raise UserError(f"{path} holds no vision transformer that is known here, but {names}")
    if source == IMAGE_MAE:
        state, how = formats.video_layout(state)
        converted |= how
    formats.check_tensors(state, source, path)

    # half precision becomes single here, once: rounding after every conversion would add up
    wide = {k: v.to(torch.promote_types(v.dtype, torch.float32)) for k, v in state.items()}
    stored = {k: v.dtype for k, v in state.items() if v.dtype != wide[k].dtype}
    if source == IMAGE_MAE:
        wide[KERNEL] = resize_kernel(wide[KERNEL], formats.T_PATCH_SIZE)
        stored.pop(KERNEL, None)

    # find the model, from the tensors and from what the file records
    config = read_config() if source == HF_VIDEOMAE else {}
    records, mean, std = formats.read_records(checkpoint, source, path, config)
    grid = formats.find_grid(wide, records, source, path)
    arguments = formats.find_arguments(wide, records, grid, source, path)
    recorded = {k: v for k, v in records.items() if formats.is_like(v, arguments.get(k, 1))}
    notes += [*grid.notes, *formats.guessed_heads(arguments, recorded)]
    replaceable = arguments.keys() - set(formats.SHAPE_ARGUMENTS)
    arguments |= {k: v for k, v in recorded.items() if k in replaceable}

    # write out the positions that VideoMAE computes
    tokens = math.prod(token_grid(arguments))
    for name, width in (("pos_embed", "embed_dim"), ("decoder_pos_embed", "decoder_embed_dim")):
        if is_videomae and width in arguments and name not in wide:
            wide[name] = sincos_pos_embed(tokens, arguments[width]).unsqueeze(0)
            converted[name] = SINCOS

    channels = arguments["in_chans"]
    if mean and std and not len(mean) == len(std) == channels:
        raise ValueError(f"mean {mean} and std {std} are not of {channels} channels")
    weights = Weights(
        state=wide,
        arguments=arguments,
        source=source,
        path=path,
        stored=stored,
        recorded=recorded,
        flags=formats.checkpoint_args(checkpoint),
        converted=converted,
        unused=unused,
        mean=mean,
        std=std,
        notes=notes,
        grid_stated=grid.stated,
        doubt=grid.doubt,
    )
    if (mean, std) == ((MEAN,) * channels, (STD,) * channels):
        if not weights.predicts_unit_pixels:
            weights.mean = weights.std = None
    elif mean is not None:
        notes.append(
            f"it was trained on clips normalised by mean {mean} and std {std}; "
            "models here get that folded into their patch embedding"
        )
    return weights


# --- normalisation --------------------------------------------------------------------------------


def with_our_normalisation(weights: Weights) -> Weights:
    """Fold the file's normalisation into the patch embedding, and into predictions of pixels.

    The result takes clips normalised by (0.45, 0.225) and computes what the original computes
    from the same pixels. Targets that are normalised patch by patch (norm_pix_loss) stay.
    """
    if weights.mean is None or weights.std is None:
        return weights
    mean, std = torch.tensor([weights.mean, weights.std], dtype=torch.float64)
    # (pixel - mean) / std = scale * (pixel - MEAN) / STD + shift
    folded = _fold_input(weights.state, STD / std, (MEAN - mean) / std)
    converted = dict.fromkeys(folded, "input normalisation folded in")
    if weights.arguments.get("norm_pix_loss") is False:
        if weights.predicts_unit_pixels:
            mean, std = torch.zeros_like(mean), torch.ones_like(std)
        pred = fold_output(weights.state, std / STD, (mean - MEAN) / STD)
        folded |= pred
        converted |= dict.fromkeys(pred, "normalisation of the targets folded in")
    return replace(
        weights,
        state=weights.state | folded,
        stored={k: v for k, v in weights.stored.items() if k not in folded},
        converted=weights.converted | converted,
        mean=None,
        std=None,
    )


def _fold_input(state: dict[str, Tensor], scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
    """Return the patch embedding that sees x as the file's sees scale * x + shift, by channel."""
    weight, bias = state[KERNEL].double(), state[formats.KERNEL_BIAS]  # (D, C, t, p, p), (D,)
    return {
        KERNEL: (weight * scale.view(-1, 1, 1, 1)).to(state[KERNEL].dtype),
        formats.KERNEL_BIAS: (bias + weight.sum((2, 3, 4)) @ shift).to(bias.dtype),
    }


def fold_output(state: dict[str, Tensor], scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
    """Return the decoder_pred that predicts scale * x + shift, by channel, where the file's does x.

    Its rows run over (frame, row, column, C).
    """
    folded = {}
    for name in ("decoder_pred.weight", "decoder_pred.bias"):
        if name in state:
            rows = state[name].double().unflatten(0, (-1, len(scale)))  # (u*p*p, C[, D])
            rows = rows * scale.view(-1, *[1] * (rows.ndim - 2))
            if name.endswith("bias"):
                rows = rows + shift
            folded[name] = rows.flatten(0, 1).to(state[name].dtype)
    return folded


# --- loading --------------------------------------------------------------------------------------


def apply_weights(
    model: nn.Module, weights: Weights, keep_head: bool, allow_missing: bool = False
) -> None:
    """Load a checkpoint into a classifier or an autoencoder and print a loading report.

    Positions and patch kernels are resized to the model's clips; input normalisation other than
    ours is folded into the patch embedding. A classifier leaves the decoder out. All tensors are
    copied, so that the model does not depend on the file afterwards.

    Args:
        model: one of this project's; its constructor arguments say what is needed. One on the meta
            device moves to the CPU with its weights, which for a large one is seconds faster than
            drawing them first.
        keep_head: load the classification head too; otherwise it stays as drawn.
        allow_missing: leave weights as drawn that the file lacks, with a warning.

    Raises:
        UserError: weights (with keep_head the head's too) are missing or of another shape; or the
            file's model is deeper or has other numbers of heads, which no shape shows.
    """
    weights = with_our_normalisation(weights)
    own = model.state_dict()
    fitted = fit_state(weights, own, vars(model)["arguments"])
    state = {k: v for k, v in fitted.state.items() if keep_head or not k.startswith("head.")}

    wrong_shape = [
        f"{k} is {list(state[k].shape)} there and {list(own[k].shape)} here"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if wrong_shape:
        raise UserError(
            f"{weights.path} is of another shape: {_some(wrong_shape, joint='; ')}; "
            "check --model, --input_size, --num_frames, --t_patch_size and --num_classes"
        )
    _refuse_other_models(weights, vars(model)["arguments"])
    missing = [k for k in own if k not in state]
    missing += [f"{k}_class" for k in own if fitted.how.get(k) == NO_CLASS_ROW]
    missing = [k for k in missing if keep_head or not k.startswith("head.")]
    if missing:
        problem = f"{weights.path} lacks {len(missing)} weights of the model"
        if not allow_missing:
            hint = _flags_hint(weights, vars(model)["arguments"])
            raise UserError(f"{problem} ({_some(missing)}); {hint}")
        print0(f"WARNING: {problem}: {_some(missing)} stay as drawn (--allow_missing)")

    # the meta device has no memory to copy to: the model takes copies for its own tensors
    is_meta = any(tensor.is_meta for tensor in own.values())
    state = {k: v.to(own[k].dtype, copy=is_meta) for k, v in state.items()}
    model.load_state_dict(state, strict=False, assign=is_meta)
    print0(loading_report(weights, own, state, fitted))


def _refuse_other_models(weights: Weights, here: dict[str, Any]) -> None:
    """Raise UserError for a file with other numbers of heads, or more blocks than the model has."""
    wrong = []
    for prefix in ("", "decoder_") if "decoder_depth" in here else ("",):
        heads, depth = f"{prefix}num_heads", f"{prefix}depth"
        if weights.recorded.get(heads, here[heads]) != here[heads]:
            wrong.append(f"{heads} is {weights.recorded[heads]} there and {here[heads]} here")
        if weights.arguments.get(depth, 0) > here[depth]:
            wrong.append(f"{depth} is {weights.arguments[depth]} there and {here[depth]} here")
    if wrong:
        raise UserError(f"{weights.path} is of another model: {'; '.join(wrong)}; check --model")


def has_head_for(weights: Weights, model: nn.Module) -> bool:
    """Return whether a file has a head for the model's number of classes."""
    head = weights.state.get("head.weight")
    return head is not None and head.shape == model.state_dict()["head.weight"].shape


def _flags_hint(weights: Weights, here: dict[str, Any]) -> str:
    """Name the flags that would build the model of the file."""
    flags = []
    for name in ("cls_embed", "sep_pos_embed", "no_qkv_bias", "sincos_pos_embed"):
        theirs = weights.arguments[name]
        if theirs != here[name] and (theirs or name != "no_qkv_bias"):
            flags.append(f"--{name}" if theirs else f"--no-{name}")
    if flags:
        return f"the file is of a model with {' '.join(flags)}"
    return "check --model, or load the rest with main_finetune.py --allow_missing"


class Fitted(NamedTuple):
    """A file's tensors in a model's form, how they were made, and the file's names of them."""

    state: dict[str, Tensor]
    how: dict[str, str]
    used: set[str]


def loading_report(
    weights: Weights, own: dict[str, Tensor], state: dict[str, Tensor], fitted: Fitted
) -> str:
    """Write a table of what became of every tensor of the file and of the model.

    Args:
        own: the model's state dict.
        state: the tensors that it was given.
    """
    rows: dict[str, list[str]] = {"loaded": []}
    for name in own:
        row = fitted.how.get(name, "loaded") if name in state else "missing, left as drawn"
        rows.setdefault(row, []).append(name)
    dropped = [k for k in weights.state if k not in state and k not in fitted.used]
    if dropped or weights.unused:
        rows["dropped"] = dropped + weights.unused
    loaded = sum(name in state for name in own)
    lines = [f"loaded {loaded} of {len(own)} tensors from {weights.path} ({weights.source})"]
    lines += [f"  note: {note}" for note in weights.notes]
    for row, names in rows.items():
        # the same name in many blocks is written once
        brief = list(dict.fromkeys(re.sub(r"blocks\.\d+\.", "blocks.*.", name) for name in names))
        shown = _some(brief, 8 if row == "loaded" else len(names))
        lines.append(f"  {len(names):4}  {row}: {shown}")
    return "\n".join(lines)


def _some(names: list[str], count: int = 4, joint: str = ", ") -> str:
    """Join the first few names."""
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return (joint.join(names[:count]) or "none") + rest


# --- fitting to a model ---------------------------------------------------------------------------


def fit_state(weights: Weights, own: dict[str, Tensor], arguments: dict[str, Any]) -> Fitted:
    """Bring a file's tensors into a model's form, as far as that needs no guess.

    Args:
        own: the model's state dict.
        arguments: the model's constructor arguments.

    Raises:
        UserError: positions that cannot take the model's form.
    """
    state = dict(weights.state)
    how = {name: f"converted: {text}" for name, text in weights.converted.items()}
    used: set[str] = set()
    for name in ("pos_embed", "decoder_pos_embed"):
        parts = take_positions(state, name, weights.arguments["cls_embed"])
        if not parts or not any(k.startswith(name) for k in own):
            continue
        is_joint, to_joint = "joint" in parts, name in own
        taken = {name} if is_joint else {f"{name}_{part}" for part in parts}
        if not arguments["cls_embed"]:
            parts.pop("class", None)
            taken.discard(f"{name}_class")
        old, new = weights.grid, token_grid(arguments)
        if is_joint and not weights.grid_stated:
            parts["joint"], old = _guess_grid(weights, name, parts["joint"], new)
        try:
            parts = resize_positions(parts, old, new)
        except RuntimeError as error:  # the grid is a guess, or the file contradicts itself
            wrong = f"{weights.path}: {name} is not of {_times(old)} tokens"
            raise UserError(weights.doubt or wrong) from error
        lacks_row = to_joint and arguments["cls_embed"] and "class" not in parts
        if lacks_row:  # the model's own stays; the meta device has none, and apply_weights refuses
            row = own[name][:, :1]
            parts["class"] = torch.zeros_like(row, device="cpu") if row.is_meta else row
        try:
            fitted = put_positions(parts, name, new, to_joint, weights.rounding(name))
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
    t_patch = arguments["t_patch_size"]
    if state[KERNEL].shape[2] != t_patch:
        how[KERNEL] = f"resized: {state[KERNEL].shape[2]} -> {t_patch} frames"
        state[KERNEL] = resize_kernel(state[KERNEL], t_patch)
    return Fitted({k: v for k, v in state.items() if k in own}, how, used)


def _guess_grid(weights: Weights, name: str, joint: Tensor, new: Grid) -> tuple[Tensor, Grid]:
    """Return joint positions that may be of several grids, and their grid: the model's if it fits.

    Raises:
        UserError: it does not fit, and several others do.
    """
    if weights.converted.get(name) == SINCOS:  # computed for a guess: compute the model's
        joint = sincos_pos_embed(math.prod(new), joint.shape[-1]).unsqueeze(0)
    if joint.shape[1] == math.prod(new):
        return joint, new
    weights.refuse_doubt()
    return joint, weights.grid


def _times(grid: Grid) -> str:
    return " x ".join(map(str, grid))
