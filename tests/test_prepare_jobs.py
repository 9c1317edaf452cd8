"""Tests of copies in shards, made here or by jobs: plans, kills, full disks, broken videos."""

import contextlib
import errno
import fcntl
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests.test_imports import ROOT
from tests.test_kills import family
from tests.test_prepare import lines, prepare, write_damaged
from tests.video_files import moving_frames, write_counter_video, write_video
from util import copies
from util.errors import UserError
from util.kinetics import VideoIndex
from util.video.decode import Video
from util.video.source import find_member
from util.video.transcode import find_damage, transcode

ODD = sorted(
    [b"a b.avi", b'"q" #1.avi', "\u00e9".encode() + b".avi", b"\xe9 \xff.avi", b"x@1+2.avi"]
)
SMALL = ["--short_side", 40, "--shard_mb", 0.02]


def make_videos(folder: Path, splits=("train", "val"), num: int = 7) -> Path:
    """Write a data set of two classes, with one broken video in each split."""
    for s, split in enumerate(splits):
        for c in "ab":
            (folder / split / c).mkdir(parents=True)
            for i in range(num):
                frames = moving_frames(12, 130, 176, seed=100 * s + 10 * "ab".index(c) + i)
                options = {"codec": "mpeg4"}
                write_video(folder / split / c / f"{i}.avi", frames, **options)
        (folder / split / "a/bad.avi").write_bytes(b"no video")
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return make_videos(tmp_path_factory.mktemp("videos") / "v")


def command(videos: Path, out: Path, *words) -> list[str]:
    """Return a command line that packs copies to OUT/shards; its lists have relative paths."""
    words = ("folders", videos, out, "--reencode", "--pack", out / "shards", *SMALL, *words)
    return [sys.executable, "-m", "util.prepare_kinetics", *map(str, words)]


def run(*words) -> int:
    return prepare(*command(*words)[3:])


def start(*words) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command(*words), env=environment, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def contents(out: Path) -> dict[str, bytes]:
    """Read the lists and the shards of a data set."""
    paths = [*out.glob("*.csv"), *out.glob("*.txt"), *out.glob("shards/*.tar")]
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def whole(videos, tmp_path_factory) -> dict[str, bytes]:
    """Pack the videos undisturbed, in one process; return the files."""
    out = tmp_path_factory.mktemp("whole")
    assert run(videos, out, "--workers", 1) == 1  # two videos are broken
    files = contents(out)
    assert len(files) > 10
    return files


# --- what is packed -----------------------------------------------------------------------------


def test_shards_hold_the_copies_of_their_split_once(videos, whole, tmp_path, capsys):
    """Broken videos are named and left out; test.csv repeats val.csv, and has the broken one."""
    assert run(videos, tmp_path, "--workers", 3, "--verify") == 1
    out = capsys.readouterr().out
    assert contents(tmp_path) == whole  # whatever --workers and --verify
    assert "28 of 29 videos can be decoded" in out and "2 broken files:" in out
    assert out.count("train/a/bad.avi: ") == out.count("val/a/bad.avi: ") == 1
    assert "stay in test.csv, as the original files: 1" in out
    val, test = lines(tmp_path / "val.csv"), lines(tmp_path / "test.csv")
    assert set(test) - set(val) == {f"{videos}/val/a/bad.avi 0"} and set(val) < set(test)
    for split, number in (("train", 14), ("val", 14)):
        index = VideoIndex(str(tmp_path / f"{split}.csv"), num_classes=2)
        assert len(index) == number
        for i in range(number):
            member = find_member(index.path(i))
            assert Path(member.shard).name.startswith(f"{split}-0000")
            assert f"/{'ab'[index.labels[i]]}/" in f"/{member.name}"
            with Video(index.path(i)) as video:
                assert (video.height, video.num_frames) == (40, 12)
    shards = sorted((tmp_path / "shards").glob("*.tar"))
    names = []
    for path in shards:
        with tarfile.open(path) as tar:
            names += tar.getnames()
    expected = [f"{s}/{c}/{i}.mp4" for s in ("train", "val") for c in "ab" for i in range(7)]
    assert names == expected
    assert len(shards) > 4 and max(path.stat().st_size for path in shards) < 40_000
    assert not list((tmp_path / "shards").glob(".*"))  # nothing is left behind


