"""Draw the loss, learning rate and accuracy of runs from their log.txt files.

    python -m util.plot_log output/pretrain
    python -m util.plot_log output/finetune output/scratch --out curves.png

This needs matplotlib, which `make install` and `pip install '.[plot]'` install.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import simplejson

from util.errors import UserError

Record = dict[str, Any]
# the title of each panel, and the keys of log.txt that it shows with their line styles
PANELS = (
    ("loss", {"train_loss": "-", "val_loss": "--"}),
    ("learning rate", {"train_lr": "-"}),
    ("accuracy, %", {"val_acc1": "-", "val_acc5": "--"}),
)


def read_log(run: str) -> list[Record]:
    """Read the epochs of a run, given its folder or its log.txt."""
    path = os.path.join(run, "log.txt") if os.path.isdir(run) else run
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = simplejson.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON: {line[:80]!r}") from error
        if isinstance(record, dict) and "epoch" in record:
            records.append(record)
    if not records:
        raise UserError(f"{path} has no epochs: it is not a log of pre-training or fine-tuning")
    return records


def name_runs(paths: Sequence[str]) -> list[str]:
    """Name runs by their paths, without the folders that all of them share."""
    full = [os.path.abspath(path).removesuffix("/log.txt") for path in paths]
    common = os.path.dirname(full[0]) if len(set(full)) == 1 else os.path.commonpath(full)
    return [os.path.relpath(path, common) for path in full]


def plot_logs(runs: dict[str, list[Record]], out: str) -> list[str]:
    """Draw the runs' curves over epochs into a picture file and return the titles of its panels."""
    try:
        from matplotlib.figure import Figure  # draws without a screen
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install matplotlib", status=1) from error
    found = {key for records in runs.values() for record in records for key in record}
    panels = [(title, keys) for title, keys in PANELS if found & keys.keys()]
    if not panels:
        known = ", ".join(key for _, keys in PANELS for key in keys)
        raise UserError(f"{', '.join(runs)}: none of {known} is logged")
    # Draw a panel for each title, a colour for each run.
    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, keys) in zip(grid, panels, strict=True):
        for number, (name, records) in enumerate(runs.items()):
            for key, style in keys.items():
                points = [(r["epoch"] + 1, r[key]) for r in records if key in r]
                if not points:
                    continue
                label = name if len(keys) == 1 else f"{name}: {key}"
                look = style + ("o" if len(points) == 1 else "")  # one point makes no line
                axes.plot(*zip(*points, strict=True), look, color=f"C{number}", label=label)
        axes.set(title=title, xlabel="epochs")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    try:
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not know
        raise UserError(f"cannot write {out}: {error}") from error
    return [title for title, _ in panels]


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the runs that the command line names."""
    parser = argparse.ArgumentParser(
        "python -m util.plot_log",
        description="Draw the loss, learning rate and accuracy of runs in one picture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder or log.txt of a run")
    parser.add_argument("--out", default="curves.png", help="picture file: png, svg or pdf")
    args = parser.parse_args(argv)
    try:
        runs = dict(zip(name_runs(args.runs), map(read_log, args.runs), strict=True))
        panels = plot_logs(runs, args.out)
    except UserError as error:
        print(f"plot_log: error: {error}", file=sys.stderr)
        sys.exit(error.status)
    print(f"{args.out}: {', '.join(panels)} of {', '.join(runs)}")


if __name__ == "__main__":
    main()
