"""Tests of lists from annotations and folders, of re-encoded copies and of broken videos."""

import contextlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from tests.test_imports import ROOT
from tests.video_files import (
    counter_frame,
    moving_frames,
    read_counter,
    write_counter_video,
    write_video,
)
from util import copies, prepare_kinetics
from util.errors import UserError
from util.kinetics import VideoIndex
from util.prepare_kinetics import Clip, DataSet, write_lists
from util.video.decode import Video, VideoError
from util.video.transcode import find_damage, transcode


def prepare(*words) -> int:
    return prepare_kinetics.main(prepare_kinetics.get_args_parser().parse_args(map(str, words)))


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.fixture
def kinetics(tmp_path) -> Path:
    """Write official annotations, and videos both in class folders and in one flat folder."""
    header = "label,youtube_id,time_start,time_end,split\n"
    (tmp_path / "train.csv").write_text(
        header + "zumba,aaa,10,20,train\nplaying tuba,b-b,0,10,train\nzumba,gone,5,15,train\n"
    )
    (tmp_path / "validate.csv").write_text(header + '"abseiling, fast",_cc,123,133,validate\n')
    touch(tmp_path / "videos/train/zumba/aaa_000010_000020.mp4")
    touch(tmp_path / "videos/b-b_000000_000010.mkv")
    touch(tmp_path / "videos/val/abseiling/_cc_000123_000133.mp4")
    touch(tmp_path / "videos/val/other/not_listed.mp4")
    return tmp_path


def test_kinetics_lists(kinetics, capsys):
    annotations = kinetics / "train.csv", kinetics / "validate.csv"
    out = kinetics / "lists"
    assert prepare("kinetics", kinetics / "videos", out, "--annotations", *annotations) == 0
    assert lines(out / "classes.txt") == ["abseiling, fast", "playing tuba", "zumba"]
    assert lines(out / "train.csv") == [
        f"{kinetics}/videos/train/zumba/aaa_000010_000020.mp4 2",
        f"{kinetics}/videos/b-b_000000_000010.mkv 1",
    ]
    assert lines(out / "val.csv") == [f"{kinetics}/videos/val/abseiling/_cc_000123_000133.mp4 0"]
    assert lines(out / "test.csv") == lines(out / "val.csv")
    assert lines(out / "missing.txt") == ["train gone_000005_000015"]
    assert "2 train, 1 val" in capsys.readouterr().out
    index = VideoIndex(str(out / "train.csv"), num_classes=3)
    assert os.path.exists(index.path(0)) and index.labels.tolist() == [2, 1]


def test_lists_beside_the_videos_are_relative(kinetics):
    prepare("kinetics", kinetics / "videos", kinetics, "--annotations", kinetics / "validate.csv")
    assert lines(kinetics / "val.csv") == ["videos/val/abseiling/_cc_000123_000133.mp4 0"]


def test_a_test_part_without_labels_is_left_out(kinetics):
    (kinetics / "test.csv").write_text("youtube_id,time_start,time_end,split\naaa,10,20,test\n")
    annotations = kinetics / "validate.csv", kinetics / "test.csv"
    prepare("kinetics", kinetics / "videos", kinetics / "o", "--annotations", *annotations)
    assert lines(kinetics / "o/test.csv") == lines(kinetics / "o/val.csv") != []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("label,id\nx,y\n", "no column time_end, time_start, youtube_id"),
        ("label,youtube_id,time_start,time_end,split\nx,aaa,ten,20,train\n", "line 2: its times"),
        ("label,youtube_id,time_start,time_end,split\nx,aaa,10,20,odd\n", "train, val or test"),
        ("label,youtube_id,time_start,time_end,split\nx,zzz,1,2,train\n", "such as train zzz_00"),
        ("label,youtube_id,time_start,time_end,split\nx,aaa,inf,20,train\n", "line 2: its times"),
        ("label,youtube_id,time_start,time_end,split\nx,aaa\n", "line 2: its times"),
        ("label,youtube_id,time_start,time_end,split\n" + 140_000 * "x", "line 2: field larger"),
        (
            "youtube_id,time_start,time_end,split\naaa,10,20,test\n",
            r"no row of .*bad\.csv has a label",
        ),
        ('label,youtube_id,time_start,time_end,split\n"a\nb",aaa,10,20,train\n', "line break"),
    ],
)
def test_bad_annotations_are_named(kinetics, text, words):
    path = kinetics / "bad.csv"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=words):
        prepare("kinetics", kinetics / "videos", kinetics / "o", "--annotations", path)
    assert not (kinetics / "o").exists()


def test_annotations_of_spreadsheets(kinetics):
    """Files with a byte-order mark, spaces after commas and line ends of Windows are read."""
    (kinetics / "train.csv").write_bytes(
        b"\xef\xbb\xbflabel, youtube_id, time_start, time_end, split\r\n"
        b'"abseiling, fast", aaa, 10, 20, train\r\nzumba , b-b, 0, 10, train\r\n'
        b'zumba, _cc, 123, 133, train\r\n "abseiling, fast", gone, 5, 15, train\r\n'
    )
    prepare("kinetics", kinetics / "videos", kinetics, "--annotations", kinetics / "train.csv")
    assert lines(kinetics / "classes.txt") == ["abseiling, fast", "zumba"]
    assert lines(kinetics / "missing.txt") == ["train gone_000005_000015"]
    assert [row.rsplit()[-1] for row in lines(kinetics / "train.csv")] == ["0", "1", "1"]


