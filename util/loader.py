"""Batches of a data set of videos: which rank gets which, worker processes, copies to the device.

Shapes: B videos, R clips of a video, T frames, H W pixels, C channels.
"""

import atexit
import contextlib
import functools
import math
import mmap
import multiprocessing
import os
import signal
import sys
import weakref
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from util.dist import gather_objects, rank, world_size
from util.errors import UserError
from util.kinetics import MAX_REPLACEMENTS, Kinetics
from util.signals import STOP_SIGNALS, child_signal_kept, signals_blocked

PREFETCH = 2  # batches that a worker makes ahead


class EpochSampler(Sampler):
    """Deal the rows of an epoch to the ranks as (epoch, row), from (seed, epoch) alone.

    In training the order is shuffled and cut to whole batches of all ranks, and step s of the
    joint batch holds the same rows however many ranks share it; in testing every row comes once,
    to one rank.
    """

    def __init__(self, num_rows: int, batch_size: int, training: bool, seed: int):
        self.num_rows = num_rows
        self.training = training
        self.seed = seed
        self.epoch = 0
        self.start = 0  # rows of this rank to skip, when an epoch is continued
        joint = batch_size * world_size()
        self.used_rows = num_rows // joint * joint if training else num_rows

    def __len__(self) -> int:
        return len(range(rank(), self.used_rows, world_size()))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.num_rows)
        if self.training:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_rows)
        for row in order[: self.used_rows][rank() :: world_size()][self.start :]:
            yield self.epoch, int(row)


class Batch(NamedTuple):
    """The fields of B samples, as the loader gives them."""

    clips: Tensor  # uint8 [B, R, T, H, W, C]
    flip: Tensor  # bool [B, R]
    erase: Tensor  # int64 [B, R, 4]
    label: Tensor  # int64 [B]
    row: Tensor  # int64 [B], always on the host
    errors: list[dict[str, str]]


class _MadeBatch(NamedTuple):
    """A batch as a worker sends it: clips in a slot of the shared memory, or as a tensor."""

    slot: int | None
    clips: Tensor | None
    flip: np.ndarray
    erase: np.ndarray
    label: np.ndarray
    row: np.ndarray
    errors: list[dict[str, str]]


class _BatchRequests(Sampler):
    """Group the keys of a sampler to batches, each with the slot that it shall be written to."""

    def __init__(self, sampler: EpochSampler, batch_size: int, memory: "BatchMemory"):
        self.sampler = sampler
        self.batch_size = batch_size
        self.memory = memory

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[int | None, list[tuple[int, int]]]]:
        self.memory.reclaim()  # DataLoader starts here when its workers have nothing left to do
        keys = iter(self.sampler)
        while batch := list(islice(keys, self.batch_size)):
            yield self.memory.take(), batch


class _BatchReader(Dataset):
    """Make the batches that are requested; runs in the workers."""

    def __init__(self, dataset: Kinetics, memory: "BatchMemory"):
        self.dataset = dataset
        self.memory = memory

    def __getitem__(self, request: tuple[int | None, list[tuple[int, int]]]) -> _MadeBatch:
        slot, keys = request
        shape = len(keys), *self.dataset.clips_shape
        clips = torch.empty(shape, dtype=torch.uint8) if slot is None else self.memory.view(slot)
        places = list(clips[: len(keys)])
        samples = [self.dataset.read(*key, place) for key, place in zip(keys, places, strict=True)]
        in_place = all(x.clips is place for x, place in zip(samples, places, strict=True))
        if not in_place:
            clips = torch.stack([x.clips for x in samples])
        return _MadeBatch(
            slot,
            None if in_place and slot is not None else clips,
            np.stack([x.flip.numpy() for x in samples]),
            np.stack([x.erase.numpy() for x in samples]),
            np.array([x.label for x in samples]),
            np.array([x.row for x in samples]),
            [x.errors for x in samples],
        )


def _as_it_is(batch: Any) -> Any:
    return batch


