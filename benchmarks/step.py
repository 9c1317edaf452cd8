"""Measure a step of our models against the same step written plainly, with the same weights.

    python -m benchmarks.step                         ViT-B, batch 2: pre-train, fine-tune, test
    python -m benchmarks.step --model large --precision bf16 --variants plain ours compiled
    python -m benchmarks.step --check                 exit 1 below the targets of this device

The plain step is what one writes first: a Conv3d over all patches, three products for q, k and v,
softmax attention spelled out, .item() after every step, AdamW and clipping in loops over the
parameters. All variants must give the same loss before anything is timed. They take turns; times
are medians, ratios are medians over turns. The targets are about forward and backward, as the
optimiser does not depend on the batch. The matrix rate is that of the best of some large matrix
products; a step's share of it is its model FLOPs (util/flops.py; backward counts twice) by the time
of forward and backward. Memory is the peak of the allocator on a GPU, and on a CPU the peak of a
process of its own, less what that held before the model.
"""

import argparse
import gc
import itertools
import math
import multiprocessing
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_mae import MODELS as AUTOENCODERS
from models_mae import MaskedAutoencoderViT
from models_vit import MODELS as CLASSIFIERS
from util.args import positive_int
from util.dist import get_device
from util.flops import count_flops
from util.optim import DTYPES, autocast, has_fast_bf16, make_optimizer, make_scaler, optim_step
from util.optim import param_groups_weight_decay as param_groups
from util.video_vit import Attention, Encoder, PatchEmbed

SIZES = {"tiny": 8, "small": 16, "base": 16, "large": 16, "huge": 16}  # pixels of a patch
PUBLISHED_GFLOPS = {"base": 180.0, "large": 598.0, "huge": 1193.0}  # multiply-adds of a clip, 1e9
TARGETS = [  # task, mask ratio, device, precision, size (None: any), quantity, at least
    ("pretrain", 0.9, None, None, None, "plain / ours in memory", 1 / 0.6),
    ("pretrain", 0.9, "cpu", "fp32", None, "speed over plain", 3.0),
    ("pretrain", 0.9, "cpu", "bf16", None, "speed over plain fp32", 5.0),
    ("pretrain", 0.9, "cpu", "fp16", None, "speed over plain fp32", 5.0),
    ("pretrain", 0.9, "cuda", "bf16", None, "speed over plain", 2.5),
    ("pretrain", 0.9, "cuda", None, "large", "speed over the unmasked step", 5.8),
    ("pretrain", 0.9, "cuda", "bf16", "large", "share of the matrix rate", 0.5),
    ("finetune", 0.0, "cuda", "bf16", "large", "share of the matrix rate", 0.6),
    ("test", 0.0, None, None, None, "agreement with published FLOPs", 0.995),
]


@dataclass(frozen=True)
class Row:
    """What one row of the table measures."""

    task: str  # pretrain, finetune or test
    size: str
    batch: int  # clips
    mask_ratio: float
    precision: str
    decoder_mask_ratio: float = 0.0
    input_size: int = 224  # pixels
    num_frames: int = 16

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W)."""
        return 3, self.num_frames, self.input_size, self.input_size

    @property
    def ratios(self) -> dict[str, float]:
        """Arguments of the model's forward pass."""
        decoder = {"decoder_mask_ratio": self.decoder_mask_ratio} if self.task == "pretrain" else {}
        return {"mask_ratio": self.mask_ratio, **decoder}

    def __str__(self) -> str:
        masked = self.task == "pretrain" or self.mask_ratio
        mask = f" mask {self.mask_ratio:g}" if masked else ""
        mask += f" decoder {self.decoder_mask_ratio:g}" if self.decoder_mask_ratio else ""
        return f"ViT-{self.size} {self.task}{mask} x {self.batch} {self.precision}"


