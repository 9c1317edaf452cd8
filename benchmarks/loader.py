"""Measure the data pipeline against the bare decoder and against the usual ways of loading video.

    python -m benchmarks.loader                       synthetic clips in Kinetics form
    python -m benchmarks.loader --videos FOLDER       real ones
    python -m benchmarks.loader --check               exit 1 below the targets

All but the table of workers is measured in one process on one thread, in CPU time. Methods take
turns on every video, with the same random choices; ratios are medians over videos. "bare" opens the
file, reads its packets, decodes the needed ones and converts nothing: no loader can be faster.
"""

import argparse
import copy
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
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
from torch.utils.data import DataLoader

from util import time_loader
from util.args import adder, positive_float, positive_int
from util.kinetics import Generators, Kinetics, Sample, VideoIndex
from util.loader import VideoLoader
from util.prepare_kinetics import find_videos
from util.video import rand_augment, sampling, transforms
from util.video.decode import Video
from util.video.transcode import transcode

resize = partial(F.interpolate, mode="bilinear")  # a float clip, to a size
Methods = dict[str, Callable[[], Any]]
SIZE = 224
AUGMENT = rand_augment.RandAugment("rand-m7-mstd0.5-inc1")
RECIPES: dict[str, dict[str, Any]] = {
    "pretrain": {"repeat_aug": 4},
    "test": {"num_clips": 10, "num_crops": 3},
    "finetune": {"repeat_aug": 2, "scales": (0.08, 1.0), "reprob": 0.25, "rand_augment": AUGMENT},
}
TARGETS = [  # work, its speed relative to (1 = as fast), at least
    ("pretrain", "bare", 0.75), ("pretrain", "textbook", 3.5),
    ("test", "bare", 1 / 2.1), ("test", "again", 15.0),
    ("finetune", "bare", 0.55), ("finetune", "PIL", 2.5),
]  # fmt: skip
BATCH_SIZE = 4  # videos, of the loaders
TURNS = 5  # on every video; the fastest counts, as other processes only take time
MAX_TRANSPORT_MS = 2.0  # CPU from worker to trainer, per video
WORKER_SECONDS = 10.0  # that a number of workers is measured, after a warm-up


def write_synthetic_clips(folder: str, count: int) -> None:
    """Write clips in Kinetics form: 340 x 256, 10 s, 30 fps, H.264, a key frame every 250."""
    for i in range(count):
        with av.open(f"{folder}/synthetic{i:02d}_000000_000010.mp4", "w") as container:
            stream = container.add_stream("libx264", rate=30, options={"crf": "23", "g": "250"})
            stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
            for frame in moving_texture(np.random.default_rng(i)):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))


def moving_texture(rng: np.random.Generator, num_frames: int = 300) -> Iterator[np.ndarray]:
    """Draw frames of a texture that pans over another one, with a little noise as cameras have."""
    layers = []
    for _ in range(2):
        noise = rng.normal(0, 1, (1, 3, 24, 32)), rng.normal(0, 0.5, (1, 3, 96, 128))
        up = [F.interpolate(torch.from_numpy(x), (768, 1024), mode="bicubic")[0] for x in noise]
        layers.append(((up[0] + up[1]) * 40 + 120).permute(1, 2, 0).numpy())
    speed = rng.uniform(-1.2, 1.2, (2, 2))
    mask = np.hypot(*np.mgrid[-128:128, -170:170]) < rng.uniform(60, 110)
    for t in range(num_frames):
        corners = (np.array([256, 340]) + speed * t * [0.7, 1]).astype(int) % [512, 680]
        views = [x[i : i + 256, j : j + 340] for x, (i, j) in zip(layers, corners, strict=True)]
        outside = np.roll(~mask, int(60 * np.sin(t / 25)), axis=1)[..., None]
        frame = np.where(outside, *views)
        yield np.clip(frame + rng.normal(0, 1.5, frame.shape), 0, 255).astype(np.uint8)


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


