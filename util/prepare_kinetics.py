"""Write the csv lists of a data set from its annotations or folders, and of copies of its videos.

    python -m util.prepare_kinetics kinetics VIDEOS OUT --annotations train.csv val.csv test.csv
    python -m util.prepare_kinetics folders VIDEOS OUT
    python -m util.prepare_kinetics ssv2 VIDEOS OUT --labels labels.json --annotations train.json
    python -m util.prepare_kinetics webdataset TARS OUT

This writes train.csv, val.csv, test.csv (those that the data set has), classes.txt (one class per
line, in the order of the labels) and missing.txt (annotated videos that were not found) to OUT.
--reencode DIR also writes copies of short side 256 that are cheap to decode, and lists those.
--pack DIR packs the videos into tar files (shards); with --reencode, it packs copies. --cluster
does this in jobs. --verify decodes every listed video. See DATASET.md.
"""

import argparse
import csv
import io
import json
import os
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from util.args import adder, between, positive_float, positive_int, share
from util.classes import check_names
from util.copies import in_parallel, make_copies
from util.errors import UserError
from util.file_io import path_to_text, print_any, read_text, text_to_path, write_atomically
from util.loader import available_cpus
from util.shards import index_tars
from util.slurm import add_queue_args
from util.video.transcode import find_damage

# without those that are mostly sound (.ogg) or still pictures (.webp)
SUFFIXES = frozenset(f".{suffix}" for suffix in """
    mp4 m4v mp4v mpg4 mov qt hdmov mj2 ismv f4v flv insv 3gp 3gp2 3gpp 3gpp2 3g2 mkv mk3d webm
    avi divx xvid amv wmv wm asf dvr-ms wtv nut nsv nuv ogv ogm ogx rm rmvb rv ivr viv
    mpg mpeg mpe mp2v mpv mpv2 m1v m2v m2p vob vro evo dvd mod tod ts mts m2t m2ts tp trp mpegts
    dv dif mxf gxf lxf cine gif fli flc dav y4m ivf obu h261 h263 264 h264 h26l avc 265 h265 hevc
    266 h266 vvc vc1 rcv cavs drc dnxhd dnxhr mjpg mjpeg
""".split())  # fmt: skip
# What systems leave beside videos; HMDB51 has videos whose names begin with #, Kinetics with - or _
LEFTOVERS = re.compile(
    r"\..*|__macosx|network trash folder|temporary items|thevolumesettingsfolder"  # macOS, Unix
    r"|\$recycle\.bin|recycler|system volume information|found\.\d{3}|lost\.dir"  # Windows, Android
    r"|@eadir|@tmp|@recycle|@recently-snapshot|#recycle|#snapshot|~snapshot|lost\+found"  # servers
    r"|__pycache__|.*\.(part|partial|download|crdownload)|.*\.\d+\.tmp\.mp4",  # unfinished files
    re.IGNORECASE | re.DOTALL,
)
LISTS = ("train", "val", "test")
# what annotations and folders call a split -> its list
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("val", "validate", "validation"), "val")


class Clip(NamedTuple):
    """A labelled video."""

    path: str  # or, until it is found, the file's name without suffix
    label: str
    split: str  # of LISTS


class DataSet(NamedTuple):
    """Everything that the lists are written from; names as os.listdir gives them in any locale."""

    clips: list[Clip]
    classes: list[str]  # in the order of the labels
    missing: list[str]  # "SPLIT NAME" of annotated videos that were not found
    wanted: set[str]  # splits that were asked for, and must have videos
    broken: Mapping[str, str] = {}  # 'PATH: reason' of videos and tar files, by path


