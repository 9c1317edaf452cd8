"""Write real videos for tests, with any codec, container and group structure PyAV can encode."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

COUNTER_LIMIT = 256  # frame numbers that a counter video can show


def write_video(
    path: str | Path,
    frames: Iterable[np.ndarray],
    codec: str = "libx264",
    fps: Fraction | int = 30,
    gop: int = 12,
    bframes: int = 0,
    open_gop: bool = False,
    b_pyramid: bool = False,
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    audio: bool = False,
    stamps: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    drop_until: int = 0,
) -> str:
    """Encode uint8 RGB [H, W, 3] frames and return the path as a string.

    `stamps` are the times of the frames in units of 1 / fps (default 0, 1, 2, ...). `rotation` is
    written to the metadata, in degrees counterclockwise. An MP4 with `drop_until` shows only the
    frames from that one on (by an edit list).
    """
    frames = list(frames)
    rate = Fraction(fps)
    x264 = codec in ("libx264", "libx265")
    choices = dict(options or {})
    if x264:
        name = codec.removeprefix("lib") + "-params"
        params = [f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes={bframes}:b-adapt=0"]
        params += [f"open-gop={int(open_gop)}"]
        pyramid = "normal" if b_pyramid else "none"
        params += [f"b-pyramid={pyramid if codec == 'libx264' else int(b_pyramid)}"]
        params += ["log-level=none:pools=1"] if codec == "libx265" else []
        choices[name] = ":".join([*params, *filter(None, [choices.pop(name, "")])])
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=choices)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.time_base = 1 / rate
        stream.codec_context.time_base = 1 / rate
        stream.codec_context.thread_count = 1
        if not x264:
            stream.codec_context.gop_size = gop
            stream.codec_context.max_b_frames = bframes
        if codec.startswith("mpeg"):
            stream.bit_rate = 4_000_000  # the default blurs a counter away
        if rotation:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("aac", rate=16000) if audio else None
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = (stamps[i] if stamps else i) - drop_until
            frame.time_base = 1 / rate
            container.mux(stream.encode(frame))
        if isinstance(sound, av.AudioStream):
            silence = np.zeros((1, 1024), np.float32)
            for i in range(int(len(frames) / rate * 16000 / 1024) + 1):
                block = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
                block.sample_rate, block.pts = 16000, i * 1024
                container.mux(sound.encode(block))
            container.mux(sound.encode(None))
        container.mux(stream.encode(None))
    return str(path)


def counter_frame(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Return a grey picture of `number`: its sixteens on the left, its ones on the right."""
    frame = np.empty((height, width, 3), np.uint8)
    frame[:, : width // 2] = number // 16 * 16 + 8
    frame[:, width // 2 :] = number % 16 * 16 + 8
    return frame


def read_counter(frame: np.ndarray) -> int:
    """Return the number that a decoded `counter_frame` shows."""
    middle = frame.shape[1] // 2
    left, right = frame[:, : middle - 4].mean(), frame[:, middle + 4 :].mean()
    return int(left // 16 * 16 + right // 16)


def write_counter_video(
    path: str | Path, num_frames: int, height: int = 48, width: int = 64, **kwargs
) -> str:
    """Write a video whose frame i shows i (`read_counter`); keywords as `write_video`."""
    assert num_frames <= COUNTER_LIMIT
    frames = [counter_frame(i, height, width) for i in range(num_frames)]
    return write_video(path, frames, **kwargs)


def moving_frames(num_frames: int, height: int = 48, width: int = 64, seed: int = 0):
    """Return frames of a noisy, moving pattern; all frames are different."""
    rng = np.random.default_rng(seed)
    texture = rng.integers(0, 256, (height + num_frames, width + 2 * num_frames, 3), np.uint8)
    texture = np.kron(texture[::4, ::4], np.ones((4, 4, 1), np.uint8))
    frames = []
    for i in range(num_frames):
        frame = texture[i % 7 : i % 7 + height, 2 * i : 2 * i + width].copy()
        frame[: height // 4] = i * 255 // num_frames
        frames.append(frame)
    return frames
