r"""Measure a step of our models against the same step written plainly, with the same weights.

    python -m benchmarks.step                         ViT-B, batch 2: pre-train, fine-tune, test
    python -m benchmarks.step --model large --precision bf16 --batch_size 64 \
        --variants ours compiled                      a batch that fills a GPU
    python -m benchmarks.step --check                 exit 1 below the targets of this device

The plain step is what one writes first: a Conv3d over all patches, three products for q, k and v,
softmax attention spelled out, .item() after every step, loops over the parameters. The variants
tube, time and block are ours with masks of these types; all others must give the same loss. All
take turns; times and ratios are medians. The share of the matrix rate compares the model FLOPs
(backward counts twice) with the best of some large matrix products. Memory is the peak: of the
allocator on a GPU, of a process of its own on a CPU. --profile FILE also shows where the last
variant's step spends its time.
"""

import argparse
import gc
import itertools
import multiprocessing
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import models_mae
import models_vit
from util import optim
from util.args import adder, positive_int, share_below_1
from util.dist import get_device, print0
from util.dry_run import count_flops
from util.masking import MASK_TYPES
from util.video.transforms import normalize
from util.video_vit import Attention, Encoder, PatchEmbed

SIZES = {"tiny": 8, "small": 16, "base": 16, "large": 16, "huge": 16}  # pixels of a patch
Results = dict[str, "Result"]  # by variant
# Of forward and backward, as the optimiser does not depend on the batch:
TARGETS = [  # task, mask ratio, device, precision, size (None: any), quantity, at least
    ("pretrain", 0.9, None, None, None, "plain / ours in memory", 1 / 0.6),
    ("pretrain", 0.9, "cpu", "fp32", None, "speed over plain", 3.0),
    ("pretrain", 0.9, "cpu", "bf16", None, "speed over plain fp32", 5.0),
    ("pretrain", 0.9, "cpu", "fp16", None, "speed over plain fp32", 5.0),
    ("pretrain", 0.9, "cuda", "bf16", None, "speed over plain", 2.5),
    ("pretrain", 0.9, "cuda", None, "large", "speed over the unmasked step", 5.8),
    ("pretrain", 0.9, "cuda", "bf16", "large", "share of the matrix rate", 0.5),
    ("finetune", 0.0, "cuda", "bf16", "large", "share of the matrix rate", 0.6),
]
KINDS = {  # of kernels, and of operators on a CPU: the first whose pattern is in the name
    "attention": "fmha|flash|sdpa|attention|cudnn::fusion",
    "matrix products": r"gemm|gemv|nvjet|xmma|cutlass|splitk|conv[23]d|convolution|(::|add|b)mm\b",
    "copies and casts": r"^triton_poi_fused(__?(to_copy|clone|cat|stack|t|view|permute))+_\d+$"
    r"|^(?!triton).*(copy|memcpy|memset|fill|zero_|catarray|::cat\b)",
    "reductions and norms": "^triton_(red|per)_|^(?!triton).*(reduce|norm|gamma|softmax|sum|mean)",
    "other": "",
}


class Row(NamedTuple):  # of the table: what is measured
    task: str  # pretrain, finetune or test
    size: str
    batch: int  # clips
    mask_ratio: float
    precision: str
    decoder_mask_ratio: float = 0.0
    clip_shape: tuple[int, int, int, int] = (3, 16, 224, 224)  # (C, T, H, W)

    @property
    def ratios(self) -> dict[str, float]:
        """Arguments of the model's forward pass."""
        decoder = {"decoder_mask_ratio": self.decoder_mask_ratio} if self.task == "pretrain" else {}
        return {"mask_ratio": self.mask_ratio, **decoder}

    def __str__(self) -> str:
        mask = f" mask {self.mask_ratio:g}" if self.task == "pretrain" or self.mask_ratio else ""
        mask += f" decoder {self.decoder_mask_ratio:g}" if self.decoder_mask_ratio else ""
        return f"ViT-{self.size} {self.task}{mask} x {self.batch} {self.precision}"


