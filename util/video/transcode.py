"""Re-encode a video so that it is cheap to decode, and find out whether a video is damaged."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
from av.container import InputContainer
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from util.video.decode import MAX_PIXELS, Video, VideoError, orientation
from util.video.packets import video_stream
from util.video.source import open_container

# Decoding is cheap: no arithmetic coding, no deblocking, and three of four frames are B-frames to
# which no other refers, so that a reader skips those that it does not want.
# Without cpu-independent, even one machine varies its copies.
CHEAP = {
    "tune": "fastdecode",
    "x264-params": "bframes=3:b-adapt=0:b-pyramid=none:cpu-independent=1",
}
BT601 = 6  # FFmpeg's AVCOL_SPC_SMPTE170M, for which PyAV has no name
# All copies are BT.601 in limited range, which readers that ignore the tags assume. Without
# SWS_ACCURATE_RND (0x40000) and SWS_FULL_CHR_H_INT (0x2000), which have no names before PyAV 18,
# flat colours of another matrix are wrong by 1.7 levels on average instead of 0.5. SWS_BITEXACT
# (0x80000) asks for the same pixels from every kind of CPU.
COLOURS: dict[str, Any] = {
    "dst_colorspace": Colorspace.ITU601,
    "dst_color_range": ColorRange.MPEG,
    "interpolation": Interpolation.BICUBIC | 0x40000 | 0x2000 | 0x80000,
}
# Such errors are about the machine, not the video: no room, a disk that is gone, no memory.
OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.ENOMEM, errno.EMFILE}


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a video to decode all of it on this thread."""
    Video(path).close()  # raises VideoError if it is not a video or too large
    with open_container(path) as container:
        stream = video_stream(container)
        assert stream is not None  # Video has opened it
        stream.codec_context.thread_type = "NONE"
        yield container, stream


def transcode(
    source: str,
    target: str,
    short_side: int | None = 256,
    gop: int = 32,  # frames from one key frame to the next, at most
    crf: float = 23,  # x264's quality; smaller is better, 18 is visually lossless
    options: Mapping[str, str] = CHEAP,  # of x264
    max_frames: int | None = None,  # copy only so many
) -> int:
    """Re-encode a video as H.264 in MP4 without sound and return its number of frames.

    All frames keep their times; frames with a larger short side are scaled down to it. The copy
    gets its name after it has been written and opened again. If the source cannot be decoded to
    its end, this raises VideoError, and `target` stays as it was. A copy depends only on the
    source, the arguments and the versions of the libraries.

    Raises:
        OSError: the disk is full, or the machine lacks something else than a good video.
    """
    temporary = f"{target}.{socket.gethostname()}.{os.getpid()}.tmp.mp4"
    reformatter = VideoReformatter()
    count, start, time = 0, 0, -1
    try:
        with _opened(source) as (old, stream), av.open(temporary, "w") as new:
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            rate = stream.average_rate or stream.guessed_rate or Fraction(30)
            encoder = new.add_stream("libx264", rate=rate, options={"crf": f"{crf:g}", **options})
            encoder.codec_context.gop_size = gop
            for frame in islice(old.decode(stream), max_frames):
                if frame.is_corrupt:
                    raise ValueError(f"frame {count} is damaged")
                if not count:
                    _set_up(encoder, frame, short_side)
                    start = frame.pts or 0
                size = encoder.width, encoder.height
                image = reformatter.reformat(frame, *size, "yuv420p", threads=1, **COLOURS)
                time = time + 1 if frame.pts is None else max(frame.pts - start, time + 1)
                image.pts, image.time_base = time, encoder.codec_context.time_base
                image.pict_type = 0  # the encoder chooses the types of pictures, not the source
                new.mux(encoder.encode(image))
                count += 1
            if not count:
                raise ValueError("no frames")
            new.mux(encoder.encode(None))
        with Video(temporary) as video:
            if video.num_frames != count:
                raise ValueError(f"{video.num_frames} of {count} frames were written")
        os.replace(temporary, target)
    except (VideoError, av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(_describe(error, source, target)) from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return count


def _set_up(encoder: VideoStream, frame: av.VideoFrame, short_side: int | None) -> None:
    """Choose size, clock, colours and orientation of the copy after the first frame."""
    context, sides = encoder.codec_context, (frame.width, frame.height)
    scale = min(1.0, short_side / min(sides)) if short_side else 1.0
    width, height = (max(2, round(side * scale / 2) * 2) for side in sides)  # even, for 4:2:0
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
    context.thread_count = 1
    context.time_base = frame.time_base or 1 / encoder.rate
    context.colorspace, context.color_range = BT601, ColorRange.MPEG
    context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc
    a, b, c, d = (value << 16 for value in orientation(frame))  # 16.16 fixed-point numbers
    encoder.set_display_matrix((a, b, 0, c, d, 0, 0, 0, 1 << 30))  # the last one is 2.30


def _describe(error: Exception, path: str, written: str) -> str:
    """Return 'PATH: reason'; raise OSError if an error, or its cause, is not about the video."""
    cause: BaseException | None = error
    while cause is not None:
        if (code := getattr(cause, "errno", None)) in OF_THE_MACHINE:
            raise OSError(code, os.strerror(code), written) from error
        cause = cause.__cause__
    return str(error) if isinstance(error, VideoError) else f"{path}: {error}"


def find_damage(path: str) -> str:
    """Decode a whole video; return 'PATH: reason' if something is wrong with it, otherwise ''.

    Raises:
        OSError: as in transcode.
    """
    frames = errors = 0
    try:
        with _opened(path) as (container, stream):
            for packet in container.demux(stream):
                try:
                    decoded: list[av.VideoFrame] = stream.codec_context.decode(packet)
                except av.FFmpegError:
                    errors += 1
                    continue
                frames += len(decoded)
                errors += sum(frame.is_corrupt for frame in decoded)
            promised = stream.frames
    except (VideoError, av.FFmpegError, OSError, ValueError) as error:
        return _describe(error, path, path)
    if not frames:
        return f"{path}: no frame can be decoded"
    if errors:
        return f"{path}: {errors} damaged frames ({frames} decoded)"
    short = frames < 0.99 * promised - 1
    return f"{path}: breaks off after {frames} of {promised} frames" if short else ""
