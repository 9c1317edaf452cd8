"""Measure main_features.py against the bare encoder, and the time of probes of many features.

    python -m benchmarks.features --videos FOLDER     without --videos: synthetic clips
    python -m benchmarks.features --check             exit 1 below 0.9, or above two minutes

main_features.py runs as a whole, with two loader processes, but for its start: the time counts from
the second video. In turns, the encoder alone encodes as many clips that are in memory.
"""

import argparse
import os
import sys
import tempfile
import time
from statistics import median

import torch

import main_features
import models_mae
from benchmarks.loader import write_synthetic_clips
from util import features, probes
from util.args import adder, positive_int
from util.kinetics import VideoIndex
from util.prepare_kinetics import find_videos

LEAST_SPEED = 0.9  # of the encoder's
MOST_SECONDS = 120  # for probes of ViT-L's features
VIDEOS, WIDTH, CLASSES = {"train": 10_000, "val": 1000, "test": 1000}, 1024, 400


def compare(videos: list[str], model_name: str, rounds: int, folder: str) -> list[float]:
    """Return main_features.py's speed as a share of the encoder's own, for every round."""
    model = models_mae.MODELS[model_name]()
    checkpoint = {"model": model.state_dict(), "arguments": model.arguments}
    torch.save(checkpoint, f"{folder}/mae.pth")
    flags = f"--finetune {folder}/mae.pth --num_workers 2 --device cpu --precision fp32 --videos"
    args = main_features.parse_args([*flags.split(), *videos])
    model, device = main_features.build_model(args), torch.device("cpu")
    index, encode, ends = VideoIndex.of_files(videos), features.encode, []
    embed = model.patch_embed
    size = 1, embed.num_frames, embed.img_size, embed.img_size, 3
    clip = torch.randint(256, size, dtype=torch.uint8)

    def timed(*call):
        made = encode(*call)
        ends.append(time.perf_counter())
        return made

    main_features.encode, shares = timed, []
    for number in range(rounds):
        args.output_dir = f"{folder}/{number}"
        os.mkdir(args.output_dir)
        ends.clear()
        main_features.extract(args, model, "videos", index, [], device)
        whole, start = ends[-1] - ends[0], time.perf_counter()
        for _ in videos[1:]:
            encode(model, clip, "", device, args)
        bare = time.perf_counter() - start
        shares.append(bare / whole)
        clips = len(videos) - 1
        print(f"encoder {clips / bare:.2f} clips/s, main_features.py {clips / whole:.2f} clips/s")
    main_features.encode = encode
    return shares


def time_probes() -> float:
    """Return the seconds of the probes of features without tokens, on clusters with much noise."""
    generator, splits = torch.Generator().manual_seed(0), {}
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    for name, count in VIDEOS.items():
        labels = torch.randint(CLASSES, (count,), generator=generator)
        noise = 3 * torch.randn(count, WIDTH, generator=generator)
        splits[name] = probes.Split((centres[labels] + noise).unsqueeze(1), labels)
    start = time.perf_counter()
    splits = probes.prepare(splits, torch.device("cpu"))
    results = {"knn": probes.knn(splits), "linear": probes.linear(splits)}
    seconds = time.perf_counter() - start
    for name, result in results.items():
        share = result.right["test"][result.best] / VIDEOS["test"]
        print(f"{name}: {share:.1%} of test with {result.setting} {result.values[result.best]:.3g}")
    return seconds


def main() -> None:
    """Measure both, and judge them with --check."""
    parser = argparse.ArgumentParser("python -m benchmarks.features", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = adder(parser)
    add("--videos", "", "folder of videos; empty: synthetic clips")
    add("--num_videos", 12, "at most so many", positive_int)
    add("--model", "mae_vit_small_patch16", "whose encoder", choices=models_mae.MODELS)
    add("--rounds", 3, "turns of each", positive_int)
    add("--check", False, "exit 1 if a target is missed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not args.videos:
            write_synthetic_clips(folder, args.num_videos)
        videos = find_videos(args.videos or folder)[: args.num_videos]
        speed = median(compare(videos, args.model, args.rounds, folder))
    print(f"main_features.py: {speed:.3f} of the encoder's own speed (at least {LEAST_SPEED})")
    seconds = time_probes()
    print(f"probes of {VIDEOS['train']:,} features: {seconds:.0f} s (at most {MOST_SECONDS})")
    sys.exit(args.check and (speed < LEAST_SPEED or seconds > MOST_SECONDS))


if __name__ == "__main__":
    main()
