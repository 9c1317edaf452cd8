"""Shards: uncompressed tar files of videos, which are read in place (util/video/source.py)."""

import os
import tarfile
from collections.abc import Iterable

from util.file_io import write_atomically
from util.video.source import Member


def write_shard(shard: str, files: Iterable[tuple[str, str]]) -> list[Member]:
    """Write files, pairs of a name in the shard and a path, to a new tar file; return their places.

    The shard depends only on names and contents. It appears whole or not at all.
    """
    members: list[Member] = []

    def write(target) -> None:
        with tarfile.open(fileobj=target, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for name, path in files:
                with open(path, "rb") as file:
                    info = tarfile.TarInfo(name)
                    info.size = os.fstat(file.fileno()).st_size
                    tar.addfile(info, file)
                members.append(Member(shard, name, tar.offset - blocks(info.size), info.size))

    write_atomically(shard, write)
    return members


def blocks(size: int) -> int:
    """Return the bytes that the contents of a member take in a tar file."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
