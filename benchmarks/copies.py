"""Compare recipes for copies that are cheap to decode: CPU time, size and faithfulness.

    python -m benchmarks.copies --videos FOLDER           all recipes (half an hour for 12 clips)
    python -m benchmarks.copies --videos FOLDER --check   the default one; exit 1 below its targets

"decode" is the CPU time of bare decoding (benchmarks/loader.py) for pre-training items of the copy,
over that for the video itself, with which it takes turns. PSNR is over all samples of all planes.
These are medians over videos; "size" compares the sums of all video streams.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
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
from util.video.transcode import CHEAP

MAX_DECODE, MIN_PSNR = 0.45, 42.0
DEFAULT = "3 droppable B-frames, fastdecode"
STYLES = {  # of x264
    DEFAULT: CHEAP,
    "B-frames, fastdecode": {"tune": "fastdecode"},
    "no B-frames, fastdecode": {"tune": "fastdecode", "bf": "0"},
    "B-frames": {},
    "no B-frames": {"bf": "0"},
}
QUIET = {"x265-params": "log-level=none:pools=1"}
OTHERS = {  # encoder, options, values of crf
    "HEVC": ("libx265", QUIET, (24, 27)),
    "HEVC, fastdecode": ("libx265", {"tune": "fastdecode", **QUIET}, (22, 25)),
    "AV1": ("libsvtav1", {"preset": "8", "svtav1-params": "lp=1"}, (28, 34)),
}
RECIPES = [  # name, encoder, options, crf, GOP
    *((name, "libx264", options, crf, gop) for name, options in STYLES.items()
      for crf, gop in ((23, 32), (20, 32), (22, 32), (26, 32), (22, 16), (22, 64))),
    *((name, codec, options, crf, 32) for name, (codec, options, crfs) in OTHERS.items()
      for crf in crfs),
]  # fmt: skip


def encode(source: str, target: str, codec: str, options: dict[str, str]) -> None:
    """Re-encode a video at its own size, with frames at an even rate."""
    with av.open(source) as old, av.open(target, "w") as new:
        stream = old.streams.video[0]
        stream.codec_context.thread_type = "NONE"
        rate = stream.average_rate or Fraction(30)
        encoder = new.add_stream(codec, rate=rate, options=options)
        encoder.width, encoder.height, encoder.pix_fmt = stream.width, stream.height, "yuv420p"
        encoder.codec_context.thread_count = 1
        encoder.codec_context.time_base = 1 / rate
        for number, frame in enumerate(old.decode(stream)):
            frame = frame.reformat(format="yuv420p")
            frame.pts, frame.time_base, frame.pict_type = number, 1 / rate, 0
            new.mux(encoder.encode(frame))
        new.mux(encoder.encode(None))


def psnr(path: str, other: str) -> float:
    """Return how much two videos differ, dB."""
    errors = []
    with av.open(path) as one, av.open(other) as two:
        for frames in zip(one.decode(video=0), two.decode(video=0), strict=True):
            a, b = (frame.to_ndarray(format="yuv420p").astype(np.float32) for frame in frames)
            errors.append(float(np.square(a - b).mean()))
    return 10 * float(np.log10(255**2 / max(np.mean(errors), 1e-9)))


def stream_size(path: str) -> int:
    """Return the bytes of a video's pictures."""
    with av.open(path) as container:
        return sum(packet.size for packet in container.demux(video=0))


def bare(dataset: Kinetics, path: str, epoch: int) -> Callable[[], None]:
    """Return the bare decoding of a pre-training item of a video."""
    rngs = [np.random.default_rng((0, epoch, 0, r)) for r in range(dataset.repeat_aug)]
    with Video(path) as video:
        numbers = np.stack([dataset._random_frames(video, rng) for rng in rngs])
        wanted = {video._shown[number] for number in np.unique(numbers)}
        return partial(bare_decode, path, video._runs(sorted(wanted)), wanted)


def decode_ratio(dataset: Kinetics, path: str, copy: str, rounds: int) -> tuple[float, float]:
    """Return the CPU ms of an item of a copy, and their ratio to those of the video itself."""
    spent = {path: 0.0, copy: 0.0}
    for epoch in range(rounds):
        methods, times = {p: bare(dataset, p, epoch) for p in spent}, {p: [] for p in spent}
        for _ in range(3):
            for name, method in methods.items():
                start = time.process_time()
                method()
                times[name].append(time.process_time() - start)
        spent = {name: total + 1000 * median(times[name]) for name, total in spent.items()}
    return spent[copy] / rounds, spent[copy] / spent[path]


def main(args: argparse.Namespace) -> int:
    """Print the table; return 1 when --check finds a target missed."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if not args.videos:
            write_synthetic_clips(scratch, args.num_videos)
        videos = find_videos(args.videos or scratch)[: args.num_videos]
        csv_path, copy = Path(scratch, "train.csv"), f"{scratch}/copy.mp4"
        csv_path.write_text(f"{Path(videos[0]).resolve()} 0\n")
        dataset = data_set("pretrain", str(csv_path))
        print("| recipe | crf | GOP | decode, ms | decode | size | PSNR, dB | encode, s |")
        for name, codec, options, crf, gop in RECIPES[: 1 if args.check else None]:
            rows, options = [], {"crf": str(crf), "g": str(gop), **options}
            for video in videos:
                start = time.process_time()
                encode(video, copy, codec, options)
                seconds = time.process_time() - start
                speed = decode_ratio(dataset, video, copy, args.rounds)
                sizes = stream_size(copy), stream_size(video)
                rows.append((*speed, psnr(video, copy), seconds, *sizes))
            (ms, ratio, db, seconds), sizes = np.median(rows, 0)[:4], np.sum(rows, 0)[4:]
            line = f"{ms:.1f} | {ratio:.2f} | {sizes[0] / sizes[1]:.2f} | {db:.1f} | {seconds:.1f}"
            print(f"| {name} | {crf} | {gop} | {line} |", flush=True)
            if args.check and (ratio > MAX_DECODE or db < MIN_PSNR):
                print(f"target missed: decode {MAX_DECODE:g} at {MIN_PSNR:g} dB")
                return 1
    return 0


def get_args_parser() -> argparse.ArgumentParser:
    """Build the flags."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = adder(parser)
    add("--videos", "", "folder of videos; empty: synthetic clips")
    add("--num_videos", 12, "at most so many", positive_int)
    add("--rounds", 2, "items of every video", positive_int)
    add("--check", False, "measure only the default recipe; exit 1 below the targets")
    return parser


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
