"""The header of a plain MP4 file of H.264, as far as FFmpeg does not give it."""

import os
from collections.abc import Iterator
from contextlib import suppress

import numpy as np

MAX_HEADER = 2**26  # bytes
# Everything else might change what FFmpeg makes of the samples: fragments, external files, several
# kinds of samples, croppings.
PLAIN = {
    "": {"ftyp", "free", "skip", "wide", "mdat", "moov"},
    "moov": {"mvhd", "trak", "udta", "iods", "meta", "free"},
    "trak": {"tkhd", "edts", "mdia", "udta", "free"},
    "edts": {"elst"},
    "mdia": {"mdhd", "hdlr", "minf"},
    "minf": {"vmhd", "hdlr", "dinf", "stbl"},
    "dinf": {"dref"},
    "stbl": {"stsd", "stts", "ctts", "stss", "stsc", "stsz", "stco", "co64", "sdtp"},
    "stsd": {"avc1"},
    "avc1": {"avcC", "pasp", "colr", "btrt"},
}
HEADS = {"avc1": 78, "stsd": 8}  # bytes of a box before those inside of it


def composition_offsets(file: int, start: int, end: int) -> np.ndarray | None:
    """Return the presentation minus the decoding time of each sample of the H.264 track, int64.

    Args:
        file: descriptor of the file, of which the bytes from `start` to `end` are the MP4.

    Return None for files in which anything is unusual.
    """
    place, header = start, b""
    while place + 8 <= end:
        head = os.pread(file, 16, place)
        kind, size = head[4:8].decode("latin1"), int.from_bytes(head[:4], "big")
        size = int.from_bytes(head[8:16], "big") if size == 1 else size or end - place
        if kind not in PLAIN[""] or not 8 <= size <= end - place or (kind == "moov" and header):
            return None
        if kind == "moov":
            header = os.pread(file, min(size, MAX_HEADER), place)[8:]
        place += size
    found = []
    try:
        for kind, *place in _inside("moov", header, 0, len(header)):
            with suppress(ValueError):  # a track of another kind has other boxes
                found += [_tables(kind, header, *place)] if kind == "trak" else []
        (tables,) = found
        return _offsets(header, tables)
    except (ValueError, KeyError, IndexError):
        return None


def _inside(kind: str, data: bytes, start: int, end: int) -> Iterator[tuple[str, int, int]]:
    """Yield kind, start and end of the boxes inside of a box; ValueError if one is unusual."""
    start += HEADS.get(kind, 0)
    while start < end:
        size, name = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        if not 8 <= size <= end - start or name.decode("latin1") not in PLAIN[kind]:
            raise ValueError(f"{name} in {kind}")
        yield name.decode("latin1"), start + 8, start + size
        start += size


def _tables(kind: str, data: bytes, start: int, end: int) -> dict[str, tuple[int, int]]:
    """Return the places of a box and of all inside of it, by kind; ValueError if two are equal."""
    found = {kind: (start, end)}
    for box in _inside(kind, data, start, end) if kind in PLAIN else ():
        deeper = _tables(box[0], data, *box[1:])
        if found.keys() & deeper.keys() - {"free"}:
            raise ValueError("two of a kind")
        found |= deeper
    return found


def _offsets(data: bytes, found: dict[str, tuple[int, int]]) -> np.ndarray:
    """Read the tables of a track; ValueError or KeyError if one is unusual."""
    words = {k: np.frombuffer(data[a : b - (b - a) % 4], ">i4") for k, (a, b) in found.items()}
    edits, references, parameters = words.get("elst"), words["dref"], data[slice(*found["avcC"])]
    if edits is not None and (edits[:2].tolist() != [0, 1] or edits[3] < 0 or edits[4] != 1 << 16):
        raise ValueError("more than a shift")
    if references[[1, 4]].tolist() != [1, 1] or parameters[0] != 1 or parameters[5] & 31 != 1:
        raise ValueError("external data, or several sizes of pictures")
    count = int(words["stsz"][2])
    if not 0 < count <= len(words["stsz"]) - 3:
        raise ValueError("samples of one size, or without sizes")
    if "ctts" not in words:
        return np.zeros(count, np.int64)
    rows = words["ctts"][2:].reshape(-1, 2).astype(np.int64)
    if len(rows) != words["ctts"][1] or (rows[:, 0] <= 0).any() or rows[:, 0].sum() != count:
        raise ValueError("ctts")
    return np.repeat(rows[:, 1], rows[:, 0])
