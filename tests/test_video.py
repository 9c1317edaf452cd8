"""Decoding is compared with decoding everything, bit for bit; frame numbers with the pictures."""

import io
import os
import shutil
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from tests.video_files import moving_frames, read_counter, write_counter_video, write_video
from util.video import packets
from util.video.decode import Video, VideoError


@pytest.fixture(autouse=True, params=["small", "large"])
def size(request, monkeypatch):
    """Read every file as a small one, whose packets are kept, and as a large one."""
    monkeypatch.setattr(packets, "SMALL", {"small": 2**20, "large": -1}[request.param])
    yield
    packets._kept.clear()


def decode_all(path: str, limit: int | None = None) -> list[np.ndarray]:
    """Decode all frames in the plainest way, without damaged packets."""
    frames = []
    with av.open(path) as container:
        stream = container.streams.video[0]
        size = {"width": stream.width, "height": stream.height}
        for packet in container.demux(stream):
            try:
                decoded = stream.codec_context.decode(packet if packet.size else None)
            except av.FFmpegError:
                continue
            for frame in decoded:
                image = frame.to_ndarray(format="rgb24", **size)
                frames.append(np.rot90(image, frame.rotation // 90))
                if len(frames) == limit:
                    return frames
    return frames


def remux(sources: str | list[str], target: Path, change: Callable) -> str:
    """Copy the packets of one video, or several in a row, each after `change(number, packet)`.

    Packets for which it returns False are left out. It may also return a packet to use instead.
    """
    inputs = [av.open(path) for path in ([sources] if isinstance(sources, str) else sources)]
    packets = [packet for file in inputs for packet in file.demux(video=0) if packet.size]
    with av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(inputs[0].streams.video[0])
        for number, packet in enumerate(packets):
            changed = change(number, packet)
            if changed is not False:
                packet = changed if isinstance(changed, av.Packet) else packet
                packet.stream = stream
                new.mux(packet)
    return str(target)


def assert_same(video: Video, wanted: list[int], reference: list[np.ndarray]) -> None:
    seen = []
    for number, image in video.frames(wanted):
        assert image.dtype == np.uint8 and image.shape == (video.height, video.width, 3)
        assert np.array_equal(image, reference[number]), f"frame {number} of {wanted}"
        seen.append(number)
    assert seen == sorted(set(wanted))


def forbid_slow_way(monkeypatch) -> None:
    def fail(self, left):
        raise AssertionError(f"decoded everything for {left}")

    monkeypatch.setattr(Video, "_decode_everything", fail)


STRUCTURES = [
    ("libx264", ".mp4", {}),
    ("libx264", ".mp4", {"gop": 1}),
    ("libx264", ".mp4", {"bframes": 1}),
    ("libx264", ".mp4", {"bframes": 3}),
    ("libx264", ".mp4", {"bframes": 3, "open_gop": True}),
    ("libx264", ".mp4", {"bframes": 3, "b_pyramid": True}),
    ("libx264", ".mp4", {"bframes": 5, "b_pyramid": True, "open_gop": True, "gop": 7}),
    ("libx264", ".mkv", {"bframes": 3, "b_pyramid": True, "open_gop": True, "gop": 250}),
    ("libx264", ".mov", {"bframes": 2, "options": {"x264-params": "interlaced=1"}}),
    ("libx264", ".ts", {"bframes": 2, "open_gop": True}),
    ("libx265", ".mp4", {"bframes": 0}),
    ("libx265", ".mp4", {"bframes": 4, "b_pyramid": True}),
    ("libx265", ".mkv", {"bframes": 4, "b_pyramid": True, "open_gop": True}),
    ("mpeg4", ".mp4", {"bframes": 0}),
    ("mpeg4", ".mp4", {"bframes": 2}),
    ("mpeg2video", ".mkv", {"bframes": 2}),
    ("libvpx-vp9", ".webm", {"options": {"deadline": "realtime", "cpu-used": "8"}}),
    ("libvpx", ".webm", {"options": {"deadline": "realtime", "cpu-used": "8"}}),
    ("libsvtav1", ".mp4", {"options": {"preset": "12", "svtav1-params": "lp=1"}}),
    ("mjpeg", ".mkv", {"pix_fmt": "yuvj420p"}),
    ("ffv1", ".mkv", {}),
]


@pytest.mark.parametrize(("codec", "suffix", "structure"), STRUCTURES)
def test_wanted_frames_are_those_of_a_full_decode(tmp_path, monkeypatch, codec, suffix, structure):
    path = write_video(tmp_path / f"v{suffix}", moving_frames(40), codec, **structure)
    reference = decode_all(path)
    assert len(reference) == 40
    forbid_slow_way(monkeypatch)
    rng = np.random.default_rng(0)
    with Video(path) as video:
        assert video.num_frames == 40 and (video.height, video.width) == (48, 64)
        assert video.fps == pytest.approx(30)
        for number in range(40):
            assert_same(video, [number], reference)
        for _ in range(40):
            count = rng.integers(1, 20)
            assert_same(video, rng.integers(0, 40, count).tolist(), reference)
        assert_same(video, list(range(40)), reference)


def test_unwanted_groups_and_frames_are_not_decoded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", moving_frames(60), gop=20, bframes=3)
    reference = decode_all(path)
    decoded = []
    run = Video._decode_run

    def count(self, *args):
        for frame in run(self, *args):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(Video, "_decode_run", count)
    with Video(path) as video:
        assert_same(video, [25, 30], reference)
    # Key frame 20, the references at every 4th frame, and 25 and 30 where they are not references.
    assert len(decoded) <= 7


def test_counters_come_back(tmp_path):
    path = write_counter_video(tmp_path / "c.mp4", 256, gop=30, bframes=3, open_gop=True)
    wanted = [255, 0, 17, 16, 15, 200, 200]
    with Video(path) as video:
        seen = {number: read_counter(image) for number, image in video.frames(wanted)}
    assert seen == {number: number for number in wanted}


def test_frames_are_yielded_once_in_ascending_order_and_stay_valid(tmp_path):
    path = write_counter_video(tmp_path / "c.mp4", 20)
    with Video(path) as video:
        kept = list(video.frames(np.array([9, 3, 3, 7])))
        assert not list(video.frames([]))
        for number in (-1, 20):
            with pytest.raises(IndexError, match="of 20"):
                list(video.frames([number]))
    assert [(number, read_counter(image)) for number, image in kept] == [(3, 3), (7, 7), (9, 9)]


def test_an_abandoned_iteration_leaves_the_next_one_right(tmp_path):
    path = write_counter_video(tmp_path / "c.mp4", 40, bframes=3)
    with Video(path) as video:
        abandoned = video.frames(range(40))
        assert next(abandoned)[0] == 0
        assert [read_counter(image) for _, image in video.frames([5, 30])] == [5, 30]


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_rotated_frames_come_upright(tmp_path, rotation):
    frames = moving_frames(3, height=32, width=64)
    path = write_video(tmp_path / "r.mp4", frames, rotation=rotation)
    reference = decode_all(path)
    upright = np.rot90(frames[1], rotation // 90)
    with Video(path) as video:
        assert (video.height, video.width) == upright.shape[:2]  # before any frame is asked for
        assert video.rotation == rotation % 360
        assert_same(video, [1], reference)
        ((_, image),) = video.frames([1])
    assert np.abs(image.astype(float) - upright).mean() < 30
    assert image.flags.c_contiguous or image.strides[1:] == (3, 1)


TURNED = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)]
MIRRORED = [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)]


