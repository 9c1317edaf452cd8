"""The packets of a video: a table of them all, and the packets of a part when they are needed.

The table comes from the header of a plain MP4 file of H.264, whose packets are read from their
places. Other files are read once for it, and the packets of small ones are kept; those of large
ones are read by seeking, and each is compared with the table. Where seeking does not lead to the
expected packet, the file is read from its start, and the others are dropped.
"""

import os
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
from util.video.source import Lease, file_of, find_member, open_bytes, open_container

SMALL = 16 * 2**20  # bytes; the packets of a file that is no larger are kept in memory
NO_STAMP = -(2**63)  # a packet without a time stamp
KEY, DISCARD, HIDDEN = 1, 2, 4  # flags of a packet; the first two are FFmpeg's
HEAD, IDR = 4096, 5  # bytes of a key frame that are searched; the kind of H.264's key frames
MAX_UNKNOWN = 4  # packets after a seek that are not in the table, such as parts of packets
# A seek takes as long as reading on over some packets.
MAX_GAP_PACKETS, MAX_GAP_BYTES = 64, 2**17
# Large files whose tables and open containers a process keeps, and the packets of them all
MAX_KEPT, MAX_KEPT_PACKETS = 8, 2**18

Row = tuple[int, int, int, int]  # of the table of packets
COLUMNS = np.dtype("i8, i8, i4, u1")
Check = Callable[[], None]  # raises an error if too much time has passed


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
        self.numbering: Any = None  # what the user of a file that is kept knows of its frames
        self._held: list[av.Packet] | None = None  # all packets, if they are kept
        self._file: int | None = None  # a descriptor, if packets are read from their places
        self._containers: list[InputContainer] = []  # several if a small file must be reopened

    def close(self) -> None:
        """Close the file and free its memory."""
        self._close_containers()
        self._held = None
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _close_containers(self) -> None:
        self._demuxer, self._next = iter(()), None
        while self._containers:
            self._containers.pop().close()

    def reopen(self, probe: bool = True, lease: Lease | None = None) -> None:
        """Open the file, possibly once more, and prepare a decoder for its video stream.

        Without `probe`, `size` may be wrong, but the decoder's after the first frame is right.
        """
        path, max_pixels, self.is_probed = self.path, self.max_pixels, probe
        if self._held is None:
            self._close_containers()
        try:
            # Decoders check max_pixels wherever a stream changes size.
            container = open_container(path, {"max_pixels": str(max_pixels)}, probe, lease)
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
        if not probe and not 0 < h * w <= max_pixels:  # the pictures may have another size
            return self.reopen()
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

    def open(self, check_time: Check) -> None:
        """Open the file, and make the table of all packets.

        `changes` tells whether some of them need parameters that an earlier one brings.
        """
        try:
            with open_bytes(self.path) as (fd, start, lease):
                offsets = composition_offsets(fd, start, start + self._bytes)
                if offsets is not None:
                    # Stamps that are reordered tell that the codec does so, without decoding any.
                    self.reopen(bool((offsets == offsets[0]).all()), lease)
                    if self._take_index(fd, start, offsets, check_time):
                        self._file, self._start = os.dup(fd), start
                        return
                    lease = None  # is in use
                self.reopen(lease=lease)
        except (OSError, ValueError) as error:
            problem = f"cannot be opened as a video ({reason(error)})"
            raise VideoError(f"{self.path}: {problem}") from error
        self._scan(check_time)

    def _take_index(self, fd: int, start: int, offsets: np.ndarray, check_time: Check) -> bool:
        """Make the table from the container's own; return False if the two may differ."""
        entries = self.stream.index_entries
        packet, self._from_start = self._read_one(check_time), False
        films = self._containers[-1].streams.video  # a second one may be the default one
        if packet is None or len(films) > 1 or len(entries) != len(offsets):
            return False
        rows = ((x.timestamp, x.pos, x.size, x.flags & (KEY | DISCARD)) for x in entries)
        self._set_table(np.fromiter(rows, COLUMNS))
        self.stamps += offsets
        self.stamps += _row(packet)[0] - self.stamps[0]
        starts, ends = self.places, self.places + self.sizes
        inside = (self.sizes > 0) & (starts >= 0) & (ends <= self._bytes)
        if not inside.all() or not self.flags[0] & KEY or _row(packet) != self._row(0):
            return False
        if not self.is_probed and not (np.diff(self.stamps) < 0).any():
            return False
        self._demuxer, self._next = chain([packet], self._demuxer), 0
        sets: set[bytes] = set()
        for key in self.keys.tolist():
            check_time()
            head = os.pread(fd, min(HEAD, int(self.sizes[key])), start + int(self.places[key]))
            found, kind = leading_units(head, "h264", self._extradata())
            sets.add(found)
            if kind != IDR or len(sets) > 1:
                return False
        self.changes = False
        return True

    def _extradata(self) -> bytes:
        return bytes(self.decoder.extradata or b"")

    def _set_table(self, table: np.ndarray) -> None:
        self._table = table
        self.stamps, self.places, self.sizes, self.flags = (table[x] for x in COLUMNS.names or ())
        self.keys = np.flatnonzero(self.flags & KEY)

    def _row(self, number: int) -> Row:
        """Return what the function `_row` returns for a packet."""
        stamp, place, size, flags = self._table[number].item()
        return stamp, place, size, flags & DISCARD

    def _scan(self, check_time: Check) -> None:
        """Read all packets for the table, and keep those of a small file."""
        held: list[av.Packet] = []
        table = np.fromiter(self._scan_rows(held, check_time), COLUMNS)
        self._set_table(table[:-1] if self._is_cut_off else table)
        self._held, self._next = None if self.is_large else held[: len(self.stamps)], None

    def _scan_rows(self, held: list[av.Packet], check_time: Check) -> Iterator[Row]:
        """Yield the rows of the table; append the packets of a small file to `held`."""
        name, extradata = self.decoder.name, self._extradata()
        packet, sets, self.changes = None, {}, False
        with suppress(av.FFmpegError):  # a file that breaks off still has the packets before
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
                held += [] if self.is_large else [packet]
                yield stamp, place, size, flags
        corrupt = packet is not None and packet.is_corrupt
        self._is_cut_off = corrupt and self.format.startswith(("mov", "flv"))
        self.changes |= b"" in sets and len(sets) > (1 if next(iter(sets)) == b"" else 2)

    def rewind(self) -> None:
        """Let the first packet come next, and all others as they come without seeking."""
        if self._held is None and not (self._from_start and self._next == 0):
            self.reopen()

    def read(
        self, first: int, last: int, check_time: Check, seek: bool = True
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
        if self._file is not None and seek:
            yield from self._read_places(first, last, check_time)
            return
        self._go_to(first, check_time, seek)
        for number in range(self._next or 0, last + 1):
            packet = self._read_one(check_time)
            if packet is None or _row(packet) != self._row(number):
                self.is_sound = False
                if self._from_start:
                    raise VideoError(f"{self.path}: changed while it was read")
                raise LostError
            self._next = number + 1
            if number >= first:
                yield number, packet

    def _read_places(
        self, first: int, last: int, check_time: Check
    ) -> Iterator[tuple[int, av.Packet]]:
        """Do as `read` without the container, which takes several times as long."""
        assert self._file is not None
        rows = self._table[first : last + 1].tolist()
        for number, (stamp, place, size, _) in enumerate(rows, first):
            check_time()
            try:
                data = os.pread(self._file, size, self._start + place)
            except OSError as error:
                self.is_sound = False
                raise VideoError(f"{self.path}: cannot be read ({reason(error)})") from error
            if len(data) < size:
                self.is_sound = False
                raise VideoError(f"{self.path}: changed while it was read")
            packet = av.Packet(data)
            packet.pts = stamp
            yield number, packet

    def _go_to(self, first: int, check_time: Check, seek: bool) -> None:
        """Let packet `first` come next, or one before it."""
        if self._process != os.getpid():  # a forked process shares its place in the file
            self.reopen()
        seek = seek and self._can_seek and self.stamps[first] != NO_STAMP
        if self._next is not None and self._next <= first:
            gap = self.sizes[self._next : first]
            near = len(gap) <= MAX_GAP_PACKETS and gap.sum() < MAX_GAP_BYTES
            if near if seek else self._from_start:
                return
        if seek:
            before = self.keys[: np.searchsorted(self.keys, first, "right")]
            # The key frame before is tried, too: time stamps may mislead a seek.
            if any(self._seek(int(key), first, check_time) for key in before[:-3:-1]):
                return
            self._can_seek = False
        self.reopen()

    def _seek(self, key: int, first: int, check_time: Check) -> bool:
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
                    if self._row(number) == row:
                        self._demuxer, self._next = chain([packet], self._demuxer), number
                        return number <= first
        return False

    def _read_one(self, check_time: Check) -> av.Packet | None:
        """Return the container's next packet; None after the last one, or where it breaks off."""
        packet, self._next, self.is_sound = None, None, False
        check_time()
        with suppress(av.FFmpegError):
            packet = next(self._demuxer, None)
        self.is_sound = packet is not None
        return packet


def _row(packet: av.Packet) -> Row:
    """Return a packet's time stamp, place in the file, size and DISCARD or 0."""
    stamp, place = packet.pts, packet.pos
    flags = DISCARD if packet.is_discard else 0
    return NO_STAMP if stamp is None else stamp, -1 if place is None else place, packet.size, flags


# The large files that this process used last. Who uses one takes it out, so that no two threads
# share a container.
_kept: OrderedDict[tuple[str, int], Packets] = OrderedDict()
_lock = Lock()


def take(path: str, max_pixels: int, signature: tuple[int, ...]) -> Packets:
    """Return the packets of a file that were kept, or new ones."""
    with _lock:
        kept = _kept.pop((path, max_pixels), None)
    if kept and kept.signature == signature:
        return kept
    if kept:
        kept.close()
    return Packets(path, max_pixels, signature)


def give_back(packets: Packets) -> None:
    """Keep a large file open for its next use, and close those that were used longest ago."""
    unused: list[Packets | None] = [packets]
    if packets.is_large and packets.is_sound:
        with _lock:
            unused = [_kept.pop((packets.path, packets.max_pixels), None)]
            _kept[packets.path, packets.max_pixels] = packets
            while len(_kept) > 1 and (
                len(_kept) > MAX_KEPT
                or sum(len(other.stamps) for other in _kept.values()) > MAX_KEPT_PACKETS
            ):
                unused.append(_kept.popitem(last=False)[1])
    for other in filter(None, unused):
        other.close()


def forget(file: str) -> None:
    """Close the videos that are kept in a file or shard that was replaced."""
    with _lock:
        gone = [_kept.pop(key) for key in list(_kept) if file_of(key[0]) == file]
    for packets in gone:
        packets.close()


def _forget() -> None:
    """Start anew in a forked process, which would share the places in the open files."""
    global _lock
    _lock = Lock()
    while _kept:
        _kept.popitem()[1].close()


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