PIECES = [b" ", b"\t", b",", b'"', b"#", b"'", b"\\", b"-", b"3", b" 3", b"a", b"\xe9", b"\xff\xfe"]
PIECES += [b"\xfe\xff", b"\x0b", b"\x0c", b"\x1c", b"\x85", "\x85\xa0\u2028\ufeff".encode()]
PIECES += [character.encode() for character in "\x85\xa0\u2028\ufeffé"]


def test_every_path_is_read_as_it_was_written(tmp_path):
    """Below the lists' folder and elsewhere, and in the first line, where a file's marks stand."""
    rng, elsewhere = random.Random(0), f"{tmp_path}-elsewhere/"
    names = [*PIECES, *(b"".join(rng.choices(PIECES, k=rng.randint(2, 6))) for _ in range(600))]
    names += [name + suffix for name in names[::3] for suffix in (b".264", b"/x.mp4")]
    paths = [os.path.join(rng.choice([f"{tmp_path}/", elsewhere]), os.fsdecode(n)) for n in names]
    for chosen in (paths, *([f"{tmp_path}/{os.fsdecode(piece)}"] for piece in PIECES)):
        clips = [Clip(path, "a", "train") for path in chosen]
        write_lists(DataSet(clips, ["a"], [], {"train"}), str(tmp_path))
        for num_classes in (1, None):
            index = VideoIndex(str(tmp_path / "train.csv"), num_classes=num_classes)
            assert [index.path(i) for i in range(len(index))] == chosen
            assert not index.labels.any()


def test_only_odd_paths_are_quoted(tmp_path):
    names = ["-a b.mp4", "_c,d.mp4", "é's.mp4", "#1.avi", '"q".mp4', " lead.mp4"]
    clips = [Clip(f"{tmp_path}/{name}", "a", "train") for name in names]
    write_lists(DataSet(clips, ["a"], [], {"train"}), str(tmp_path))
    rows = [*names[:3], '"#1.avi"', '"""q"".mp4"', '" lead.mp4"']
    assert lines(tmp_path / "train.csv") == [f"{row} 0" for row in rows]


LOCALES = {
    "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin1": {"LC_ALL": "test_latin1", "PYTHONUTF8": "0"},
}


