"""Large files: what is held and read, and that frames stay exact whatever becomes of a file."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest

from tests.test_video import decode_all, remux
from tests.video_files import moving_frames, write_video
from util.shards import write_shard
from util.video import packets
from util.video.decode import Video, VideoError
from util.video.source import member_path
from util.video.time_limit import call_within

FRAMES = 60


@pytest.fixture(autouse=True)
def all_are_large(monkeypatch):
    monkeypatch.setattr(packets, "SMALL", -1)
    yield
    packets._kept.clear()


def write(path: Path, seed: int = 0, **options) -> str:
    return write_video(path, moving_frames(FRAMES, seed=seed), bframes=2, **options)


def read(path: str, wanted: list[int]) -> list[np.ndarray]:
    with Video(path) as video:
        return [image for _, image in video.frames(wanted)]


def assert_exact(path: str, reference: list[np.ndarray], wanted: list[int]) -> None:
    for image, number in zip(read(path, wanted), wanted, strict=True):
        assert np.array_equal(image, reference[number]), number


def open_files(folder: Path) -> list[str]:
    """Return the files of a folder that this process has open."""
    found = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
             if os.path.islink(f"/proc/self/fd/{n}")]  # fmt: skip
    return sorted({x for x in found if x.startswith(str(folder))})


# --- memory and bytes


@pytest.fixture(scope="module")
def long_videos(tmp_path_factory) -> dict[str, str]:
    """90 MB of noise in every container, and with a single key frame."""
    folder = tmp_path_factory.mktemp("long")
    noise = np.random.default_rng(0).integers(0, 256, (20, 240, 320, 3), np.uint8)
    options = {"preset": "ultrafast", "qp": "4"}
    frames = [noise[i % 20] for i in range(800)]
    files = {
        name: write_video(folder / f"{name}.mp4", frames, gop=gop, bframes=2, options=options)
        for name, gop in (("mp4", 12), ("single", 1000))
    }
    for suffix in ("mkv", "ts"):
        files[suffix] = remux(files["mp4"], folder / f"v.{suffix}", lambda k, packet: packet)
    name = write_shard(str(folder / "s.tar"), [("a", files["ts"]), ("b", files["mp4"])])[1]
    return {**files, "shard": member_path(name)}


MEASURE = """
import json, sys
from pathlib import Path
import av, numpy
from util.video.decode import Video

def number(file, name):
    return int(Path(f"/proc/self/{file}").read_text().split(f"{name}:")[1].split()[0])

result = []
for wanted in ([5], [700], [300, 303, 420], [700]):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    idle, before = number("status", "VmRSS"), number("io", "rchar")
    with Video(sys.argv[1]) as video:
        packets = video._packets
        assert len(list(video.frames(wanted))) == len(wanted)
        runs = video._runs(sorted(video._shown[n] for n in wanted))
        groups = sum(int(packets.sizes[a : b + 1].sum()) for a, b in runs)
    read = number("io", "rchar") - before
    result.append([groups, read, 1024 * (number("status", "VmHWM") - idle)])
