"""Copies of the videos of a data set: re-encoded, packed into shards and verified, here or by jobs.

The plan, which says which videos a shard has, follows from the data set and the flags alone, and so
do the shards. A shard is done when its record, a json file, is there. Any process can make any
shard, and locks it meanwhile. Files get their names when they are whole, so that the same command
goes on after a kill. Without --pack, copies have no plan and no records: those that are there stay.
"""

import contextlib
import fcntl
import json
import math
import os
import random
import shutil
import socket
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

OVERHEAD = 1536  # bytes per video in a shard, about: header, name and padding
SAMPLE, SAMPLE_FRAMES = 8, 100  # videos that are re-encoded for the estimate, frames of each


@dataclass
class Copies(Checkpointable):
    """The copies that the flags ask for. Paths of videos start from args.videos.

    As a job, which Slurm may requeue, it makes the shards that no other process makes.
    """

    args: Namespace
    folder: str  # of the copies, or of shards, their plan, their records and the logs of jobs
    recipe: dict[str, Any]  # arguments of transcode; empty: pack the videos as they are

    def __call__(self) -> None:
        plan = json.loads(Path(f"{self.folder}/plan.json").read_bytes())
        failed, units = None, list(plan["units"].items())
        for unit, sizes in random.sample(units, len(units)):  # rarely where another job is
            try:
                self.make(unit, sizes, wait=False)
            except OSError as error:
                failed = error
        if failed:
            raise failed

    def name(self, path: str) -> str:
        """Return the name of the copy of a video, in its shard or in the folder."""
        return str(Path(path).with_suffix(".mp4")) if self.recipe else path

    def lacks(self, path: str) -> bool:
        """Return whether a video of a unit that is not done has to be copied."""
        return self.args.pack or not os.path.exists(f"{self.folder}/{self.name(path)}")

    def read_record(self, unit: str, verified: bool) -> dict[str, Any]:
        """Return the record of a unit; an empty one unless its shard is there, and verified."""
        with contextlib.suppress(FileNotFoundError):
            record = json.loads(Path(f"{self.folder}/{unit}.json").read_bytes())
            whole = record["bytes"] == os.path.getsize(f"{self.folder}/{unit}.tar")
            return record if whole and record["verified"] >= verified else {}
        return {}

    @contextlib.contextmanager
    def lock(self, unit: str, wait: bool = True) -> Iterator[bool]:
        """Lock a unit, or give False if another process has it; the lock ends with its process."""
        work, file = f"{self.folder}/.work", None
        while file is None:
            with contextlib.suppress(FileExistsError):
                os.mkdir(work)
            with contextlib.suppress(FileNotFoundError):  # a command that ends has removed it
                file = open(f"{work}/{unit}", "a")  # noqa: SIM115
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = True
            except OSError as error:  # file systems without locks raise others
                free = not isinstance(error, BlockingIOError)
            yield free

    def make(self, unit: str, sizes: dict[str, int], wait: bool = True) -> dict[str, Any]:
        """Copy, pack and verify the videos of a unit, unless this was done; return its record.

        Without `wait`, return an empty one if another process makes the unit. `sizes` are bytes.
        """
        with self.lock(unit, wait) as free:
            record = self.read_record(unit, self.args.verify)
            if record or not free:
                return record
            try:
                record = self.read_record(unit, False) or self._copy(unit, sizes)
            except OSError:  # without locks, a command that ends removes the work of others
                if not (record := self.read_record(unit, False)):
                    raise
            if self.args.verify:
                paths = {f"{self.folder}/{place}": x for x, place in record["copies"].items()}
                damaged = in_parallel(find_damage, paths, self.args.workers, f"verifying {unit}")
                record["broken"] |= {paths[place]: reason for place, reason in damaged.items()}
                record["verified"] = True
            if self.args.pack:
                save_json(f"{self.folder}/{unit}.json", record)
            return record

    def _copy(self, unit: str, sizes: dict[str, int]) -> dict[str, Any]:
        """Copy and pack the videos of a unit; return its record."""
        # a folder of this process: where a file system has no locks, two may make one unit
        work = f"{self.folder}/.work" if self.args.pack else None
        with tempfile.TemporaryDirectory(dir=work) as own:
            place = {path: f"{self.folder}/{self.name(path)}" for path in sizes}
            if self.args.pack:
                place = {path: f"{own}/{i}.mp4" for i, path in enumerate(sizes)}

            def copy(path: str) -> str:
                source = os.path.join(self.args.videos, path)
                if file_size(source) != sizes[path]:
                    name = f"{source} (on {socket.gethostname()})"
                    raise OSError(f"{name} is missing, or has changed since the plan was made")
                try:
                    if not self.recipe:
                        Video(source).close()
                        place[path] = source
                        return ""
                    with contextlib.suppress(VideoError), Video(place[path]):
                        return ""  # it was copied earlier
                    if not self.args.pack:  # `own` must stay lost where it is lost
                        os.makedirs(os.path.dirname(place[path]), exist_ok=True)
                    transcode(source, place[path], **self.recipe)
                except VideoError as error:
                    return str(error)
                return ""

            broken = in_parallel(copy, sizes, self.args.workers, f"copying {unit}")
            copies, size = {path: self.name(path) for path in sizes if path not in broken}, 0
            if self.args.pack:
                shard = f"{own}/{unit}.tar"
                members = write_shard(shard, [(copies[x], place[x]) for x in copies])
                names = [member_path(x).removeprefix(f"{own}/") for x in members]
                copies, size = dict(zip(copies, names, strict=True)), os.path.getsize(shard)
                os.replace(shard, f"{self.folder}/{unit}.tar")
        return {"copies": copies, "broken": broken, "bytes": size, "verified": False}


