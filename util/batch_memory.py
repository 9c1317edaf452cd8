"""Memory for batches that loader workers write and the trainer reads in place.

A batch of clips is large: pickled, or copied into and out of shared memory, it costs more than its
share of the decoding. Here workers write into mappings that exist before they are forked, and what
travels between the processes is the number of a slot. The mappings have no name in /dev/shm, so
its size (64 MiB in many containers) is no limit.
"""

import contextlib
import math
import mmap
import multiprocessing
import sys
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