@pytest.mark.slow
@pytest.mark.parametrize("locale", LOCALES)
def test_names_are_bytes_in_every_locale(tmp_path, locale):
    """UTF-8, Latin-1 and other names, in folders, lists, official csvs, messages and copies."""
    environment = {**os.environ, **LOCALES[locale], "PYTHONPATH": str(ROOT)}
    if locale == "latin1":
        environment["LOCPATH"] = str(tmp_path)
        compiler = shutil.which("localedef")
        words = "-i", "POSIX", "-f", "ISO-8859-1", tmp_path / "test_latin1"
        if not compiler or subprocess.run([compiler, *words], capture_output=True).returncode > 1:
            pytest.skip("this machine cannot make a Latin-1 locale")
    accents = "à été".encode()  # in Latin-1, its second byte is white space
    for name in (accents + b"/\xe9.mp4", b"caf\xe9/" + accents + b".avi", b"caf\xe9/#\xe0.mp4"):
        path = tmp_path / "v" / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, moving_frames(2, 32, 32))
    (tmp_path / "v" / os.fsdecode(b"empty \xe9")).mkdir()
    touch(tmp_path / "v" / os.fsdecode(accents + b"/notes.\xe9"))
    (tmp_path / "train.txt").write_bytes(
        accents + b"/\xe9.mp4 1\ncaf\xe9/#\xe0.mp4 2\ncaf\xe9/gone\xe9.mp4 2\n"
    )
    header = b"label,youtube_id,time_start,time_end,split\n"
    (tmp_path / "train.csv").write_bytes(header + b"%b,%b,1,2,train\n" % (accents, accents))
    touch(tmp_path / "v" / os.fsdecode(accents + b"/" + accents + b"_000001_000002.mp4"))
    code = """
import sys
from util.kinetics import VideoIndex
from util.prepare_kinetics import get_args_parser, main
from util.video.decode import Video
root = sys.argv[1]
def prepare(*words):
    return main(get_args_parser().parse_args([*words]))
lists = "--train_list", f"{root}/train.txt", "--reencode", f"{root}/copies"
assert prepare("folders", f"{root}/v", f"{root}/copied", *lists) == 0
index = VideoIndex(f"{root}/copied/train.csv", num_classes=2)
for i in range(len(index)):
    assert Video(index.path(i)).num_frames == 2
assert prepare("folders", f"{root}/v", f"{root}/lists", "--val_share", "0", "--verify") == 1
assert prepare("kinetics", f"{root}/v", f"{root}/k", "--annotations", f"{root}/train.csv") == 0
"""
    words = sys.executable, "-c", code, str(tmp_path)
    run = subprocess.run(words, env=environment, capture_output=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr.decode(errors="replace")
    start = f"{tmp_path}/".encode()
    assert (tmp_path / "lists/classes.txt").read_bytes() == b"caf\xe9\n" + accents + b"\n"
    rows = b"caf\xe9/#\xe0.mp4 0", b"caf\xe9/%b.avi 0" % accents
    rows += accents + b"/%b_000001_000002.mp4 1" % accents, accents + b"/\xe9.mp4 1"
    written = (tmp_path / "lists/train.csv").read_bytes()
    assert written == b"".join(start + b"v/" + row + b"\n" for row in rows)
    written = (tmp_path / "copied/train.csv").read_bytes()
    assert written == b"".join(start + b"copies/" + rows[i] + b"\n" for i in (0, 3))
    assert (tmp_path / "copied/missing.txt").read_bytes() == b"train caf\xe9/gone\xe9.mp4\n"
    assert (tmp_path / "k/classes.txt").read_bytes() == accents + b"\n"
    assert (tmp_path / "k/train.csv").read_bytes() == start + b"v/" + rows[2][:-1] + b"0\n"


@pytest.mark.parametrize("name", ["two\nlines", "two\rlines"])
def test_line_breaks_in_names_are_refused(tmp_path, name):
    touch(tmp_path / "v" / name / "x.mp4")
    with pytest.raises(UserError, match=r"two\\[nr]lines/x\.mp4' holds a line break"):
        prepare("folders", tmp_path / "v", tmp_path)
    assert not (tmp_path / "train.csv").exists()


def test_links_are_followed_once(tmp_path):
    touch(tmp_path / "v/a/x.mp4")
    touch(tmp_path / "elsewhere/y.mp4")
    (tmp_path / "v/b").symlink_to(tmp_path / "elsewhere")
    for name in ("loop", "other"):
        (tmp_path / "v/a" / name).symlink_to("..")
    expected = [f"{tmp_path}/v/a/x.mp4", f"{tmp_path}/v/b/y.mp4"]
    assert prepare_kinetics.find_videos(str(tmp_path / "v")) == expected


LEFT = """.ipynb_checkpoints/a-checkpoint.mp4, __MACOSX/run/._a.mp4, run/._a.mp4, run/.~lock.a.mp4,
.Trashes/501/a.mp4, .Trash-1000/files/a.mp4, .git/annex/objects/a.mp4, .dvc/cache/a.mp4,
@eaDir/a.mp4/SYNOPHOTO_FILM_M.mp4, run/@eaDir/SYNOPHOTO_FILM_M.mp4, #recycle/run/a.mp4,
@Recycle/a.mp4, .@__thumb/a.mp4, $RECYCLE.BIN/S-1-5/$R1.mp4, $Recycle.Bin/a.mp4, lost+found/a.mp4,
System Volume Information/a.mp4, run/__pycache__/a.mp4, run/a.1234.tmp.mp4,
run/b.mp4.crdownload, b.mp4.download/b.mp4, run/.a.mp4.X1y2Z3""".split(",")
LEFT = [name.strip() for name in LEFT]
KEPT = "#20_clap.avi", "-dash_1_2.mp4", "@home.mp4", "_under.mp4", "a.part.mp4", "a.tmp1.mp4"


def test_what_systems_leave_is_passed_over_and_counted(tmp_path, capsys):
    for name in (*LEFT, *(f"run/{name}" for name in KEPT), "swim/b.mp4"):
        touch(tmp_path / ".hidden/v" / name)
    prepare("folders", tmp_path / ".hidden/v", tmp_path / "o", "--val_share", 0)
    rows = [f"{tmp_path}/.hidden/v/run/{name} 0" for name in KEPT]
    assert lines(tmp_path / "o/train.csv") == [*rows, f"{tmp_path}/.hidden/v/swim/b.mp4 1"]
    assert lines(tmp_path / "o/classes.txt") == ["run", "swim"]
    assert f"passed over: {len(LEFT)} hidden, system" in capsys.readouterr().out


def test_all_common_suffixes_are_videos_and_others_are_counted(tmp_path, capsys):
    videos = """
        3gp 3g2 mts m2ts m2t ts dv gif ogv ogm vob asf rm rmvb mxf f4v divx mpe m1v m2v mjpeg mjpg
        amv nut wtv ivf y4m h264 264 h265 265 hevc mp4 webm mkv avi mov m4v mpg mpeg flv wmv qt
    """.split()
    videos = [f"{i}.{x}" for suffix in videos for i, x in enumerate((suffix, suffix.title()))]
    videos += ["2.MTS", "2.MP4"]
    others = "a.jpg b.JPG c.webp sound.ogg README ../swim/a.xyz".split()
    for name in (*videos, *others):
        touch(tmp_path / "v/run" / name)
    prepare("folders", tmp_path / "v", tmp_path / "o", "--val_share", 0)
    assert len(lines(tmp_path / "o/train.csv")) == len(videos)
    out = capsys.readouterr().out
    assert "passed over: 2 .jpg, 1 without a suffix, 1 .webp, 1 .ogg, 1 .xyz" in out
    assert f"WARNING: no videos in {tmp_path}/v/swim\n" in out


@pytest.mark.parametrize("suffix", "3gp MTS ts dv gif ogv vob asf mxf h264 y4m nut".split())
def test_files_of_such_suffixes_are_read(tmp_path, suffix):
    (tmp_path / "a").mkdir()
    codecs = {"gif": "gif", "y4m": "rawvideo", "dv": "dvvideo", "ogv": "libvpx"}
    codec = codecs.get(suffix, "libx264" if suffix in ("3gp", "h264") else "mpeg2video")
    frames = moving_frames(5, *((576, 720) if suffix == "dv" else (48, 64)))
    pix_fmt = "rgb8" if suffix == "gif" else "yuv420p"
    write_video(tmp_path / f"a/x.{suffix}", frames, codec, 25, pix_fmt=pix_fmt)
    prepare("folders", tmp_path, tmp_path, "--val_share", 0)
    with Video(VideoIndex(str(tmp_path / "train.csv")).path(0)) as video:
        assert len(list(video.frames(range(5)))) == 5


def test_folder_without_videos(kinetics):
    (kinetics / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        with pytest.raises(UserError, match=folder):
            prepare("folders", kinetics / folder, kinetics / "o")


def test_ucf101_and_hmdb51_lists(tmp_path):
    for name in ("Archery/v_Archery_g01_c01", "Archery/v_Archery_g02_c01", "Bowling/v_Bowling_g01"):
        touch(tmp_path / f"videos/{name}.avi")
    (tmp_path / "trainlist01.txt").write_text("Archery/v_Archery_g02_c01.avi 1\n")
    (tmp_path / "testlist01.txt").write_text(
        "Archery/v_Archery_g01_c01.avi\nBowling/v_Bowling_g01.avi\n"
    )
    splits = (
        "--train_list",
        tmp_path / "trainlist01.txt",
        "--test_list",
        tmp_path / "testlist01.txt",
    )
    prepare("folders", tmp_path / "videos", tmp_path, *splits)
    assert lines(tmp_path / "train.csv") == ["videos/Archery/v_Archery_g02_c01.avi 0"]
    assert lines(tmp_path / "val.csv") == [
        "videos/Archery/v_Archery_g01_c01.avi 0",
        "videos/Bowling/v_Bowling_g01.avi 1",
    ]
    (tmp_path / "Archery_test_split2.txt").write_text(
        "v_Archery_g01_c01.avi 1 \nv_Archery_g02_c01.avi 0 \n"
    )
    (tmp_path / "Bowling_test_split2.txt").write_text("v_Bowling_g01.avi 2 \n")
    prepare("folders", tmp_path / "videos", tmp_path, "--hmdb_splits", tmp_path, "--hmdb_split", 2)
    assert lines(tmp_path / "train.csv") == ["videos/Archery/v_Archery_g01_c01.avi 0"]
    assert lines(tmp_path / "val.csv") == ["videos/Bowling/v_Bowling_g01.avi 1"]


def test_folders_without_lists(tmp_path):
    for c in "ab":
        for i in range(10):
            touch(tmp_path / f"plain/{c}/{i}.mp4")
            touch(tmp_path / f"parts/{'val' if i < 3 else 'train'}/{c}/{i}.mp4")
    prepare("folders", tmp_path / "plain", tmp_path, "--val_share", 0.3)
    first = [lines(tmp_path / f"{split}.csv") for split in ("train", "val")]
    assert [len(rows) for rows in first] == [14, 6]
    assert sum(row.endswith(" 1") for row in first[1]) == 3  # of each class
    prepare("folders", tmp_path / "plain", tmp_path, "--val_share", 0.3)
    assert [lines(tmp_path / f"{split}.csv") for split in ("train", "val")] == first
    prepare("folders", tmp_path / "parts", tmp_path)
    assert lines(tmp_path / "val.csv")[0] == "parts/val/a/0.mp4 0"
    assert len(lines(tmp_path / "val.csv")) == 6
    touch(tmp_path / "plain/lost.mp4")
    with pytest.raises(UserError, match=r"lost\.mp4 is not in a class folder"):
        prepare("folders", tmp_path / "plain", tmp_path)
    with pytest.raises(UserError, match="plane is no folder"):
        prepare("folders", tmp_path / "plane", tmp_path)


def test_val_share_takes_validation_videos_from_train(tmp_path, capsys):
    """The same ones as from folders of classes alone; without it, a warning names it."""
    for c in "ab":
        for i in range(10):
            touch(tmp_path / f"plain/{c}/{i}.mp4")
            touch(tmp_path / f"parts/train/{c}/{i}.mp4")
            touch(tmp_path / f"parts/test/{c}/{i}.mp4")
    prepare("folders", tmp_path / "plain", tmp_path / "o", "--val_share", 0.3)
    drawn = {s: lines(tmp_path / f"o/{s}.csv") for s in ("train", "val")}
    assert "WARNING" not in capsys.readouterr().out
    prepare("folders", tmp_path / "parts", tmp_path / "o")
    warning = "WARNING: no validation videos, so no val.csv, which main_finetune.py needs; --val_"
    assert warning in capsys.readouterr().out and not (tmp_path / "o/val.csv").exists()
    prepare("folders", tmp_path / "parts", tmp_path / "o", "--val_share", 0.3)
    for split, rows in drawn.items():
        names = [row.replace("/plain/", "/parts/train/") for row in rows]
        assert lines(tmp_path / f"o/{split}.csv") == names
    tests = [row.partition("parts/")[2] for row in lines(tmp_path / "o/test.csv")]
    assert tests == [f"test/{c}/{i}.mp4 {'ab'.index(c)}" for c in "ab" for i in range(10)]
    assert "WARNING" not in capsys.readouterr().out
    prepare("folders", tmp_path / "parts", tmp_path / "o", "--val_share", 0)  # none on purpose
    assert "WARNING" not in capsys.readouterr().out and len(lines(tmp_path / "o/train.csv")) == 20
    shutil.rmtree(tmp_path / "parts/train")  # nothing to train on, either
    prepare("folders", tmp_path / "parts", tmp_path / "o")
    assert "WARNING" not in capsys.readouterr().out and len(lines(tmp_path / "o/test.csv")) == 20


def test_val_share_without_effect_is_refused(tmp_path):
    for name in ("train/a/0", "train/a/1", "val/a/2"):
        touch(tmp_path / f"v/{name}.mp4")
    with pytest.raises(UserError, match="--val_share has no effect: there are validation videos"):
        prepare("folders", tmp_path / "v", tmp_path / "o", "--val_share", 0.5)


@pytest.mark.parametrize(
    "words",
    ["--val_share 20", "--val_share nan", "--val_share -0.1", "--crf nan", "--crf 52", "--crf -1",
     "--gop 0", "--gop 99999999999", "--short_side inf", f"--short_side 1{'0' * 400}"],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(tmp_path, words, capsys):
    touch(tmp_path / "v/a/0.mp4")
    with pytest.raises(SystemExit, match="2"):
        prepare("folders", tmp_path / "v", tmp_path / "o", *words.split())
    assert f"{words.split()[0]}: {words.split()[1]} is not a" in capsys.readouterr().err


def annotate(path: Path, *rows: str) -> Path:
    """Write an official csv from rows `LABEL ID`."""
    cells = [row.replace(" ", ",") + ",1,2\n" for row in rows]
    path.write_text("".join(["label,youtube_id,time_start,time_end\n", *cells]))
    return path


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("folders one o", "val.csv .* no video below one is for it.*--val_share"),
        ("folders split o", "val.csv .* no video below split is for it.*folder"),
        ("folders one o --train_list list --test_list gone", "val.csv .* none of its 2 videos"),
        ("folders one o --train_list list --test_list none", "val.csv .* no video .*list"),
        ("folders one o --train_list gone", "train.csv .* none of its 2 .*, such as train a/1.mp4"),
        ("kinetics k o --annotations train.csv val.csv", "val.csv .* none of its 2 .*annotations"),
        ("kinetics k o --annotations train.csv test.csv", "test.csv .* none of its 1 videos"),
        ("folders bad o --reencode copies --val_share 0", "train.csv .*broken: bad/a/0.mp4"),
    ],
)
def test_an_empty_list_that_was_asked_for_is_an_error(tmp_path, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    names = "one/a/0.mp4 split/train/a/0.mp4 split/val/a/x.txt k/x_000001_000002.mp4 bad/a/0.mp4"
    for name in names.split():
        touch(tmp_path / name)
    for name, text in (("list", "a/0.mp4\n"), ("gone", "a/1.mp4\na/2.mp4\n"), ("none", "\n")):
        (tmp_path / name).write_text(text)
    annotate(tmp_path / "train.csv", "a x")
    annotate(tmp_path / "val.csv", "a gone", "a lost")
    annotate(tmp_path / "test.csv", "a gone")
    with pytest.raises(UserError, match=reason):
        prepare(*words.split())
    assert not (tmp_path / "o").exists()


def test_lists_that_were_not_asked_for_are_not_written(tmp_path, capsys):
    """Not even left behind by an earlier call; official csvs of the same name are."""
    for name in ("a/0", "a/1", "b/0"):
        touch(tmp_path / f"v/{name}.mp4")
    touch(tmp_path / "k/x_000001_000002.mp4")
    out = tmp_path / "o"

    def written(*words) -> list[str]:
        assert prepare(*words) == 0
        names = [name for name in ("train.csv", "val.csv", "test.csv") if (out / name).exists()]
        assert capsys.readouterr().out.endswith(f"; wrote {', '.join(names)}\n")
        return names

    assert written("folders", tmp_path / "v", out) == ["train.csv", "val.csv", "test.csv"]
    assert lines(out / "val.csv")[0].endswith(" 0") and len(lines(out / "train.csv")) == 2
    assert written("folders", tmp_path / "v", out, "--val_share", 0) == ["train.csv"]
    assert written("folders", tmp_path / "v", out, "--val_share", 1) == ["val.csv", "test.csv"]
    (out / "val.csv").write_text("")  # as versions before left it
    for split, names in (("train", ["train.csv"]), ("test", ["test.csv"])):
        official = annotate(tmp_path / f"{split}.csv", "a x")
        assert written("kinetics", tmp_path / "k", out, "--annotations", official) == names
    validate, kept = annotate(tmp_path / "validate.csv", "a x"), annotate(out / "train.csv", "a x")
    text = kept.read_text()
    assert prepare("kinetics", tmp_path / "k", out, "--annotations", validate) == 0
    assert kept.read_text() == text


@pytest.mark.parametrize("stray", ["extra/a/x.mp4", "train/x.mp4"])
def test_a_stray_folder_beside_those_of_the_splits_is_named(tmp_path, stray):
    for name in ("train/a/0.mp4", "Val/a/1.mp4", stray):
        touch(tmp_path / "v" / name)
    with pytest.raises(UserError, match=f"{stray}: neither train, val nor test is in its path"):
        prepare("folders", tmp_path / "v", tmp_path)


def test_listed_names_may_hold_spaces_and_be_missing(tmp_path, capsys):
    for name in ("Apply Makeup/v 1.avi", "Archery/v_2.avi", "Archery/v5.avi", "Archery/other.avi"):
        touch(tmp_path / "videos" / name)
    train = tmp_path / "trainlist01.txt"
    train.write_text("Apply Makeup/v 1.avi 1\n\nArchery/v_2.avi 2 \r\nArchery/v 3.avi 2\n")
    (tmp_path / "testlist01.txt").write_text("Archery/v 4.avi\nArchery/v5.avi\n")
    words = "--train_list", train, "--test_list", tmp_path / "testlist01.txt"
    prepare("folders", tmp_path / "videos", tmp_path, *words)
    assert "2 train, 1 val, 1 test; 2 classes; 2 not found" in capsys.readouterr().out
    expected = ["videos/Apply Makeup/v 1.avi 0", "videos/Archery/v_2.avi 1"]
    assert lines(tmp_path / "train.csv") == expected
    assert lines(tmp_path / "missing.txt") == ["train Archery/v 3.avi", "val Archery/v 4.avi"]
    (tmp_path / "Apply Makeup_test_split1.txt").write_text("v 1.avi 1 \nv 9.avi 2 \nv 8.avi 0 \n")
    (tmp_path / "Archery_test_split1.txt").write_text("v_2.avi 1 \nv5.avi 2 \n")
    prepare("folders", tmp_path / "videos", tmp_path, "--hmdb_splits", tmp_path)
    assert lines(tmp_path / "train.csv") == expected
    assert lines(tmp_path / "missing.txt") == ["val Apply Makeup/v 9.avi"]


def test_something_something_lists(tmp_path):
    labels = {"Holding something": "1", "Dropping something onto something": "0"}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    entry = {"id": "78687", "label": "holding a cup", "template": "Holding [something]"}
    other = {"id": "5", "template": "Dropping [something] onto [something]", "placeholders": []}
    (tmp_path / "something-something-v2-train.json").write_text(json.dumps([entry]))
    (tmp_path / "something-something-v2-validation.json").write_text(json.dumps([other]))
    (tmp_path / "something-something-v2-test.json").write_text(json.dumps([{"id": "9"}]))
    for name in ("78687", "5", "9"):
        touch(tmp_path / f"20bn/{name}.webm")
    annotations = [tmp_path / f"something-something-v2-{x}.json" for x in ("train", "validation")]
    words = "--labels", tmp_path / "labels.json", "--annotations", *annotations
    prepare("ssv2", tmp_path / "20bn", tmp_path, *words)
    assert lines(tmp_path / "train.csv") == ["20bn/78687.webm 1"]
    assert lines(tmp_path / "val.csv") == ["20bn/5.webm 0"]
    assert lines(tmp_path / "classes.txt") == [
        "Dropping something onto something",
        "Holding something",
    ]


@pytest.mark.parametrize(
    ("labels", "entries", "problem"),
    [
        ({"a": "1", "b": "2"}, [], "its 2 numbers do not count from 0"),
        ({"a": "0", "b": "x"}, [], "its 2 numbers do not count from 0"),
        ({"a": "0"}, ["5"], "5 is not a video with an id"),
        ({"a": "0"}, [{"template": "a"}], "is not a video with an id"),
    ],
)
def test_odd_json_of_something_something_is_refused(tmp_path, labels, entries, problem):
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    (tmp_path / "train.json").write_text(json.dumps(entries))
    words = "--labels", tmp_path / "labels.json", "--annotations", tmp_path / "train.json"
    with pytest.raises(UserError, match=problem):
        prepare("ssv2", tmp_path, tmp_path, *words)


# --- re-encoding --------------------------------------------------------------------------------


def key_frames(path: str) -> list[int]:
    with av.open(path) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    return [i for i, packet in enumerate(packets) if packet.is_keyframe]


def test_transcoding_keeps_frames_and_times(tmp_path):
    stamps = np.cumsum([1, 2, 1, 3] * 15).tolist()
    source = write_counter_video(
        tmp_path / "a.mkv", 60, 100, 140, codec="mpeg4", fps=60, stamps=stamps
    )
    target = str(tmp_path / "b.mp4")
    assert transcode(source, target, short_side=50, gop=8) == 60
    with Video(source) as old, Video(target) as new:
        assert (new.height, new.width, new.num_frames) == (50, 70, 60)
        assert new.fps == pytest.approx(old.fps, rel=0.02)
        assert [read_counter(image) for _, image in new.frames(range(60))] == list(range(60))
    keys = key_frames(target)
    assert max(np.diff([*keys, 60])) <= 8
    with av.open(target) as container:
        times = [float(f.time or 0) for f in container.decode(video=0)]
        assert not container.streams.audio
    expected = (np.array(stamps) - stamps[0]) / 60
    np.testing.assert_allclose(times, expected, atol=0.002)  # Matroska keeps milliseconds


@pytest.mark.parametrize("rotation", [0, 90])
def test_transcoding_keeps_frames_upright_and_small_ones_small(tmp_path, rotation):
    frames = moving_frames(4, height=63, width=101)
    source = write_video(tmp_path / "a.mkv", frames, pix_fmt="yuv444p", rotation=rotation)
    target = str(tmp_path / "b.mp4")
    transcode(source, target, short_side=256, crf=1)
    with Video(source) as old, Video(target) as new:
        even = (round(old.height / 2) * 2, round(old.width / 2) * 2)
        assert (new.height, new.width) == even
        ((_, a),), ((_, b),) = old.frames([2]), new.frames([2])
        a, b = (x[:60, :60].mean((0, 1)) for x in (a, b))
        assert np.abs(a - b).max() < 12  # colours in the corner: not turned, not swapped


COLOURS = [(220, 30, 30), (30, 200, 40), (40, 50, 210), (128, 128, 128), (250, 250, 250)]
X264_709 = {"x264-params": "colormatrix=bt709:colorprim=bt709:transfer=bt709"}
VP9_709 = {"color_range": "pc", "colorspace": "bt709"}
ENCODINGS = {
    "untagged": (".mp4", {}),
    "bt709": (".mp4", {"options": X264_709}),
    "full": (".mp4", {"options": {"x264-params": "fullrange=on"}}),
    "yuvj420p": (".mp4", {"pix_fmt": "yuvj420p"}),
    "bt709_full": (".mp4", {"options": {"x264-params": "colormatrix=bt709:fullrange=on"}}),
    "bt709_10bit": (".mp4", {"pix_fmt": "yuv420p10le", "options": X264_709}),
    "bt2020": (
        ".mp4",
        {"pix_fmt": "yuv420p10le", "options": {"x264-params": "colormatrix=bt2020nc"}},
    ),
    "mjpeg": (".avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    "rgb": (".mkv", {"codec": "ffv1", "pix_fmt": "bgr0"}),
    "vp9_full": (".webm", {"codec": "libvpx-vp9", "options": VP9_709}),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("short_side", [64, 48])
def test_transcoding_keeps_colours(tmp_path, encoding, short_side):
    """Within the rounding of 8-bit video, whatever matrix and range the source has."""
    suffix, options = ENCODINGS[encoding]
    frames = [np.full((64, 96, 3), colour, np.uint8) for colour in COLOURS]
    source = write_video(tmp_path / f"a{suffix}", frames, gop=1, **options)
    target = str(tmp_path / "b.mp4")
    transcode(source, target, short_side=short_side, crf=1)
    with Video(source) as old, Video(target) as new:
        every = range(len(COLOURS))
        expected = np.array([image.mean((0, 1)) for _, image in old.frames(every)])
        colours = np.array([image.mean((0, 1)) for _, image in new.frames(every)])
    np.testing.assert_allclose(colours, expected, atol=2.1)
    with av.open(target) as container:
        context = container.streams.video[0].codec_context
        assert (context.pix_fmt, context.colorspace, context.color_range) == ("yuv420p", 6, 1)


ORIENTATIONS = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)]
ORIENTATIONS += [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)]  # mirrored


@pytest.mark.parametrize("a, b, c, d", ORIENTATIONS)
def test_transcoding_keeps_turned_and_mirrored_frames_so(tmp_path, a, b, c, d):
    source, target = tmp_path / "a.mp4", tmp_path / "b.mp4"
    write_video(source, moving_frames(2, 64, 96))
    matrix = struct.pack(">9i", *(x << 16 for x in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    content = source.read_bytes()
    place = content.index(b"tkhd") + 44
    source.write_bytes(content[:place] + matrix + content[place + len(matrix) :])
    transcode(str(source), str(target), short_side=32)
    content = target.read_bytes()
    place = content.index(b"tkhd") + 44
    assert struct.unpack(">9i", content[place : place + 36]) == struct.unpack(">9i", matrix)


def test_the_default_video_of_several_is_the_one(tmp_path):
    """The first stream is damaged, which does not matter."""
    path = str(tmp_path / "two.mkv")
    with av.open(path, "w") as container:
        for disposition in (Disposition(0), Disposition.default):
            stream = container.add_stream("mpeg4", rate=30)
            stream.width, stream.height, stream.disposition = 64, 48, disposition
        rubbish, good = container.streams.video
        for i in range(5):
            frame = av.VideoFrame.from_ndarray(counter_frame(i))
            frame.pts, frame.time_base = i, Fraction(1, 30)
            for stream in (rubbish, good):
                for packet in stream.encode(frame):
                    if stream is rubbish:
                        packet.update(bytes(packet.size))
                    container.mux(packet)
    assert find_damage(path) == ""
    assert transcode(path, str(tmp_path / "copy.mp4")) == 5


def test_titles_in_other_encodings_are_no_damage(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, moving_frames(3))
    content = path.read_bytes()
    assert b"Lavf" in content
    path.write_bytes(content.replace(b"Lavf", b"\xe9avf"))
    assert find_damage(str(path)) == ""
    assert transcode(str(path), str(tmp_path / "b.mp4")) == 3


def write_broken(path: Path) -> str:
    """Write a video that opens but is cut off: its index lists more than there is."""
    options = {"movflags": "faststart"}
    write_video(path, moving_frames(60), container_options=options)
    os.truncate(path, path.stat().st_size * 2 // 3)
    return str(path)


def write_damaged(path: Path) -> str:
    """Write a video with damaged bytes in the middle, which the decoder skips."""
    write_counter_video(path, 30, bframes=2)
    content = bytearray(path.read_bytes())
    middle = content.index(b"mdat") + 400
    content[middle : middle + 300] = b"\xff" * 300
    path.write_bytes(content)
    return str(path)


def write_concealed(path: Path) -> str:
    """Write a video with one wrong byte that decodes to its end, with a frame marked as damaged."""
    whole = Path(write_counter_video(path, 30, bframes=2)).read_bytes()
    for place in range(whole.index(b"mdat") + 400, whole.index(b"moov"), 10):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with contextlib.suppress(av.FFmpegError), av.open(str(path)) as container:
            marks = [frame.is_corrupt for frame in container.decode(video=0)]
            if any(marks):
                return str(path)
    raise AssertionError("no place found")


def test_nothing_good_is_replaced_by_something_bad(tmp_path):
    concealed = write_concealed(tmp_path / "concealed.mp4")
    broken = write_broken(tmp_path / "broken.mp4")
    damaged = write_damaged(tmp_path / "damaged.mp4")
    target = tmp_path / "out.mp4"
    target.write_bytes(b"what stood here")
    (tmp_path / "empty.mp4").touch()
    nothing = str(tmp_path / "empty.mp4"), str(tmp_path / "missing.mp4")
    for source in (*nothing, broken, damaged, concealed):
        with pytest.raises(VideoError, match=source):
            transcode(source, str(target))
    assert target.read_bytes() == b"what stood here"
    assert not list(tmp_path.glob("*.tmp*"))


def test_reencode_lists_the_copies_and_resumes(tmp_path, monkeypatch, capsys):
    for c in "ab":
        (tmp_path / "videos" / c).mkdir(parents=True)
        for i in range(3):
            write_counter_video(tmp_path / f"videos/{c}/{i}.avi", 20, 64, 96, codec="mpeg4")
    (tmp_path / "videos/a/bad.avi").write_bytes(b"no video")
    words = "folders", tmp_path / "videos", tmp_path, "--reencode", tmp_path / "small"
    words = *words, "--short_side", 32, "--val_share", 0, "--workers", 2
    done, lock, real = [], threading.Lock(), transcode

    def stop_after_two(source, target, **options):
        with lock:
            done.extend([source] * ("max_frames" not in options))  # else, it is for the estimate
        if len(done) > 2:
            raise KeyboardInterrupt
        return real(source, target, **options)

    monkeypatch.setattr(copies, "transcode", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        prepare(*words)
    assert not (tmp_path / "train.csv").exists()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "small").rglob("*.mp4")}
    assert before
    monkeypatch.setattr(copies, "transcode", real)
    assert prepare(*words) == 1  # one is broken, and said to be
    assert "bad.avi" in capsys.readouterr().out
    rows = lines(tmp_path / "train.csv")
    assert rows == [f"small/{c}/{i}.mp4 {'ab'.index(c)}" for c in "ab" for i in range(3)]
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())  # done once
    with Video(str(tmp_path / "small/b/2.mp4")) as video:
        assert (video.height, video.width, video.num_frames) == (32, 48, 20)


@pytest.mark.parametrize("with_test", [True, False])
def test_reencode_keeps_broken_videos_of_the_test(tmp_path, capsys, with_test):
    """As originals, also where test.csv repeats val.csv: tests then count as many videos."""
    splits = ("train", "val", "test") if with_test else ("train", "val")
    for split in splits:
        (tmp_path / f"v/{split}/a").mkdir(parents=True)
        write_counter_video(tmp_path / f"v/{split}/a/0.avi", 3, 64, 64, codec="mpeg4")
        (tmp_path / f"v/{split}/a/bad.avi").write_bytes(b"no video")
    words = "folders", tmp_path / "v", tmp_path, "--reencode", tmp_path / "small", "--verify"
    assert prepare(*words) == 1
    out = capsys.readouterr().out
    assert "broken videos that stay in test.csv, as the original files: 1" in out
    assert f"{len(splits)} broken files:" in out and out.count("test/a/bad.avi:") == with_test
    for split in ("train", "val"):
        assert lines(tmp_path / f"{split}.csv") == [f"small/{split}/a/0.mp4 0"]
    tested = splits[-1]
    rows = [f"small/{tested}/a/0.mp4 0", f"v/{tested}/a/bad.avi 0"]
    assert lines(tmp_path / "test.csv") == rows
    index = VideoIndex(str(tmp_path / "test.csv"), num_classes=1)
    with pytest.raises(VideoError, match=r"bad\.avi: "):
        Video(index.path(1))


def test_reencode_never_writes_over_the_source(tmp_path):
    (tmp_path / "v/a").mkdir(parents=True)
    write_counter_video(tmp_path / "v/a/0.mp4", 3)
    with pytest.raises(UserError, match=r"would overwrite .*0\.mp4"):
        words = "--val_share", 0, "--reencode", tmp_path / "v"
        prepare("folders", tmp_path / "v", tmp_path, *words)


def test_reencode_refuses_two_videos_of_one_name(tmp_path):
    for suffix in ("mp4", "avi"):
        (tmp_path / "v/a").mkdir(parents=True, exist_ok=True)
        write_counter_video(tmp_path / f"v/a/0.{suffix}", 3, codec="mpeg4")
    with pytest.raises(UserError, match="would have the same copy"):
        prepare("folders", tmp_path / "v", tmp_path, "--reencode", tmp_path / "small")


def test_verify_lists_the_broken(tmp_path, capsys):
    (tmp_path / "v/a").mkdir(parents=True)
    good = write_counter_video(tmp_path / "v/a/good.mp4", 30, bframes=2)
    broken = write_broken(tmp_path / "v/a/short.mp4")
    damaged = write_damaged(tmp_path / "v/a/damaged.mp4")
    assert find_damage(good) == ""
    assert find_damage(broken).startswith(f"{broken}: ")
    assert find_damage(damaged).startswith(f"{damaged}: ")
    assert prepare("folders", tmp_path / "v", tmp_path, "--verify", "--val_share", 0) == 1
    out = capsys.readouterr().out
    assert "1 of 3 videos can be decoded" in out
    assert "2 broken" in out and "short.mp4" in out and "damaged.mp4" in out
    assert "good.mp4" not in out
