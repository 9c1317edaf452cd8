"""Saving, resuming and loading weights.

A training checkpoint is a plain dict: model, optimizer, scaler (state dicts), epoch (the last one
finished), step (optimiser steps done) and args (a dict of flags). Files are read with
weights_only, so that loading never runs code from them.
"""

import argparse
import os
import pickle
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from util.dist import is_main, print0
from util.errors import UserError
from util.file_io import is_remote, make_dirs, open_file, path_manager, write_atomically

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)\.pth")
PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")  # of DistributedDataParallel and torch.compile
WRAPPERS = ("model", "model_state", "module", "state_dict")


def save_checkpoint(
    output_dir: str,
    epoch: int,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    args: argparse.Namespace,
) -> None:
    """Write output_dir/checkpoint-EPOCH.pth atomically, from the main process.

    A write that fails (full disk, lost folder) is reported loudly, leaves the older files as they
    are, and lets training go on.
    """
    if not is_main():
        return
    path = os.path.join(output_dir, f"checkpoint-{epoch:05d}.pth")
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "epoch": epoch,
        "step": step,
        "args": vars(args),
    }
    try:
        make_dirs(output_dir)
        write_atomically(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError, UserError) as error:  # torch's zip writer raises RuntimeError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print0(f"WARNING: could not save {path}: {reason}; training goes on without it")
    else:
        print0(f"saved {path}")


def newest_checkpoint(output_dir: str) -> str | None:
    """Return the path of the checkpoint with the highest epoch in a folder, or None."""
    if not output_dir or not path_manager.isdir(output_dir):
        return None
    found = [m for m in map(CHECKPOINT_NAME.fullmatch, path_manager.ls(output_dir)) if m]
    if not found:
        return None
    return os.path.join(output_dir, max(found, key=lambda m: int(m[1]))[0])


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint file on the CPU without running code from it.

    Raises:
        UserError: missing, damaged, not a checkpoint, or one that asks to run code.
    """
    if not is_remote(path) and os.path.isdir(path):
        raise UserError(f"{path} is a folder; give the checkpoint file in it")
    with open_file(path, "rb") as file:
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch's readers raise every kind of them for damaged files
            code = re.search(r"GLOBAL ([\w.]+)", str(error))
            if code:
                raise UserError(
                    f"{path} is not loaded: it asks to run code ({code[1]}), not only for weights"
                ) from error
            reason = (str(error).splitlines() or ["empty file"])[0]
            if isinstance(error, pickle.UnpicklingError):
                reason = "PyTorch does not recognise it"  # its own advice is to run the file's code
            raise UserError(f"{path} is damaged or not a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def checkpoint_args(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the flags a checkpoint was trained with, empty where it does not say."""
    args = checkpoint.get("args", {})
    return dict(args) if isinstance(args, dict) else getattr(args, "__dict__", {})


def model_state(checkpoint: dict[str, Any], path: str) -> dict[str, Tensor]:
    """Extract the weights of a checkpoint under this project's parameter names.

    Raises:
        UserError: there are no tensors in it.
    """
    wrapped = (checkpoint[key] for key in WRAPPERS if isinstance(checkpoint.get(key), dict))
    state = {str(k): v for k, v in next(wrapped, checkpoint).items() if isinstance(v, Tensor)}
    if not state:
        raise UserError(f"{path} holds no weights; its keys are {', '.join(map(str, checkpoint))}")
    state = {PREFIXES.sub("", k): v for k, v in state.items()}
    return {k.replace("head.projection.", "head."): v for k, v in state.items()}


def load_weights(model: nn.Module, path: str, keep_head: bool) -> None:
    """Load a checkpoint's encoder into a classifier and print what was and was not loaded.

    Args:
        keep_head: load the classification head too; else it is left as drawn.

    Raises:
        UserError: encoder weights are missing or of another shape, or the head is with keep_head.
    """
    state = model_state(read_checkpoint(path), path)
    own = model.state_dict()
    if not keep_head:
        state = {k: v for k, v in state.items() if not k.startswith("head.")}
    wrong_shape = [
        f"{k} is {list(state[k].shape)} there and {list(own[k].shape)} here"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if wrong_shape:
        raise UserError(
            f"{path} is of another shape: {'; '.join(wrong_shape[:4])}; "
            "check --model, --input_size, --num_frames, --t_patch_size and --num_classes"
        )
    missing = [k for k in own if k not in state]
    not_loaded = [k for k in missing if keep_head or not k.startswith("head.")]
    if not_loaded:
        raise UserError(
            f"{path} lacks {len(not_loaded)} weights of the model ({_some(not_loaded)}); "
            "check --model, --sep_pos_embed, --cls_embed and --no_qkv_bias"
        )
    model.load_state_dict({k: state[k] for k in own if k in state}, strict=False)
    dropped = [k for k in state if k not in own]
    print0(
        f"loaded {len(own) - len(missing)} of {len(own)} tensors from {path}; "
        f"fresh: {_some(missing)}; not used: {_some(dropped)}"
    )


def _some(names: list[str], count: int = 4) -> str:
    """Join the first few names."""
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return (", ".join(names[:count]) or "none") + rest


def resume(
    path: str,
    model: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    args: argparse.Namespace,
) -> tuple[int, int]:
    """Continue from a training checkpoint.

    Returns:
        the epoch to train next and the optimiser steps done.

    Raises:
        UserError: the file is not a training checkpoint of this model.
    """
    checkpoint = read_checkpoint(path)
    for key in ("model", "optimizer", "epoch"):
        if key not in checkpoint:
            raise UserError(
                f"{path} is not a training checkpoint (no {key!r}); "
                "start from its weights with --finetune instead of --resume"
            )
    trained = checkpoint_args(checkpoint).get("model")
    if trained not in (None, args.model):
        raise UserError(f"{path} is of --model {trained}, not {args.model}; use another output_dir")
    try:
        model.load_state_dict(model_state(checkpoint, path))
        for group in checkpoint["optimizer"]["param_groups"]:
            group["fused"] = optimizer.defaults["fused"]  # as suits this device, not the last one
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{path} does not fit the model: {detail[:400]}") from error
    if checkpoint.get("scaler"):
        scaler.load_state_dict(checkpoint["scaler"])
    print0(f"resumed from {path} (epoch {checkpoint['epoch']} done)")
    return checkpoint["epoch"] + 1, checkpoint.get("step", 0)
