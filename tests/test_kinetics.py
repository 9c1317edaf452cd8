"""The data set: csv rows, samples, determinism, sampler and unreadable videos."""

import gc
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import FORK, read_number
from tests.test_scripts import ROOT
from tests.test_transforms import resize
from tests.video_files import counter_frame, moving_frames, read_counter, write_video
from util.errors import UserError
from util.kinetics import Kinetics, VideoIndex, cut_views
from util.loader import EpochSampler, VideoLoader, default_num_workers
from util.video.clip_ops import color_jitter
from util.video.decode import Video, VideoError
from util.video.rand_augment import RandAugment
from util.video.sampling import clip_length, frame_indices, random_resized_crop_box, random_start
from util.video.time_limit import call_within

SIZES = {"input_size": 32, "num_frames": 4, "sampling_rate": 4}


def write_csv(folder: Path, text: str) -> str:
    path = folder / "train.csv"
    path.write_text(text, errors="surrogateescape")
    return str(path)


def data_set(folder: Path, mode: str = "pretrain", **kwargs) -> Kinetics:
    return Kinetics(VideoIndex(str(folder / "train.csv")), mode, **{**SIZES, **kwargs})


def loader_of(
    dataset: Kinetics, batch_size: int, num_workers: int = 0, max_bad_share: float = 0.5
) -> VideoLoader:
    return VideoLoader(dataset, batch_size, num_workers, max_bad_share, torch.device("cpu"))


# --- csv ----------------------------------------------------------------------------------------


def test_csv_accepts_what_real_files_hold(tmp_path):
    text = (
        "\ufeff# a comment\n\na/b.mp4 3\nwith space in it.mp4 4\ncomma.mp4,5\ntab.mp4\t6\n"
        "/abs/olute.mp4 0\ns3://bucket/x.mp4 1\nünï.mp4  2\r\nboth, of them.mp4, 7\n"
        '"quoted, with comma.mp4",2\n'
    )
    assert VideoIndex(write_csv(tmp_path, "\ufeffa.mp4 1\n")).path(0) == str(tmp_path / "a.mp4")
    index = VideoIndex(write_csv(tmp_path, text), num_classes=8)
    names = ["a/b.mp4", "with space in it.mp4", "comma.mp4", "tab.mp4"]
    assert [index.path(i) for i in range(4)] == [str(tmp_path / n) for n in names]
    assert index.path(4) == "/abs/olute.mp4"
    assert index.path(5) == "s3://bucket/x.mp4"
    assert index.path(6) == str(tmp_path / "ünï.mp4")
    assert index.path(7) == str(tmp_path / "both, of them.mp4")
    assert index.path(8) == str(tmp_path / "quoted, with comma.mp4")
    assert index.labels.tolist() == [3, 4, 5, 6, 0, 1, 2, 7, 2]