print(json.dumps(result))
"""


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts", "shard", "single"])
def test_memory_and_bytes_are_those_of_the_groups(long_videos, kind):
    run = subprocess.run([sys.executable, "-c", MEASURE, long_videos[kind]], capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    uses = json.loads(run.stdout)
    for groups, _, peak in uses:
        assert peak < 16 * 2**20 + (0 if kind == "single" else groups)
    for groups, read, _ in uses[1:]:
        assert groups <= read <= 2 * groups + 2**18


# --- the second use


SECOND = [
    (".mp4", {}), (".mp4", {"open_gop": True, "b_pyramid": True}), (".mkv", {"open_gop": True}),
    (".ts", {}), (".flv", {}), (".mp4", {"drop_until": 15}), (".avi", {"codec": "mpeg4"}),
    (".webm", {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8"}}),
    (".mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
]  # fmt: skip


@pytest.mark.parametrize(("suffix", "options"), SECOND)
def test_later_uses_are_exact(tmp_path, suffix, options):
    path = write(tmp_path / f"v{suffix}", **options)
    reference = decode_all(path)
    for wanted in ([40, 41], [3], [7, 20, 33], [0, len(reference) - 1], [40, 41]):
        assert_exact(path, reference, wanted)
    with Video(path) as video:
        assert video.num_frames == len(reference) and video.fps == pytest.approx(30)


def test_later_uses_of_a_file_that_is_decoded_in_full(tmp_path, monkeypatch):
    """The file starts within a group of pictures; its frames are counted once only."""
    path = remux(write(tmp_path / "w.ts"), tmp_path / "c.ts", lambda k, packet: k >= 5)
    reference, counts, delivered = decode_all(path), [], Video._delivered
    monkeypatch.setattr(Video, "_delivered", lambda self: counts.append(1) or delivered(self))
    for wanted in ([20], [3, 30]):
        assert_exact(path, reference, wanted)
    assert len(counts) == 3


@pytest.mark.parametrize("target", [0, 50, None])
def test_seeks_that_lead_elsewhere(tmp_path, monkeypatch, target):
    """They lead to the first packet, to a later one, or fail."""

    class Astray:
        def __init__(self, container):
            self.__dict__["container"] = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def __setattr__(self, name, value):
            setattr(self.container, name, value)

        def seek(self, offset, stream=None):
            if target is None:
                raise av.FFmpegError(1, "no seeking")
            return self.container.seek(target * 1000 // 30, stream=stream)

    opened, open_container = [], packets.open_container

    def open_astray(*args):
        opened.append(Astray(open_container(*args)))
        return opened[-1]

    path = write(tmp_path / "v.mkv")
    reference = decode_all(path)
    monkeypatch.setattr(packets, "open_container", open_astray)
    for wanted in ([40], [3], [7, 33], [13, 30, 50]):
        assert_exact(path, reference, wanted)
    # Groups in ascending order are read in one go, even where no seek works.
    assert len(opened) == (1 if target == 0 else 5)


def test_packets_that_differ_after_a_seek(tmp_path, monkeypatch):
    """A run that loses its place ends, and the rest comes from the start of the file."""
    path = write(tmp_path / "v.mkv")
    reference = decode_all(path)
    read(path, [0])
    kept = next(iter(packets._kept.values()))
    kept.sizes[43] += 1
    with pytest.raises(VideoError, match=r"v\.mkv: changed while it was read"):
        read(path, [47])
    assert not packets._kept
    assert_exact(path, reference, [47])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_file_that_is_replaced_between_uses(tmp_path, suffix):
    path, other = write(tmp_path / f"a{suffix}"), write(tmp_path / f"b{suffix}", seed=3)
    read(path, [5])
    reference = decode_all(other)
    os.replace(other, path)
    assert_exact(path, reference, [5, 40])
    assert open_files(tmp_path) == [path]


def test_a_file_that_is_truncated_between_uses(tmp_path):
    mp4, mkv = write(tmp_path / "v.mp4"), write(tmp_path / "v.mkv")
    for path in (mp4, mkv):
        read(path, [40])
        os.truncate(path, os.path.getsize(path) // 2)
    with pytest.raises(VideoError, match=r"v\.mp4: cannot be opened"):
        read(mp4, [40])
    reference = decode_all(mkv)
    with Video(mkv) as video:
        assert video.num_frames == len(reference) < 40
    assert_exact(mkv, reference, [3, 20])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_a_file_that_is_truncated_during_a_use(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (FRAMES, 48, 64, 3), np.uint8)
    path = write_video(tmp_path / f"v{suffix}", noise, options={"qp": "4"})
    with Video(path) as video:
        os.truncate(path, os.path.getsize(path) // 2)
        with pytest.raises(VideoError, match="changed while it was read"):
            list(video.frames([50]))
    assert not open_files(tmp_path)


# --- MP4 files that open by their header


HEADERS = [
    ("a.mp4", {}, True), ("b.mov", {}, False),
    ("c.mp4", {"container_options": {"movflags": "faststart"}, "audio": True}, True),
    ("d.mp4", {"drop_until": 15}, False),
    ("e.mp4", {"stamps": [k * k for k in range(FRAMES)]}, True),
    ("f.mp4", {"container_options": {"movflags": "negative_cts_offsets"}}, True),
    ("g.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}, False),
    ("h.mp4", {"codec": "libx265"}, False), ("i.mp4", {"open_gop": True}, False),
    ("j.mkv", {}, False), ("k.mp4", {"options": {"x264-params": "crop-rect=6,2,4,4"}}, True),
]  # fmt: skip


@pytest.mark.parametrize("limit", [-1, 2**20])
@pytest.mark.parametrize(("name", "options", "by_header"), HEADERS)
def test_plain_mp4_files_open_without_a_pass(
    tmp_path, monkeypatch, name, options, by_header, limit
):
    path, passes, scan = write(tmp_path / name, **options), [], packets.Packets._scan
    monkeypatch.setattr(packets, "SMALL", limit)
    monkeypatch.setattr(packets.Packets, "_scan", lambda *args: passes.append(1) or scan(*args))
    reference = decode_all(path)
    with Video(path) as fast:
        assert (not passes) == by_header
        monkeypatch.setattr(packets, "composition_offsets", lambda *args: None)
        packets._kept.clear()
        with Video(path) as slow:
            assert fast.num_frames == slow.num_frames == len(reference) and fast.fps == slow.fps
            assert np.array_equal(fast._packets.stamps, slow._packets.stamps)
            assert list(fast._shown) == list(slow._shown)
            for number, image in fast.frames([0, 7, 20, 21, len(reference) - 1]):
                assert np.array_equal(image, reference[number])


def test_hidden_frames_of_a_file_whose_stamps_number_nothing(tmp_path):
    """Its frames are in the order of the packets by their stamps, but not by the codec."""

    def stamp_in_order(k, packet):
        packet.pts = packet.dts
        return True

    path = tmp_path / "v.mp4"
    data = bytearray(Path(remux(write(tmp_path / "w.mp4"), path, stamp_in_order)).read_bytes())
    at = data.index(b"elst") + 16
    data[at : at + 4] = (int.from_bytes(data[at : at + 4], "big") + 3 * 512).to_bytes(4, "big")
    path.write_bytes(data)
    reference = decode_all(str(path))
    with Video(str(path)) as video:
        assert video.num_frames == len(reference) < FRAMES
    assert_exact(str(path), reference, [0, 5, len(reference) - 1])


@pytest.mark.parametrize("size", [b"\0\x10\0\x20", b"\xff\xff\x7f\xff"])
def test_a_header_that_lies_about_the_size(tmp_path, size):
    path = tmp_path / "v.mp4"
    data = bytearray(Path(write(path)).read_bytes())
    at = data.index(b"avc1", data.index(b"stsd")) + 4 + 24
    data[at : at + 4] = size
    path.write_bytes(data)
    with Video(str(path)) as video:
        assert (video.height, video.width) == (48, 64)
        assert next(video.frames([3]))[1].shape == (48, 64, 3)


def test_a_header_of_endless_samples(tmp_path):
    path = tmp_path / "v.mp4"
    data = bytearray(Path(write_video(path, moving_frames(9))).read_bytes())
    at = data.index(b"stsz") + 12
    data[at : at + 4] = b"\x7f\xff\xff\xff"
    path.write_bytes(data)
    with open(path, "rb") as file:
        assert packets.composition_offsets(file.fileno(), 0, len(data)) is None


# --- who holds what


def test_few_files_stay_open(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"{n}.mp4") for n in range(3)]
    monkeypatch.setattr(packets, "MAX_KEPT", 2)
    for path in paths:
        read(path, [5])
    assert open_files(tmp_path) == paths[1:]
    read(paths[1], [5])
    read(paths[0], [5])
    assert open_files(tmp_path) == paths[:2]
    monkeypatch.setattr(packets, "MAX_KEPT_PACKETS", 1)
    read(paths[0], [5])
    assert open_files(tmp_path) == paths[:1]


def test_a_video_is_not_kept_after_an_error(tmp_path):
    path = write(tmp_path / "v.mkv")
    with Video(path, time_limit=0.3) as video:
        time.sleep(0.35)
        with pytest.raises(VideoError, match="not read within"):
            list(video.frames([40]))
    assert not open_files(tmp_path)
    with pytest.raises(ZeroDivisionError), Video(path) as video:
        next(video.frames([40, 50]))
        raise ZeroDivisionError
    assert not open_files(tmp_path)


def test_a_closed_video_gives_no_frames(tmp_path):
    """Its packets may serve another one."""
    with Video(write(tmp_path / "v.mp4")) as video:
        frames = video.frames([5, 40])
        next(frames)
    with pytest.raises(VideoError, match="was closed"):
        next(frames)


def test_two_videos_of_one_file_at_once(tmp_path):
    path = write(tmp_path / "v.mp4")
    reference = decode_all(path)
    with Video(path) as first, Video(path) as second:
        for one, two in zip(first.frames([5, 30, 50]), second.frames([2, 14, 40]), strict=True):
            assert np.array_equal(one[1], reference[one[0]])
            assert np.array_equal(two[1], reference[two[0]])
    assert open_files(tmp_path) == [path]


def test_threads(tmp_path):
    paths = [write(tmp_path / f"{n}.mp4", seed=n) for n in range(3)]
    references = [decode_all(path) for path in paths]

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            n, wanted = rng.integers(3), sorted(set(rng.integers(0, FRAMES, 4).tolist()))
            assert_exact(paths[n], references[n], wanted)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(open_files(tmp_path)) == 3


def test_a_hung_read_keeps_its_container(tmp_path):
    path = write(tmp_path / "v.mp4")
    reference, hung, free = decode_all(path), threading.Event(), threading.Event()
    read(path, [5])

    def hang() -> None:
        with Video(path) as video:
            frames = video.frames([30, 50])
            next(frames)
            hung.set()
            free.wait()
            assert np.array_equal(next(frames)[1], reference[50])
        hung.clear()

    with pytest.raises(TimeoutError):
        call_within(0.2, hang)
    assert hung.is_set()
    assert_exact(path, reference, [12, 40])
    free.set()
    while hung.is_set():
        time.sleep(0.01)
    assert_exact(path, reference, [33])


def test_a_forked_process_opens_files_anew(tmp_path):
    """It would move the place in a file that its parent reads; raw pictures do not show this."""
    path = write(tmp_path / "v.ts")
    used = write_video(tmp_path / "u.avi", moving_frames(FRAMES), "rawvideo", pix_fmt="bgr24")
    references = [decode_all(path), decode_all(used)]
    read(path, [5])
    with Video(used) as video:
        frames = video.frames(range(FRAMES))
        next(frames)
        pid = os.fork()
        if not pid:
            try:
                assert open_files(tmp_path) == [used]
                assert_exact(path, references[0], [20, 50])
                for number, image in video.frames([14, 33]):  # of the parent's video
                    assert np.array_equal(image, references[1][number])
            except BaseException as error:
                print(error, file=sys.__stderr__)
                os._exit(1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        for number, image in frames:
            assert np.array_equal(image, references[1][number])
    assert_exact(path, references[0], [20, 50])
