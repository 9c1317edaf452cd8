"""Videos in tar files: read in place like files of their own, refused when wrong, indexed."""

import contextlib
import csv
import gc
import gzip
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

import main_features
import main_test
from tests.test_features import BUILD, CPU
from tests.test_imports import ROOT
from tests.test_kinetics import data_set, loader_of
from tests.test_prepare import lines, prepare
from tests.test_scripts import call
from tests.video_files import moving_frames, write_counter_video, write_video
from util.errors import UserError
from util.kinetics import Kinetics, VideoIndex
from util.shards import write_shard
from util.video import source
from util.video.decode import Video, VideoError
from util.video.source import Member, file_of, find_member, member_path, open_container
from util.video.transcode import find_damage
from util.windows import window_names


@pytest.fixture(autouse=True)
def no_descriptors():
    """Start and end each test without descriptors of shards."""
    source._close_idle()
    yield
    source._close_idle()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Five small videos in as many containers."""
    folder = tmp_path_factory.mktemp("files")
    kinds = {"a.mp4": "libx264", "b.mkv": "mpeg4", "c.webm": "libvpx", "d.avi": "mjpeg",
             "e.ts": "mpeg2video", "f.flv": "libx264", "g.h264": "libx264"}  # fmt: skip
    for name, codec in kinds.items():
        options = {"pix_fmt": "yuvj420p"} if codec == "mjpeg" else {}
        write_video(folder / name, moving_frames(30, seed=len(name)), codec=codec, **options)
    return sorted(folder.iterdir())


@pytest.fixture
def members(files, tmp_path) -> list[Member]:
    return write_shard(str(tmp_path / "s.tar"), [(f"x/{f.name}", str(f)) for f in files])


def frames_of(path: str) -> list[np.ndarray]:
    with Video(path) as video:
        return [frame for _, frame in video.frames(range(video.num_frames))]


def reason(path: str) -> str:
    """Return why a video is refused, without its path."""
    with pytest.raises(VideoError) as caught:
        Video(path)
    text = str(caught.value)
    del caught  # its traceback holds this frame, and the shard's descriptor with it
    assert text.startswith(f"{path}: ") and "\n" not in text
    return text.removeprefix(f"{path}: ")


def open_files(shard: str) -> int:
    """Count the descriptors of a shard in this process."""
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return sum(os.path.exists(x) and os.path.realpath(x) == os.path.realpath(shard) for x in links)


# --- reading --------------------------------------------------------------------------------------


def test_frames_are_those_of_the_files(files, members):
    for file, member in zip(files, members, strict=True):
        path = member_path(member)
        assert find_member(path) == member and file_of(path) == member.shard
        with Video(path) as inside, Video(str(file)) as alone:
            assert (inside.num_frames, inside.fps) == (alone.num_frames, alone.fps), file
        for a, b in zip(frames_of(path), frames_of(str(file)), strict=True):
            np.testing.assert_array_equal(a, b)
        assert find_damage(path) == ""


def test_tar_reads_what_write_shard_writes(files, members, tmp_path):
    tar = members[0].shard
    listed = subprocess.run(["tar", "tf", tar], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == [member.name for member in members]
    subprocess.run(["tar", "xf", tar, "-C", str(tmp_path)], check=True)
    for file, member in zip(files, members, strict=True):
        assert (tmp_path / member.name).read_bytes() == file.read_bytes()


def csvs(files: list[Path], members: list[Member], tmp_path: Path) -> tuple[str, str]:
    """Write a csv of files and one of members; row 2 of both is broken."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    cut = Member(members[0].shard, "gone.mp4", 1 << 40, 5)
    rows = [*map(str, files[:2]), str(broken), *map(str, files[2:])]
    inside = [*map(member_path, [*members[:2], cut, *members[2:]])]
    inside = [os.path.relpath(path, tmp_path) for path in inside]
    for name, paths in (("files.csv", rows), ("members.csv", inside)):
        text = "".join(f"{path} {label}\n" for label, path in enumerate(paths))
        (tmp_path / name).write_text(text)
    return str(tmp_path / "files.csv"), str(tmp_path / "members.csv")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_csv_of_members_gives_the_batches_of_its_files(files, members, tmp_path, workers):
    def batches(csv: str) -> list:
        dataset = Kinetics(VideoIndex(csv), "pretrain", 32, 4, 1, repeat_aug=2)
        return list(loader_of(dataset, 2, workers))

    alone, inside = (batches(csv) for csv in csvs(files, members, tmp_path))
    assert len(alone) == len(inside) == 4
    replaced = 0
    for a, b in zip(alone, inside, strict=True):
        assert all(map(torch.equal, a[:5], b[:5]))
        assert [*map(len, a.errors)] == [*map(len, b.errors)]
        replaced += sum(map(len, b.errors))
    assert replaced == 1


