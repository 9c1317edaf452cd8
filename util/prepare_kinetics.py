"""Write the lists that the scripts read from what data sets come with, and re-encode their videos.

    python -m util.prepare_kinetics kinetics VIDEOS OUT --annotations train.csv val.csv test.csv
    python -m util.prepare_kinetics folders VIDEOS OUT
    python -m util.prepare_kinetics ssv2 VIDEOS OUT --labels labels.json --annotations train.json

OUT gets train.csv, val.csv, test.csv, classes.txt (one class a line, in the order of the labels)
and missing.txt (listed, but not found). --reencode DIR also writes copies of short side 256 that
are cheap to decode and lists those; --verify decodes every listed video. See DATASET.md.
"""

import argparse
import csv
import io
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import av
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from tqdm import tqdm

from util.args import positive_int
from util.errors import UserError
from util.file_io import open_file, write_atomically
from util.loader import available_cpus
from util.video.decode import LENIENT, MAX_PIXELS, Video, VideoError, orientation, video_stream

SUFFIXES = {".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv"}
SPLITS = {  # what annotations and folders call a split -> the list that it goes to
    "train": "train",
    "training": "train",
    "val": "val",
    "validate": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
BT601 = 6  # FFmpeg's AVCOL_SPC_SMPTE170M, for which PyAV has no name
# SWS_ACCURATE_RND and SWS_FULL_CHR_H_INT, unnamed before PyAV 18: flat colours of another matrix
# are off by 0.5 levels on average, not 1.7.
SCALING = Interpolation.BICUBIC | 0x40000 | 0x2000


class Clip(NamedTuple):
    """A labelled video of an annotation file, by the name of its file without suffix."""

    name: str
    label: str
    split: str


class Lists(NamedTuple):
    """What there is: classes in the order of their labels, rows (path, label) of each split."""

    classes: list[str]
    rows: dict[str, list[tuple[str, int]]]
    missing: list[str]


# --- what data sets come with -------------------------------------------------------------------


def read_kinetics(paths: Sequence[str]) -> list[Clip]:
    """Read the official csvs of Kinetics: label, youtube_id, time_start, time_end, split.

    Rows without a label (some test parts) are left out. Without the column `split`, the file's name
    tells it.
    """
    clips = []
    for path in paths:
        for number, row in _read_csv(path, ("youtube_id", "time_start", "time_end")):
            if not row.get("label"):
                continue
            try:
                start, end = (int(float(row[x])) for x in ("time_start", "time_end"))
            except (ValueError, OverflowError) as error:
                raise UserError(f"{path}, line {number}: its times are no numbers") from error
            name = f"{row['youtube_id']}_{start:06d}_{end:06d}"
            clips.append(Clip(name, row["label"], _split(row.get("split", ""), path)))
    return clips


def _read_csv(path: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, cells by column) of a csv whose header must name the columns."""
    # spaces after a comma would hide the quotes of a cell from the reader
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), skipinitialspace=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        missing = set(columns) - set(header)
        if missing:
            raise UserError(f"{path} has no column {', '.join(sorted(missing))}")
        for row in reader:
            cells = (cell.strip() for cell in row)
            yield reader.line_num, dict(zip_longest(header, cells, fillvalue=""))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from error


def _read_text(path: str) -> str:
    """Return the text of a file, without the byte-order mark of editors on Windows."""
    with open_file(path, "rb") as file:
        content = file.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {number}: not UTF-8 text: {error.reason}") from error


def read_ssv2(labels_path: str, paths: Sequence[str]) -> tuple[list[Clip], list[str]]:
    """Read Something-Something's json files; returns its videos and its classes in label order.

    The labels map a template ("Holding something next to something") to a number; a video's
    template has its objects in brackets. Videos without a template (the test part) are left out.
    """
    numbers = _read_json(labels_path, dict)
    classes = sorted(numbers, key=lambda name: int(numbers[name]))
    clips = []
    for path in paths:
        for entry in _read_json(path, list):
            template = str(entry.get("template", "")).replace("[", "").replace("]", "")
            if not template:
                continue
            if template not in numbers:
                raise UserError(f"{path}: template {template!r} is not in {labels_path}")
            clips.append(Clip(str(entry["id"]), template, _split("", path)))
    return clips, classes


def _read_json(path: str, kind: type) -> ...:
    try:
        content = json.loads(_read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not a json file: {error}") from error
    if not isinstance(content, kind):
        raise UserError(f"{path} does not hold a {kind.__name__}, as the official file does")
    return content


def _split(name: str, path: str) -> str:
    """Return the split by the name that an annotation gives it, else by the name of the file."""
    words = [name] if name else re.split(r"[^a-z]+", Path(path).stem.lower())
    for word in words:
        if word.lower() in SPLITS:
            return SPLITS[word.lower()]
    raise UserError(f"{path}: is this train, val or test? Neither a column nor its name says so")


def find_videos(folder: str) -> list[str]:
    """Return the paths of all videos below a folder, sorted; links are followed, once each."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is no folder")
    found, visited = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        place = status.st_dev, status.st_ino
        if place in visited:  # by a link, maybe to a folder above
            folders.clear()
            continue
        visited.add(place)
        folders.sort()
        found += [os.path.join(parent, f) for f in files if Path(f).suffix.lower() in SUFFIXES]
    if not found:
        raise UserError(f"{folder} holds no videos ({' '.join(sorted(SUFFIXES))})")
    return sorted(found)


