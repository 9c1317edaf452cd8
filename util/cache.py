"""Remote videos and shards, fetched whole into a folder of this machine, once for all processes.

A file is written as NAME.part and renamed to NAME when it is complete. A process that fetches or
deletes NAME has the lock of NAME.lock (flock) for itself; processes that read NAME share the lock,
so a file in use stays. Locks also work between machines that share the folder, and end with their
processes.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from typing import IO, Any
from urllib.parse import quote, urlparse
from urllib.request import Request, urlopen

from util.errors import UserError
from util.file_io import ADDRESSES, HAS_S3, S3_ERRORS, is_remote, refuse_other_kinds
from util.video.source import file_of, find_member, member_path
from util.video.time_limit import TimeLimit, call_within

BLOCK = 1 << 18  # bytes that are read and written at a time
OWN = re.compile(r"[0-9a-f]{16}-.*(?<!\.lock)")  # names of fetched files, also unfinished ones
TIMEOUT = 30  # seconds without a byte until a connection is given up
RETRIES, RETRY_SECONDS = 3, 1.0  # in a row; each wait is twice the last one
POLL_SECONDS = 0.1
USE_SECONDS = 60  # a file's mtime says when it was used last, as exactly as this
GB = 10**9
FULL = errno.ENOSPC, errno.EDQUOT
LASTING = "ValueError|InvalidURL|gaierror|Credentials|Profile|ParamValidation|Checksum"  # errors


@dataclass
class Cache:
    """A folder of fetched files, of which the least recently used leave when the limit is reached.

    What an address holds may not change: it is not fetched again while its file is here.
    """

    folder: str = ""  # empty: mae_video_UID in $TMPDIR or /tmp
    limit_gb: float = 0  # 10^9 bytes; 0: the disk is the limit

    def __post_init__(self) -> None:
        default = os.path.join(tempfile.gettempdir(), f"mae_video_{os.getuid()}")
        self.folder, self.limit = os.path.abspath(self.folder or default), self.limit_gb * GB

    @contextlib.contextmanager
    def hold(self, path: str, seconds: float = 60.0) -> Iterator[str]:
        """Yield the path on this machine of a video, which stays there until the body ends.

        What is remote is fetched first, by this process or another one. This takes any time, if no
        `seconds` pass without progress. Raise UserError if it fails.
        """
        if not is_remote(path):
            yield path
            return
        address, member, limit = file_of(path), find_member(path), TimeLimit(seconds)
        try:
            if not address.startswith(ADDRESSES):
                raise ValueError(f"addresses start with {', '.join(ADDRESSES)}")
            name = os.path.basename(urlparse(address).path)[-50:]
            name = f"{hashlib.sha1(os.fsencode(address)).hexdigest()[:16]}-{name}"
            local = os.path.join(self.folder, name)
            lock = call_within(limit, partial(self._acquire, address, local, limit.restart))
        except TimeoutError as error:
            slow = f"no progress in {seconds:g} seconds, by this process or another"
            raise UserError(f"cannot fetch {address}: {slow}") from error
        except (OSError, ValueError) as error:  # of the folder; not an address
            raise UserError(f"cannot fetch {address}: {error}") from error
        with lock:
            yield member_path(member._replace(shard=local)) if member else local

    def _acquire(self, address: str, local: str, restart: Callable[[], None]) -> IO[bytes]:
        """Fetch a file unless it is there; return its lock, shared with other readers."""
        os.makedirs(self.folder, exist_ok=True)
        lock = open(f"{local}.lock", "a+b", buffering=0)  # noqa: SIM115  (the caller closes it)
        first = seen = os.fstat(lock.fileno()).st_mtime_ns
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if os.path.exists(local):
                    if time.time() - os.path.getmtime(local) > USE_SECONDS:
                        os.utime(local)
                    return lock
                fcntl.flock(lock, fcntl.LOCK_UN)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._fetch(address, local, lock, first, restart)
                continue
            time.sleep(POLL_SECONDS)
            # The process that fetches the file sets the lock's time whenever bytes come.
            if seen != (seen := os.fstat(lock.fileno()).st_mtime_ns):
                restart()

    def _fetch(
        self, address: str, local: str, lock: IO[bytes], first: int, restart: Callable[[], None]
    ) -> None:
        """Fetch a file; if another process failed to, since this one asked, raise its error."""
        part = f"{local}.part"
        try:
            with open(part, "w+b", buffering=0) as file:
                # NFS may have told of a time before; a new file in the folder makes it look again.
                if os.path.exists(local):
                    return os.remove(part)
                lock.seek(0)
                if os.fstat(lock.fileno()).st_mtime_ns != first and (failure := lock.read()):
                    raise UserError(failure.decode())
                lock.truncate(0)
                self._download(address, file, lambda: (os.utime(lock.fileno()), restart()))
                refuse_wrong(file, address)
                os.fsync(file.fileno())
                os.replace(part, local)
        except BaseException as error:
            with contextlib.suppress(OSError):  # the disk may be full
                os.remove(part)
                if isinstance(error, UserError):
                    lock.truncate(0)
                    lock.write(str(error).encode(errors="replace"))
            lock.close()  # which the error's traceback would keep
            raise

    def _download(self, address: str, file: Any, progress: Callable[[], Any]) -> None:
        """Write what an address holds to a file; after a break, go on there if the server can."""
        opener = open_s3 if address.startswith("s3://") else open_http
        done, most, size, tag, failures = 0, 0, None, "", 0
        while True:
            try:
                progress()
                body, done, size, tag = opener(address, done, tag)
                with contextlib.closing(body):
                    self._reserve(file, size, progress)
                    file.seek(done)
                    while block := body.read(BLOCK):
                        if file.write(block) < len(block):
                            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                        done += len(block)
                        progress()
                if size in (None, done):
                    return file.truncate(done)
                raise ConnectionError(f"it breaks off after {done:,} of {size:,} bytes")
            except (OSError, ValueError, HTTPException, *S3_ERRORS) as error:
                failures = 1 if done > most else failures + 1
                most, is_full = max(done, most), getattr(error, "errno", 0) in FULL
                lacking = (size or 0) - done + BLOCK
                again = self._evict(file, lacking) if is_full else is_temporary(error)
                if failures > RETRIES or not again:
                    problem = " ".join(str(error).split())
                    hint = f" in {self.folder}; --cache_dir may be on another disk" * is_full
                    raise UserError(f"cannot fetch {address}: {problem}{hint}") from error
            time.sleep(RETRY_SECONDS * 2 ** (failures - 1))

    def _reserve(self, file: Any, size: int | None, progress: Callable[[], Any]) -> None:
        """Let files leave until this one may have `size` bytes; wait while all are in use."""
        while self.limit:
            if size is None or size > self.limit:
                has = "an unknown size" if size is None else f"{size / GB:.3g} GB"
                raise ValueError(f"it has {has}, and --cache_gb is {self.limit_gb:g}")
            with open(os.path.join(self.folder, ".lock"), "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                excess = sum(x[1] for x in self._files(file)) + size - self.limit
                if excess <= 0 or excess <= self._evict(file, excess):
                    file.truncate(size)  # which other processes count from now on
                    return
            progress()
            time.sleep(POLL_SECONDS)

    def _files(self, own: Any) -> list[tuple[float, int, str]]:
        """Return (last use, bytes, path) of fetched files but `own`, least recently used first."""
        found = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                if OWN.fullmatch(entry.name) and entry.path != own.name:
                    found.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        return sorted(found)

    def _evict(self, own: Any, excess: float) -> int:
        """Delete files that nobody uses, least recently used first, to free `excess` bytes."""
        freed = 0
        for _, size, path in self._files(own):
            if freed >= excess:
                break
            # NAME.part is in use, too, unless its process was killed
            lock = open(f"{path.removesuffix('.part')}.lock", "ab")  # noqa: SIM115
            with lock, contextlib.suppress(BlockingIOError, FileNotFoundError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.remove(path)
                freed += size
        return freed

    def shortage(self, paths: Iterable[str]) -> str:
        """Return a warning if the remote shards of these videos do not fit, else nothing."""
        sizes: dict[str, int] = {}
        for member in filter(None, map(find_member, paths)):
            sizes[member.shard] = max(member.offset + member.size, sizes.get(member.shard, 0))
        os.makedirs(self.folder, exist_ok=True)
        total, room = sum(sizes.values()), self.limit or shutil.disk_usage(self.folder).total
        if total <= room:
            return ""
        return (
            f"{len(sizes)} remote shards have {total / GB:.3g} GB, the cache {room / GB:.3g}: in "
            "random order, each shard is fetched many times. Give a larger --cache_gb or another "
            "--cache_dir, or copy the shards to this machine first (aws s3 sync)"
        )


# Openers take an address, the offset to start from, and the tag of the version that was begun. They
# return the body, its offset, and the size (None: the body says where it ends) and tag of the file.
def open_http(address: str, start: int, tag: str) -> tuple[Any, int, int | None, str]:
    headers = {"Range": f"bytes={start}-", "If-Range": tag} if start and tag else {}
    url = quote(os.fsencode(address), safe="%/:?#[]@!$&'()*+,;=~")  # csvs hold any bytes
    body = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    start = start if body.status == 206 else 0
    length = body.headers["Content-Length"]
    if length is None and not body.chunked:
        raise HTTPException("the server does not say how many bytes it sends")
    return body, start, length and start + int(length), body.headers["ETag"]


def open_s3(address: str, start: int, tag: str) -> tuple[Any, int, int | None, str]:
    if not HAS_S3:
        raise ValueError("it needs `pip install boto3`")
    bucket, _, key = address.removeprefix("s3://").partition("/")
    options = {"Range": f"bytes={start}-", "IfMatch": tag} if start else {}
    found = s3_client(os.getpid()).get_object(Bucket=bucket, Key=key, **options)
    return found["Body"], start, start + found["ContentLength"], found["ETag"]


@functools.cache
def s3_client(process: int) -> Any:
    """Return the client of a process, as a forked one must not use its parent's connections."""
    import boto3
    from botocore.config import Config

    timeouts: Any = {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT}
    config = Config(retries={"total_max_attempts": 1}, **timeouts)  # Cache tries again itself
    return boto3.Session().client("s3", config=config)


def is_temporary(error: Any) -> bool:
    """Return whether what failed may succeed a moment later."""
    answer = getattr(error, "response", None) or {}  # botocore's; urllib's errors have a code
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") or getattr(error, "code", 0)
    if status:
        return status in (408, 429) or status >= 500
    kinds = f"{type(error).__mro__} {getattr(error, 'reason', '')!r}"
    return not re.search(LASTING, kinds)


def refuse_wrong(file: Any, address: str) -> None:
    """Raise UserError if a file begins like a web page, or a shard unlike a tar file."""
    file.seek(0)
    start = file.read(tarfile.BLOCKSIZE)
    refuse_other_kinds(start, address, "a video")
    if address.endswith(".tar"):
        try:
            tarfile.TarInfo.frombuf(start, tarfile.ENCODING, "surrogateescape")
        except tarfile.TarError as error:
            raise UserError(f"{address} is damaged or not a tar file: {error}") from error