def decode_all(path: str) -> list[np.ndarray]:
    """Decode every frame to RGB [H, W, 3]."""
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_type = "NONE"
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def to_float(frames: list[np.ndarray] | np.ndarray) -> Tensor:
    """Normalise frames: float32 [T, C, H, W]."""
    clip = torch.from_numpy(np.stack(list(frames))).float().div_(255)
    return clip.sub_(transforms.MEAN).div_(transforms.STD).permute(0, 3, 1, 2)


def crop(clip: Tensor, box: sampling.Box) -> Tensor:
    """Return the view of a float clip inside a box."""
    top, left, h, w = box
    return clip[..., top : top + h, left : left + w]


def textbook(path: str, frames: np.ndarray, boxes: list[sampling.Box]) -> Tensor:
    """Decode everything; normalise, crop and interpolate each clip in float."""
    everything = decode_all(path)
    clips = [to_float([everything[n] for n in numbers]) for numbers in frames]
    return torch.stack([resize(crop(*pair), SIZE) for pair in zip(clips, boxes, strict=True)])


def decode_again(path: str, frames: list[np.ndarray], num_crops: int) -> None:
    """Make the views of a test one by one, each from a decode of its own."""
    for k, s in np.ndindex(len(frames), num_crops):
        everything = decode_all(path)
        clip = to_float([everything[n] for n in frames[k]])
        height, width = sampling.short_side_size(clip.shape[-2], clip.shape[-1], SIZE)
        box = sampling.uniform_crop_box(height, width, SIZE, s, num_crops)
        crop(resize(clip, (height, width)), box).contiguous()


def lists_of_images(dataset: Kinetics, path: str, numbers: np.ndarray, rngs: Generators) -> Tensor:
    """Make a fine-tuning sample with lists of PIL images, from the same cheap decode as ours."""
    with Video(path) as video:
        found = {n: Image.fromarray(frame) for n, frame in video.frames(numbers)}
    how = {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BICUBIC}
    clips = []
    for rng in copy.deepcopy(rngs):
        images = [found[n] for n in numbers.tolist()]
        for name, arguments in AUGMENT.draw(rng):
            operation = NAME_TO_OP[name + "Rel" if name.startswith("Translate") else name]
            images = [operation(image, *arguments, **how) for image in images]
        clip = to_float([np.asarray(image) for image in images])
        clip = resize(crop(clip, dataset._random_box(clip.shape[-2], clip.shape[-1], rng)), SIZE)
        clip = clip.flip(-1) if rng.random() < 0.5 else clip
        crop(clip, sampling.random_erasing_box(SIZE, SIZE, rng, dataset.reprob)).normal_()
        clips.append(clip)
    return torch.stack(clips)


def methods_for(work: str, dataset: Kinetics, row: int, epoch: int, out: Tensor) -> Methods:
    """Return the ways to do a piece of work on a video, with the same random choices."""
    path = dataset.index.path(row)
    rngs = [np.random.default_rng((0, epoch, row, r)) for r in range(dataset.repeat_aug)]
    with Video(path) as video:
        if work == "test":
            numbers = np.arange(video.num_frames)
            views = [dataset._test_frames(video, k) for k in range(dataset.num_clips)]
            usual = {"again": partial(decode_again, path, views, dataset.num_crops)}
        elif work == "finetune":
            numbers = dataset._random_frames(video, rngs[0])
            usual = {"PIL": partial(lists_of_images, dataset, path, numbers, rngs)}
        else:
            numbers = np.stack([dataset._random_frames(video, rng) for rng in rngs])
            boxes = dataset._training_boxes(rngs, video.height, video.width)
            usual = {"textbook": partial(textbook, path, numbers, boxes)}
        wanted = {video._shown[number] for number in np.unique(numbers)}
        bare = partial(bare_decode, path, video._runs(sorted(wanted)), wanted)
    return {"ours": partial(dataset.read, epoch, row, out), "bare": bare, **usual}


