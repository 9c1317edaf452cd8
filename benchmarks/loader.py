"""Measure the data pipeline against the bare decoder and against the usual ways of loading video.

    python -m benchmarks.loader                       synthetic clips in Kinetics form
    python -m benchmarks.loader --videos FOLDER       real ones
    python -m benchmarks.loader --check               exit 1 below the targets
    python -m benchmarks.loader --plot speed.png      also as a picture (needs matplotlib)

Everything but the table of workers runs in one process on one thread. The methods take turns on
every video, with the same random choices, so that what slows the machine for a while slows them
all; ratios are medians over videos of the ratio within a pair. Times are CPU times of the process,
which other work on the machine disturbs less. "bare" opens the file, reads its packets and decodes
those that are needed, and converts nothing: no loader can be faster.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

import util.kinetics
from util.args import positive_int
from util.kinetics import Kinetics, Sample, VideoIndex
from util.loader import VideoLoader
from util.prepare_kinetics import find_videos, transcode
from util.video.decode import Video
from util.video.rand_augment import RandAugment
from util.video.sampling import (
    clip_start,
    frame_indices,
    random_erasing_box,
    short_side_size,
    uniform_crop_box,
)
from util.video.transforms import MEAN, STD

SIZE, NUM_FRAMES, SAMPLING_RATE = 224, 16, 4
SHAPE: dict[str, Any] = {
    "input_size": SIZE,
    "num_frames": NUM_FRAMES,
    "sampling_rate": SAMPLING_RATE,
}
RAND_AUGMENT = "rand-m7-mstd0.5-inc1"

TARGETS = [  # work, its speed relative to (1 = as fast), at least
    ("pretrain", "bare", 0.75),
    ("pretrain", "textbook", 3.5),
    ("test", "bare", 1 / 2.1),
    ("test", "again", 15.0),
    ("finetune", "bare", 0.55),
    ("finetune", "PIL", 2.5),
]
TURNS = 5  # on every video; its time is their median
MAX_TRANSPORT_MS = 2.0  # CPU from worker to trainer, per video


# --- clips --------------------------------------------------------------------------------------


def write_synthetic_clips(folder: Path, count: int) -> None:
    """Write clips in Kinetics form: 340 x 256, 10 s, 30 fps, H.264, a key frame every 250."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        with av.open(str(folder / f"synthetic{i:02d}_000000_000010.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=30, options={"crf": "23"})
            stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
            stream.codec_context.gop_size = 250
            for frame in moving_texture(rng):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))


def moving_texture(rng: np.random.Generator, num_frames: int = 300) -> Iterator[np.ndarray]:
    """Draw frames of a texture that pans over another one, with a little noise as cameras have."""
    layers = []
    for _ in range(2):
        coarse = rng.normal(0, 1, (3, 24, 32))
        fine = rng.normal(0, 0.5, (3, 96, 128))
        up = [
            F.interpolate(torch.from_numpy(x)[None], (768, 1024), mode="bicubic")[0]
            for x in (coarse, fine)
        ]
        layers.append(((up[0] + up[1]) * 40 + 120).permute(1, 2, 0).numpy())
    speed = rng.uniform(-1.2, 1.2, (2, 2))
    mask = np.hypot(*np.mgrid[-128:128, -170:170]) < rng.uniform(60, 110)
    for t in range(num_frames):
        views = []
        for layer, (dy, dx) in zip(layers, speed, strict=True):
            y, x = int(256 + dy * t * 0.7) % 512, int(340 + dx * t) % 680
            views.append(layer[y : y + 256, x : x + 340])
        shift = int(60 * np.sin(t / 25))
        frame = np.where(np.roll(mask, shift, axis=1)[..., None], views[1], views[0])
        yield np.clip(frame + rng.normal(0, 1.5, frame.shape), 0, 255).astype(np.uint8)