class PlainPatchEmbed(PatchEmbed):  # a convolution over all, then some are picked
    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        x = self.proj(x).flatten(2).transpose(1, 2)  # (N, L, D)
        return x if ids is None else x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class PlainAttention(Attention):  # softmax(q k^T / sqrt(d)) v, spelled out
    def forward(self, x: Tensor) -> Tensor:
        layers = self.q, self.k, self.v
        q, k, v = (f(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for f in layers)
        attention = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        return self.proj((attention.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


class UnmaskedAutoencoder(models_mae.MaskedAutoencoderViT):  # encodes and predicts every patch
    def forward(self, imgs: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        latent = self.forward_features(imgs)
        everything = torch.arange(latent.shape[1], device=imgs.device).expand(len(imgs), -1)
        pred, mask = self.forward_decoder(latent, everything), torch.ones_like(everything)
        return self.forward_loss(imgs, pred, mask), pred, mask


def make_model(row: Row, device: torch.device, plain: bool = False) -> Encoder:
    """Build the model of a row, with the paper's geometry; the same weights if plain."""
    torch.manual_seed(0)
    name = f"vit_{row.size}_patch{SIZES[row.size]}"
    _, num_frames, size, _ = row.clip_shape
    clip = {"img_size": size, "num_frames": num_frames}
    with device:  # a CPU would draw the weights of a large model for seconds
        if row.task == "pretrain":
            clip["pred_t_dim"] = num_frames // 2
            model = models_mae.MODELS[f"mae_{name}"](**clip, norm_pix_loss=True)
            if row.mask_ratio == 0:
                model.__class__ = UnmaskedAutoencoder
        else:
            model = models_vit.MODELS[name](**clip)
    other = {PatchEmbed: PlainPatchEmbed, Attention: PlainAttention} if plain else {}
    for module in model.modules():
        module.__class__ = other.get(type(module), type(module))
    return model


@cache
def gflops(row: Row) -> float:
    """Count the multiply-adds of a forward pass over one clip, 1e9."""
    return count_flops(make_model(row, torch.device("meta")), row.clip_shape, **row.ratios)


def now(device: torch.device) -> float:
    """Return the time, in seconds, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def free_memory() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


class Step:  # of a row, plain or ours, on data that stays on the device
    def __init__(self, row: Row, variant: str, device: torch.device):
        self.row, self.plain, self.device = row, variant == "plain", device
        types = {"mask_type": variant} if variant in MASK_TYPES else {}
        self.options: dict[str, Any] = row.ratios | types
        self.model = make_model(row, device, self.plain)
        if variant == "compiled":  # as main_pretrain.py and main_finetune.py do
            self.model.compile_blocks(dynamic=False if row.task == "pretrain" else None)
        size, options = (row.batch, *row.clip_shape), {"dtype": torch.uint8, "device": device}
        self.clips = torch.randint(0, 256, size, **options)  # make_model seeds
        self.labels = torch.arange(row.batch, device=device)
        groups = optim.param_groups_weight_decay(self.model, 0.05)
        if self.plain:
            self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), foreach=False)
        else:
            self.optimizer = optim.make_optimizer(groups, (0.9, 0.95), device)
        self.scaler = optim.make_scaler(device, row.precision)
        self.parameters = list(self.model.parameters())

    def loss(self) -> Tensor:
        """Return the loss (in testing the mean square of the logits, as good to compare)."""
        row, training = self.row, self.row.task != "test"
        torch.manual_seed(1)  # the same masks for every variant
        self.model.train(training)
        with optim.autocast(self.device, row.precision), torch.set_grad_enabled(training):
            # the plain step normalises all pixels, ours those that it uses
            clips = normalize(self.clips) if self.plain else self.clips
            output = self.model(clips, **self.options)
            if row.task == "pretrain":
                return output[0]
            if training:
                return nn.functional.cross_entropy(output.float(), self.labels)
            return output.float().square().mean()

    def run(self) -> tuple[float, float]:
        """Take a step; return the seconds of forward and backward, and of the whole.

        On a GPU one more precedes, as in training: it computes while the processor launches this.
        """
        on_gpu = self.device.type == "cuda"
        start, computed, end = [self.take() for _ in range(1 + on_gpu)][-1]
        now(self.device)
        if on_gpu:
            return start.elapsed_time(computed) / 1e3, start.elapsed_time(end) / 1e3
        return computed - start, end - start

    def take(self) -> list[Any]:
        """Take a step; return the times of its start, of the end of backward, and of its end."""
        times = [self.mark()]
        loss = self.loss()
        if self.row.task != "test":
            self.scaler.scale(loss).backward()
        if self.plain:
            loss.item()
        times.append(self.mark())
        if self.row.task != "test" and self.plain:
            nn.utils.clip_grad_norm_(self.parameters, 0.02, foreach=False)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
        elif self.row.task != "test":
            optim.optim_step(self.optimizer, self.scaler, self.parameters, 0.02)
        return [*times, self.mark()]

    def mark(self) -> Any:
        """Return the time in seconds or, for a GPU, an event after all that it was given."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def cpu_memory(row: Row, variant: str) -> float:
    """Return the peak of two steps, GiB, in a process of its own: all that it holds counts."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes what is held now
    status = [Path("/proc/self/status").read_text()]
    step = Step(row, variant, torch.device("cpu"))
    for _ in range(2):  # the optimiser's state comes with the first
        step.take()
    status.append(Path("/proc/self/status").read_text())
    before, peak = (int(text.partition("VmHWM:")[2].split()[0]) for text in status)
    return (peak - before) / 2**20


def matrix_rate(device: torch.device, precision: str) -> float:
    """Return the best rate of large square matrix products, multiply-adds per second."""
    best = 0.0
    for size in (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192):
        pair = torch.randn(2, size, size, device=device, dtype=optim.DTYPES[precision])
        for _ in range(5):
            start = now(device)
            torch.mm(*pair)
            best = max(best, size**3 / (now(device) - start))
    return best


class Result(NamedTuple):  # of a variant of a row; without a plain one, ratios are nan
    compute: float  # seconds of forward and backward
    whole: float  # seconds with the optimiser
    speedup: float  # of forward and backward over the plain variant
    memory: float  # GiB
    memory_share: float  # of the plain variant's
    rate_share: float  # of the matrix rate


def kind_of(name: str) -> str:
    """Return the kind of a kernel or operator."""
    return next(kind for kind, text in KINDS.items() if re.search(text, name, re.IGNORECASE))


def print_profile(step: Step, seconds: float, path: Path) -> None:
    """Profile a step that takes so long without it; print its kernels, and sums by kind."""
    type_ = step.device.type.upper()
    clock = f"self_{'cpu' if type_ == 'CPU' else 'device'}_time_total"  # microseconds
    activities = {ProfilerActivity.CPU, getattr(ProfilerActivity, type_)}
    with profile(activities=activities, acc_events=True) as profiler:
        step.take()
        now(step.device)
    events = profiler.key_averages()
    with path.open("a") as file:
        file.write(f"{step.row}\n{events.table(sort_by=clock, row_limit=100)}\n")
    # kernels, not operators that launch them; user annotations are regions that libraries name
    own = [x for x in events if x.device_type.name == type_ and not x.is_user_annotation]
    rows = sorted(((getattr(x, clock) / 1e3, x.count, x.key) for x in own), reverse=True)
    kinds = dict.fromkeys(KINDS, 0.0)
    for ms, _, name in rows:
        kinds[kind_of(name)] += ms
    total = sum(kinds.values()) or torch.nan  # nan: the profiler saw nothing
    for ms, count, name in [*rows[:25], *((ms, 0, kind) for kind, ms in kinds.items())]:
        name = name.replace("void ", "").replace("at::native::", "")[:90]
        calls = f"{count:6} calls" if count else ""
        print(f"  {name:<90} {calls:12} {ms:9.2f} ms {ms / total:4.0%}")
    print0(f"  busy for {total / 1e3 / seconds:.0%} of the {1e3 * seconds:.2f} ms of a usual step")


def measure(
    row: Row, names: list[str], device: torch.device, repeats: int, rate: float, path: Path | None
) -> Results:
    """Compare the variants of a row (and profile the last one); exit if their losses differ."""
    torch._dynamo.reset()  # a compiled variant shall not be what earlier rows made of it
    on_gpu = device.type == "cuda"
    steps: dict[str, Step] = {}
    losses: dict[str, float] = {}
    memory, held = dict[str, float](), 0  # GiB; bytes
    times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in names}
    tolerance = 1e-4 if row.precision == "fp32" and not on_gpu else 2e-2
    for turn in range(repeats + 1):
        for variant in list(times):
            try:
                if turn == 0:
                    held = torch.cuda.memory_allocated(device) if on_gpu else 0  # by others
                    steps[variant] = Step(row, variant, device)
                    losses[variant] = steps[variant].loss().item()
                    if on_gpu:  # the optimiser's state comes with the first step
                        steps[variant].run()
                        torch.cuda.reset_peak_memory_stats(device)
                times[variant].append(steps[variant].run())
                if turn == 0 and on_gpu:
                    memory[variant] = (torch.cuda.max_memory_allocated(device) - held) / 2**30
            except torch.OutOfMemoryError:
                where = " beside the others" if turn else ""
                print(f"{row}: {variant} not measured, out of memory{where}")
                for kept in (steps, losses, times):
                    kept.pop(variant, None)
            if turn == 0 or variant not in times:
                free_memory()
        alike = {variant: losses[variant] for variant in losses if variant not in MASK_TYPES}
        for variant, loss in alike.items():
            first = next(iter(alike.values()))
            if abs(loss - first) > tolerance * abs(first):
                sys.exit(f"{row}: {variant} has loss {loss}, another {first}: nothing timed")
    if path and (turns := times.get(names[-1])):
        print(f"{row}: profile of {names[-1]}")
        print_profile(steps[names[-1]], median(whole for _, whole in turns[1:]), path)
    steps.clear()
    free_memory()
    for variant in times if not on_gpu else ():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            memory[variant] = pool.submit(cpu_memory, row, variant).result()
    work = 1e9 * gflops(row) * row.batch * (1 if row.task == "test" else 3)
    results = {}
    for variant, (_, *turns) in times.items():  # the first one allocated and compiled
        compute, whole = (median(column) for column in zip(*turns, strict=True))
        _, *plain = times.get("plain", [(torch.nan, torch.nan)] * (repeats + 1))
        speedup = median(a / b for (a, _), (b, _) in zip(plain, turns, strict=True))
        peak, share = memory[variant], memory[variant] / memory.get("plain", torch.nan)
        results[variant] = Result(compute, whole, speedup, peak, share, work / compute / rate)
    return results


def check(all_results: dict[Row, Results], device: torch.device) -> list[str]:
    """Return the targets that were missed, in words; only measured rows are judged."""
    missed: list[str] = []
    for row, results in all_results.items():
        if (ours := results.get("ours")) is None:
            missed.append(f"{row}: not measured")
            continue
        values = {"share of the matrix rate": max(r.rate_share for r in results.values())}
        if not row.decoder_mask_ratio:
            values["plain / ours in memory"] = 1 / ours.memory_share
            values["speed over plain"] = ours.speedup
            if fp32 := all_results.get(row._replace(precision="fp32"), {}).get("plain"):
                values["speed over plain fp32"] = fp32.compute / ours.compute
            if unmasked := all_results.get(row._replace(mask_ratio=0.0), {}).get("ours"):
                values["speed over the unmasked step"] = unmasked.compute / ours.compute
        for *where, what, least in TARGETS:
            here = row.task, row.mask_ratio, device.type, row.precision, row.size
            applies = all(wanted in (None, own) for wanted, own in zip(where, here, strict=True))
            # "not >=" also holds for nan: the plain variant did not fit
            if applies and what in values and not values[what] >= least:
                missed.append(f"{row}: {what} {values[what]:.2f}, wanted at least {least:.2f}")
    return missed


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = adder(parser)
    tasks, variants = ["pretrain", "finetune", "test"], ["plain", "ours", "compiled"]
    add("--model", ["base"], "sizes", nargs="+", choices=SIZES)
    add("--task", tasks, "what to measure", nargs="+", choices=tasks)
    add("--mask_ratio", [0.0, 0.5, 0.75, 0.9, 0.95], "in pre-training", share_below_1, nargs="+")
    add("--decoder_mask_ratio", 0.0, "share of the removed patches not decoded", share_below_1)
    add("--finetune_mask_ratio", [0.0], "in fine-tuning", share_below_1, nargs="+")
    add("--batch_size", 2, "clips per step", positive_int)
    add("--input_size", 224, "pixels", positive_int)
    add("--num_frames", 16, "frames of a clip", positive_int)
    add("--precision", None, "default: fp32, and bf16 where fast", nargs="+", choices=optim.DTYPES)
    add("--variants", variants[:2], "compiled: ours by torch.compile", nargs="+",
        choices=[*variants, *MASK_TYPES[1:]])  # fmt: skip
    add("--device", "auto", "cuda, cpu or auto")
    add("--repeats", 5, "turns of every variant", positive_int)
    add("--profile", None, "show the last variant's kernels; append a longer table here", Path)
    add("--check", False, "exit 1 below the targets")
    args = parser.parse_args(argv)

    torch.set_float32_matmul_precision("high")  # as in training: TF32 on a GPU
    device = get_device(args.device)
    precisions = args.precision or ["fp32", "bf16"]
    if not args.precision and not optim.has_fast_bf16(device):
        precisions.remove("bf16")
        print("bf16: not measured, as it is slow on this device (--precision bf16 measures it)")
    rates = {precision: matrix_rate(device, precision) for precision in precisions}
    for precision, rate in rates.items():
        print(f"best matrix product in {precision}: {rate / 1e12:.3f} T multiply-adds per second")
    results: dict[Row, Results] = {}
    ratios = {"pretrain": args.mask_ratio, "finetune": args.finetune_mask_ratio, "test": [0.0]}
    clip = 3, args.num_frames, args.input_size, args.input_size
    for size, precision, task in itertools.product(args.model, precisions, args.task):
        for mask_ratio in ratios[task]:
            decoder = args.decoder_mask_ratio if task == "pretrain" and mask_ratio else 0.0
            row = Row(task, size, args.batch_size, mask_ratio, precision, decoder, clip)
            rate, masked = rates[precision], task == "pretrain" and mask_ratio > 0
            names = [name for name in args.variants if masked or name not in MASK_TYPES]
            results[row] = measure(row, names, device, args.repeats, rate, args.profile)
            print(f"{row}: {gflops(row):.1f} GFLOPs forward per clip")
            for variant, r in results[row].items():
                print0(
                    f"  {variant:<9} {1e3 * r.compute:9.1f} ms  {1e3 * r.whole:9.1f} ms with "
                    f"optimiser  {row.batch / r.whole:8.2f} clips/s  {r.speedup:5.2f} x plain  "
                    f"{r.memory:6.2f} GiB ({r.memory_share:.2f})  {r.rate_share:4.0%} of the "
                    "matrix rate"
                )
    for row, unmasked in results.items():
        masked = results.get(row._replace(mask_ratio=0.9), {}).get("ours")
        if row.task == "pretrain" and not row.mask_ratio and masked and "ours" in unmasked:
            ratio = unmasked["ours"].compute / masked.compute
            print(f"{row}: takes {ratio:.2f} x as long as with 90 % masked (paper, ViT-L: 5.8)")

    if args.check and (missed := check(results, device)):
        sys.exit("targets missed:\n" + "\n".join(missed))


if __name__ == "__main__":
    main()
