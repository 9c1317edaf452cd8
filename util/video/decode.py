"""Decode the wanted frames of a video exactly and cheaply, and place clips in it.

A frame's number is its place in presentation order among the frames shown (an edit list may hide
some). Opening a file reads all its packets and decodes none, so the number of frames, key frames
and time stamps are what the file holds, whatever its header says. `Video.frames` then decodes as
little as the wanted frames need. Only files that start within a group of pictures, or change their
decoder's parameters on the way, are decoded whole, once to count their frames and for every use.
"""

import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import av
import numpy as np
from av.container import Flags, InputContainer
from av.stream import Discard, Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from util.video.time_limit import TimeLimit

# width * height: above 8K footage (7680 x 4320), below a decompression bomb
MAX_PIXELS = 8192 * 8192
# titles in unknown encodings are no reason to refuse a video (the argument is gone in PyAV 19)
LENIENT: dict[str, Any] = {"metadata_errors": "replace"} if av.__version__ < "19" else {}
MAX_HOLD = 8  # frames: the longest hole that the frame before it may fill

# Decoders that may be told to drop the frames to which no other refers: these formats mark them for
# certain. (HEVC's mark speaks of one temporal layer only; other decoders ignore the request.)
DROPPABLE = {"h264", "mpeg1video", "mpeg2video", "mpeg4"}
MAX_GAP = 10.0  # seconds from frame to frame; a longer one is a jump of the clock

# The least magnitudes of the parts of a display matrix: a stored pixel (x, y) is shown at
# (a x + c y, b x + d y), rows counted downwards.
Orientation = tuple[int, int, int, int]
UPRIGHT = (1, 0, 0, 1)
TURNS = (UPRIGHT, (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))  # by 90 degrees counterclockwise


class VideoError(Exception):
    """A video that cannot be used; its text is 'PATH: reason'."""


