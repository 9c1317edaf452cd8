"""--time_loader: rates, shares of a worker's time, and what limits a loader, on real videos."""

import re
import shutil
import subprocess
import sys
import time

import pytest
import torch

import main_finetune
import main_pretrain
from tests.test_kinetics import data_set
from tests.test_scripts import FINETUNE, PRETRAIN, ROOT, call, fails
from util import time_loader
from util.kinetics import Kinetics
from util.time_loader import READING, Measured, find_limit, measure, timed_parts
from util.video.decode import Video, VideoError

WAITS = ["waiting for files", "waiting for a CPU", "waiting for the main process"]
NUMBERS = r"workers: (\d+), videos/s: ([\d.]+) \(([\d.]+) each\), clips/s: ([\d.]+), MB/s read: "


def test_it_prints_rates_shares_cores_and_the_limit(videos, tmp_path, capsys):
    words = ["--num_workers", 2, "--time_loader", 0.3, "--clips_per_second", 12345]
    out = tmp_path / "out"
    call(main_pretrain, "--path_to_data_dir", videos, "--output_dir", out, *PRETRAIN, *words)
    text = capsys.readouterr().out
    [numbers] = re.findall(NUMBERS, text)
    workers, rate, each, clips = map(float, numbers)
    assert workers == 2 and each == pytest.approx(rate / workers, abs=0.11) and rate > 1
    assert clips == pytest.approx(2 * rate, abs=0.11)  # --repeat_aug 2
    shares = re.search("a worker's time: (.*)", text)[1].split(", ")
    assert [share.rpartition(" ")[0] for share in shares] == [*READING, "transport", *WAITS]
    assert sum(float(x.rstrip("%").split()[-1]) for x in shares) == pytest.approx(100, abs=0.6)
    cores, milliseconds = re.search(r"cores: (\d+) feed 12345 clips/s \(([\d.]+) ms", text).groups()
    assert -0.65 < int(cores) - 12.345 * float(milliseconds) < 1.65  # rounded up
    assert " the limit: " in text.splitlines()[-1]
    assert "M parameters" not in text and not out.exists()  # no model, no folder


def test_waiting_for_reads_is_told_from_computing(videos, monkeypatch):
    """The numbers of a worker whose every video takes 40 ms to come."""
    load = Kinetics._load

    def slow(*args):
        time.sleep(0.04)
        return load(*args)

    monkeypatch.setattr(Kinetics, "_load", slow)
    found = measure(data_set(videos), 2, 1, 0.8)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert 0.3 < found.shares["waiting for files"] < 1
    assert 10 < found.videos / found.seconds < 1 / 0.04
    waited = found.shares["waiting for files"] * found.seconds / found.videos
    assert 0.02 < waited < 0.08
    sizes = [(videos / f"v{i}.mp4").stat().st_size for i in range(6)]
    assert 0.5 < found.bytes / found.videos / (sum(sizes) / 6) < 3
    assert find_limit(found, 16).startswith("The disk is the limit: ")


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.slow
def test_a_slow_disk_is_the_limit(videos):
    flags = ["--path_to_data_dir", videos, *PRETRAIN, "--num_workers", 1, "--time_loader", 4]
    paths = [word for i in range(6) for word in ("-P", videos / f"v{i}.mp4")]
    trace = ["strace", "-f", "-qq", "-o", "/dev/null", *paths, "-e", "trace=read", "-e",
             "inject=read:delay_enter=100000"]  # fmt: skip
    command = [*trace, sys.executable, ROOT / "main_pretrain.py", *flags]
    run = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=True)
    assert "The disk is the limit: " in run.stdout.splitlines()[-1]


def test_parts_add_up_to_the_whole_and_end_with_their_context(videos, tmp_path):
    dataset = data_set(videos, color_jitter=0.4)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    before = [getattr(owner, name) for owner, name, _ in time_loader.PARTS]
    seconds, start = dict.fromkeys(READING, 0.0), time.process_time()
    with timed_parts(seconds):
        for row in range(6):
            dataset[0, row]
        with pytest.raises(VideoError):
            Video(str(tmp_path / "broken.mp4"))
    spent = time.process_time() - start
    assert 0.8 < sum(seconds.values()) / spent < 1 and min(seconds.values()) > 0
    assert [getattr(owner, name) for owner, name, _ in time_loader.PARTS] == before


