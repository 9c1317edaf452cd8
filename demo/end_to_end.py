"""Show the paper's main result in small: fine-tuning with and without pre-training.

    python -m demo.end_to_end

This writes the embedded synthetic videos, pre-trains a tiny model on all of them, fine-tunes it on
the few labelled ones, once from the pre-trained weights and once from scratch, and tests both on
several views of held-out videos. It takes 8 minutes on 2 CPU cores. Each stage runs one of the
three scripts, as from a command line. An interrupted demo continues when it is started again; a
finished one starts from the beginning.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from util.args import natural_int
from util.synthetic import write_dataset

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ("pretrain", "finetune", "scratch")
FOLDERS = (*CHECKPOINTS, "test_finetune", "test_scratch")
VIEWS = ["--num_clips", "5", "--num_crops", "1"]  # one crop covers a square video
# Half of the cores compute and half load: with more threads than cores, they wait for each other.
ENVIRONMENT = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2)), **os.environ}
MIN_TOP1, MIN_GAIN = 65.0, 20.0  # for --check, percent


class Stages:
    """Run the stages one after the other; print and time each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, title: str, script: str, *flags: str | Path) -> None:
        """Run a script and show its output; end the demo if the script fails."""
        command = [sys.executable, "-u", script, *map(str, flags)]
        print(f"\n== {title}\n$ {shlex.join(['python', *command[2:]])}", flush=True)
        start = time.perf_counter()
        status = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT).returncode
        if status:
            print(f"the demo stopped: {script} ended with status {status}", file=sys.stderr)
            sys.exit(status if status > 0 else 1)
        self.seconds[title] = time.perf_counter() - start


def newest_checkpoint(folder: Path) -> Path:
    """Return the checkpoint of the last epoch in a folder."""
    return max(folder.glob("checkpoint-*.pth"))


def read_top1(folder: Path) -> float:
    """Return the last top-1 accuracy, in percent, that main_test.py wrote."""
    return json.loads((folder / "log.txt").read_text().splitlines()[-1])["test_acc1"]


def prepare(out: Path, seed: int) -> Path:
    """Delete earlier results, unless this demo was interrupted; return the file of its state."""
    state = out / "demo.json"
    unfinished = {"seed": seed, "finished": False}
    if not (state.exists() and json.loads(state.read_text()) == unfinished):
        for name in FOLDERS:
            shutil.rmtree(out / name, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        state.write_text(json.dumps(unfinished))
    return state


def parse_args() -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.end_to_end",
        description="Pre-train, fine-tune and test a tiny model on synthetic videos.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "output/demo", help="folder of results")
    add("--data", type=Path, default=ROOT / "data/synthetic", help="folder of the videos")
    add("--seed", type=natural_int, default=0, help="seed of the training runs")
    add(
        "--check",
        action="store_true",
        help=f"exit with status 1 unless the pre-trained model reaches {MIN_TOP1:g} %% top-1 and "
        f"is {MIN_GAIN:g} points better than the one from scratch",
    )
    return parser.parse_args()


def main() -> None:
    """Run the demo from the command line."""
    args = parse_args()
    out, data, seed = args.out.absolute(), args.data.absolute(), ["--seed", str(args.seed)]
    stages = Stages()

    # Videos
    title = "Write the videos"
    print(f"== {title}: {data}", flush=True)
    start = time.perf_counter()
    try:
        write_dataset(data)
    except OSError as error:
        sys.exit(f"the demo stopped: {error}")
    stages.seconds[title] = time.perf_counter() - start
    state = prepare(out, args.seed)

    # Training
    pretrain = ["--path_to_data_dir", data / "pretrain", f"@{ROOT}/recipes/synthetic_pretrain.args"]
    finetune = ["--path_to_data_dir", data / "finetune", f"@{ROOT}/recipes/synthetic_finetune.args"]
    stages.run(
        "Pre-train on all videos, without labels",
        "main_pretrain.py",
        *pretrain,
        *seed,
        *("--output_dir", out / "pretrain"),
    )
    stages.run(
        "Fine-tune the pre-trained model on the labelled videos",
        "main_finetune.py",
        *finetune,
        *seed,
        *("--finetune", newest_checkpoint(out / "pretrain")),
        *("--output_dir", out / "finetune"),
    )
    stages.run(
        "Train the same model from scratch, with the same budget",
        "main_finetune.py",
        *finetune,
        *seed,
        *("--output_dir", out / "scratch"),
    )

    # Tests
    for name, title in (("finetune", "pre-trained"), ("scratch", "from scratch")):
        stages.run(
            f"Test on held-out videos: {title}",
            "main_test.py",
            *("--path_to_data_dir", data / "finetune"),
            *("--finetune", newest_checkpoint(out / name)),
            *("--output_dir", out / f"test_{name}"),
            *VIEWS,
        )
    state.write_text(json.dumps({"seed": args.seed, "finished": True}))

    # Times and accuracies
    print("\n== Time")
    for title, seconds in stages.seconds.items():
        print(f"{timedelta(seconds=round(seconds))}  {title}")
    print(f"{timedelta(seconds=round(sum(stages.seconds.values())))}  in all")
    pretrained, scratch = read_top1(out / "test_finetune"), read_top1(out / "test_scratch")
    print("\n== Top-1 on held-out videos")
    print(f"{pretrained:5.1f} %  pre-trained\n{scratch:5.1f} %  from scratch")
    print(f"\nCheckpoints and logs: {out}/{{{','.join(CHECKPOINTS)}}}")
    print(f"Curves: {shlex.join(['tensorboard', '--logdir', str(out), '--host', '127.0.0.1'])}")
    if args.check and (pretrained < MIN_TOP1 or pretrained - scratch < MIN_GAIN):
        sys.exit(f"check failed: {MIN_TOP1:g} % and a gain of {MIN_GAIN:g} points are expected")


if __name__ == "__main__":
    main()
