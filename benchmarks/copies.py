"""Compare recipes for copies that are cheap to decode: time, size and faithfulness.

    python -m benchmarks.copies --videos FOLDER

"decode" is the CPU time of bare decoding (benchmarks/loader.py) for a pre-training item of the copy,
divided by that of the video itself, which takes turns with it; PSNR is over all samples of all
planes. Numbers are medians over videos, sizes are sums.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import median

import av
import numpy as np
import torch

from benchmarks.loader import bare_decode, data_set, write_synthetic_clips
from util.args import adder, positive_int
from util.kinetics import Kinetics
from util.prepare_kinetics import find_videos
from util.video.decode import Video

# Three of four frames are B-frames to which no other refers, so that they need not be decoded.
DROPPABLE = {"tune": "fastdecode", "x264-params": "bframes=3:b-adapt=0:b-pyramid=none"}
STYLES = {
    "x264": {},
    "x264, no B-frames": {"bf": "0"},
    "x264, fastdecode": {"tune": "fastdecode"},
    "x264, fastdecode, no B-frames": {"tune": "fastdecode", "bf": "0"},
    "x264, fastdecode, 3 droppable B-frames": DROPPABLE,
}
OTHERS = {
    "HEVC": ("libx265", {"x265-params": "log-level=none:pools=1"}, (24, 27)),
    "HEVC, fastdecode": ("libx265", {"tune": "fastdecode", "x265-params": "log-level=none:pools=1"}, (22, 25)),
    "AV1": ("libsvtav1", {"preset": "8", "svtav1-params": "lp=1"}, (28, 34)),
    "AV1, fast-decode 2": ("libsvtav1", {"preset": "8", "svtav1-params": "lp=1:fast-decode=2"}, (28, 34)),
}
RECIPES = {
    f"{name}, crf {crf}, GOP {gop}": ("libx264", {"crf": str(crf), "g": str(gop), **options})
    for name, options in STYLES.items()
    for crf, gop in ((22, 32), (20, 32), (23, 32), (26, 32), (22, 16), (22, 64))
}
RECIPES = dict(sorted(RECIPES.items(), key=lambda x: "crf 22" not in x[0] or "GOP 32" not in x[0]))
RECIPES |= {f"{n}, crf {crf}, GOP 32": (codec, {"crf": str(crf), "g": "32", **o}) for n, (codec, o, crfs) in OTHERS.items() for crf in crfs}


def encode(source: str, target: str, codec: str, options: dict[str, str]) -> float:
    """Re-encode a video at its own size; return the CPU seconds that it takes."""
    start = time.process_time()
    with av.open(source) as old, av.open(target, "w") as new:
        stream = old.streams.video[0]
        stream.codec_context.thread_type = "NONE"
        encoder = new.add_stream(codec, rate=stream.average_rate or Fraction(30), options=options)
        encoder.width, encoder.height, encoder.pix_fmt = stream.width, stream.height, "yuv420p"
        encoder.codec_context.thread_count = 1
        base = 1 / Fraction(stream.average_rate or 30)
        encoder.codec_context.time_base = base
        for number, frame in enumerate(old.decode(stream)):
            frame = frame.reformat(format="yuv420p")
            frame.pts, frame.time_base, frame.pict_type = number, base, 0
            new.mux(encoder.encode(frame))
        new.mux(encoder.encode(None))
    return time.process_time() - start


def planes(path: str) -> Iterator[np.ndarray]:
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_type = "NONE"
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="yuv420p").astype(np.float32)


def psnr(path: str, other: str) -> float:
    errors = [float(((a - b) ** 2).mean()) for a, b in zip(planes(path), planes(other), strict=True)]
    return 10 * np.log10(255**2 / max(np.mean(errors), 1e-9))


def item(dataset: Kinetics, path: str, epoch: int):
    """Return the bare decoding of a pre-training item of a video."""
    rngs = [np.random.default_rng((0, epoch, 0, r)) for r in range(dataset.repeat_aug)]
    with Video(path) as video:
        numbers = np.stack([dataset._random_frames(video, rng) for rng in rngs])
        wanted = {video._shown[number] for number in np.unique(numbers)}
        return partial(bare_decode, path, video._runs(sorted(wanted)), wanted)


def decode_ratio(dataset: Kinetics, path: str, other: str, rounds: int) -> tuple[float, float]:
    """Return the CPU ms of items of a copy, and their ratio to those of its source."""
    spent = {path: 0.0, other: 0.0}
    for epoch in range(rounds):
        ways = {name: item(dataset, name, epoch) for name in spent}
        times = {name: [] for name in spent}
        for _ in range(3):
            for name, way in ways.items():
                start = time.process_time()
                way()
                times[name].append(time.process_time() - start)
        for name in spent:
            spent[name] += 1000 * median(times[name]) / rounds
    return spent[other], spent[other] / spent[path]


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if not args.videos:
            write_synthetic_clips(scratch, args.num_videos)
        videos = find_videos(args.videos or scratch)[: args.num_videos]
        csv_path, copy = Path(scratch, "train.csv"), f"{scratch}/copy.mp4"
        csv_path.write_text(f"{Path(videos[0]).resolve()} 0\n")
        dataset = data_set("pretrain", str(csv_path))
        print("recipe | decode ms | decode / source | size / source | PSNR | encode s")
        for name, (codec, options) in RECIPES.items():
            if args.only and not any(x in name for x in args.only):
                continue
            rows = []
            for video in videos:
                spent = encode(video, copy, codec, options)
                with av.open(video) as c:
                    size = sum(p.size for p in c.demux(video=0))
                with av.open(copy) as c:
                    own = sum(p.size for p in c.demux(video=0))
                rows.append((*decode_ratio(dataset, video, copy, args.rounds), own, size, psnr(video, copy), spent))
            ms, ratio, own, size, db, spent = zip(*rows)
            print(f"{name} | {median(ms):.1f} | {median(ratio):.3f} | {sum(own)/sum(size):.2f} | {median(db):.1f} | {median(spent):.1f}", flush=True)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add = adder(parser)
    add("--videos", "", "folder")
    add("--num_videos", 12, "n", positive_int)
    add("--rounds", 2, "n", positive_int)
    add("--only", [], "names", nargs="*")
    sys.exit(main(parser.parse_args()))