def test_names_that_are_not_utf8_are_names_of_files(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    index = VideoIndex(write_csv(tmp_path, f"{path.name} 1\rb.mp4 2\r"))
    assert [index.path(i) for i in range(2)] == [str(path), str(tmp_path / "b.mp4")]
    shutil.copy(write_video(tmp_path / "v.mp4", moving_frames(2)), path)
    with Video(index.path(0)) as video:
        assert video.num_frames == 2


def test_paths_may_stand_in_quotes(tmp_path):
    text = '"#1.mp4" 0\n"a ""b"".mp4",1\n" c, 3 "\t2\n"d.mp4",\n"e" f.mp4 3\n'
    index = VideoIndex(write_csv(tmp_path, text))
    names = ["#1.mp4", 'a "b".mp4', " c, 3 ", "d.mp4", '"e" f.mp4']
    assert [index.path(i) for i in range(5)] == [f"{tmp_path}/{name}" for name in names]
    assert index.labels.tolist() == [0, 1, 2, -1, 3]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_csv_of_other_editors(tmp_path, encoding):
    text = "ünï.mp4 1\r\n\u2028b\x0bc.mp4 2\r\n"
    (tmp_path / "train.csv").write_bytes(text.encode(encoding))
    index = VideoIndex(str(tmp_path / "train.csv"))
    names = "ünï.mp4", "b\x0bc.mp4"
    assert [index.path(i) for i in range(len(index))] == [f"{tmp_path}/{name}" for name in names]


def test_comments_are_counted(tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"\xe9")  # standard output cannot hold it
    folder.mkdir()
    VideoIndex(write_csv(folder, "#1.avi 0\nb.avi 0\n  # note\n"))
    assert "train.csv: comments skipped: 2; a path that" in capsys.readouterr().out
    VideoIndex(write_csv(folder, '"#1.avi" 0\n'))
    assert capsys.readouterr().out == ""


def test_path_prefix_replaces_the_csv_folder(tmp_path):
    index = VideoIndex(write_csv(tmp_path, "x.mp4 0\n/y.mp4 1\n"), path_prefix="/data/videos")
    assert [index.path(i) for i in range(2)] == ["/data/videos/x.mp4", "/y.mp4"]


def test_pretraining_csv_may_have_no_labels(tmp_path):
    index = VideoIndex(write_csv(tmp_path, 'x.mp4\ny z.mp4\n"quoted.mp4"\n'))
    names = ["x.mp4", "y z.mp4", "quoted.mp4"]
    assert [index.path(i) for i in range(3)] == [str(tmp_path / name) for name in names]


@pytest.mark.parametrize("row", ["b.mp4 3.0", "b.mp4,3,", "b.mp4 3 # good", f"b.mp4 {10**20}"])
def test_malformed_labels_are_not_read_as_paths(tmp_path, row):
    with pytest.raises(UserError, match=r"line 2: a label"):
        VideoIndex(write_csv(tmp_path, f"a.mp4 3\n{row}\n"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.mp4 0\nb.mp4\n", ["line 2", "no label"]),
        ("a.mp4 0\nb.mp4 5\n", ["line 2", "label 5", "number of classes, 5"]),
        ("a.mp4 -3\n", ["line 1", "negative"]),
        ("a.mp4 1.5\n", ["line 1", "no label"]),
        ("a.mp4 1_0\n", ["line 1", "no label"]),
        (" 3\n", ["line 1", "no path"]),
        ("a.mp4 0\nfoo://a.mp4 1\n", ["line 2", "http://", "s3://"]),
        ("", ["lists no videos"]),
        ("# nothing\n\n", ["lists no videos"]),
    ],
)
def test_bad_csv_is_named_by_file_line_and_reason(tmp_path, text, words):
    path = write_csv(tmp_path, text)
    with pytest.raises(UserError) as caught:
        VideoIndex(path, num_classes=5)
    for word in [path, *words]:
        assert word in str(caught.value)


def test_missing_and_binary_csv(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.csv"):
        VideoIndex(str(tmp_path / "nowhere.csv"))
    (tmp_path / "train.csv").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="not a text file"):
        VideoIndex(str(tmp_path / "train.csv"))


def test_index_does_not_grow_in_workers(tmp_path):
    """Reading paths must not copy the index into a worker; packed arrays have no ref counts."""
    rows = (f"a/rather/long/path/to/video_{i:06d}.mp4 0\n" for i in range(300_000))
    path = write_csv(tmp_path, "".join(rows))
    index = VideoIndex(path)

    def private() -> int:
        text = Path("/proc/self/smaps_rollup").read_text()
        return sum(int(x.split()[1]) for x in text.splitlines() if x.startswith("Private_Dirty"))

    def read_all(pipe: Connection) -> None:
        gc.freeze()  # a collection would write to all objects of the tests
        before = private()
        for i in range(len(index)):
            index.path(i)
        pipe.send(private() - before)

    here, there = FORK.Pipe()
    child = FORK.Process(target=read_all, args=[there])
    child.start()
    assert here.poll(60) and here.recv() < 10_000  # KiB; a list of strings costs about 30 MB here
    child.join()


# --- samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["random", "center"])
def test_pretraining_sample_is_the_definition(videos, crop):
    """Clips equal those made step by step: draws from (seed, epoch, row, repeat), crop, resize."""
    dataset = data_set(videos, seed=7, repeat_aug=3, crop=crop)
    sample = dataset[5, 2]
    assert sample.clips.shape == (3, 4, 32, 32, 3)
    assert sample.clips.dtype == torch.uint8
    assert (sample.label, sample.row, sample.errors) == (2, 2, {})
    with Video(str(videos / "v2.mp4")) as video:
        everything = np.stack([frame.copy() for _, frame in video.frames(range(video.num_frames))])
        for r in range(3):
            rng = np.random.default_rng((7, 5, 2, r))
            length = clip_length(4, 4, video.fps)
            frames = frame_indices(random_start(60, length, rng), length, 4, 60)
            whole = torch.from_numpy(everything[frames])
            if crop == "random":
                top, left, h, w = random_resized_crop_box(48, 64, (0.5, 1.0), (3 / 4, 4 / 3), rng)
                expected = resize(whole[:, top : top + h, left : left + w], (32, 32))
            else:
                expected = resize(whole, (32, 42))[:, :, 5:37]  # short side 32
            assert torch.equal(sample.clips[r], expected)
            assert bool(sample.flip[r]) == (rng.random() < 0.5)
    starts = {read_number(clip[0]) for clip in sample.clips}
    assert len(starts) > 1  # repeats are different clips of the video


def test_colours_are_drawn_after_everything_else_once_per_clip(videos):
    plain = data_set(videos, seed=7, repeat_aug=3)[5, 2]
    sample = data_set(videos, seed=7, repeat_aug=3, color_jitter=0.8)[5, 2]
    assert torch.equal(sample.flip, plain.flip)
    for r in range(3):
        rng = np.random.default_rng((7, 5, 2, r))
        random_start(60, 16, rng)
        random_resized_crop_box(48, 64, (0.5, 1.0), (3 / 4, 4 / 3), rng)
        rng.random()
        expected = plain.clips[r].numpy().copy()
        color_jitter(expected, 0.8, rng)
        np.testing.assert_array_equal(sample.clips[r].numpy(), expected)
    levels = sample.clips.float().mean((1, 2, 3, 4)) / plain.clips.float().mean((1, 2, 3, 4))
    assert len(set((levels * 20).round().tolist())) == 3  # every repeat has other colours


def test_finetuning_repeats_share_the_clip_and_differ_in_augmentation(videos):
    sample = data_set(videos, "finetune", repeat_aug=4, reprob=1.0, scales=(0.9, 1.0))[0, 0]
    counters = [[read_number(frame) for frame in clip] for clip in sample.clips]
    assert all(c == counters[0] for c in counters)
    assert len({tuple(box.tolist()) for box in sample.erase}) == 4
    augment = RandAugment("rand-m9-n4-p1")
    clips = data_set(videos, "finetune", repeat_aug=4, rand_augment=augment)[0, 0].clips
    assert not torch.equal(clips[0], clips[1])


def test_test_views_run_over_time_then_space(videos):
    dataset = data_set(videos, "test", num_clips=3, num_crops=2)
    clips = dataset[0, 1].clips
    assert clips.shape == (6, 4, 32, 32, 3)
    with Video(str(videos / "v1.mp4")) as video:
        length = clip_length(4, 4, video.fps)
        for k in range(3):
            start = k * ((60 - length) // 2)
            frames = frame_indices(start, length, 4, 60)
            for s in range(2):
                assert [read_number(f) for f in clips[2 * k + s]] == frames.tolist()
    assert not torch.equal(clips[0], clips[1])  # left and right
    again = dataset[99, 1].clips
    assert torch.equal(clips, again)  # no randomness, whatever the epoch


def test_cut_views_decodes_a_frame_once_for_all_views(videos, monkeypatch):
    asked = []
    real = Video.frames

    def frames(self, wanted):
        asked.append(list(wanted))
        return real(self, wanted)

    monkeypatch.setattr(Video, "frames", frames)
    data_set(videos, "test", num_clips=5, num_crops=3)[0, 0]
    assert len(asked) == 1
    assert len(asked[0]) == len(set(asked[0]))


def test_clips_longer_than_the_video_repeat_the_last_frame(videos):
    dataset = data_set(videos, "test", num_frames=8, sampling_rate=15)
    shown = [read_number(frame) for frame in dataset[0, 0].clips[0]]
    assert shown[0] == 0
    assert shown[-1] == 59
    assert shown.count(59) > 1


VARYING = {  # gaps between frames, ms
    "drops": ([33, 33, 34, 33, 67, 33, 100] * 20, "libx264", ".mp4"),
    "peak rate": ([11, 11, 11, 500] * 20, "libx264", ".mkv"),
    "halves": ([17, 16] * 40 + [200] * 40, "libx265", ".mp4"),
    "still": ([4000, 33, 33, 33, 3000, 9000] * 6, "libvpx-vp9", ".webm"),
    "slow": ([1500, 3500, 800] * 10, "libvpx-vp9", ".mkv"),
    "pause": ([33, 100] * 40 + [15_000] + [17] * 40, "libx264", ".mp4"),
    "jump": ([33, 100] * 40 + [900_000] + [20, 60] * 40, "libx264", ".mp4"),
    "jump of a stream": ([33, 100] * 40 + [15_000] + [20, 60] * 40, "libx264", ".ts"),
    "short": ([33, 33, 400, 100], "libx265", ".mkv"),
    "three": ([100, 900], "libx264", ".mp4"),
}


@pytest.mark.parametrize("name", VARYING)
def test_a_clip_of_a_variable_frame_rate_spans_the_seconds_it_says(tmp_path, name):
    """There is a start such that frame i is the one shown i steps of 4.2 / 30 s later."""
    gaps, codec, suffix = VARYING[name]
    frames = [counter_frame(i) for i in range(len(gaps) + 1)]
    stamps = np.cumsum([500, *gaps]).tolist()
    options = {"deadline": "realtime", "cpu-used": "8"} if "vp9" in codec else {"crf": "4"}
    write_video(tmp_path / f"v{suffix}", frames, codec, 1000, stamps=stamps, options=options)
    write_csv(tmp_path, f"v{suffix} 0\n")
    longest = 10_000 if suffix == ".ts" else 600_000  # a longer gap is a jump of the clock
    interval = np.mean([gap for gap in gaps if gap < longest])
    appear = np.cumsum([0, *(gap if gap < longest else interval for gap in gaps)]) / 1000
    end = np.append(appear[1:], np.inf)
    spare = max(appear[-1] + max(interval / 1000, 1 / 30) - 64 / 30, 0)
    steps = np.linspace(0, 63 / 30, 16)
    sizes = {"input_size": 48, "num_frames": 16, "sampling_rate": 4}
    whole = {"scales": (1, 1), "ratios": (4 / 3, 4 / 3), "hflip": False}
    tested = data_set(tmp_path, "test", **sizes, num_clips=5)[0, 0].clips
    trained = data_set(tmp_path, **sizes, **whole, repeat_aug=5)[0, 0].clips
    for clip in (*tested, *trained):
        shown = [read_counter(frame.numpy()) for frame in clip]
        assert shown == sorted(shown)
        earliest = max(0, *(appear[shown] - steps))
        latest = min(spare, *(end[shown] - steps))
        assert earliest < latest + 0.002, f"{shown} at {appear[shown]}"
    assert read_counter(tested[0, 0].numpy()) == 0
    # Starts are whole 30ths of a second, so that four steps may lose up to 4 / 30 s.
    assert end[read_counter(tested[-1, -1].numpy())] > appear[-1] - 4 / 30


def test_a_clip_within_one_frame_shows_that_frame(tmp_path):
    """Half a frame per second, whether even or not, and a still picture of 9 s."""
    for number, stamps in enumerate(([0, 5000, 10_000, 15_000], [0, 9000, 9033, 9066])):
        frames = [counter_frame(i) for i in range(4)]
        write_video(tmp_path / f"v{number}.mp4", frames, fps=1000, stamps=stamps)
        write_csv(tmp_path, f"v{number}.mp4 0\n")
        sizes = {"input_size": 48, "num_frames": 16, "sampling_rate": 4, "num_clips": 4}
        clips = data_set(tmp_path, "test", **sizes)[0, 0].clips
        shown = [[read_counter(frame.numpy()) for frame in clip] for clip in clips]
        assert shown[:3] == ([[0] * 16, [1] * 16, [2] * 16] if number == 0 else [[0] * 16] * 3)
        trained = data_set(tmp_path)
        with Video(trained.index.path(0)) as video:
            for seed in range(20):
                chosen = trained._random_frames(video, np.random.default_rng(seed))
                assert (np.diff(chosen) >= 0).all()


# --- determinism --------------------------------------------------------------------------------


def epoch_of(dataset: Kinetics, workers: int, epoch: int) -> list:
    loader = loader_of(dataset, 2, workers)
    loader.set_epoch(epoch)
    return [(b.clips, b.flip, b.row) for b in loader]


@pytest.mark.parametrize("options", [{}, {"crop": "center", "color_jitter": 0.4}])
def test_same_clips_with_any_number_of_workers_and_other_clips_next_epoch(videos, options):
    dataset = data_set(videos, repeat_aug=2, **options)
    runs = [epoch_of(dataset, workers, 3) for workers in (0, 1, 2)]
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    other = epoch_of(dataset, 0, 4)
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(runs[0], other, strict=True))


def test_persistent_workers_follow_the_epoch(videos):
    loader = loader_of(data_set(videos), 2, 2)
    seen = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        seen.append(torch.cat([b.clips for b in loader]))
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_a_loader_that_is_never_let_go_of_does_not_keep_its_process(videos):
    code = f"""
import torch
from util.kinetics import Kinetics, VideoIndex
from util.loader import VideoLoader
dataset = Kinetics(VideoIndex({str(videos / "train.csv")!r}), "pretrain", 32, 4, 4)
loader = VideoLoader(dataset, 2, 1, 0.5, torch.device("cpu"))
next(iter(loader))
loader.itself = loader  # as in the frames of a traceback
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=True)


def rows_of_ranks(monkeypatch, ranks: int, *arguments, **keywords) -> list[list[int]]:
    """Return the rows that each rank's sampler gives in epoch 4."""
    rows = []
    monkeypatch.setattr("util.loader.world_size", lambda: ranks)
    for r in range(ranks):
        monkeypatch.setattr("util.loader.rank", lambda r=r: r)
        sampler = EpochSampler(*arguments, **keywords, seed=1)
        sampler.epoch = 4
        rows.append([row for _, row in sampler])
        assert len(rows[-1]) == len(sampler)
    return rows


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_joint_batches_and_tests_are_the_same_for_any_number_of_ranks(monkeypatch, ranks):
    size = 6 // ranks
    joint = rows_of_ranks(monkeypatch, ranks, 20, batch_size=size, training=True)
    assert all(len(rows) == 18 // ranks for rows in joint)
    steps = [set().union(*(rows[i : i + size] for rows in joint)) for i in range(0, 3 * size, size)]
    order = np.random.default_rng((1, 4)).permutation(20)
    assert steps == [set(order[i : i + 6].tolist()) for i in (0, 6, 12)]
    tested = rows_of_ranks(monkeypatch, ranks, 7, batch_size=2, training=False)
    assert sorted(row for rows in tested for row in rows) == list(range(7))


# --- unreadable videos --------------------------------------------------------------------------


@pytest.fixture
def broken(videos, tmp_path) -> Path:
    """Six readable videos, an empty one and a missing one."""
    (tmp_path / "empty.mp4").touch()
    rows = (videos / "train.csv").read_text().replace("v", f"{videos}/v")
    write_csv(tmp_path, rows + "empty.mp4 0\nmissing.mp4 1\n")
    return tmp_path


def test_broken_video_is_replaced_deterministically_and_reported_once(broken, capsys):
    dataset = data_set(broken)
    runs = []
    for workers in (0, 2):
        loader = loader_of(dataset, 2, workers)
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            rows = torch.cat([b.row for b in loader])
            assert len(rows) == 8
            assert rows.max() < 6  # every row that came can be read
        runs.append(rows)
        out = capsys.readouterr().out
        assert out.count("empty.mp4") == 1
        assert out.count("missing.mp4") == 1
        assert len(loader.bad) == 2
    assert torch.equal(runs[0], runs[1])


def test_too_many_broken_videos_stop_training(broken):
    with pytest.raises(UserError, match=r"2 of 8 videos .*train\.csv.* --max_bad_share 0\.2"):
        list(loader_of(data_set(broken), 2, max_bad_share=0.2))


def test_a_video_counts_once_whatever_is_wrong_with_it(broken, monkeypatch, capsys):
    """A damaged video fails at another frame every time it is read."""
    loader = loader_of(data_set(broken), 2)
    reasons = iter(range(1000))

    def fail(path, *args):
        if path.endswith("/v0.mp4"):
            raise VideoError(f"{path}: frame {next(reasons)} cannot be decoded")
        return Video(path, *args)

    monkeypatch.setattr("util.kinetics.Video", fail)
    for epoch in range(4):
        loader.set_epoch(epoch)
        list(loader)
    assert next(reasons) > 2
    assert len(loader.bad) == 3
    assert capsys.readouterr().out.count("v0.mp4: frame") == 1


def test_ranks_add_up_what_they_cannot_read(broken, monkeypatch):
    loader = loader_of(data_set(broken), 2, max_bad_share=0.3)
    list(loader)  # 2 of 8
    others = {"x.mp4": "x.mp4: gone"}
    monkeypatch.setattr("util.loader.gather_objects", lambda own: [own, others])
    with pytest.raises(UserError, match="3 of 8 videos"):
        loader.set_epoch(1)


def test_nothing_but_broken_videos(tmp_path):
    dataset = Kinetics(VideoIndex(write_csv(tmp_path, "a.mp4\nb.mp4\n")), "pretrain", **SIZES)
    with pytest.raises(UserError, match=r"[ab]\.mp4: no such file") as caught:
        list(loader_of(dataset, 1, max_bad_share=1.0))
    assert caught.value.status == 1


def test_testing_keeps_the_row_of_a_broken_video(broken):
    samples = list(loader_of(data_set(broken, "test"), 1))
    assert [int(s.row) for s in samples] == list(range(8))
    assert [bool(s.errors[0]) for s in samples] == [False] * 6 + [True] * 2


# --- time limit, pixel limit ---------------------------------------------------------------------


@pytest.fixture
def pipe(tmp_path):
    """A pipe that nobody writes to, so that opening it for reading does not return."""
    path = tmp_path / "pipe.mp4"
    os.mkfifo(path)
    yield path
    os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))  # releases the threads that wait for it


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_file_that_never_answers_is_replaced(videos, pipe, tmp_path, monkeypatch, workers):
    real = stat.S_ISREG
    monkeypatch.setattr(stat, "S_ISREG", lambda mode: stat.S_ISFIFO(mode) or real(mode))
    rows = f"{videos}/v0.mp4 0\n{pipe} 1\n{videos}/v2.mp4 2\n{videos}/v3.mp4 0\n" * 2
    index = VideoIndex(write_csv(tmp_path, rows))
    dataset = Kinetics(index, "pretrain", **SIZES, item_timeout=1)
    loader = loader_of(dataset, 4, workers)
    batches = list(loader)
    assert loader.bad == {str(pipe): f"{pipe}: does not answer within 1 seconds"}
    assert len(loader.memory.free) < loader.memory.capacity  # a thread may still write to some
    for batch in batches:
        for clips, row, label in zip(batch.clips, batch.row, batch.label, strict=True):
            assert int(row) not in (1, 5) and int(label) == int(index.labels[row])
            assert 0 < read_number(clips[0, 0]) < 60
    del batches, batch, clips
    # The slots that the hung threads of rows 1 and 5 may still write to are not used again.
    assert 1 <= loader.memory.capacity - len(loader.memory.free) <= 2


