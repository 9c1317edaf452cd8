"""What --time_loader prints: how fast the loader is, where its time goes, and what limits it.

The loader is that of training, but nobody trains: the main process takes batches and drops them.
Timing the parts costs the workers one or two percent of their speed.
"""

import copy
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import get_worker_info

import util.kinetics
from util.dist import print0, world_size
from util.errors import UserError
from util.kinetics import Kinetics, Sample
from util.loader import VideoLoader, available_cpus, default_num_workers
from util.video import clip_ops
from util.video.decode import Video

PARTS = [  # what is timed apart, and its name
    (Video, "__init__", "opening"), (Video, "close", "opening"),
    (util.kinetics, "cut_views", "decoding"), (util.kinetics, "read_clip", "decoding"),
    (Video, "_to_rgb", "conversion"), (util.kinetics, "resize_frame", "resizing"),
    (util.kinetics, "augment", "augmentation"), (clip_ops, "color_jitter", "augmentation"),
    (Kinetics, "_load", "packing"),
]  # fmt: skip
READING = list(dict.fromkeys(name for *_, name in PARTS))
COUNTED = ["videos", "wall", "reading", "cpu", "queued", "bytes", *READING]  # by a worker
MOST_VIDEOS = 10**7  # that are read


@contextmanager
def timed_parts(seconds: dict[str, float]) -> Iterator[None]:
    """Add the CPU time of the parts of reading videos, each without the parts inside of it."""
    inside = [0.0]  # seconds of the parts inside of each part that runs

    def timed(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.process_time()
            inside.append(0.0)
            try:
                return function(*args, **options)
            finally:
                spent = time.process_time() - start
                seconds[label] += spent - inside.pop()
                inside[-1] += spent

        return call

    with ExitStack() as stack:
        for owner, name, label in PARTS:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, timed(label, getattr(owner, name)))
        yield


def _usage() -> dict[str, float]:
    """Return the seconds that this process waited for a CPU, and the bytes that it read."""
    tasks = Path("/proc/self/task").iterdir()
    queued = sum(int((task / "schedstat").read_text().split()[1]) for task in tasks)
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"queued": queued / 1e9, "bytes": int(io["rchar"])}


class Measured(NamedTuple):
    """What workers did in a number of seconds; `shares` of their time add up to 1."""

    workers: int
    seconds: float
    videos: int
    bytes: float  # that were read
    cores: float  # that were busy on average
    shares: dict[str, float]
    bad: dict[str, str]  # unreadable videos, as in VideoLoader


def measure(
    dataset: Kinetics, batch_size: int, workers: int, seconds: float, max_bad_share: float = 1.0
) -> Measured:
    """Let workers read without a stop between epochs, from when each of them has made a batch."""
    own = dict.fromkeys(COUNTED, 0.0)  # every worker has a copy once it is forked
    counts = torch.zeros(workers, len(COUNTED), dtype=torch.float64).share_memory_()
    counting: Any = copy.copy(dataset)

    def read(epoch: int, row: int, clips: torch.Tensor) -> Sample:
        start = time.perf_counter()
        sample = dataset.read(epoch, row, clips)
        now, worker = time.perf_counter(), cast(Any, get_worker_info())
        own.update(_usage(), wall=now, cpu=time.process_time(), videos=own["videos"] + 1)
        own["reading"] += now - start
        counts[worker.id] = torch.tensor(list(own.values()))
        return sample

    counting.read = read
    order = np.random.default_rng(dataset.seed).permutation(len(dataset))
    rows: Any = np.tile(order, MOST_VIDEOS // max(len(dataset), 1) + 1)
    loader = VideoLoader(counting, batch_size, workers, max_bad_share, torch.device("cpu"), rows)
    with timed_parts(own):
        batches = iter(loader)
    for _ in range(workers):
        next(batches)
    before, start = counts.sum(0), time.perf_counter()
    while time.perf_counter() - start < seconds or counts[:, 0].sum() == before[0]:
        next(batches)
    seconds, spent = time.perf_counter() - start, (counts.sum(0) - before).tolist()

    # What is left of the time of a read is waiting for files.
    n = dict(zip(COUNTED, spent, strict=True))
    times = {name: n[name] for name in READING}
    computing, queued = sum(times.values()), n["queued"]
    times["transport"] = n["cpu"] - computing
    times["waiting for files"] = max(n["reading"] - computing - queued, 0.0)
    times["waiting for a CPU"] = queued
    idle = n["wall"] - n["reading"] - times["transport"]
    times["waiting for the main process"] = max(idle, 0.0)
    total = sum(times.values())
    shares, cores = {k: v / total for k, v in times.items()}, workers * n["cpu"] / total
    return Measured(workers, seconds, int(n["videos"]), n["bytes"], cores, shares, loader.bad)


def find_limit(found: Measured, cpus: int) -> str:
    """Say in one sentence which of disk, computing or number of workers is the limit."""
    files, queue = list(found.shares.values())[-3:-1]
    part = max(READING, key=lambda name: found.shares[name])
    work = found.shares[part] * found.workers / found.cores
    why, advice = "", "more --num_workers help"
    if files >= 0.2 and files >= queue:
        limit, why = "The disk", f"{files:.0%} of the time goes to waiting for reads; "
        advice = "a faster disk or fewer, larger files help, more CPUs do not"
    elif found.cores >= 0.85 * cpus:
        limit, why = part.capitalize(), f"it takes {work:.0%} of the work; "
        advice = "more CPUs help, and copies that are cheaper to decode (DATASET.md)"
    elif queue >= 0.1:
        limit, why = "Other processes", f"{queue:.0%} of the time goes to waiting for a CPU; "
        advice = "measure again without them"
    else:
        limit = "The number of workers"
    used = f"--num_workers {found.workers} keep {found.cores:.1f} of {cpus} CPUs busy"
    return f"{limit} is the limit: {why}{used}; {advice}."


def time_loader(dataset: Kinetics, args: Namespace) -> None:
    """Print what the workers do in --time_loader seconds, and what limits them."""
    workers = default_num_workers() if args.num_workers is None else args.num_workers
    if world_size() > 1 or not workers:
        need = "a single process" if workers else "at least one of --num_workers"
        raise UserError(f"--time_loader times the workers of one rank: give it {need}")
    try:
        _usage()
    except (OSError, LookupError) as error:
        raise UserError(f"--time_loader needs Linux's /proc ({error})", status=1) from error
    dataset.index.refuse_missing()
    found = measure(dataset, args.batch_size, workers, args.time_loader, args.max_bad_share)
    rate, read = found.videos / found.seconds, found.bytes / found.seconds
    print0(
        f"workers: {workers}, videos/s: {rate:.1f} ({rate / workers:.1f} each), "
        f"clips/s: {rate * dataset.views:.1f}, MB/s read: {read / 1e6:.1f}"
    )
    print0("a worker's time: " + ", ".join(f"{k} {v:.1%}" for k, v in found.shares.items()))
    clips = found.videos * dataset.views
    cpu, size = found.cores * found.seconds / clips, found.bytes / clips  # of a clip
    wanted = [args.clips_per_second] if args.clips_per_second else [250, 500, 1000, 2000]
    cores = ", ".join(f"{math.ceil(rate * cpu)} feed {rate:g} clips/s" for rate in wanted)
    print0(f"cores: {cores} ({1000 * cpu:.1f} ms of CPU and {size / 1e6:.2f} MB per clip)")
    if found.bad:
        print0(f"unreadable videos: {len(found.bad)}, named above")
    print0(find_limit(found, available_cpus()))
