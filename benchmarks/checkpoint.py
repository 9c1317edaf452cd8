"""Measure how long training waits for a checkpoint, compared with a save that is done inline.

    python -m benchmarks.checkpoint                   state of ViT-B pre-training, this device
    python -m benchmarks.checkpoint --check           exit 1 when training waits for 5 % or more

Training waits in the call that saves, and again before the optimiser may change what is still being
copied (on a GPU: by how much that step is longer than one without a save). The inline save makes
the same copy and file while training stands still. The last number is what all steps lose until the
file is written, as the writer takes CPUs and memory: leave it a core by OMP_NUM_THREADS.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch

from models_mae import MODELS
from util.args import adder, positive_int
from util.checkpoint import Checkpoints
from util.dist import get_device
from util.optim import make_optimizer, make_scaler, optim_step, param_groups_weight_decay

MAX_STALL = 0.05  # of an inline save


def seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(name: str, device: torch.device, folder: str, repeats: int) -> list[float]:
    """Return medians in seconds: a step, the wait for a save, what steps lose, an inline save."""
    # A run, with the flags that saving reads
    model = MODELS[name](pred_t_dim=8).to(device)
    optimizer = make_optimizer(param_groups_weight_decay(model, 0.05), (0.9, 0.95), device)
    scaler = make_scaler(device, "fp32")
    flags = {"batch_size": 1, "accum_iter": 1, "seed": 0, "keep_last": 1, "keep_every": 0}
    args = argparse.Namespace(output_dir=folder, model=name, dist_timeout=30, **flags)
    checkpoints = Checkpoints(args, model, optimizer, scaler, fingerprint=0)
    checkpoints.progress.epoch = 1
    clips = torch.randn(1, 3, 16, 224, 224, device=device)

    def step() -> float:
        model(clips, mask_ratio=0.9)[0].backward()
        waited = seconds(checkpoints.host_copy.wait)  # else optim_step would, unmeasured
        optim_step(optimizer, scaler, list(model.parameters()), clip_grad=None)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return waited

    def save_inline() -> None:
        checkpoints.save()
        checkpoints.wait()

    # Steps with and without a save
    step()
    save_inline()  # allocates the host memory
    times = []
    for _ in range(repeats):
        usual = median(seconds(step) for _ in range(3))
        start = time.perf_counter()
        waited = seconds(checkpoints.save) + step()
        first = time.perf_counter() - start
        count = 1
        while checkpoints.thread is not None and checkpoints.thread.is_alive():
            step()
            count += 1
        lost = time.perf_counter() - start - count * usual
        checkpoints.wait()
        stall = first - usual if device.type == "cuda" else waited
        times.append((usual, stall, lost, seconds(save_inline)))
    checkpoints.close()
    return [median(column) for column in zip(*times, strict=True)]


def main() -> None:
    """Print the times and their ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = adder(parser)
    add("--model", "mae_vit_base_patch16", "the autoencoder that is trained", choices=MODELS)
    add("--device", "auto", "cuda, cpu or auto")
    add("--folder", None, "where to write; default: the system's temporary folder")
    add("--repeats", 5, "saves of each kind", positive_int)
    add("--check", False, "exit 1 if the target is missed")
    args = parser.parse_args()
    device = get_device(args.device)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        usual, stall, lost, inline = measure(args.model, device, folder, args.repeats)
    share = stall / inline
    print(
        f"{args.model} on {device}, {torch.get_num_threads()} threads, {usual:.2f} s a step: "
        f"training waits {1e3 * stall:.1f} ms, {share:.1%} of an inline save of {inline:.2f} s "
        f"(target: below {MAX_STALL:.0%}); until the file is written, steps lose {lost:.2f} s in "
        f"all ({lost / inline:.0%})"
    )
    sys.exit(args.check and share >= MAX_STALL)


if __name__ == "__main__":
    main()
