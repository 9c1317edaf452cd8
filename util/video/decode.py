"""Decode exactly the wanted frames of a video, and as few others as possible.

Frames are numbered in the order in which they are shown; frames that an edit list hides do not
count. Opening a file reads all its packets, because its header may be wrong, and decodes none.
Files that start within a group of pictures, or change their decoder's parameters on the way, are
decoded in full, once to count their frames and again at every use.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain

import av
import numpy as np
from av import VideoFrame, VideoStream
from av.container import Flags, InputContainer
from av.stream import Discard, Disposition
from av.video.reformatter import VideoReformatter

from util.video.source import find_member, open_container
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


class VideoError(Exception):
    """A video that cannot be used; the text is 'PATH: reason'."""


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
        self._max_pixels = max_pixels
        self._time_limit = time_limit
        self._left = TimeLimit(time_limit)
        self._packets: list[av.Packet] = []
        self._containers: list[InputContainer] = []  # several if the file must be reopened
        self._reformatter = VideoReformatter()
        self._orientation: Orientation | None = None
        if not (find_member(path) or os.path.isfile(path)):
            kind = "a folder" if os.path.isdir(path) else "not a regular file"
            raise VideoError(f"{path}: {kind if os.path.exists(path) else 'no such file'}")
        try:
            stream = self._open_stream()
            self._read_packets(stream)
            self._number_frames(stream)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and free its memory."""
        self._packets = []
        for container in self._containers:
            container.close()

    def _open_stream(self) -> VideoStream:
        """Open the file, possibly once more, and prepare a decoder for its video stream."""
        path, max_pixels = self.path, self._max_pixels
        try:
            # Decoders check max_pixels wherever a stream changes size.
            container = open_container(path, {"max_pixels": str(max_pixels)})
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"{path}: cannot be opened as a video ({_reason(error)})") from error
        self._containers.append(container)
        stream = video_stream(container)
        if stream is None:
            raise VideoError(f"{path}: no video stream that can be decoded")
        for other in container.streams:
            other.discard = Discard.default if other is stream else Discard.all
        self._decoder = stream.codec_context
        h, w = self._size = self._decoder.height, self._decoder.width  # as stored
        if h * w > max_pixels:
            raise VideoError(f"{path}: {w} x {h} pixels are more than max_pixels {max_pixels}")
        if h * w == 0:
            raise VideoError(f"{path}: the size of its pictures is unknown")
        # Decoders count rows padded to a multiple of 64 pixels.
        self._decoder.options = {"max_pixels": str(max_pixels + 63 * h)}
        self._decoder.thread_type = "NONE"
        self._decoder.thread_count = 1  # dav1d looks at this one only
        return stream

    def _read_packets(self, stream: VideoStream) -> None:
        container = self._containers[0]
        # Time stamps that the file does not hold must stay unknown; FFmpeg would invent some.
        container.flags &= ~Flags.gen_pts.value
        try:
            for packet in container.demux(stream):
                self._check_time()
                if packet.size:  # an empty packet holds no frame, and ends the stream for a decoder
                    self._packets.append(packet)
        except av.FFmpegError:
            pass  # a file that breaks off still has the packets before the break
        cut_off = self._packets and self._packets[-1].is_corrupt
        if cut_off and container.format.name.startswith(("mov", "flv")):
            self._packets.pop()

    def _number_frames(self, stream: VideoStream) -> None:
        """Number the frames that the packets hold, and measure their rate and times."""
        shown = [k for k, packet in enumerate(self._packets) if not packet.is_discard]
        if self._decoder.name == "vp8":  # it may have frames that are referred to but never shown
            shown = [k for k in shown if memoryview(self._packets[k])[0] & 0x10]
        self._keys = [k for k, packet in enumerate(self._packets) if packet.is_keyframe]
        self._stamps = [packet.pts for packet in self._packets if packet.pts is not None]
        self._number: dict[int | None, int] = {}  # time stamp -> frame number
        stamps = self._stamps_of_one_clock(shown)
        # Otherwise a full decode numbers the frames.
        self._timed = len(stamps) > 0 and self._can_number_by_stamps(stamps)
        if self._timed:
            shown.sort(key=self._stamps.__getitem__)
            self._number = {self._stamps[k]: number for number, k in enumerate(shown)}
        self._reopens = self._depends_on_start(stream, shown)
        self._shown = shown  # frame number -> packet
        self.num_frames = len(shown)
        unit = float(stream.time_base or 0)  # seconds
        gaps = np.diff(np.sort(stamps)) * unit
        self.fps = self._mean_rate(stream, gaps)
        if self._reopens:  # then a frame's number is its place in a decode from the file's start
            self._timed = False
            delivered = [frame.pts for _, frame in self._delivered()]
            self.num_frames = len(delivered)
            known = [stamp for stamp in delivered if stamp is not None]
            gaps = np.diff(known if len(known) == len(delivered) else []) * unit
        has_pauses = self._containers[0].format.name.startswith(("mov", "matroska"))
        self.times = uneven_times(gaps, MAX_PAUSE if has_pauses else MAX_GAP)
        if not self.num_frames:
            raise VideoError(f"{self.path}: no frames")

    def _stamps_of_one_clock(self, shown: list[int]) -> np.ndarray:
        """Return the frames' time stamps in the order of the packets; none if they are unusable."""
        if len(self._stamps) < len(self._packets):
            return np.array([])
        stamps = np.array([self._stamps[k] for k in shown])
        is_key = np.isin(shown, self._keys)
        if (is_key & (stamps < np.maximum.accumulate(stamps))).any():
            return np.array([])  # the file consists of two parts whose clocks overlap
        return stamps

    def _can_number_by_stamps(self, stamps: np.ndarray) -> bool:
        """Return whether time stamps order the frames; those of AVI and raw streams do not."""
        if not np.diff(np.sort(stamps)).all():
            return False  # some are equal
        # If the codec reorders frames and the stamps never do, a careless writer numbered packets.
        return not self._decoder.has_b_frames or bool((np.diff(stamps) < 0).any())

    def _depends_on_start(self, stream: VideoStream, shown: list[int]) -> bool:
        """Return whether frames must be decoded from the start of the file to be right."""
        if not self._keys or not shown:
            return False
        first = self._keys[0]
        if min(shown) < first or (self._timed and self._stamps[shown[0]] < self._stamps[first]):
            return True  # the file starts within a group of pictures: some may not decode
        # Otherwise look for packets that need parameters which an earlier packet brings.
        if any(self._packets[k].has_sidedata("new_extradata") for k in self._keys if k):
            return True
        codec, extradata = self._decoder.name, bytes(stream.codec_context.extradata or b"")
        if codec not in PARAMETER_SETS:
            return False
        found = [parameter_sets(self._packets[k], codec, extradata) for k in self._keys]
        return b"" in found and any(sets not in (b"", found[0]) for sets in found)

    def _mean_rate(self, stream: VideoStream, gaps: np.ndarray) -> float:
        """Return the header's mean rate, or that of the time stamps if the two differ much."""
        header = float(stream.average_rate or stream.guessed_rate or 0)
        if self._timed and self.num_frames > 1 and stream.time_base:
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
        return self._size[self.rotation in (90, 270)]

    @property
    def width(self) -> int:
        return self._size[self.rotation not in (90, 270)]

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
        if self._timed:
            for number, frame in self._decode_needed(left):
                yield number, self._to_rgb(frame)
        if left:
            yield from self._decode_everything(left)

    def _decode_needed(self, left: list[int]) -> Iterator[tuple[int, VideoFrame]]:
        """Yield wanted frames as they come, take them off `left`; stop at the first surprise."""
        wanted = {self._shown[number] for number in left}
        for first, last in self._runs(sorted(wanted)):
            # Decoding must start at a key frame, and the container may have marked it wrongly.
            entered = self._packets[first].is_discard
            for frame in self._decode_run(first, last, wanted):
                number = self._number.get(frame.pts)
                if number == self._number.get(self._stamps[first]):
                    entered = entered or bool(frame.key_frame)
                if number is None or self._shown[number] not in wanted:
                    continue
                if not left or number != left[-1] or not entered or frame.is_corrupt:
                    return
                left.pop()
                yield number, frame

    def _runs(self, wanted: list[int]) -> list[tuple[int, int]]:
        """Return the (first, last) packet of every stretch that the wanted packets need."""
        runs: list[tuple[int, int]] = []
        for packet in wanted:
            key = bisect_right(self._keys, packet) - 1
            # A frame shown before its key frame (open GOP) also refers to the group before.
            while key > 0 and self._stamps[packet] < self._stamps[self._keys[key]]:
                key -= 1
            first = self._keys[key] if key >= 0 else 0
            while runs and first <= runs[-1][1]:
                first = min(first, runs.pop()[0])
            runs.append((first, packet))
        return runs

    def _decode_run(self, first: int, last: int, wanted: set[int]) -> Iterator[VideoFrame]:
        """Yield the wanted frames of packets first to last, and some others; end at an error."""
        decoder = self._restarted_decoder()
        droppable = decoder.name in DROPPABLE
        try:
            for k in range(first, last + 1):
                self._check_time()
                if droppable:
                    decoder.skip_frame = "DEFAULT" if k in wanted else "NONREF"
                yield from decoder.decode(self._packets[k])
            yield from decoder.decode(None)  # the frames that the decoder still holds back
        except av.FFmpegError:
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
        decoder, count = self._restarted_decoder(), 0
        for packet in [*self._packets, None]:
            self._check_time()
            try:
                frames = decoder.decode(packet)
            except av.FFmpegError:
                continue
            for frame in frames:
                number = self._number.get(frame.pts) if self._timed else count
                count += 1
                if number is not None:
                    yield number, frame

    def _check_time(self) -> None:
        if self._left.is_over():
            raise VideoError(f"{self.path}: not read within {self._time_limit:g} seconds")

    def _restarted_decoder(self) -> av.VideoCodecContext:
        if self._reopens and self._decoder.is_open:  # it would keep the headers it saw last
            self._open_stream()
        self._decoder.flush_buffers()
        self._decoder.skip_frame = "DEFAULT"
        return self._decoder

    def _to_rgb(self, frame: VideoFrame) -> np.ndarray:
        """Return a frame as uint8 RGB [H, W, 3], upright."""
        if self._orientation is None:
            self._orientation = orientation(frame)
        height, width = self._size
        try:
            # PyAV starts a pool of threads at every call unless told not to.
            rgb = self._reformatter.reformat(frame, width, height, "rgb24", threads=1)
        except (av.FFmpegError, ValueError, MemoryError) as error:
            kind = f"{frame.format.name} frames cannot be converted ({_reason(error)})"
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