class Video:
    """Open a local video file for decoding; a context manager.

    Attributes:
        path: the file, as given.
        num_frames: frames shown, counted (the header is not asked).
        fps: mean frames per second, a float.
        height, width: pixels of an upright frame (turned as the metadata says, pixels as stored).

    Everything runs on the calling thread: loader workers are the parallelism.

    Args:
        path: local path.
        max_pixels: refuse pictures with more pixels (width * height), before allocating any.
        time_limit: seconds from now on after which reading and decoding raise; None for no limit.
            Looked at between packets: a single read that never returns is not interrupted, and
            what lies between two packets counts for a second at most (see time_limit.py).

    Raises:
        VideoError: the file is missing, empty, no video, has no frames, or is above `max_pixels`.
    """

    def __init__(
        self, path: str, max_pixels: int = MAX_PIXELS, time_limit: float | None = None
    ) -> None:
        self.path = path
        self._max_pixels = max_pixels
        self._time_limit = time_limit
        self._left = TimeLimit(float("inf") if time_limit is None else time_limit)
        self._packets: list[av.Packet] = []
        self._containers: list[InputContainer] = []
        self._reformatter = VideoReformatter()
        self._orientation: Orientation | None = None
        if not os.path.isfile(path):
            raise VideoError(f"{path}: {_not_a_file(path)}")
        try:
            self._read_packets()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and free its packets."""
        self._packets = []
        for container in self._containers:
            container.close()

    def _open_stream(self) -> VideoStream:
        """Open the file, once more maybe, and prepare the decoder of its video."""
        path, max_pixels = self.path, self._max_pixels
        try:
            # An absolute path cannot be read as a protocol ("http:name.mp4"); the whitelist keeps
            # playlists off the network; decoders obey max_pixels wherever a stream changes size.
            container = av.open(
                os.path.abspath(path),
                options={"max_pixels": str(max_pixels)},
                container_options={"protocol_whitelist": "file"},
                **LENIENT,
            )
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"{path}: cannot be opened as a video ({_reason(error)})") from error
        self._containers.append(container)
        stream = video_stream(container)
        if stream is None:
            raise VideoError(f"{path}: no video stream that can be decoded")
        for other in container.streams:
            other.discard = Discard.default if other is stream else Discard.all
        self._decoder = stream.codec_context
        self._size = self._decoder.height, self._decoder.width  # as stored, before it is turned
        if self._size[0] * self._size[1] > max_pixels:
            size = f"{self._size[1]} x {self._size[0]}"
            raise VideoError(f"{path}: {size} pixels are more than max_pixels {max_pixels}")
        if not all(self._size):
            raise VideoError(f"{path}: the size of its pictures is unknown")
        # Decoders count rows padded to a multiple of 64 pixels.
        self._decoder.options = {"max_pixels": str(max_pixels + 63 * self._size[0])}
        self._decoder.thread_type = "NONE"
        self._decoder.thread_count = 1  # dav1d looks at this one only
        return stream

    def _read_packets(self) -> None:
        """Read all packets and number the frames they hold."""
        stream, container = self._open_stream(), self._containers[0]
        # Stamps that the file does not hold must stay unknown: PyAV would have them made up.
        container.flags &= ~Flags.gen_pts.value
        try:
            # Empty packets hold no frame, and a decoder takes one for the end of the stream.
            for packet in container.demux(stream):
                self._check_time()
                if packet.size:
                    self._packets.append(packet)
        except av.FFmpegError:
            pass  # a file that breaks off has the packets before the break
        cut_off = self._packets and self._packets[-1].is_corrupt
        if cut_off and container.format.name.startswith(("mov", "flv")):
            self._packets.pop()
        shown = [k for k, packet in enumerate(self._packets) if not packet.is_discard]
        if self._decoder.name == "vp8":  # whose frames may be made to refer to, not to be seen
            shown = [k for k in shown if memoryview(self._packets[k])[0] & 0x10]
        if not shown:
            raise VideoError(f"{self.path}: no frames")
        self._keys = [k for k, packet in enumerate(self._packets) if packet.is_keyframe]
        self._stamps = [packet.pts for packet in self._packets if packet.pts is not None]
        self._number: dict[int | None, int] = {}  # time stamp -> frame number
        self._timed = self._can_number_by_stamps(shown)
        if self._timed:
            shown.sort(key=self._stamps.__getitem__)
            self._number = {self._stamps[k]: number for number, k in enumerate(shown)}
        self._reopens = self._starts_within(shown) or self._changes_headers(stream)
        self._shown = shown  # frame number -> packet
        self.num_frames = len(shown)
        self.fps = self._mean_rate(stream)
        if self._reopens:  # then frames are what a decoder gives from the file's start on
            self._timed = False
            self.num_frames = sum(1 for _ in self._delivered())
            if not self.num_frames:
                raise VideoError(f"{self.path}: no frames")

    def _can_number_by_stamps(self, shown: list[int]) -> bool:
        """Tell if time stamps order the frames; else only a full decode does (AVI, raw streams)."""
        if len(self._stamps) < len(self._packets):
            return False
        stamps = np.array([self._stamps[k] for k in shown])
        if len(np.unique(stamps)) < len(stamps):
            return False
        is_key = np.zeros(len(self._packets), dtype=bool)
        is_key[self._keys] = True
        if (is_key[shown] & (stamps < np.maximum.accumulate(stamps))).any():
            return False  # two parts in one file, whose clocks overlap
        # Where the codec reorders and the stamps never do, a careless writer numbered packets.
        return not self._decoder.has_b_frames or bool((np.diff(stamps) < 0).any())

    def _starts_within(self, shown: list[int]) -> bool:
        """Tell if the file starts within a group of pictures: some are not decodable then."""
        if not self._keys:
            return False
        first = self._keys[0]
        leading = self._timed and self._stamps[shown[0]] < self._stamps[first]
        return leading or min(shown) < first

    def _changes_headers(self, stream: VideoStream) -> bool:
        """Tell if decoding must have passed an earlier packet to have the parameters of a later."""
        if any(self._packets[k].has_sidedata("new_extradata") for k in self._keys if k):
            return True
        if self._decoder.name not in PARAMETER_SETS:
            return False
        extradata = bytes(stream.codec_context.extradata or b"")
        codec = self._decoder.name
        found = [parameter_sets(self._packets[k], codec, extradata) for k in self._keys]
        different = {sets for sets in found if sets}
        if b"" not in found:  # every group of pictures brings its own
            return False
        return len(different) > 1 or (len(different) == 1 and not found[0])

    def _mean_rate(self, stream: VideoStream) -> float:
        """Return the header's mean rate, or that of the time stamps where they differ much."""
        header = float(stream.average_rate or stream.guessed_rate or 0)
        if self._timed and self.num_frames > 1 and stream.time_base:
            seconds = np.diff([self._stamps[k] for k in self._shown]) * float(stream.time_base)
            steady = seconds[seconds <= MAX_GAP]
            rate = float(1 / steady.mean()) if len(steady) else header
            if abs(rate - header) > 0.05 * rate:
                return rate  # else the header's: stamps rounded to 1 ms (Matroska) are less exact
        return header or 30.0

    @property
    def rotation(self) -> int:
        """Degrees counterclockwise, 0, 90, 180 or 270, that turn a stored frame upright.

        A mirrored one is flipped left to right before. FFmpeg tells it with a frame only: unless
        one was decoded already, this decodes the first.
        """
        if self._orientation is None:
            for _ in self.frames([0]):
                break
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
        """Decode the wanted frames once, in ascending order.

        Only groups of pictures with a wanted frame are decoded, each up to its last wanted one and
        without unwanted frames to which no other refers; only wanted frames are converted. The
        result is bit-exactly that of decoding everything. When this short way does not deliver what
        the packets promise, the rest comes from decoding everything. A frame that even this does
        not deliver (a damaged packet, a broken tail) is the one delivered before it, as decoders
        conceal errors, or at the start the first one; a hole of more than MAX_HOLD frames raises.

        Args:
            wanted: frame numbers in [0, num_frames), in any order; duplicates count once.

        Yields:
            (number, uint8 RGB [height, width, 3]), upright, dense in its last two dimensions, the
            caller's to keep. Colours as PyAV's `frame.to_ndarray(format="rgb24")`: the stream's
            matrix and range, BT.601 and limited where it is silent. Frames of another size than the
            stream's are scaled to it. Finish or drop one iteration before starting the next.

        Raises:
            IndexError: a number outside the video.
            VideoError: a wanted frame cannot be decoded.
        """
        left = np.unique(np.asarray(wanted, dtype=np.int64)).tolist()
        if left and (left[0] < 0 or left[-1] >= self.num_frames):
            raise IndexError(f"{self.path}: frames {left[0]} to {left[-1]} of {self.num_frames}")
        left.reverse()  # the next one wanted is left[-1]
        if self._timed:
            for number, frame in self._decode_needed(left):
                yield number, self._to_rgb(frame)
        if left:
            yield from self._decode_everything(left)

    def _decode_needed(self, left: list[int]) -> Iterator[tuple[int, VideoFrame]]:
        """Take wanted frames off `left` as they come, and stop at the first thing unexpected."""
        wanted = {self._shown[number] for number in left}
        droppable = self._decoder.name in DROPPABLE
        for first, last in self._runs(sorted(wanted)):
            # Decoding must enter at a key frame by the stream's word, not only the container's.
            entered = self._packets[first].is_discard
            for frame in self._decode_run(first, last, wanted, droppable):
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
        """Return (first, last) of each stretch of packets that the wanted ones need."""
        runs: list[tuple[int, int]] = []
        for packet in wanted:
            key = bisect_right(self._keys, packet) - 1
            # A frame shown before its key frame (open GOP) refers to the group before, too.
            while key > 0 and self._stamps[packet] < self._stamps[self._keys[key]]:
                key -= 1
            first = self._keys[key] if key >= 0 else 0
            while runs and first <= runs[-1][1]:
                first = min(first, runs.pop()[0])
            runs.append((first, packet))
        return runs

    def _decode_run(
        self, first: int, last: int, wanted: set[int], droppable: bool
    ) -> Iterator[VideoFrame]:
        """Yield frames of packets first to last: all wanted ones, unless there is an error."""
        decoder = self._restarted_decoder()
        try:
            for k in range(first, last + 1):
                self._check_time()
                if droppable:
                    decoder.skip_frame = "DEFAULT" if k in wanted else "NONREF"
                yield from decoder.decode(self._packets[k])
            yield from decoder.decode(None)  # what the decoder still holds back
        except av.FFmpegError:
            return

    def _decode_everything(self, left: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the frames left from a decode of all packets, filling holes as `frames` says."""
        last, held = -1, None  # the frame delivered last
        for number, frame in self._delivered():
            if number < last:
                raise VideoError(f"{self.path}: frames come out of the order of their time stamps")
            while left and left[-1] < number:
                hole = number - left[-1] if held is None else left[-1] - last
                yield self._fill(left.pop(), hole, held or frame)
            if left and left[-1] == number:
                left.pop()
                yield number, self._to_rgb(frame)
            if not left:
                return
            last, held = number, frame
        while left:
            hole = left[-1] - last
            yield self._fill(left.pop(), hole, held)

    def _delivered(self) -> Iterator[tuple[int, VideoFrame]]:
        """Decode all packets, passing over those that fail, and number the frames that come."""
        decoder = self._restarted_decoder()
        count = 0
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
        if self._reopens and self._decoder.is_open:  # it would keep the headers it met last
            self._open_stream()
        self._decoder.flush_buffers()
        self._decoder.skip_frame = "DEFAULT"
        return self._decoder

    def _fill(self, number: int, hole: int, frame: VideoFrame | None) -> tuple[int, np.ndarray]:
        if frame is None or hole > MAX_HOLD:
            raise VideoError(f"{self.path}: frame {number} of {self.num_frames} cannot be decoded")
        return number, self._to_rgb(frame)

    def _to_rgb(self, frame: VideoFrame) -> np.ndarray:
        """Return uint8 RGB [H, W, 3], upright."""
        if self._orientation is None:
            self._orientation = orientation(frame)
        height, width = self._size
        # PyAV starts a thread pool per call unless told not to.
        try:
            rgb = self._reformatter.reformat(frame, width, height, "rgb24", threads=1)
        except (av.FFmpegError, ValueError, MemoryError) as error:
            reason = f"its {frame.format.name} frames cannot be converted ({_reason(error)})"
            raise VideoError(f"{self.path}: {reason}") from error
        if rgb is frame:  # was RGB already: the decoder's memory, rows maybe bottom up
            image = rgb.to_ndarray()
        else:
            plane = rgb.planes[0]
            strides = (plane.line_size, 3, 1)
            # no copy
            image = np.ndarray((height, width, 3), np.uint8, memoryview(plane), strides=strides)
        if self._orientation == UPRIGHT:
            return image
        return np.ascontiguousarray(turn(image, self._orientation))


def video_stream(container: InputContainer) -> VideoStream | None:
    """Return the video to watch: no cover picture; the default one, or else the first."""
    streams = [
        stream
        for stream in container.streams.video
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic
    ]
    default = (stream for stream in streams if stream.disposition & Disposition.default)
    return next(default, streams[0] if streams else None)


def orientation(frame: VideoFrame) -> Orientation:
    """Read how a frame is to be shown, in steps of 90 degrees, mirrored or not."""
    try:
        side_data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV has no name for another kind (Exif, in MJPEG)
        return TURNS[round(frame.rotation / 90) % 4]
    if side_data is None:
        return UPRIGHT
    a, b, _, c, d, *_ = np.frombuffer(bytes(side_data), dtype=np.int32).tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return (-1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1)
    return (0, -1 if b < 0 else 1, -1 if c < 0 else 1, 0)


def turn(image: np.ndarray, orientation: Orientation) -> np.ndarray:
    """View a stored image [H, W, C] as it is to be shown."""
    a, b, c, d = orientation
    if b:
        image = image.transpose(1, 0, 2)  # its rows were columns
    return image[:: b + d, :: a + c]


# How headers within a stream are told: bits of a unit's kind, kinds of parameter sets and pictures.
PARAMETER_SETS = {
    "h264": (0, 0x1F, {7, 8}, {1, 2, 3, 4, 5}),
    "hevc": (1, 0x3F, {32, 33, 34}, set(range(32))),
}


def parameter_sets(packet: av.Packet, codec: str, extradata: bytes) -> bytes:
    """Return the parameter sets of H.264 or HEVC that stand before the picture of a packet."""
    shift, bits, sets, pictures = PARAMETER_SETS[codec]
    found = b""
    for unit in _units(bytes(packet), codec, extradata):
        kind = unit[0] >> shift & bits
        if kind in pictures:
            break
        found += unit if kind in sets else b""
    return found


def _units(data: bytes, codec: str, extradata: bytes) -> Iterator[bytes]:
    """Cut a packet into its units: each behind its length (MP4, Matroska) or a start code."""
    if extradata[:1] == b"\1":
        digits = (extradata[4 if codec == "h264" else 21] & 3) + 1
        place = 0
        while place + digits < len(data):
            end = place + digits + int.from_bytes(data[place : place + digits], "big")
            yield data[place + digits : end] or b"\0"
            place = end
    else:
        starts = re.finditer(rb"\x00\x00\x01(?=.)", data, re.DOTALL)
        place = next(starts, None)
        while place is not None:
            following = next(starts, None)
            yield (
                data[place.end() : following.start() if following else None].rstrip(b"\0") or b"\0"
            )
            place = following


def _not_a_file(path: str) -> str:
    if os.path.isdir(path):
        return "a folder"
    return "not a regular file" if os.path.exists(path) else "no such file"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
