"""Copies of the videos of a data set: re-encoded, packed into shards and verified, here or by jobs.

The unit of work is a fixed group of videos: with --pack, a shard. The plan, which says which videos
a unit has, follows from the data set and the flags alone, and so do the copies: any number of jobs
writes the same shards. A unit is done when its record, a json file, is there. Files get their names
when they are whole: after a kill the same command goes on, and two processes may make one unit.
"""

import contextlib
import json
import os
import shutil
import socket
import tempfile
import time
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from submitit.helpers import Checkpointable
from tqdm import tqdm

from util.errors import UserError
from util.file_io import print_any, write_atomically
from util.shards import write_shard
from util.slurm import find_live, submit_jobs
from util.video.decode import Video, VideoError
from util.video.source import file_of, find_member, member_path
from util.video.transcode import CHEAP, find_damage, transcode

GROUP = 256  # videos of a unit without --pack
OVERHEAD = 1536  # bytes per video in a shard, about: header, name and padding
SAMPLE, SAMPLE_FRAMES = 8, 100  # videos that are re-encoded for the estimate, frames of each


@dataclass
class Copies(Checkpointable):
    """The copies of some videos in a folder; a job that makes them, which Slurm may requeue.

    Paths of videos start from the folder `videos`.
    """

    videos: str
    folder: str
    state: str  # folder of the plan, the records and the logs of jobs
    shards: bool  # pack the copies
    recipe: dict[str, Any] | None  # arguments of transcode; None: pack the videos as they are
    verify: bool
    workers: int  # videos copied at a time
    units: dict[str, dict[str, int]]  # of every unit, paths and bytes of its videos

    def __call__(self) -> None:
        """Make all units, as a job."""
        for unit in self.units:
            self.make(unit)
            print_any(f"{unit} is done")

    def name(self, path: str) -> str:
        """Return the name of the copy of a video, in its shard or in the folder."""
        return path if self.recipe is None else str(Path(path).with_suffix(".mp4"))

    def read_record(self, unit: str) -> dict[str, Any] | None:
        """Return the record of a unit whose copies are made; None without it or its shard."""
        with contextlib.suppress(FileNotFoundError):
            record = load_json(f"{self.state}/{unit}.json")
            if not self.shards or os.path.getsize(f"{self.folder}/{unit}.tar") == record["bytes"]:
                return record
        return None

    def is_done(self, unit: str) -> bool:
        record = self.read_record(unit)
        return record is not None and ("damaged" in record or not self.verify)

    def make(self, unit: str, bar: tqdm | None = None) -> None:
        """Copy, pack and verify the videos of a unit, except for what was done before."""
        try:
            record = self.read_record(unit) or self._copy(unit, bar)
        except OSError:
            record = self.read_record(unit)
            if record is None:  # otherwise, another process was faster, and cleaned up
                raise
        if self.verify and "damaged" not in record:
            places = {x: os.path.join(self.folder, place) for x, place in record["copies"].items()}
            record["damaged"] = in_parallel(lambda x: find_damage(places[x]), places, self.workers)
            save_json(f"{self.state}/{unit}.json", record)

    def _copy(self, unit: str, bar: tqdm | None) -> dict[str, Any]:
        """Copy and pack the videos of a unit; write and return what is known of them then."""
        sizes = self.units[unit]
        sources = {path: os.path.join(self.videos, path) for path in sizes}
        # a folder of this process: nothing that another one does can spoil a shard
        with tempfile.TemporaryDirectory(prefix=f".{unit}.", dir=self.state) as own:
            files = {path: os.path.join(self.folder, self.name(path)) for path in sizes}
            if self.shards:
                files = {path: f"{own}/{i}.mp4" for i, path in enumerate(sizes)}

            def copy(path: str) -> str:
                if file_size(sources[path]) != sizes[path]:
                    name = f"{sources[path]} (on {socket.gethostname()})"
                    raise OSError(f"{name} is missing, or has changed since the plan was made")
                try:
                    if self.recipe is None:
                        Video(sources[path]).close()
                        return ""
                    with contextlib.suppress(VideoError), Video(files[path]):
                        return ""  # it was copied earlier
                    os.makedirs(os.path.dirname(files[path]), exist_ok=True)
                    transcode(sources[path], files[path], **self.recipe)
                except VideoError as error:
                    return str(error)
                return ""

            failed = in_parallel(copy, sizes, self.workers, bar)
            copies = {path: self.name(path) for path in sizes if path not in failed}
            record: dict[str, Any] = {"failed": failed, "copies": copies}
            if self.shards:
                files = files if self.recipe else sources
                members = write_shard(f"{own}/shard", [(copies[x], files[x]) for x in copies])
                places = [member_path(x._replace(shard=f"{unit}.tar")) for x in members]
                record["copies"] = dict(zip(copies, places, strict=True))
                record["bytes"] = os.path.getsize(f"{own}/shard")
                os.replace(f"{own}/shard", os.path.join(self.folder, f"{unit}.tar"))
        save_json(f"{self.state}/{unit}.json", record)
        return record


