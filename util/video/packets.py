"""The packets of a video: a table of them all, and the packets of a part when they are needed.

A small file is read at once, and its packets are kept. A large file is read once for the table;
later, the packets of a part are read by seeking, and each is compared with the table. Where seeking
does not lead to the expected packet, the file is read from its start, and the others are dropped.
"""

import os
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from threading import Lock
from typing import Any

import av
import numpy as np
from av import VideoStream
from av.container import Flags, InputContainer
from av.stream import Discard, Disposition

from util.video.mp4 import composition_offsets
from util.video.source import Bytes, file_of, find_member, open_bytes, open_container

SMALL = 16 * 2**20  # bytes; the packets of a file that is no larger are kept in memory
NO_STAMP = -(2**63)  # a packet without a time stamp
KEY, DISCARD, HIDDEN = 1, 2, 4  # flags of a packet; the first two are FFmpeg's
HEAD, IDR = 4096, 5  # bytes of a key frame that are searched; the kind of H.264's key frames
MAX_UNKNOWN = 4  # packets after a seek that are not in the table, such as parts of packets
# A seek takes as long as reading on over some packets.
MAX_GAP_PACKETS, MAX_GAP_BYTES = 64, 2**17
MAX_KEPT = 8  # large files whose tables and open containers a process keeps
MAX_KEPT_BYTES = 32 * 2**20  # of them all, but for the one that was used last

Row = tuple[int, int, int, int]  # of the table of packets


class VideoError(Exception):
    """A video that cannot be used; the text is 'PATH: reason'."""


class LostError(Exception):
    """Packets differ from the table."""


