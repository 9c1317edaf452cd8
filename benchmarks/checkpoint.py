"""Measure how long a checkpoint keeps training waiting, against a save that is done inline.

    python -m benchmarks.checkpoint                   state of ViT-B pre-training, this device
    python -m benchmarks.checkpoint --check           exit 1 when the stall is 5 % or more

Real training steps are timed. The stall is how long the training thread waits for a save: in the
call, and before the optimiser changes what is still being copied (on a GPU: by how much the step of
the save is longer than one without). The inline save is the same copy and file while training
stands still. Printed besides: how much longer the steps are while a file is written, for the
writer's share of CPUs and memory; leave it a core (OMP_NUM_THREADS) as loader workers would.
"""

import argparse
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

from models_mae import MODELS
from util.args import positive_int
from util.checkpoint import Checkpoints
from util.dist import get_device
from util.optim import make_optimizer, make_scaler, optim_step, param_groups_weight_decay

MAX_STALL = 0.05


class Times(NamedTuple):
    """Medians, in seconds."""

    step: float  # without a save
    stall: float
    slower: float  # what all steps until the file is there lose, the stall included
    inline: float


def make_training(
    name: str, device: torch.device, folder: str
) -> tuple[Checkpoints, Callable[[], float]]:
    """Build model and optimiser; return them with a step, which returns how long it waited."""
    model = MODELS[name](pred_t_dim=8).to(device)
    optimizer = make_optimizer(param_groups_weight_decay(model, 0.05), (0.9, 0.95), device)
    scaler = make_scaler(device, "fp32")
    args = Namespace(
        output_dir=folder, model=name, batch_size=1, accum_iter=1, seed=0, keep_last=1,
        keep_every=0, checkpoint_minutes=0, dist_timeout=30,
    )  # fmt: skip
    checkpoints = Checkpoints(args, model, optimizer, scaler, fingerprint=0)
    checkpoints.progress.epoch = 1
    clips = torch.randn(1, 3, 16, 224, 224, device=device)
    parameters = list(model.parameters())

    def step() -> float:
        model(clips, mask_ratio=0.9)[0].backward()
        start = time.perf_counter()
        checkpoints.host_copy.wait()  # the optimiser's hook would do it
        waited = time.perf_counter() - start
        optim_step(optimizer, scaler, parameters, clip_grad=None)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return waited

    return checkpoints, step


def measure(
    checkpoints: Checkpoints, step: Callable[[], float], device: torch.device, repeats: int
) -> Times:
    """Alternate steps without a save, with one, and inline saves; return the medians."""

    def timed(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def inline_save() -> None:
        checkpoints.save()
        checkpoints.wait()

    step()
    inline_save()  # allocates the host memory
    steps, stalls, slower, inlines = [], [], [], []
    for _ in range(repeats):
        usual = median(timed(step) for _ in range(3))
        start = time.perf_counter()
        checkpoints.save()
        stall = time.perf_counter() - start
        stall += step()
        first = time.perf_counter() - start
        count = 1
        while checkpoints.thread is not None and checkpoints.thread.is_alive():
            step()
            count += 1
        whole = time.perf_counter() - start
        checkpoints.wait()
        steps.append(usual)
        stalls.append(first - usual if device.type == "cuda" else stall)
        slower.append(whole - count * usual)
        inlines.append(timed(inline_save))
    return Times(median(steps), median(stalls), median(slower), median(inlines))


def main() -> None:
    """Print the times and their ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="mae_vit_base_patch16")
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto")
    parser.add_argument("--folder", default=None, help="where to write; default: the temporary one")
    parser.add_argument("--repeats", type=positive_int, default=5)
    parser.add_argument("--check", action="store_true", help="exit 1 above the target")
    args = parser.parse_args()
    device = get_device(args.device)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpoints, step = make_training(args.model, device, folder)
        times = measure(checkpoints, step, device, args.repeats)
        checkpoints.close()
    share = times.stall / times.inline
    print(
        f"{args.model} on {device}, {torch.get_num_threads()} threads, {times.step:.2f} s a step: "
        f"training waits {1e3 * times.stall:.1f} ms, {share:.1%} of an inline save of "
        f"{times.inline:.2f} s (target: below {MAX_STALL:.0%}); until the file is written, steps "
        f"lose {times.slower:.2f} s in all ({times.slower / times.inline:.0%})"
    )
    if args.check and share >= MAX_STALL:
        sys.exit(1)


if __name__ == "__main__":
    main()