def data_set(work: str, csv_path: str) -> Kinetics:
    """Build the data set of the paper's recipe for a piece of work."""
    return Kinetics(VideoIndex(csv_path), work, SIZE, 16, 4, **RECIPES[work])


def measure(work: str, csv_path: str, rounds: int) -> dict[str, float]:
    """Time the methods of a piece of work, print its lines, and return our relative speeds."""
    dataset = data_set(work, csv_path)
    out = torch.zeros(dataset.clips_shape, dtype=torch.uint8)
    times: defaultdict[str, list[float]] = defaultdict(list)  # ms, by epoch and video
    parts: defaultdict[str, float] = defaultdict(float)
    dataset.read(0, 0, out)  # warm up
    for epoch, row in np.ndindex(rounds, len(dataset)):
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
            times[name].append(min(values))
        with time_loader.timed_parts(parts):
            methods["ours"]()

    def speed(name: str, other: str) -> float:
        return median(b / a for a, b in zip(times[name], times[other], strict=False))

    usual = list(times)[-1]
    for name, values in times.items():
        clips = f"{1000 * dataset.views / median(values):9.0f} clips/s" if name == "ours" else ""
        print(
            f"  {work:9} {name:9} {median(values):8.1f} ms {speed(name, 'bare'):9.2f} x bare "
            f"{speed(name, usual):9.2f} x {usual:9}{clips}"
        )
    scale = 1000 / (rounds * len(dataset))
    print(" " * 12 + "ours, ms: " + "  ".join(f"{k} {scale * v:.1f}" for k, v in parts.items()))
    return {other: speed("ours", other) for other in ("bare", usual)}


class Ready(Kinetics):  # clips cost nothing to make: their way to the trainer remains
    def __len__(self) -> int:
        return 1000

    def read(self, epoch: int, row: int, clips: Tensor) -> Sample:
        flip = torch.zeros(self.views, dtype=torch.bool)
        return Sample(clips, flip, torch.zeros((self.views, 4), dtype=torch.int64), 0, row, {})


def cpu_per_video(loader: Any, count: int) -> float:
    """Return the CPU ms per video that this process and one worker spend on `count` batches."""
    batches = iter(loader)
    for _ in range(8):  # every slot has been touched
        next(batches)
    pid = getattr(loader, "loader", loader)._iterator._workers[0].pid
    clocks = time.CLOCK_PROCESS_CPUTIME_ID, (~pid << 3) | 2  # Linux: another process's CPU clock
    start = sum(map(time.clock_gettime, clocks))
    for _ in range(count):
        next(batches)
    return 1000 * (sum(map(time.clock_gettime, clocks)) - start) / (count * BATCH_SIZE)


def measure_transport(csv_path: str) -> float:
    """Print and return the CPU ms that a pre-training sample takes from worker to trainer."""
    ready = Ready(VideoIndex(csv_path), "pretrain", SIZE, 16, 4, repeat_aug=4)
    result = cpu_per_video(VideoLoader(ready, BATCH_SIZE, 1, 1.0, torch.device("cpu")), 50)
    line = f"  worker to trainer, CPU ms per video: ours {result:.2f}"
    for name, dtype in (("uint8", torch.uint8), ("float32", torch.float32)):
        samples: Any = [(torch.zeros(ready.clips_shape, dtype=dtype), 0)] * 1000
        usual = DataLoader(samples, BATCH_SIZE, num_workers=1, persistent_workers=True)
        line += f"  default collate {name} {cpu_per_video(usual, 20):.1f}"
    print(line)
    return result