def file_size(path: str) -> int:
    """Return the bytes of a video, -1 if it does not exist (or is a link that leads nowhere)."""
    if member := find_member(path):
        return member.size
    with contextlib.suppress(FileNotFoundError):
        return os.path.getsize(path)
    return -1


def save_json(path: str, content: Any) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(content).encode()))


def in_parallel(
    work: Callable[[str], str], paths: Collection[str], workers: int, title: str
) -> dict[str, str]:
    """Call work(path) for every path, with a progress bar; return answers that are not empty."""
    # Threads are enough: decoding and encoding release the interpreter's lock. After an error or
    # Ctrl-C, map cancels what has not begun; copies under way are finished or removed.
    with ThreadPoolExecutor(workers) as pool:
        answers = tqdm(pool.map(work, paths), title, len(paths), unit=" videos")
        return {path: answer for path, answer in zip(paths, answers, strict=True) if answer}


# --- plan -----------------------------------------------------------------------------------------


def find_plan(copies: Copies, paths: dict[str, str], split_of: dict[str, str]) -> dict[str, Any]:
    """Return the plan of an earlier call or else a new one; UserError if that one does not fit."""
    args = copies.args
    with ThreadPoolExecutor(32) as pool:  # on file servers each answer takes milliseconds
        sizes = dict(zip(paths, pool.map(file_size, paths.values()), strict=True))
    made_for: dict[str, Any] = {f"--{name}": value for name, value in copies.recipe.items()}
    made_for |= {"x264's options": str(CHEAP)} if copies.recipe else {}
    made_for["--shard_mb"] = args.shard_mb
    made_for |= {x: f"in {split_of[path]}, {sizes[x]} bytes" for x, path in paths.items()}
    path = f"{copies.folder}/plan.json"
    if args.pack and os.path.exists(path):
        plan = json.loads(Path(path).read_bytes())
        old = plan["made_for"]
        for x in old | made_for:
            if (was := old.get(x, "absent")) != (now := made_for.get(x, "absent")):
                what = f"{path} is of a call with other flags or videos: {x} was {was}, is {now}"
                raise UserError(f"{what}; name another folder, or delete {copies.folder}")
        return plan
    ratio, seconds = sample(copies, sizes) if copies.recipe else (1.0, 0.0)
    units: dict[str, dict[str, int]] = {}
    for split, group in groupby(paths, lambda x: split_of[paths[x]]):  # they are in this order
        number, room = -1, 0.0
        for x in group:
            weight = max(sizes[x], 0) * ratio + OVERHEAD
            if room < weight:
                number, room = number + 1, args.shard_mb * 1e6 if args.pack else math.inf
            room -= weight
            units.setdefault(f"{split}-{number:06d}", {})[x] = sizes[x]
    return {"made_for": made_for, "ratio": ratio, "cpu_s_per_byte": seconds, "units": units}


