"""Ask the paper's questions of any data set: sets of small runs, with a table and a plot for each.

    python -m benchmarks.ablations --data SET/finetune_512 --pretrain_data SET/pretrain --list
    python -m benchmarks.ablations --data data/mine --questions mask_ratio labels --seeds 0 1 2

A run is a subprocess: main_pretrain.py, main_finetune.py with main_test.py, or a probe (ridge
regression on the frozen encoder). It writes to OUT/runs/NAME and, once finished, adds a line to
OUT/runs.jsonl. Questions share runs that have the same flags, lists of videos and seed; if the
videos themselves change, give another --out. The same command continues after any kind of stop.
OUT/QUESTION.md and .png show the runs that are finished so far.
"""

import ctypes
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch

import main_finetune
import main_pretrain
from models_vit import VisionTransformer
from util.args import adder, clip_options, compared, natural_int, positive_int
from util.classes import read_classes
from util.dist import get_device
from util.errors import UserError
from util.file_io import is_remote, write_atomically
from util.kinetics import NO_LABEL, Kinetics, VideoIndex
from util.loader import VideoLoader, available_cpus
from util.plot_log import read_log
from util.run import ending, lock_folder
from util.synthetic import ROOT
from util.video.transforms import channels_first
from util.weights import MODEL_FLAGS


class Setting(NamedTuple):
    """A row of a table: flags that are added to those of the recipes."""

    label: str
    pretrain: str | None = ""  # None: no pre-training here
    finetune: str | None = ""  # None: only the probe
    labels: int = 0  # labelled training videos; 0: all of --data


def each(flags: str, *values: object, more: str = "") -> list[Setting]:
    """Return a setting of the pre-training for each value of the last flag."""
    return [Setting(f"{flags} {value}", f"{flags} {value} {more}") for value in values]


# In these flags, xN is N times the recipe's value, same_clips the value that keeps the product with
# --repeat_aug as it is in the recipe, and START the checkpoint of --start.
SAME = "--epochs same_clips --warmup_epochs same_clips --batch_size same_clips --lr x1"
RATES = ("--layer_decay 1", "--layer_decay 0.75", "--layer_decay 0.5", "--lr x0.5", "--lr x2")
BOTH = {"pre-trained": "", "scratch": None}
SCRATCH = Setting("scratch", None)  # every question without a setting from scratch gets this one
QUESTIONS: dict[str, tuple[str, list[Setting]]] = {
    "mask_ratio": ("Share of masked patches", each("--mask_ratio", 0.5, 0.75, 0.9, 0.95)),
    "mask_type": ("Patches masked together", [
        *each("--mask_type", "random", "tube", "block"),
        *each("--mask_type time --mask_ratio", 0.5, 0.75)]),
    "target": ("Target", each("--target", "patch", "channel", "pixels", "hog", "motion")),
    "decoder_depth": ("Depth of the decoder", each("--decoder_depth", 1, 2, 4)),
    "repeats": ("Clips of a loaded video (as many clips per update and in all)",
                each("--repeat_aug", 1, 2, 4, more=SAME)),
    "epochs": ("Epochs of pre-training, relative to the recipe's",
               [Setting(n, f"--epochs {n} --warmup_epochs {n}") for n in ("x0.25", "x1", "x2")]),
    "frame_distance": ("Distance between the frames of a clip", [
        Setting(f"{rate}, {name}", flags if flags is None else rate, rate)
        for rate in ("--sampling_rate 2", "--sampling_rate 4", "--sampling_rate 6")
        for name, flags in BOTH.items()]),
    "labels": ("Labelled videos", [
        Setting(f"{n}, {name}", flags, "", n)
        for n in (32, 128, 512, 2048) for name, flags in BOTH.items()]),
    "initialisation": ("Initialisation", [
        Setting("pre-trained"), Setting("--start, pre-trained further", "--finetune START"),
        Setting("--start as it is", None, "--finetune START"), SCRATCH]),
    "adaptation": ("Adaptation of the encoder", [
        Setting(f"{name}, {how or 'probe'}", flags, how)
        for name, flags in BOTH.items() for how in (None, *RATES)]),
}  # fmt: skip
SCRIPTS = {"pretrain": main_pretrain, "finetune": main_finetune, "probe": main_finetune}
VIEWS = {"num_clips": 5, "num_crops": 1}  # of a test and a probe
PROBE = f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
PROBE += "from benchmarks.ablations import probe; probe(sys.argv[1:])"
Array = np.ndarray
UNNAMED = {"path_to_data_dir", "path_prefix", "finetune"}  # a key has what they lead to
Rows = list[tuple[str, int]]  # paths and labels
Trials = dict["Setting", list[dict[str, "Run"]]]  # a setting's runs by kind, for each seed