def file_size(path: str) -> int:
    """Return the bytes of a video, -1 if it does not exist (or is a link that leads nowhere)."""
    if member := find_member(path):
        return member.size
    with contextlib.suppress(FileNotFoundError):
        return os.path.getsize(path)
    return -1


def save_json(path: str, content: Any) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(content).encode()))


def load_json(path: str) -> Any:
    return json.loads(Path(path).read_bytes())


def in_parallel(
    work: Callable[[str], str], paths: Iterable[str], workers: int, bar: tqdm | None = None
) -> dict[str, str]:
    """Call work(path) for every path and advance the bar; return answers that are not empty."""
    paths, answers = list(dict.fromkeys(paths)), []
    # Threads are enough: decoding and encoding release the interpreter's lock. After an error or
    # Ctrl-C, map cancels what has not begun; copies under way are finished or removed.
    with ThreadPoolExecutor(workers) as pool:
        try:
            for answer in pool.map(work, paths):
                answers.append(answer)
                if bar is not None:
                    bar.update()
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
    return {path: answer for path, answer in zip(paths, answers, strict=True) if answer}


# --- plan -----------------------------------------------------------------------------------------


def find_plan(copies: Copies, split_of: dict[str, str], args: Namespace) -> dict[str, Any]:
    """Return the plan of an earlier call or else a new one; UserError if that one does not fit."""
    paths = [os.path.join(copies.videos, path) for path in split_of]
    with ThreadPoolExecutor(32) as pool:  # on file servers each answer takes milliseconds
        sizes = dict(zip(split_of, pool.map(file_size, paths), strict=True))
    made_for: dict[str, Any] = {f"--{name}": value for name, value in (copies.recipe or {}).items()}
    made_for |= {"x264's options": str(CHEAP)} if copies.recipe else {}
    made_for |= {"--shard_mb": args.shard_mb} if copies.shards else {}
    made_for |= {x: f"in {split}, {sizes[x]} bytes" for x, split in split_of.items()}
    if not copies.shards:  # copies of other calls are kept; their records may be of other units
        copies.state += f"/{zlib.crc32(repr(made_for).encode()):08x}"
    path = os.path.join(copies.state, "plan.json")
    if os.path.exists(path):
        plan = load_json(path)
        old = plan["made_for"]
        if wrong := [x for x in old | made_for if old.get(x) != made_for.get(x)]:
            was, now = (made.get(wrong[0], "absent") for made in (old, made_for))
            raise UserError(
                f"{path} is of a call with other flags or videos: {wrong[0]} was {was}, is {now}; "
                f"name another folder, or delete {copies.state}"
            )
        return plan
    weights, limit = dict.fromkeys(sizes, 1.0), float(GROUP)
    ratio, seconds = sample(copies, sizes) if copies.recipe else (1.0, 0.0)
    if copies.shards:
        weights = {x: max(size, 0) * ratio + OVERHEAD for x, size in sizes.items()}
        limit = args.shard_mb * 1e6
    units: dict[str, dict[str, int]] = {}
    for split, group in groupby(split_of, split_of.__getitem__):  # they are in this order
        number, room = -1, 0.0
        for x in group:
            if room < weights[x]:
                number, room = number + 1, limit
            room -= weights[x]
            units.setdefault(f"{split}-{number:06d}", {})[x] = sizes[x]
    return {"made_for": made_for, "ratio": ratio, "cpu_s_per_byte": seconds, "units": units}