def shares(**known: float) -> dict[str, float]:
    """Return shares of which those not given are small, and decoding takes the rest."""
    names = {"files": WAITS[0], "queue": WAITS[1], "idle": WAITS[2]}
    given = {names.get(k, k): v for k, v in known.items()}
    found = {name: given.get(name, 0.01) for name in [*READING, "transport", *WAITS]}
    return found | {"decoding": 1 + found["decoding"] - sum(found.values())}


@pytest.mark.parametrize(
    ("workers", "cores", "waits", "limit", "words"),
    [
        (16, 4.8, {"files": 0.62}, "The disk", "62% of the time goes to waiting for reads"),
        (16, 3.0, {"files": 0.3, "queue": 0.5}, "Other processes", "50% of the time"),
        (32, 15.9, {"queue": 0.49}, "Decoding", "more CPUs help"),
        (14, 13.8, {}, "Decoding", "--num_workers 14 keep 13.8 of 16 CPUs busy"),
        (16, 15.5, {"augmentation": 0.7}, "Augmentation", "it takes 72% of the work"),
        (4, 3.9, {}, "The number of workers", "--num_workers 4 keep 3.9 of 16 CPUs busy"),
        (1, 1.0, {}, "The number of workers", "--num_workers 1 keep 1.0 of 16"),
        (4, 3.5, {"files": 0.1}, "The number of workers", "more --num_workers help"),
    ],
)
def test_the_limit(workers, cores, waits, limit, words):
    found = Measured(workers, 30.0, 100, 1e6, cores, shares(**waits), {})
    sentence = find_limit(found, 16)
    assert sentence.startswith(limit) and " the limit: " in sentence and words in sentence
    assert sentence.endswith(".") and sentence.count(". ") == 0


def test_unreadable_videos_are_named_once_and_counted(videos, tmp_path, capsys):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    rows = [f"{videos}/v{i}.mp4 {i % 3}\n" for i in range(6)]
    for name in ("train", "val"):
        (tmp_path / f"{name}.csv").write_text("".join([*rows, "broken.mp4 0\n"]))
    words = ["--max_bad_share", 0.5, "--num_workers", 2, "--time_loader", 1e-9]
    call(main_finetune, "--path_to_data_dir", tmp_path, *FINETUNE, *words)
    text = capsys.readouterr().out
    assert float(re.findall(NUMBERS, text)[0][1]) > 0  # some videos are counted in any time
    assert len(re.findall(r"unreadable video \(1 so far\): .*broken.mp4", text)) == 1
    assert text.count("broken.mp4: ") == 1 and "unreadable videos: 1, named above" in text
    assert " the limit: " in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--time_loader 0", "argument --time_loader: 0 is not a number above 0"),
        ("--time_loader 1 --dry_run", "--dry_run and --time_loader exclude each other"),
        ("--clips_per_second 9", "--clips_per_second needs --time_loader"),
        ("--time_loader 1 --num_workers 0", "at least one of --num_workers"),
        ("--time_loader 1 --num_workers 1 --path_prefix none", "do not exist"),
        ("--time_loader 1 --num_workers 1 --batch_size 7", "fewer than one batch"),
        ("--time_loader 1 --num_workers 1 --path_to_data_dir empty", "lists no videos"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    words, sentence, videos, tmp_path, monkeypatch, capsys
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "train.csv").write_text("\n")
    monkeypatch.chdir(tmp_path)
    status, text = fails(
        capsys, main_pretrain, "--path_to_data_dir", videos, *PRETRAIN, *words.split()
    )
    assert status == 2 and sentence in text.splitlines()[-1]


def test_several_ranks_are_refused(videos, monkeypatch, capsys):
    monkeypatch.setattr(time_loader, "world_size", lambda: 2)
    words = "--num_workers 1 --time_loader 1"
    status, text = fails(
        capsys, main_pretrain, "--path_to_data_dir", videos, *PRETRAIN, *words.split()
    )
    assert status == 2 and "give it a single process" in text


def test_without_proc_it_says_so(videos, monkeypatch, capsys):
    monkeypatch.setattr(time_loader, "_usage", lambda: {}["rchar"])
    words = "--num_workers 1 --time_loader 1"
    status, text = fails(
        capsys, main_pretrain, "--path_to_data_dir", videos, *PRETRAIN, *words.split()
    )
    assert status == 1 and "--time_loader needs Linux's /proc" in text


torch.set_num_threads(1)
