"""Shards: uncompressed tar files of videos, which are read in place (util/video/source.py).

WebDataset tars are shards that a lab already has. The files of a sample have the same key, the name
up to its first dot: a/001.mp4, a/001.cls, a/001.json.
"""

import contextlib
import json
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any, BinaryIO

from tqdm import tqdm

from util.classes import some_names
from util.errors import UserError
from util.file_io import print_any, text_to_path, write_atomically
from util.video import source
from util.video.source import Member, member_path

NUMBER = "[0-9]{1,5}"  # of a class
LABEL_KEYS = ("label", "cls", "class", "label_name", "class_name", "category")


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
                blocks = -(-info.size // tarfile.BLOCKSIZE)
                start = tar.offset - blocks * tarfile.BLOCKSIZE
                members.append(Member(shard, name, start, info.size))

    write_atomically(shard, write)
    return members


# --- WebDataset -----------------------------------------------------------------------------------


def index_tars(
    splits: dict[str, str], suffixes: Collection[str], label_key: str
) -> tuple[list[tuple[str, str, str]], list[str], dict[str, str]]:
    """Read headers and labels of WebDataset tars, but no videos.

    Args:
        splits: tar file -> its split.
        suffixes: those of videos.
        label_key: the label's key in .json files; empty: .cls files, or those of LABEL_KEYS.

    Returns:
        (path, label, split) of videos, the label empty if no video of the split has one; the sorted
        names of classes, none if the labels are numbers; 'TAR: reason' of damaged tars, which give
        the videos before the damage. A compressed tar, or a sample that is odd, is a UserError.
    """
    rows, damaged = list[tuple[str, str, str]](), dict[str, str]()
    for tar, split in tqdm(splits.items(), "reading headers"):
        with open(tar, "rb", buffering=2048) as file:  # a header and a label
            if file.read(tarfile.BLOCKSIZE).startswith(source.COMPRESSED):
                raise UserError(f"{tar} {source.UNPACK}")
            file.seek(0)
            members, problem = _list_members(file)
            if problem:
                damaged[tar] = f"{tar}: {problem}"
            for path, files in _find_samples(tar, members, suffixes):
                label = _read_label(path, files, file.fileno(), label_key)
                if label or not problem:  # its label may be beyond the damage
                    rows.append((path, label, split))
    labelled = {split for _, label, split in rows if label}
    if lacking := [path for path, label, split in rows if split in labelled and not label]:
        keys = label_key or ", ".join(LABEL_KEYS)
        raise UserError(
            f"{lacking[0]} has no label, unlike others: no .cls, nor a .json with {keys}"
        )
    names = sorted({label for _, label, _ in rows} - {""}, key=os.fsencode)
    numbers = {name for name in names if re.fullmatch(NUMBER, name)}
    if not numbers:
        return rows, names, damaged
    if others := [row for row in rows if row[1] and row[1] not in numbers]:
        path, label, _ = others[0]
        raise UserError(f"{path} has the label {label}, but others have numbers")
    if absent := [str(i) for i in range(max(map(int, numbers))) if str(i) not in numbers]:
        print_any(f"WARNING: labels of no video: {some_names(absent)}")
    return rows, [], damaged


def _list_members(file: BinaryIO) -> tuple[list[tarfile.TarInfo], str]:
    """Return the members of a tar file, and what is wrong with it; members after that are lost."""
    members, size = list[tarfile.TarInfo](), os.fstat(file.fileno()).st_size
    with (
        contextlib.suppress(tarfile.TarError, ValueError),
        tarfile.open(fileobj=file, mode="r:") as tar,
    ):
        while member := tar.next():
            if member.isfile() and not 0 <= member.size <= size - member.offset_data:
                return members, f"breaks off in {member.name}"
            members.append(member)
        if not any(os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) or b"x"):
            return members, ""  # the block after the last member of every tar file is empty
    return members, f"breaks off after {members[-1].name}" if members else "is not a tar file"


def _find_samples(
    tar: str, members: list[tarfile.TarInfo], suffixes: Collection[str]
) -> list[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Return the path of each sample's video, and its files with labels, "cls" or "json"."""
    videos, labels = dict[str, Member](), defaultdict[str, dict[str, tarfile.TarInfo]](dict)
    for info in members:
        name = source.plain_name(info.name)
        match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", name, re.DOTALL)
        key, suffix = (match[1], match[2].lower()) if match else ("", "")
        is_label = suffix in ("cls", "json")
        if not (is_label or f".{suffix.rpartition('.')[2]}" in suffixes):
            continue
        if not source.is_whole(info):
            raise UserError(f"{tar}: {name} is a link or sparse; pack it as a file of its own")
        if is_label:
            labels[key][suffix] = info
            continue
        member = Member(tar, name, info.offset_data, info.size)
        if source.find_member(member_path(member)) != member:
            raise UserError(f"{tar}: no folder above a tar file may be named .tar; rename it")
        if key in videos:
            raise UserError(f"{tar}: a sample has two videos, {videos[key].name} and {name}")
        videos[key] = member
    return [(member_path(member), labels[key]) for key, member in videos.items()]


def _read_label(path: str, files: dict[str, tarfile.TarInfo], fd: int, label_key: str) -> str:
    """Return the label of a sample, a number or a name; empty without one."""
    values: dict[str, Any] = {}
    for kind, info in sorted(files.items(), reverse=True):  # .cls counts more than .json
        content = os.pread(fd, info.size, info.offset_data)
        try:
            if kind == "json":
                values = json.loads(content)
                json.dumps(values, ensure_ascii=False).encode()  # escapes may be no characters
                values = values if isinstance(values, dict) else {}
            elif not label_key:
                values = {LABEL_KEYS[0]: content.decode("utf-8", "surrogateescape")}
        except ValueError as error:
            raise UserError(f"{path}: its .json cannot be read: {error}") from error
    keys = [label_key] if label_key else LABEL_KEYS
    value = next((values[key] for key in keys if values.get(key) is not None), None)
    if value is None:
        return ""
    text = str(value).strip() if type(value) in (int, str) else ""  # not True, which is an int
    if re.fullmatch(NUMBER, text):
        return str(int(text))
    if re.fullmatch("[-+0-9.]*", text):
        raise UserError(f"{path}: {value!r:.80} is neither the number nor the name of a class")
    return text_to_path(text)