def test_a_pipe_is_refused_unopened(pipe):
    with pytest.raises(VideoError, match=r"pipe\.mp4: not a regular file"):
        Video(str(pipe))


def test_decoding_stops_at_the_time_limit(videos, tmp_path):
    with pytest.raises(VideoError, match=r"v0\.mp4: not read within 1e-09 seconds"):
        Video(str(videos / "v0.mp4"), time_limit=1e-9)
    frames = [np.zeros((48, 64, 3), np.uint8)] * 9
    untimed = write_video(tmp_path / "v.avi", frames, codec="mpeg4", bframes=2)
    for path in (str(videos / "v0.mp4"), untimed):
        with Video(path, time_limit=0.3) as video:
            time.sleep(0.35)
            with pytest.raises(VideoError, match=r"not read within 0\.3 seconds"):
                list(video.frames([0]))


def test_time_limits_do_not_count_while_the_process_is_stopped(videos):
    """A scheduler suspends a job by SIGSTOP; twice the limit passes before SIGCONT."""
    code = f"""
import os, signal, time
from util.video.time_limit import call_within
from util.video.decode import Video

def read():
    count = 0
    with Video({str(videos / "v0.mp4")!r}, time_limit=1.5) as video:
        for _ in video.frames(range(video.num_frames)):
            count += 1
            if count == 3:
                os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(0.2)
        return count == video.num_frames

print(call_within(1.5, read))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    os.waitpid(process.pid, os.WUNTRACED)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=30)
    assert out == b"True\n"


def test_call_within():
    assert call_within(5, lambda: 7) == 7
    assert call_within(float("inf"), lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        call_within(5, lambda: 1 // 0)
    with pytest.raises(TimeoutError):
        call_within(0.05, lambda: time.sleep(0.5))


def test_call_within_keeps_its_thread_unless_it_hangs_or_is_a_forks():
    kept = call_within(5, threading.get_ident)
    with pytest.raises(ZeroDivisionError):
        call_within(5, lambda: 1 // 0)
    assert call_within(5, threading.get_ident) == kept != threading.get_ident()
    child = FORK.Process(target=call_within, args=(5, int))
    child.start()
    child.join()
    assert child.exitcode == 0  # it did not wait for a thread that only the parent has
    release = threading.Event()
    with pytest.raises(TimeoutError):
        call_within(0.05, release.wait)
    [hung] = [thread for thread in threading.enumerate() if thread.ident == kept]
    assert call_within(5, threading.get_ident) != kept
    release.set()
    hung.join(5)
    assert not hung.is_alive()


def test_pixel_limit_reaches_the_decoder(videos):
    sample = data_set(videos, "test", max_pixels=1000)[0, 3]
    assert "v3.mp4: 64 x 48 pixels are more than max_pixels 1000" in str(sample.errors)
    assert not sample.clips.any()


# --- segments ------------------------------------------------------------------------------------


def test_segments_give_one_frame_each(videos):
    seen = set()
    for epoch in range(8):
        sample = data_set(videos, sampling="segments", repeat_aug=2)[epoch, 0]
        for clip in sample.clips:
            numbers = [read_number(frame) for frame in clip]
            assert [n // 15 for n in numbers] == [0, 1, 2, 3]
            seen.add(tuple(numbers))
    assert len(seen) == 16
    centre = data_set(videos, "test", sampling="segments")[0, 0].clips[0]
    assert [read_number(frame) for frame in centre] == [7, 22, 37, 52]
    views = data_set(videos, "test", sampling="segments", num_clips=3)[0, 0].clips
    assert [read_number(clip[0]) for clip in views] == [2, 7, 12]


def test_fine_tuning_repeats_share_segments(videos):
    augment = RandAugment("rand-m0-n1-p0")
    dataset = data_set(
        videos, "finetune", sampling="segments", repeat_aug=2, hflip=False, rand_augment=augment
    )
    first, second = ([read_number(f) for f in clip] for clip in dataset[1, 4].clips)
    assert first == second and [n // 15 for n in first] == [0, 1, 2, 3]


# --- large frames --------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(2160, 3840), (1920, 1080), (31, 33)])
def test_frames_of_any_size_give_the_same_clips(tmp_path, height, width):
    """The same picture makes nearly the same views in 4K, upright or tiny."""
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    frame = np.stack([255 * y, 255 * x, 0 * x + 99], axis=-1).astype(np.uint8)
    write_video(tmp_path / "v.mp4", [frame] * 3, pix_fmt="yuv444p", options={"preset": "ultrafast"})
    write_csv(tmp_path, "v.mp4 0\n")
    for mode in ("pretrain", "finetune"):
        augment = RandAugment("rand-m5") if mode == "finetune" else None
        sample = data_set(tmp_path, mode, scales=(1, 1), rand_augment=augment)[0, 0]
        assert not sample.errors and sample.clips.shape == (1, 4, 32, 32, 3)
    if min(height, width) < 32:
        return
    clips = data_set(tmp_path, "test", num_crops=3)[0, 0].clips.float()
    spread = (clips[:, 0, :, :, 0].mean(2)[:, 31] - clips[:, 0, :, :, 0].mean(2)[:, 0]).tolist()
    short = min(height, width) / max(height, width)
    assert spread == pytest.approx([255 * (short if height > width else 1)] * 3, abs=14)


def test_a_narrow_strip_is_not_scaled_up(tmp_path):
    strip = np.zeros((2, 16000, 3), np.uint8)
    write_video(tmp_path / "v.mkv", [strip] * 2, codec="ffv1", pix_fmt="bgr0")
    write_csv(tmp_path, "v.mkv 0\n")
    sample = data_set(tmp_path, "test", input_size=224)[0, 0]
    reason = f"{tmp_path}/v.mkv: frames are too narrow to scale to 224 pixels"
    assert sample.errors == {f"{tmp_path}/v.mkv": reason}
    assert not data_set(tmp_path, input_size=224)[0, 0].errors
    finetune = data_set(
        tmp_path, "finetune", input_size=224, rand_augment=RandAugment("rand-m9-p1")
    )
    assert not finetune[0, 0].errors


# --- memory of batches ---------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_are_kept_are_not_written_over(videos, workers):
    dataset = data_set(videos)
    loader = loader_of(dataset, 1, workers)
    kept = []
    for epoch in range(3):  # 18 batches: more than there are slots
        loader.set_epoch(epoch)
        kept += [(epoch, batch) for batch in loader]
    assert not loader.memory.free
    for epoch, batch in kept:
        assert torch.equal(batch.clips[0], dataset[epoch, int(batch.row)].clips)
    del kept, batch
    assert len(loader.memory.free) == loader.memory.capacity


def test_slots_are_used_again_and_given_back(videos):
    dataset = data_set(videos)
    loader = loader_of(dataset, 1, 2)
    places = set()
    for epoch in range(4):
        loader.set_epoch(epoch)
        for step, batch in enumerate(loader):
            places.add(batch.clips.data_ptr())
            assert torch.equal(batch.clips[0], dataset[epoch, int(batch.row)].clips)
            if epoch == 1 and step == 2:
                break  # nobody waits for the batches that workers are making
    assert len(places) <= loader.memory.capacity
    del batch
    assert len(loader.memory.free) == loader.memory.capacity


def test_without_fork_batches_travel_as_tensors(videos, monkeypatch):
    monkeypatch.setattr("util.loader.multiprocessing.get_start_method", lambda: "spawn")
    dataset = data_set(videos)
    loader = loader_of(dataset, 4, 1)
    assert loader.memory.capacity == 0
    pickle.dumps(loader.loader.dataset)  # is sent to such workers when they start
    for batch in loader:
        for clips, row in zip(batch.clips, batch.row, strict=True):
            assert torch.equal(clips, dataset[0, int(row)].clips)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_to_the_device_ahead_from_page_locked_memory(videos, workers):
    dataset = data_set(videos, repeat_aug=2)
    loader = VideoLoader(dataset, 2, workers, 0.5, torch.device("cuda"))
    received = []
    real = loader._receive

    def receive(made):
        batch = real(made)
        received.append(batch.clips.is_pinned())
        return batch

    loader._receive = receive
    for epoch in range(4):
        loader.set_epoch(epoch)
        for step, batch in enumerate(loader):
            assert len(received) == min(step + 2, 3) + 3 * epoch  # the next one is being copied
            assert batch.clips.is_cuda and batch.label.is_cuda and not batch.row.is_cuda
            busy = torch.rand(4000, 4000, device="cuda")
            for _ in range(20):
                busy = busy @ busy  # the device lags behind while slots are written again
            for clips, flip, row in zip(batch.clips, batch.flip, batch.row, strict=True):
                expected = dataset[epoch, int(row)]
                assert torch.equal(clips.cpu(), expected.clips)
                assert torch.equal(flip.cpu(), expected.flip)
    assert all(received)
    del batch, loader
    gc.collect()


def test_the_last_batch_of_a_test_may_be_smaller(videos):
    loader = loader_of(data_set(videos, "test"), 4, 1)
    assert [len(batch.clips) for batch in loader] == [4, 2]


def test_a_continued_epoch_gives_the_remaining_batches(videos):
    loader = loader_of(data_set(videos), 2)
    whole = [batch.clips for batch in loader]
    loader.set_epoch(0, 1)
    rest = [batch.clips for batch in loader]
    assert len(rest) == 2 and all(map(torch.equal, rest, whole[1:]))


@pytest.mark.slow
def test_memory_of_a_worker_is_flat_over_2000_videos(videos, tmp_path):
    rows = (videos / "train.csv").read_text().replace("v", f"{videos}/v")
    dataset = Kinetics(VideoIndex(write_csv(tmp_path, rows * 334)), "pretrain", **SIZES)
    loader = loader_of(dataset, 4, 1)
    resident = []
    for step, _ in enumerate(loader):
        if step % 50 == 49:
            worker = loader.loader._iterator._workers[0].pid
            pages = int(Path(f"/proc/{worker}/statm").read_text().split()[1])
            resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    assert step == 500
    assert max(resident[1:]) - resident[1] < 8, resident  # MiB


def test_workers_by_the_cpus_of_the_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr("util.loader._cpu_quota", lambda: float("inf"))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert default_num_workers() == 12
    monkeypatch.setattr("util.loader._cpu_quota", lambda: 4.5)  # a container's limit
    assert default_num_workers() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_num_workers() == 1


def test_default_workers_in_a_slurm_task(monkeypatch):
    """srun gives each task its own CPUs; torchrun in one task shares them among its ranks."""
    monkeypatch.setattr("util.loader._cpu_quota", lambda: float("inf"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "10")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for bound in (10, 80):  # if Slurm does not bind tasks, they see all CPUs of the machine
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=bound: set(range(n)))
        assert default_num_workers() == 10
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "80")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert default_num_workers() == 10


def test_fewer_videos_than_a_batch(videos):
    with pytest.raises(UserError, match="6 videos, fewer than one batch of --batch_size 7"):
        loader_of(data_set(videos), 7)


def test_cut_views_copies_only_the_box(videos):
    with Video(str(videos / "v0.mp4")) as video:
        clip = torch.empty((3, 20, 30, 3), dtype=torch.uint8)
        cut_views(video, np.array([[3, 3, 10]]), lambda h, w: [(4, 8, 20, 30)], clip[None])
        frames = {n: f.copy() for n, f in video.frames([3, 10])}
    expected = np.stack([frames[n][4:24, 8:38] for n in (3, 3, 10)])
    assert np.array_equal(clip.numpy(), expected)