def match(clips: Sequence[Clip], videos: Sequence[str], classes: Sequence[str] = ()) -> Lists:
    """Find the files of the clips, in class folders or flat; classes are sorted unless given."""
    by_name: dict[str, str] = {}
    for path in videos:
        by_name.setdefault(Path(path).stem, path)
    classes = list(classes) or sorted({clip.label for clip in clips})
    number = {name: i for i, name in enumerate(classes)}
    rows: dict[str, list[tuple[str, int]]] = {"train": [], "val": [], "test": []}
    missing = []
    for clip in clips:
        path = by_name.get(clip.name)
        if path is None:
            missing.append(f"{clip.split} {clip.name}")
        else:
            rows[clip.split].append((path, number[clip.label]))
    return Lists(classes, rows, missing)


def read_folders(
    folder: str,
    train_list: str = "",
    test_list: str = "",
    hmdb_splits: str = "",
    hmdb_split: int = 1,
    val_share: float = 0.2,
) -> Lists:
    """List a folder of class folders (UCF101, HMDB51), maybe below folders train, val and test.

    Splits come from lists of `class/name.avi` (UCF101's trainlist01.txt and testlist01.txt), from a
    folder of `CLASS_test_split1.txt` files (HMDB51), from the folders train and val, or else
    `val_share` of each class is chosen by a fixed draw.
    """
    videos = find_videos(folder)
    parts = {path: Path(path).relative_to(folder).parts for path in videos}
    flat = next((path for path in videos if len(parts[path]) < 2), None)
    if flat:
        raise UserError(f"{flat} is in no class folder")
    missing: list[str] = []
    if train_list or test_list:
        listed = _read_ucf(train_list, "train") | _read_ucf(test_list, "val")
        split_of, missing = _find_listed(parts, listed)
    elif hmdb_splits:
        split_of, missing = _find_listed(parts, _read_hmdb(hmdb_splits, hmdb_split))
    else:
        split_of = _split_by_folder(parts) or _draw_split(videos, val_share)
    classes = sorted({p[-2] for p in parts.values()})
    number = {name: i for i, name in enumerate(classes)}
    rows: dict[str, list[tuple[str, int]]] = {"train": [], "val": [], "test": []}
    for path, split in sorted(split_of.items()):
        rows[split].append((path, number[parts[path][-2]]))
    return Lists(classes, rows, missing)


