"""Measure how long a checkpoint keeps training waiting, against a save that is done inline.

    python -m benchmarks.checkpoint                   state of ViT-B pre-training, this device
    python -m benchmarks.checkpoint --check           exit 1 when the stall is 5 % or more

The stall is the time from calling save until the training thread, and on a GPU its stream, is free
again; the inline save is the same copy and file written by the training thread. The two alternate,
so that a slow disk or other work on the machine counts for both, and medians are compared.
"""

import argparse
import sys
import tempfile
import time
from argparse import Namespace
from statistics import median

import torch

from models_mae import MODELS
from util.args import positive_int
from util.dist import get_device
from util.optim import make_optimizer, make_scaler, param_groups_weight_decay
from util.resume import Checkpoints

MAX_STALL = 0.05


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_state(name: str, device: torch.device, folder: str) -> Checkpoints:
    """Build a model and an optimiser that has stepped once, as in the middle of a run."""
    model = MODELS[name]().to(device)
    optimizer = make_optimizer(param_groups_weight_decay(model, 0.05), (0.9, 0.95), device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    args = Namespace(
        output_dir=folder, model=name, batch_size=1, accum_iter=1, seed=0, keep_last=1,
        keep_every=0, checkpoint_minutes=0, dist_timeout=30,
    )  # fmt: skip
    checkpoints = Checkpoints(args, model, optimizer, make_scaler(device, "fp32"), fingerprint=0)
    checkpoints.progress.epoch = 1
    return checkpoints


def measure(checkpoints: Checkpoints, device: torch.device, repeats: int) -> tuple[float, float]:
    """Return the medians of the stall and of an inline save, seconds."""
    stalls, inlines = [], []
    for repeat in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        checkpoints.save()
        synchronize(device)
        stall = time.perf_counter() - start
        checkpoints.wait()
        start = time.perf_counter()
        checkpoints.save()
        checkpoints.wait()
        inline = time.perf_counter() - start
        if repeat:  # the first save also allocates the host memory
            stalls.append(stall)
            inlines.append(inline)
    return median(stalls), median(inlines)


def main() -> None:
    """Print the two times and their ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="mae_vit_base_patch16")
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto")
    parser.add_argument("--folder", default=None, help="where to write; default: the temporary one")
    parser.add_argument("--repeats", type=positive_int, default=5)
    parser.add_argument("--check", action="store_true", help="exit 1 above the target")
    args = parser.parse_args()
    device = get_device(args.device)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpoints = make_state(args.model, device, folder)
        stall, inline = measure(checkpoints, device, args.repeats)
        checkpoints.close()
    share = stall / inline
    print(
        f"{args.model} on {device}: training waits {1e3 * stall:.0f} ms, "
        f"{share:.1%} of an inline save of {inline:.2f} s (target: below {MAX_STALL:.0%})"
    )
    if args.check and share >= MAX_STALL:
        sys.exit(1)


if __name__ == "__main__":
    main()