class VideoLoader:
    """Batches of a data set for this rank, with a record of unreadable videos.

    On CUDA the next batch is on its way to the device, on a stream of its own, while the caller
    works on the one it has.

    Args:
        batch_size: videos per batch of this rank.
        num_workers: processes; None takes what the CPUs allow.
        max_bad_share: training stops when more than this share of the csv cannot be read.

    Raises:
        UserError: fewer videos than one batch of all ranks; too many unreadable ones (iterating).
    """

    def __init__(
        self,
        dataset: Kinetics,
        batch_size: int,
        num_workers: int | None,
        max_bad_share: float,
        device: torch.device,
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.max_bad_share = max_bad_share
        self.device = device
        self.bad: dict[str, str] = {}  # path -> "PATH: reason", of all ranks before this epoch
        self.sampler = EpochSampler(len(dataset), batch_size, dataset.training, dataset.seed)
        if dataset.training and self.sampler.used_rows == 0:
            raise UserError(
                f"{dataset.index.csv_path} lists {len(dataset)} videos, fewer than one batch of "
                f"--batch_size {batch_size} on {world_size()} ranks"
            )
        workers = default_num_workers() if num_workers is None else num_workers
        # Batches asked for ahead, the one on its way to the device, the caller's, and one to spare.
        slots = workers * PREFETCH + 3 if can_share_memory(workers) else 0
        shape = (batch_size, *dataset.clips_shape)
        self.memory = BatchMemory(slots, shape, page_lock=device.type == "cuda")
        self.loader = DataLoader(
            _BatchReader(dataset, self.memory),
            batch_size=None,  # a request is for a whole batch
            sampler=_BatchRequests(self.sampler, batch_size, self.memory),
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker,
        )

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch whose order and clips the next iteration gives, from a step on.

        All ranks call this together: they tell each other the unreadable videos met so far.
        """
        for others in gather_objects(self.bad):
            self.bad = others | self.bad
        self._refuse_bad_share()
        self.sampler.epoch = epoch
        self.sampler.start = start_step * self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        # blocked: else a signal could come before a new worker ignores it
        with signals_blocked(), child_signal_kept():
            batches = map(self._receive, self.loader)
        return prefetch(batches, self.device) if self.device.type == "cuda" else batches

    def _receive(self, made: "_MadeBatch") -> Batch:
        """Make tensors of what a worker sent."""
        if made.clips is None:
            assert made.slot is not None
            clips = self.memory.lease(made.slot)[: len(made.row)]
        else:
            clips = made.clips
            if made.slot is not None:
                self.memory.abandon(made.slot)
        flip, erase = torch.from_numpy(made.flip), torch.from_numpy(made.erase)
        label, row = torch.from_numpy(made.label), torch.from_numpy(made.row)
        batch = Batch(clips, flip, erase, label, row, made.errors)
        self._record(batch)
        return batch

    def _record(self, batch: Batch) -> None:
        """Report unreadable videos once each, and stop when they are too many."""
        for errors in batch.errors:
            for path, error in errors.items():
                if path not in self.bad:
                    self.bad[path] = error
                    print(f"unreadable video ({len(self.bad)} so far): {error}", flush=True)
        if not self.dataset.training:
            return
        lost = [batch.errors[i] for i in (batch.row < 0).nonzero()]
        if lost:
            raise UserError(
                f"{MAX_REPLACEMENTS} videos in a row of {self.dataset.index.csv_path} could not be "
                f"read; the last one: {list(lost[0].values())[-1]}",
                status=1,
            )
        self._refuse_bad_share()

    def _refuse_bad_share(self) -> None:
        csv_path = self.dataset.index.csv_path
        if self.dataset.training and len(self.bad) > self.max_bad_share * len(self.dataset):
            raise UserError(
                f"{len(self.bad)} of {len(self.dataset)} videos of {csv_path} cannot be read, more "
                f"than --max_bad_share {self.max_bad_share}; they are listed above",
                status=1,
            )


def prefetch(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy batches to a CUDA device one ahead, on a stream of its own; rows stay on the host."""
    stream = _copy_stream(device)

    def arrive(batch: Batch, host: Batch, copied: torch.Event) -> Iterator[Batch]:
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        for tensor in (batch.clips, batch.flip, batch.erase, batch.label):
            tensor.record_stream(current)
        yield batch
        copied.synchronize()  # long past; from here on workers may write to the memory of `host`

    waiting = None
    for host in batches:
        with torch.cuda.stream(stream):
            batch = host._replace(
                clips=host.clips.to(device, non_blocking=True),
                flip=host.flip.pin_memory().to(device, non_blocking=True),
                erase=host.erase.pin_memory().to(device, non_blocking=True),
                label=host.label.pin_memory().to(device, non_blocking=True),
            )
            copied = stream.record_event()
        if waiting is not None:
            yield from arrive(*waiting)
        waiting = batch, host, copied
    if waiting is not None:
        yield from arrive(*waiting)


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of copies to a device; the memory of one is of no use to another."""
    return torch.cuda.Stream(device)


def available_cpus() -> int:
    """Count the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count() or 1
    return int(min(cpus, _cpu_quota()))


def default_num_workers() -> int:
    """Return the CPUs of this process: its Slurm task's, or a share of the machine's per rank."""
    cpus = available_cpus()
    own = os.environ.get("SLURM_CPUS_PER_TASK")
    if own and "TORCHELASTIC_RUN_ID" not in os.environ:  # a rank is a task; others have their own
        return max(1, min(16, cpus, int(own)))
    return max(1, min(16, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _cpu_quota() -> float:
    """Return the CPUs that a container's limit amounts to (cgroup v2), else infinity."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return math.inf if quota == "max" else max(1.0, int(quota) / int(period))
    except (OSError, ValueError):
        return math.inf


@atexit.register
def _end_workers() -> None:
    """Kill the workers of loaders that nobody has let go of, such as those of a kept traceback.

    They ignore the SIGTERM that multiprocessing sends at the end, before it waits for them.
    """
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)  # the workers are the parallelism
    # Launchers send these to every process they find. The trainer needs its workers for the step
    # it ends with; it tells them when to go, and they go by themselves when it is gone.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def can_share_memory(num_workers: int) -> bool:
    """Tell if workers will see the memory of this process: only those it forks do."""
    return num_workers == 0 or multiprocessing.get_start_method() == "fork"


class BatchMemory:
    """Slots for uint8 batches of one shape, lent to workers and then to whoever holds the tensor.

    The process that reads batches calls everything but `view`. A slot goes `take` (to be named to
    a worker) -> `lease` (as a tensor) -> free again when the last tensor on it is gone.

    Args:
        slots: how many; nothing is allocated before it is written to.
        page_lock: lock a slot's pages when first leased, for copies to CUDA that run on their own.
    """

    def __init__(self, slots: int, shape: tuple[int, ...], page_lock: bool):
        self.shape = shape
        self.page_lock = page_lock
        self.maps = [_Mapping(-1, math.prod(shape)) for _ in range(slots)]
        self.capacity = slots
        self.free = list(range(slots))  # a stack: what was used last is in the caches
        self.taken: set[int] = set()

    def take(self) -> int | None:
        """Return a slot for a worker to write to, or None when all are in use."""
        if not self.free:
            return None
        slot = self.free.pop()
        self.taken.add(slot)
        return slot

    def view(self, slot: int) -> Tensor:
        """Return a slot as a tensor, for the worker."""
        return torch.frombuffer(self.maps[slot], dtype=torch.uint8).view(self.shape)

    def lease(self, slot: int) -> Tensor:
        """Return what was written to a taken slot; it is free again when the tensor is gone."""
        self.taken.remove(slot)
        if self.page_lock:
            self.page_lock = self.maps[slot].lock_pages()
        array = np.frombuffer(self.maps[slot], np.uint8).reshape(self.shape)
        weakref.finalize(array, self.free.append, slot).atexit = False
        return torch.from_numpy(array)  # holds on to the array, and so do all views of it

    def abandon(self, slot: int) -> None:
        """Never use a taken slot again: a worker's hung read may still write to it."""
        self.taken.remove(slot)

    def reclaim(self) -> None:
        """Free the slots whose batches were not waited for; only when no worker is at work."""
        self.free.extend(self.taken)
        self.taken.clear()


class _Mapping(mmap.mmap):
    """Anonymous memory, which CUDA may have page-locked."""

    address = 0  # of the locked pages

    def lock_pages(self) -> bool:
        """Page-lock it until it is unmapped; where that is refused, say so and return False."""
        if self.address:
            return True
        address = torch.frombuffer(self, dtype=torch.uint8).data_ptr()
        cuda: Any = torch.cuda.cudart()
        try:
            torch.cuda.check_error(cuda.cudaHostRegister(address, len(self), 0))
        except RuntimeError as error:
            print(f"WARNING: copies to the GPU will be slow: pages cannot be locked ({error})")
            with contextlib.suppress(RuntimeError):
                torch.zeros((), device="cuda")  # is told of the refusal, too, and clears it
            return False
        self.address = address
        return True

    def __del__(self) -> None:  # a finalizer would come after the memory is gone
        if self.address and not sys.is_finalizing():
            cuda: Any = torch.cuda.cudart()
            cuda.cudaHostUnregister(self.address)