class Packets:
    """The packets of the video stream of a local file, which is open.

    The table of its packets, in the order of the file: `stamps` (of time, or NO_STAMP), `places`
    in the file, `sizes` in bytes and `flags`, each [P]. `size` is the height and width of pictures
    as they are stored. Raise VideoError if the file cannot be used.

    Args:
        signature: the file's size and what else changes when it does; empty for one in a shard.
    """

    def __init__(self, path: str, max_pixels: int, signature: tuple[int, ...]):
        self.path, self.max_pixels, self.signature = path, max_pixels, signature
        member = find_member(path)
        self._bytes = member.size if member else signature[0]
        self.is_large = self._bytes > SMALL
        self._can_seek = self.is_sound = True
        self._held: list[av.Packet] | None = None  # all packets, if they are kept
        self._containers: list[InputContainer] = []  # several if a small file must be reopened

    def close(self) -> None:
        """Close the file and free its memory."""
        self._demuxer, self._next = iter(()), None
        self._held = None
        while self._containers:
            self._containers.pop().close()

    def reopen(self, probe: bool = True, place: Bytes | None = None) -> None:
        """Open the file, possibly once more, and prepare a decoder for its video stream.

        Without `probe`, `size` may be wrong, but that of any decoded frame is right.
        """
        path, max_pixels, self.is_probed = self.path, self.max_pixels, probe
        if self._held is None:
            self.close()
        try:
            # Decoders check max_pixels wherever a stream changes size.
            container = open_container(path, {"max_pixels": str(max_pixels)}, probe, place)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"{path}: cannot be opened as a video ({reason(error)})") from error
        self._containers.append(container)
        stream = video_stream(container)
        if stream is None:
            raise VideoError(f"{path}: no video stream that can be decoded")
        for other in container.streams:
            other.discard = Discard.default if other is stream else Discard.all
        # Time stamps that the file does not hold must stay unknown; FFmpeg would invent some.
        container.flags &= ~Flags.gen_pts.value
        self.stream, self.decoder, self.format = stream, stream.codec_context, container.format.name
        h, w = self.size = self.decoder.height, self.decoder.width
        if h * w > max_pixels:
            raise VideoError(f"{path}: {w} x {h} pixels are more than max_pixels {max_pixels}")
        if h * w == 0:
            raise VideoError(f"{path}: the size of its pictures is unknown")
        # Decoders count rows padded to a multiple of 64 pixels.
        self.decoder.options = {"max_pixels": str(max_pixels + 63 * h)}
        self.decoder.thread_type = "NONE"
        self.decoder.thread_count = 1  # dav1d looks at this one only
        self._process = os.getpid()
        self._start_demuxer(from_start=True)

    def _start_demuxer(self, from_start: bool) -> None:
        # An empty packet holds no frame, and ends the stream for a decoder.
        packets = self._containers[-1].demux(self.stream)
        self._demuxer: Iterator[av.Packet] = (packet for packet in packets if packet.size)
        self._from_start = from_start
        self._next = 0 if from_start else None  # the packet that comes next, if that is known

    def open(self, check_time: Callable[[], None]) -> None:
        """Open the file, and make the table of all packets.

        `changes` tells whether some of them need parameters that an earlier one brings.
        """
        try:
            with open_bytes(self.path) as place:
                offsets = composition_offsets(place.fd, place.start, place.start + self._bytes)
                # Whether a codec reorders frames is known without decoding any if their stamps do.
                even = offsets is None or (offsets == offsets[0]).all()
                self.reopen(bool(even), place)
                if offsets is not None and self._take_index(place, offsets, check_time):
                    return
        except (OSError, ValueError) as error:
            problem = f"cannot be opened as a video ({reason(error)})"
            raise VideoError(f"{self.path}: {problem}") from error
        if not self.is_probed or not self._from_start or self._next:
            self.reopen()
        self._scan(check_time)

    def _take_index(
        self, place: Bytes, offsets: np.ndarray, check_time: Callable[[], None]
    ) -> bool:
        """Make the table from the container's own; return False if the two may differ."""
        rows, entries = array("q"), self.stream.index_entries
        for entry in entries if len(entries) == len(offsets) else ():
            rows.extend((entry.timestamp, entry.pos, entry.size, entry.flags & (KEY | DISCARD)))
        packet = self._read_one(check_time)
        self._from_start = False
        if packet is None or not packet.is_keyframe or not rows:
            return False
        self._set_table(rows)
        self.stamps += offsets
        self.stamps += _row(packet)[0] - self.stamps[0]
        starts, ends = self.places, self.places + self.sizes
        inside = (self.sizes > 0) & (starts >= 0) & (ends <= self._bytes)
        if not inside.all() or _row(packet) != next(self._rows(0, 0)):
            return False
        if not self.is_probed and not (np.diff(self.stamps) < 0).any():
            return False
        self._demuxer, self._next, extradata = chain([packet], self._demuxer), 0, self._extradata()
        sets: set[bytes] = set()
        for key in self.keys.tolist():
            check_time()
            size, start = min(HEAD, int(self.sizes[key])), place.start + int(self.places[key])
            head = os.pread(place.fd, size, start)
            found, kind = leading_units(head, "h264", extradata)
            sets.add(found)
            if kind != IDR or len(sets) > 1:
                return False
        self.changes = False
        return len(self.keys) > 0

    def _extradata(self) -> bytes:
        return bytes(self.decoder.extradata or b"")

    def _set_table(self, rows: array) -> None:
        table = np.array(rows).reshape(-1, 4)
        self.stamps, self.places, self.sizes, self.flags = (
            np.array(column, kind)
            for column, kind in zip(table.T, (np.int64, np.int64, np.int32, np.uint8), strict=True)
        )
        self.keys = np.flatnonzero(self.flags & KEY)

    def _scan(self, check_time: Callable[[], None]) -> None:
        """Read all packets for the table, and keep those of a small file."""
        name, extradata, held = self.decoder.name, self._extradata(), []
        rows, packet, sets, self.changes = array("q"), None, {}, False
        try:
            for number, packet in enumerate(self._demuxer):
                check_time()
                stamp, place, size, flags = _row(packet)
                if packet.is_keyframe:
                    flags |= KEY
                    self.changes |= number > 0 and packet.has_sidedata("new_extradata")
                    if name in PARAMETER_SETS:
                        sets[leading_units(bytes(packet), name, extradata)[0]] = None
                # A frame of VP8 may be referred to but never shown.
                if name == "vp8" and not memoryview(packet)[0] & 0x10:
                    flags |= HIDDEN
                rows.extend((stamp, place, size, flags))
                if not self.is_large:
                    held.append(packet)
        except av.FFmpegError:
            pass  # a file that breaks off still has the packets before the break
        if packet and packet.is_corrupt and self.format.startswith(("mov", "flv")):
            del rows[-4:], held[-1:]  # it is cut off
        self._set_table(rows)
        self._held, self._next = None if self.is_large else held, None
        self.changes |= b"" in sets and len(sets) > (1 if next(iter(sets)) == b"" else 2)

    def rewind(self) -> None:
        """Let the first packet come next, and all others as they come without seeking."""
        if self._held is None and not (self._from_start and self._next == 0):
            self.reopen()

    def read(
        self, first: int, last: int, check_time: Callable[[], None], seek: bool = True
    ) -> Iterator[tuple[int, av.Packet]]:
        """Yield the numbers and packets from first to last.

        Raise LostError, possibly after some of them, if seeking led to packets that differ from the
        table; without `seek` this does not happen. Raise VideoError if the file has changed.
        """
        if self._held is not None:
            for number, packet in enumerate(self._held[first : last + 1], first):
                check_time()
                yield number, packet
            return
        self._go_to(first, check_time, seek)
        start = self._next or 0
        for number, row in enumerate(self._rows(start, last), start):
            packet = self._read_one(check_time)
            if packet is None or _row(packet) != row:
                self.is_sound = False
                if self._from_start:
                    raise VideoError(f"{self.path}: changed while it was read")
                raise LostError
            self._next = number + 1
            if number >= first:
                yield number, packet

    def _go_to(self, first: int, check_time: Callable[[], None], seek: bool) -> None:
        """Let packet `first` come next, or one before it."""
        if self._process != os.getpid():  # a forked process shares its place in the file
            self.reopen()
        seek = seek and self._can_seek and self.stamps[first] != NO_STAMP
        ahead = -1 if self._next is None else first - self._next  # packets before it
        if ahead >= 0 and (self._from_start or seek):
            gap = self.sizes[first - ahead : first]
            if not seek or (ahead <= MAX_GAP_PACKETS and gap.sum() < MAX_GAP_BYTES):
                return
        if seek:
            before = self.keys[: np.searchsorted(self.keys, first, "right")]
            # The key frame before is tried, too: time stamps may mislead a seek.
            if any(self._seek(int(key), first, check_time) for key in before[:-3:-1]):
                return
            self._can_seek = False
        self.reopen()

    def _seek(self, key: int, first: int, check_time: Callable[[], None]) -> bool:
        """Seek to packet `key`, and return whether packet `first`, or one before it, comes next."""
        stamp, place = int(self.stamps[key]), int(self.places[key])
        container, by_place = self._containers[-1], self.format.startswith("mpeg")
        with suppress(av.FFmpegError):
            if by_place:  # these formats have no index of times
                container.seek(place, unsupported_byte_offset=True)
            else:
                container.seek(stamp, stream=self.stream)
            self._start_demuxer(from_start=False)
            for _ in range(MAX_UNKNOWN):
                packet = self._read_one(check_time)
                if packet is None:
                    break
                row = _row(packet)
                for number in np.flatnonzero(self.places == row[1]).tolist():
                    if next(self._rows(number, number)) == row:
                        self._demuxer, self._next = chain([packet], self._demuxer), number
                        return number <= first
        return False

    def _read_one(self, check_time: Callable[[], None]) -> av.Packet | None:
        """Return the container's next packet; None after the last one, or where it breaks off."""
        self._next, self.is_sound = None, False
        check_time()
        try:
            packet = next(self._demuxer, None)
        except av.FFmpegError:
            return None
        self.is_sound = packet is not None
        return packet

    def _rows(self, first: int, last: int) -> Iterator[Row]:
        """Yield what `_row` returns for packets first to last."""
        columns = self.stamps, self.places, self.sizes, self.flags & DISCARD
        for start in range(first, last + 1, 1024):  # a part at a time, to save memory
            end = min(start + 1024, last + 1)
            yield from zip(*(column[start:end].tolist() for column in columns), strict=True)

    def cost(self) -> int:
        """Return about how many bytes the table and the open container take."""
        entries = sum(len(stream.index_entries) for stream in self._containers[-1].streams)
        return 40 * len(self.stamps) + 40 * entries


