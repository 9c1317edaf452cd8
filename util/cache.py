"""Remote videos and shards, fetched whole into a folder of this machine, once for all processes.

A file is written as NAME.part and renamed to NAME when it is complete. A process that fetches or
deletes NAME has the lock of NAME.lock (flock) for itself; processes that read NAME share the lock,
so a file in use stays. Locks also work between machines that share the folder, and end with their
processes.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.client import HTTPException
from typing import IO, Any
from urllib.parse import quote, urlparse
from urllib.request import urlopen

from util import file_io
from util.errors import UserError
from util.video.packets import forget
from util.video.source import file_of, find_member, member_path
from util.video.time_limit import TimeLimit, call_within

BLOCK = 1 << 18  # bytes that are read and written at a time
OWN = re.compile(r"[0-9a-f]{16}-.*(?<!\.lock)")  # names of fetched files, also unfinished ones
TIMEOUT = 30  # seconds without a byte until a connection is given up
RETRIES, RETRY_SECONDS = 3, 1.0  # each wait is twice the last one
TEMPORARY = 408, 429, *range(500, 600)  # answers of servers after which a file is fetched anew
POLL_SECONDS = 0.1
GB = 10**9
_times: dict[str, int] = {}  # fetched file -> its mtime when this process used it last


class Cache:
    """A folder of fetched files, of which the least recently used leave when there is no room.

    What an address holds may not change: it is not fetched again while its file is here.

    Args:
        folder: empty for mae_video_UID in $TMPDIR or /tmp.
        limit_gb: 10^9 bytes; 0: the disk is the limit.
    """

    def __init__(self, folder: str = "", limit_gb: float = 0):
        default = os.path.join(tempfile.gettempdir(), f"mae_video_{os.getuid()}")
        self.is_private, self.limit = not folder, limit_gb * GB
        self.folder = os.path.abspath(folder or default)

    @contextlib.contextmanager
    def hold(self, path: str, seconds: float = 60.0) -> Iterator[str]:
        """Yield the path on this machine of a video, which stays there until the body ends.

        What is remote is fetched first, by this process or another one. This takes any time, if no
        `seconds` pass without progress. Raise UserError if it fails.
        """
        if not file_io.is_remote(path):
            yield path
            return
        address, member, limit = file_of(path), find_member(path), TimeLimit(seconds)
        slow = f"no progress in {seconds:g} seconds, by this process or another"
        with file_io.errors_of("fetch", address, slow):
            if not address.startswith(file_io.ADDRESSES):
                raise ValueError(f"addresses start with {', '.join(file_io.ADDRESSES)}")
            name = os.path.basename(urlparse(address).path)[-50:]
            name = f"{hashlib.sha1(os.fsencode(address)).hexdigest()[:16]}-{name}"
            local = os.path.join(self.folder, name)
            lock = call_within(limit, partial(self._acquire, address, local, limit.restart))
        with lock:
            yield member_path(member._replace(shard=local)) if member else local

    def _acquire(self, address: str, local: str, restart: Callable[[], None]) -> IO[bytes]:
        """Fetch a file unless it is there; return its lock, shared with other readers."""
        os.makedirs(self.folder, 0o700 if self.is_private else 0o777, exist_ok=True)
        if self.is_private and os.lstat(self.folder).st_uid != os.getuid():
            raise PermissionError(f"{self.folder} is another user's; give another --cache_dir")
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context(open(f"{local}.lock", "ab"))
            seen = os.fstat(lock.fileno()).st_mtime_ns
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    if os.path.exists(local):
                        fetched = os.stat(local).st_mtime_ns
                        if fetched != _times.get(local):  # anew
                            forget(local)
                            _times[local] = fetched
                        os.utime(local, ns=(time.time_ns(), fetched))  # the time of its last use
                        stack.pop_all()  # the caller closes it
                        return lock
                    fcntl.flock(lock, fcntl.LOCK_UN)
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._fetch(address, local, lambda: (os.utime(lock.fileno()), restart()))
                    continue
                time.sleep(POLL_SECONDS)
                # The process that fetches the file sets the lock's time whenever bytes come.
                if seen != (seen := os.fstat(lock.fileno()).st_mtime_ns):
                    restart()

    def _fetch(self, address: str, local: str, progress: Callable[[], Any]) -> None:
        """Fetch a file, of which nothing stays if this fails or is no video."""

        def write(file: Any) -> None:
            fetch = fetch_s3 if address.startswith("s3://") else fetch_http
            fetch(address, file, partial(self._reserve, file, progress), progress)
            file.seek(0)
            file_io.refuse_other_kinds(file.read(64), address, "a video")
            file.seek(0)
            if address.endswith(".tar") and not tarfile.is_tarfile(file):
                raise UserError(f"{address} is damaged or not a tar file")

        for failures in range(1, RETRIES + 2):
            progress()
            try:
                return file_io.write_atomically(local, write, ".part")
            except (OSError, HTTPException) as error:
                if failures > RETRIES or getattr(error, "code", 500) not in TEMPORARY:
                    raise
                file_io.print_any(f"{address}: {error}; trying again")
            time.sleep(RETRY_SECONDS * 2 ** (failures - 1))

    def _reserve(self, file: IO[bytes], progress: Callable[[], Any], size: int | None) -> None:
        """Let files leave until this one may have `size` bytes; wait while all are in use."""
        if self.limit and (size is None or size > self.limit):
            has = "an unknown size" if size is None else f"{size / GB:.3g} GB"
            raise ValueError(f"it has {has}, and --cache_gb is {self.limit / GB:g}")
        with open(os.path.join(self.folder, ".lock"), "ab") as lock:
            while True:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if self._make_room(size or 0):
                    file.truncate(size or 0)  # which other processes count from now on
                    return
                fcntl.flock(lock, fcntl.LOCK_UN)
                progress()
                time.sleep(POLL_SECONDS)

    def _make_room(self, size: int) -> bool:
        """Delete files that nobody uses, least recently used first, until `size` bytes fit."""
        files = []  # last use, bytes, path
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                if OWN.fullmatch(entry.name):
                    files.append((entry.stat().st_atime, entry.stat().st_size, entry.path))
        lacking = size - shutil.disk_usage(self.folder).free
        excess = size + sum(x[1] for x in files) - (self.limit or float("inf"))
        for _, freed, path in sorted(files):
            if max(lacking, excess) <= 0:
                break
            # NAME.part is in use, too, unless its process was killed
            lock = open(f"{path.removesuffix('.part')}.lock", "ab")  # noqa: SIM115
            with lock, contextlib.suppress(BlockingIOError, FileNotFoundError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with open(path, "r+b") as file:
                    os.remove(path)
                    file.truncate(0)  # processes may keep descriptors, and so the bytes
                lacking, excess = lacking - freed, excess - freed
        if lacking > 0:
            raise ValueError(f"No space left on device: {self.folder}")
        return excess <= 0


# Both write what an address holds to a file, after they have reserved its size (None: unknown).
def fetch_http(address: str, file: Any, reserve: Callable, progress: Callable) -> None:
    url = quote(os.fsencode(address), safe="%/:?#[]@!$&'()*+,;=~")  # csvs hold any bytes
    with urlopen(url, timeout=TIMEOUT) as body:
        length = body.headers["Content-Length"]
        if length is None and not body.chunked:
            raise ValueError("the server does not say how many bytes it sends")
        reserve(size := length and int(length))
        while block := body.read(BLOCK):
            file.write(block)
            progress()
    if file.tell() < (size or 0):
        raise ConnectionError(f"it breaks off after {file.tell():,} of {size:,} bytes")


def fetch_s3(address: str, file: Any, reserve: Callable, progress: Callable) -> None:
    bucket, _, key = address.removeprefix("s3://").partition("/")
    client = s3_client(os.getpid())
    reserve(client.head_object(Bucket=bucket, Key=key)["ContentLength"])
    client.download_fileobj(bucket, key, file, Callback=lambda _: progress())


@functools.cache
def s3_client(process: int) -> Any:
    """Return the client of a process, as a forked one must not use its parent's connections."""
    import boto3
    from botocore.config import Config

    retries: Any = {"total_max_attempts": 1 + RETRIES, "mode": "standard"}
    config = Config(retries=retries, connect_timeout=TIMEOUT, read_timeout=TIMEOUT)
    return boto3.Session().client("s3", config=config)
