"""Decode exactly the wanted frames of a video, and as few others as possible.

Frames are numbered in the order in which they are shown; frames that an edit list hides do not
count. Opening a file reads all its packets, as headers may be wrong, or the header of a plain MP4
file with some of its packets (packets.py); it decodes none.
Files that start within a group of pictures, or change their decoder's parameters on the way, are
decoded in full, once to count their frames and again at every use.
"""

import os
import stat
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain

import av
import numpy as np
from av import VideoFrame
from av.video.reformatter import VideoReformatter

from util.video.packets import (
    DISCARD,
    HIDDEN,
    KEY,
    NO_STAMP,
    LostError,
    VideoError,
    give_back,
    reason,
    take,
)
from util.video.source import find_member
from util.video.time_limit import TimeLimit

# Width * height: more than 8K footage has (7680 x 4320), less than a decompression bomb.
MAX_PIXELS = 8192 * 8192
MAX_HOLD = 8  # a frame may stand in for at most this many missing frames after it
MAX_GAP = 10.0  # seconds; a longer time between two frames may be a jump of the clock
MAX_PAUSE = 600.0  # seconds; in MP4 and Matroska a longer one is such a jump
ROUNDING = 0.001  # seconds; how much time stamps may be off (Matroska rounds them to 1 ms)
# Only these formats reliably mark the frames to which no other refers, which decoders may drop.
# (HEVC's mark is about one temporal layer only; other decoders ignore the request.)
DROPPABLE = {"h264", "mpeg1video", "mpeg2video", "mpeg4"}

# Signs (a, b, c, d) of a display matrix: the stored pixel (x, y) is shown at (a x + c y, b x + d y)
# with rows counted downwards.
Orientation = tuple[int, int, int, int]
UPRIGHT = (1, 0, 0, 1)
TURNS = (UPRIGHT, (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))  # by 90 degrees counterclockwise


NumberedPacket = tuple[int, av.Packet]
# What is known of a video's frames: frame number -> packet; frame number -> time stamp, ascending,
# or empty if these do not number frames; whether frames must be decoded from the start of the file
# by a new decoder; `num_frames`, `fps` and `times`.
Numbering = tuple[memoryview, memoryview, bool, int, float, np.ndarray | None]