def _row(packet: av.Packet) -> Row:
    """Return a packet's time stamp, place in the file, size and DISCARD or 0."""
    stamp, place = packet.pts, packet.pos
    flags = DISCARD if packet.is_discard else 0
    return NO_STAMP if stamp is None else stamp, -1 if place is None else place, packet.size, flags


# The large files that this process used last, and what their user knows of them. Who uses one takes
# it out, so that no two threads share a container.
_kept: OrderedDict[tuple[str, int], tuple[Packets, Any]] = OrderedDict()
_lock = Lock()


def take(path: str, max_pixels: int, signature: tuple[int, ...]) -> tuple[Packets, Any]:
    """Return the packets of a file and what was kept with them, or new ones and None."""
    with _lock:
        kept = _kept.pop((path, max_pixels), None)
    if kept and kept[0].signature == signature:
        return kept
    if kept:
        kept[0].close()
    return Packets(path, max_pixels, signature), None


def give_back(packets: Packets, knowledge: Any) -> None:
    """Keep a large file open for its next use, and close those that were used longest ago."""
    if not (packets.is_large and packets.is_sound):
        packets.close()
        return
    with _lock:
        unused = [_kept.pop((packets.path, packets.max_pixels), None)]
        _kept[packets.path, packets.max_pixels] = packets, knowledge
        total = sum(other.cost() for other, _ in _kept.values())
        while len(_kept) > 1 and (len(_kept) > MAX_KEPT or total > MAX_KEPT_BYTES):
            oldest = _kept.popitem(last=False)[1]
            total -= oldest[0].cost()
            unused.append(oldest)
    for other in filter(None, unused):
        other[0].close()


