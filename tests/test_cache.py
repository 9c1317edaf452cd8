"""Tests of util/cache.py with real servers: http.server with faults on order, and moto for S3."""

import contextlib
import functools
import http.server
import io
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from iopath.common.file_io import HTTPURLHandler, PathManager
from iopath.common.s3 import S3PathHandler

import main_finetune
import main_pretrain
import main_test
from tests.test_scripts import FINETUNE, PRETRAIN, assert_same_weights, call, finish, spawn
from tests.video_files import write_video
from util import cache, checkpoint, file_io
from util.args import clip_options
from util.cache import GB, Cache
from util.errors import UserError
from util.file_io import list_names, make_dirs, open_file, read_text, write_atomically
from util.kinetics import Kinetics, VideoIndex
from util.loader import VideoLoader, make_loader
from util.meters import append_log
from util.shards import write_shard
from util.video import packets
from util.video.source import file_of, member_path
from util.windows import WindowReader

CPU = torch.device("cpu")
MB = 10**6
FORK = multiprocessing.get_context("fork")


@dataclass
class Server:
    """An HTTP server of files in memory; `faults` of a path are spent one per request."""

    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0  # that a body takes, in ten parts
    keep_alive: bool = False
    requests: list[tuple[str, str, int]] = field(default_factory=list)  # path, range, status
    address: str = ""

    def count(self, path: str) -> int:
        return sum(name == path for name, _, _ in self.requests)


