"""Where the bytes of a video are: in a file of its own, or inside a tar file (a shard).

The path of a video in a shard is SHARD.tar/NAME@OFFSET+SIZE, where the shard's bytes from OFFSET on
are the video. Every path of this form names a video in a shard; no file is looked for. FFmpeg reads
the video in place. Shards may not change while a process reads from them: descriptors of shards
stay open, so that opening a video needs neither a look-up nor an opening in the file system.
"""

import contextlib
import io
import os
import re
import resource
import tarfile
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import av
from av.container import InputContainer

MEMBER = re.compile(r"(.+?\.tar)/(.+)@([0-9]{1,18})\+([0-9]{1,18})", re.DOTALL)
# A title in an unknown encoding does not make a video unusable (PyAV 19 has no such argument).
LENIENT: dict[str, Any] = {"metadata_errors": "replace"} if av.__version__ < "19" else {}
BLOCK = tarfile.BLOCKSIZE
MAX_HEADERS = 128 * BLOCK  # bytes before a member in which its long name is looked for
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # how such files begin
UNPACK = "is compressed; unpack it: gzip, bzip2, xz or zstd with -dc FILE > NEW.tar"
Lease = tuple[str, int]  # an address for FFmpeg and the descriptor that it reads
MAX_IDLE = 256  # descriptors that a process keeps, and half of those that it may have


class Member(NamedTuple):
    """A video inside a shard."""

    shard: str
    name: str
    offset: int  # bytes
    size: int


def find_member(path: str) -> Member | None:
    """Return the shard and place that a path names; None if it is the path of a file."""
    match = MEMBER.fullmatch(path)
    return match and Member(match[1], match[2], int(match[3]), int(match[4]))


def member_path(member: Member) -> str:
    """Return the path of a video in a shard, as csvs hold it."""
    return f"{member.shard}/{member.name}@{member.offset}+{member.size}"


def file_of(path: str) -> str:
    """Return the file that holds a video: its shard, or itself."""
    member = find_member(path)
    return member.shard if member else path


def plain_name(name: str) -> str:
    """Return the name of a member without "./" and the like, which paths would lose."""
    return os.path.normpath(f"/{name}").lstrip("/")


@contextlib.contextmanager
def open_bytes(path: str) -> Iterator[tuple[int, int, Lease | None]]:
    """Open a file or shard for os.pread; give its descriptor and where in it the video starts.

    The lease is for one open_container inside of this block.

    Raises:
        OSError, ValueError: it cannot be opened, or is not in its shard.
    """
    if member := find_member(path):
        lease = _lease(member)
        yield lease[1], member.offset, lease
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd, 0, None
    finally:
        os.close(fd)


def open_container(
    path: str, options: dict[str, str] | None = None, probe: bool = True, lease: Lease | None = None
) -> InputContainer:
    """Open a local video, possibly in a shard, with options for its decoders.

    Args:
        probe: otherwise, nothing is decoded to learn more of a stream than the header says.

    Raises:
        av.FFmpegError, OSError, ValueError: it cannot be opened as a video, or is not in its shard.
    """
    # An absolute path cannot be read as a protocol ("http:name.mp4"). The whitelist keeps playlists
    # off the network.
    url, containers = os.path.abspath(path), {"protocol_whitelist": "file"}
    if member := find_member(path):
        url, fd = lease or _lease(member)
        containers = {"protocol_whitelist": "subfile,fd", "fd": str(fd)}
    if not probe:
        containers["codec_whitelist"] = "none"
    container = av.open(url, options=options or {}, container_options=containers, **LENIENT)
    assert container.name is url  # holds the lease
    return container


# --- descriptors of shards ------------------------------------------------------------------------


class _Address(str):
    """The address of a video in a shard; its container keeps it, and with it a descriptor."""


# shard -> (descriptor, bytes) that no container uses, least recently used first
_idle: OrderedDict[str, tuple[int, int]] = OrderedDict()