def forget(file: str) -> None:
    """Close the videos that are kept in a file or shard that was replaced."""
    with _lock:
        gone = [_kept.pop(key)[0] for key in list(_kept) if file_of(key[0]) == file]
    for packets in gone:
        packets.close()


def _forget() -> None:
    """Start anew in a forked process, which would share the places in the open files."""
    global _lock
    _lock = Lock()
    while _kept:
        _kept.popitem()[1][0].close()


os.register_at_fork(after_in_child=_forget)


def video_stream(container: InputContainer) -> VideoStream | None:
    """Return the default video stream, else the first one; cover pictures do not count."""
    streams = [x for x in container.streams.video if x.codec_context is not None]
    films = [x for x in streams if not x.disposition & Disposition.attached_pic]
    return max(films, key=lambda x: bool(x.disposition & Disposition.default), default=None)


# How to find parameter sets: the place in the extradata of the number of bytes of a unit's length;
# the shift and mask that give a unit's kind, from its first byte; the kinds that are parameter sets
# and the kinds that are pictures.
PARAMETER_SETS = {
    "h264": (4, 0, 0x1F, {7, 8}, {1, 2, 3, 4, 5}),
    "hevc": (21, 1, 0x3F, {32, 33, 34}, set(range(32))),
}


def leading_units(data: bytes, codec: str, extradata: bytes) -> tuple[bytes, int]:
    """Return the parameter sets before the picture of a packet, and the kind of its first unit.

    The kind is -1 if the data hold no unit of a picture.
    """
    place, shift, mask, sets, pictures = PARAMETER_SETS[codec]
    # A unit's length precedes it in MP4 and Matroska, a start code in other formats.
    digits = (extradata[place] & 3) + 1 if extradata[:1] == b"\1" else 0
    found = b""
    for unit in _units(data, digits):
        kind = unit[0] >> shift & mask
        if kind in pictures:
            return found, kind
        found += unit if kind in sets else b""
    return found, -1


def _units(data: bytes, digits: int) -> Iterator[bytes]:
    """Cut a packet into units, each preceded by its length of `digits` bytes or a start code."""
    if not digits:
        yield from (unit.rstrip(b"\0") or b"\0" for unit in data.split(b"\0\0\1")[1:])
        return
    place = 0
    while place + digits < len(data):
        end = place + digits + int.from_bytes(data[place : place + digits], "big")
        yield data[place + digits : end] or b"\0"
        place = end


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
