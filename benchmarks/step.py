"""Measure a step of our models against the same step written plainly, with the same weights.

    python -m benchmarks.step                         ViT-B, batch 2: pre-train, fine-tune, test
    python -m benchmarks.step --model large --precision bf16 --variants plain ours compiled
    python -m benchmarks.step --check                 exit 1 below the targets of this device

The plain step is what one writes first: a Conv3d over all patches, three products for q, k and v,
softmax attention spelled out, the loss over all patches, .item() after every step, AdamW looping
over the parameters. Before anything is timed, both must give the same loss. The methods take turns;
times are medians, ratios are medians over turns. A step is forward, backward and optimiser; the
targets are about forward and backward, as the optimiser does not depend on the batch.

"rate" is the share of this machine's matrix rate: model FLOPs (util/flops.py; backward counts
twice) by the time of forward and backward, over the best of some large matrix products timed in the
same run. Memory is the peak of a process of its own on a CPU (less what it held before the
model), and of the device's allocator on a GPU.
"""

import argparse
import copy
import gc
import itertools
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_mae import MODELS as AUTOENCODERS
from models_mae import MaskedAutoencoderViT
from models_vit import MODELS as CLASSIFIERS
from util.args import positive_int
from util.dist import get_device
from util.flops import count_flops
from util.optim import (
    autocast,
    has_fast_bf16,
    make_optimizer,
    make_scaler,
    optim_step,
    param_groups_weight_decay,
)
from util.video_vit import Attention, Encoder, PatchEmbed

SIZES = {"tiny": "tiny_patch8", "small": "small_patch16", "base": "base_patch16"}
SIZES |= {"large": "large_patch16", "huge": "huge_patch16"}
MASK_RATIOS = (0.0, 0.5, 0.75, 0.9, 0.95)
# Published multiply-adds of a clip's forward pass, 1e9: ours may differ by this much at most.
PUBLISHED_GFLOPS = {"base": 180.0, "large": 598.0, "huge": 1193.0}
FLOPS_TOLERANCE = 0.005


@dataclass(frozen=True)
class Row:
    """One line of the table."""

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

    def __str__(self) -> str:
        masked = self.task == "pretrain" or self.mask_ratio
        mask = f" mask {self.mask_ratio:g}" if masked else ""
        mask += f" decoder {self.decoder_mask_ratio:g}" if self.decoder_mask_ratio else ""
        return f"ViT-{self.size} {self.task}{mask} x {self.batch} {self.precision}"


# --- the plain reference: only what it does differently ------------------------------------------


class PlainPatchEmbed(PatchEmbed):
    """A convolution over all patches, of which some are picked afterwards."""

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        x = self.proj(x).flatten(2).transpose(1, 2)
        return x if ids is None else pick(x, ids)


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


def pick(x: Tensor, ids: Tensor) -> Tensor:
    """Gather rows ids [N, K] of [N, L, D]."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def make_plain(model: nn.Module) -> nn.Module:
    """Turn a copy of a model into the plain reference; parameters and their names stay."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, PatchEmbed):
            module.__class__ = PlainPatchEmbed
        elif isinstance(module, Attention):
            module.__class__ = PlainAttention
    return model


# --- steps ---------------------------------------------------------------------------------------


def make_model(row: Row) -> Encoder:
    """Build the model of a row with the paper's geometry."""
    torch.manual_seed(0)
    clip = {"img_size": row.input_size, "num_frames": row.num_frames}
    if row.task == "pretrain":
        frames = row.num_frames // 2
        name = f"mae_vit_{SIZES[row.size]}"
        return AUTOENCODERS[name](**clip, pred_t_dim=frames, norm_pix_loss=True)
    return CLASSIFIERS[f"vit_{SIZES[row.size]}"](**clip)


def unmasked_loss(model: MaskedAutoencoderViT, clips: Tensor) -> Tensor:
    """Return the loss of the step that masking saves: encode every token, predict every patch."""
    N, L = len(clips), model.patch_embed.num_patches
    everything = torch.arange(L, device=clips.device).expand(N, -1)
    latent = model.encode(clips)
    if not model.cls_through_decoder:
        latent = latent[:, int(model.cls_embed) :]
    pred = model.forward_decoder(latent, everything)
    return model.forward_loss(clips, pred, torch.ones(N, L, device=clips.device))


