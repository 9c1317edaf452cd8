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
from fractions import Fraction
from functools import partial
from itertools import product

import av
import numpy as np
import torch

from benchmarks.loader import RECIPES, SIZE, methods_for, write_synthetic_clips
from util.args import adder, positive_int
from util.kinetics import Kinetics, VideoIndex
from util.prepare_kinetics import find_videos
from util.video.transcode import CHEAP, transcode

MAX_DECODE, MIN_PSNR = 0.45, 42.0
STYLES = {  # of x264; the first is the default
    "3 droppable B-frames, fastdecode": CHEAP,
    "B-frames, fastdecode": {"tune": "fastdecode"},
    "no B-frames, fastdecode": {"tune": "fastdecode", "bf": "0"},
    "B-frames": {},
    "no B-frames": {"bf": "0"},
}
QUALITIES = (23, 32), (20, 32), (22, 32), (26, 32), (22, 16), (22, 64)  # crf, GOP
QUIET = {"x265-params": "log-level=none:pools=1"}
OTHERS = {  # encoder and its options, at about the same PSNR
    "HEVC": ("libx265", QUIET, (24, 27)),
    "HEVC, fastdecode": ("libx265", {"tune": "fastdecode", **QUIET}, (22, 25)),
    "AV1": ("libsvtav1", {"preset": "8", "svtav1-params": "lp=1"}, (28, 34)),
}


def encode(codec: str, options: dict[str, str], source: str, target: str, crf: int) -> None:
    """Re-encode a video at its own size, in GOPs of 32 frames, by another encoder than x264."""
    options = {"crf": str(crf), "g": "32", **options}
    with av.open(source) as old, av.open(target, "w") as new:
        film = old.streams.video[0]
        rate = film.average_rate or Fraction(30)
        film.codec_context.thread_type = "NONE"
        stream = new.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = film.height, film.width, "yuv420p"
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(old.decode(film)):
            frame = frame.reformat(format="yuv420p")
            frame.pts, frame.time_base, frame.pict_type = number, 1 / rate, 0
            new.mux(stream.encode(frame))
        new.mux(stream.encode(None))


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


def decode_ratio(path: str, copy: str, rounds: int) -> tuple[float, float]:
    """Return the CPU ms of an item of a copy, and their ratio to those of the video itself."""
    indices, spent = map(VideoIndex.of_files, ([path], [copy])), np.zeros(2)
    sets = [Kinetics(x, "pretrain", SIZE, 16, 4, **RECIPES["pretrain"]) for x in indices]
    for epoch in range(rounds):
        times = np.zeros((3, 2))
        methods = [methods_for("pretrain", s, 0, epoch, torch.empty(0))["bare"] for s in sets]
        for turn, k in np.ndindex(times.shape):
            start = time.process_time()
            methods[k]()
            times[turn, k] = 1000 * (time.process_time() - start)
        spent += np.median(times, 0)
    return spent[1] / rounds, spent[1] / spent[0]


def main() -> int:
    """Print the table; return 1 when --check finds a target missed."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = adder(parser)
    add("--videos", "", "folder of videos; empty: synthetic clips")
    add("--num_videos", 12, "at most so many", positive_int)
    add("--rounds", 2, "items of every video", positive_int)
    add("--check", False, "measure only the default recipe; exit 1 below the targets")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if not args.videos:
            write_synthetic_clips(scratch, args.num_videos)
        videos = find_videos(args.videos or scratch)[: args.num_videos]
        copy = f"{scratch}/copy.mp4"
        print("| recipe | crf | GOP | decode, ms | decode | size | PSNR, dB | encode, s |")
        recipes = [(name, *q, partial(transcode, short_side=None, gop=q[1], options=options))
                   for (name, options), q in product(STYLES.items(), QUALITIES)]  # fmt: skip
        recipes += [(name, crf, 32, partial(encode, codec, options))
                    for name, (codec, options, crfs) in OTHERS.items() for crf in crfs]  # fmt: skip
        for name, crf, gop, copied in recipes[: 1 if args.check else None]:
            rows = []
            for video in videos:
                start = time.process_time()
                copied(source=video, target=copy, crf=crf)
                seconds = time.process_time() - start
                sizes = stream_size(copy), stream_size(video)
                speed = decode_ratio(video, copy, args.rounds)
                rows.append((*speed, psnr(video, copy), seconds, *sizes))
            (ms, ratio, db, seconds), sizes = np.median(rows, 0)[:4], np.sum(rows, 0)[4:]
            line = f"{ms:.1f} | {ratio:.2f} | {sizes[0] / sizes[1]:.2f} | {db:.1f} | {seconds:.1f}"
            print(f"| {name} | {crf} | {gop} | {line} |", flush=True)
            if args.check and (ratio > MAX_DECODE or db < MIN_PSNR):
                print(f"target missed: decode {MAX_DECODE:g} at {MIN_PSNR:g} dB")
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