def with_short_gops(videos: list[str], folder: Path) -> list[str]:
    """Re-encode clips with 30-frame groups of pictures, else as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = [str(folder / f"{Path(path).stem}.mp4") for path in videos]
    for path, target in zip(videos, targets, strict=True):
        transcode(path, target, short_side=None, gop=30, tune=None)
    return targets


# --- the usual ways -----------------------------------------------------------------------------


def bare_decode(path: str, runs: list[tuple[int, int]], wanted: set[int]) -> None:
    """Open a video, read its packets, and decode runs of them without frames of no use."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        decoder = stream.codec_context
        decoder.thread_type = "NONE"
        packets = [packet for packet in container.demux(stream) if packet.size]
        for first, last in runs:
            decoder.flush_buffers()
            for k in range(first, last + 1):
                decoder.skip_frame = "DEFAULT" if k in wanted else "NONREF"
                decoder.decode(packets[k])
            decoder.decode(None)


def plan(path: str, numbers: np.ndarray) -> tuple[list[tuple[int, int]], set[int]]:
    """Return what bare_decode needs to decode frames of these numbers."""
    with Video(path) as video:
        wanted = {video._shown[number] for number in np.unique(numbers)}
        return video._runs(sorted(wanted)), wanted


def decode_all(path: str) -> list[np.ndarray]:
    """Decode every frame to RGB [H, W, 3]."""
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_type = "NONE"
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def to_float(frames: list[np.ndarray] | np.ndarray) -> Tensor:
    """Normalise frames: float32 [T, C, H, W]."""
    clip = torch.from_numpy(np.stack(list(frames))).float().div_(255)
    return clip.sub_(MEAN).div_(STD).permute(0, 3, 1, 2)


def textbook_pretrain(path: str, frames: np.ndarray, boxes: list) -> Tensor:
    """Decode everything; normalise, crop and interpolate each clip in float."""
    everything = decode_all(path)
    clips = []
    for numbers, (top, left, h, w) in zip(frames, boxes, strict=True):
        clip = to_float([everything[n] for n in numbers])[:, :, top : top + h, left : left + w]
        clips.append(F.interpolate(clip, (SIZE, SIZE), mode="bilinear"))
    return torch.stack(clips)


def test_again_per_view(path: str, num_clips: int, num_crops: int) -> None:
    """Make the views of a test one by one, each from a decode of its own."""
    for k in range(num_clips):
        for s in range(num_crops):
            everything = decode_all(path)
            start = clip_start(len(everything), NUM_FRAMES * SAMPLING_RATE, k, num_clips)
            length = NUM_FRAMES * SAMPLING_RATE
            numbers = frame_indices(start, length, NUM_FRAMES, len(everything))
            clip = to_float([everything[n] for n in numbers])
            height, width = short_side_size(clip.shape[-2], clip.shape[-1], SIZE)
            clip = F.interpolate(clip, (height, width), mode="bilinear")
            top, left, h, w = uniform_crop_box(height, width, SIZE, s, num_crops)
            clip[:, :, top : top + h, left : left + w].contiguous()


def pil_finetune(dataset: Kinetics, path: str, seeds: list[tuple[int, ...]]) -> Tensor:
    """Make a fine-tuning sample with lists of PIL images, from the same cheap decode as ours."""
    rngs = [np.random.default_rng(seed) for seed in seeds]
    assert dataset.rand_augment is not None
    with Video(path) as video:
        numbers = dataset._random_frames(video, rngs[0])
        found = {n: Image.fromarray(frame) for n, frame in video.frames(numbers)}
    images = [found[n] for n in numbers.tolist()]
    clips = []
    for rng in rngs:
        augmented = images
        for name, arguments in dataset.rand_augment.draw(rng):
            operation = NAME_TO_OP[name + "Rel" if name.startswith("Translate") else name]
            how = {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BICUBIC}
            augmented = [operation(image, *arguments, **how) for image in augmented]
        clip = to_float([np.asarray(image) for image in augmented])
        top, left, h, w = dataset._random_box(clip.shape[-2], clip.shape[-1], rng)
        clip = F.interpolate(
            clip[..., top : top + h, left : left + w], (SIZE, SIZE), mode="bilinear"
        )
        if rng.random() < 0.5:
            clip = clip.flip(-1)
        top, left, h, w = random_erasing_box(SIZE, SIZE, rng, dataset.reprob)
        clip[..., top : top + h, left : left + w] = torch.randn(*clip.shape[:2], h, w)
        clips.append(clip)
    return torch.stack(clips)