# --- runs ---------------------------------------------------------------------------------------


def expand(flags: str, recipe: Namespace, start: str = "") -> list[str]:
    """Split flags into words, with values in place of xN, same_clips and START."""
    words = flags.split()
    for i, word in enumerate(words):
        factor = float(word[1:]) if re.fullmatch(r"x[\d.]+", word) else None
        if word == "same_clips":
            factor = recipe.repeat_aug / int(words[words.index("--repeat_aug") + 1])
        if word == "START":
            words[i] = start
        if factor is None:
            continue
        value = getattr(recipe, words[i - 1][2:])
        if value is None:
            raise UserError(f"{words[i - 1]} {word} needs {words[i - 1]} in the recipe")
        whole = isinstance(value, int)
        words[i] = str(max(1, round(value * factor))) if whole else f"{value * factor:g}"
    return words


def read_rows(folder: str, split: str, prefix: str) -> Rows:
    """Return the rows of a csv, with absolute paths."""
    index = VideoIndex(os.path.join(folder, f"{split}.csv"), prefix)
    paths = [index.path(i) for i in range(len(index))]
    paths = [path if is_remote(path) else os.path.abspath(path) for path in paths]
    return list(zip(paths, index.labels.tolist(), strict=True))


def real(path: str) -> str:
    """Return where a local path leads."""
    return path if is_remote(path) else os.path.realpath(path)


def choose_labelled(rows: Rows, count: int) -> Rows:
    """Return `count` rows: the first of each class, then the second of each, and so on."""
    classes: dict[int, Rows] = {label: [] for label in sorted({label for _, label in rows})}
    for row in rows:
        classes[row[1]].append(row)
    return [row for turn in zip_longest(*classes.values()) for row in turn if row][:count]