def sample(copies: Copies, sizes: dict[str, int]) -> tuple[float, float]:
    """Re-encode the beginnings of a few videos; return bytes and CPU seconds per byte of source.

    The bytes are rounded: another version of the libraries may write slightly other copies.
    """
    before, after, seconds = 0, 0.0, 0.0
    new = list(filter(copies.lacks, sizes))
    with tempfile.TemporaryDirectory() as folder:
        for path in new[:: -(-len(new) // SAMPLE) or 1]:  # spread evenly
            with contextlib.suppress(VideoError), Video(f"{copies.args.videos}/{path}") as video:
                begin, target = time.thread_time(), f"{folder}/copy.mp4"
                count = transcode(video.path, target, max_frames=SAMPLE_FRAMES, **copies.recipe)
                seconds += (time.thread_time() - begin) * video.num_frames / count
                after += os.path.getsize(target) * video.num_frames / count
                before += sizes[path]
    return (float(f"{after / before:.2g}"), seconds / before) if before else (1.0, 0.0)


def tell_costs(copies: Copies, plan: dict[str, Any], todo: list[str]) -> None:
    """Print what it takes to make the units `todo`; UserError if the disk has no room for them."""
    units, args = plan["units"], copies.args
    sizes = {x: max(units[unit][x], 0) for unit in todo for x in filter(copies.lacks, units[unit])}
    size = sum(sizes.values())
    needed = size * plan["ratio"] + OVERHEAD * len(sizes)
    if args.pack and copies.recipe:  # a unit's copies are there twice for a moment
        needed += min(needed, (args.jobs if args.cluster else 1) * args.shard_mb * 1e6)
    folder = Path(copies.folder).absolute()
    free = shutil.disk_usage(next(x for x in (folder, *folder.parents) if x.exists())).free
    has, needs, room = (f"{tqdm.format_sizeof(x)}B" for x in (size, needed, free))
    what = f"{len(sizes):,} of {sum(map(len, units.values())):,} videos to copy, {has}"
    work = f"about {size * plan['cpu_s_per_byte'] / 3600:.3g} CPU-hours to re-encode them"
    print_any(f"{folder}: {what}; {work}; about {needs} needed, {room} free")
    if needed > free:
        raise UserError(f"{folder} needs about {needs}, and its disk has {room} free", 1)


# --- running --------------------------------------------------------------------------------------


def make_copies(split_of: dict[str, str], args: Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """Make the copies that --reencode and --pack ask for, here or by the jobs of --cluster.

    Args:
        split_of: the path of every video and the split whose shards take it; the splits one after
            the other.

    Returns:
        The paths of the copies (after --dry_run, of the videos); 'PATH: reason' of videos without a
        copy and of bad copies (--verify): both by path of the video.
    """
    folder, flags = args.pack or args.reencode, ("short_side", "gop", "crf")
    recipe = {x: getattr(args, x) for x in flags} if args.reencode is not None else {}
    copies = Copies(args, folder, recipe)
    paths = {str(Path(path).relative_to(args.videos)): path for path in split_of}
    _check_names(copies, paths)
    plan = find_plan(copies, paths, split_of)
    todo = [unit for unit in plan["units"] if not copies.read_record(unit, args.verify)]
    tell_costs(copies, plan, todo)
    if args.dry_run:
        return {path: path for path in split_of}, {}
    os.makedirs(folder, exist_ok=True)
    if args.pack:
        save_json(f"{folder}/plan.json", plan)
    if args.cluster and todo:
        run_jobs(copies, todo)
    copy_of, broken = dict[str, str](), dict[str, str]()
    for unit, sizes in plan["units"].items():
        record = copies.make(unit, sizes)
        copy_of |= {paths[x]: f"{folder}/{place}" for x, place in record["copies"].items()}
        broken |= {paths[x]: reason for x, reason in record["broken"].items()}
    shutil.rmtree(f"{folder}/.work", ignore_errors=True)  # locks, and what killed processes left
    return copy_of, broken


def _check_names(copies: Copies, paths: dict[str, str]) -> None:
    """Raise UserError if two videos would have the same copy, or a copy the place of a source."""
    folder, taken = copies.folder, dict[str, str]()
    if copies.args.pack and ".tar/" in os.path.abspath(folder) + "/":
        raise UserError(f"--pack {folder}: the name of a folder may not end with .tar")
    for path, source in paths.items():
        if not copies.recipe and find_member(path):
            raise UserError(f"{path} is in a tar file already: --pack needs --reencode here")
        target = f"{folder}/{copies.name(path)}"
        if (other := taken.setdefault(target, source)) != source:
            raise UserError(f"{source} and {other} would have the same copy: rename one")
        if not copies.lacks(path) and os.path.samefile(file_of(source), target):
            raise UserError(f"--reencode {folder} would overwrite {source}: choose another")


def run_jobs(copies: Copies, todo: list[str]) -> None:
    """Have jobs make the units `todo`, and wait until all are done, by whomever.

    Raises:
        UserError: the jobs have ended, and no other process makes the units that are left.
    """
    args, num = copies.args, min(copies.args.jobs, len(todo))
    local, logs = args.cluster == "local", os.path.abspath(f"{copies.folder}/jobs")
    if local:  # on Slurm, the flag says how many cores a job has
        args.cpus_per_task = max(1, args.workers // num)
    args.workers = args.cpus_per_task
    jobs = submit_jobs([copies] * num, logs, args)
    after = "" if local else "; the jobs go on if this command ends"
    print_any(f"submitted {num} jobs, {jobs[0].job_id} to {jobs[-1].job_id}; logs: {logs}{after}")
    with tqdm(desc="copying", total=len(todo), unit=" units") as bar:
        live, left = True, todo
        while live:
            live = any(not x.done() for x in jobs) if local else find_live(x.job_id for x in jobs)
            time.sleep(1 if local else 10)  # also after the end: a file server shows records late
            left = [unit for unit in left if not copies.read_record(unit, args.verify)]
            bar.update(len(todo) - len(left) - bar.n)
    for unit in left:
        with copies.lock(unit):  # which a job of another command may have
            if not copies.read_record(unit, args.verify):
                what = f"{len(left)} of {len(todo)} units are not done, {unit} for example"
                raise UserError(f"{what}; {logs}/*_log.err say why; the same command goes on", 1)