def measure_workers(csv_path: str, count: int, clips_per_second: float) -> None:
    """Print the clips per second of a pre-training loader with so many workers."""
    dataset = data_set("pretrain", csv_path)
    found = time_loader.measure(dataset, min(BATCH_SIZE, len(dataset)), count, WORKER_SECONDS)
    clips = found.videos * dataset.views
    rate, cpu = clips / found.seconds, found.cores * found.seconds / clips  # seconds per clip
    print(
        f"  {count} workers: {rate:6.0f} clips/s in {found.seconds:.0f} s of a steady state, "
        f"{rate / count:5.0f} per worker, {1000 * cpu:.1f} ms of CPU per clip: "
        f"{clips_per_second * cpu:.0f} cores feed {clips_per_second:.0f} clips/s"
    )


def plot(measured: dict[str, dict[str, dict[str, float]]], path: str) -> None:
    """Draw speeds, {videos: {work: {compared with: times as fast}}}, beside their targets."""
    from matplotlib.figure import Figure  # an extra: only this needs it

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    targets = [row for row in TARGETS if all(row[0] in speeds for speeds in measured.values())]
    places = np.arange(len(targets))
    for shift, (kind, speeds) in zip((-0.2, 0.2), measured.items(), strict=True):
        values = [speeds[work][other] for work, other, _ in targets]
        bars = axes.bar(places + shift, values, 0.4, label=f"videos {kind}")
        axes.bar_label(bars, fmt="%.2g", fontsize="small")
    least = [target for _, _, target in targets]
    axes.hlines(least, places - 0.45, places + 0.45, color="black", linewidth=1, label="target")
    axes.set_xticks(places, [f"{work}\nvs {other}" for work, other, _ in targets])
    axes.set(yscale="log", ylabel="times as fast", title="Speed of the data pipeline")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    print(f"plotted to {path}")


def main(args: argparse.Namespace) -> int:
    """Print the tables; return 1 when --check finds a target missed."""
    if args.plot and find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib")
    torch.set_num_threads(1)
    misses, measured = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        if not args.videos:
            write_synthetic_clips(scratch, args.num_videos)
        videos = find_videos(args.videos or scratch)[: args.num_videos]
        recoded = [f"{scratch}/{Path(video).stem}.recoded.mp4" for video in videos]
        for video, target in zip(videos, recoded, strict=True):
            transcode(video, target, short_side=None, gop=30, options={})
        csv_path = f"{scratch}/train.csv"
        for kind, paths in (("as given", videos), ("30-frame GOPs", recoded)):
            Path(csv_path).write_text("".join(f"{Path(path).resolve()} 0\n" for path in paths))
            print(f"{len(paths)} videos, {kind}; one process, one thread; medians over videos")
            measured[kind] = speeds = {w: measure(w, csv_path, args.rounds) for w in args.work}
            for work, other, least in TARGETS:
                if work in speeds and (speed := speeds[work][other]) < least:
                    misses.append(f"{kind}: {work} at {speed:.2f} of {other}, below {least:.2f}")
            if (transport := measure_transport(csv_path)) > MAX_TRANSPORT_MS:
                misses.append(f"{transport:.1f} ms from worker to trainer")
            for count in args.workers:
                measure_workers(csv_path, count, args.clips_per_second)
    for miss in misses:
        print(f"target missed: {miss}")
    if args.plot:
        plot(measured, args.plot)
    return 1 if misses and args.check else 0


def get_args_parser() -> argparse.ArgumentParser:
    """Build the flags."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = adder(parser)
    add("--videos", "", "folder of videos; empty: synthetic clips")
    add("--num_videos", 12, "at most so many", positive_int)
    add("--rounds", 3, "over all videos", positive_int)
    add("--work", list(RECIPES), "what to measure", nargs="+", choices=RECIPES)
    add("--workers", [1, 2, 4], "numbers of loader processes", positive_int, nargs="*")
    add("--clips_per_second", 1000, "that the cores are counted for", positive_float)
    add("--check", False, "exit 1 below the targets")
    add("--plot", "", "also draw the speeds, as PNG", metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