def _find_listed(
    parts: dict[str, tuple[str, ...]], listed: dict[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Return the splits by path of videos listed as `class/name.avi`, and what is not there."""
    names = {path: "/".join(p[-2:]) for path, p in parts.items()}
    split_of = {path: listed[name] for path, name in names.items() if name in listed}
    found = set(names.values())
    return split_of, [f"{split} {name}" for name, split in listed.items() if name not in found]


def _read_ucf(path: str, split: str) -> dict[str, str]:
    """Read lines `class/name.avi N` or, of a test part, `class/name.avi`; names may hold spaces."""
    lines = _read_text(path).splitlines() if path else []
    names = (re.sub(r"\s+\d+$", "", line.strip()) for line in lines)
    return dict.fromkeys(filter(None, names), split)


def _read_hmdb(folder: str, split: int) -> dict[str, str]:
    """Read lines `name.avi N` of CLASS_test_splitK.txt: 1 is training, 2 testing, 0 neither."""
    ending = f"_test_split{split}.txt"
    files = sorted(Path(folder).glob(f"*{ending}"))
    if not files:
        raise UserError(f"{folder} holds no *{ending}")
    listed = {}
    for path in files:
        label = path.name.removesuffix(ending)
        for line in _read_text(str(path)).splitlines():
            words = line.strip().rsplit(maxsplit=1)
            if len(words) == 2 and words[1] in ("1", "2"):
                listed[f"{label}/{words[0]}"] = "train" if words[1] == "1" else "val"
    return listed


def _split_by_folder(parts: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Return the splits by path that the top folders name; nothing if none does."""
    named = {path: p[0].lower() for path, p in parts.items() if len(p) > 2}
    split_of = {path: SPLITS[name] for path, name in named.items() if name in SPLITS}
    stray = next((path for path in parts if path not in split_of), None)
    if split_of and stray:
        raise UserError(f"{stray} is below none of the folders train, val, test; others are")
    return split_of


def _draw_split(videos: Sequence[str], val_share: float) -> dict[str, str]:
    """Split the videos of each class by a draw that depends on their number alone."""
    classes: dict[str, list[str]] = {}
    for path in videos:
        classes.setdefault(os.path.dirname(path), []).append(path)
    split = {}
    for paths in classes.values():
        shuffled = random.Random(0).sample(paths, len(paths))
        count = round(val_share * len(paths))
        split |= dict.fromkeys(shuffled[:count], "val") | dict.fromkeys(shuffled[count:], "train")
    return split


def write_lists(lists: Lists, out: str) -> None:
    """Write the csvs, classes.txt and missing.txt; without a test part, test.csv repeats val.csv.

    Paths below `out` are written relative to it, so that the folder can be moved as a whole.
    """
    os.makedirs(out, exist_ok=True)
    rows = dict(lists.rows)
    rows["test"] = rows["test"] or rows["val"]
    texts = {"classes.txt": lists.classes, "missing.txt": lists.missing}
    root = os.path.abspath(out)
    for split, pairs in rows.items():
        lines = []
        for path, label in pairs:
            path = os.path.abspath(path)
            if os.path.commonpath([path, root]) == root:
                path = os.path.relpath(path, root)
                if not re.match(r"[\w.-]", path):  # it would be a comment, a quote, a separator
                    path = f"./{path}"
            lines.append(f"{path} {label}")
        texts[f"{split}.csv"] = lines
    for name, lines in texts.items():
        content = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
        write_atomically(os.path.join(out, name), lambda file, content=content: file.write(content))


# --- re-encoding and verifying ------------------------------------------------------------------


def transcode(
    source: str,
    target: str,
    short_side: int | None = 256,
    gop: int = 32,
    crf: float = 23,
    tune: str | None = "fastdecode",
) -> int:
    """Re-encode a video as H.264 in MP4 without sound and return its number of frames.

    Every frame and its time is kept; larger frames are scaled to the short side. The file appears
    under its name when it is whole and has been read back.

    Args:
        gop: frames from one key frame to the next at most.
        crf: x264's quality; smaller is better, 18 is visually lossless.
        tune: of x264; "fastdecode" leaves out what is slow to decode, None nothing.

    Raises:
        VideoError: the source cannot be decoded to its end; `target` is as it was.
    """
    with Video(source):  # refuses what is no video, or too large, in one sentence
        pass
    temporary = f"{target}.{os.getpid()}.tmp.mp4"
    try:
        count = _encode(source, temporary, short_side, gop, crf, tune)
        with Video(temporary) as video:
            if video.num_frames != count:
                raise VideoError(f"{source}: {video.num_frames} of {count} frames were written")
        os.replace(temporary, target)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"{source}: {error}") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return count


def _encode(
    source: str, target: str, short_side: int | None, gop: int, crf: float, tune: str | None
) -> int:
    options = {"crf": f"{crf:g}"} | ({"tune": tune} if tune else {})
    reformatter = VideoReformatter()
    count, start, last = 0, 0, -1
    with av.open(os.path.abspath(source), **LENIENT) as old, av.open(target, "w") as new:
        stream = video_stream(old)
        assert stream is not None  # `transcode` has opened it
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        stream.codec_context.thread_type = "NONE"
        rate = stream.average_rate or stream.guessed_rate or Fraction(30)
        encoder = new.add_stream("libx264", rate=rate, options=options)
        width, height = 0, 0
        for frame in old.decode(stream):
            if frame.is_corrupt:
                raise VideoError(f"{source}: frame {count} is damaged")
            if not count:
                width, height = _even_size(frame.width, frame.height, short_side)
                encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
                encoder.codec_context.gop_size = gop
                encoder.codec_context.thread_count = 1
                encoder.codec_context.time_base = frame.time_base or 1 / rate
                _describe(encoder, frame)
                start = frame.pts or 0
            image = reformatter.reformat(
                frame,
                width,
                height,
                "yuv420p",
                dst_colorspace=Colorspace.ITU601,
                dst_color_range=ColorRange.MPEG,
                interpolation=SCALING,
                threads=1,
            )
            time = last + 1 if frame.pts is None else max(frame.pts - start, last + 1)
            image.pts, image.time_base = time, encoder.codec_context.time_base
            image.pict_type = 0  # the encoder decides, not the source
            new.mux(encoder.encode(image))
            count, last = count + 1, time
        if count:
            new.mux(encoder.encode(None))
    if not count:
        raise VideoError(f"{source}: no frames")
    return count


def _describe(encoder: VideoStream, frame: VideoFrame) -> None:
    """Say in the copy how it stores colours, and how it is to be shown: as the source.

    All copies are BT.601 in limited range, which readers assume that do not look.
    """
    context = encoder.codec_context
    context.colorspace, context.color_range = BT601, ColorRange.MPEG
    context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc
    a, b, c, d = orientation(frame)
    one = 1 << 16  # of 16.16 fixed-point numbers; the last one is 2.30
    encoder.set_display_matrix((a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30))


def _even_size(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """Scale down to a short side, both sides even as 4:2:0 needs."""
    scale = min(1.0, short_side / min(width, height)) if short_side else 1.0
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


def find_damage(path: str) -> str:
    """Decode a whole video and return what is wrong with it as 'PATH: reason', or nothing."""
    try:
        with Video(path):
            pass
        frames = errors = 0
        with av.open(os.path.abspath(path), **LENIENT) as container:
            stream = video_stream(container)
            assert stream is not None  # Video has opened it
            stream.codec_context.thread_type = "NONE"
            for packet in container.demux(stream):
                try:
                    decoded: list[VideoFrame] = stream.codec_context.decode(packet)
                except av.FFmpegError:
                    errors += 1
                    continue
                frames += len(decoded)
                errors += sum(frame.is_corrupt for frame in decoded)
            promised = stream.frames
    except VideoError as error:
        return str(error)
    except (av.FFmpegError, OSError, ValueError) as error:
        return f"{path}: {error}"
    if not frames:
        return f"{path}: no frame can be decoded"
    if errors:
        return f"{path}: {errors} damaged frames ({frames} decoded)"
    if frames < 0.99 * promised - 1:
        return f"{path}: breaks off after {frames} of {promised} frames"
    return ""


def reencode(lists: Lists, source: str, folder: str, workers: int, **options) -> list[str]:
    """Re-encode all listed videos into a folder and put the copies into the lists.

    Copies that are there and can be opened are kept, so that a run cut short goes on where it was.
    Videos that cannot be decoded are taken off the lists and returned as 'PATH: reason'.
    """
    targets, sources = {}, {}
    for path, _ in _all_rows(lists):
        name = Path(path).relative_to(source).with_suffix(".mp4")
        targets[path] = os.path.join(folder, name)
        if sources.setdefault(targets[path], path) != path:
            raise UserError(f"{path} and {sources[targets[path]]} would have one copy; rename one")
        if os.path.exists(targets[path]) and os.path.samefile(path, targets[path]):
            raise UserError(f"--reencode {folder} would overwrite {path}; choose another folder")

    def work(path: str) -> str:
        target = targets[path]
        if _opens(target):
            return ""
        os.makedirs(os.path.dirname(target), exist_ok=True)
        try:
            transcode(path, target, **options)
        except VideoError as error:
            return str(error)
        return ""

    failed = _in_parallel(work, targets, workers, "re-encoding")
    for split, rows in lists.rows.items():
        lists.rows[split] = [(targets[p], label) for p, label in rows if p not in failed]
    return sorted(failed.values())


def verify(lists: Lists, workers: int) -> list[str]:
    """Decode every listed video to its end; returns the broken ones as 'PATH: reason'."""
    paths = dict.fromkeys(path for path, _ in _all_rows(lists))
    return sorted(_in_parallel(find_damage, paths, workers, "verifying").values())


def _all_rows(lists: Lists) -> Iterable[tuple[str, int]]:
    return (row for rows in lists.rows.values() for row in rows)


def _opens(path: str) -> bool:
    try:
        with Video(path):
            return True
    except VideoError:
        return False


def _in_parallel(
    work: Callable[[str], str], paths: Iterable[str], workers: int, title: str
) -> dict[str, str]:
    """Call work(path) for every path behind a progress bar; return the answers that say something.

    Threads do: decoding and encoding release the interpreter.
    """
    answers = {}
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(work, path): path for path in paths}
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc=title):
                if future.result():
                    answers[futures[future]] = future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what is being written is finished or removed
            raise
    return answers