def video_stream(container: InputContainer) -> VideoStream | None:
    """Return the default video stream, else the first one; cover pictures do not count."""
    streams = [x for x in container.streams.video if x.codec_context is not None]
    films = [x for x in streams if not x.disposition & Disposition.attached_pic]
    return max(films, key=lambda x: bool(x.disposition & Disposition.default), default=None)


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


# How to find parameter sets: the place in the extradata of the number of bytes of a unit's length;
# the shift and mask that give a unit's kind, from its first byte; the kinds that are parameter sets
# and the kinds that are pictures.
PARAMETER_SETS = {
    "h264": (4, 0, 0x1F, {7, 8}, {1, 2, 3, 4, 5}),
    "hevc": (21, 1, 0x3F, {32, 33, 34}, set(range(32))),
}


def parameter_sets(packet: av.Packet, codec: str, extradata: bytes) -> bytes:
    """Return the parameter sets of H.264 or HEVC that come before the picture of a packet."""
    place, shift, mask, sets, pictures = PARAMETER_SETS[codec]
    # A unit's length precedes it in MP4 and Matroska, a start code in other formats.
    digits = (extradata[place] & 3) + 1 if extradata[:1] == b"\1" else 0
    found = b""
    for unit in _units(bytes(packet), digits):
        kind = unit[0] >> shift & mask
        if kind in pictures:
            break
        found += unit if kind in sets else b""
    return found


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


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
