"""Batches of a data set of videos, from the order of its rows to their copies on the device.

EpochSampler orders the rows of an epoch, and _BatchRequests asks for batches of them. Worker
processes run _BatchReader, which writes to the slots of a BatchMemory. VideoLoader puts these
together and hands out the batches; prefetch copies them to a CUDA device ahead of their use.

Shapes: B videos, R clips of a video, T frames, H W pixels, C channels.
"""

import atexit
import contextlib
import functools
import gc
import math
import mmap
import multiprocessing
import os
import signal
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Lock, Thread, main_thread
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from util.dist import gather_objects, rank, world_size
from util.errors import UserError
from util.kinetics import MAX_REPLACEMENTS, Kinetics
from util.signals import STOP_SIGNALS, child_signal_kept, signals_blocked

PREFETCH = 2  # batches that a worker makes ahead
Request = tuple[int | None, list[tuple[int, int]]]  # slot and (epoch, row) keys of a batch
# What a worker makes of it: slot; clips, if the slot does not hold them; other arrays; errors.
Made = tuple[int | None, Tensor | None, list[np.ndarray], list[dict[str, str]]]


@dataclass(eq=False)
class EpochSampler(Sampler):
    """Deal the rows of an epoch to the ranks as (epoch, row); only (seed, epoch) decides the order.

    In training the order is shuffled and cut to whole batches of all ranks, and the joint batch of
    a step holds the same rows however many ranks share it. In testing every row comes once.
    """

    num_rows: int
    batch_size: int
    training: bool
    seed: int
    epoch: int = 0
    start: int = 0  # rows of this rank to skip when an epoch is continued
    rows: Sequence[int] | None = None  # of this rank, in place of its share of a test's rows

    def __post_init__(self) -> None:
        joint = self.batch_size * world_size()
        self.used_rows = self.num_rows // joint * joint if self.training else self.num_rows

    def __len__(self) -> int:
        own = range(rank(), self.used_rows, world_size()) if self.rows is None else self.rows
        return len(own)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.num_rows)
        if self.training:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_rows)
        own = order[: self.used_rows][rank() :: world_size()] if self.rows is None else self.rows
        for row in own[self.start :]:
            yield self.epoch, int(row)


class BatchMemory:
    """Slots for uint8 batches of one shape, lent to a worker and then to the user of its batch.

    A slot is reserved by `take`, which names it to a worker, then handed out as a tensor by
    `lease`, and free again when the last tensor that uses it is gone. Workers call only `view`.
    """

    def __init__(self, slots: int, shape: tuple[int, ...], page_lock: bool):
        self.capacity, self.shape = slots, shape
        self.page_lock = page_lock  # lock pages, for copies to CUDA; False once it has refused
        self.maps = [_Mapping(-1, math.prod(shape)) for _ in range(slots)]  # allocated when used
        self.free = list(range(slots))  # a stack: the slot used last is still in the caches
        self.taken: set[int] = set()

    def take(self) -> int | None:
        """Reserve a slot for a worker to write to; None if all are in use."""
        if not self.free:
            return None
        slot = self.free.pop()
        self.taken.add(slot)
        return slot

    def view(self, slot: int) -> Tensor:
        """Return a slot as a tensor, for the worker."""
        return torch.frombuffer(self.maps[slot], dtype=torch.uint8).view(self.shape)

    def lock_ahead(self, device: int) -> None:
        """Page-lock all slots in the order of their first use; runs in a thread."""
        torch.cuda.set_device(device)  # every new thread starts with device 0
        for slot in reversed(range(self.capacity)):  # `take` pops the last
            if not main_thread().is_alive():
                break  # Python has come to its end and waits for this thread
            self.lock_pages(slot)
            time.sleep(0.001)  # lets a lease that waits for the lock have it next

    def lock_pages(self, slot: int) -> None:
        """Page-lock a slot until it is unmapped; if CUDA refuses, warn and lock no others."""
        with _Mapping.locking:
            mapping, cuda = self.maps[slot], cast(Any, torch.cuda.cudart())
            if mapping.address or not self.page_lock:
                return
            address = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
            try:
                torch.cuda.check_error(cuda.cudaHostRegister(address, len(mapping), 0))
                mapping.address = address
            except RuntimeError as error:
                self.page_lock = False
                print(f"WARNING: copies to the GPU will be slow: pages cannot be locked ({error})")
                with contextlib.suppress(RuntimeError):
                    torch.zeros((), device="cuda")  # clear the error, or a later call reports it

    def lease(self, slot: int) -> Tensor:
        """Return what was written to a taken slot; the slot is free when the tensor is gone."""
        self.taken.remove(slot)
        if self.page_lock and not self.maps[slot].address:  # it overtook lock_ahead
            self.lock_pages(slot)
        array = np.frombuffer(self.maps[slot], np.uint8).reshape(self.shape)
        weakref.finalize(array, self.free.append, slot).atexit = False
        return torch.from_numpy(array)  # this tensor and all its views keep the array alive

    def reclaim(self) -> None:
        """Free the slots of batches that nobody waits for any more, once all workers are idle."""
        self.free.extend(self.taken)
        self.taken.clear()