# --- descriptors ----------------------------------------------------------------------------------


def test_a_shard_is_opened_once(members, monkeypatch):
    calls = []
    open_shard = source._open_shard
    monkeypatch.setattr(source, "_open_shard", lambda x: calls.append(x) or open_shard(x))
    for _ in range(3):
        for member in members:
            Video(member_path(member)).close()
    assert calls == [os.path.abspath(members[0].shard)] and open_files(members[0].shard) == 1


def test_two_videos_of_a_shard_at_a_time(files, members):
    wanted = [frames_of(str(file)) for file in files[:2]]
    videos = [Video(member_path(member)) for member in members[:2]]
    streams = [video.frames(range(30)) for video in videos]
    for number in range(30):  # in turns
        for stream, frames in zip(streams, wanted, strict=True):
            np.testing.assert_array_equal(next(stream)[1], frames[number])
    assert open_files(members[0].shard) == 5  # two of each container, and one of the MP4
    for video in videos:
        video.close()
    del videos, video, streams, stream
    assert open_files(members[0].shard) == 1


def test_containers_read_in_turns(files, members):
    def packets(container) -> Iterable[bytes]:
        return (bytes(packet) for packet in container.demux(video=0))

    alone = [open_container(str(file)) for file in files]
    inside = [open_container(member_path(member)) for member in members]
    rows = [zip(*map(packets, containers), strict=False) for containers in (alone, inside)]
    count = 0
    for a, b in zip(*rows, strict=True):
        assert a == b
        count += 1
    assert count >= 30
    for container in (*alone, *inside):
        container.close()