# --- measuring ----------------------------------------------------------------------------------


class Split:
    """Time spent in parts of the pipeline, each without the parts inside of it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.inside = [0.0]

    def timed(self, name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            self.inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.process_time() - start
                self.seconds[name] += elapsed - self.inside.pop()
                self.inside[-1] += elapsed

        return call

    def watch(self, function: Callable) -> Callable:
        """Return `function` with its parts timed while it runs."""
        places = [
            (Video, "__init__", "open"),
            (Video, "close", "open"),
            (Video, "_to_rgb", "convert"),
            (util.kinetics, "resize_frame", "crop+resize"),
            (util.kinetics, "augment", "augment"),
            (util.kinetics, "cut_views", "decode"),
            (util.kinetics, "read_clip", "decode"),
        ]

        def call(*args: Any) -> Any:
            kept = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
            for owner, name, label in places:
                setattr(owner, name, self.timed(label, getattr(owner, name)))
            try:
                return self.timed("pack", function)(*args)
            finally:
                for owner, name, value in kept:
                    setattr(owner, name, value)

        return call


Methods = dict[str, Callable[[], Any]]


def methods_for(work: str, dataset: Kinetics, row: int, epoch: int, out: Tensor) -> Methods:
    """Return the ways to do a piece of work on a video, with the same random choices."""
    path = dataset.index.path(row)
    rngs = [np.random.default_rng((0, epoch, row, r)) for r in range(dataset.repeat_aug)]
    seeds = [(0, epoch, row, r) for r in range(dataset.repeat_aug)]
    ours = lambda: dataset.read(epoch, row, out)  # noqa: E731
    with Video(path) as video:
        if work == "test":
            everything = plan(path, np.arange(video.num_frames))
            return {
                "ours": ours,
                "bare": lambda: bare_decode(path, *everything),
                "again": lambda: test_again_per_view(path, dataset.num_clips, dataset.num_crops),
            }
        if work == "finetune":
            needed = plan(path, dataset._random_frames(video, rngs[0]))
            return {
                "ours": ours,
                "bare": lambda: bare_decode(path, *needed),
                "PIL": lambda: pil_finetune(dataset, path, seeds),
            }
        frames = np.stack([dataset._random_frames(video, rng) for rng in rngs])
        boxes = dataset._random_boxes(rngs, video.height, video.width)
        needed = plan(path, frames)
    return {
        "ours": ours,
        "bare": lambda: bare_decode(path, *needed),
        "textbook": lambda: textbook_pretrain(path, frames, boxes),
    }


def data_set(work: str, csv_path: str) -> Kinetics:
    """Build the data set of the paper's recipe for a piece of work."""
    index = VideoIndex(csv_path)
    if work == "pretrain":
        return Kinetics(index, "pretrain", **SHAPE, repeat_aug=4)
    if work == "test":
        return Kinetics(index, "test", **SHAPE, num_clips=10, num_crops=3)
    return Kinetics(
        index, "finetune", **SHAPE, repeat_aug=2, scales=(0.08, 1.0), reprob=0.25,
        rand_augment=RandAugment(RAND_AUGMENT),
    )  # fmt: skip