class _Mapping(mmap.mmap):
    """Anonymous memory that forked processes share and that CUDA can page-lock."""

    locking = Lock()  # held while the pages of any mapping are being locked
    address = 0  # of the locked pages

    def __del__(self) -> None:  # a finalizer would run only after the memory is gone
        if self.address and not sys.is_finalizing():
            cuda: Any = torch.cuda.cudart()
            cuda.cudaHostUnregister(self.address)


@dataclass
class _BatchRequests:
    """Group the keys of a sampler into batches, each with the slot to write it to."""

    sampler: EpochSampler
    memory: BatchMemory

    def __iter__(self) -> Iterator[Request]:
        self.memory.reclaim()  # when DataLoader starts to iterate here, its workers are idle
        keys = iter(self.sampler)
        while batch := list(islice(keys, self.sampler.batch_size)):
            yield self.memory.take(), batch


@dataclass(eq=False)
class _BatchReader(Dataset):
    """Make the batches that are requested; runs in the workers."""

    dataset: Kinetics
    memory: BatchMemory

    def __getitem__(self, request: Request) -> Made:
        slot, keys = request
        shape = len(keys), *self.dataset.clips_shape
        clips = torch.empty(shape, dtype=torch.uint8) if slot is None else self.memory.view(slot)
        places = list(clips[: len(keys)])
        samples = [self.dataset.read(*key, place) for key, place in zip(keys, places, strict=True)]
        if any(x.clips is not place for x, place in zip(samples, places, strict=True)):
            clips = torch.stack([x.clips for x in samples])
        elif slot is not None:
            clips = None
        flip = np.stack([x.flip.numpy() for x in samples])
        erase = np.stack([x.erase.numpy() for x in samples])
        label, row = np.array([x.label for x in samples]), np.array([x.row for x in samples])
        return slot, clips, [flip, erase, label, row], [x.errors for x in samples]