@dataclass(eq=False)
class Run:
    """A training with its test, or a probe. Runs with equal keys have equal results."""

    kind: str
    name: str
    key: str
    flags: list[str]
    args: Namespace  # the flags, parsed
    lists: dict[str, Rows]
    folder: Path
    parent: "Run | None"  # the pre-training it starts from
    record: dict[str, Any] | None = None  # its line of runs.jsonl, once it is finished

    @property
    def checkpoint(self) -> str:
        return str(self.folder / f"checkpoint-{self.args.epochs - 1:05d}.pth")

    @property
    def updates(self) -> int:
        """The cost; for a probe, batches of 32 views."""
        if self.kind == "probe":
            return math.ceil(sum(map(len, self.lists.values())) * VIEWS["num_clips"] / 32)
        batch = self.args.batch_size * self.args.accum_iter
        return self.args.epochs * (len(self.lists["train"]) // batch)

    def commands(self, workers: int) -> list[list[str]]:
        """Return what Python runs in turn; `workers` load videos if the recipe does not say."""
        workers = workers if self.args.num_workers is None else self.args.num_workers
        more = ["--num_workers", str(workers), "--output_dir"]
        start = ["--finetune", self.parent.checkpoint] if self.parent else []
        flags = [*self.flags, *start, *more, str(self.folder)]
        if self.kind == "probe":
            return [["-c", PROBE, *flags]]
        train = [f"{ROOT}/main_{self.kind}.py", *flags, "--keep_last", "1", "--keep_every", "0"]
        test = [f"{ROOT}/main_test.py", "--finetune", self.checkpoint, *more, f"{self.folder}/test"]
        test += ["--path_to_data_dir", self.args.path_to_data_dir, "--device", self.args.device]
        test += ["--precision", self.args.precision] if self.args.precision else []
        test += [word for name, n in VIEWS.items() for word in (f"--{name}", str(n))]
        return [train, test] if self.kind == "finetune" else [train]

    def metrics(self) -> dict[str, float]:
        """Read the results that the scripts have written."""
        if self.kind == "probe":
            return json.loads((self.folder / "probe.json").read_text())
        log = read_log(str(self.folder))
        found = {"train_loss": log[-1]["train_loss"]}
        if self.kind == "finetune":
            val = [line["val_acc1"] for line in log]
            test = read_lines(self.folder / "test/log.txt")[-1]["test_acc1"]
            found |= {"val_acc1": val[-1], "test_acc1": test}
        return found


class Plan:
    """The runs that the questions need, each once, and the trials of every setting."""

    def __init__(self, args: Namespace):
        self.out, self.start = Path(args.out).absolute(), args.start and os.path.abspath(args.start)
        if self.start and not os.path.isfile(self.start):
            raise UserError(f"--start {args.start} is no file")
        paths = {"pretrain": args.pretrain_recipe, "finetune": args.finetune_recipe}
        self.recipes = {kind: f"@{os.path.abspath(path)}" for kind, path in paths.items()}
        self.recipes["probe"] = self.recipes["finetune"]
        self.base = {kind: self.parse(kind, recipe) for kind, recipe in self.recipes.items()}
        prefix = self.base["finetune"].path_prefix
        self.labelled = {x: read_rows(args.data, x, prefix) for x in ("train", "val", "test")}
        labels = {label for rows in self.labelled.values() for _, label in rows}
        if NO_LABEL in labels:
            raise UserError(f"the csvs of {args.data} have rows without a label")
        self.num_classes = len(read_classes(args.data).names) or max(labels) + 1
        self.pool_dir = os.path.abspath(args.pretrain_data or args.data)
        self.pool = read_rows(self.pool_dir, "train", self.base["pretrain"].path_prefix)
        self.runs: dict[str, Run] = {}
        self.skipped: dict[str, None] = {}  # sentences
        self.overlaps: list[str] = []  # sentences, for the tables, too
        self.compare_lists(args.data)
        self.trials: dict[str, Trials] = {name: {} for name in args.questions}
        # One seed of all questions before the next, so that a short night has results for each.
        for seed, name in product(dict.fromkeys(args.seeds), dict.fromkeys(args.questions)):
            settings = QUESTIONS[name][1]
            scratch = [] if any(s.pretrain is None for s in settings) else [SCRATCH]
            for setting in settings + scratch:
                if trial := self.trial(name, setting, seed):
                    self.trials[name].setdefault(setting, []).append(trial)
        self.records: list[Any] = []

    def compare_lists(self, folder: str) -> None:
        """Refuse test videos that train.csv labels; note other overlaps."""
        rows = {"pre-trained on": self.pool, **self.labelled}
        found = {name: {real(path) for path, _ in x} for name, x in rows.items()}
        test = found.pop("test")
        if twice := test & found.pop("train"):
            raise UserError(f"{len(twice)} videos of {folder}/test.csv are in its train.csv, too")
        for name, paths in found.items():
            if both := test & paths:
                use = "used for validation" if name == "val" else name
                self.overlaps.append(f"{len(both)} of {len(test)} test videos are {use}, too.")

    def read_records(self) -> None:
        """Find out which runs are finished."""
        self.records = read_lines(self.out / "runs.jsonl")
        for record in self.records:
            if record["key"] in self.runs:
                self.runs[record["key"]].record = record

    def parse(self, kind: str, *words: str) -> Namespace:
        """Parse flags as the script of a run does."""
        return SCRIPTS[kind].parse_args(["--path_to_data_dir", "-", *words])

    def trial(self, question: str, setting: Setting, seed: int) -> dict[str, Run]:
        """Plan the runs of a setting; if something is missing, say so in `skipped`, return {}."""
        lists, how, trial, parent, why = self.labelled, setting.finetune, {}, None, ""
        if not self.start and "START" in f"{setting.pretrain} {how}":
            why = "--start is not given"
        if count := setting.labels:
            held_out = {real(path) for path, _ in lists["val"] + lists["test"]}
            pool = [row for row in self.pool if real(row[0]) not in held_out]
            known, sources = range(self.num_classes), (lists["train"], pool)
            fit = [x for x in sources if len(x) >= count and all(n in known for _, n in x)]
            lists = lists | {"train": choose_labelled(fit[0], count) if fit else []}
            why = why if fit else f"there are fewer than {count} labelled videos"
        if why:
            self.skipped[f"skipped: {question}, {setting.label}: {why}"] = None
            return {}
        folder = f"{self.out}/labels_{setting.labels or 'all'}"
        if setting.pretrain is not None:
            parent = self.add("pretrain", setting.pretrain, seed, {"train": self.pool})
            trial["pretrain"] = parent
        if how is not None:
            trial["finetune"] = self.add("finetune", how, seed, lists, folder, parent)
        if how is None or not re.search("START|--sampling_rate", how):  # no matter to a probe
            how = ""
        return trial | {"probe": self.add("probe", how, seed, lists, folder, parent)}

    def add(
        self, kind: str, flags: str, seed: int, lists: dict[str, Rows], folder: str = "",
        parent: Run | None = None,
    ) -> Run:  # fmt: skip
        """Return the run with these flags; an equal one that is there already is used."""
        base = self.base[kind]
        words = expand(flags, base, self.start)
        words += ["--seed", str(seed), "--path_to_data_dir", folder or self.pool_dir]
        words += ["--num_classes", str(self.num_classes)] if folder else []
        args = self.parse(kind, self.recipes[kind], *words)
        named = {"model", *MODEL_FLAGS} if kind == "probe" else compared(args).keys() - UNNAMED
        values = {flag: vars(args)[flag] for flag in sorted({"seed", *named})}
        start = getattr(args, "finetune", "") and Path(args.finetune).read_bytes()
        start = start and hashlib.sha256(start).hexdigest()
        identity = [kind, values, lists, start, parent and parent.key, VIEWS]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:10]
        source = os.path.basename(args.finetune) if start else parent.key if parent else "scratch"
        source = f" from {source}" if start or kind != "pretrain" else ""
        new = [(k, v) for k, v in values.items() if k != "num_classes" and v != vars(base)[k]]
        name = f"{kind} {key}{source}, {len(lists['train'])} videos"
        name += "".join(f" --{flag} {value}" for flag, value in new)
        words, where = [self.recipes[kind], *words], self.out / "runs" / f"{kind}-{key}"
        run = Run(kind, name, key, words, args, lists, where, parent)
        return self.runs.setdefault(key, run)

    def write_lists(self, run: Run) -> None:
        """Write the csvs of labelled videos, with all paths in quotes (see DATASET.md)."""
        os.makedirs(run.args.path_to_data_dir, exist_ok=True)
        for split, rows in run.lists.items():
            lines = ['"' + path.replace('"', '""') + f'" {label}\n' for path, label in rows]
            write(f"{run.args.path_to_data_dir}/{split}.csv", lines)


