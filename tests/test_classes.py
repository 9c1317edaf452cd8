"""Names of classes, and results that are right or refused: validation and test of a classifier."""

import csv
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_finetune
import main_test
from tests.test_scripts import FINETUNE, ROOT, call
from tests.video_files import write_video
from util import report
from util.classes import ClassNames, count_classes, match_labels, read_classes
from util.dist import SAVING
from util.errors import UserError

FRUIT = ["apple", "banana", "cherry"]
FLAGS = [flag for flag in FINETUNE if flag not in ("--num_classes", "3")]
FLAGS += ["--epochs", 1]  # the last one counts
VIEWS = "--num_clips 1 --num_crops 1 --num_workers 0 --device cpu".split()


def write_set(folder: Path, rows: list[tuple[object, object]], names: list[str] | bytes | None):
    """Write equal csvs for training, validation and test, and classes.txt."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "val", "test"):
        lines = [f"{path} {label}".strip() + "\n" for path, label in rows]
        (folder / f"{split}.csv").write_text("".join(lines))
    if names is not None:
        content = names if isinstance(names, bytes) else "\n".join(names).encode()
        (folder / "classes.txt").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def fruit(videos, tmp_path_factory) -> Path:
    """Fine-tune with classes.txt; return a folder with the data and the run `out`."""
    rows = [(videos / f"v{i}.mp4", i % 3) for i in range(6)]
    folder = write_set(tmp_path_factory.mktemp("fruit"), rows, FRUIT)
    call(main_finetune, "--path_to_data_dir", folder, "--output_dir", folder / "out", *FLAGS)
    return folder


@pytest.fixture(scope="module")
def checkpoint(fruit) -> Path:
    return fruit / "out/checkpoint-00000.pth"


def with_content(checkpoint: Path, path: Path, **content) -> Path:
    """Write a copy of a checkpoint in which some entries are others; None removes one."""
    state = torch.load(checkpoint, weights_only=True) | content
    torch.save({k: v for k, v in state.items() if v is not None}, path)
    return path


def run_test(folder: Path, checkpoint: Path, out: Path, *flags: object) -> dict[str, dict]:
    """Test on a folder; return the rows of predictions.csv by video."""
    call(main_test, "--path_to_data_dir", folder, "--finetune", checkpoint, "--output_dir", out,
         *VIEWS, *flags)  # fmt: skip
    return read_predictions(out)


def read_predictions(out: Path) -> dict[str, dict]:
    with (out / "predictions.csv").open(errors="surrogateescape") as file:
        return {row["video"]: row for row in csv.DictReader(file)}


def refusal(capsys, *argv: object, script=main_finetune, status: int = 2) -> str:
    """Return the sentence with which a script ends."""
    with pytest.raises(SystemExit) as end:
        call(script, *argv)
    assert end.value.code == status
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed


# --- classes.txt --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"run\nswim\n", ["run", "swim"]),
        (b"run\r\nswim\r\n\r\n", ["run", "swim"]),
        (b"\xef\xbb\xbfrun\nsaut \xc3\xa0 la perche", ["run", "saut à la perche"]),
        ("run\r\nsaut à la perche\r\n".encode("utf-16"), ["run", "saut à la perche"]),
        (b"\xfe\xff" + "run\nça\n".encode("utf-16-be"), ["run", "ça"]),
        (b"run\nsaut \xe0 la perche\n", ["run", "saut \udce0 la perche"]),
        ("a\x0bb\u2028c\nd\n".encode(), ["a\x0bb\u2028c", "d"]),
    ],
)
def test_names_are_read_in_any_encoding(tmp_path, content, names):
    write_set(tmp_path, [], content)
    assert read_classes(str(tmp_path)) == (names, f"{tmp_path}/classes.txt")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "line 1: not the name of a class"),
        (b"run\n\nswim\n", "line 2: not the name of a class"),
        (b"r\0u\0n\0", "line 1: not the name of a class"),
        (b"run\nswim\nrun\n", "lines 1 and 3 are the same class"),
        ("é\ne\u0301\n".encode(), "lines 1 and 2 are the same class"),
    ],
)
def test_odd_names_are_refused(tmp_path, content, problem):
    write_set(tmp_path, [], content)
    with pytest.raises(UserError, match=problem):
        read_classes(str(tmp_path))


@pytest.mark.parametrize("folder", ["lists", "lists/", "lists/.", ".", "./"])
def test_names_are_beside_the_csvs_or_above(tmp_path, monkeypatch, folder):
    (tmp_path / "lists").mkdir()
    monkeypatch.chdir(tmp_path / "lists" if folder in (".", "./") else tmp_path)
    assert read_classes(folder).names == []
    (tmp_path / "classes.txt").write_text("up\ndown\n")
    assert read_classes(folder).names == ["up", "down"]
    (tmp_path / "lists/classes.txt").write_text("left\nright\n")
    assert read_classes(folder).names == ["left", "right"]
    (tmp_path / "lists/classes.txt").unlink()
    (tmp_path / "lists/classes.txt").mkdir()  # there, but it cannot be read
    with pytest.raises(UserError, match="cannot open"):
        read_classes(folder)


def test_names_on_a_web_server(server):
    folder, address, _ = server
    assert read_classes(address).names == []
    (folder / "classes.txt").write_text("up\ndown\n")
    assert read_classes(address).names == ["up", "down"]
    with pytest.raises(UserError, match="cannot fetch"):  # which is not a file that is absent
        read_classes("http://127.0.0.1:1/lists")


def test_classes_txt_counts_the_classes(capsys):
    there, absent = ClassNames(FRUIT, "x.txt"), ClassNames([], "x.txt")
    assert count_classes(there, None) == count_classes(there, 3) == 3
    assert count_classes(absent, 7) == 7
    with pytest.raises(UserError, match=r"no x.txt to count the classes: give --num_classes"):
        count_classes(absent, None)
    with pytest.raises(UserError, match=r"--num_classes is 400, but x.txt names 3 classes"):
        count_classes(there, 400)
    assert "WARNING" not in capsys.readouterr().out
    assert count_classes(ClassNames(["all"], "x.txt"), None) == 1
    assert "WARNING: there is one class" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "known", "labels", "told"),
    [
        (FRUIT, FRUIT, None, ""),
        ([], [], None, ""),
        (FRUIT, [], None, "taken as the model's numbers, as the checkpoint does not name its"),
        ([], FRUIT, None, "taken as the model's numbers, as there is no x.txt"),
        (["cherry", "apple"], FRUIT, [2, 0], "matched by name: 2 classes here, 3 of the model"),
        (["cafe\u0301", "tea"], ["tea ", "café"], [1, 0], "matched by name"),  # from macOS
    ],
)
def test_labels_are_matched_by_name(capsys, names, known, labels, told):
    found = match_labels(ClassNames(names, "x.txt"), known, len(known) or len(names))
    assert (found if found is None else found.tolist()) == labels
    printed = capsys.readouterr().out
    assert told in printed if told else not printed


@pytest.mark.parametrize(
    ("names", "known", "problem"),
    [
        (["apple", "kiwi"], FRUIT, r"does not have 1 of the 2 classes in x.txt: kiwi; it has app"),
        (["cherry", "apple"], [], r"x.txt names 2 classes and the model has 3"),
    ],
)
def test_labels_that_nothing_explains_are_refused(names, known, problem):
    with pytest.raises(UserError, match=problem + r".*rename x.txt"):
        match_labels(ClassNames(names, "x.txt"), known, 3)


# --- training -----------------------------------------------------------------------------------


def test_names_count_the_classes_and_stay_with_the_checkpoint(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    assert content["classes"] == FRUIT
    assert content["args"]["num_classes"] == content["arguments"]["num_classes"] == 3
    assert content["model"]["head.bias"].shape == (3,)


@pytest.mark.parametrize(
    ("names", "flags", "problem"),
    [
        (FRUIT[::-1], ["--epochs", 2], "trained on other classes, or in another order"),
        (FRUIT[::-1], ["--keep_head", "--finetune", "CHECKPOINT"], "--keep_head: the head of"),
        (FRUIT, ["--num_classes", 400], "--num_classes is 400"),
        (None, [], "give --num_classes"),
    ],
)
def test_other_classes_are_refused(fruit, videos, tmp_path, capsys, names, flags, problem):
    (tmp_path / "a").mkdir()
    rows = [(videos / f"v{i}.mp4", i % 3) for i in range(6)]
    folder = write_set(tmp_path / "a/b", rows, names)
    is_resumed = flags[0:1] == ["--epochs"]
    out = fruit / "out" if is_resumed else tmp_path / "out"
    flags = [fruit / "out/checkpoint-00000.pth" if flag == "CHECKPOINT" else flag for flag in flags]
    argv = ["--path_to_data_dir", folder, "--output_dir", out, *FLAGS, *flags]
    assert problem in refusal(capsys, *argv)


def test_the_names_of_a_kept_head_are_kept(fruit, checkpoint, videos, tmp_path):
    rows = [(videos / f"v{i}.mp4", i % 3) for i in range(6)]
    folder = write_set(tmp_path / "data", rows, None)
    call(main_finetune, "--path_to_data_dir", folder, "--output_dir", tmp_path, *FLAGS,
         "--num_classes", 3, "--finetune", checkpoint, "--keep_head")  # fmt: skip
    assert torch.load(tmp_path / "checkpoint-00000.pth", weights_only=True)["classes"] == FRUIT


@pytest.mark.slow
def test_names_that_are_not_utf8_are_shown_escaped(videos, tmp_path, capsys):
    rows = [(videos / f"v{i}.mp4", i % 3) for i in range(6)]
    folder = write_set(tmp_path / "data", rows, b"run\nsaut \xe0\nswim\n")
    argv = ["--path_to_data_dir", folder, "--output_dir", tmp_path, *FLAGS]
    call(main_finetune, *argv)
    assert "WARNING: the accuracies" not in capsys.readouterr().out
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (table,) = events.Tensors("val/worst_classes/text_summary")
    assert rb"| saut \xe0 |" in table.tensor_proto.string_val[0]
    (picture,) = events.Images("val/confusion")
    assert picture.width > 402 + 24  # the names need more room than numbers
    # in any locale, the names in the files are the bytes of classes.txt
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, str(ROOT / "main_test.py"), "--path_to_data_dir", str(folder)]
    command += ["--finetune", str(tmp_path / "checkpoint-00000.pth"), "--output_dir", str(tmp_path)]
    test = subprocess.run([*command, *VIEWS], env=environment, capture_output=True, text=True)
    assert test.returncode == 0 and "top-1" in test.stdout, test.stderr
    assert b"1,saut \xe0,2,0," in (tmp_path / "classes.csv").read_bytes()


def test_tables_that_cannot_be_drawn_do_not_stop_a_run(fruit, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError("no font")

    monkeypatch.setattr("util.visualize.draw_confusion", fail)
    call(main_finetune, "--path_to_data_dir", fruit, "--output_dir", tmp_path, *FLAGS)
    assert "are not shown in TensorBoard: no font" in capsys.readouterr().out
    assert (tmp_path / "checkpoint-00000.pth").exists()


# --- testing ------------------------------------------------------------------------------------


def test_labels_of_other_folders_are_the_models(fruit, checkpoint, videos, tmp_path, capsys):
    """A folder that lacks a class has other numbers for the rest: they are matched by name."""
    whole = run_test(fruit, checkpoint, tmp_path / "whole")
    assert "matched by name" not in capsys.readouterr().out
    rows = [(videos / f"v{i}.mp4", 0 if i % 3 == 2 else 1) for i in (0, 2, 3, 5)]
    subset = write_set(tmp_path / "subset", rows, ["cherry", "apple"])
    part = run_test(subset, checkpoint, tmp_path / "part")
    printed = capsys.readouterr().out
    assert "labels are matched by name: 2 classes here, 3 of the model" in printed
    assert part == {video: row for video, row in whole.items() if row["label"] != "1"}
    for row in part.values():
        assert row["name"] == FRUIT[int(row["prediction"])]
        assert row["label_name"] == FRUIT[int(row["label"])]
        assert row["top5_names"].split("; ") == [FRUIT[int(k)] for k in row["top5"].split()]
    with np.load(tmp_path / "part/scores.npz") as scores:
        assert scores["classes"].tolist() == FRUIT
    right = sum(int(row["correct"]) for row in part.values())
    assert f"top-1 {100 * right / 4:.2f} %" in printed
    call(main_finetune, "--eval", "--path_to_data_dir", subset, "--resume", checkpoint,
         "--num_workers", 0, "--device", "cpu")  # fmt: skip
    printed = capsys.readouterr().out
    assert "matched by name" in printed and f"validation: top-1 {100 * right / 4:.2f} %" in printed


@pytest.mark.parametrize("script", [main_test, main_finetune])
@pytest.mark.parametrize(
    ("names", "known", "problem"),
    [
        (["apple", "kiwi", "cherry"], FRUIT, "does not have 1 of the 3 classes"),
        (["apple", "cherry"], None, "names 2 classes and the model has 3"),
    ],
)
def test_unknown_classes_are_refused(
    checkpoint, videos, tmp_path, capsys, script, names, known, problem
):
    folder = write_set(tmp_path, [(videos / "v0.mp4", 0)], names)
    path = with_content(checkpoint, tmp_path / "c.pth", classes=known)
    weights = ["--finetune", path] if script is main_test else ["--eval", "--resume", path]
    flags = VIEWS if script is main_test else VIEWS[4:]
    argv = ["--path_to_data_dir", folder, *weights, *flags, "--output_dir", tmp_path]
    assert problem in refusal(capsys, *argv, script=script)


def test_videos_without_labels_are_classified(fruit, checkpoint, videos, tmp_path, capsys):
    labelled = run_test(fruit, checkpoint, tmp_path)
    assert (tmp_path / "classes.csv").exists()
    rows = [(videos / f"v{i}.mp4", "") for i in range(6)]
    folder = write_set(tmp_path / "data", rows, ["of", "others"])
    capsys.readouterr()
    unlabelled = run_test(folder, checkpoint, tmp_path)
    printed = capsys.readouterr().out
    assert "has no labels, so there is no accuracy" in printed and "top-1" not in printed
    for video, row in unlabelled.items():
        assert row == labelled[video] | {"label": "", "label_name": "", "correct": ""}
    assert not (tmp_path / "classes.csv").exists()  # it would be taken for this test's
    assert np.load(tmp_path / "scores.npz")["scores"].shape == (6, 3)
    assert "test_acc1" not in json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])


@pytest.mark.parametrize("known", [FRUIT, None])
def test_files_on_the_command_line_are_classified(checkpoint, videos, tmp_path, capsys, known):
    path = with_content(checkpoint, tmp_path / "c.pth", classes=known)
    files = [videos / "v2.mp4", videos / "v0.mp4"]
    (tmp_path / "no_video.mp4").write_text("text")
    call(main_test, "--videos", *files, tmp_path / "no_video.mp4", "--finetune", path, *VIEWS,
         "--output_dir", tmp_path)  # fmt: skip
    printed = capsys.readouterr().out.splitlines()
    predictions = read_predictions(tmp_path)
    for file in files:
        row, place = predictions[str(file)], printed.index(str(file))
        assert printed[place + 1].split() == [row["score"], row["name"]]
        shown = [line.split() for line in printed[place + 1 : place + 4]]
        assert {name for _, name in shown} == set(known or "012")
        assert sum(float(score) for score, _ in shown) == pytest.approx(1, abs=2e-4)
    assert any("no_video.mp4: cannot be opened" in line for line in printed)


@pytest.mark.parametrize(
    ("flags", "problem", "status"),
    [
        (["--videos", "nowhere.mp4"], "nowhere.mp4 is no file", 2),
        (["--videos", "."], ". is a folder", 2),
        (["--videos", __file__], "none of the 1 videos of --videos could be read", 1),
        (["--videos", __file__, "--path_to_data_dir", "."], "not both", 2),
    ],
)
def test_files_that_cannot_be_classified_are_refused(
    checkpoint, tmp_path, capsys, flags, problem, status
):
    argv = [*flags, "--finetune", checkpoint, *VIEWS, "--output_dir", tmp_path]
    assert problem in refusal(capsys, *argv, script=main_test, status=status)


def test_a_missing_label_among_others_is_refused(checkpoint, videos, tmp_path, capsys):
    folder = write_set(tmp_path, [(videos / "v0.mp4", 0), (videos / "v1.mp4", "")], None)
    argv = ["--path_to_data_dir", folder, "--finetune", checkpoint, *VIEWS]
    argv += ["--output_dir", tmp_path]
    assert "test.csv, line 2: no label" in refusal(capsys, *argv, script=main_test)


def test_a_table_that_cannot_be_written_does_not_lose_the_result(
    fruit, checkpoint, tmp_path, capsys
):
    (tmp_path / "classes.csv").mkdir()
    assert len(run_test(fruit, checkpoint, tmp_path)) == 6
    printed = capsys.readouterr().out
    assert "top-1" in printed and f"WARNING: {tmp_path}/classes.csv is not written" in printed
    assert (tmp_path / "scores.npz").exists() and (tmp_path / "log.txt").exists()


@pytest.mark.parametrize("script", [main_test, main_finetune])
def test_a_file_in_place_of_the_folder_is_refused_at_once(
    fruit, checkpoint, tmp_path, capsys, script
):
    (tmp_path / "out").write_text("")
    argv = ["--path_to_data_dir", fruit, "--finetune", checkpoint, "--output_dir", tmp_path / "out"]
    printed = refusal(capsys, *argv, *(VIEWS if script is main_test else FLAGS), script=script)
    assert f"cannot create the folder {tmp_path}/out: it is a file" in printed


def test_without_a_folder_a_test_only_prints(fruit, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(main_test, "--path_to_data_dir", fruit, "--finetune", checkpoint, "--output_dir", "",
         *VIEWS)  # fmt: skip
    assert "top-1" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


# --- numbers that cannot be right ---------------------------------------------------------------


@pytest.fixture(scope="module")
def bright(checkpoint, tmp_path_factory) -> Path:
    """Write grey and white videos, and weights that overflow in half precision for white ones."""
    folder = tmp_path_factory.mktemp("bright")
    for i, level in enumerate([115, 115, 255, 255]):
        write_video(folder / f"{i}.mp4", [np.full((48, 64, 3), level, np.uint8)] * 20)
    write_set(folder, [(f"{i}.mp4", i % 2) for i in range(4)], None)
    model = torch.load(checkpoint, weights_only=True)["model"]
    model["patch_embed.proj.weight"].normal_(generator=torch.manual_seed(0)).mul_(5000)
    with_content(checkpoint, folder / "some.pth", model=model)
    model["head.weight"].fill_(float("nan"))
    with_content(checkpoint, folder / "all.pth", model=model)
    model["head.weight"].zero_()
    model["head.bias"].copy_(torch.tensor([0.0, 1.0, -torch.inf]))  # a score of 0 is a number
    with_content(checkpoint, folder / "zero.pth", model=model)
    return folder


def evaluation(bright: Path, script, weights: str, out: Path, *flags: object) -> list[object]:
    """Return the command line of a test or of --eval."""
    path, argv = bright / weights, ["--path_to_data_dir", bright, "--output_dir", out, *flags]
    if script is main_test:
        return [*argv, "--finetune", path, *VIEWS]
    return [*argv, "--eval", "--resume", path, *VIEWS[4:]]


@pytest.mark.parametrize("script", [main_test, main_finetune])
def test_scores_that_are_no_numbers_are_wrong_and_named(bright, tmp_path, capsys, script):
    call(script, *evaluation(bright, script, "some.pth", tmp_path, "--precision", "fp32"))
    assert "not numbers" not in capsys.readouterr().out
    call(script, *evaluation(bright, script, "some.pth", tmp_path, "--precision", "fp16"))
    printed = capsys.readouterr().out
    told = "2 videos whose scores are not numbers, counted as wrong:\n"
    assert f"{told}  {bright}/2.mp4\n  {bright}/3.mp4\n" in printed
    assert "top-5 50.00 %" in printed and "nan" not in printed
    if script is main_test:
        rows = list(read_predictions(tmp_path).values())
        assert [row["error"] for row in rows] == ["", "", *["scores are not numbers"] * 2]
        assert [row["prediction"] != "" for row in rows] == [True, True, False, False]


@pytest.mark.parametrize("script", [main_test, main_finetune])
def test_a_class_with_score_zero_is_no_fault(bright, tmp_path, capsys, script):
    call(script, *evaluation(bright, script, "zero.pth", tmp_path, "--precision", "fp32"))
    printed = capsys.readouterr().out
    assert "top-1 50.00 %" in printed and "not numbers" not in printed and "inf" not in printed


@pytest.mark.parametrize("script", [main_test, main_finetune])
def test_scores_of_which_none_is_a_number_are_an_error(bright, tmp_path, capsys, script):
    argv = evaluation(bright, script, "all.pth", tmp_path, "--precision", "fp32")
    printed = refusal(capsys, *argv, script=script, status=1)
    assert "the scores of all 4 readable videos" in printed and "another --precision" in printed


@pytest.mark.parametrize("evaluates", [True, False])
def test_validation_needs_a_readable_video(fruit, checkpoint, tmp_path, capsys, evaluates):
    rows = [line.split() for line in (fruit / "train.csv").read_text().splitlines()]
    folder = write_set(tmp_path / "data", [(path, label) for path, label in rows], FRUIT)
    (folder / "val.csv").write_text("nope/a.mp4 0\nnope/b.mp4 1\n")
    argv = ["--path_to_data_dir", folder, "--output_dir", tmp_path / "out", *FLAGS]
    argv += ["--eval", "--resume", checkpoint] if evaluates else []
    printed = refusal(capsys, *argv, status=1)
    assert f"none of the 2 videos of {folder}/val.csv could be read" in printed
    if not evaluates:  # the epoch is not lost: with another val.csv the same command goes on
        (folder / "val.csv").write_text((folder / "train.csv").read_text())
        for thread in threading.enumerate():
            if thread.name == SAVING:  # the end of a process would wait for it
                thread.join()
        call(main_finetune, *argv)
        assert "going on at epoch 0, step 3" in capsys.readouterr().out


def test_warned_names_an_error_without_words(capsys):
    with report.warned("x is lost"):
        raise KeyError
    assert "WARNING: x is lost: KeyError" in capsys.readouterr().out