@pytest.fixture
def web(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(cache, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(cache, "POLL_SECONDS", 0.01)
    web = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):  # as boto3 does, before it fetches an object
            self.send_response(200)
            self.send_header("Content-Length", str(len(web.files[self.path])))
            self.send_header("ETag", '"1"')
            self.end_headers()

        def do_GET(self):
            path, wanted = self.path, self.headers.get("Range", "")
            fault = web.faults[path].pop(0) if web.faults.get(path) else ""
            self.close_connection = not web.keep_alive
            if fault.isdigit() or (path not in web.files and fault != "redirect"):
                return self.answer(int(fault or 404), b"no", {"Content-Length": "2"})
            if fault == "redirect":
                return self.answer(302, b"", {"Location": "/elsewhere", "Content-Length": "0"})
            content, status, headers = web.files[path], 200, dict(web.headers)
            if part := re.fullmatch(r"bytes=(\d+)-(\d*)", wanted):
                start, end = int(part[1]), int(part[2] or len(content) - 1) + 1
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
                content, status = content[start:end], 206
            headers["ETag"] = '"1"'
            if fault.startswith("chunked"):
                headers["Transfer-Encoding"] = "chunked"
                content = b"%x\r\n%b\r\n" % (len(content), content)
                content += b"0\r\n\r\n" * (fault == "chunked")
            elif fault != "no length":
                headers["Content-Length"] = str(len(content))
            content = content[: len(content) // 2] if fault in ("short", "hang") else content
            self.answer(status, content, headers)
            if fault == "hang":
                time.sleep(20)

        def answer(self, status, content, headers):
            web.requests.append((self.path, self.headers.get("Range", ""), status))
            self.send_response(status)
            for item in headers.items():
                self.send_header(*item)
            self.end_headers()
            step = max(-(-len(content) // 10), 1)
            with contextlib.suppress(ConnectionError):  # of those whom a test kills
                for begin in range(0, len(content), step):
                    self.wfile.write(content[begin : begin + step])
                    time.sleep(web.seconds / 10)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.daemon_threads, httpd.block_on_close = True, False
        threading.Thread(target=httpd.serve_forever, args=[0.02], daemon=True).start()
        web.address = f"http://127.0.0.1:{httpd.server_port}"
        yield web
        httpd.shutdown()


@pytest.fixture(scope="module")
def shards(videos, tmp_path_factory) -> Path:
    """Pack six videos into three shards, with csvs whose paths start from their folder."""
    folder, rows = tmp_path_factory.mktemp("shards"), []
    for s in range(3):
        files = [(f"v{i}.mp4", str(videos / f"v{i}.mp4")) for i in (2 * s, 2 * s + 1)]
        for i, member in enumerate(write_shard(str(folder / f"{s}.tar"), files)):
            label = (2 * s + i) % 3
            rows.append(f"{member_path(member._replace(shard=f'{s}.tar'))} {label}\n")
    for split in ("train", "val", "test"):
        (folder / f"{split}.csv").write_text("".join(rows))
    return folder


def tar(size: int) -> bytes:
    """Return a tar file with one member of `size` random bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        info = tarfile.TarInfo("v.mp4")
        info.size = size
        file.addfile(info, io.BytesIO(np.random.default_rng(size).bytes(size)))
    return out.getvalue()


def read(held: Cache, address: str, seconds: float = 60.0) -> bytes:
    """Return what an address holds, through a cache."""
    with held.hold(address, seconds) as local:
        return Path(local).read_bytes()


def fetched(folder: Path) -> list[str]:
    """Return the names of the files in a cache, without those of locks."""
    names = [x for x in os.listdir(folder) if not x.endswith(".lock")]
    return sorted(name.partition("-")[2] for name in names)


class Fetcher:
    """A process that fetches an address, and says how many bytes it has or what went wrong."""

    def __init__(self, held: Cache, address: str, seconds: float = 60.0, begin: bool = True):
        self.answer, report = FORK.Pipe(duplex=False)
        self.begin = FORK.Event()
        self.process = FORK.Process(target=self.run, args=(report, held, address, seconds))
        self.process.start()  # before the test holds a file: a fork would have its lock, too
        if begin:
            self.begin.set()

    def run(self, report, held, address, seconds):
        self.begin.wait()
        try:
            report.send(str(len(read(held, address, seconds))))
        except UserError as error:
            report.send(str(error))

    def wait(self) -> str:
        assert self.answer.poll(30)
        said = self.answer.recv()
        self.process.join(10)
        return said


def wait_until(happened, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def moto() -> Iterator[tuple[str, PathManager]]:
    """Run moto's server; return its address and a path manager for it."""
    from moto.server import ThreadedMotoServer  # slow to import

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    cache.s3_client.cache_clear()
    yield f"http://{host}:{port}", new_manager()
    cache.s3_client.cache_clear()
    server.stop()


@pytest.fixture
def s3(moto, monkeypatch):
    """Return a client of moto's server, with an empty bucket called data."""
    address, manager = moto
    use_s3(address, manager, monkeypatch)
    client = cache.s3_client(os.getpid())
    client.create_bucket(Bucket="data")
    yield client
    for item in client.list_objects_v2(Bucket="data").get("Contents", []):
        client.delete_object(Bucket="data", Key=item["Key"])
    client.delete_bucket(Bucket="data")


def new_manager() -> PathManager:
    """Return file_io's path manager anew, with a client of its own."""
    manager = PathManager()
    manager.register_handler(HTTPURLHandler())
    manager.register_handler(S3PathHandler(profile=None))
    return manager


def use_s3(address: str, manager: PathManager, monkeypatch) -> None:
    """Let new clients of this process and its children talk to one server."""
    monkeypatch.setattr(cache, "RETRY_SECONDS", 0.01)
    for name, value in {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "key",
                        "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
                        "AWS_EC2_METADATA_DISABLED": "true"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(file_io, "path_manager", manager)
    monkeypatch.setattr(checkpoint, "path_manager", manager)


@pytest.fixture
def new_client(monkeypatch) -> Iterator[None]:
    """Let a test have clients of its own, made from its environment."""
    monkeypatch.setattr(cache, "s3_client", functools.cache(cache.s3_client.__wrapped__))
    monkeypatch.setattr(file_io, "path_manager", new_manager())
    yield


# --- data sets


def test_a_remote_data_set_gives_the_clips_of_a_local_one(web, shards, videos, tmp_path):
    for path in [*shards.iterdir(), videos / "v0.mp4"]:
        web.files[f"/data/{path.name}"] = path.read_bytes()
    web.files["/data/train.csv"] += f"{web.address}/data/v0.mp4 0\n".encode()
    sizes = {"input_size": 32, "num_frames": 4, "sampling_rate": 4, "repeat_aug": 2}
    local = Kinetics(VideoIndex(str(videos / "train.csv")), "pretrain", **sizes)
    index = VideoIndex(f"{web.address}/data/train.csv")
    remote = Kinetics(index, "pretrain", **sizes, cache_dir=str(tmp_path / "cache"))
    loader = VideoLoader(remote, 1, 2, 0.0, CPU)
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            row = int(batch.row)
            assert torch.equal(batch.clips[0], local[epoch, row % 6].clips) or row == 6
            assert int(batch.label) == row % 6 % 3 and not batch.errors[0]
    names = "0.tar", "1.tar", "2.tar", "v0.mp4"
    assert [web.count(f"/data/{name}") for name in names] == [1, 1, 1, 1]
    assert fetched(tmp_path / "cache") == sorted(names)


def test_errors_name_the_address(web, tmp_path):
    web.files["/a.mp4"] = b"no video" * 100
    web.faults["/b.mp4"] = ["403"]
    paths = [f"{web.address}/{name}.mp4" for name in "ab"]
    dataset = Kinetics(VideoIndex.of_files(paths), "test", 32, 4, 4, cache_dir=str(tmp_path))
    first, second = (dataset[0, row].errors[paths[row]] for row in range(2))
    assert first.startswith(f"{paths[0]}: ") and str(tmp_path) not in first
    assert second == f"cannot fetch {paths[1]}: HTTP Error 403: Forbidden"


@pytest.mark.parametrize("main, flags", [(main_pretrain, PRETRAIN), (main_finetune, FINETUNE)])
def test_flags_reach_the_data_sets(main, flags, tmp_path):
    args = main.parse_args([*flags, "--cache_dir", str(tmp_path), "--cache_gb", "0.5"])
    for training, mode in ((True, "pretrain"), (False, "test")):
        dataset = Kinetics(VideoIndex.of_files(["s3://b/x"]), mode, **clip_options(args, training))
        assert (dataset.cache.folder, dataset.cache.limit) == (str(tmp_path), GB / 2)


# --- one process fetches, the others wait


def test_many_processes_fetch_once_in_any_time_with_progress(web, tmp_path):
    web.files["/x.tar"], web.seconds = tar(MB), 1.6
    fetchers = [Fetcher(Cache(str(tmp_path)), f"{web.address}/x.tar", 1.0) for _ in range(6)]
    assert {fetcher.wait() for fetcher in fetchers} == {str(len(web.files["/x.tar"]))}
    assert web.count("/x.tar") == 1 and fetched(tmp_path) == ["x.tar"]


def test_the_next_process_fetches_what_a_killed_one_began(web, tmp_path):
    web.files["/x.tar"], web.seconds = tar(20 * MB), 2.0
    first = Fetcher(Cache(str(tmp_path)), f"{web.address}/x.tar")
    part = lambda: list(tmp_path.glob("*.part"))  # noqa: E731
    wait_until(lambda: part() and part()[0].stat().st_size > 2 * MB)
    second = Fetcher(Cache(str(tmp_path)), f"{web.address}/x.tar")
    time.sleep(0.1)
    assert second.process.is_alive() and fetched(tmp_path) == ["x.tar.part"]
    first.process.kill()
    first.process.join()
    web.seconds = 0.0
    second.wait()
    assert read(Cache(str(tmp_path)), f"{web.address}/x.tar") == web.files["/x.tar"]
    assert web.count("/x.tar") == 2 and fetched(tmp_path) == ["x.tar"]


# --- broken transfers


@pytest.mark.parametrize(
    "faults, wanted",
    [
        (["short"], 2),
        (["503", "429", "500"], 4),
        (["redirect"], 1),
        (["chunked"], 1),
        (["chunked, broken"], 2),
    ],
)
def test_transfers_start_anew_after_a_break(web, tmp_path, faults, wanted):
    web.files["/x y.tar"] = web.files["/elsewhere"] = tar(5 * MB)
    web.files["/x%20y.tar"] = web.files["/x y.tar"]
    web.faults["/x%20y.tar"] = list(faults)
    assert read(Cache(str(tmp_path)), f"{web.address}/x y.tar") == web.files["/x y.tar"]
    assert web.count("/x%20y.tar") == wanted and fetched(tmp_path) == ["x y.tar"]


@pytest.mark.parametrize(
    "faults, content, problem, requests",
    [
        (["short"] * 9, tar(MB), "it breaks off after 5.* of 1,", 4),
        (["404"], b"", "HTTP Error 404: Not Found", 1),
        (["403"], b"", "HTTP Error 403: Forbidden", 1),
        (["502"] * 9, b"", "HTTP Error 502: Bad Gateway", 4),
        (["no length"] * 9, tar(MB), "the server does not say how many bytes it sends", 1),
        ([], b"\n<html>Sign in</html>" * 100, r"x\.tar is damaged or not a video: it is a web", 1),
        ([], b"not a tar" * 1000, r"x\.tar is damaged or not a tar file", 1),
        ([], b"", r"x\.tar is damaged or not a tar file", 1),
    ],
)
def test_broken_downloads_are_refused(web, tmp_path, faults, content, problem, requests):
    web.files["/x.tar"], web.faults["/x.tar"] = content, list(faults)
    with pytest.raises(UserError, match=problem) as error:
        read(Cache(str(tmp_path)), f"{web.address}/x.tar")
    assert f"{web.address}/x.tar" in str(error.value) and "\n" not in str(error.value)
    assert web.count("/x.tar") == requests and fetched(tmp_path) == []


@pytest.mark.parametrize(
    "address, problem",
    [
        ("http://127.0.0.1:1/x.tar", "Connection refused"),
        ("http://no-such-host.invalid/x.tar", "urlopen error"),
        ("https://[x/y.tar", "Invalid IPv6 URL"),
        ("ftp://host/x.tar", "addresses start with http://, https://, s3://"),
        ("http://host:port/x.tar", "nonnumeric port"),
    ],
)
def test_servers_that_cannot_be_reached(web, tmp_path, address, problem):
    with pytest.raises(UserError, match=f"^cannot fetch {re.escape(address)}: .*{problem}"):
        read(Cache(str(tmp_path)), address)


def test_fetching_ends_without_progress(web, tmp_path, monkeypatch):
    web.files["/x.tar"], web.faults["/x.tar"] = tar(20 * MB), ["hang"] * 9
    with pytest.raises(UserError, match=r"x\.tar: no progress in 0\.2 seconds, by this process or"):
        read(Cache(str(tmp_path)), f"{web.address}/x.tar", 0.2)
    monkeypatch.setattr(cache, "TIMEOUT", 0.1)  # the connection ends before the patience
    with pytest.raises(UserError, match=r"y\.tar: .*timed out"):
        web.files["/y.tar"], web.faults["/y.tar"] = tar(MB), ["hang"] * 9
        read(Cache(str(tmp_path)), f"{web.address}/y.tar", 5.0)


def test_waiting_ends_if_the_other_process_stands_still(web, tmp_path):
    web.files["/x.tar"], web.seconds = tar(20 * MB), 0.5
    first = Fetcher(Cache(str(tmp_path)), f"{web.address}/x.tar")
    wait_until(lambda: list(tmp_path.glob("*.part")))
    os.kill(first.process.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match=r"no progress in 0\.2 seconds, by this process or another"):
        read(Cache(str(tmp_path)), f"{web.address}/x.tar", 0.2)
    os.kill(first.process.pid, signal.SIGCONT)
    assert first.wait() == str(len(web.files["/x.tar"])) and web.count("/x.tar") == 1


# --- limits


def test_the_least_recently_used_files_leave(web, tmp_path):
    web.files |= {f"/{name}.tar": tar(MB) for name in "abcdef"}
    held = Cache(str(tmp_path), 3.1 * MB / GB)
    address = {name: f"{web.address}/{name}.tar" for name in "abcdef"}
    for age, name in enumerate("abc"):
        with held.hold(address[name]) as local:
            os.utime(local, (1000 + age, 0))
    read(held, address["a"])  # used again
    read(held, address["d"])
    assert fetched(tmp_path) == ["a.tar", "c.tar", "d.tar"]
    with held.hold(address["c"]) as local:  # in use, though it is the oldest
        os.utime(local, (1000, 0))
        read(held, address["e"])
        assert "c.tar" in fetched(tmp_path) and len(fetched(tmp_path)) == 3
    left = tmp_path / f"{'0123' * 4}-x.part"  # by a process that was killed
    others = [tmp_path / "my-own.mp4", tmp_path / "abc.tar"]
    for path in (left, *others):
        path.write_bytes(bytes(3 * MB))
        os.utime(path, (0, 0))
    (tmp_path / "folder").mkdir()
    read(held, address["f"])
    assert "f.tar" in fetched(tmp_path) and "x.part" not in fetched(tmp_path)
    assert all(path.exists() for path in others)  # of somebody else


@pytest.mark.parametrize("small, epochs", [(packets.SMALL, 2), (0, 12)])
def test_files_that_leave_free_their_bytes_and_may_come_again(
    web, tmp_path, monkeypatch, small, epochs
):
    """Processes keep descriptors of shards, and tables of large videos: of files that are gone."""
    monkeypatch.setattr(packets, "SMALL", small)
    noise = np.random.default_rng(0).integers(256, size=(60, 48, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "v.mp4", list(noise), options={"crf": "4"})  # FFmpeg holds 32 kB ahead
    paths = [str(tmp_path / "v.mp4")]
    for name in "ab":
        files = [(f"{i}.mp4", paths[0]) for i in range(2)]
        members = write_shard(str(tmp_path / f"{name}.tar"), files)
        web.files[f"/{name}.tar"] = (tmp_path / f"{name}.tar").read_bytes()
        paths += [member_path(x._replace(shard=f"{web.address}/{name}.tar")) for x in members]
    options = {
        "cache_dir": str(tmp_path / "cache"),
        "cache_gb": 1.2 * len(web.files["/a.tar"]) / GB,
    }
    dataset = Kinetics(VideoIndex.of_files(paths), "pretrain", 32, 4, 4, **options)
    local_one = Kinetics(VideoIndex.of_files(paths[:1] * 5), "pretrain", 32, 4, 4)
    with dataset.cache.hold(paths[1]) as local:
        kept = os.open(file_of(local), os.O_RDONLY)
    for epoch in range(epochs):
        for row in (1, 3, 2, 4):
            sample = dataset[epoch, row]
            assert not sample.errors and torch.equal(sample.clips, local_one[epoch, row].clips)
    assert os.fstat(kept).st_blocks == 0 and web.count("/a.tar") == 2 * epochs
    os.close(kept)


def test_use_is_remembered_apart_from_the_age_of_the_content(web, tmp_path):
    web.files["/x.tar"] = tar(1000)
    for _ in range(2):  # tables of large videos are valid as long as the mtime is the same
        with Cache(str(tmp_path)).hold(f"{web.address}/x.tar") as local:
            used = os.stat(local).st_atime
            os.utime(local, (1000, 1000))
    assert time.time() - used < 60 and os.stat(local).st_mtime == 1000


def test_windows_of_shards_do_not_wait_for_each_other(web, shards, tmp_path):
    """Workers with batches ahead keep their shard in use; room is left for no other one."""
    web.files = {f"/{path.name}": path.read_bytes() for path in shards.iterdir()}
    web.seconds = 0.1
    limit = 1.2 * max(map(len, web.files.values())) / GB
    options = {"cache_dir": str(tmp_path), "cache_gb": limit}
    index = VideoIndex(f"{web.address}/test.csv")
    reader = WindowReader(Kinetics(index, "test", 32, 4, 4, **options), [0, 2, 4, 1], 0.1, 1)
    shares = dict.fromkeys(reader.rows, 0.0)
    signal.alarm(30)
    for windows in make_loader(reader, 2):
        assert not windows.error and windows.share > shares[windows.row]
        shares[windows.row] = windows.share
    signal.alarm(0)
    assert set(shares.values()) == {1.0}


def test_fetching_waits_while_all_files_are_in_use(web, tmp_path):
    web.files |= {f"/{name}.tar": tar(MB) for name in "ab"}
    held = Cache(str(tmp_path), 1.5 * MB / GB)
    other = Fetcher(held, f"{web.address}/b.tar", 0.7, begin=False)
    with held.hold(f"{web.address}/a.tar") as local:
        other.begin.set()
        wait_until(lambda: web.count("/b.tar"))
        assert not other.answer.poll(0.8) and os.path.exists(local)
    assert other.wait() == str(len(web.files["/b.tar"])) and fetched(tmp_path) == ["b.tar"]


def test_processes_at_random_keep_the_limit(web, tmp_path):
    web.files |= {f"/{i}.tar": tar(MB) for i in range(6)}
    web.seconds, limit = 0.05, 2.1 * MB

    def use(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(6, size=9).tolist():
            content = read(Cache(str(tmp_path), limit / GB), f"{web.address}/{i}.tar")
            assert content == web.files[f"/{i}.tar"]

    processes = [FORK.Process(target=use, args=[seed]) for seed in range(6)]
    for process in processes:
        process.start()
    most = 0
    while any(process.is_alive() for process in processes):
        sizes = []
        for path in tmp_path.iterdir():
            with contextlib.suppress(FileNotFoundError):
                sizes.append(path.stat().st_size)
        most = max(most, sum(sizes))
        time.sleep(0.005)
    assert [process.exitcode for process in processes] == [0] * 6
    # while the folder is listed, one file may leave and another come
    assert most <= limit + 1.1 * MB and len(web.requests) > 6


def test_a_shard_larger_than_the_limit_is_refused(web, tmp_path):
    web.files["/x.tar"] = tar(MB)
    with pytest.raises(UserError, match=r"x\.tar: it has 0\.001 GB, and --cache_gb is 0\.0009$"):
        read(Cache(str(tmp_path), 0.0009), f"{web.address}/x.tar")
    web.faults["/x.tar"] = ["chunked"]
    with pytest.raises(UserError, match=r"it has an unknown size, and --cache_gb is 1$"):
        read(Cache(str(tmp_path), 1), f"{web.address}/x.tar")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk: needs root")
def test_a_full_disk(web, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
    try:
        web.files |= {f"/{name}.tar": tar(3 * MB) for name in "abc"}
        web.files["/large.tar"] = tar(9 * MB)
        held = Cache(str(disk))
        for name in "abc":
            assert read(held, f"{web.address}/{name}.tar") == web.files[f"/{name}.tar"]
        assert fetched(disk) == ["b.tar", "c.tar"]
        with held.hold(f"{web.address}/c.tar"):
            with pytest.raises(UserError, match=r"large\.tar: .*No space left on device: .*disk"):
                read(held, f"{web.address}/large.tar")
            assert fetched(disk) == ["c.tar"]
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user: needs root")
def test_the_default_folder_is_private(web, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    web.files["/x.tar"] = tar(1000)
    assert read(Cache(), f"{web.address}/x.tar") == web.files["/x.tar"]
    folder = tmp_path / f"mae_video_{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    os.chown(folder, 12345, 12345, follow_symlinks=False)
    with pytest.raises(UserError, match=f"{folder} is another user's; give another --cache_dir"):
        read(Cache(), f"{web.address}/x.tar")


def test_a_folder_that_cannot_be_written(web, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^cannot fetch .*x\.tar: .*Not a directory.*file/cache"):
        read(Cache(str(tmp_path / "file" / "cache")), f"{web.address}/x.tar")


# --- s3


def test_windows_of_shards_on_s3(s3, shards, videos, tmp_path):
    for path in shards.iterdir():
        s3.upload_file(str(path), "data", f"set/{path.name}")
    index = VideoIndex("s3://data/set/test.csv")
    options = {"cache_dir": str(tmp_path / "cache"), "item_timeout": 20.0}
    reader = WindowReader(Kinetics(index, "test", 32, 4, 4, **options), range(6), 0.5, 8)
    local = Kinetics(VideoIndex(str(videos / "test.csv")), "test", 32, 4, 4)
    for remote, own in zip(reader, WindowReader(local, range(6), 0.5, 8), strict=True):
        assert remote.error == own.error == "" and remote.row == own.row
        assert np.array_equal(remote.clips, own.clips)
    assert fetched(tmp_path / "cache") == ["0.tar", "1.tar", "2.tar"]


def test_workers_fetch_from_s3(s3, shards, tmp_path):
    for path in shards.iterdir():
        s3.upload_file(str(path), "data", f"set/{path.name}")
    index = VideoIndex(str(shards / "train.csv"), path_prefix="s3://data/set")
    dataset = Kinetics(index, "pretrain", 32, 4, 4, cache_dir=str(tmp_path / "cache"))
    first = dataset[0, 0]  # this process has a client, whose connections workers must not use
    own = Kinetics(VideoIndex(str(shards / "train.csv")), "pretrain", 32, 4, 4)
    assert torch.equal(first.clips, own[0, 0].clips)
    for batch in VideoLoader(dataset, 1, 2, 0.0, CPU):
        assert torch.equal(batch.clips[0], own[0, int(batch.row)].clips)
    assert fetched(tmp_path / "cache") == ["0.tar", "1.tar", "2.tar"]


@pytest.mark.parametrize(
    "address, problem",
    [
        ("s3://data/x.tar", r"\(404\)"),
        ("s3://other/x.tar", r"\(404\)"),
        ("s3://data", "Parameter validation failed"),
        ("s3://data/\udcff.tar", "surrogates not allowed"),
    ],
)
def test_objects_that_are_not_there(s3, tmp_path, address, problem):
    with pytest.raises(UserError, match=f"^cannot fetch {address}: .*{problem}") as error:
        read(Cache(str(tmp_path)), address)
    assert "\n" not in str(error.value)


def test_s3_without_credentials(s3, tmp_path, monkeypatch, new_client):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    calls = {
        "fetch": lambda: read(Cache(str(tmp_path)), "s3://data/x.tar"),
        "open": lambda: open_file("s3://data/x.csv"),
        "list": lambda: list_names("s3://data/run"),
        "create the folder": lambda: make_dirs("s3://data/run"),
    }
    for what, function in calls.items():
        with pytest.raises(UserError, match=rf"^cannot {what} s3://data.*Unable to locate cred"):
            function()
    with pytest.raises(OSError, match="Unable to locate credentials"):
        write_atomically("s3://data/run/x", lambda file: file.write(b"x"))


def test_breaks_of_transfers_from_s3(web, tmp_path, monkeypatch, new_client):
    use_s3(web.address, new_manager(), monkeypatch)
    no_wait = "botocore.retries.standard.ExponentialBackoff.delay_amount"
    monkeypatch.setattr(no_wait, lambda self, context: 0.01)
    path = "/data/b.tar"
    web.files[path], web.faults[path] = tar(20 * MB), ["503", "short", "429"]
    assert read(Cache(str(tmp_path)), f"s3:/{path}") == web.files[path]
    assert web.count(path) == 3 + 3  # it is fetched in three parts
    web.keep_alive = True  # this process has a connection, which its children must not use
    web.files |= {f"/data/{name}.tar": tar(5 * MB + i) for i, name in enumerate("fgh")}
    assert read(Cache(str(tmp_path)), "s3://data/f.tar") == web.files["/data/f.tar"]
    web.seconds, held = 0.2, Cache(str(tmp_path))
    fetchers = [Fetcher(held, f"s3://data/{name}.tar", begin=False) for name in "gh"]
    for fetcher in fetchers:
        fetcher.begin.set()
    assert [x.wait() for x in fetchers] == [str(len(web.files[f"/data/{x}.tar"])) for x in "gh"]
    for name in "gh":
        assert read(Cache(str(tmp_path)), f"s3://data/{name}.tar") == web.files[f"/data/{name}.tar"]
        assert web.count(f"/data/{name}.tar") == 1
    wrong, web.seconds = {"x-amz-checksum-crc32": "AAAAAA=="}, 0
    for name, faults, web.headers, problem, requests in [
        ("c", ["503"] * 9, {}, "503", 4),
        ("d", ["403"], {}, "403", 1),
        ("e", [], wrong, "did not match calculated checksum", 1),
    ]:
        path, web.requests = f"/data/{name}.tar", []
        web.files[path], web.faults[path] = tar(1000), list(faults)
        with pytest.raises(UserError, match=rf"^cannot fetch s3:/{path}: .*{problem}"):
            read(Cache(str(tmp_path)), f"s3:/{path}")
        assert web.count(path) == requests
    assert fetched(tmp_path) == [f"{name}.tar" for name in "bfgh"]


def test_files_on_s3_are_written_whole_or_not_at_all(s3):
    def fail(file) -> None:
        file.write(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically("s3://data/run/x", fail)
    assert list_names("s3://data/run") == []
    write_atomically("s3://data/run/x", lambda file: file.write(b"whole"))
    assert list_names("s3://data/run") == ["x"] and read_text("s3://data/run/x") == "whole"
    for i in range(2):
        append_log("s3://data/run", {"epoch": i})
    assert read_text("s3://data/run/log.txt") == '{"epoch": 0}\n{"epoch": 1}\n'
    with pytest.raises(UserError, match="cannot create the folder http://host/run: no files can"):
        make_dirs("http://host/run")


@pytest.mark.slow
def test_a_run_on_s3(s3, shards, videos, tmp_path, monkeypatch):
    """Shards, csvs, checkpoints and logs on S3: stopped and resumed, the same run as on a disk."""
    for path in shards.iterdir():
        s3.upload_file(str(path), "data", f"set/{path.name}")
    remote = ["--path_to_data_dir", "s3://data/set", "--cache_dir", tmp_path / "cache", *PRETRAIN]
    flags = ["--output_dir", "s3://data/run", "--epochs", 3, "--checkpoint_period", 1]
    process = spawn("main_pretrain.py", *remote, *flags)
    assert process.stdout is not None
    for line in process.stdout:
        if "saved s3://data/run/checkpoint-00000.pth" in line:
            process.kill()
    process.wait()
    out = finish(spawn("main_pretrain.py", *remote, *flags))
    assert "resumed from s3://data/run/checkpoint-" in out
    own = ["--path_to_data_dir", videos, "--output_dir", tmp_path / "run", "--epochs", 3]
    finish(spawn("main_pretrain.py", *own, *PRETRAIN))
    s3.download_file("data", "run/checkpoint-00002.pth", str(tmp_path / "s3.pth"))
    assert_same_weights(tmp_path / "s3.pth", tmp_path / "run" / "checkpoint-00002.pth")
    assert read_text("s3://data/run/log.txt") == (tmp_path / "run" / "log.txt").read_text()

    # Fine-tune from it, and test.
    start = ["--finetune", "s3://data/run/checkpoint-00002.pth", "--output_dir", "s3://data/tuned"]
    call(main_finetune, *remote[:4], *start, *FINETUNE, "--epochs", 1)
    start = ["--finetune", "s3://data/tuned/checkpoint-00000.pth", "--output_dir", "s3://data/test"]
    call(main_test, *remote[:4], *start, "--num_workers", 0, "--device", "cpu")
    assert {"log.txt", "predictions.csv", "scores.npz"} <= set(list_names("s3://data/test"))


@pytest.mark.slow
def test_s3_without_boto3(tmp_path):
    code = """
import sys
sys.modules["boto3"] = None
from util.cache import Cache
from util.errors import UserError
from util.weights import read_weights
for function in (lambda: Cache(sys.argv[1]).hold("s3://data/x.tar").__enter__(),
                 lambda: read_weights("s3://data/x.pth")):
    try:
        function()
    except UserError as error:
        print(error)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second = run.stdout.splitlines()
    assert first == "cannot fetch s3://data/x.tar: it needs `pip install boto3`"
    assert second == "cannot open s3://data/x.pth: it needs `pip install boto3`"