class Step:
    """A step of a row, plain or ours, on data that stays on the device."""

    def __init__(self, row: Row, variant: str, device: torch.device):
        model = make_model(row)
        self.row, self.plain, self.device = row, variant == "plain", device
        self.model = (make_plain(model) if self.plain else model).to(device)
        if variant == "compiled":
            assert isinstance(self.model, Encoder)
            # as main_pretrain.py and main_finetune.py do
            self.model.compile_blocks(dynamic=False if row.task == "pretrain" else None)
        generator = torch.Generator().manual_seed(0)
        self.clips = torch.randn(row.batch, *row.clip_shape, generator=generator).to(device)
        self.labels = torch.arange(row.batch, device=device)
        groups = param_groups_weight_decay(model, 0.05)
        names = {id(p): n for n, p in model.named_parameters()}
        own = dict(self.model.named_parameters())
        for group in groups:
            group["params"] = [own[names[id(p)]] for p in group["params"]]
        self.optimizer = make_optimizer(groups, (0.9, 0.95), device)
        if self.plain:
            self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), foreach=False)
        self.scaler = make_scaler(device, row.precision)
        self.parameters = list(self.model.parameters())

    def loss(self) -> Tensor:
        """Forward pass -> loss (or, in testing, a sum of logits, which is as good to compare)."""
        row = self.row
        torch.manual_seed(1)  # the same masks for everybody
        with autocast(self.device, row.precision):
            if row.task == "test":
                self.model.eval()
                with torch.no_grad():
                    return self.model(self.clips).float().square().mean()
            self.model.train()
            if row.task == "finetune":
                logits = self.model(self.clips, row.mask_ratio)
                return F.cross_entropy(logits.float(), self.labels)
            assert isinstance(self.model, MaskedAutoencoderViT)
            if row.mask_ratio == 0:
                return unmasked_loss(self.model, self.clips)
            return self.model(self.clips, row.mask_ratio, row.decoder_mask_ratio)[0]

    def run(self) -> tuple[float, float]:
        """Take a step; return the seconds of forward and backward, and of the whole."""
        synchronize(self.device)
        start = time.perf_counter()
        loss = self.loss()
        if self.row.task != "test":
            self.scaler.scale(loss).backward()
        if self.plain:
            loss.item()
        synchronize(self.device)
        computed = time.perf_counter()
        if self.row.task != "test":
            if self.plain:
                nn.utils.clip_grad_norm_(self.parameters, 0.02, foreach=False)
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
            else:
                optim_step(self.optimizer, self.scaler, self.parameters, 0.02)
        synchronize(self.device)
        return computed - start, time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(row: Row, variant: str, device_name: str) -> float:
    """Take two steps (the optimiser's state comes with the first); return the peak, GiB."""
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what it holds now
        before = peak_resident()
    step = Step(row, variant, device)
    for _ in range(2):
        step.run()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()
    return (peak - before) / 2**30


