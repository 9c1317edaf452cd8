"""The ablations: which runs the questions need, what stops them, and what their tables say."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import ablations
from benchmarks.ablations import Plan, Run, Setting
from util.errors import UserError
from util.kinetics import VideoIndex
from util.synthetic import write_dataset

ROOT = Path(__file__).parent.parent
CLIPS = "--input_size 32 --num_frames 4 --sampling_rate 2 --device cpu --num_workers 0\n"
PRETRAIN = """--model mae_vit_tiny_patch8 --decoder_embed_dim 32 --decoder_num_heads 2
--pred_t_dim 4 --decoder_depth 1 --batch_size 4 --repeat_aug 2 --epochs 4
--warmup_epochs 1 --lr 1e-3 --vis_period 0 --mask_ratio 0.75\n"""
FINETUNE = """--model vit_tiny_patch8 --no-hflip --no-rand_aug --mixup 0 --cutmix 0
--batch_size 4 --repeat_aug 1 --epochs 1 --warmup_epochs 0 --lr 1e-3\n"""


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ablations") / "set"
    sizes = {"num_videos": 16, "num_labelled": 8, "num_val": 4, "num_test": 8}
    return write_dataset(out, **sizes, num_classes=2, size=32, num_frames=12)


@pytest.fixture
def argv(dataset, tmp_path) -> list[str]:
    (tmp_path / "pretrain.args").write_text(PRETRAIN + CLIPS)
    (tmp_path / "finetune.args").write_text(FINETUNE + CLIPS)
    words = ["--data", dataset / "finetune", "--pretrain_data", dataset / "pretrain"]
    words += ["--out", tmp_path / "out", "--jobs", 1]
    for task in ("pretrain", "finetune"):
        words += [f"--{task}_recipe", tmp_path / f"{task}.args"]
    return [*map(str, words), "--questions"]


def parse(argv: list[str], *more: str) -> Namespace:
    return ablations.get_args_parser().parse_args([*argv, *more])


def keys(*words: str) -> set[str]:
    return set(Plan(parse([*words])).runs)


def call(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        ablations.main(argv)
    return int(end.value.code or 0)


# --- which runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--epochs x0.25 --lr x2", "--epochs 4 --lr 0.004"),
        ("--epochs x0.001", "--epochs 1"),
        (f"--repeat_aug 1 {ablations.SAME}",
         "--repeat_aug 1 --epochs 32 --warmup_epochs 4 --batch_size 64 --lr 0.002"),
        (f"--repeat_aug 4 {ablations.SAME}",
         "--repeat_aug 4 --epochs 8 --warmup_epochs 1 --batch_size 16 --lr 0.002"),
        ("--finetune START", "--finetune a.pth"),
    ],
)  # fmt: skip
def test_values_are_relative_to_the_recipe(flags, words):
    recipe = Namespace(epochs=16, warmup_epochs=2.0, lr=2e-3, repeat_aug=2, batch_size=32)
    assert ablations.expand(flags, recipe, "a.pth") == words.split()


def test_a_recipe_without_the_value_is_refused():
    with pytest.raises(UserError, match="--lr x2 needs --lr in the recipe"):
        ablations.expand("--lr x2", Namespace(lr=None))


def test_questions_share_runs(argv):
    """The recipe masks 75 % and has a decoder of one block; both have the same scratch."""
    ratios, depths = keys(*argv, "mask_ratio"), keys(*argv, "decoder_depth")
    assert (len(ratios), len(depths)) == (4 * 3 + 2, 3 * 3 + 2)
    assert len(ratios & depths) == 3 + 2
    assert keys(*argv, "mask_ratio", "decoder_depth") == ratios | depths


def test_names_say_what_differs_from_the_recipe(argv):
    names = [run.name for run in Plan(parse(argv, "mask_ratio", "--seeds", "1")).runs.values()]
    assert [name.partition("videos")[2] for name in names if name.startswith("pretrain")] == [
        f"{ratio} --seed 1"
        for ratio in (" --mask_ratio 0.5", "", " --mask_ratio 0.9", " --mask_ratio 0.95")
    ]


@pytest.mark.parametrize("change", ["seed", "recipe", "data"])
def test_a_key_depends_on_what_changes_the_result(argv, tmp_path, change):
    before = keys(*argv, "decoder_depth")
    if change == "recipe":
        (tmp_path / "pretrain.args").write_text(f"{PRETRAIN} --weight_decay 0.1 {CLIPS}")
        (tmp_path / "finetune.args").write_text(f"{FINETUNE} --weight_decay 0.1 {CLIPS}")
    if change == "data":
        folder = Path(argv[1])
        for split in ("train", "val", "test"):
            rows = (folder / f"{split}.csv").read_text().replace("../", f"{folder.parent}/")
            (tmp_path / f"{split}.csv").write_text("\n".join(rows.split("\n")[::-1]))
        argv[1] = argv[3] = str(tmp_path)
    shared = keys(*argv, "decoder_depth", *(["--seeds", "1"] if change == "seed" else []))
    assert len(before) == len(shared)
    # a probe on scratch does not depend on the rate or decay of fine-tuning
    assert len(before & shared) == (1 if change == "recipe" else 0)


def test_a_seed_or_question_that_is_given_twice_counts_once(argv):
    plan = Plan(parse(argv, "decoder_depth", "decoder_depth", "--seeds", "0", "0"))
    assert {len(trials) for trials in plan.trials["decoder_depth"].values()} == {1}


def test_workers_and_printing_do_not_change_a_key(argv, tmp_path):
    before = keys(*argv, "decoder_depth")
    (tmp_path / "pretrain.args").write_text(f"{PRETRAIN} {CLIPS} --num_workers 1 --print_freq 1")
    assert keys(*argv, "decoder_depth") == before


def test_labels_are_the_first_of_each_class_in_turn():
    rows = [(f"{i}.mp4", label) for i, label in enumerate([0, 0, 0, 2, 1, 1, 2])]
    assert [path[0] for path, _ in ablations.choose_labelled(rows, 5)] == list("04315")
    assert len(ablations.choose_labelled(rows, 7)) == 7


def test_lists_that_are_written_read_back(argv, dataset, tmp_path):
    plan, odd = Plan(parse(argv, "decoder_depth")), '/a "b", #c 1.mp4'
    run = next(run for run in plan.runs.values() if run.kind == "finetune")
    run.lists = run.lists | {"val": [(odd, 1), ("https://host/x.mp4", 0)]}
    plan.write_lists(run)
    index = VideoIndex(f"{tmp_path}/out/labels_all/val.csv", num_classes=2)
    assert [index.path(i) for i in range(2)] == [odd, "https://host/x.mp4"]
    assert index.labels.tolist() == [1, 0]
    train = VideoIndex(f"{tmp_path}/out/labels_all/train.csv", num_classes=2)
    assert len(train) == 8 and Path(train.path(0)).is_file()


def test_labels_beyond_those_of_data_come_from_the_pool(argv, monkeypatch):
    settings = [Setting(str(n), None, "", n) for n in (4, 16, 17)]
    monkeypatch.setitem(ablations.QUESTIONS, "labels", ("", settings))
    plan = Plan(parse(argv, "labels"))
    trained = [run.lists["train"] for run in plan.runs.values() if run.kind == "finetune"]
    assert [sum(label for _, label in rows) for rows in trained] == [2, 8]
    assert [*plan.skipped] == ["skipped: labels, 17: there are fewer than 17 labelled videos"]
    plan.pool = plan.pool + plan.labelled["test"]  # from which no label is taken
    assert plan.trial("labels", settings[2], seed=0) == {}


@pytest.mark.slow
def test_test_videos_in_other_lists(argv, dataset, tmp_path, failing):
    """With labels for training they are refused; else every table says so. Links do not hide."""
    (tmp_path / "link").symlink_to(dataset / "videos")
    shutil.copytree(dataset, tmp_path / "set", ignore=shutil.ignore_patterns("*.mp4"))
    argv[1], argv[3] = f"{tmp_path}/set/finetune", f"{tmp_path}/set/pretrain"
    for path in (tmp_path / "set").glob("*/*.csv"):
        path.write_text(path.read_text().replace("../videos", f"{dataset}/videos"))
    rows = (tmp_path / "set/finetune/test.csv").read_text().splitlines(keepends=True)
    rows = [row.replace(f"{dataset}/videos", f"{tmp_path}/link") for row in rows]

    def add(csv: str, count: int) -> None:
        with open(tmp_path / "set" / csv, "a") as file:
            file.writelines(rows[:count])

    add("pretrain/train.csv", 3)
    add("finetune/val.csv", 1)
    assert call([*argv, "decoder_depth"]) == 0
    table = (tmp_path / "out/decoder_depth.md").read_text()
    assert "3 of 8 test videos are pre-trained on, too." in table
    assert "1 of 8 test videos are used for validation, too." in table
    add("finetune/train.csv", 2)
    with pytest.raises(UserError, match=r"2 videos of .*/test.csv are in its train.csv, too"):
        Plan(parse(argv, "decoder_depth"))


def test_start_changes_the_key_and_is_needed(argv, tmp_path, monkeypatch):
    settings = [Setting("start", None, "--finetune START")]
    monkeypatch.setitem(ablations.QUESTIONS, "initialisation", ("", settings))
    plan = Plan(parse(argv, "initialisation"))
    assert not plan.runs and "--start is not given" in next(iter(plan.skipped))
    found = []
    for content in (b"a", b"b"):
        (tmp_path / "a.pth").write_bytes(content)
        plan = Plan(parse(argv, "initialisation", "--start", str(tmp_path / "a.pth")))
        found.append(set(plan.runs))
        assert {run.kind for run in plan.runs.values()} == {"finetune", "probe"}
        assert all("from a.pth" in run.name for run in plan.runs.values())
    assert not found[0] & found[1]


@pytest.mark.parametrize("case", ["no csv", "no label", "no recipe", "no question", "flag"])
def test_bad_input_is_one_sentence(argv, tmp_path, capsys, case):
    flags, says = ["decoder_depth"], ""
    if case == "no csv":
        argv[1], says = str(tmp_path), f"cannot open {tmp_path}/train.csv"
    if case == "no label":
        for split in ("train", "val", "test"):
            (tmp_path / f"{split}.csv").write_text("a.mp4 0\nb.mp4\n")
        argv[1], says = str(tmp_path), "rows without a label"
    if case == "no recipe":
        (tmp_path / "finetune.args").unlink()
        says = "finetune.args"
    if case == "no question":
        flags, says = ["weather"], "invalid choice: 'weather'"
    if case == "flag":
        (tmp_path / "finetune.args").write_text("--nonsense 1")
        says = "unrecognized arguments: --nonsense"
    assert call([*argv, *flags]) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


# --- running ------------------------------------------------------------------------------------

# what a run does in these tests: leave the results that the scripts would
STAND_IN = """
import json, sys
from pathlib import Path
folder, status = Path(sys.argv[1]), int(sys.argv[2])
log = {"epoch": 0, "train_loss": 1.0, "val_acc1": 50.0}
(folder / "log.txt").write_text(json.dumps(log) + "\\n")
(folder / "probe.json").write_text(json.dumps({"probe_val": 50.0, "probe_test": 40.0}))
(folder / "test").mkdir(exist_ok=True)
(folder / "test/log.txt").write_text(json.dumps({"test_acc1": 60.0}) + "\\n")
print("the last line"); sys.exit(status)
"""


@pytest.fixture
def failing(monkeypatch) -> set[str]:
    """Replace the scripts by a stand-in; return the kinds of run that fail, to be filled."""
    kinds: set[str] = set()

    def commands(run: Run, workers: int) -> list[list[str]]:
        return [["-c", STAND_IN, str(run.folder), str(3 * (run.kind in kinds))]]

    monkeypatch.setattr(Run, "commands", commands)
    return kinds


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_finished_runs_are_not_repeated(argv, tmp_path, failing, capsys):
    out = tmp_path / "out"
    assert call([*argv, "decoder_depth", "--jobs", "3"]) == 0
    first = records(out)
    assert len({record["key"] for record in first}) == len(first) == 11
    with open(out / "runs.jsonl", "a") as file:
        file.write('{"key": "half a line')
    capsys.readouterr()
    assert call([*argv, "decoder_depth", "mask_ratio"]) == 0
    assert capsys.readouterr().out.count("minutes passed") == 9
    assert records(out)[:11] == first and len(records(out)) == 11 + 9
    assert call([*argv, "decoder_depth", "mask_ratio"]) == 0
    assert "minutes passed" not in capsys.readouterr().out


@pytest.mark.slow
def test_after_a_failure_the_others_go_on(argv, tmp_path, failing, capsys):
    failing.add("pretrain")
    assert call([*argv, "decoder_depth"]) == 1
    out = capsys.readouterr().out
    assert out.count("-c ended with status 3") == 3 and out.count("the last line") == 3
    assert out.count("not run, as what it starts from failed") == 6
    assert [r["run"].split()[0] for r in records(tmp_path / "out")] == ["finetune", "probe"]
    failing.clear()
    assert call([*argv, "decoder_depth"]) == 0
    assert len(records(tmp_path / "out")) == 11


@pytest.mark.slow
def test_the_table_shows_what_is_finished(argv, tmp_path, failing):
    failing.add("probe")
    assert call([*argv, "decoder_depth"]) == 1
    table = (tmp_path / "out/decoder_depth.md").read_text()
    assert re.search(r"\| --decoder_depth 4 \| 1 \| 50 \| 60, at chance \| - \| 1 \| 0", table)
    assert (tmp_path / "out/decoder_depth.png").read_bytes().startswith(b"\x89PNG")


def test_list_writes_nothing(argv, tmp_path, capsys):
    ablations.main([*argv, "decoder_depth", "--list"])
    out = capsys.readouterr().out
    # 4 epochs of 16 / 4 updates; 1 epoch of 8 / 4; 20 videos x 5 views in batches of 32
    for kind, updates in (("pretrain", 16), ("finetune", 2), ("probe", 4)):
        assert re.search(rf"to do +{updates} updates  {kind} ", out)
    assert f"11 runs, {3 * 16 + 4 * 2 + 4 * 4} updates to do" in out
    assert not (tmp_path / "out").exists()


def start_harness(argv: list[str], folder: Path) -> subprocess.Popen:
    """Ask for two settings: a decoder of two blocks and scratch. Run it in the folder."""
    code = "from benchmarks import ablations as a; a.QUESTIONS['decoder_depth'] = "
    code += "'', a.each('--decoder_depth', 2); a.main()"
    command = [sys.executable, "-u", "-c", code, *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipe)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_runs_survive_kills(argv, dataset, tmp_path):
    """Kill the harness in its first pre-training, stop it by SIGTERM, then let it end.

    A path in a recipe is relative to where the harness runs.
    """
    out, flags = tmp_path / "out", [*argv, "decoder_depth"]
    prefix = os.path.relpath(dataset / "finetune", tmp_path)
    recipe = f"{PRETRAIN} {CLIPS} --epochs 8 --print_freq 1 --path_prefix {prefix}"
    (tmp_path / "pretrain.args").write_text(recipe)
    for number, status in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        harness, printed = start_harness(flags, tmp_path), ""
        before = "".join(path.read_text() for path in out.glob("runs/*/printed.txt"))
        while "loss" not in printed:  # of the first step
            assert harness.poll() is None, harness.communicate()[0]
            time.sleep(0.05)
            printed = "".join(p.read_text() for p in out.glob("runs/*/printed.txt"))[len(before) :]
            printed = printed.partition("Epoch [")[2]
        harness.send_signal(number)
        harness.communicate(timeout=60)
        assert harness.returncode == status
        (file,) = out.glob("runs/*/printed.txt")  # the training saves and ends with the harness
        for _ in range(300):
            if file.read_text().endswith("the same command continues from here (exit status 75)\n"):
                break
            time.sleep(0.1)
        else:
            raise AssertionError(file.read_text())
        assert not (out / "runs.jsonl").exists()

    harness = start_harness(flags, tmp_path)
    text, _ = harness.communicate(timeout=400)
    assert harness.returncode == 0, text
    assert "resumed from" in file.read_text()
    found = records(out)
    assert len({record["key"] for record in found}) == len(found) == 5
    assert [record["resumed"] for record in found] == [True] + 4 * [False]
    log = [json.loads(line) for line in (file.parent / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [*range(8)]
    assert found[0]["train_loss"] == log[-1]["train_loss"]
    for record in found:
        if "test_acc1" in record:
            folder = out / "runs" / f"finetune-{record['key']}"
            tested = json.loads((folder / "test/log.txt").read_text())
            assert (tested["num_clips"], tested["num_crops"]) == (5, 1)
            assert tested["test_acc1"] == record["test_acc1"]
    again = start_harness(flags, tmp_path)
    text, _ = again.communicate(timeout=60)
    assert again.returncode == 0 and "minutes passed" not in text and records(out) == found


# --- tables and the probe -----------------------------------------------------------------------


def test_best_is_chosen_by_validation(argv):
    """Depth 2 has the best validation, depth 4 the best test."""
    plan = Plan(parse(argv, "decoder_depth", "--seeds", "0", "1"))
    for setting, trials in plan.trials["decoder_depth"].items():
        depth = setting.label.split()[-1]
        for seed, trial in enumerate(trials):
            val, test = {"2": (70, 40), "4": (60, 90)}.get(depth, (50, 30))
            scores = {"val_acc1": val, "test_acc1": test + 10 * seed, "probe_test": 80}
            for run in trial.values():
                run.record = scores | {"train_loss": 0.5, "seconds": 60, "resumed": False}
    plan.out.mkdir()
    ablations.report(plan)
    table = (plan.out / "decoder_depth.md").read_text()
    assert table.count("(best)") == 1
    assert "| --decoder_depth 2 | 2 | 70 ± 0 (70 to 70) (best) | 45 ± 7.1 (40 to 50)" in table
    assert "on 8 test videos" in table


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], "-"),
        ([61.27], "61.3"),
        ([60.0, 62.0], "61 ± 1.4 (60 to 62)"),
        ([20.0], "20, at chance"),
        ([5.1], "5.1, at chance"),
        ([4.9], "4.9"),
    ],
)
def test_spread(values, text):
    assert ablations.spread(values, chance=12.5, error=3.75) == text


def test_ridge_learns_from_train_and_chooses_by_validation():
    rng = np.random.default_rng(0)

    def split(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(3, size=count)
        features = rng.standard_normal((count, 32))
        features[:, :3] += 2 * np.eye(3)[labels]
        return 1000 * features + 5000, labels

    splits = {"train": split(60), "val": split(400), "test": split(400)}
    result = ablations.ridge(splits, 3)
    assert min(result["probe_val"], result["probe_test"]) > 70
    wrong = splits | {"test": (splits["test"][0], (splits["test"][1] + 1) % 3)}
    other = ablations.ridge(wrong, 3)  # the test has no say
    assert (other["strength"], other["probe_val"]) == (result["strength"], result["probe_val"])

    # Unreadable videos are not learnt from and count as wrong.
    splits["train"][1][:5], splits["train"][0][:5] = -1, 1e9
    splits["test"][1][:200] = -1
    assert 35 < ablations.ridge(splits, 3)["probe_test"] < 50