def test_threads_read_one_shard(files, members):
    wanted = [np.stack(frames_of(str(file))) for file in files]
    wrong = []

    def read(order: list[int]) -> None:
        for k in order:
            if not np.array_equal(np.stack(frames_of(member_path(members[k]))), wanted[k]):
                wrong.append(k)

    orders = [[(5 * i + 3 * t) % len(files) for i in range(14)] for t in range(4)]
    threads = [threading.Thread(target=read, args=[order]) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and open_files(members[0].shard) <= 2


def test_a_forked_process_does_not_share_positions(files, members):
    wanted = np.stack(frames_of(str(files[0])))
    path, shard = member_path(members[0]), members[0].shard

    def all_right() -> bool:
        return all(np.array_equal(np.stack(frames_of(path)), wanted) for _ in range(20))

    with Video(path) as video:  # one descriptor in use
        stream = video.frames(range(30))
        next(stream)
        frames_of(path)  # and an idle one
        child = os.fork()
        if not child:  # has the open video's three, and one of its own
            os._exit(0 if all_right() and open_files(shard) == 4 else 1)
        assert all_right()
        np.testing.assert_array_equal(np.stack([frame for _, frame in stream]), wanted[1:])
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all_right()


def test_what_a_fork_inherits_stays_its_parents(files, members):
    path = member_path(members[1])  # Matroska, which is read from start to end
    assert members[1].size > 1 << 15  # more than is read at a time
    with open_container(str(files[1])) as container:
        wanted = list(map(bytes, container.demux(video=0)))
    container = open_container(path)
    packets = container.demux(video=0)
    first = bytes(next(packets))
    child = os.fork()
    if not child:
        container.close()
        del container, packets
        frames_of(path)  # with a descriptor of its own
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [first, *map(bytes, packets)] == wanted
    container.close()


def test_the_least_recently_used_shard_is_closed(files, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "MAX_IDLE", 3)
    file = [("v.mp4", str(files[0]))]
    shards = [write_shard(f"{tmp_path}/{i}.tar", file)[0] for i in range(4)]
    for i in (0, 1, 2, 0, 3, 1):
        Video(member_path(shards[i])).close()
    assert [Path(path).name for path in source._idle] == ["0.tar", "3.tar", "1.tar"]
    assert [open_files(member.shard) for member in shards] == [1, 1, 0, 1]


def test_few_descriptors_are_kept_where_few_are_allowed(files, tmp_path):
    shards = [write_shard(f"{tmp_path}/{i}.tar", [("v.mp4", str(files[0]))]) for i in range(40)]
    paths = [member_path(member) for [member] in shards]
    code = f"""if True:
        import resource
        from util.video import source
        from util.video.decode import Video
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        for path in {paths}:
            Video(path).close()
        print(len(source._idle))
    """
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "32", run.stderr


def test_a_stale_descriptor_is_replaced(members, tmp_path, monkeypatch):
    frames_of(member_path(members[0]))
    shard, calls, open_shard = os.path.abspath(members[0].shard), [], source._open_shard
    monkeypatch.setattr(source, "_open_shard", lambda x: calls.append(x) or open_shard(x))
    folder = os.open(tmp_path, os.O_RDONLY)
    os.dup2(folder, source._idle[shard][0])  # from now on, reading from it is an error
    os.close(folder)
    for _ in range(2):
        assert len(frames_of(member_path(members[0]))) == 30
    assert calls == [shard] and open_files(shard) == 1 and open_files(str(tmp_path)) == 0


def test_refused_members_leave_no_descriptors(members):
    other = member_path(members[0]._replace(name="y.mp4"))
    for _ in range(20):
        with contextlib.suppress(VideoError):
            Video(other)
    assert open_files(members[0].shard) <= 1


# --- refusals -------------------------------------------------------------------------------------


def changed(member: Member, **changes) -> str:
    return reason(member_path(member._replace(**changes)))


def test_members_that_are_not_there_are_refused(members, tmp_path):
    _, b, *_ = members
    text = f"at byte {b.offset} its shard has x/b.mkv with {b.size} bytes: the list is of another"
    assert text in changed(b, name="x/a.mp4")
    assert text in changed(b, name="x/b.mk")
    assert text in changed(b, size=b.size + 1)
    assert text in changed(b, size=b.size - 1)
    for offset in (b.offset + 512, b.offset - 512, b.offset + 1, b.offset - 1, 0, 511):
        assert f"at byte {offset} its shard has no file" in changed(b, offset=offset)
    size = os.path.getsize(b.shard)
    for changes in ({"offset": 10**17}, {"size": 10**18 - 1}, {"offset": size // 512 * 512}):
        assert f"its shard is cut off at byte {size}, or has changed" in changed(b, **changes)
    with open(b.shard, "r+b") as file:
        file.truncate(b.offset + b.size - 1)
    gc.collect()  # errors keep descriptors
    source._close_idle()
    assert f"its shard is cut off at byte {b.offset + b.size - 1}" in changed(b)
    assert len(frames_of(member_path(members[0]))) == 30  # what is there can be read


def test_paths_that_name_no_member_are_files(members):
    path = member_path(members[0])
    for odd in (path + "0" * 30, path.replace("+", "+\u0663"), path.replace("@", "@ "), path + "x"):
        assert find_member(odd) is None and reason(odd) == "no such file"


def test_the_long_name_of_the_member_before_does_not_count(clip, tmp_path):
    write_tar(tmp_path / "s.tar", {LONG: clip, "b.mp4": clip})
    with tarfile.open(tmp_path / "s.tar") as tar:
        first, second = tar.getmembers()
    member = Member(f"{tmp_path}/s.tar", LONG, first.offset_data, first.size)
    assert len(frames_of(member_path(member))) == 5
    assert f"its shard has b.mp4 with {first.size}" in changed(member, offset=second.offset_data)


def test_shards_that_are_none_are_refused(members, tmp_path):
    member = members[0]
    assert f"{tmp_path}/no.tar does not exist" in changed(member, shard=f"{tmp_path}/no.tar")
    (tmp_path / "d.tar").mkdir()
    assert f"{tmp_path}/d.tar is a folder" in changed(member, shard=f"{tmp_path}/d.tar")
    os.mkfifo(tmp_path / "p.tar")
    assert "p.tar is not a regular file" in changed(member, shard=f"{tmp_path}/p.tar")
    packed = gzip.compress(Path(member.shard).read_bytes())
    (tmp_path / "z.tar").write_bytes(packed + bytes(1 << 20))
    text = "its shard is compressed; unpack it: gzip"
    assert text in changed(member, shard=f"{tmp_path}/z.tar")
    (tmp_path / "z.tar").write_bytes(packed[:100])
    source._close_idle()
    assert text in changed(member, shard=f"{tmp_path}/z.tar")
    if os.geteuid():
        os.chmod(member.shard, 0)
        source._close_idle()
        assert "Permission denied" in changed(member)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE])
def test_links_and_sparse_files_are_refused(tmp_path, kind):
    header = tarfile.TarInfo("a.mp4")
    header.type, header.size, header.linkname = kind, 512, "b.mp4"
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    if kind == tarfile.GNUTYPE_SPARSE:
        block[386:398] = block[398:410] = b"%011o\0" % 512
        block[483:495] = b"%011o\0" % 512  # its real size
        block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    (tmp_path / "s.tar").write_bytes(bytes(block) + bytes(2048))
    assert "the list is of another shard" in reason(f"{tmp_path}/s.tar/a.mp4@512+512")


def test_damaged_headers_give_the_video_or_a_sentence(members, tmp_path):
    content, rng = bytearray(Path(members[1].shard).read_bytes()), np.random.default_rng(0)
    start = members[1].offset - 512
    for number in range(200):
        damaged = content.copy()
        for place in rng.integers(start, start + 512, rng.integers(1, 9)):
            damaged[place] = rng.integers(256)
        path = tmp_path / f"{number}.tar"
        path.write_bytes(damaged)
        try:
            Video(member_path(members[1]._replace(shard=str(path)))).close()
        except VideoError as error:
            assert "its shard has" in str(error)
        path.unlink()
        source._close_idle()


LONG = "deep/" * 30 + "n" * 60 + ".mp4"
NAMES = [
    *("plain.mp4", "./dot/a.mp4", "d/../up.mp4", "/abs.mp4", "space, comma.mp4", 'q"uote.mp4'),
    *("#first.mp4", "at@1+2.mp4", "in.tar/side.mp4", "caf\u00e9.mp4", "bytes\udcff.mp4"),
    *(" lead.mp4", "trail .mp4", "n" * 96 + ".mp4"),
    *("n" * 97 + ".mp4", LONG, "\u00e9" * 60 + ".mp4", LONG.replace("n", "\udcfe")),  # long ones
]
FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(
    path: Path, files: dict[str, bytes | str | Path], form: int = tarfile.GNU_FORMAT
) -> Path:
    """Write a tar of files, given by their contents or paths, in the order of the dict."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files.items():
            if isinstance(content, Path):
                content = content.read_bytes()
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return Path(write_counter_video(tmp_path_factory.mktemp("clip") / "v.mp4", 5))


def rows_of(csv: Path) -> list[tuple[str, int]]:
    index = VideoIndex(str(csv))
    return [(index.path(row), int(index.labels[row])) for row in range(len(index))]


@pytest.mark.parametrize("form", FORMS)
def test_names_of_all_kinds_are_listed_and_read(clip, tmp_path, form):
    names = NAMES[:14] if form == "ustar" else NAMES  # it has no place for the others
    files = {}
    for number, name in enumerate(names):
        files |= {name: clip, name.removesuffix("mp4") + "cls": str(number)}
    write_tar(tmp_path / "out/set.tar", files, FORMS[form])
    assert prepare("webdataset", tmp_path, tmp_path / "out", "--val_share", 0, "--verify") == 0
    rows = rows_of(tmp_path / "out/train.csv")
    assert len(rows) == len(names)
    for (path, label), name in zip(rows, names, strict=True):
        member = find_member(path)
        assert label == names.index(name) and member and member.size == clip.stat().st_size
        plain = {"./dot/a.mp4": "dot/a.mp4", "d/../up.mp4": "up.mp4", "/abs.mp4": "abs.mp4"}
        assert member.name == plain.get(name, name)
        assert member.shard == f"{tmp_path}/out/set.tar"
        assert len(frames_of(path)) == 5
        assert "its shard has" in changed(member, name=member.name[1:])
        assert "its shard has" in changed(member, size=member.size - 512)
    VideoIndex.of_files([path for path, _ in rows])
    stems = window_names(VideoIndex(str(tmp_path / "out/train.csv")))
    assert list(stems.values()) == [os.path.splitext(os.path.basename(x))[0] for x in names]


@pytest.mark.parametrize("form", ["gnu", "posix", "ustar", "v7", "oldgnu"])
def test_tars_of_gnu_tar(clip, tmp_path, form):
    names = ["a.mp4", "caf\u00e9.mp4", "d/" + "n" * 90 + ".mp4"]
    names += [LONG] * (form in ("gnu", "posix", "oldgnu"))
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(clip.read_bytes())
    command = ["tar", "cf", tmp_path / "s.tar", f"--format={form}", "-C", tmp_path / "in", "."]
    subprocess.run(command, check=True)
    assert prepare("webdataset", tmp_path, tmp_path, "--verify") == 0
    rows = rows_of(tmp_path / "train.csv")
    assert sorted(find_member(path).name for path, _ in rows) == sorted(names)
    assert all(len(frames_of(path)) == 5 for path, _ in rows)


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_members_of_more_than_8_gib(clip, tmp_path, form):
    content, size = clip.read_bytes(), 9 << 30
    tar = tmp_path / "s.tar"
    with open(tar, "wb") as file:
        for name in ("a.mp4", "b.mp4"):
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf(FORMS[form]))
            file.write(content)
            file.seek(size - len(content), os.SEEK_CUR)  # a hole
        file.truncate(file.tell() + 1024)
    assert prepare("webdataset", tmp_path, tmp_path) == 0
    rows = rows_of(tmp_path / "train.csv")
    assert [find_member(path).size for path, _ in rows] == [size] * 2
    assert find_member(rows[1][0]).offset > size
    assert len(frames_of(rows[1][0])) == 5
    assert "its shard has" in changed(find_member(rows[1][0]), size=size - 512)


def test_videos_of_shards_are_given_by_their_paths(members, tmp_path):
    path = member_path(members[0])
    assert VideoIndex.of_files([path]).path(0) == path
    with pytest.raises(UserError, match=r"^nowhere/x\.tar is no file$"):
        VideoIndex.of_files(["nowhere/x.tar/a.mp4@512+1"])
    (tmp_path / "train.csv").write_text(f"s.tar/{path.partition('.tar/')[2]} 0\n")
    data_set(tmp_path).index.refuse_missing()
    os.remove(members[0].shard)
    with pytest.raises(UserError, match="do not exist"):
        data_set(tmp_path).index.refuse_missing()


def test_scripts_give_the_same_for_members(videos, tmp_path):
    for kind in ("mean", "mae"):
        model = BUILD[kind]()
        content = {"model": model.state_dict(), "arguments": model.arguments}
        torch.save(content, tmp_path / f"{kind}.pth")
    files = [f"{videos}/v{i}.mp4" for i in range(3)]
    members = write_shard(f"{tmp_path}/s.tar", [(f"a b/{i}.mp4", x) for i, x in enumerate(files)])
    paths, results = {"alone": files, "inside": [*map(member_path, members)]}, []
    for name, rows in paths.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.csv").write_text("".join(f"{x} 1\n" for x in rows))
        words = ["--path_to_data_dir", tmp_path / name, "--num_clips", 1, "--num_crops", 1, *CPU]
        out = tmp_path / name / "out"
        call(main_test, "--finetune", tmp_path / "mean.pth", "--output_dir", out, *words)
        words += ["--splits", "test", "--finetune", tmp_path / "mae.pth"]
        call(main_features, *words, "--output_dir", out)
        call(main_features, *words, "--output_dir", out / "w", "--window_stride", 0.5)
        with np.load(out / "scores.npz") as scores, np.load(out / "test.npz") as features:
            results.append([scores["scores"], features["features"]])
            assert features["paths"].tolist() == rows
        with (out / "predictions.csv").open() as file:
            assert [row["video"] for row in csv.DictReader(file)] == rows
        windows = sorted((out / "w/windows/test").glob("*.npz"))
        assert [path.stem[-1] for path in windows] == ["0", "1", "2"]
        results[-1] += [np.load(path)["features"] for path in windows]
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


# --- WebDataset -----------------------------------------------------------------------------------


def index(folder: Path, *words) -> tuple[int, dict[str, list[tuple[str, int]]]]:
    """Index tars below a folder; return the status, and names and labels by split."""
    status = prepare("webdataset", folder, folder / "out", *words)
    lists = {path.stem: rows_of(path) for path in sorted((folder / "out").glob("*.csv"))}
    return status, {
        split: [(find_member(path).name, label) for path, label in rows]
        for split, rows in lists.items()
    }


def test_labels_are_numbers_or_names(clip, tmp_path, capsys):
    cases = {
        "cls": [{"json": '{"label": 7}', "cls": "1"}, {"cls": " 0\n"}, {"cls": "1"}],
        "label": [{"json": '{"label": 1}'}, {"json": '{"label": 0, "id": 7}'},
                  {"json": '{"class": "1"}'}],
        "names": [{"json": '{"label": "b c"}'}, {"json": '{"category": "a"}'}, {"cls": "b c"}],
        "own": [{"json": '{"label": [], "verb": "b"}', "cls": "9"}, {"json": '{"verb": "a"}'},
                {"json": '{"verb": "b"}'}],
    }  # fmt: skip
    classes = {"names": ["a", "b c"], "own": ["a", "b"]}
    for case, samples in cases.items():
        files: dict = {}
        for number, labels in enumerate(samples):
            files |= {f"{number}.{kind}": text for kind, text in labels.items() if number % 2}
            files |= {f"{number}.mp4": clip}
            files |= {f"{number}.{kind}": text for kind, text in labels.items()}
        write_tar(tmp_path / case / "x.tar", files)
        words = ["--label_key", "verb"] if case == "own" else []
        status, lists = index(tmp_path / case, "--val_share", 0, *words)
        assert status == 0, case
        assert lists == {"train": [("0.mp4", 1), ("1.mp4", 0), ("2.mp4", 1)]}, case
        names = tmp_path / case / "out/classes.txt"
        assert (lines(names) if names.exists() else None) == classes.get(case), case


def test_absent_numbers_are_named(clip, tmp_path, capsys):
    write_tar(tmp_path / "x.tar", {"a.mp4": clip, "a.cls": "3", "b.mp4": clip, "b.cls": "1"})
    assert index(tmp_path, "--val_share", 0)[1] == {"train": [("a.mp4", 3), ("b.mp4", 1)]}
    out = capsys.readouterr().out
    assert "WARNING: labels of no video: 0, 2\n" in out and "; unnamed classes;" in out
    (tmp_path / "out/classes.txt").write_text("mine\n")
    index(tmp_path, "--val_share", 0)
    assert "out/classes.txt is not of this call" in capsys.readouterr().out
    assert lines(tmp_path / "out/classes.txt") == ["mine"]


def test_samples_as_webdataset_groups_them(clip, tmp_path):
    files = {"d.e/a.mp4": clip, "d.e/a.cls": "0", "d/a.MKV": clip, "d/a.CLS": "1", "b.cls": "1",
             "./b.rgb.mp4": clip, "README": "x", "._c.mp4": "x", "e.jpg": "x"}  # fmt: skip
    with tarfile.open(write_tar(tmp_path / "x.tar", files), "a") as tar:
        info = tarfile.TarInfo("link")  # some writers give links the size of their files
        info.type, info.linkname, info.size = tarfile.LNKTYPE, "README", 1 << 40
        tar.addfile(info)
    rows = [("d.e/a.mp4", 0), ("d/a.MKV", 1), ("b.rgb.mp4", 1)]
    assert index(tmp_path, "--val_share", 0) == (0, {"train": rows})


def test_splits_of_tars(clip, tmp_path):
    files = {"a.mp4": clip, "a.cls": "0", "b.mp4": clip, "b.cls": "1"}
    for name in ("train/0.tar", "train/1.tar", "k400-val-000.tar", "Test/deep/x.tar"):
        write_tar(tmp_path / "named" / name, files)
    lists = index(tmp_path / "named")[1]
    assert {split: len(rows) for split, rows in lists.items()} == {"train": 4, "val": 2, "test": 2}
    many = {f"{i}.mp4": clip for i in range(25)} | {f"{i}.cls": str(i % 5) for i in range(25)}
    write_tar(tmp_path / "none/0.tar", many)
    lists = index(tmp_path / "none")[1]
    assert sorted(label for _, label in lists["val"]) == [0, 1, 2, 3, 4]  # a fifth of each class
    assert lists["test"] == lists["val"] and len(lists["train"]) == 20
    with pytest.raises(UserError, match="--val_share has no effect"):
        index(tmp_path / "named", "--val_share", 0.1)
    (tmp_path / "named/k400-val-000.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"k400-val-000\.tar: is not a tar file"):
        index(tmp_path / "named")
    write_tar(tmp_path / "named/k400-val-000.tar", {"a.cls": "0"})
    with pytest.raises(UserError, match=r"val\.csv would be empty: no video below .* is for it"):
        index(tmp_path / "named")
    write_tar(tmp_path / "named/k400-val-000.tar", files)
    write_tar(tmp_path / "named/odd.tar", files)
    with pytest.raises(UserError, match=r"odd\.tar.*: neither train, val nor test is in its path"):
        index(tmp_path / "named")
    write_tar(tmp_path / "two/val/train.tar", files)
    with pytest.raises(UserError, match=r"train\.tar: is this train or val\? Its path says both"):
        index(tmp_path / "two")


def test_sets_without_labels_are_listed_for_pretraining(clip, tmp_path):
    write_tar(tmp_path / "x.tar", {"a.mp4": clip, "b.mp4": clip, "b.json": '{"caption": "x"}'})
    assert index(tmp_path)[1] == {"train": [("a.mp4", -1), ("b.mp4", -1)]}
    assert all(re.search(r"mp4@\d+\+\d+$", line) for line in lines(tmp_path / "out/train.csv"))
    assert not (tmp_path / "out/val.csv").exists() and not (tmp_path / "out/classes.txt").exists()


def test_the_list_of_an_earlier_call_goes(clip, tmp_path, capsys):
    write_tar(tmp_path / "val.tar", {"a.mp4": clip})
    assert index(tmp_path)[1].keys() == {"val", "test"}
    os.rename(tmp_path / "val.tar", tmp_path / "train.tar")
    assert index(tmp_path)[1].keys() == {"train"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.mp4": "", "b.mp4": "", "b.cls": "0"}, r"/a\.mp4@512\+0 has no label, unlike others"),
        ({"a.mp4": "", "a.avi": "", "a.cls": "0"}, r"a sample has two videos, a\.mp4 and a\.avi"),
        ({"a.x.mp4": "", "a.y.mp4": "", "a.cls": "0"}, r"two videos, a\.x\.mp4 and a\.y\.mp4"),
        ({"a.mp4": "", "a.cls": "0", "b.mp4": "", "b.cls": "x"}, r"b\.mp4.* has the label x, but"),
        ({"a.mp4": "", "a.cls": ""}, "'' is neither the number nor the name of a class"),
        ({"a.mp4": "", "a.cls": "-1"}, "'-1' is neither"),
        ({"a.mp4": "", "a.cls": "1.5"}, r"'1\.5' is neither"),
        ({"a.mp4": "", "a.cls": "123456"}, "'123456' is neither"),
        ({"a.mp4": "", "a.json": '{"label": true}'}, "True is neither"),
        ({"a.mp4": "", "a.json": '{"label": [3]}'}, r"\[3\] is neither"),
        ({"a.mp4": "", "a.json": '{"label"'}, r"its \.json cannot be read"),
        ({"a.mp4": "", "a.json": '{"label": "\\ud800"}'}, r"its \.json cannot be read"),
        ({"a.mp4": "", "a.cls": "a\nb"}, "holds a line break"),
        ({"a.jpg": "", "a.cls": "0"}, r"train\.csv would be empty: no video below .* is for it"),
    ],
)  # fmt: skip
def test_odd_samples_are_refused(tmp_path, files, words):
    write_tar(tmp_path / "x.tar", files)
    with pytest.raises(UserError, match=words):
        index(tmp_path)
    assert not (tmp_path / "out").exists()


def test_links_are_no_samples(clip, tmp_path):
    with tarfile.open(write_tar(tmp_path / "x.tar", {"a.mp4": clip, "a.cls": "0"}), "a") as tar:
        info = tarfile.TarInfo("b.mp4")
        info.type, info.linkname = tarfile.LNKTYPE, "a.mp4"
        tar.addfile(info)
    with pytest.raises(UserError, match=r"x\.tar: b\.mp4 is a link or sparse"):
        index(tmp_path)


def test_folders_may_not_look_like_tars(clip, tmp_path):
    write_tar(tmp_path / "set.tar/x.tar", {"a.mp4": clip, "a.cls": "0"})
    with pytest.raises(UserError, match=r"no folder above a tar file may be named \.tar"):
        index(tmp_path)


def test_compressed_tars_are_refused(clip, tmp_path, capsys):
    packed = gzip.compress(write_tar(tmp_path / "x.tar", {"a.mp4": clip}).read_bytes())
    (tmp_path / "x.tar").write_bytes(packed)
    with pytest.raises(UserError, match=r"x\.tar is compressed; unpack it: gzip"):
        index(tmp_path)
    (tmp_path / "x.tar").rename(tmp_path / "x.tar.gz")
    with pytest.raises(
        UserError, match=r"holds no tar files \(named \.tar, which are not compressed"
    ):
        index(tmp_path)
    assert "passed over: 1 .gz" in capsys.readouterr().out


def test_damaged_tars_are_named_and_give_what_is_before(clip, tmp_path, capsys):
    size, files = len(clip.read_bytes()), {}
    for i in range(3):
        files |= {f"{i}.mp4": clip, f"{i}.cls": "0"}
    whole = write_tar(tmp_path / "t/whole.tar", files).read_bytes()
    with tarfile.open(tmp_path / "t/whole.tar") as tar:
        last = tar.getmember("2.mp4")
    assert size == last.size
    contents = {
        "inside": whole[: last.offset_data + 100],
        "between": whole[: last.offset],
        "header": whole[: last.offset + 100],
        "mark": whole[: last.offset + 512 + -(-size // 512) * 512],  # without its label
        "flipped": whole[: last.offset + 3] + b"!" + whole[last.offset + 4 :],
        "empty": b"",
        "page": b"<html>" * 1000,
    }
    for name, content in contents.items():
        (tmp_path / f"t/{name}.tar").write_bytes(content)
    status, lists = index(tmp_path, "--val_share", 0)
    assert status == 1 and len(lists["train"]) == 3 + 5 * 2
    out = capsys.readouterr().out
    assert "7 broken files:" in out
    assert (
        "inside.tar: breaks off in 2.mp4\n" in out and "mark.tar: breaks off after 2.mp4\n" in out
    )
    for name in ("between", "header", "flipped"):
        assert f"{name}.tar: breaks off after 1.cls\n" in out
    assert "empty.tar: is not a tar file\n" in out and "page.tar: is not a tar file\n" in out
    os.remove(tmp_path / "t/whole.tar")
    for name in contents.keys() - {"page"}:
        os.remove(tmp_path / f"t/{name}.tar")
    with pytest.raises(UserError, match=r"train\.csv would be .*page\.tar: is not a tar file"):
        index(tmp_path)


def test_only_headers_and_labels_are_read(tmp_path):
    def bytes_read() -> int:
        return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])

    count, size = 100, 20 << 20
    with open(tmp_path / "x.tar", "wb") as file:  # 2 GB, mostly a hole
        for i in range(count):
            for name, length in ((f"{i}.mp4", size), (f"{i}.json", 512)):
                info = tarfile.TarInfo(name)
                info.size = length
                file.write(info.tobuf())
                if length == size:
                    file.seek(size, os.SEEK_CUR)
                else:
                    file.write(json.dumps({"label": i}).encode().ljust(length))
        file.truncate(file.tell() + 1024)
    before = bytes_read()
    assert len(index(tmp_path, "--val_share", 0)[1]["train"]) == count
    assert bytes_read() - before < count * 2 * 2048 + 100_000


def test_verify_decodes_members(files, tmp_path, capsys):
    content = {f.name: f for f in files if f.suffix in (".mp4", ".mkv")} | {"bad.mp4": "no video"}
    write_tar(tmp_path / "x.tar", content)
    assert index(tmp_path, "--verify")[0] == 1
    out = capsys.readouterr().out
    assert "2 of 3 videos can be decoded" in out and "x.tar/bad.mp4@" in out


def test_members_are_reencoded(clip, tmp_path):
    write_tar(tmp_path / "in/x.tar", {"d/a.mp4": clip, "d/a.cls": "0", "b.mp4": clip, "b.cls": "1"})
    words = ["webdataset", tmp_path / "in", tmp_path / "out", "--val_share", 0]
    for _ in range(2):  # the second call keeps the copies
        assert prepare(*words, "--reencode", tmp_path / "out/copies") == 0
    rows = [f"{tmp_path}/out/copies/x.tar/d/a.mp4", f"{tmp_path}/out/copies/x.tar/b.mp4"]
    assert rows_of(tmp_path / "out/train.csv") == [(rows[0], 0), (rows[1], 1)]
    assert len(frames_of(rows[0])) == 5
