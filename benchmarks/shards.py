"""Measure videos in shards against files of their own: items from a warm disk, slow metadata.

    python -m benchmarks.shards --videos FOLDER     without --videos: synthetic clips
    python -m benchmarks.shards --check             exit 1 if a target is missed

Items are those of fine-tuning, each made from the file and from the shard in turns. The other part
opens 200 short videos while strace delays every system call about metadata by 5 ms, and counts
these calls; it is left out where strace is missing.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.loader import RECIPES, SIZE, write_synthetic_clips
from util.args import adder, positive_int
from util.kinetics import Kinetics, VideoIndex
from util.prepare_kinetics import find_videos
from util.shards import write_shard
from util.synthetic import write_video
from util.video.source import member_path

MOST_TIME = 1.03  # of an item from a shard, relative to a file, wall and CPU
LEAST_SPEED = 3.0  # of opening members of shards, relative to files
VIDEOS, SHARDS = 200, 4
METADATA = "openat,?stat,?newfstatat,?fstat,statx,?access,?faccessat,?lstat"
OPEN = """
import os, sys, time
from util.video.decode import Video
for paths in sys.argv[1:]:
    os.access("/begin", 0)  # a mark in strace's output
    start = time.perf_counter()
    for path in paths.splitlines():
        Video(path).close()
    print(time.perf_counter() - start)
os.access("/begin", 0)
"""


def compare_items(videos: list[str], folder: str, rounds: int) -> list[float]:
    """Return the wall and CPU time of items from a shard, relative to files: medians of all."""
    members = write_shard(f"{folder}/s.tar", [(os.path.basename(x), x) for x in videos])
    indices = map(VideoIndex.of_files, (videos, [*map(member_path, members)]))
    sets = [Kinetics(x, "finetune", SIZE, 16, 4, **RECIPES["finetune"]) for x in indices]
    out, ratios = torch.zeros(sets[0].clips_shape, dtype=torch.uint8), []
    for epoch, row in np.ndindex(rounds, len(videos)):
        times = np.zeros((2, 2))
        for k in (0, 1) if (epoch + row) % 2 else (1, 0):
            times[k] -= time.perf_counter(), time.process_time()
            assert not sets[k].read(epoch, row, out).errors
            times[k] += time.perf_counter(), time.process_time()
        ratios.append(times[1] / times[0])
    return np.median(ratios, axis=0).tolist()


def compare_opening(folder: str) -> float:
    """Print seconds and calls of opening videos with slow metadata; return the shards' speed."""
    frames = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), np.uint8)
    write_video(f"{folder}/short", frames, 30, {})
    files = [shutil.copy(f"{folder}/short", f"{folder}/short{i}.mp4") for i in range(VIDEOS)]
    parts = [[(f"{n}.mp4", files[n]) for n in range(i, VIDEOS, SHARDS)] for i in range(SHARDS)]
    written = [write_shard(f"{folder}/{i}.tar", part) for i, part in enumerate(parts)]
    members = [member_path(x) for row in zip(*written, strict=True) for x in row]  # by turns
    command = ["strace", "-f", "-o", f"{folder}/trace", "-e", f"trace={METADATA}"]
    command += ["-e", f"inject={METADATA}:delay_enter=5ms", sys.executable, "-c", OPEN]
    printed = subprocess.check_output([*command, "\n".join(files), "\n".join(members)])
    seconds = [float(line) for line in printed.split()]
    traces = Path(f"{folder}/trace").read_text().split('"/begin"')[1:3]
    for name, took, trace in zip(("files", "shards"), seconds, traces, strict=True):
        calls = trace.count("\n") / VIDEOS
        print(f"{VIDEOS} videos from {name}: {took:.2f} s, {calls:.2f} calls about metadata each")
    return seconds[0] / seconds[1]


def main() -> None:
    """Measure both, and judge them with --check."""
    parser = argparse.ArgumentParser("python -m benchmarks.shards", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = adder(parser)
    add("--videos", "", "folder of videos; empty: synthetic clips")
    add("--rounds", 20, "items of each video", positive_int)
    add("--check", False, "exit 1 if a target is missed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not args.videos:
            write_synthetic_clips(folder, 4)
        wall, cpu = compare_items(find_videos(args.videos or folder)[:12], folder, args.rounds)
        speed = compare_opening(folder) if shutil.which("strace") else None
    print(f"items from shards take {wall:.3f} of the wall and {cpu:.3f} of the CPU time of files")
    if speed:
        print(f"opening from shards: {speed:.1f} x as fast (at least {LEAST_SPEED:g})")
    missed = max(wall, cpu) > MOST_TIME or (speed or LEAST_SPEED) < LEAST_SPEED
    sys.exit(args.check and missed)


if __name__ == "__main__":
    main()
