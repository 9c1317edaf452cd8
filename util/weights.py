"""Reading checkpoint files and loading weights.

Files are read with weights_only, so that loading never runs code from them; those of other projects
go through util/formats.py. util/checkpoint.py writes the checkpoints of a run.
"""

import argparse
import json
import math
import os
import pickle
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from util.dist import print0
from util.errors import UserError
from util.file_io import fetch, forget, is_remote, open_file, refuse_other_kinds
from util.formats import (
    HF_VIDEOMAE,
    NO_CLASS_ROW,
    SINCOS,
    Weights,
    find_source,
    interpret,
    resize_kernel,
    unwrap,
)
from util.pos_embed import (
    Grid,
    join,
    resize_joint,
    resize_spatial,
    resize_temporal,
    sincos_pos_embed,
    split,
)

# what a Hugging Face folder holds: weights in one of these, and descriptions beside them
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
HF_CONFIGS = ("config.json", "preprocessor_config.json")


def read_checkpoint(path: str, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint file on the CPU without running code from it.

    Args:
        path: a path, an address, or the name of a released checkpoint; PyTorch's format or
            .safetensors, which gives {"model": tensors, "metadata": the header's strings}.
        mmap: leave the tensors of a local file on the disk until they are used.

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
                return read_safetensors(file.read())
            with torch.serialization.safe_globals([argparse.Namespace]):
                lazy = mmap and not is_remote(local)
                source = local if lazy else file
                checkpoint = torch.load(source, "cpu", weights_only=True, mmap=lazy)
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


def read_safetensors(data: bytes) -> dict[str, Any]:
    """Read the bytes of a .safetensors file: {"model": tensors, "metadata": strings}."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return {"model": safetensors.torch.load(data), "metadata": header.get("__metadata__", {})}


def read_weights(path: str) -> Weights:
    """Read a checkpoint of any known format under this project's names (util/formats.py).

    Args:
        path: a path, an address, the name of a released checkpoint, or a Hugging Face folder.

    Raises:
        UserError: it cannot be read, or holds no video transformer.
    """
    if not is_remote(path):
        inside = (os.path.join(path, name) for name in HF_WEIGHTS)
        path = next(filter(os.path.isfile, inside), path)
    checkpoint = read_checkpoint(path)
    config = {}
    if not is_remote(path) and find_source(unwrap(checkpoint, path)) == HF_VIDEOMAE:
        for name in HF_CONFIGS:
            config |= read_config(os.path.join(os.path.dirname(path), name))
    return interpret(checkpoint, path, config)


def read_config(path: str) -> dict[str, Any]:
    """Read a JSON file of names and values; one that does not exist is empty.

    Raises:
        UserError: it is damaged.
    """
    if not os.path.isfile(path):
        return {}
    with open_file(path, "rb") as file:
        try:
            config = json.load(file)
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged: it holds no names and values")
    return config


def apply_weights(
    model: nn.Module, weights: Weights, keep_head: bool, allow_missing: bool = False
) -> None:
    """Load a checkpoint into a classifier or an autoencoder and print what became of each tensor.

    Positions and patch kernels are resized to the model's clips; input normalisation other than
    ours is folded into the patch embedding. A classifier drops the decoder.

    Args:
        model: one of this project's; its constructor arguments say what is needed. On the meta
            device it takes the file's tensors as its own, which saves seconds for a large one.
        keep_head: load the classification head too; else it is left as drawn.
        allow_missing: leave weights as drawn that the file lacks, with a warning.

    Raises:
        UserError: weights are missing or of another shape, or the head is with keep_head; or the
            file is of a deeper model or one of other heads, which no shape shows.
    """
    weights = weights.with_our_normalisation()
    own = model.state_dict()
    state, how = fit_state(weights, own, vars(model)["arguments"])
    if not keep_head:
        state = {k: v for k, v in state.items() if not k.startswith("head.")}
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
    refuse_other_models(weights, model)
    missing = [k for k in own if k not in state]
    missing += [f"{k}_class" for k in own if how.get(k) == NO_CLASS_ROW]
    not_loaded = [k for k in missing if keep_head or not k.startswith("head.")]
    if not_loaded:
        problem = f"{weights.path} lacks {len(not_loaded)} weights of the model"
        if not allow_missing:
            raise UserError(f"{problem} ({_some(not_loaded)}); {_flags_hint(weights, model)}")
        print0(f"WARNING: {problem}: {_some(not_loaded)} stay as drawn (--allow_missing)")
    # a model on the meta device has no memory to copy to: it takes the tensors themselves
    state = {k: v.to(own[k].dtype) for k, v in state.items()}
    model.load_state_dict(state, strict=False, assign=any(v.is_meta for v in own.values()))
    print0(coverage(weights, own, state, how))


def refuse_other_models(weights: Weights, model: nn.Module) -> None:
    """Raise UserError for a file of other numbers of heads, or of more blocks than the model has.

    The decoder counts where the model has one.
    """
    here, found = vars(model)["arguments"], weights.arguments
    wrong = []
    for prefix in ("", "decoder_") if "decoder_depth" in here else ("",):
        heads, depth = f"{prefix}num_heads", f"{prefix}depth"
        if weights.recorded.get(heads, here[heads]) != here[heads]:
            wrong.append(f"{heads} is {weights.recorded[heads]} there and {here[heads]} here")
        if found.get(depth, 0) > here[depth]:
            wrong.append(f"{depth} is {found[depth]} there and {here[depth]} here")
    if wrong:
        raise UserError(f"{weights.path} is of another model: {'; '.join(wrong)}; check --model")


def has_head_for(weights: Weights, model: nn.Module) -> bool:
    """Tell whether a file's head has the classes of the model."""
    head = weights.state.get("head.weight")
    return head is not None and head.shape == model.state_dict()["head.weight"].shape


def _flags_hint(weights: Weights, model: nn.Module) -> str:
    """Name the flags that would build the model of the file."""
    # what is lost is as good as never there: such a model can be filled
    held = {
        "cls_embed": "cls_token" in weights.state,
        "no_qkv_bias": not any(k.endswith(".attn.q.bias") for k in weights.state),
    }
    flags = []
    for name in ("cls_embed", "sep_pos_embed", "no_qkv_bias", "sincos_pos_embed"):
        theirs = (weights.arguments | held)[name]
        if theirs != vars(model)["arguments"][name] and (theirs or name != "no_qkv_bias"):
            flags.append(f"--{name}" if theirs else f"--no-{name}")
    if flags:
        return f"the file is of a model with {' '.join(flags)}"
    return "check --model, or load the rest with main_finetune.py --allow_missing"


def coverage(
    weights: Weights, own: dict[str, Tensor], state: dict[str, Tensor], how: dict[str, str]
) -> str:
    """Draw up what became of every tensor of the file and of the model, as a table."""
    rows: dict[str, list[str]] = {"loaded": []}
    for name in own:
        if name not in state:
            row = "missing, left as drawn"
        else:
            row = how.get(name, "loaded")
        rows.setdefault(row, []).append(name)
    reshaped = [k for k in own if k in state and "pos_embed" in k and k not in weights.state]
    stems = tuple(re.sub("_(spatial|temporal)$", "", k) for k in reshaped)
    carried = [k for k in weights.state if stems and k.startswith(stems)]
    if "cls_token" not in own:
        carried = [k for k in carried if not k.endswith("_class")]
    dropped = [k for k in weights.state if k not in state and k not in carried]
    dropped += weights.unused
    rows |= {"dropped": dropped} if dropped else {}
    loaded = sum(name in state for name in own)
    lines = [f"loaded {loaded} of {len(own)} tensors from {weights.path} ({weights.source})"]
    lines += [f"  note: {note}" for note in weights.notes]
    for row, names in rows.items():
        names_shown = _some(_summarise(names), 8 if row == "loaded" else len(names))
        lines.append(f"  {len(names):4}  {row}: {names_shown}")
    return "\n".join(lines)


def _summarise(names: list[str]) -> list[str]:
    """Write the same name in many blocks once."""
    return list(dict.fromkeys(re.sub(r"blocks\.\d+\.", "blocks.*.", name) for name in names))


def _some(names: list[str], count: int = 4, joint: str = ", ") -> str:
    """Join the first few names."""
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return (joint.join(names[:count]) or "none") + rest


def fit_state(
    weights: Weights, own: dict[str, Tensor], arguments: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Shape a file's tensors for a model, as far as that can be done without guessing.

    Args:
        own: the model's state dict.
        arguments: the model's constructor arguments.

    Returns:
        those tensors that the model has, and by name how they were converted or resized.

    Raises:
        UserError: positions that cannot take the model's form.
    """
    state = dict(weights.state)
    how = {name: f"converted: {text}" for name, text in weights.converted.items()}
    target = replace(weights, arguments=arguments)
    for name in ("pos_embed", "decoder_pos_embed"):
        if all(any(k.startswith(name) for k in names) for names in (own, state)):
            _fit_positions(name, weights, target, state, how, own)
    kernel = "patch_embed.proj.weight"
    t_patch = arguments["t_patch_size"]
    if kernel in state and state[kernel].shape[2] != t_patch:
        how[kernel] = f"resized: {state[kernel].shape[2]} -> {t_patch} frames"
        state[kernel] = resize_kernel(state[kernel], t_patch)
    return {k: v for k, v in state.items() if k in own}, how


def _fit_positions(
    name: str,
    weights: Weights,
    target: Weights,
    state: dict[str, Tensor],
    how: dict[str, str],
    own: dict[str, Tensor],
) -> None:
    """Bring positions in `state` to the model's grid and form, separable or joint.

    What the file lacks stays out of `state`; for the class token's row of joint positions, a part
    of a tensor, `how` says NO_CLASS_ROW.
    """
    old, new = weights.grid, target.grid
    is_joint, to_joint = name in state, name in own
    with_class = target.arguments["cls_embed"]
    parts = _take_positions(name, weights, state)
    if is_joint and not weights.grid_stated:
        if weights.converted.get(name) == SINCOS:
            table = sincos_pos_embed(math.prod(new), parts["joint"].shape[-1])
            parts["joint"] = table.unsqueeze(0)
        if parts["joint"].shape[1] == math.prod(new):
            old = new
        else:
            weights.refuse_doubt()
    stored = {part: positions.dtype for part, positions in parts.items()}
    try:
        parts = {part: _resize(part, positions, old, new) for part, positions in parts.items()}
    except RuntimeError as error:  # the grid is a guess, or the file contradicts itself
        wrong = f"{weights.path}: {name} is not of {_times(old)} tokens"
        raise UserError(weights.doubt or wrong) from error
    if not with_class:
        parts.pop("class", None)
    if to_joint:
        fitted = _joint_rows(parts, own[name] if with_class else None)
        fitted = {name: fitted} if fitted is not None else {}
    else:
        if is_joint:
            try:
                parts["spatial"], parts["temporal"] = split(
                    parts.pop("joint"), new, stored["joint"]
                )
            except ValueError as error:
                raise UserError(f"{weights.path}: {error}") from error
        fitted = {f"{name}_{part}": positions for part, positions in parts.items()}
    state |= fitted
    for key in fitted:
        if to_joint and with_class and "class" not in parts:
            how[key] = NO_CLASS_ROW
        elif old != new and not key.endswith("_class"):
            how[key] = f"resized: {_times(old)} -> {_times(new)} tokens"
        elif is_joint != to_joint:
            how[key] = f"converted: from {'joint' if is_joint else 'separable'} positions"


def _take_positions(name: str, weights: Weights, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take positions out of `state`: "joint", or "spatial" and "temporal", and the "class" row."""
    if name in state:
        rows, count = state.pop(name), int(weights.arguments["cls_embed"])
        parts = {"class": rows[:, :1]} if count else {}
        return parts | {"joint": rows[:, count:]}
    names = {part: f"{name}_{part}" for part in ("spatial", "temporal", "class")}
    return {part: state.pop(key) for part, key in names.items() if key in state}


def _resize(part: str, positions: Tensor, old: Grid, new: Grid) -> Tensor:
    if part == "joint":
        return resize_joint(positions, old, new)
    if part == "spatial":
        return resize_spatial(positions, old[1:], new[1:])
    return resize_temporal(positions, new[0]) if part == "temporal" else positions


def _joint_rows(parts: dict[str, Tensor], own: Tensor | None) -> Tensor | None:
    """Join parts to the rows of one tensor, with the model's own first row where that is lacking.

    Args:
        own: the model's positions, None for a model without class token.

    Returns:
        None where the file lacks the positions in space or in time.
    """
    if {"spatial", "temporal"} <= parts.keys():
        joint = join(parts["spatial"], parts["temporal"])
    elif "joint" in parts:
        joint = parts["joint"]
    else:
        return None
    if own is None:
        return joint
    # a model on the meta device has no row to give; apply_weights refuses it
    first = parts.get("class", joint[:, :1] if own.is_meta else own[:, :1])
    return torch.cat([first, joint], dim=1)


def _times(grid: Grid) -> str:
    return " x ".join(map(str, grid))


def as_flags(values: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Write those of the named values that are there as command-line flags."""
    result = []
    for name in names:
        value = values.get(name)
        if name == "no_qkv_bias":
            result += ["--no_qkv_bias"] if value else []
        elif isinstance(value, bool):
            result.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            result += [f"--{name}", str(value)]
    return result


MODEL_FLAGS = (
    "input_size",
    "num_frames",
    "sampling_rate",
    "sampling",
    "t_patch_size",
    "sep_pos_embed",
    "sincos_pos_embed",
    "cls_embed",
    "no_qkv_bias",
    "num_classes",
)


def checkpoint_flags(path: str, names: Sequence[str] = MODEL_FLAGS) -> list[str]:
    """Return the named flags as the checkpoint has them: of its model and its clips."""
    weights = read_weights(path)
    values = weights.flags | weights.arguments | {"input_size": weights.arguments["img_size"]}
    if weights.doubt:  # the user must say
        values |= {"input_size": None, "num_frames": None}
    return as_flags(values, names)