def peak_resident() -> int:
    """Return the most memory that this process has held, bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def peak_memory_apart(row: Row, variant: str, device: torch.device) -> float:
    """Measure the peak on a CPU in a process of its own, where nothing else counts."""
    if device.type == "cuda":
        return peak_memory(row, variant, str(device))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(peak_memory, row, variant, str(device)).result()


def matrix_rate(device: torch.device, precision: str, repeats: int = 5) -> float:
    """Return the best rate of large square matrix products, multiply-adds per second."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    best = 0.0
    for size in (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(repeats):
            synchronize(device)
            start = time.perf_counter()
            torch.mm(a, b)
            synchronize(device)
            best = max(best, size**3 / (time.perf_counter() - start))
    return best


def gflops(row: Row) -> float:
    """Count the multiply-adds of a forward pass over one clip, 1e9."""
    model = make_model(row)
    if row.task != "pretrain":
        return count_flops(model, row.clip_shape, mask_ratio=row.mask_ratio)
    if row.mask_ratio == 0:
        return count_flops(Unmasked(model), row.clip_shape)
    ratios = {"mask_ratio": row.mask_ratio, "decoder_mask_ratio": row.decoder_mask_ratio}
    return count_flops(model, row.clip_shape, **ratios)


class Unmasked(nn.Module):
    """unmasked_loss as a module, for counting."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor) -> Tensor:
        """Return the loss."""
        assert isinstance(self.model, MaskedAutoencoderViT)
        return unmasked_loss(self.model, clips)


# --- the table -----------------------------------------------------------------------------------


@dataclass
class Result:
    """What was measured of a row and variant."""

    compute: float  # seconds of forward and backward
    whole: float  # seconds with the optimiser
    speedup: float  # of forward and backward over the plain reference
    memory: float  # GiB
    memory_share: float  # of the plain reference
    rate_share: float  # of the matrix rate


def measure(
    row: Row, variants: list[str], device: torch.device, repeats: int, rate: float
) -> dict[str, Result]:
    """Compare the variants of a row.

    Raises:
        SystemExit: they do not give the same loss.
    """
    torch._dynamo.reset()  # a compiled variant shall not be what earlier rows made of it
    steps: dict[str, Step] = {}
    losses = {}
    for variant in variants:
        try:
            step = Step(row, variant, device)
            losses[variant] = step.loss().item()
            step.run()  # the first step allocates and compiles
            steps[variant] = step
        except torch.OutOfMemoryError:
            print(f"{row}: {variant} not measured, out of memory")
        step = None
        free_memory(device)
    tolerance = 1e-4 if row.precision == "fp32" and device.type == "cpu" else 2e-2
    for variant in steps:
        first, loss = losses[next(iter(steps))], losses[variant]
        if abs(loss - first) > tolerance * abs(first):
            sys.exit(f"{row}: {variant} has loss {loss}, another {first}: nothing timed")
    times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in steps}
    for _ in range(repeats):
        for variant in list(steps):
            try:
                times[variant].append(steps[variant].run())
            except torch.OutOfMemoryError:  # alone it fitted
                print(f"{row}: {variant} not measured, out of memory beside the others")
                del steps[variant], times[variant]
                free_memory(device)
    steps.clear()
    free_memory(device)
    memory = {variant: peak_memory_apart(row, variant, device) for variant in times}
    work = 1e9 * gflops(row) * row.batch * (1 if row.task == "test" else 3)
    unknown = float("nan")  # without the plain variant there is nothing to compare with
    results = {}
    for variant in times:
        compute, whole = (median(column) for column in zip(*times[variant], strict=True))
        pairs = zip(times.get("plain", [(unknown, unknown)] * repeats), times[variant], strict=True)
        results[variant] = Result(
            compute,
            whole,
            median(plain[0] / own[0] for plain, own in pairs),
            memory[variant],
            memory[variant] / memory.get("plain", unknown),
            work / compute / rate,
        )
    return results


def free_memory(device: torch.device) -> None:
    """Give back what no step holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def print_row(row: Row, results: dict[str, Result]) -> None:
    """Print one line per variant."""
    print(f"{row}: {gflops(row):.1f} GFLOPs forward per clip")
    for variant, r in results.items():
        print(
            f"  {variant:<9} {1e3 * r.compute:9.1f} ms  {1e3 * r.whole:9.1f} ms with optimiser  "
            f"{row.batch / r.whole:8.2f} clips/s  {r.speedup:5.2f} x plain  "
            f"{r.memory:6.2f} GiB ({r.memory_share:.2f})  {r.rate_share:4.0%} of the matrix rate",
            flush=True,
        )


def check(all_results: dict[Row, dict[str, Result]], device: torch.device) -> list[str]:
    """Return the targets that were missed, in words; only measured rows are judged."""
    missed: list[str] = []

    def require(row: Row, what: str, value: float, least: float) -> None:
        if not value >= least:  # not a number: the plain variant did not fit
            missed.append(f"{row}: {what} {value:.2f}, wanted at least {least:.2f}")

    for row, results in all_results.items():
        if "ours" not in results:
            missed.append(f"{row}: not measured")
            continue
        ours = results["ours"]
        if row.task == "pretrain" and row.mask_ratio == 0.9 and not row.decoder_mask_ratio:
            require(row, "plain / ours in memory", 1 / ours.memory_share, 1 / 0.6)
            if device.type == "cuda":
                if row.precision == "bf16":
                    require(row, "speed over plain", ours.speedup, 2.5)
            elif row.precision == "fp32":
                require(row, "speed over plain", ours.speedup, 3.0)
            else:
                fp32 = all_results.get(replace(row, precision="fp32"))
                if fp32 and "plain" in fp32:
                    ratio = fp32["plain"].compute / ours.compute
                    require(row, "speed over plain fp32", ratio, 5.0)
            whole = all_results.get(replace(row, mask_ratio=0.0), {})
            if "ours" in whole and device.type == "cuda" and row.size == "large":
                ratio = whole["ours"].compute / ours.compute
                require(row, "speed over the unmasked step", ratio, 5.8)
        if device.type == "cuda" and row.precision == "bf16" and row.size == "large":
            best = max(r.rate_share for r in results.values())
            if row.task == "finetune" and not row.mask_ratio:
                require(row, "share of the matrix rate", best, 0.6)
            elif row.task == "pretrain" and row.mask_ratio == 0.9:
                require(row, "share of the matrix rate", best, 0.5)
        paper_clip = row.clip_shape == (3, 16, 224, 224)
        if row.task == "test" and row.size in PUBLISHED_GFLOPS and paper_clip:
            published = PUBLISHED_GFLOPS[row.size]
            difference = abs(gflops(row) / published - 1)
            require(row, "agreement with published FLOPs", 1 - difference, 1 - FLOPS_TOLERANCE)
    return missed


def write_plot(path: Path, all_results: dict[Row, dict[str, Result]]) -> None:
    """Draw the time of forward and backward over the mask ratio, one line per variant."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    lines: dict[str, list[tuple[float, float]]] = {}
    for row, results in all_results.items():
        if row.task == "pretrain" and not row.decoder_mask_ratio:
            for variant, result in results.items():
                label = f"ViT-{row.size} {variant} {row.precision}"
                point = row.mask_ratio, 1e3 * result.compute / row.batch
                lines.setdefault(label, []).append(point)
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set(xlabel="mask ratio", ylabel="forward and backward, ms per clip", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", nargs="+", choices=SIZES, default=["base"])
    parser.add_argument(
        "--task", nargs="+", choices=("pretrain", "finetune", "test"),
        default=["pretrain", "finetune", "test"],
    )  # fmt: skip
    parser.add_argument("--mask_ratio", nargs="+", type=float, default=list(MASK_RATIOS))
    parser.add_argument("--decoder_mask_ratio", type=float, default=0.0)
    parser.add_argument("--finetune_mask_ratio", nargs="+", type=float, default=[0.0])
    parser.add_argument("--batch_size", type=positive_int, default=2, help="clips per step")
    parser.add_argument("--input_size", type=positive_int, default=224, help="pixels")
    parser.add_argument("--num_frames", type=positive_int, default=16)
    parser.add_argument(
        "--precision", nargs="+", choices=("fp32", "bf16", "fp16"), default=None,
        help="None: fp32, and bf16 where the device computes in it",
    )  # fmt: skip
    parser.add_argument(
        "--variants", nargs="+", choices=("plain", "ours", "compiled"), default=["plain", "ours"],
        help="compiled: ours by torch.compile",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto")
    parser.add_argument("--repeats", type=positive_int, default=5)
    parser.add_argument("--plot", type=Path, help="also draw time over mask ratio into this PNG")
    parser.add_argument("--check", action="store_true", help="exit 1 below the targets")
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
    for size, precision, task in itertools.product(args.model, precisions, args.task):
        ratios = {"pretrain": args.mask_ratio, "finetune": args.finetune_mask_ratio}
        for mask_ratio in ratios.get(task, [0.0]):
            decoder = args.decoder_mask_ratio if task == "pretrain" and mask_ratio else 0.0
            row = Row(
                task, size, args.batch_size, mask_ratio, precision, decoder,
                args.input_size, args.num_frames,
            )  # fmt: skip
            results[row] = measure(row, args.variants, device, args.repeats, rates[precision])
            print_row(row, results[row])
    for row, whole in results.items():
        other = results.get(replace(row, mask_ratio=0.9), {})
        if row.task == "pretrain" and not row.mask_ratio and "ours" in whole and "ours" in other:
            ratio = whole["ours"].compute / other["ours"].compute
            print(f"{row}: takes {ratio:.2f} x as long as with 90 % masked (paper, ViT-L: 5.8)")
    if args.plot:
        write_plot(args.plot, results)
    if args.check and (missed := check(results, device)):
        sys.exit("targets missed:\n" + "\n".join(missed))


if __name__ == "__main__":
    main()