# --- command line -------------------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    """Build the flags: one command per kind of data set."""
    parser = argparse.ArgumentParser(
        prog="python -m util.prepare_kinetics",
        description="Write train.csv, val.csv, test.csv and classes.txt for a data set",
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("videos", help="folder of the videos")
    common.add_argument("out", help="folder to write the lists to")
    common.add_argument(
        "--reencode", default="", metavar="DIR", help="write cheaper copies here and list those"
    )
    common.add_argument(
        "--short_side", type=positive_int, default=256, help="of the copies, pixels (never larger)"
    )
    common.add_argument("--gop", type=positive_int, default=32, help="frames between key frames")
    common.add_argument("--crf", type=float, default=23, help="x264's quality, smaller is better")
    common.add_argument("--verify", action="store_true", help="decode all and list the broken")
    common.add_argument(
        "--workers", type=positive_int, default=available_cpus(), help="videos at a time"
    )
    commands = parser.add_subparsers(dest="kind", required=True)
    group = commands.add_parser("kinetics", parents=[common], help="official annotation csvs")
    group.add_argument("--annotations", nargs="+", required=True, metavar="CSV")
    group = commands.add_parser("folders", parents=[common], help="a folder per class")
    group.add_argument("--train_list", default="", help="UCF101's trainlist01.txt")
    group.add_argument("--test_list", default="", help="UCF101's testlist01.txt")
    group.add_argument("--hmdb_splits", default="", help="folder of CLASS_test_split1.txt files")
    group.add_argument("--hmdb_split", type=positive_int, default=1)
    group.add_argument("--val_share", type=float, default=0.2, help="where nothing tells the split")
    group = commands.add_parser("ssv2", parents=[common], help="Something-Something json files")
    group.add_argument("--labels", required=True, help="the json file of templates and numbers")
    group.add_argument("--annotations", nargs="+", required=True, metavar="JSON")
    return parser


def read_lists(args: argparse.Namespace) -> Lists:
    """Read what the flags name."""
    if args.kind == "folders":
        choices = args.train_list, args.test_list, args.hmdb_splits, args.hmdb_split
        return read_folders(args.videos, *choices, args.val_share)
    if args.kind == "kinetics":
        clips, classes = read_kinetics(args.annotations), []
    else:
        clips, classes = read_ssv2(args.labels, args.annotations)
    if not clips:
        raise UserError(f"no row of {', '.join(args.annotations)} has a label")
    return match(clips, find_videos(args.videos), classes)


def _refuse_line_breaks(lists: Lists) -> None:
    """Stop at names that a file with one name a line cannot hold."""
    for name in (*(path for path, _ in _all_rows(lists)), *lists.missing, *lists.classes):
        if re.search(r"[\r\n]", name):
            raise UserError(f"{name!r} holds a line break, which the lists cannot; rename it")


def main(args: argparse.Namespace) -> int:
    """Write the lists; returns 1 when --verify or --reencode met broken videos."""
    lists = read_lists(args)
    if not any(lists.rows.values()):
        first = f", such as {lists.missing[0]}" if lists.missing else ""
        raise UserError(f"none of the annotated videos{first} is below {args.videos}")
    _refuse_line_breaks(lists)
    broken = []
    if args.reencode:
        options = {"short_side": args.short_side, "gop": args.gop, "crf": args.crf}
        broken += reencode(lists, args.videos, args.reencode, args.workers, **options)
    write_lists(lists, args.out)
    if args.verify:
        broken += verify(lists, args.workers)
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in lists.rows.items() if rows)
    print(f"{args.out}: {counts}; {len(lists.classes)} classes; {len(lists.missing)} not found")
    if broken:
        print(f"{len(broken)} broken videos:", *broken, sep="\n  ")
    return 1 if broken else 0


if __name__ == "__main__":
    try:
        sys.exit(main(get_args_parser().parse_args()))
    except (UserError, OSError) as error:
        print(f"prepare_kinetics: error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "status", 1))
