"""Thousands of damaged files pass through the data set without a crash, a hang or a leak."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.video_files import moving_frames, write_video
from util.kinetics import Kinetics, VideoIndex
from util.loader import VideoLoader

ORIGINALS = [
    ("a.mp4", {"bframes": 2}),
    ("b.mkv", {"bframes": 3, "open_gop": True, "audio": True}),
    ("c.mp4", {"codec": "libx265", "bframes": 2}),
    ("d.avi", {"codec": "mpeg4"}),
    ("e.webm", {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}),
    ("f.mp4", {"codec": "libsvtav1", "options": {"preset": "12", "svtav1-params": "lp=1"}}),
    ("g.ts", {"bframes": 1}),
    ("h.mp4", {"rotation": 90, "container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    ("i.mkv", {"codec": "mpeg2video"}),
    ("j.gif", {"codec": "gif", "pix_fmt": "rgb8"}),
]


def mutate(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Flip bits anywhere or in the head, cut the end off, cut a piece out, or splice two files."""
    data = bytearray(content)
    kind = rng.integers(5)
    if kind <= 1:
        span = len(data) if kind == 0 else min(len(data), 2000)
        for at in rng.integers(0, span, rng.choice([1, 4, 30])):
            data[at] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        del data[int(rng.integers(len(data))) :]
    elif kind == 3:
        start = int(rng.integers(len(data)))
        del data[start : start + int(rng.integers(1, 2000))]
    else:
        start, end = sorted(rng.integers(0, len(other), 2).tolist())
        at = int(rng.integers(len(data)))
        data[at : at + (end - start) * int(rng.integers(2))] = other[start:end]
    return bytes(data)


def fuzz(folder: Path, count: int, seed: int) -> dict:
    """Read `count` mutated files in all modes of the data set; runs in a process of its own."""
    files = [folder / name for name, _ in ORIGINALS]
    for path, (_, options) in zip(files, ORIGINALS, strict=True):
        write_video(path, moving_frames(24), **options)
    contents = [path.read_bytes() for path in files]
    good = write_video(folder / "good.mp4", moving_frames(24))

    sizes = {"input_size": 32, "num_frames": 4, "sampling_rate": 4, "item_timeout": 20.0}
    resident, named, longest = [], 0, 0.0
    for first in range(0, count, 100):
        rows = []
        for i in range(first, min(first + 100, count)):
            rng = np.random.default_rng((seed, i))
            k, other = rng.integers(len(contents)), rng.integers(len(contents))
            path = folder / f"mutant{i:05d}{files[k].suffix}"
            path.write_bytes(mutate(contents[k], contents[other], rng))
            rows.append(f"{path} 0\n")
        (folder / "train.csv").write_text("".join(rows) + f"{good} 0\n" * len(rows))
        index = VideoIndex(str(folder / "train.csv"))
        mode = ("pretrain", "finetune", "test")[first // 100 % 3]
        dataset = Kinetics(index, mode, **sizes, repeat_aug=2 if mode != "test" else 1)
        loader = VideoLoader(dataset, 1, 0, 1.0, torch.device("cpu"))
        failed = set()
        start = time.monotonic()
        for batch in loader:
            longest = max(longest, time.monotonic() - start)
            start = time.monotonic()
            failed |= batch.errors[0].keys()
        assert failed == loader.bad.keys()
        assert all(reason.startswith(f"{path}: ") for path, reason in loader.bad.items())
        assert all("mutant" in path for path in failed)
        named += len(failed)
        for path in folder.glob("mutant*"):
            path.unlink()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * 4096 / 2**20)
    return {"failed": named, "longest": longest, "resident": resident}


def run_fuzz(folder: Path, count: int, seed: int, timeout: float) -> dict:
    code = (
        "import json, pathlib, torch; from tests.test_fuzz import fuzz; torch.set_num_threads(1); "
        f"print(json.dumps(fuzz(pathlib.Path({str(folder)!r}), {count}, {seed})))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout
    )
    assert run.returncode == 0, run.stderr[-3000:]  # negative: killed by a signal
    return json.loads(run.stdout.splitlines()[-1])


def check(result: dict, count: int) -> None:
    assert count * 0.1 < result["failed"] < count  # mutations damage some files, but not all
    assert result["longest"] < 25  # seconds


def test_damaged_files_are_replaced_and_named(tmp_path):
    check(run_fuzz(tmp_path, 150, seed=1, timeout=250), 150)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_damaged_files(tmp_path):
    result = run_fuzz(tmp_path, 2000, seed=0, timeout=1700)
    check(result, 2000)
    settled = result["resident"][5]
    assert result["resident"][-1] < settled + 40, result["resident"]  # MiB