class PlainPatchEmbed(PatchEmbed):
    """A convolution over all patches, of which some are picked afterwards."""

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        x = self.proj(x).flatten(2).transpose(1, 2)  # (N, L, D)
        return x if ids is None else x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class PlainAttention(Attention):
    """softmax(q k^T / sqrt(d)) v, spelled out."""

    def forward(self, x: Tensor) -> Tensor:
        N, L, D = x.shape
        q, k, v = (
            f(x).reshape(N, L, self.num_heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        attention = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        x = attention.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(N, L, D))


class UnmaskedAutoencoder(MaskedAutoencoderViT):
    """The step that masking saves: encode every token, predict every patch."""

    def forward(self, imgs: Tensor, *_: float, **__: float) -> tuple[Tensor, Tensor, Tensor]:
        N, L = len(imgs), self.patch_embed.num_patches
        everything = torch.arange(L, device=imgs.device).expand(N, -1)
        latent = self.encode(imgs)
        if not self.cls_through_decoder:
            latent = latent[:, int(self.cls_embed) :]
        pred = self.forward_decoder(latent, everything)
        mask = torch.ones(N, L, device=imgs.device)
        return self.forward_loss(imgs, pred, mask), pred, mask


def make_model(row: Row, plain: bool = False) -> Encoder:
    """Build the model of a row, with the paper's geometry; the same weights if plain."""
    torch.manual_seed(0)
    name = f"vit_{row.size}_patch{SIZES[row.size]}"
    clip = {"img_size": row.input_size, "num_frames": row.num_frames}
    if row.task == "pretrain":
        frames = row.num_frames // 2
        model = AUTOENCODERS[f"mae_{name}"](**clip, pred_t_dim=frames, norm_pix_loss=True)
        if row.mask_ratio == 0:
            model.__class__ = UnmaskedAutoencoder
    else:
        model = CLASSIFIERS[name](**clip)
    for module in model.modules() if plain else ():
        if isinstance(module, PatchEmbed):
            module.__class__ = PlainPatchEmbed
        elif isinstance(module, Attention):
            module.__class__ = PlainAttention
    return model


def gflops(row: Row) -> float:
    """Count the multiply-adds of a forward pass over one clip, 1e9."""
    return count_flops(make_model(row), row.clip_shape, **row.ratios)


def now(device: torch.device) -> float:
    """Return the time, in seconds, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def free_memory() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


class Step:
    """A step of a row, plain or ours, on data that stays on the device."""

    def __init__(self, row: Row, variant: str, device: torch.device):
        self.row, self.plain, self.device = row, variant == "plain", device
        self.model = make_model(row, self.plain).to(device)
        if variant == "compiled":  # as main_pretrain.py and main_finetune.py do
            self.model.compile_blocks(dynamic=False if row.task == "pretrain" else None)
        generator = torch.Generator().manual_seed(0)
        self.clips = torch.randn(row.batch, *row.clip_shape, generator=generator).to(device)
        self.labels = torch.arange(row.batch, device=device)
        groups = param_groups(self.model, 0.05)
        if self.plain:
            self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), foreach=False)
        else:
            self.optimizer = make_optimizer(groups, (0.9, 0.95), device)
        self.scaler = make_scaler(device, row.precision)
        self.parameters = list(self.model.parameters())

    def loss(self) -> Tensor:
        """Return the loss (in testing the mean square of the logits, as good to compare)."""
        task = self.row.task
        torch.manual_seed(1)  # the same masks for every variant
        self.model.train(task != "test")
        with autocast(self.device, self.row.precision), torch.set_grad_enabled(task != "test"):
            output = self.model(self.clips, **self.row.ratios)
            if task == "pretrain":
                return output[0]
            if task == "finetune":
                return F.cross_entropy(output.float(), self.labels)
            return output.float().square().mean()

    def run(self) -> tuple[float, float]:
        """Take a step; return the seconds of forward and backward, and of the whole."""
        start = now(self.device)
        loss = self.loss()
        if self.row.task != "test":
            self.scaler.scale(loss).backward()
        if self.plain:
            loss.item()
        computed = now(self.device)
        if self.row.task != "test":
            if self.plain:
                nn.utils.clip_grad_norm_(self.parameters, 0.02, foreach=False)
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
            else:
                optim_step(self.optimizer, self.scaler, self.parameters, 0.02)
        return computed - start, now(self.device) - start


def peak_resident() -> int:
    """Return the most memory that this process has held, bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def peak_memory(row: Row, variant: str, device: torch.device, alone: bool = False) -> float:
    """Take two steps, as the optimiser's state comes with the first; return the peak, GiB."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        free_memory()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        if not alone:  # nothing else counts in a process of its own
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                return pool.submit(peak_memory, row, variant, device, alone=True).result()
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what the process holds now
    before = torch.cuda.memory_allocated(device) if on_gpu else peak_resident()
    step = Step(row, variant, device)
    step.run()
    step.run()
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else peak_resident()
    return (peak - before) / 2**30


def matrix_rate(device: torch.device, precision: str, repeats: int = 5) -> float:
    """Return the best rate of large square matrix products, multiply-adds per second."""
    best = 0.0
    for size in (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(size, size, device=device, dtype=DTYPES[precision]) for _ in range(2))
        for _ in range(repeats):
            start = now(device)
            torch.mm(a, b)
            best = max(best, size**3 / (now(device) - start))
    return best


class Result(NamedTuple):
    """What was measured of one variant of a row; ratios are nan where there is no plain one."""

    compute: float  # seconds of forward and backward
    whole: float  # seconds with the optimiser
    speedup: float  # of forward and backward over the plain variant
    memory: float  # GiB
    memory_share: float  # of the plain variant's
    rate_share: float  # of the matrix rate


def measure(
    row: Row, variants: list[str], device: torch.device, repeats: int, rate: float
) -> dict[str, Result]:
    """Compare the variants of a row; say which ones do not fit the device's memory.

    Raises:
        SystemExit: they do not give the same loss.
    """
    torch._dynamo.reset()  # a compiled variant shall not be what earlier rows made of it
    steps: dict[str, Step] = {}
    losses: dict[str, float] = {}
    times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in variants}
    tolerance = 1e-4 if row.precision == "fp32" and device.type == "cpu" else 2e-2
    for turn in range(repeats + 1):
        for variant in list(times):
            try:
                if turn == 0:  # allocates and compiles
                    steps[variant] = Step(row, variant, device)
                    losses[variant] = steps[variant].loss().item()
                    steps[variant].run()
                else:
                    times[variant].append(steps[variant].run())
            except torch.OutOfMemoryError:
                beside = " beside the others" if turn else ""
                print(f"{row}: {variant} not measured, out of memory{beside}")
                for kept in (steps, losses, times):
                    kept.pop(variant, None)
            if turn == 0 or variant not in times:
                free_memory()
        for variant, loss in losses.items():
            first = next(iter(losses.values()))
            if abs(loss - first) > tolerance * abs(first):
                sys.exit(f"{row}: {variant} has loss {loss}, another {first}: nothing timed")
    steps.clear()
    free_memory()

    memory = {variant: peak_memory(row, variant, device) for variant in times}
    work = 1e9 * gflops(row) * row.batch * (1 if row.task == "test" else 3)
    results = {}
    for variant, turns in times.items():
        compute, whole = (median(column) for column in zip(*turns, strict=True))
        plain = times.get("plain", [(math.nan, math.nan)] * repeats)
        speedup = median(a / b for (a, _), (b, _) in zip(plain, turns, strict=True))
        share = memory[variant] / memory.get("plain", math.nan)
        results[variant] = Result(
            compute, whole, speedup, memory[variant], share, rate_share=work / compute / rate
        )
    return results


def check(all_results: dict[Row, dict[str, Result]], device: torch.device) -> list[str]:
    """Return the targets that were missed, in words; only measured rows are judged."""
    missed: list[str] = []
    for row, results in all_results.items():
        if "ours" not in results:
            missed.append(f"{row}: not measured")
            continue
        ours = results["ours"]
        values = {"share of the matrix rate": max(r.rate_share for r in results.values())}
        if not row.decoder_mask_ratio:
            values["plain / ours in memory"] = 1 / ours.memory_share
            values["speed over plain"] = ours.speedup
            if fp32 := all_results.get(replace(row, precision="fp32"), {}).get("plain"):
                values["speed over plain fp32"] = fp32.compute / ours.compute
            if unmasked := all_results.get(replace(row, mask_ratio=0.0), {}).get("ours"):
                values["speed over the unmasked step"] = unmasked.compute / ours.compute
        paper_clip = row.clip_shape == (3, 16, 224, 224)
        if row.task == "test" and row.size in PUBLISHED_GFLOPS and paper_clip:
            difference = abs(gflops(row) / PUBLISHED_GFLOPS[row.size] - 1)
            values["agreement with published FLOPs"] = 1 - difference
        for *where, what, least in TARGETS:
            here = row.task, row.mask_ratio, device.type, row.precision, row.size
            applies = all(wanted in (None, own) for wanted, own in zip(where, here, strict=True))
            # "not >=" also holds for nan: the plain variant did not fit
            if applies and what in values and not values[what] >= least:
                missed.append(f"{row}: {what} {values[what]:.2f}, wanted at least {least:.2f}")
    return missed


def write_plot(path: Path, all_results: dict[Row, dict[str, Result]]) -> None:
    """Draw the time of forward and backward over the mask ratio, one line per variant."""
    import matplotlib.pyplot as plt

    lines: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for row, results in all_results.items():
        if row.task == "pretrain" and not row.decoder_mask_ratio:
            for variant, result in results.items():
                point = row.mask_ratio, 1e3 * result.compute / row.batch
                lines[f"ViT-{row.size} {variant} {row.precision}"].append(point)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set(xlabel="mask ratio", ylabel="forward and backward, ms per clip", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    tasks, variants = ["pretrain", "finetune", "test"], ["plain", "ours", "compiled"]
    default = "default: fp32, and bf16 where the device computes in it"
    compiled = "compiled: ours by torch.compile"
    add("--model", nargs="+", choices=SIZES, default=["base"])
    add("--task", nargs="+", choices=tasks, default=tasks)
    add("--mask_ratio", nargs="+", type=float, default=[0.0, 0.5, 0.75, 0.9, 0.95])
    add("--decoder_mask_ratio", type=float, default=0.0)
    add("--finetune_mask_ratio", nargs="+", type=float, default=[0.0])
    add("--batch_size", type=positive_int, default=2, help="clips per step")
    add("--input_size", type=positive_int, default=224, help="pixels")
    add("--num_frames", type=positive_int, default=16)
    add("--precision", nargs="+", choices=("fp32", "bf16", "fp16"), default=None, help=default)
    add("--variants", nargs="+", choices=variants, default=["plain", "ours"], help=compiled)
    add("--device", default="auto", help="cuda, cpu or auto")
    add("--repeats", type=positive_int, default=5)
    add("--plot", type=Path, help="also draw time over mask ratio into this PNG")
    add("--check", action="store_true", help="exit 1 below the targets")
    args = parser.parse_args(argv)

    torch.set_float32_matmul_precision("high")  # as in training: TF32 on a GPU
    device = get_device(args.device)
    precisions = args.precision or ["fp32"] + ["bf16"] * has_fast_bf16(device)
    if "bf16" not in precisions:
        print("bf16: not measured, this device has no arithmetic for it")
    rates = {precision: matrix_rate(device, precision) for precision in precisions}
    for precision, rate in rates.items():
        print(f"best matrix product in {precision}: {rate / 1e12:.3f} T multiply-adds per second")
    results: dict[Row, dict[str, Result]] = {}
    ratios = {"pretrain": args.mask_ratio, "finetune": args.finetune_mask_ratio, "test": [0.0]}
    for size, precision, task in itertools.product(args.model, precisions, args.task):
        for mask_ratio in ratios[task]:
            decoder = args.decoder_mask_ratio if task == "pretrain" and mask_ratio else 0.0
            clip = args.input_size, args.num_frames
            row = Row(task, size, args.batch_size, mask_ratio, precision, decoder, *clip)
            results[row] = measure(row, args.variants, device, args.repeats, rates[precision])
            print(f"{row}: {gflops(row):.1f} GFLOPs forward per clip")
            for variant, r in results[row].items():
                print(
                    f"  {variant:<9} {1e3 * r.compute:9.1f} ms  {1e3 * r.whole:9.1f} ms with "
                    f"optimiser  {row.batch / r.whole:8.2f} clips/s  {r.speedup:5.2f} x plain  "
                    f"{r.memory:6.2f} GiB ({r.memory_share:.2f})  {r.rate_share:4.0%} of the "
                    "matrix rate",
                    flush=True,
                )
    for row, unmasked in results.items():
        masked = results.get(replace(row, mask_ratio=0.9), {}).get("ours")
        if row.task == "pretrain" and not row.mask_ratio and masked and "ours" in unmasked:
            ratio = unmasked["ours"].compute / masked.compute
            print(f"{row}: takes {ratio:.2f} x as long as with 90 % masked (paper, ViT-L: 5.8)")
    if args.plot:
        write_plot(args.plot, results)
    if args.check and (missed := check(results, device)):
        sys.exit("targets missed:\n" + "\n".join(missed))


if __name__ == "__main__":
    main()
