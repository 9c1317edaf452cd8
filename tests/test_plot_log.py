"""Tests of util/plot_log.py: curves of several runs in one picture."""

import builtins
from pathlib import Path

import pytest
import simplejson
from PIL import Image

from util import plot_log
from util.errors import UserError

PRETRAIN = {"train_loss": 0.9, "train_lr": 1e-3, "train_grad_norm": 0.1}
FINETUNE = {
    "train_loss": 2.0,
    "train_lr": 1e-3,
    "val_loss": 1.5,
    "val_acc1": 40.0,
    "val_acc5": 90.0,
}


def write_run(folder: Path, record: dict, epochs: int = 3) -> str:
    folder.mkdir(parents=True)
    lines = [simplejson.dumps({"epoch": epoch} | record) for epoch in range(epochs)]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    return str(folder)


def fails(capsys, *argv: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        plot_log.main(list(argv))
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return caught.value.code, err


def test_curves_of_pretraining_and_finetuning_share_a_picture(tmp_path, capsys):
    runs = [write_run(tmp_path / "p", PRETRAIN), write_run(tmp_path / "f", FINETUNE)]
    out = tmp_path / "curves.png"
    plot_log.main([runs[0], f"{runs[1]}/log.txt", "--out", str(out)])
    assert capsys.readouterr().out == f"{out}: loss, learning rate, accuracy, % of p, f\n"
    picture = Image.open(out).convert("RGB")
    assert picture.size == (1620, 432)
    colours = {colour for _, colour in picture.getcolors(1 << 24)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # a line of each run


def test_what_is_drawn_is_what_was_logged(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "legend", lambda self, **_: drawn.append(self))
    runs = {"a": plot_log.read_log(write_run(tmp_path / "a", PRETRAIN)),
            "b": plot_log.read_log(write_run(tmp_path / "b", FINETUNE, epochs=1))}  # fmt: skip
    titles = plot_log.plot_logs(runs, str(tmp_path / "x.svg"))
    assert titles == ["loss", "learning rate", "accuracy, %"]
    lines = {line.get_label(): line.get_xydata().tolist() for axes in drawn for line in axes.lines}
    assert lines["a: train_loss"] == [[1, 0.9], [2, 0.9], [3, 0.9]]
    assert lines["b: val_acc5"] == [[1, 90.0]]
    assert "a: val_acc1" not in lines
    assert plot_log.plot_logs({"a": runs["a"]}, str(tmp_path / "y.pdf")) == titles[:2]


def test_names_are_paths_without_what_they_share():
    assert plot_log.name_runs(["out/x/log.txt", "out/y"]) == ["x", "y"]
    assert plot_log.name_runs(["runs/a/finetune", "runs/b/finetune"]) == [
        "a/finetune",
        "b/finetune",
    ]
    assert plot_log.name_runs(["runs/a"]) == ["a"]


def test_problems_end_in_one_sentence(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "p", PRETRAIN)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert fails(capsys, str(empty))[0] == 2
    status, text = fails(capsys, run, str(tmp_path / "nowhere"))
    assert status == 2 and f"cannot read {tmp_path}/nowhere: No such file" in text
    (empty / "log.txt").write_text('{"test_acc1": 80.0}\n')  # main_test.py's
    assert "has no epochs" in fails(capsys, str(empty))[1]
    (empty / "log.txt").write_text('{"epoch": 0}\nrubbish\n')
    assert "log.txt, line 2 is not JSON: 'rubbish'" in fails(capsys, str(empty))[1]
    (empty / "log.txt").write_text('{"epoch": 0}\n')
    assert "none of train_loss" in fails(capsys, str(empty))[1]
    for out in (tmp_path / "no/x.png", tmp_path / "x.abc"):
        assert f"cannot write {out}" in fails(capsys, run, "--out", str(out))[1]

    real_import = builtins.__import__

    def without_matplotlib(name, *args):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(UserError, match="plots need matplotlib: pip install matplotlib"):
        plot_log.plot_logs({"p": plot_log.read_log(run)}, str(tmp_path / "x.png"))
    assert fails(capsys, run)[0] == 1