def measure(work: str, csv_path: str, rounds: int) -> dict[str, float]:
    """Time the methods of a piece of work, print its lines, and return our relative speeds."""
    dataset = data_set(work, csv_path)
    out = torch.zeros(dataset.clips_shape, dtype=torch.uint8)
    times: defaultdict[str, list[float]] = defaultdict(list)
    split = Split()
    methods_for(work, dataset, 0, 0, out)["ours"]()  # warm up
    for epoch in range(rounds):
        for row in range(len(dataset)):
            methods = methods_for(work, dataset, row, epoch, out)
            turns: defaultdict[str, list[float]] = defaultdict(list)
            for turn in range(TURNS):
                for name, method in methods.items():
                    if (turn and name in ("textbook", "again")) or (epoch and name == "again"):
                        continue  # they are slow, and their ratios far from the targets
                    start = time.process_time()
                    method()
                    turns[name].append(1000 * (time.process_time() - start))
            for name, values in turns.items():
                times[name].append(median(values))
            split.watch(methods["ours"])()
    speed = {
        name: median(t / ours for t, ours in zip(values, times["ours"], strict=False))
        for name, values in times.items()
        if name != "ours"
    }
    others = [name for name in times if name not in ("ours", "bare")]
    for name, values in times.items():
        to_bare = median(b / t for b, t in zip(times["bare"], values, strict=False))
        to_other = median(o / t for o, t in zip(times[others[0]], values, strict=False))
        print(
            f"  {work:9} {name:9} {median(values):8.1f} ms {to_bare:9.2f} x bare "
            f"{to_other:9.2f} x {others[0]:9}"
            + (f"{1000 * dataset.views / median(values):9.0f} clips/s" if name == "ours" else "")
        )
    count = rounds * len(dataset)
    parts = {name: 1000 * seconds / count for name, seconds in split.seconds.items()}
    print("  " + " " * 10 + "ours, ms: " + "  ".join(f"{n} {t:.1f}" for n, t in parts.items()))
    return speed


# --- from worker to trainer ---------------------------------------------------------------------


class Ready(Kinetics):
    """A data set whose clips cost nothing to make: what remains is their way to the trainer."""

    def read(self, epoch: int, row: int, clips: Tensor) -> Sample:
        flip = torch.zeros(self.views, dtype=torch.bool)
        return Sample(clips, flip, torch.zeros((self.views, 4), dtype=torch.int64), 0, row, {})


