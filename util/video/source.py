"""Where the bytes of a video are: in a file of its own, or inside a tar file (a shard).

The path of a video in a shard is SHARD.tar/NAME@OFFSET+SIZE, where the shard's bytes from OFFSET on
are the video. FFmpeg reads them in place.
"""

import os
import re
from typing import Any, NamedTuple

import av
from av.container import InputContainer

MEMBER = re.compile(r"(.+?\.tar)/(.+)@(\d+)\+(\d+)", re.DOTALL)
# A title in an unknown encoding does not make a video unusable (PyAV 19 has no such argument).
LENIENT: dict[str, Any] = {"metadata_errors": "replace"} if av.__version__ < "19" else {}


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


def open_container(
    path: str, options: dict[str, str] | None = None, probe: bool = True
) -> InputContainer:
    """Open a local video, possibly in a shard, with options for its decoders.

    Without `probe`, nothing is decoded to learn more of a stream than the file's header says.

    Raises:
        av.FFmpegError, OSError, ValueError: it cannot be opened as a video.
    """
    # An absolute path cannot be read as a protocol ("http:name.mp4"). The whitelist keeps playlists
    # off the network.
    url, protocols = os.path.abspath(path), "file"
    if member := find_member(path):
        end = member.offset + member.size
        url = f"subfile,,start,{member.offset},end,{end},,:{os.path.abspath(member.shard)}"
        protocols = "subfile,file"
    containers = {"protocol_whitelist": protocols}
    if not probe:
        containers["codec_whitelist"] = "none"
    return av.open(url, options=options or {}, container_options=containers, **LENIENT)