def default_num_workers() -> int:
    """Return the CPUs of this rank, at most 16: its Slurm task's or its share of the machine's."""
    cpus = available_cpus()
    own = os.environ.get("SLURM_CPUS_PER_TASK")
    if own and "TORCHELASTIC_RUN_ID" not in os.environ:  # each rank is a task with its own CPUs
        return max(1, min(16, cpus, int(own)))
    return max(1, min(16, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def available_cpus() -> int:
    """Count the CPUs that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    return int(min(cpus, _cpu_quota()))


def _cpu_quota() -> float:
    """Return how many CPUs the container's limit allows (cgroup v2), infinity without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return math.inf if quota == "max" else max(1.0, int(quota) / int(period))
    except (OSError, ValueError):
        return math.inf


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)  # the workers are the parallelism
    gc.freeze()  # a collection would write to, and so copy, the pages shared with the trainer
    os.nice(5)  # the trainer goes first: while it waits for a core, its GPU waits for kernels
    # Launchers send these signals to all processes, but the trainer needs its workers for its last
    # step. It ends them itself, and they end on their own if it dies.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Kill the workers that are left; they ignore the SIGTERM that multiprocessing sends."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class Batch(NamedTuple):
    """The fields of B samples."""

    clips: Tensor  # uint8 [B, R, T, H, W, C]
    flip: Tensor  # bool [B, R]
    erase: Tensor  # int64 [B, R, 4]
    label: Tensor  # int64 [B]
    row: Tensor  # int64 [B], always on the host
    errors: list[dict[str, str]]


@dataclass(eq=False)
class VideoLoader:
    """Batches of a data set for this rank, with a record of unreadable videos.

    Raises:
        UserError: fewer videos than a batch of all ranks; when iterating, too many unreadable ones.
    """

    dataset: Kinetics
    batch_size: int  # videos per batch of this rank
    num_workers: int | None  # None: as many processes as the CPUs allow
    max_bad_share: float  # training stops when more than this share of the csv cannot be read
    device: torch.device
    rows: Sequence[int] | None = None  # that this rank tests; None: its share of all rows

    def __post_init__(self) -> None:
        dataset, batch_size = self.dataset, self.batch_size
        self.started = False
        self.bad: dict[str, str] = {}  # path -> "PATH: reason"; includes other ranks' at each epoch
        order = len(dataset), batch_size, dataset.training, dataset.seed
        self.sampler = EpochSampler(*order, rows=self.rows)
        if dataset.training and self.sampler.used_rows == 0:
            raise UserError(
                f"{dataset.index.csv_path} lists {len(dataset)} videos, fewer than one batch of "
                f"--batch_size {batch_size} on {world_size()} ranks"
            )
        workers = default_num_workers() if self.num_workers is None else self.num_workers
        # Only forked workers see the memory of this process. There are slots for the batches
        # made ahead, the one on its way to the device, the one in use, and a spare one.
        shared = workers == 0 or multiprocessing.get_start_method() == "fork"
        slots = min(workers * PREFETCH, len(self)) + 3 if shared else 0
        shape = batch_size, *dataset.clips_shape
        self.memory = BatchMemory(slots, shape, page_lock=self.device.type == "cuda")
        requests = _BatchRequests(self.sampler, self.memory)
        self.loader = make_loader(_BatchReader(dataset, self.memory), workers, requests)

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the next epoch and its first step; all ranks call this and share bad videos."""
        for others in gather_objects(self.bad):
            self.bad = others | self.bad
        self._refuse_bad_share()
        self.sampler.epoch = epoch
        self.sampler.start = start_step * self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        first, self.started = not self.started, True
        if first and self.loader.num_workers:
            gc.collect()  # workers would keep garbage, such as the slots of another loader
        # Blocked, because a signal could reach a new worker before it ignores signals.
        with signals_blocked(), child_signal_kept():
            batches = map(self._receive, self.loader)
            if first and self.memory.page_lock:  # after the fork: no worker inherits a held lock
                # Not a daemon: if CUDA returned to one after Python's end, the process would abort.
                Thread(target=self.memory.lock_ahead, args=[torch.cuda.current_device()]).start()
        return prefetch(batches, self.device) if self.device.type == "cuda" else batches

    def _receive(self, made: Made) -> Batch:
        """Make tensors of what a worker sent, and report every unreadable video once."""
        slot, clips, arrays, errors = made
        if clips is None:
            assert slot is not None
            clips = self.memory.lease(slot)[: len(errors)]
        elif slot is not None:  # never use the slot again: a hung read may still write to it
            self.memory.taken.remove(slot)
        flip, erase, label, row = map(torch.from_numpy, arrays)
        for path, error in [item for tried in errors for item in tried.items()]:
            if path not in self.bad:
                self.bad[path] = error
                print(f"unreadable video ({len(self.bad)} so far): {error}", flush=True)
        lost = [errors[i] for i in (row < 0).nonzero()]  # only in training
        if lost:
            raise UserError(
                f"{MAX_REPLACEMENTS} videos in a row of {self.dataset.index.csv_path} could not be "
                f"read; the last one: {list(lost[0].values())[-1]}",
                status=1,
            )
        self._refuse_bad_share()
        return Batch(clips, flip, erase, label, row, errors)

    def _refuse_bad_share(self) -> None:
        dataset, bad = self.dataset, len(self.bad)
        if dataset.training and bad > self.max_bad_share * len(dataset):
            raise UserError(
                f"{bad} of {len(dataset)} videos of {dataset.index.csv_path} cannot be read, more "
                f"than --max_bad_share {self.max_bad_share}; they are listed above",
                status=1,
            )


def make_loader(
    dataset: Dataset, num_workers: int, requests: _BatchRequests | None = None
) -> DataLoader:
    """Let worker processes make whole batches: those requested, or all of an IterableDataset.

    The latter come as they are made: workers that wait for their turn would keep files in the cache
    in use, and other workers may wait for room there.
    """
    return DataLoader(
        dataset,
        batch_size=None,  # a request is for a whole batch
        sampler=requests,
        collate_fn=_unchanged,
        num_workers=num_workers,
        prefetch_factor=PREFETCH if num_workers else None,
        persistent_workers=num_workers > 0,
        in_order=requests is not None,
        worker_init_fn=_start_worker,
    )


def _unchanged(batch: Any) -> Any:  # PyTorch's default would make tensors of the arrays
    return batch


# One stream per device, because a stream cannot reuse the memory of another one.
_copy_stream = functools.cache(torch.cuda.Stream)


def prefetch(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy batches to a CUDA device, one ahead, on a separate stream; rows stay on the host."""
    stream = _copy_stream(device)

    def arrive(batch: Batch, host: Batch, copied: torch.Event) -> Iterator[Batch]:
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        for tensor in batch[:4]:  # the row is on the host
            tensor.record_stream(current)
        yield batch
        copied.synchronize()  # happened long ago; from here on workers may overwrite `host`

    waiting = None
    for host in batches:
        with torch.cuda.stream(stream):
            pinned = [host.clips, *(x.pin_memory() for x in (host.flip, host.erase, host.label))]
            clips, flip, erase, label = (x.to(device, non_blocking=True) for x in pinned)
            batch = Batch(clips, flip, erase, label, host.row, host.errors)
            copied = stream.record_event()
        if waiting is not None:
            yield from arrive(*waiting)
        waiting = batch, host, copied
    if waiting is not None:
        yield from arrive(*waiting)