class Video:
    """Open a local video file for decoding on the calling thread; a context manager.

    `num_frames` is counted, not taken from the header; `fps` is the mean rate; `times`, float64
    [num_frames], are the seconds at which frames appear, or None where these are unknown or never
    more than half a frame from an even rate; `height` and `width` are those of an upright frame,
    after the rotation that the metadata asks for. Raise VideoError if the file cannot be used.

    Args:
        max_pixels: refuse pictures with more pixels (width * height), before allocating any.
        time_limit: seconds from now after which reading and decoding raise. The clock is checked
            between packets: a single read that never returns is not interrupted.
    """

    def __init__(self, path: str, max_pixels: int = MAX_PIXELS, time_limit: float = float("inf")):
        self.path = path
        self._time_limit = time_limit
        self._left, self._is_open = TimeLimit(time_limit), True
        self._reformatter = VideoReformatter()
        self._orientation: Orientation | None = None
        self._packets = take(path, max_pixels, self._signature())
        try:
            if not self._packets.numbering:
                self._packets.open(self._check_time)
                self._packets.numbering = self._number_frames()
        except BaseException:
            self._packets.close()
            raise
        self._size = self._packets.size
        self._shown, self._stamps, self._reopens = self._packets.numbering[:3]
        self.num_frames, self.fps, self.times = self._packets.numbering[3:]

    def _signature(self) -> tuple[int, ...]:
        """Return what changes when the file does; shards may not change."""
        if find_member(self.path):
            return ()
        try:
            status = os.stat(self.path)
        except (OSError, ValueError):
            raise VideoError(f"{self.path}: no such file") from None
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise VideoError(f"{self.path}: {kind}")
        return status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.close(keep=error is None)

    def close(self, keep: bool = True) -> None:
        """Close the file and free its memory, or keep a large one ready for its next use."""
        if self._is_open and keep:
            give_back(self._packets)
        elif self._is_open:
            self._packets.close()
        self._is_open = False

    def _number_frames(self) -> Numbering:
        """Number the frames that the packets hold, and measure their rate and times."""
        packets, stream = self._packets, self._packets.stream
        shown = np.flatnonzero(packets.flags & (DISCARD | HIDDEN) == 0)
        stamps = self._stamps_of_one_clock(shown)
        order = np.argsort(stamps, kind="stable")
        unit = float(stream.time_base or 0)  # seconds
        gaps = np.diff(stamps[order]) * unit
        # Otherwise a full decode numbers the frames.
        if timed := self._can_number_by_stamps(stamps, order):
            shown, stamps = shown[order], stamps[order]
        reopens = packets.changes or self._starts_within_group(shown, timed)
        count, fps = len(shown), self._mean_rate(gaps, timed)
        if reopens:  # then a frame's number is its place in a decode from the file's start
            timed, self._reopens, self._stamps = False, True, memoryview(b"")
            delivered = [frame.pts for _, frame in self._delivered()]
            count = len(delivered)
            known = [stamp for stamp in delivered if stamp is not None]
            gaps = np.diff(known if len(known) == count else []) * unit
        has_pauses = packets.format.startswith(("mov", "matroska"))
        times = uneven_times(gaps, MAX_PAUSE if has_pauses else MAX_GAP)
        if not count:
            raise VideoError(f"{self.path}: no frames")
        return shown.data, (stamps if timed else stamps[:0]).data, reopens, count, fps, times

    def _stamps_of_one_clock(self, shown: np.ndarray) -> np.ndarray:
        """Return the frames' time stamps in the order of the packets; none if they are unusable."""
        stamps, is_key = self._packets.stamps[shown], self._packets.flags[shown] & KEY
        if (self._packets.stamps == NO_STAMP).any():
            return stamps[:0]
        if (is_key & (stamps < np.maximum.accumulate(stamps))).any():
            return stamps[:0]  # the file consists of two parts whose clocks overlap
        return stamps

    def _can_number_by_stamps(self, stamps: np.ndarray, order: np.ndarray) -> bool:
        """Return whether time stamps order the frames; those of AVI and raw streams do not."""
        if not len(stamps) or not np.diff(stamps[order]).all():
            return False  # some are equal
        # If the codec reorders frames and the stamps never do, a careless writer numbered packets.
        return not self._packets.decoder.has_b_frames or bool((np.diff(order) < 0).any())

    def _starts_within_group(self, shown: np.ndarray, timed: bool) -> bool:
        """Return whether frames may come before the first key frame: some may not decode."""
        keys, stamps = self._packets.keys, self._packets.stamps
        if not len(keys) or not len(shown):
            return False
        return bool(shown.min() < keys[0] or (timed and stamps[shown[0]] < stamps[keys[0]]))

    def _mean_rate(self, gaps: np.ndarray, timed: bool) -> float:
        """Return the header's mean rate, or that of the time stamps if the two differ much."""
        stream = self._packets.stream
        header = float(stream.average_rate or stream.guessed_rate or 0)
        if timed and len(gaps) and stream.time_base:
            steady = gaps[gaps <= MAX_GAP]
            rate = float(1 / steady.mean()) if len(steady) else header
            # Small differences come from stamps that are rounded to 1 ms (Matroska).
            if abs(rate - header) > 0.05 * rate:
                return rate
        return header or 30.0

    @property
    def rotation(self) -> int:
        """Degrees counterclockwise that turn a frame upright; a mirrored one is flipped first."""
        if self._orientation is None:  # FFmpeg gives it together with a decoded frame only
            next(self.frames([0]))
        a, b, c, d = self._orientation or UPRIGHT
        if a * d - b * c < 0:  # mirrored
            a, b = -a, -b
        return 90 * TURNS.index((a, b, c, d))

    @property
    def height(self) -> int:
        turned = self.rotation in (90, 270)  # which may correct the size
        return self._size[turned]

    @property
    def width(self) -> int:
        turned = self.rotation in (90, 270)
        return self._size[not turned]

    def frames(self, wanted: Sequence[int] | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number and picture of each wanted frame once, in ascending order.

        The result is bit for bit that of decoding everything, but only groups of pictures with a
        wanted frame are decoded, each up to its last wanted frame and without unwanted frames to
        which no other refers. If the packets do not hold what they promise, the remaining frames
        come from decoding everything. A frame that is missing even then (a damaged packet, a broken
        tail) is replaced by the one before it, as decoders conceal errors, or at the start by the
        first one. Raise VideoError for a gap of more than MAX_HOLD frames.

        Pictures, uint8 RGB [height, width, 3], are upright, scaled to the size of the stream, dense
        in their last two dimensions, and the caller's to keep. Colours are those of PyAV's
        `frame.to_ndarray(format="rgb24")`: the stream's matrix and range, or BT.601 and limited
        range if it does not give them. Finish or drop one iteration before starting the next.
        """
        left = np.unique(np.asarray(wanted, dtype=np.int64)).tolist()
        if left and (left[0] < 0 or left[-1] >= self.num_frames):
            raise IndexError(f"{self.path}: frames {left[0]} to {left[-1]} of {self.num_frames}")
        left.reverse()  # the next wanted frame is left[-1]
        if len(self._stamps):
            for number, frame in self._decode_needed(left):
                yield number, self._to_rgb(frame)
        if left:
            yield from self._decode_everything(left)

    def _decode_needed(self, left: list[int]) -> Iterator[tuple[int, VideoFrame]]:
        """Yield wanted frames as they come, take them off `left`; stop at the first surprise."""
        wanted = {self._shown[number] for number in left}
        numbers = {self._stamps[number]: number for number in left}
        for first, packets in self._read_runs(wanted):
            # Decoding must start at a key frame, and the container may have marked it wrongly.
            entered = bool(self._packets.flags[first] & DISCARD)
            for frame in self._decode_run(packets, wanted):
                if frame.pts == self._packets.stamps[first]:
                    entered = entered or bool(frame.key_frame)
                number = numbers.get(frame.pts)
                if number is None:
                    continue
                if not left or number != left[-1] or not entered or frame.is_corrupt:
                    return
                left.pop()
                yield number, frame

    def _runs(self, wanted: list[int]) -> list[tuple[int, int]]:
        """Return the (first, last) packet of every stretch that the wanted packets need."""
        keys, stamps = self._packets.keys, self._packets.stamps
        runs: list[tuple[int, int]] = []
        for packet in wanted:
            key = bisect_right(keys, packet) - 1
            # A frame shown before its key frame (open GOP) also refers to the group before.
            while key > 0 and stamps[packet] < stamps[keys[key]]:
                key -= 1
            first = keys[key] if key >= 0 else 0
            while runs and first <= runs[-1][1]:
                first = min(first, runs.pop()[0])
            runs.append((first, packet))
        return runs

    def _read_runs(self, wanted: set[int]) -> Iterator[tuple[int, Iterable[NumberedPacket]]]:
        """Yield the number of the first packet of every run, and the packets of the run."""
        runs = self._runs(sorted(wanted))
        parts = [self._packets.read(first, last, self._check_time) for first, last in runs]
        with suppress(LostError):
            # Of a small file, all are read first: in turns, reading and decoding take longer.
            parts = parts if self._packets.is_large else [list(part) for part in parts]
            yield from zip((first for first, _ in runs), parts, strict=True)

    def _decode_run(
        self, packets: Iterable[NumberedPacket], wanted: set[int]
    ) -> Iterator[VideoFrame]:
        """Yield the wanted frames of a run of packets, and some others; end at an error."""
        decoder = self._restarted_decoder()
        droppable = decoder.name in DROPPABLE
        try:
            for k, packet in packets:
                if droppable:
                    decoder.skip_frame = "DEFAULT" if k in wanted else "NONREF"
                yield from decoder.decode(packet)
            yield from decoder.decode(None)  # the frames that the decoder still holds back
        except (av.FFmpegError, LostError):
            return

    def _decode_everything(self, left: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the frames in `left` from a decode of all packets; fill gaps as `frames` says."""
        last, held = -1, None  # number and picture of the frame that came last
        for number, frame in chain(self._delivered(), [(self.num_frames, None)]):
            if number < last:
                raise VideoError(f"{self.path}: frames are not in the order of their time stamps")
            while left and left[-1] < number:
                gap = number - left[-1] if held is None else left[-1] - last
                picture = held or frame
                if picture is None or gap > MAX_HOLD:
                    missing = f"frame {left[-1]} of {self.num_frames}"
                    raise VideoError(f"{self.path}: {missing} cannot be decoded")
                yield left.pop(), self._to_rgb(picture)
            if frame and left and left[-1] == number:
                yield left.pop(), self._to_rgb(frame)
            if not left:
                return
            last, held = number, frame

    def _delivered(self) -> Iterator[tuple[int, VideoFrame]]:
        """Decode all packets but those that fail, and number the frames that come."""
        self._packets.rewind()
        decoder, count, stamps = self._restarted_decoder(), 0, self._stamps
        last = len(self._packets.stamps) - 1
        packets = self._packets.read(0, last, self._check_time, seek=False)
        for _, packet in chain(packets, [(last + 1, None)]):
            try:
                frames = decoder.decode(packet)
            except av.FFmpegError:
                continue
            for frame in frames:
                number, stamp = count, frame.pts
                if len(stamps):
                    number = len(stamps) if stamp is None else bisect_left(stamps, stamp)
                    if number == len(stamps) or stamps[number] != stamp:
                        continue
                count += 1
                yield number, frame

    def _check_time(self) -> None:
        if not self._is_open:  # another Video may use the packets now
            raise VideoError(f"{self.path}: was closed")
        if self._left.is_over():
            raise VideoError(f"{self.path}: not read within {self._time_limit:g} seconds")

    def _restarted_decoder(self) -> av.VideoCodecContext:
        if self._reopens and self._packets.decoder.is_open:  # it would keep the headers it saw last
            self._packets.reopen()
        decoder = self._packets.decoder
        decoder.flush_buffers()
        decoder.skip_frame = "DEFAULT"
        return decoder

    def _to_rgb(self, frame: VideoFrame) -> np.ndarray:
        """Return a frame as uint8 RGB [H, W, 3], upright."""
        if self._orientation is None:
            self._orientation = orientation(frame)
            if not self._packets.is_probed:  # the frame's size may lack the cropping on the left
                self._size = self._packets.decoder.height, self._packets.decoder.width
        height, width = self._size
        try:
            # PyAV starts a pool of threads at every call unless told not to.
            rgb = self._reformatter.reformat(frame, width, height, "rgb24", threads=1)
        except (av.FFmpegError, ValueError, MemoryError) as error:
            kind = f"{frame.format.name} frames cannot be converted ({reason(error)})"
            raise VideoError(f"{self.path}: its {kind}") from error
        if rgb is frame:  # was RGB already: the memory is the decoder's, and may run bottom up
            image = rgb.to_ndarray()
        else:  # a view; nothing is copied
            strides = (rgb.planes[0].line_size, 3, 1)
            image = np.ndarray((height, width, 3), np.uint8, memoryview(rgb.planes[0]), 0, strides)
        if self._orientation == UPRIGHT:
            return image
        a, b, c, d = self._orientation
        if b:
            image = image.transpose(1, 0, 2)  # its rows were columns
        return np.ascontiguousarray(image[:: b + d, :: a + c])


def uneven_times(gaps: np.ndarray, longest: float) -> np.ndarray | None:
    """Return the times of frames that are `gaps` seconds apart; None if their rate is even.

    Gaps above `longest` are jumps of the clock and count as a mean one.
    """
    jumps = (gaps < 0) | (gaps > longest)
    if jumps.all():
        return None  # the times are unknown
    interval = gaps[~jumps].mean()
    times = np.append(0, np.where(jumps, interval, gaps).cumsum())
    even = np.linspace(0, times[-1], len(times))
    return times if np.abs(times - even).max() > max(interval / 2, ROUNDING) else None


def orientation(frame: VideoFrame) -> Orientation:
    """Return how a frame is to be shown: turned by a multiple of 90 degrees, mirrored or not."""
    try:
        side_data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # there is side data of a kind that PyAV cannot name (Exif, in MJPEG)
        return TURNS[round(frame.rotation / 90) % 4]
    if side_data is None:
        return UPRIGHT
    a, b, _, c, d, *_ = np.frombuffer(bytes(side_data), dtype=np.int32).tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return (-1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1)
    return (0, -1 if b < 0 else 1, -1 if c < 0 else 1, 0)