class ReadySamples(Dataset):
    """The same as tensors for PyTorch's default collate."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self.clips = torch.zeros(shape, dtype=dtype)

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.clips, row


def cpu_per_video(loader: DataLoader, batches: Iterator, batch_size: int, count: int) -> float:
    """Return the CPU ms per video that this process and one worker spend on `count` batches."""
    for _ in range(8):  # every slot has been touched
        next(batches)
    worker: Any = loader._iterator
    clocks = [time.CLOCK_PROCESS_CPUTIME_ID, time.CLOCK_PROCESS_CPUTIME_ID]
    clocks[1] = (~worker._workers[0].pid << 3) | 2  # Linux: the CPU clock of another process
    start = [time.clock_gettime(clock) for clock in clocks]
    for _ in range(count):
        next(batches)
    spent = sum(time.clock_gettime(clock) for clock in clocks) - sum(start)
    return 1000 * spent / (count * batch_size)


def measure_transport(csv_path: str, batch_size: int = 4, count: int = 50) -> float:
    """Print and return the CPU time that a pre-training sample takes from worker to trainer."""
    index = VideoIndex(csv_path)
    index._ends = np.resize(index._ends, batch_size * (count + 16))  # as many rows as needed
    index.labels = np.zeros(len(index._ends), dtype=np.int64)
    ready = Ready(index, "pretrain", **SHAPE, repeat_aug=4)
    ours = VideoLoader(ready, batch_size, 1, 1.0, torch.device("cpu"))
    result = cpu_per_video(ours.loader, iter(ours), batch_size, count)
    line = f"  worker to trainer, CPU ms per video: ours {result:.2f}"
    for name, dtype in (("uint8", torch.uint8), ("float32", torch.float32)):
        usual = DataLoader(
            ReadySamples(ready.clips_shape, dtype), batch_size, num_workers=1,
            collate_fn=default_collate, persistent_workers=True,
        )  # fmt: skip
        batches = iter(usual)
        line += f"  default collate {name} {cpu_per_video(usual, batches, batch_size, 20):.1f}"
    print(line)
    return result


def measure_workers(csv_path: str, counts: list[int], clips_per_second: float) -> None:
    """Print the clips per second of a pre-training loader with so many workers."""
    for count in counts:
        dataset = data_set("pretrain", csv_path)
        batch_size = min(4, len(dataset))
        loader = VideoLoader(dataset, batch_size, count, 1.0, torch.device("cpu"))
        clips, start = 0, 0.0
        for epoch in range(5):
            if epoch == 1:  # workers have started
                start = time.perf_counter()
            loader.set_epoch(epoch)
            for batch in loader:
                clips += batch.clips.shape[0] * batch.clips.shape[1] if epoch else 0
        rate = clips / (time.perf_counter() - start)
        need = clips_per_second / rate * count
        print(
            f"  {count} workers: {rate:6.0f} clips/s, {rate / count:5.0f} per worker; at this rate "
            f"{need:.0f} cores feed {clips_per_second:.0f} clips/s"
        )


def plot(measured: dict[str, dict[str, dict[str, float]]], path: str) -> None:
    """Draw the speeds, {videos: {work: {compared with: times as fast}}}, beside their targets."""
    from matplotlib.figure import Figure  # an extra: only this needs it

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    pairs = [pair for pair in TARGETS if all(pair[0] in speeds for speeds in measured.values())]
    width = 0.8 / len(measured)
    for number, (kind, speeds) in enumerate(measured.items()):
        places = [i + (number - (len(measured) - 1) / 2) * width for i in range(len(pairs))]
        values = [speeds[work][other] for work, other, _ in pairs]
        bars = axes.bar(places, values, width, label=f"videos {kind}")
        axes.bar_label(bars, fmt="%.2g", fontsize="small")
    for i, (_, _, least) in enumerate(pairs):
        label = "target" if i == 0 else ""
        axes.hlines(least, i - 0.45, i + 0.45, color="black", linewidth=1, label=label)
    axes.set_xticks(range(len(pairs)), [f"{work}\nvs {other}" for work, other, _ in pairs])
    axes.set(yscale="log", ylabel="times as fast", title="Speed of the data pipeline")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    print(f"plotted to {path}")


def main(args: argparse.Namespace) -> int:
    """Print the tables; returns 1 when --check finds a target missed."""
    if args.plot and find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib")
    torch.set_num_threads(1)
    misses, measured = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.videos
        if not folder:
            folder = f"{scratch}/clips"
            write_synthetic_clips(Path(folder), args.num_videos)
        videos = find_videos(folder)[: args.num_videos]
        kinds = {"as given": videos, "30-frame GOPs": with_short_gops(videos, Path(scratch, "gop"))}
        for kind, paths in kinds.items():
            csv_path = str(Path(scratch, "train.csv"))
            Path(csv_path).write_text("".join(f"{Path(p).resolve()} 0\n" for p in paths))
            print(f"{len(paths)} videos, {kind}; one process, one thread; medians over videos")
            speeds = {work: measure(work, csv_path, args.rounds) for work in args.work}
            measured[kind] = speeds
            for work, other, least in TARGETS:
                if work in speeds and speeds[work][other] < least:
                    misses.append(
                        f"{kind}: {work} at {speeds[work][other]:.2f} of {other}, below {least:.2f}"
                    )
            transport = measure_transport(csv_path)
            if transport > MAX_TRANSPORT_MS:
                misses.append(f"{transport:.1f} ms from worker to trainer")
            if args.workers:
                measure_workers(csv_path, args.workers, args.clips_per_second)
    for miss in misses:
        print(f"target missed: {miss}")
    if args.plot:
        plot(measured, args.plot)
    return 1 if misses and args.check else 0


def get_args_parser() -> argparse.ArgumentParser:
    """Build the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader",
        description="Measure the data pipeline",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--videos", default="", help="folder of videos; empty: synthetic clips")
    parser.add_argument("--num_videos", type=positive_int, default=12, help="at most so many")
    parser.add_argument("--rounds", type=positive_int, default=3, help="over all videos")
    works = ["pretrain", "test", "finetune"]
    parser.add_argument("--work", nargs="+", choices=works, default=works)
    parser.add_argument("--workers", nargs="*", type=positive_int, default=[1, 2, 4])
    parser.add_argument(
        "--clips_per_second", type=float, default=1000, help="that the cores are counted for"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 below the targets")
    parser.add_argument("--plot", default="", metavar="FILE", help="also draw the speeds, as PNG")
    return parser


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