# --- running ------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON lines of a file, without a last one that was cut off."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def write(path: str, lines: list[str]) -> None:
    """Write a text file, whole or not at all."""
    write_atomically(path, lambda file: file.write(os.fsencode("".join(lines))))


def die_with_parent() -> None:
    """Let Linux send SIGTERM to this process when the harness is killed; training then saves."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def work(run: Run, cores: int) -> Iterator[None]:
    """Run the commands of a run in turn and yield while they run; closing this stops them."""
    began, printed = time.time(), run.folder / "printed.txt"
    resumed = printed.exists()
    run.folder.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": str(cores)}
    for command in run.commands(cores):
        with open(printed, "ab") as out:
            start = {"env": env, "stdin": subprocess.DEVNULL, "stdout": out}
            start |= {"stderr": subprocess.STDOUT, "preexec_fn": die_with_parent}
            process = subprocess.Popen([sys.executable, "-u", *command], **start)
        try:
            while process.poll() is None:
                yield
        finally:
            process.terminate()
            process.wait()
        if process.returncode:
            end = "\n  ".join(printed.read_text(errors="replace").splitlines()[-5:])
            script = os.path.basename(command[0])
            status = f"{script} ended with status {process.returncode}"
            raise UserError(f"{status}; {printed} ends with:\n  {end}")
    run.record = {"key": run.key, "run": run.name, "seed": run.args.seed, **run.metrics()}
    run.record |= {"seconds": time.time() - began, "updates": run.updates, "resumed": resumed}


def minutes_left(runs: list[Run], jobs: int) -> str:
    """Estimate from the updates of what is not finished and the times of what is, by kind."""
    done = [(run.kind, run.record["seconds"], run.updates) for run in runs if run.record]
    seconds = 0.0
    for run in runs:
        if not run.record:
            alike = [x for x in done if x[0] == run.kind] or done
            rate = sum(x[1] for x in alike) / max(sum(x[2] for x in alike), 1)
            seconds += rate * run.updates
    return f"about {seconds / jobs / 60:.0f} minutes left" if done else "no estimate yet"


def execute(plan: Plan, jobs: int) -> int:
    """Run what is not finished, `jobs` at a time; return 1 if something failed, else 0."""
    runs, began = list(plan.runs.values()), time.time()
    waiting, active, lost = [run for run in runs if not run.record], {}, set()
    try:
        while waiting or active:
            for run in [*waiting]:
                if run.parent in lost:
                    print(f"not run, as what it starts from failed: {run.name}", flush=True)
                    lost.add(run)
                elif len(active) < jobs and (not run.parent or run.parent.record):
                    number = len(runs) - len(waiting) + 1
                    passed = f"{(time.time() - began) / 60:.0f} minutes passed"
                    left = minutes_left(runs, jobs)
                    print(f"run {number} of {len(runs)}; {passed}, {left}; {run.name}", flush=True)
                    if run.kind != "pretrain":
                        plan.write_lists(run)
                    active[run] = work(run, max(1, available_cpus() // jobs))
                else:
                    continue
                waiting.remove(run)
            time.sleep(0.1)
            for run in [*active]:
                try:
                    next(active[run])
                    continue
                except StopIteration:
                    plan.records.append(run.record)
                    lines = [f"{json.dumps(record)}\n" for record in plan.records]
                    write(f"{plan.out}/runs.jsonl", lines)
                    report(plan, run)
                except UserError as error:
                    print(f"FAILED: {run.name}: {error}", flush=True)
                    lost.add(run)
                del active[run]
    finally:
        for job in active.values():
            job.close()
    return int(bool(lost))


# --- tables and plots ---------------------------------------------------------------------------


def results(trials: list[dict[str, Run]], kind: str, name: str) -> list[float]:
    """Return a metric of the finished runs of a setting, one per seed."""
    found = [trial[kind].record or {} for trial in trials if kind in trial]
    return [record[name] for record in found if record.get(name) is not None]


def spread(values: list[float], chance: float = -1, error: float = 0) -> str:
    """Write mean, deviation and range, and whether the mean is within two errors of chance."""
    if not values:
        return "-"
    text = f"{fmean(values):.3g}"
    if len(values) > 1:
        text += f" ± {stdev(values):.2g} ({min(values):.3g} to {max(values):.3g})"
    return f"{text}, at chance" if abs(fmean(values) - chance) <= 2 * error else text


def report(plan: Plan, run: Run | None = None) -> None:
    """Write the tables and plots of all questions, or of those that a run belongs to."""
    num_test, chance = len(plan.labelled["test"]), 1 / plan.num_classes
    error = 100 * math.sqrt(chance * (1 - chance) / num_test)
    columns = "setting | seeds | val top-1 | test top-1: mean ± sd (range) | probe"
    for name, settings in plan.trials.items():
        if run and not any(run in x.values() for trials in settings.values() for x in trials):
            continue
        val = {s: results(trials, "finetune", "val_acc1") for s, trials in settings.items()}
        best = max((s for s in val if val[s]), key=lambda s: fmean(val[s]), default=None)
        lines = [f"# {QUESTIONS[name][0]}", "", f"| {columns} | pre-training loss | minutes |"]
        lines.append("|" + "---|" * 7)
        points: dict[str, list[float]] = {}
        for setting, trials in settings.items():
            tests = results(trials, "finetune", "test_acc1")
            probes = results(trials, "probe", "probe_test")
            points[setting.label] = probes if setting.finetune is None else tests
            done = [[r.record for r in x.values() if r.record] for x in trials]
            times = [[r["seconds"] / 60 for r in x if not r["resumed"]] for x in done]
            minutes = spread([sum(x) for x in times if x])
            mark = " (best)" if setting is best else ""
            cells = [setting.label, str(len(points[setting.label])), spread(val[setting]) + mark]
            cells += [spread(x, 100 * chance, error) for x in (tests, probes)]
            cells += [spread(results(trials, "pretrain", "train_loss")), minutes]
            lines.append(f"| {' | '.join(cells)} |")
        p = fmean([x for values in points.values() for x in values] or [100 * chance]) / 100
        se = 100 * math.sqrt(p * (1 - p) / num_test)
        note = (
            f"Top-1 is in percent, on {num_test} test videos. The standard error of a run is about "
            f"sqrt(p (1 - p) / n), {se:.1f} points at {100 * p:.0f} %. A mean within "
            f"{2 * error:.1f} points of {100 * chance:.3g} % is at chance. The best setting is "
            "chosen by the last validation alone. All seeds have the same labelled videos. "
            "Losses compare only for equal targets and masks. Minutes leave out resumed runs."
        )
        lines += ["", " ".join([note, *plan.overlaps])]
        write(f"{plan.out}/{name}.md", [f"{line}\n" for line in lines])
        plot(f"{plan.out}/{name}.png", QUESTIONS[name][0], points)


def plot(path: str, title: str, points: dict[str, list[float]]) -> None:
    """Draw the test top-1 of every seed and their means; a line and a band for scratch."""
    try:
        from matplotlib.figure import Figure  # draws without a screen
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install matplotlib", status=1) from error
    figure = Figure(figsize=(2 + 0.9 * len(points), 4), layout="constrained")
    axes = figure.subplots()
    for x, values in enumerate(points.values()):
        axes.plot([x] * len(values), values, "o", color="C0", alpha=0.5)
        axes.plot([x] * bool(values), [fmean(values)] if values else [], "_", color="C0", ms=24)
    if scratch := points.get(SCRATCH.label):
        axes.axhline(fmean(scratch), color="C1", linestyle="--", label=SCRATCH.label)
        axes.axhspan(min(scratch), max(scratch), color="C1", alpha=0.15)
        axes.legend(fontsize="small")
    axes.set_xticks(range(len(points)), list(points), rotation=30, ha="right", fontsize="small")
    axes.set(title=title, ylabel="test top-1, %")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


# --- the probe ----------------------------------------------------------------------------------


@torch.no_grad()
def read_features(model: VisionTransformer, args: Namespace, split: str) -> tuple[Array, Array]:
    """Return features [V, D], means over tokens and views, and labels [V] of a split.

    A video that cannot be read has the label NO_LABEL.
    """
    device = get_device(args.device)
    index = VideoIndex(f"{args.path_to_data_dir}/{split}.csv", "", args.num_classes)
    options: dict[str, Any] = {**clip_options(args), **VIEWS}
    dataset = Kinetics(index, "test", **options)
    features, labels = [], index.labels.copy()
    for row, batch in enumerate(VideoLoader(dataset, 1, args.num_workers, 1.0, device)):
        clips = channels_first(batch.clips.to(device).flatten(0, 1))  # uint8 (V, C, T, H, W)
        features.append(model.forward_features(clips).mean(dim=(0, 1)).double().cpu().numpy())
        labels[row] = NO_LABEL if batch.errors[0] else labels[row]
    return np.stack(features), labels


def ridge(splits: dict[str, tuple[Array, Array]], num_classes: int) -> dict[str, float]:
    """Fit a linear classifier to train, choose its strength by val, and return all top-1s in %."""
    x, y = (array[splits["train"][1] >= 0] for array in splits["train"])
    mean, std = x.mean(axis=0), x.std(axis=0) + 1e-6
    x, targets = (x - mean) / std, np.eye(num_classes)[y]
    centre, found = targets.mean(axis=0), []
    for strength in 10.0 ** np.arange(4, -4, -1):  # of equally good ones, the strongest is taken
        gram = x.T @ x / len(x) + strength * np.eye(x.shape[1])
        w = np.linalg.solve(gram, x.T @ (targets - centre) / len(x))
        top1 = {"strength": strength}
        for split, (features, labels) in splits.items():
            right = ((features - mean) / std @ w + centre).argmax(axis=1) == labels
            top1[f"probe_{split}"] = 100 * float(right.mean())
        found.append(top1)
    return max(found, key=lambda top1: top1["probe_val"])


def probe(argv: Sequence[str]) -> None:
    """Classify by ridge regression on the frozen encoder that main_finetune.py would start from."""
    with ending("probe"):
        args = main_finetune.parse_args(argv)
        model = main_finetune.build_model(args)
        if args.finetune:
            main_finetune.load_pretrained(model, args, [])
        model.to(get_device(args.device)).eval()
        splits = {split: read_features(model, args, split) for split in ("train", "val", "test")}
        write(f"{args.output_dir}/probe.json", [json.dumps(ridge(splits, args.num_classes))])


# --- command line -------------------------------------------------------------------------------


def get_args_parser() -> ArgumentParser:
    """Build the flags."""
    parser = ArgumentParser(
        "python -m benchmarks.ablations",
        description="Small runs that answer the paper's questions on any data set",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    add = adder(parser)
    add("--data", None, "folder of labelled train.csv, val.csv and test.csv", required=True)
    add("--pretrain_data", "", "folder of the train.csv for pre-training; empty: --data")
    add("--out", "output/ablations", "folder of runs, tables and plots")
    add("--start", "", "file of a pre-trained model, for the question initialisation")
    for task in ("pretrain", "finetune"):
        add(f"--{task}_recipe", f"{ROOT}/recipes/ablation_{task}.args", "flags of all such runs")
    add("--questions", list(QUESTIONS), "what to ask", nargs="+", choices=list(QUESTIONS))
    add("--seeds", [0], "seeds of every run", natural_int, nargs="+")
    text = "runs at once, which share the cores; more runs use cores better than more threads of "
    jobs = 1 if torch.cuda.is_available() else available_cpus()
    add("--jobs", jobs, text + "a tiny model, but need more memory", positive_int)
    add("--list", False, "print every run and its updates, then exit")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not finished and write tables and plots."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with ending("ablations"):
        args = get_args_parser().parse_args(argv)
        plan = Plan(args)
        if not args.list:
            os.makedirs(plan.out, exist_ok=True)
            lock_folder(str(plan.out), 10)
        plan.read_records()  # another harness may have written some until now
        for line in (*plan.skipped, *plan.overlaps):
            print(line)
        if args.list:
            for run in plan.runs.values():
                state = "finished" if run.record else "to do"
                print(f"{state:8} {run.updates:7} updates  {run.name}")
            total = sum(run.updates for run in plan.runs.values() if not run.record)
            return print(f"{len(plan.runs)} runs, {total} updates to do")
        report(plan)
        sys.exit(execute(plan, args.jobs))


if __name__ == "__main__":
    main()