def test_originals_are_packed_as_they_are(tmp_path):
    """Names with any bytes, links to other places, one video in two lists, a link to nowhere."""
    (tmp_path / "v/a b").mkdir(parents=True)
    for i, name in enumerate(ODD):
        video = write_counter_video(tmp_path / f"elsewhere{i}.avi", 5 + i, codec="mpeg4")
        (tmp_path / "v/a b" / os.fsdecode(name)).symlink_to(video)
    (tmp_path / "v/a b/gone.avi").symlink_to("nowhere")
    listed = [b"a b/" + name for name in (*ODD[:3], b"gone.avi")]
    (tmp_path / "train.txt").write_bytes(b"".join(b"%b 1\n" % name for name in listed))
    (tmp_path / "test.txt").write_bytes(b"".join(b"a b/%b\n" % name for name in ODD[3:]))
    lists = "--train_list", tmp_path / "train.txt", "--test_list", tmp_path / "test.txt"
    words = "folders", tmp_path / "v", tmp_path, "--pack", tmp_path / "p", *lists
    for _ in range(2):  # the second call finds all done
        assert prepare(*words) == 1
        for split, part in (("train", range(3)), ("val", range(3, 5)), ("test", range(3, 5))):
            index = VideoIndex(str(tmp_path / f"{split}.csv"))
            members = [find_member(index.path(i)) for i in range(len(index))]
            assert [os.fsencode(m.name) for m in members] == [b"a b/" + ODD[i] for i in part]
            for i, member in zip(part, members, strict=True):
                content = Path(member.shard).read_bytes()[member.offset :][: member.size]
                assert content == (tmp_path / f"elsewhere{i}.avi").read_bytes()
    assert sorted(path.name for path in (tmp_path / "p").glob("*.tar")) == [
        "train-000000.tar",
        "val-000000.tar",
    ]


def test_a_test_part_of_its_own_has_its_own_shards(tmp_path):
    make_videos(tmp_path / "v", ("train", "val", "test"), num=1)
    assert run(tmp_path / "v", tmp_path) == 1
    rows = [row.partition("@")[0] for row in lines(tmp_path / "test.csv")]
    first, last = (f"shards/test-000000.tar/test/{c}/0.mp4" for c in "ab")
    assert rows == [first, "v/test/a/bad.avi 0", last]


def test_a_small_shard_mb_gives_every_video_a_shard(videos, tmp_path):
    assert run(videos, tmp_path, "--shard_mb", 1e-6) == 1
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 30  # two are empty
    assert len(lines(tmp_path / "train.csv")) == 14


# --- before it starts ---------------------------------------------------------------------------


