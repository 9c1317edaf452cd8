"""Memory for batches that loader workers write and the trainer reads in place.

A batch of clips is large: pickled, or copied into and out of shared memory, it costs more than its
share of the decoding. Here workers write into mappings that exist before they are forked, and what
travels between the processes is the number of a slot. The mappings have no name in /dev/shm, so
its size (64 MiB in many containers) is no limit.
"""

import math
import mmap
import multiprocessing
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
        self.maps = [mmap.mmap(-1, math.prod(shape)) for _ in range(slots)]
        self.capacity = slots
        self.free = list(range(slots))  # a stack: what was used last is in the caches
        self.taken: set[int] = set()
        self.locked: set[int] = set()

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
        if self.page_lock and slot not in self.locked:
            _lock_pages(self.maps[slot])
            self.locked.add(slot)
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


def _lock_pages(memory: mmap.mmap) -> None:
    """Page-lock a mapping for CUDA until it is unmapped."""
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    cuda: Any = torch.cuda.cudart()
    torch.cuda.check_error(cuda.cudaHostRegister(address, len(memory), 0))
    weakref.finalize(memory, cuda.cudaHostUnregister, address).atexit = False