def sample(copies: Copies, sizes: dict[str, int]) -> tuple[float, float]:
    """Re-encode the beginnings of a few videos; return bytes and CPU seconds per byte of source.

    The bytes are rounded: another version of the libraries may write slightly other copies.
    """
    before, after, seconds, there = 0, 0.0, 0.0, Path(copies.folder)
    new = [path for path in sizes if copies.shards or not (there / copies.name(path)).exists()]
    with tempfile.TemporaryDirectory() as folder:
        for path in new[:: -(-len(new) // SAMPLE) or 1]:  # spread evenly
            with contextlib.suppress(VideoError), Video(f"{copies.videos}/{path}") as video:
                begin, target = time.thread_time(), f"{folder}/copy.mp4"
                recipe = copies.recipe or {}
                count = transcode(video.path, target, max_frames=SAMPLE_FRAMES, **recipe)
                seconds += (time.thread_time() - begin) * video.num_frames / count
                after += os.path.getsize(target) * video.num_frames / count
                before += sizes[path]
    return (float(f"{after / before:.2g}"), seconds / before) if before else (1.0, 0.0)


def tell_costs(copies: Copies, plan: dict[str, Any], args: Namespace) -> None:
    """Print how much there is to do and what it takes; UserError if the disk has no room for it."""
    folder, todo = Path(copies.folder).absolute(), dict[str, int]()
    for unit, sizes in copies.units.items():
        if not copies.is_done(unit):
            new = [x for x in sizes if copies.shards or not (folder / copies.name(x)).exists()]
            todo |= {x: max(sizes[x], 0) for x in new}
    size = sum(todo.values())
    needed = size * plan["ratio"]
    if copies.shards:
        needed += OVERHEAD * len(todo)
        if copies.recipe:  # a unit's copies are there twice for a moment
            needed += min(needed, (args.jobs if args.cluster else 1) * args.shard_mb * 1e6)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    has, needs, left = (f"{tqdm.format_sizeof(x)}B" for x in (size, needed, free))
    hours = size * plan["cpu_s_per_byte"] / 3600
    work = f"about {hours:.3g} CPU-hours to re-encode them; " if hours else ""
    total = sum(map(len, copies.units.values()))
    text = f"{len(todo):,} of {total:,} videos to copy, {has}; {work}about {needs} needed"
    print_any(f"{copies.folder}: {text}, {left} free")
    if needed > free:
        raise UserError(f"{copies.folder} needs about {needs}, and its disk has {left} free", 1)


# --- running --------------------------------------------------------------------------------------


def make_copies(
    split_of: dict[str, str], args: Namespace, private: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Make the copies that --reencode and --pack ask for, here or by the jobs of --cluster.

    Args:
        split_of: the path of every video, below args.videos, and the split whose shards take it;
            the splits one after the other.
        private: an empty folder of this process.

    Returns:
        The paths of the copies (after --dry_run, of the videos); 'PATH: reason' of videos without a
        copy and of bad copies (--verify): both by path of the video.
    """
    recipe = None
    if args.reencode is not None:
        recipe = {name: getattr(args, name) for name in ("short_side", "gop", "crf")}
    shards, folder = bool(args.pack), str(args.pack or args.reencode)
    # loose copies that are there are looked at again, so that a single process needs no old records
    state = folder if shards else os.path.join(folder, ".jobs") if args.cluster else private
    copies = Copies(args.videos, folder, state, shards, recipe, args.verify, args.workers, {})
    _check_names(copies, split_of)
    plan = find_plan(copies, split_of if shards else dict.fromkeys(split_of, "copies"), args)
    copies.units = plan["units"]
    tell_costs(copies, plan, args)
    if args.dry_run:
        return {path: os.path.join(args.videos, path) for path in split_of}, {}
    os.makedirs(copies.state, exist_ok=True)
    save_json(os.path.join(copies.state, "plan.json"), plan)
    todo = [unit for unit in copies.units if not copies.is_done(unit)]
    with tqdm(desc="copying", total=len(split_of), unit=" videos") as bar:
        bar.update(len(split_of) - sum(len(copies.units[unit]) for unit in todo))
        if args.cluster:
            run_jobs(copies, todo, args, bar)
        else:
            for unit in todo:
                copies.make(unit, bar)
    places, broken = dict[str, str](), dict[str, str]()
    for unit in copies.units:
        record = load_json(f"{copies.state}/{unit}.json")
        places |= {x: os.path.join(folder, place) for x, place in record["copies"].items()}
        broken |= record["failed"] | record.get("damaged", {})
    # what killed processes have left, or everything: the next call looks at loose copies again
    for path in Path(state).glob(".*-??????.*") if shards else [state]:
        shutil.rmtree(path, ignore_errors=True)
    return places, broken


def _check_names(copies: Copies, paths: Iterable[str]) -> None:
    """Raise UserError if two videos would have the same copy, or a copy the place of a source."""
    folder, taken = copies.folder, dict[str, str]()
    if copies.shards and ".tar/" in os.path.abspath(folder) + "/":
        raise UserError(f"--pack {folder}: the name of a folder may not end with .tar")
    for path in paths:
        if copies.recipe is None and find_member(path):
            raise UserError(f"{path} is in a tar file already: --pack needs --reencode here")
        source = os.path.join(copies.videos, path)
        target = os.path.join(folder, copies.name(path))
        if (other := taken.setdefault(target, source)) != source:
            raise UserError(f"{source} and {other} would have the same copy: rename one")
        loose = not copies.shards and os.path.exists(target)
        if loose and os.path.samefile(file_of(source), target):
            raise UserError(f"--reencode {folder} would overwrite {source}: choose another")


def run_jobs(copies: Copies, todo: list[str], args: Namespace, bar: tqdm) -> None:
    """Have jobs make units, except for those that Slurm's jobs of an earlier call make, and wait.

    Raises:
        UserError: the jobs ended before all units were done.
    """
    logs, local = os.path.abspath(os.path.join(copies.state, "jobs")), args.cluster == "local"
    path, started, units_of = os.path.join(logs, "jobs.json"), [], dict[str, list[str]]()
    if not local and os.path.exists(path):
        units_of = load_json(path)  # by the id of the job
        units_of = {job: units_of[job] for job in find_live(units_of)}
    taken = {unit for units in units_of.values() for unit in units}
    if free := [unit for unit in todo if unit not in taken]:
        num = min(args.jobs, len(free))
        if local:  # on Slurm, the flag says how many cores a job has
            args.cpus_per_task = max(1, args.workers // num)
        common = {x: os.path.abspath(getattr(copies, x)) for x in ("videos", "folder", "state")}
        common["workers"] = args.cpus_per_task
        parts = [{unit: copies.units[unit] for unit in free[k::num]} for k in range(num)]
        started = submit_jobs([replace(copies, units=x, **common) for x in parts], logs, args)
        units_of |= {job.job_id: list(part) for job, part in zip(started, parts, strict=True)}
        save_json(path, units_of)
        after = "" if local else "; the jobs go on if this command ends"
        ids = f"{started[0].job_id} to {started[-1].job_id}"
        print_any(f"submitted {num} jobs, {ids}; logs: {logs}{after}")
    silent = 0
    while todo and silent < 2:  # once more after the end: a file server may show records late
        time.sleep(1 if local else 10)
        live = any(not job.done() for job in started) if local else find_live(units_of)
        silent = 0 if live else silent + 1
        done = [unit for unit in todo if copies.is_done(unit)]
        todo = [unit for unit in todo if unit not in done]
        bar.update(sum(len(copies.units[unit]) for unit in done))
    if todo:
        job = next(job for job, units in units_of.items() if todo[0] in units)
        log = f"{os.path.join(logs, job)}_0_log.err says why; the same command goes on"
        what = f"{len(todo)} of {len(copies.units)} units are not done, {todo[0]} for example"
        raise UserError(f"{what}; {log}", 1)