def test_dry_run_says_what_it_takes_and_writes_nothing(videos, tmp_path, capsys):
    assert run(videos, tmp_path / "o", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "30 of 30 videos to copy" in out and " CPU-hours" in out and " free" in out
    assert not (tmp_path / "o").exists()
    assert prepare("folders", videos, tmp_path / "o", "--dry_run", "--verify") == 0
    assert "14 train" not in capsys.readouterr().out and not (tmp_path / "o").exists()


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of 100 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("flags", [["--pack", "DISK/p"], ["--reencode", "DISK/r"]])
def test_a_disk_that_is_too_small_is_refused(videos, tmp_path, small_disk, flags):
    flags = [flag.replace("DISK", str(small_disk)) for flag in flags]
    with pytest.raises(UserError, match=r"/disk/. needs about [\d.]+[kM]B, and its disk has 102kB"):
        prepare("folders", videos, tmp_path / "o", *flags)
    assert not list(small_disk.iterdir()) and not (tmp_path / "o").exists()


def test_a_full_disk_makes_no_video_broken(videos, tmp_path, small_disk, monkeypatch):
    """The disk fills on the way: an error, and no list without the rest of the videos."""
    monkeypatch.setattr(copies, "tell_costs", lambda *_: None)
    with pytest.raises(OSError, match="No space left on device"):
        prepare("folders", videos, tmp_path / "o", "--reencode", small_disk / "r", "--crf", 0)
    assert not (tmp_path / "o").exists()
    with pytest.raises(OSError, match="No space left on device"):
        transcode(str(videos / "train/a/0.avi"), str(small_disk / "x.mp4"), crf=0)


@pytest.mark.parametrize("work", ["find_damage(path)", "transcode(path, path + '.copy.mp4')"])
def test_a_process_without_descriptors_makes_no_video_broken(videos, work):
    path = str(videos / "train/a/0.avi")
    code = f"""if True:
        import resource
        from util.video.transcode import find_damage, transcode
        path, files = {path!r}, []
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        try:
            while True:
                files.append(open(path))
        except OSError:
            pass
        try:
            print("broken:", {work})
        except OSError as error:
            print("machine:", error)
    """
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.startswith("machine: [Errno 24] Too many open files"), run.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--crf", 30], "--crf was 23, is 30.0"),
        (["--shard_mb", 5], "--shard_mb was 0.02, is 5.0"),
        (["--val_share", 1], "0.mp4 was in train, .* bytes, is in val"),
        ("add", "a/new.mp4 was absent, is in train"),
        ("remove", "a/0.mp4 was in train, .* bytes, is absent"),
        ("grow", r"a/0.mp4 was in train, \d+ bytes, is in train, \d+ bytes"),
    ],
)
def test_an_old_plan_that_does_not_fit_is_refused(tmp_path, change, words):
    (tmp_path / "v/a").mkdir(parents=True)
    for i in range(2):
        path = tmp_path / f"v/a/{i}.mp4"
        write_counter_video(path, 5)
    share = ["--val_share", 0]
    assert run(tmp_path / "v", tmp_path, *share) == 0
    before = contents(tmp_path)
    if change == "add":
        write_counter_video(tmp_path / "v/a/new.mp4", 5)
    elif change == "remove":
        (tmp_path / "v/a/0.mp4").unlink()
    elif change == "grow":
        write_counter_video(tmp_path / "v/a/0.mp4", 50)
    else:
        share += change
    with pytest.raises(UserError, match=rf"plan.json is of a call with other .*{words}.*delete"):
        run(tmp_path / "v", tmp_path, *share)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--reencode", "--reencode needs a folder"),
        ("--reencode r --pack p", "with --pack it takes no folder"),
        ("--reencode r --cluster local", "--cluster has no effect without --pack"),
        ("--pack p --jobs 3", "--jobs has no effect without --cluster"),
        ("--reencode r --shard_mb 5", "--shard_mb has no effect without --pack"),
        ("--pack p.tar", "may not end with .tar"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(videos, tmp_path, monkeypatch, flags, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=reason):
        prepare("folders", videos, "o", *flags.split())
    assert not list(tmp_path.iterdir())


# --- going on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["tar", "json"])
def test_lost_or_damaged_shards_are_made_again(videos, whole, tmp_path, lost):
    run(videos, tmp_path)
    shards = tmp_path / "shards"
    times = {path: path.stat().st_mtime_ns for path in shards.glob("*.tar")}
    (shards / f"train-000001.{lost}").unlink()
    os.truncate(shards / "val-000000.tar", 5000)
    os.remove(tmp_path / "train.csv")
    assert run(videos, tmp_path) == 1
    assert contents(tmp_path) == whole
    again = {path.name for path, t in times.items() if path.stat().st_mtime_ns != t}
    assert again == {"train-000001.tar", "val-000000.tar"}


def test_verify_of_shards_that_are_there(videos, tmp_path, capsys):
    (tmp_path / "v/a").mkdir(parents=True)
    write_counter_video(tmp_path / "v/a/good.mp4", 30, bframes=2)
    damaged = write_damaged(tmp_path / "v/a/damaged.mp4")
    words = "folders", tmp_path / "v", tmp_path, "--pack", tmp_path / "p", "--val_share", 0
    assert prepare(*words) == 0  # it can be opened
    for _ in range(2):
        assert prepare(*words, "--verify") == 1
        out = capsys.readouterr().out
        assert "1 of 2 videos can be decoded" in out and "1 broken files" in out
        assert "p/train-000000.tar/a/damaged.mp4@512+" in out
    assert len(lines(tmp_path / "train.csv")) == 2 and find_damage(damaged)


def test_a_unit_that_cannot_be_made_is_an_error(videos, whole, tmp_path):
    (tmp_path / "shards/val-000000.tar").mkdir(parents=True)
    with pytest.raises(OSError, match=r"val-000000\.tar"):
        run(videos, tmp_path)
    assert not (tmp_path / "train.csv").exists()
    (tmp_path / "shards/val-000000.tar").rmdir()
    assert run(videos, tmp_path) == 1
    assert contents(tmp_path) == whole


def test_a_video_that_changes_on_the_way_is_an_error(videos, tmp_path, monkeypatch):
    (tmp_path / "v/a").mkdir(parents=True)
    write_counter_video(tmp_path / "v/a/0.mp4", 5)
    told = copies.tell_costs

    def change(*words):
        told(*words)
        os.remove(tmp_path / "v/a/0.mp4")

    monkeypatch.setattr(copies, "tell_costs", change)
    with pytest.raises(OSError, match=r"0\.mp4 \(on .*\) is missing, or has changed"):
        run(tmp_path / "v", tmp_path, "--val_share", 0)


@pytest.mark.slow
def test_two_commands_share_the_work(videos, whole, tmp_path):
    """Both end well, and each shard was made once."""
    processes = [start(videos, tmp_path, "--workers", 1) for _ in range(2)]
    outs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outs
    assert contents(tmp_path) == whole
    one, other = ({*re.findall(r"copying (\S+): 100%", out)} for out in outs)
    assert one | other == {x[:-4] for x in whole if x.endswith(".tar")} and not one & other


def test_a_command_waits_for_a_shard_that_another_process_makes(videos, whole, tmp_path):
    (tmp_path / "shards/.work").mkdir(parents=True)
    with open(tmp_path / "shards/.work/val-000000", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = start(videos, tmp_path)
        while not list(tmp_path.glob("shards/train-*.json")):
            time.sleep(0.01)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        assert not list(tmp_path.glob("shards/val-*"))
    out = process.communicate()[0]
    assert process.returncode == 1 and contents(tmp_path) == whole, out


def test_without_locks_two_commands_may_make_one_shard(videos, whole, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    status = []

    def slow(*words, **options):
        if "max_frames" not in options and not status:  # a copy, and not of the sample
            monkeypatch.setattr(copies, "transcode", transcode)
            status.append(run(videos, tmp_path))  # it ends, and removes what others work on
        return transcode(*words, **options)

    monkeypatch.setattr(copies, "transcode", slow)
    assert run(videos, tmp_path, "--workers", 1) == 1 and status == [1]
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("flags", [[], ["--pack"]], ids=["loose", "packed"])
def test_a_command_that_ends_disturbs_no_other(videos, tmp_path, monkeypatch, flags):
    """It removes the folder of locks, when another one is about to open or has opened a lock."""
    words = "folders", videos, tmp_path, *SMALL[: 4 if flags else 2], "--reencode"
    words += (*flags, tmp_path / "r")
    work, mkdir, copy = tmp_path / "r/.work", os.mkdir, copies.Copies._copy

    def mkdir_and_lose(path, *rest):
        mkdir(path, *rest)
        if path == str(work):
            monkeypatch.setattr(os, "mkdir", mkdir)
            work.rmdir()

    def lose_and_copy(*rest):
        shutil.rmtree(work)
        return copy(*rest)

    monkeypatch.setattr(os, "mkdir", mkdir_and_lose)
    if not flags:
        monkeypatch.setattr(copies.Copies, "_copy", lose_and_copy)
    assert prepare(*words) == 1
    assert len(lines(tmp_path / "train.csv")) == 14 and not work.exists()


def test_two_commands_write_the_same_loose_copies(videos, tmp_path, monkeypatch):
    words = "folders", videos, tmp_path, "--reencode", tmp_path / "r", *SMALL[:2]
    make, status = copies.Copies.make, []

    def slow(*rest):
        monkeypatch.setattr(copies.Copies, "make", make)
        status.append(prepare(*words))
        return make(*rest)

    monkeypatch.setattr(copies.Copies, "make", slow)
    assert prepare(*words) == 1 and status == [1]
    assert len(lines(tmp_path / "train.csv")) == 14


def test_loose_copies_go_on_with_other_videos(tmp_path, monkeypatch):
    """After an interrupted call, as after a finished one, only new videos are copied."""
    (tmp_path / "v/a").mkdir(parents=True)
    for i in range(3):
        write_counter_video(tmp_path / f"v/a/{i}.mp4", 5)
    words = "folders", tmp_path / "v", tmp_path, "--reencode", tmp_path / "r", "--val_share", 0
    make = copies.Copies.make

    def interrupt(*words):
        make(*words)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(copies.Copies, "make", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(*words)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "r/a").iterdir()}
    assert len(times) == 3
    for i in (3, 4):
        write_counter_video(tmp_path / f"v/a/{i}.mp4", 5)
        assert prepare(*words) == 0
    assert lines(tmp_path / "train.csv") == [f"r/a/{i}.mp4 0" for i in range(5)]
    assert all(path.stat().st_mtime_ns == t for path, t in times.items())
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["a"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--cluster", "local", "--jobs", 3]], ids=["here", "jobs"])
def test_kills_at_random_moments(tmp_path, flags):
    """SIGKILL to the command with its jobs, or to one of its processes; then the same command."""
    for i in range(12):
        path = tmp_path / f"v/{'train' if i < 8 else 'val'}/a/{i}.avi"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, moving_frames(40, 300, 400, seed=i), codec="mpeg4")
    sizes = "--short_side", 200, "--shard_mb", 0.3, "--workers", 2
    assert run(tmp_path / "v", tmp_path / "whole", *sizes) == 0
    rng, shards = random.Random(len(flags)), tmp_path / "out/shards"
    for kill in ("all", "command", "one"):
        process = start(tmp_path / "v", tmp_path / "out", *sizes, *flags)
        before = set(shards.glob("*.json"))
        while not (set(shards.glob("*.json")) - before or list(shards.glob(".*"))):
            if process.poll() is not None:  # jobs of a killed command have done the rest
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        processes = family(process.pid)
        chosen = {"all": processes, "command": processes[:1], "one": [rng.choice(processes)]}[kill]
        for pid in chosen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        out = process.communicate()[0]
        assert "Traceback" not in out, out
    process = start(tmp_path / "v", tmp_path / "out", *sizes, *flags)
    out = process.communicate()[0]
    assert process.returncode == 0, out
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(shards.glob(".*"))


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(videos, tmp_path):
    process = start(videos, tmp_path)
    while not list(tmp_path.glob("shards/*-*.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out = process.communicate()[0]
    assert process.returncode == 130 and "Traceback" not in out, out
    assert out.endswith("prepare_kinetics: interrupted; the same command goes on\n")


@pytest.mark.slow
def test_a_job_that_fails_names_its_log(videos, whole, tmp_path):
    flags = "--cluster", "local", "--jobs", 2
    (tmp_path / "shards/val-000000.tar").mkdir(parents=True)
    process = start(videos, tmp_path, *flags)
    out = process.communicate()[0]
    assert process.returncode == 1 and "Traceback" not in out, out
    error = out.splitlines()[-1]
    assert "units are not done, val-000000 for example" in error, out
    logs = next(Path(word) for word in error.split() if word.endswith("_log.err"))
    assert any("val-000000.tar" in log.read_text() for log in logs.parent.glob(logs.name))
    assert not (tmp_path / "train.csv").exists()
    (tmp_path / "shards/val-000000.tar").rmdir()
    process = start(videos, tmp_path, *flags, "--verify")
    out = process.communicate()[0]
    assert process.returncode == 1 and "28 of 29 videos can be decoded" in out, out
    assert contents(tmp_path) == whole


@pytest.mark.slow
def test_a_model_trains_on_the_shards(videos, tmp_path):
    from tests.test_scripts import PRETRAIN, finish, spawn

    assert run(videos, tmp_path / "o", "--verify") == 1
    flags = "--path_to_data_dir", tmp_path / "o", "--epochs", 1, "--output_dir", tmp_path / "out"
    log = finish(spawn("main_pretrain.py", *PRETRAIN, *flags))
    assert "unreadable" not in log and (tmp_path / "out/checkpoint-00000.pth").exists()