@pytest.mark.parametrize("a, b, c, d", TURNED + MIRRORED)
def test_frames_are_turned_and_mirrored_as_the_matrix_says(tmp_path, a, b, c, d):
    """A stored pixel (x, y) is shown at (a x + c y, b x + d y)."""
    path = tmp_path / "m.mp4"
    write_video(path, moving_frames(2, 32, 64), codec="mpeg4")
    (stored, _) = decode_all(str(path))
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44
    matrix = [x << 16 for x in (a, b, 0, c, d, 0, 0, 0)]
    data[place : place + 36] = struct.pack(">9i", *matrix, 1 << 30)
    path.write_bytes(data)
    y, x = np.mgrid[:32, :64]
    column, row = a * x + c * y, b * x + d * y
    expected = np.empty((32, 64, 3) if a else (64, 32, 3), np.uint8)
    expected[row - row.min(), column - column.min()] = stored
    with Video(str(path)) as video:
        assert (video.height, video.width) == expected.shape[:2]
        ((_, image),) = video.frames([0])
    np.testing.assert_array_equal(image, expected)


def test_the_orientation_of_photographs_in_a_video(tmp_path):
    """MJPEG frames may carry Exif, a kind of side data that PyAV cannot name."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    picture = io.BytesIO()
    Image.new("RGB", (64, 48)).save(picture, "JPEG", exif=exif)
    path = tmp_path / "x.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number in range(3):
            packet = av.Packet(picture.getvalue())
            packet.stream, packet.time_base = stream, Fraction(1, 30)
            packet.pts = packet.dts = number
            packet.is_keyframe = True
            container.mux(packet)
    with Video(str(path)) as video:
        assert (video.height, video.width) == (64, 48)


def write_sound(path: Path) -> str:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        block.sample_rate = 16000
        container.mux(stream.encode(block))
        container.mux(stream.encode(None))
    return str(path)


def with_cover(path: str) -> str:
    """Add a cover picture, as the first stream, to an MP4 whose index is its last box."""

    def box(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(content), kind) + content

    picture = io.BytesIO()
    Image.new("RGB", (90, 90)).save(picture, "png")
    tag = box(b"covr", box(b"data", struct.pack(">II", 14, 0) + picture.getvalue()))
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    tags = box(b"udta", box(b"meta", bytes(4) + handler + box(b"ilst", tag)))
    data = Path(path).read_bytes()
    place = data.rindex(b"moov") - 4
    length = int.from_bytes(data[place + 8 : place + 12], "big")
    index = data[place + 8 : place + 8 + length] + tags + data[place + 8 + length :]
    Path(path).write_bytes(data[:place] + box(b"moov", index))
    return path


def test_cover_pictures_are_not_videos(tmp_path):
    """A picture may be the first stream of a file, or its only one."""
    film = write_video(tmp_path / "film.mp4", moving_frames(5))
    reference = decode_all(film)
    with av.open(with_cover(film)) as container:
        assert container.streams.video[0].codec_context.name == "png"
    with Video(film) as video:
        assert (video.num_frames, video.height) == (5, 48)
        assert_same(video, [1, 3], reference)
    with pytest.raises(VideoError, match="no video stream"):
        Video(with_cover(write_sound(tmp_path / "song.mp4")))


def test_the_default_video_stream_is_used(tmp_path):
    sources = [write_video(tmp_path / f"{n}.mkv", moving_frames(n)) for n in (1, 5)]
    with av.open(str(tmp_path / "both.mkv"), "w") as container:
        for source, disposition in zip(sources, (Disposition(0), Disposition.default), strict=True):
            with av.open(source) as old:
                stream = container.add_stream_from_template(old.streams.video[0])
                stream.disposition = disposition
        for stream, source in zip(container.streams, sources, strict=True):
            with av.open(source) as old:
                for packet in old.demux(video=0):
                    if packet.size:
                        packet.stream = stream
                        container.mux(packet)
    with Video(str(tmp_path / "both.mkv")) as video:
        assert_same(video, list(range(video.num_frames)), decode_all(sources[1]))


def test_hidden_frames_of_vp8_are_not_counted(tmp_path):
    """Alternate reference frames have packets of their own, with the show bit clear."""
    options = {"deadline": "realtime", "cpu-used": "8"}
    shown = write_video(tmp_path / "s.webm", moving_frames(40), codec="libvpx", options=options)

    def hide(k, packet):
        data = bytearray(bytes(packet))
        if k % 10 == 9 and data[0] & 1:  # not a key frame
            data[0] &= 0xEF
            packet.update(bytes(data))

    path = remux(shown, tmp_path / "h.webm", hide)
    reference = decode_all(path)
    assert len(reference) == 36
    with Video(path) as video:
        assert video.num_frames == 36
        assert_same(video, [35], reference)
        assert_same(video, [0, 8, 9, 17, 30], reference)


STARTS = [("libx264", ".ts", 3), ("libx264", ".mkv", 17), ("libx265", ".ts", 3)]
STARTS += [("mpeg2video", ".ts", 12)]


@pytest.mark.parametrize("codec, suffix, cut", STARTS)
def test_a_file_that_starts_within_a_group_has_the_frames_that_are_decodable(
    tmp_path, codec, suffix, cut
):
    whole = write_video(tmp_path / f"w{suffix}", moving_frames(60), codec, gop=12, bframes=2,
                        open_gop=codec == "libx265")  # fmt: skip
    path = remux(whole, tmp_path / f"c{suffix}", lambda k, packet: k >= cut)
    reference = decode_all(path)
    with Video(path) as video:
        assert video.num_frames == len(reference) < 60
        assert_same(video, [len(reference) - 1], reference)
        assert_same(video, [0, 20, 33], reference)


def test_parts_whose_clocks_overlap_follow_one_another(tmp_path):
    first, second = (
        write_video(tmp_path / f"{seed}.ts", moving_frames(30, seed=seed), bframes=2)
        for seed in (0, 5)
    )

    def later(k, packet):
        packet.pts, packet.dts = packet.pts + 1500, packet.dts + 1500

    second = remux(second, tmp_path / "later.ts", later)
    path = tmp_path / "both.ts"
    path.write_bytes(Path(first).read_bytes() + Path(second).read_bytes())
    reference = decode_all(str(path))
    with Video(str(path)) as video:
        assert video.num_frames == len(reference) == 60
        assert_same(video, [0, 29, 30, 31, 59], reference)


def test_a_jump_of_the_clock_is_no_frame_rate(tmp_path):
    stamps = [*range(10), *range(100_000, 100_010)]
    path = write_video(tmp_path / "j.mkv", moving_frames(20), stamps=stamps)
    with Video(path) as video:
        assert video.fps == pytest.approx(30, rel=0.02)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_parameters_that_change_within_a_file(tmp_path, suffix):
    """The second part has its parameter sets only once, at its start; all its frames need them."""
    parts = []
    for name, params in (("a", "cabac=1"), ("b", "cabac=1:chroma-qp-offset=10")):
        frames = moving_frames(30, seed=ord(name))
        parts.append(write_video(tmp_path / f"{name}.mp4", frames, gop=10,
                                 options={"x264-params": f"ref=1:8x8dct=0:{params}"}))  # fmt: skip
    with av.open(parts[1]) as file:
        extradata = bytes(file.streams.video[0].codec_context.extradata)  # avcC: one SPS, one PPS
    sps = int.from_bytes(extradata[6:8], "big")
    pps = extradata[8 + sps + 1 :]
    headers = b"".join(
        len(unit).to_bytes(4, "big") + unit
        for unit in (extradata[8 : 8 + sps], pps[2 : 2 + int.from_bytes(pps[:2], "big")])
    )

    def follow(k, packet):
        if k >= 30:
            packet.pts, packet.dts = packet.pts + length, packet.dts + length
        if k != 30:
            return packet
        first = av.Packet(headers + bytes(packet))
        first.pts, first.dts, first.duration = packet.pts, packet.dts, packet.duration
        first.time_base, first.is_keyframe = packet.time_base, True
        return first

    with av.open(parts[0]) as file:
        length = file.streams.video[0].duration
    path = remux(parts, tmp_path / f"both{suffix}", follow)
    reference = decode_all(path)
    assert len(reference) == 60
    for wanted in ([45], [55, 58], [5, 55]):
        with Video(path) as video:
            assert video.num_frames == 60
            assert_same(video, wanted, reference)
            assert_same(video, [3, 12], reference)


def test_a_packet_that_is_cut_off_is_not_a_frame(tmp_path):
    path = tmp_path / "t.mp4"
    write_video(path, moving_frames(60), container_options={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    reference = decode_all(str(path))
    with Video(str(path)) as video:
        assert video.num_frames == len(reference) < 60


def test_an_edit_list_hides_frames(tmp_path):
    path = write_counter_video(tmp_path / "e.mp4", 40, gop=12, bframes=2, drop_until=15)
    reference = decode_all(path)
    assert [read_counter(image) for image in reference] == list(range(15, 40))
    with Video(path) as video:
        assert video.num_frames == 25
        for number in range(25):
            assert_same(video, [number], reference)


def test_variable_frame_rate_counts_frames_not_time(tmp_path):
    stamps = np.cumsum(np.random.default_rng(0).integers(1, 5, 30)).tolist()
    path = write_counter_video(tmp_path / "v.mp4", 30, fps=60, stamps=stamps, bframes=2)
    with Video(path) as video:
        assert video.num_frames == 30
        assert video.fps == pytest.approx(29 / (stamps[-1] - stamps[0]) * 60, rel=0.06)
        seen = [read_counter(image) for _, image in video.frames(range(30))]
    assert seen == list(range(30))


EVEN = [("a.mp4", "libx264", fps) for fps in (Fraction(1, 5), 24, Fraction(30000, 1001), 240)]
EVEN += [("a.mkv", "libx265", fps) for fps in (Fraction(24000, 1001), 60, 144, 700)]
EVEN += [("a.ts", "libx264", 50), ("a.webm", "libvpx-vp9", Fraction(60000, 1001))]


@pytest.mark.parametrize(("name", "codec", "fps"), EVEN)
def test_rounded_time_stamps_are_even(tmp_path, name, codec, fps):
    path = write_video(tmp_path / name, moving_frames(40), codec, fps)
    with Video(path) as video:
        assert video.times is None


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_the_rate_of_an_even_video_may_jitter_and_differ_from_its_header(tmp_path, name):
    stamps = [31 * k + 5 * (k % 3) for k in range(40)]
    path = write_video(tmp_path / name, moving_frames(40), fps=900, stamps=stamps)
    with Video(path) as video:
        assert video.times is None and video.fps == pytest.approx(900 / 31, rel=0.05)


STAMPS = np.cumsum([40, 40, 200, 20, 20, 900] * 7).tolist()  # ms, of 42 frames


@pytest.mark.parametrize(
    ("name", "options", "first"),
    [
        ("a.mp4", {"bframes": 2}, 0),
        ("a.mp4", {"bframes": 2, "drop_until": STAMPS[14]}, 14),  # an edit list hides the others
        ("a.mkv", {"bframes": 2, "codec": "libx265"}, 0),
        ("a.ts", {}, 0),
        ("a.webm", {"codec": "libvpx-vp9"}, 0),
    ],
)
def test_times_of_uneven_frames(tmp_path, name, options, first):
    path = write_video(tmp_path / name, moving_frames(42), fps=1000, stamps=STAMPS, **options)
    expected = (np.array(STAMPS[first:]) - STAMPS[first]) / 1000
    with Video(path) as video:
        np.testing.assert_allclose(video.times, expected, atol=0.0011)


def give_two_one_time(number, packet):
    if number == 30:
        packet.pts += 90 * (STAMPS[31] - STAMPS[30])


@pytest.mark.parametrize("change", [give_two_one_time, lambda number, packet: number >= 17])
def test_times_of_frames_that_their_times_do_not_number(tmp_path, change):
    """Two frames have the same time, or the file starts within a group of pictures."""
    whole = write_video(tmp_path / "w.ts", moving_frames(42), fps=1000, stamps=STAMPS)
    path = remux(whole, tmp_path / "c.ts", change)
    with av.open(path) as container:
        times = np.array([frame.time for frame in container.decode(video=0)])
    with Video(path) as video:
        np.testing.assert_allclose(video.times, times - times[0], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fps.mp4", {"fps": Fraction(30000, 1001)}),
        ("sound.mp4", {"audio": True, "bframes": 2}),
        ("odd.mp4", {"height": 47, "width": 63, "pix_fmt": "yuv444p"}),
        ("ten.mp4", {"pix_fmt": "yuv420p10le"}),
        ("portrait.mp4", {"height": 64, "width": 36}),
        ("fragments.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("live.webm", {"codec": "libvpx-vp9", "container_options": {"live": "1"}}),
        ("packed.avi", {"codec": "mpeg4", "bframes": 2}),
        ("plain.avi", {"codec": "mpeg4"}),
        ("h264.avi", {"bframes": 2}),
        ("raw.h264", {"bframes": 2, "fps": 25}),
        ("stream.mpg", {"codec": "mpeg2video", "bframes": 2}),
        ("flash.flv", {"bframes": 2}),
        ("moving.gif", {"codec": "gif", "pix_fmt": "rgb8", "fps": 25}),
        ("pictures.avi", {"codec": "rawvideo", "pix_fmt": "bgr24"}),
    ],
)
def test_formats(tmp_path, name, options):
    path = write_counter_video(tmp_path / name, 30, **options)
    reference = decode_all(path)
    with Video(path) as video:
        assert video.num_frames == len(reference) == 30
        assert video.fps == pytest.approx(float(options.get("fps", 30)), rel=0.02)
        for wanted in ([29], [0], [3, 11, 12, 13, 25], list(range(30))):
            assert_same(video, wanted, reference)
        shown = [read_counter(image) for _, image in video.frames(range(30))]
    assert shown == list(range(30))


def test_one_frame(tmp_path):
    with Video(write_counter_video(tmp_path / "one.mp4", 1)) as video:
        assert video.num_frames == 1 and video.fps > 0
        assert [(n, read_counter(image)) for n, image in video.frames([0])] == [(0, 0)]


def test_bt709_full_range_is_converted_as_pyav_does(tmp_path):
    path = write_video(
        tmp_path / "c.mp4",
        moving_frames(3),
        options={"x264-params": "colormatrix=bt709:colorprim=bt709:transfer=bt709:fullrange=on"},
    )
    with Video(path) as video:
        assert_same(video, [0, 1, 2], decode_all(path))


def test_time_stamps_that_ignore_b_frames_are_not_used(tmp_path):
    """Such a file says that frames are shown in the order of decoding; its decoder knows better."""

    def forget_order(number, packet):
        packet.pts = packet.dts = number * packet.duration

    good = write_counter_video(tmp_path / "good.mp4", 30, bframes=3)
    path = remux(good, tmp_path / "bad.mp4", forget_order)
    with Video(path) as video:
        for number in range(30):
            assert [read_counter(image) for _, image in video.frames([number])] == [number]


def test_packets_wrongly_marked_as_key_frames(tmp_path):
    def all_keys(_, packet):
        packet.is_keyframe = True

    for codec in ("libx265", "mpeg4"):
        good = write_video(tmp_path / "good.mp4", moving_frames(30), codec)
        path = remux(good, tmp_path / "bad.mp4", all_keys)
        reference = decode_all(path)
        with Video(path) as video:
            for number in range(30):
                assert_same(video, [number], reference)


def test_a_damaged_packet_is_replaced_and_a_long_gap_is_an_error(tmp_path):
    def damage(numbers):
        def change(number, packet):
            if number in numbers:
                packet.update(b"\xff" * packet.size)

        return change

    good = write_counter_video(tmp_path / "good.mkv", 40, gop=1, codec="mjpeg", pix_fmt="yuvj420p")
    path = remux(good, tmp_path / "one.mkv", damage({7}))
    with Video(path) as video:
        seen = {number: read_counter(image) for number, image in video.frames([6, 7, 8])}
        assert seen == {6: 6, 7: 6, 8: 8}
    path = remux(good, tmp_path / "first.mkv", damage({0}))
    with Video(path) as video:
        assert [read_counter(image) for _, image in video.frames([0, 3])] == [1, 3]
    path = remux(good, tmp_path / "tail.mkv", damage(set(range(20, 40))))
    with Video(path) as video:
        assert [read_counter(image) for _, image in video.frames([19, 21])] == [19, 19]
        with pytest.raises(VideoError, match=r"tail\.mkv: frame 39 of 40 cannot be decoded"):
            list(video.frames([19, 39]))


@pytest.mark.parametrize("suffix", [".mkv", ".avi", ".ts", ".webm"])
def test_files_that_break_off_have_the_frames_before_the_break(tmp_path, suffix):
    codec = {".avi": "mpeg4", ".webm": "libvpx-vp9"}.get(suffix, "libx264")
    path = write_video(tmp_path / f"cut{suffix}", moving_frames(60), codec)
    os.truncate(path, os.path.getsize(path) // 2)
    reference = decode_all(path)
    with Video(path) as video:
        assert 15 < video.num_frames < 45
        last = video.num_frames - 1
        assert_same(video, [0, last - 9, last - 2], reference)
        assert len(list(video.frames([last]))) == 1


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    video = write_counter_video(folder / "good.mp4", 30)
    files = {
        "missing": (folder / "missing.mp4", "no such file"),
        "folder": (folder, "a folder"),
        "empty": (folder / "empty.mp4", "cannot be opened"),
        "text": (folder / "text.mp4", "cannot be opened"),
        "truncated": (folder / "truncated.mp4", "cannot be opened"),
        "sound": (folder / "sound.mp4", "no video stream"),
    }
    files["empty"][0].touch()
    files["text"][0].write_text("path label\n" * 100)
    files["truncated"][0].write_bytes(Path(video).read_bytes()[:700])
    write_sound(files["sound"][0])
    return files


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "truncated", "sound"])
def test_bad_files_raise_one_sentence_with_the_path(tmp_path, kind):
    path, reason = bad_files(tmp_path)[kind]
    with pytest.raises(VideoError) as error:
        Video(str(path))
    assert str(error.value).startswith(f"{path}: {reason}") and "\n" not in str(error.value)


def test_bombs_are_refused_by_header_and_by_stream(tmp_path):
    path = write_counter_video(tmp_path / "v.mp4", 5)
    with pytest.raises(VideoError, match=r"v\.mp4: 64 x 48 pixels are more than max_pixels 3000"):
        Video(path, max_pixels=3000)
    with Video(path, max_pixels=64 * 48) as video:
        assert len(list(video.frames(range(5)))) == 5
    # A header that lies about the size: it says 16 x 16, the stream 64 x 48.
    lie = tmp_path / "lie.mp4"
    content = Path(path).read_bytes()
    at = content.index(b"avc1", content.index(b"stsd")) + 4 + 24
    assert content[at : at + 4] == b"\x00\x40\x00\x30"
    lie.write_bytes(content[:at] + b"\x00\x10\x00\x10" + content[at + 4 :])
    with pytest.raises(VideoError, match=r"lie\.mp4"), Video(str(lie), max_pixels=1000) as video:
        list(video.frames([0]))


def test_streams_that_change_size(tmp_path):
    small = write_counter_video(tmp_path / "small.h264", 250, 32, 32, fps=25)
    large = write_counter_video(tmp_path / "large.h264", 10, 96, 128, fps=25)
    path = tmp_path / "both.h264"
    path.write_bytes(Path(small).read_bytes() + Path(large).read_bytes())
    with Video(str(path)) as video:
        seen = [(number, image.shape) for number, image in video.frames([3, 255])]
    assert seen == [(3, (32, 32, 3)), (255, (32, 32, 3))]  # scaled to the first size
    with Video(str(path), max_pixels=2000) as video:
        assert len(list(video.frames(range(10)))) == 10
        with pytest.raises(VideoError, match=r"both\.h264: frame 259 of 260 cannot be decoded"):
            list(video.frames([259]))


def test_names_are_paths_not_protocols(tmp_path, monkeypatch):
    path = write_counter_video(tmp_path / "v.mp4", 3)
    shutil.copy(path, tmp_path / "http:name.mp4")
    monkeypatch.chdir(tmp_path)
    with Video("http:name.mp4") as video:
        assert video.num_frames == 3 and video.path == "http:name.mp4"


EXTRA = os.environ.get("MAE_VIDEO_EXTRA")


@pytest.mark.skipif(not EXTRA, reason="MAE_VIDEO_EXTRA names no folder of videos")
def test_real_videos():
    """Random subsets of every video below MAE_VIDEO_EXTRA equal the plain decode."""
    rng = np.random.default_rng(0)
    suffixes = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif"}
    paths = sorted(p for p in Path(EXTRA or "").rglob("*") if p.suffix in suffixes)
    assert paths
    for path in paths:
        reference = decode_all(str(path), limit=300)
        with Video(str(path)) as video:
            whole = len(reference) == min(video.num_frames, 300)
            for _ in range(4):
                count = min(len(reference), int(rng.integers(1, 33)))
                wanted = rng.choice(len(reference), count, replace=False).tolist()
                try:
                    if whole:
                        assert_same(video, wanted, reference)
                    else:  # damaged: the plain decode does not know which frames are missing
                        assert len(list(video.frames(wanted))) == count
                except AssertionError as error:
                    raise AssertionError(f"{path}: {error}") from error