def read_kinetics(args: argparse.Namespace) -> DataSet:
    """Read the official csvs of Kinetics: label, youtube_id, time_start, time_end, split.

    Rows without a label (in some test sets) are skipped. Without a column `split`, the name of the
    file gives the split.
    """
    clips = []
    for path in args.annotations:
        # without skipinitialspace, a quote after ", " would not count as one
        reader = csv.reader(io.StringIO(read_text(path), newline=""), skipinitialspace=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            if missing := {"youtube_id", "time_start", "time_end"} - set(header):
                raise UserError(f"{path} has no column {', '.join(sorted(missing))}")
            for cells in reader:
                row = dict(zip_longest(header, map(str.strip, cells), fillvalue=""))
                if row.get("label"):
                    start, end = (int(float(row[x])) for x in ("time_start", "time_end"))
                    name = f"{row['youtube_id']}_{start:06d}_{end:06d}"
                    clips.append(Clip(name, row["label"], _split(row.get("split", ""), path)))
        except (csv.Error, ValueError, OverflowError) as error:
            reason = error if isinstance(error, csv.Error) else "its times are not numbers"
            raise UserError(f"{path}, line {reader.line_num}: {reason}") from error
    return _find(clips, sorted({clip.label for clip in clips}), args)


def read_ssv2(args: argparse.Namespace) -> DataSet:
    """Read the official json files of Something-Something.

    The labels map a template ("Holding something next to something") to a number. The template of a
    video has its objects in brackets; videos without one (the test set) are skipped.
    """
    numbers = _read_json(args.labels, dict)
    names = {str(number): name for name, number in numbers.items()}
    if names.keys() != {str(label) for label in range(len(numbers))}:
        raise UserError(f"{args.labels}: its {len(numbers)} numbers do not count from 0")
    clips = []
    for path in args.annotations:
        for entry in _read_json(path, list):
            if not isinstance(entry, dict) or "id" not in entry:
                raise UserError(f"{path}: {str(entry)[:120]} is not a video with an id")
            template = re.sub(r"[\[\]]", "", str(entry.get("template") or ""))
            if template and template not in numbers:
                raise UserError(f"{path}: template {template!r} is not in {args.labels}")
            if template:
                clips.append(Clip(str(entry["id"]), template, _split("", path)))
    return _find(clips, [names[str(label)] for label in range(len(numbers))], args)


def _read_json(path: str, kind: type) -> Any:
    try:
        content = json.loads(read_text(path))
        json.dumps(content, ensure_ascii=False).encode()  # escapes may name what is no character
    except ValueError as error:
        raise UserError(f"{path} is not a json file: {error}") from error
    if not isinstance(content, kind):
        raise UserError(f"{path} does not hold a {kind.__name__}, as the official file does")
    return content


def _split(name: str, path: str) -> str:
    """Return the split that an annotation names, or else the one that the file's name holds."""
    for word in [name.lower()] if name else re.split(r"[^a-z]+", Path(path).stem.lower()):
        if word in SPLITS:
            return SPLITS[word]
    raise UserError(f"{path}: is this train, val or test? Neither a column nor its name says so")


def _find(clips: list[Clip], classes: list[str], args: argparse.Namespace) -> DataSet:
    """Find the videos of annotated clips at any depth, by their names without suffix."""
    if not clips:
        raise UserError(f"no row of {', '.join(args.annotations)} has a label")
    clips = [Clip(*map(text_to_path, clip)) for clip in clips]
    classes = list(map(text_to_path, classes))
    # of equal names, the first
    by_name = {Path(path).stem: path for path in reversed(find_videos(args.videos))}
    found = [clip._replace(path=by_name[clip.path]) for clip in clips if clip.path in by_name]
    missing = [f"{clip.split} {clip.path}" for clip in clips if clip.path not in by_name]
    return DataSet(found, classes, missing, {clip.split for clip in clips})


def find_videos(folder: str, suffixes: Collection[str] = SUFFIXES) -> list[str]:
    """Return the sorted paths of all videos below a folder; links to folders are followed once.

    Print what is passed over, and which folders beside those of videos hold none.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is no folder")
    found, visited, passed, errors = [], {}, Counter(), []
    for parent, folders, files in os.walk(folder, onerror=errors.append, followlinks=True):
        place = os.path.realpath(parent)
        if place in visited:  # a link may lead to a folder above it
            folders.clear()
            continue
        visited[place] = Path(parent)
        leftovers = set(filter(LEFTOVERS.fullmatch, folders + files))
        passed["hidden, system or unfinished"] += len(leftovers)
        folders[:] = sorted(set(folders) - leftovers)
        for name in sorted(set(files) - leftovers):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in suffixes:
                found.append(os.path.join(parent, name))
            else:
                passed[suffix or "without a suffix"] += 1
    passed.update(f"unreadable folder {error.filename} ({error.strerror})" for error in errors)
    if counts := [f"{count} {kind}" for kind, count in passed.most_common() if count]:
        print_any(f"{folder}: files and folders passed over: {', '.join(counts)}")
    if not found:
        tars = "tar files (named .tar, which are not compressed)"
        videos = "videos (files named .mp4, .avi, .mkv and so on)"
        raise UserError(f"{folder} holds no {videos if suffixes is SUFFIXES else tars}")
    filled = {Path(path).parent for path in found}
    depths = {len(path.parts) for path in filled}
    filled = filled.union(*(path.parents for path in filled))
    empty = [x for x in visited.values() if len(x.parts) in depths and x not in filled]
    if empty:
        print_any(f"WARNING: no videos in {', '.join(sorted(map(str, empty)))}")
    return sorted(found, key=os.fsencode)


# --- a folder per class: UCF101, HMDB51, others -------------------------------------------------


def read_folders(args: argparse.Namespace) -> DataSet:
    """Read a folder of class folders (UCF101, HMDB51), perhaps below folders train, val, test.

    The splits come from lists of `class/name.avi` (UCF101), from `CLASS_test_split1.txt` files
    (HMDB51), or from folders train, val and test. --val_share moves a fixed random share of the
    training videos of each class to the validation set, 0.2 if nothing gives the splits.
    """
    parts = {x: Path(x).relative_to(args.videos).parts for x in find_videos(args.videos)}
    if lost := [path for path, p in parts.items() if len(p) < 2]:
        raise UserError(f"{lost[0]} is not in a class folder (links to the videos will do)")
    missing = []
    if args.train_list or args.test_list or args.hmdb_splits:
        listed = _read_listed(args)
        names = {path: "/".join(p[-2:]) for path, p in parts.items()}
        split_of = {path: listed[name] for path, name in names.items() if name in listed}
        absent = listed.keys() - names.values()
        missing = [f"{split} {name}" for name, split in listed.items() if name in absent]
        lists = {"train": args.train_list, "val": args.test_list}
        wanted = {split for split, path in lists.items() if path or args.hmdb_splits}
    else:
        top = {path: p[0].lower() if len(p) > 2 else "" for path, p in parts.items()}
        split_of = {path: SPLITS.get(name, "") for path, name in top.items()}
        folders = [path.name.lower() for path in Path(args.videos).iterdir() if path.is_dir()]
        wanted = {SPLITS[name] for name in folders if name in SPLITS}
    clips = [Clip(path, parts[path][-2], split) for path, split in split_of.items()]
    classes = sorted({p[-2] for p in parts.values()}, key=os.fsencode)
    return _share_out(DataSet(clips, classes, missing, wanted), args.val_share)


def _read_listed(args: argparse.Namespace) -> dict[str, str]:
    """Return the splits of the videos `class/name.avi` in the lists of UCF101 or HMDB51."""
    if args.train_list or args.test_list:
        train = dict.fromkeys((name for name, _ in _read_lines(args.train_list)), "train")
        return train | dict.fromkeys((name for name, _ in _read_lines(args.test_list)), "val")
    # HMDB51 has a list for every class; the number 0 means unused
    splits, listed = {"1": "train", "2": "val"}, {}
    ending = f"_test_split{args.hmdb_split}.txt"
    for path in sorted(Path(args.hmdb_splits).glob(f"*{ending}")):
        for name, use in _read_lines(str(path)):
            if use in splits:
                listed[f"{path.name.removesuffix(ending)}/{name}"] = splits[use]
    if not listed:
        raise UserError(f"{args.hmdb_splits} holds no *{ending} with videos")
    return listed


def _read_lines(path: str) -> list[tuple[str, str]]:
    """Read (name, last word) from lines `name N` or `name`; names may hold spaces."""
    text = read_text(path) if path else ""
    lines = [line.strip(" \t") for line in re.split(r"[\r\n]", text)]
    found = [(re.sub(r"[ \t]+[0-9]+$", "", x), re.split(r"[ \t]", x)[-1]) for x in lines if x]
    return [(text_to_path(name), word) for name, word in found]


def _share_out(data: DataSet, val_share: float | None) -> DataSet:
    """Move a share of the training videos of each class to the validation set.

    If no video has a split, all are training videos, and the share is 0.2 if they have labels.
    """
    clips, wanted = data.clips, data.wanted
    if clips and not any(clip.split for clip in clips):
        clips, wanted = [clip._replace(split="train") for clip in clips], {"train"}
        if val_share is None and any(clip.label for clip in clips):
            val_share = 0.2
    if stray := [clip.path for clip in clips if not clip.split]:
        raise UserError(f"{stray[0]}: neither train, val nor test is in its path, as in others")
    if val_share is not None:
        if any(clip.split == "val" for clip in clips):
            raise UserError("--val_share has no effect: there are validation videos; leave it out")
        drawn = _draw([clip for clip in clips if clip.split == "train"], val_share)
        clips = [clip._replace(split="val") if clip.path in drawn else clip for clip in clips]
        wanted = wanted - {"train"} | {0.0: {"train"}, 1.0: {"val"}}.get(
            val_share, {"train", "val"}
        )
    elif "train" in wanted and "val" not in wanted:
        print_any(
            "WARNING: no validation videos, so no val.csv, which main_finetune.py needs; "
            "--val_share 0.2 takes a fifth of the training videos of each class"
        )
    return data._replace(clips=clips, wanted=wanted)


def _draw(clips: list[Clip], val_share: float) -> set[str]:
    """Draw a share of the videos of each class; the draw depends only on how many there are."""
    groups = defaultdict[str, list[str]](list)
    for clip in clips:
        groups[clip.label].append(clip.path)
    count_of = {label: round(val_share * len(group)) for label, group in groups.items()}
    if 0 < val_share < 1 and sum(count_of.values()) in (0, len(clips)):  # a list would be empty
        count_of = {x: min(max(count, 1), len(groups[x]) - 1) for x, count in count_of.items()}
    shuffled = {x: random.Random(0).sample(group, len(group)) for x, group in groups.items()}
    return {path for x, group in shuffled.items() for path in group[: count_of[x]]}


# --- WebDataset ---------------------------------------------------------------------------------


def read_webdataset(args: argparse.Namespace) -> DataSet:
    """Index the videos in WebDataset tars, which stay where they are.

    The words train, val and test in the names of tars and of folders below args.videos give the
    splits; if there are none, --val_share does.
    """
    split_of = {}
    for tar in find_videos(args.videos, {".tar"}):
        words = set(re.split(r"[^a-z]+", os.path.relpath(tar, args.videos).lower()))
        found = {SPLITS[word] for word in words & SPLITS.keys()}
        if len(found) > 1:
            raise UserError(f"{tar}: is this {' or '.join(sorted(found))}? Its path says both")
        split_of[tar] = found.pop() if found else ""
    rows, classes, damaged = index_tars(split_of, SUFFIXES, args.label_key)
    wanted = set(split_of.values()) - {""} or {"train"}
    clips = [Clip(*row) for row in rows]
    return _share_out(DataSet(clips, classes, [], wanted, damaged), args.val_share)


# --- copies -------------------------------------------------------------------------------------


def use_copies(data: DataSet, args: argparse.Namespace) -> DataSet:
    """Make copies of all videos; return their data set.

    Broken videos leave the data set, except those of the test: it keeps the original files, so that
    results have the same denominator.
    """
    split_of: dict[str, str] = {}  # a video in several lists is copied once
    for clip in sorted(data.clips, key=lambda clip: LISTS.index(clip.split)):
        split_of.setdefault(clip.path, clip.split)
    copy_of, broken = make_copies(split_of, args)
    kept = [clip for clip in data.clips if clip.path in copy_of or clip.split == "test"]
    if tested := sum(clip.path not in copy_of for clip in kept):
        print_any(f"broken videos that stay in test.csv, as the original files: {tested}")
    clips = [clip._replace(path=copy_of.get(clip.path, clip.path)) for clip in kept]
    reasons = {copy_of.get(path, path): reason for path, reason in broken.items()}
    return data._replace(clips=clips, broken={**data.broken, **reasons})


# --- lists and command line ---------------------------------------------------------------------


def write_lists(data: DataSet, out: str) -> list[str]:
    """Write classes.txt, missing.txt and the csvs that have videos; return the csvs' names.

    A csv of an earlier call that gets no videos now is removed. Paths below `out` are relative to
    it, so that the folder can be moved as a whole.
    """
    os.makedirs(out, exist_ok=True)
    root = os.path.abspath(out)
    label_of = {name: str(i) for i, name in enumerate(data.classes)}
    texts: dict[str, list[str]] = {f"{split}.csv": [] for split in LISTS}
    for path, label, split in data.clips:
        path = os.path.abspath(path)
        if os.path.commonpath([path, root]) == root:
            path = os.path.relpath(path, root)
        texts[f"{split}.csv"].append(f"{_quoted(path)} {label_of.get(label, label)}".rstrip(" "))
    for name in [name for name, lines in texts.items() if not lines]:
        _remove_list(os.path.join(out, name))
        del texts[name]
    texts["missing.txt"] = data.missing
    if data.classes:  # else the labels are numbers whose names are not known
        texts["classes.txt"] = data.classes
    elif os.path.exists(path := os.path.join(out, "classes.txt")):
        print_any(f"WARNING: {path} is not of this call, which has no names of classes")
    for name, lines in texts.items():
        content = os.fsencode("".join(f"{line}\n" for line in lines))
        write_atomically(os.path.join(out, name), lambda file, content=content: file.write(content))
    return [name for name in texts if name.endswith(".csv")]


def _quoted(path: str) -> str:
    """Put a path in quotes if VideoIndex would read another one without them."""
    text = path_to_text(path)
    # A line may not start with a quote, a comment, or what a text in UTF-8 or UTF-16 starts with.
    if re.match('["#\ufeff\udc80-\udcff]', text) or text != text.strip().strip(" ,\t"):
        return '"' + path.replace('"', '""') + '"'
    return path


def _remove_list(path: str) -> None:
    """Remove a list of an earlier call, but no other file: official csvs have the same names."""
    rows = Path(path).read_bytes().splitlines() if os.path.isfile(path) else [b"no list"]
    if all(re.search(rb'[ ,\t+]\d+"?\s*$', row) for row in rows):
        os.remove(path)
        print_any(f"removed {path} of an earlier call; this one has no videos for it")


def _check_lists(data: DataSet, videos: str) -> None:
    """Raise UserError if a split that was asked for has no videos."""
    for split in sorted(data.wanted - {clip.split for clip in data.clips}):
        reason = f"no video below {videos} is for it; add some, or leave out its folder or list, "
        reason += "or set --val_share to 0 or 1"
        if lost := [name for name in data.missing if name.startswith(f"{split} ")]:
            reason = f"none of its {len(lost)} videos, such as {lost[0]}, is below {videos}; "
            reason += "add them, or leave out its annotations or list to go without"
        if data.broken:
            reason = f"files are broken: {min(data.broken.values())}"
        raise UserError(f"{split}.csv would be empty: {reason}", 1 if data.broken else 2)


def get_args_parser() -> argparse.ArgumentParser:
    """Build the flags: one command per kind of data set."""
    parser = argparse.ArgumentParser(
        "python -m util.prepare_kinetics",
        description="Write train.csv, val.csv, test.csv and classes.txt for a data set",
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("videos", help="folder of the videos, or of tars")
    common.add_argument("out", help="folder to write the lists to")
    add = adder(common)
    text = "write copies that decode faster here, and list these; without DIR: only for --pack"
    add("--reencode", None, text, nargs="?", const="", metavar="DIR")
    add("--pack", "", "pack the copies, or else the videos, into tar files here", metavar="DIR")
    add("--shard_mb", None, "size of these files, MB; not given: 1024", positive_float)
    count = between(int, 1, 65535)
    add("--short_side", 256, "short side of the copies, pixels, at most", count)
    add("--gop", 32, "frames between key frames", count)
    add("--crf", 23, "x264's quality from 0 to 51, smaller is better", between(float, 0, 51))
    add("--verify", False, "decode all videos and name the broken ones")
    text = "videos processed at a time on this machine; Slurm's jobs have --cpus_per_task"
    add("--workers", available_cpus(), text, count)
    add("--dry_run", False, "print how much there is to do, and write nothing")
    text = "copy, pack and verify in jobs, and wait for them; local: processes on this machine"
    add("--cluster", None, text, choices=("slurm", "local"))
    add("--jobs", None, "number of these jobs; not given: 8", between(int, 1, 1000))
    add_queue_args(common, "prepare")
    commands = parser.add_subparsers(dest="kind", required=True)
    text = "official files; a column or their names say which is train, val and test"
    annotations: dict[str, Any] = {"text": text, "nargs": "+", "required": True}
    add = adder(commands.add_parser("kinetics", parents=[common], help="official csv files"))
    add("--annotations", None, metavar="CSV", **annotations)
    add = adder(commands.add_parser("folders", parents=[common], help="a folder per class"))
    add("--train_list", "", "UCF101's trainlist01.txt")
    add("--test_list", "", "UCF101's testlist01.txt")
    add("--hmdb_splits", "", "folder of CLASS_test_split1.txt files")
    add("--hmdb_split", 1, "HMDB51's split number", positive_int)
    text = "share of the training videos of each class that become validation videos; not given: "
    text += "0.2 if there are no folders train, val, test or lists"
    add("--val_share", None, text, share)
    add = adder(commands.add_parser("ssv2", parents=[common], help="Something-Something json"))
    add("--labels", None, "json file of templates and their numbers", required=True)
    add("--annotations", None, metavar="JSON", **annotations)
    add = adder(commands.add_parser("webdataset", parents=[common], help="tars of videos"))
    add("--label_key", "", "key of the label in .json files; empty: .cls files, or the usual keys")
    add("--val_share", None, text, share)
    return parser


def main(args: argparse.Namespace) -> int:
    """Write the lists; return 1 if --reencode or --verify found broken videos."""
    copying = bool(args.pack or args.reencode)
    if bool(args.pack) == bool(args.reencode) and args.reencode is not None:
        raise UserError("--reencode needs a folder, or --pack; with --pack it takes no folder")
    for flag, needed in (("cluster", "pack"), ("jobs", "cluster"), ("shard_mb", "pack")):
        if getattr(args, flag) and not getattr(args, needed):
            raise UserError(f"--{flag} has no effect without --{needed}")
    args.jobs, args.shard_mb = args.jobs or 8, args.shard_mb or 1024.0
    readers = {"kinetics": read_kinetics, "folders": read_folders, "ssv2": read_ssv2}
    data = (readers | {"webdataset": read_webdataset})[args.kind](args)
    for name in (*(clip.path for clip in data.clips), *data.missing, *data.classes):
        if re.search(r"[\r\n]", name):
            raise UserError(f"{name!r} holds a line break, which the lists cannot; rename it")
    check_names(list(map(path_to_text, data.classes)), os.path.join(args.out, "classes.txt"))
    _check_lists(data, args.videos)
    if not any(clip.split == "test" for clip in data.clips):  # test.csv repeats val.csv
        repeated = [clip._replace(split="test") for clip in data.clips if clip.split == "val"]
        data = data._replace(clips=data.clips + repeated)
    if copying:
        data = use_copies(data, args)
        _check_lists(data, args.videos)
    broken = dict(data.broken)
    written = [] if args.dry_run else write_lists(data, args.out)
    if args.verify and not args.dry_run:
        paths = dict.fromkeys(clip.path for clip in data.clips)
        if not copying:
            broken |= in_parallel(find_damage, paths, args.workers, "verifying")
        intact = len(paths.keys() - broken.keys())
        still = "; the lists have the others, too" * (intact < len(paths))
        print_any(f"{intact} of {len(paths)} videos can be decoded{still}")
    videos = Counter(clip.split for clip in data.clips)
    counts = ", ".join(f"{videos[split]} {split}" for split in LISTS if videos[split])
    kinds = "no labels (--label_key KEY takes those of .json files)"
    if any(clip.label for clip in data.clips):
        kinds = f"{len(data.classes) or 'unnamed'} classes"
    wrote = f"wrote {', '.join(written) or 'nothing'}"
    print_any(f"{args.out}: {counts}; {kinds}; {len(data.missing)} not found; {wrote}")
    if broken:
        print_any("\n  ".join([f"{len(broken)} broken files:", *sorted(broken.values())]))
    return 1 if broken else 0


if __name__ == "__main__":
    try:
        sys.exit(main(get_args_parser().parse_args()))
    except (UserError, OSError) as error:
        print(f"prepare_kinetics: error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "status", 1))
    except KeyboardInterrupt:
        print("prepare_kinetics: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
