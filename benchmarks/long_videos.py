"""Measure what random 16-frame clips of long videos cost: memory, bytes read and seconds.

    python -m benchmarks.long_videos                     small files, in a minute
    python -m benchmarks.long_videos --gb 2 --hours 2    long ones; they take twice as much disk
    python -m benchmarks.long_videos --check             exit 1 if a clip takes too much

A fresh process reads pre-training items, each a clip, from one video. Memory is the peak during an
item above what the process had before the first one. Bytes count read system calls (Linux only).
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import av
import numpy as np
import torch

from benchmarks.loader import moving_texture
from util.args import adder, positive_float, positive_int
from util.kinetics import Kinetics, VideoIndex
from util.video.decode import Video

MAX_MIB = 64  # above the groups of pictures that a clip needs
MAX_READ = 2.0  # times the bytes of these groups, from the second use on
MBIT = {720: 8.0, 256: 0.6}  # per second, of pictures with so many rows


def write_long(path: str, rows: int, seconds: float) -> None:
    """Write 30 fps of H.264, a key frame every 60: ten seconds again and again, to save time."""
    tiles, frames = -(-rows // 256), islice(moving_texture(np.random.default_rng(0)), 300)
    with av.open(path, "w") as target:
        options = {"preset": "ultrafast", "bf": "2", "g": "60"}
        stream = target.add_stream("libx264", rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 340 * tiles, rows, "yuv420p"
        stream.bit_rate, packets = int(MBIT[rows] * 1e6), []
        for frame in frames:
            picture = np.ascontiguousarray(np.tile(frame, (tiles, tiles, 1))[:rows])
            packets += stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))
        packets += stream.encode(None)
        for turn in range(round(seconds / 10)):
            for packet in packets:
                copy = av.Packet(packet)
                copy.stream, copy.time_base = stream, packet.time_base
                copy.pts, copy.dts = packet.pts + 300 * turn, packet.dts + 300 * turn
                copy.is_keyframe = packet.is_keyframe
                target.mux(copy)


def mib(file: str, name: str, unit: int = 1) -> float:
    """Return a number that a file of /proc/self has, in MiB; `unit` is its own, in bytes."""
    return int(Path("/proc/self", file).read_text().split(f"{name}:")[1].split()[0]) * unit / 2**20


def measure(path: str, count: int) -> list[dict[str, float]]:
    """Read `count` clips of a video; return MiB, MiB of groups, MiB read and seconds of each."""
    torch.set_num_threads(1)
    dataset = Kinetics(VideoIndex.of_files([path]), "pretrain", 224, 16, 4)
    clips, items, groups = torch.zeros(dataset.clips_shape, dtype=torch.uint8), [], [0.0]
    find_runs = Video._runs

    def note(video: Video, wanted: list[int]) -> list[tuple[int, int]]:
        runs = find_runs(video, wanted)
        groups[0] = sum(video._packets.sizes[a : b + 1].sum() / 2**20 for a, b in runs)
        return runs

    idle = mib("status", "VmRSS", 1024)
    for epoch in range(count):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        start, before = time.perf_counter(), mib("io", "rchar")
        with patch.object(Video, "_runs", note):
            sample = dataset.read(epoch, 0, clips)
        assert not sample.errors, sample.errors
        spent, read = time.perf_counter() - start, mib("io", "rchar") - before
        peak = mib("status", "VmHWM", 1024) - idle
        items.append({"MiB": peak, "groups": groups[0], "read": read, "s": spent})
    return items


def main() -> int:
    """Write and measure the files; return 1 if --check finds too much."""
    parser = argparse.ArgumentParser("python -m benchmarks.long_videos", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = adder(parser)
    add("--gb", 0.1, "size of the files of 720 rows, GB", positive_float)
    add("--hours", 0.1, "length of the file of 256 rows, hours", positive_float)
    add("--items", 6, "clips of each file", positive_int)
    add("--folder", "", "that the files are written to, and removed from; empty: a temporary one")
    add("--check", False, "exit 1 if a clip takes too much")
    args, missed = parser.parse_args(), False
    long = args.gb * 8000 / MBIT[720], args.hours * 3600  # seconds
    with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
        for rows, suffix in ((720, "mp4"), (720, "mkv"), (256, "mp4")):
            path = f"{folder}/{rows}.{suffix}"
            write_long(path, rows, long[rows == 256])
            print(f"{os.path.getsize(path) / 1e9:.2f} GB, {rows} rows, {suffix}")
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                items = pool.apply(measure, (path, args.items))
            for n, item in enumerate(items, start=1):
                print(f"  item {n}: " + "  ".join(f"{k} {v:.2f}" for k, v in item.items()))
                missed |= item["MiB"] > item["groups"] + MAX_MIB
                missed |= n > 1 and item["read"] > MAX_READ * item["groups"]
            os.remove(path)
    return int(args.check and missed)


if __name__ == "__main__":
    sys.exit(main())