def _lease(member: Member) -> Lease:
    """Return an address and its descriptor, which is given back with the address.

    FFmpeg's duplicate of a descriptor shares its position, so it serves one container at a time.
    """
    shard = os.path.abspath(member.shard)
    for kept in (_idle.pop(shard, None), None):
        fd, size = kept or _open_shard(shard)
        end = member.offset + member.size
        address = _Address(f"subfile,,start,{member.offset},end,{end},,:fd:")
        lease = weakref.finalize(address, _give_back, os.getpid(), shard, fd, size)
        try:
            _check(member, fd, size)
            return address, fd
        except (OSError, ValueError):  # of a descriptor that was kept too long, perhaps
            lease.detach()
            os.close(fd)
            if kept is None:
                raise
    raise AssertionError


def _open_shard(shard: str) -> tuple[int, int]:
    """Open a shard; return its descriptor and size."""
    if not os.path.isfile(shard):  # opening a pipe would wait
        kind = "is a folder" if os.path.isdir(shard) else "is not a regular file"
        raise ValueError(f"{shard} {kind if os.path.exists(shard) else 'does not exist'}")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    with contextlib.suppress(KeyError):
        while len(_idle) >= (MAX_IDLE if limit < 0 else min(MAX_IDLE, limit // 2)):
            os.close(_idle.popitem(last=False)[1][0])
    fd = os.open(shard, os.O_RDONLY)
    return fd, os.fstat(fd).st_size


def _give_back(pid: int, shard: str, fd: int, size: int) -> None:
    """Keep a descriptor for the next video of its shard, unless there is one or this is a fork.

    Garbage collection may call this at any moment, so there is no lock: setdefault is atomic.
    """
    # The descriptor of a forked process shares its position with the parent's.
    if pid != os.getpid() or _idle.setdefault(shard, (fd, size))[0] != fd:
        os.close(fd)


def _close_idle() -> None:
    while _idle:
        os.close(_idle.popitem()[1][0])


os.register_at_fork(after_in_child=_close_idle)

# --- headers of members ---------------------------------------------------------------------------


def _check(member: Member, fd: int, shard_size: int) -> None:
    """Raise ValueError unless the header in front of a video has the name and size of its path."""
    end, found = member.offset + member.size, None
    if end <= shard_size:
        for extended in (False, True):
            found = _describe(fd, member.offset, extended) or found
            same = found and plain_name(found.name) == plain_name(member.name)
            if found and same and found.size == member.size and is_whole(found):
                return
    if os.pread(fd, BLOCK, 0).startswith(COMPRESSED):
        raise ValueError(f"its shard {UNPACK}")
    if end > shard_size:
        raise ValueError(f"its shard is cut off at byte {shard_size}, or has changed")
    there = f"{found.name} with {found.size} bytes" if found else "no file"
    raise ValueError(f"at byte {member.offset} its shard has {there}: the list is of another shard")


def _describe(fd: int, offset: int, extended: bool) -> tarfile.TarInfo | None:
    """Return what a tar file says of the file that begins at `offset`; None if none does.

    Args:
        extended: read headers of several blocks, which hold names of more than 100 bytes and, in
            some formats, other names or sizes that the last block has no place for.
    """
    if offset < BLOCK or offset % BLOCK:
        return None
    start = max(offset - MAX_HEADERS, 0) if extended else offset - BLOCK
    before = os.pread(fd, offset - start, start)
    for place in range(len(before) - (2 * BLOCK if extended else BLOCK), -1, -BLOCK):
        if extended and before[place + 156 : place + 157] not in (b"L", b"x"):
            continue  # the byte is the kind of a header
        with contextlib.suppress(tarfile.TarError, ValueError):
            with tarfile.open(fileobj=io.BytesIO(before[place:]), mode="r:") as tar:
                found = tar.next()
            if found and place + found.offset_data == len(before):
                return found
    return None


def is_whole(found: tarfile.TarInfo) -> bool:
    """Return whether a member of a tar file is a file whose bytes are all there, in one piece."""
    return found.isfile() and not found.issparse()
