"""The loader and its processes: page-locking ahead of use, niceness, garbage.

CUDA's runtime is a stand-in here; tests/test_kinetics.py and test_gpu.py use the real one.
"""

import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from tests.test_kinetics import data_set, loader_of
from tests.test_scripts import ROOT
from util.kinetics import Kinetics
from util.loader import BatchMemory, VideoLoader

WARNING = "WARNING: copies to the GPU will be slow: pages cannot be locked (out of memory)\n"


class FakeCuda:
    """Stand in for device 3: take `seconds` to lock pages and refuse after `limit` of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float, limit: int = 1000):
        self.seconds, self.limit = seconds, limit
        self.tried: list[int] = []  # addresses
        self.locked: list[int] = []
        self.unlocked: list[int] = []
        self.current = threading.local()
        self.threads = 0  # that chose a device
        self.current.device = 3  # of the main thread; not that of others
        self.failed: int | None = None  # the thread that has to clear an error
        self.zeros = torch.zeros
        for name in ("cudart", "check_error", "current_device", "set_device"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch, "zeros", self.clear)
        monkeypatch.setattr("util.loader.prefetch", lambda batches, _: batches)

    def cudart(self) -> "FakeCuda":
        return self

    def current_device(self) -> int:
        return getattr(self.current, "device", 0)

    def set_device(self, device: int) -> None:
        self.current.device = device
        self.threads += 1

    def cudaHostRegister(self, address: int, size: int, _: int) -> int:
        assert self.current_device() == 3
        self.tried.append(address)
        time.sleep(self.seconds)
        ctypes.string_at(address, size)  # crashes if the memory has been unmapped
        if len(self.locked) == self.limit:
            return 2
        self.locked.append(address)
        return 0

    def cudaHostUnregister(self, address: int) -> None:
        self.unlocked.append(address)

    def check_error(self, number: int) -> None:
        if number:
            self.failed = threading.get_ident()
            raise RuntimeError("out of memory")

    def clear(self, *size, **options) -> torch.Tensor:
        if options.get("device") != "cuda":
            return self.zeros(*size, **options)
        assert self.failed == threading.get_ident()  # errors belong to their threads
        self.failed = None
        raise RuntimeError("out of memory")


def cuda_loader(videos: Path, batch_size: int, workers: int) -> VideoLoader:
    return VideoLoader(data_set(videos), batch_size, workers, 0.5, torch.device("cuda"))


def wait_for_threads(before: set[threading.Thread]) -> None:
    """Wait for the threads that lock pages; fail if one met an error."""
    for thread in set(threading.enumerate()) - before:
        if "lock_ahead" in thread.name:
            thread.join(20)
            assert not thread.is_alive()


def addresses(memory: BatchMemory) -> list[int]:
    return [memory.view(slot).data_ptr() for slot in range(memory.capacity)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seconds", [0.0, 0.1])  # faster than the workers, and slower
def test_slots_are_locked_once_ahead_of_their_first_use(videos, monkeypatch, workers, seconds):
    cuda, before = FakeCuda(monkeypatch, seconds), set(threading.enumerate())
    loader = cuda_loader(videos, 1, workers)
    kept = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            in_a_slot = len(kept) < loader.memory.capacity
            assert in_a_slot == (batch.clips.data_ptr() in cuda.locked)
            assert torch.equal(batch.clips[0], loader.dataset[epoch, int(batch.row)].clips)
            kept.append(batch)  # so that another slot comes next
    wait_for_threads(before)
    assert cuda.tried == cuda.locked == addresses(loader.memory)[::-1]


def test_slots_that_nobody_uses_are_locked_as_well(videos, monkeypatch):
    cuda, before = FakeCuda(monkeypatch, 0.01), set(threading.enumerate())
    loader = cuda_loader(videos, 1, 2)
    iter(loader)
    iter(loader)  # does not start another thread
    wait_for_threads(before)
    assert cuda.locked == addresses(loader.memory)[::-1] and cuda.threads == 1


def test_workers_may_start_while_pages_of_another_loader_are_being_locked(videos, monkeypatch):
    cuda, before = FakeCuda(monkeypatch, 0.1), set(threading.enumerate())
    loaders = [cuda_loader(videos, 2, 2) for _ in range(2)]
    batches = [iter(loader) for loader in loaders]
    for first, second in zip(*batches, strict=True):
        assert torch.equal(first.clips, second.clips)
    wait_for_threads(before)
    assert sorted(cuda.tried) == sorted(y for x in loaders for y in addresses(x.memory))


def test_a_lease_does_not_wait_until_all_slots_are_locked(monkeypatch):
    cuda, memory = FakeCuda(monkeypatch, 0.05), BatchMemory(16, (10000,), page_lock=True)
    thread = threading.Thread(target=memory.lock_ahead, args=[3])
    thread.start()
    slots = [memory.take() for _ in range(16)]
    assert slots[-1] == 0  # the thread would come to it last
    place = memory.lease(0).data_ptr()
    assert place in cuda.locked and len(cuda.locked) < 6
    thread.join()
    assert sorted(cuda.tried) == sorted(cuda.locked) == sorted(addresses(memory))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [0, 2])
def test_cuda_is_asked_no_more_once_it_refuses(videos, monkeypatch, capsys, workers, limit):
    cuda, before = FakeCuda(monkeypatch, 0.05, limit), set(threading.enumerate())
    loader = cuda_loader(videos, 1, workers)
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            assert torch.equal(batch.clips[0], loader.dataset[epoch, int(batch.row)].clips)
    wait_for_threads(before)
    assert len(cuda.locked) == limit and len(cuda.tried) == limit + 1 and cuda.failed is None
    assert capsys.readouterr().out == WARNING


def test_memory_lives_while_its_pages_are_being_locked(videos, monkeypatch):
    cuda, before = FakeCuda(monkeypatch, 0.05), set(threading.enumerate())
    loader = cuda_loader(videos, 1, 0)
    iter(loader)
    gone = weakref.ref(loader.memory)
    del loader
    gc.collect()
    wait_for_threads(before)
    gc.collect()
    assert gone() is None
    assert len(cuda.locked) == 3 and set(cuda.locked) <= set(cuda.unlocked)


def test_a_process_may_end_while_pages_are_being_locked(videos):
    """By itself, after Ctrl-C and with a status: in forks, which end as their interpreter does."""
    code = f"""
import atexit, os, signal, time
from pathlib import Path
from pytest import MonkeyPatch
from tests.test_loader import FakeCuda, cuda_loader
for end in ("", "os.kill(os.getpid(), signal.SIGINT)", "raise SystemExit(5)"):
    child = os.fork()
    if not child:
        break
    print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    raise SystemExit
cuda = FakeCuda(MonkeyPatch(), 0.5)
atexit.register(lambda: print(len(cuda.tried), len(cuda.locked)))
loader = cuda_loader(Path({str(videos)!r}), 1, 2)
next(iter(loader))
time.sleep(0.2)  # the thread is at the second slot now
exec(end)
"""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=ROOT, timeout=60, check=True, capture_output=True)
    lines = ended.stdout.decode().splitlines()
    assert lines[1::2] == ["status 0", "status 1", "status 5"], ended.stderr.decode()
    for line in lines[::2]:
        tried, locked = map(int, line.split())
        assert tried == locked < 7  # a daemon thread that CUDA still holds would abort the process


def test_workers_are_nicer_and_leave_the_trainers_objects_alone(videos, tmp_path, monkeypatch):
    real, frozen = Kinetics.read, gc.get_freeze_count()

    def read(self, *arguments):
        (tmp_path / str(os.getpid())).write_text(str(gc.get_freeze_count()))
        return real(self, *arguments)

    monkeypatch.setattr(Kinetics, "read", read)
    loader = loader_of(data_set(videos), 1, 2)
    garbage = BatchMemory(1, (1,), page_lock=False)
    garbage.itself = garbage  # type: ignore[attr-defined]
    gone = weakref.ref(garbage)
    gc.disable()
    try:
        del garbage
        batches = iter(loader)
        assert gone() is None
    finally:
        gc.enable()
    assert len(list(batches)) == 6
    own = os.getpriority(os.PRIO_PROCESS, 0)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    niceness = [os.getpriority(os.PRIO_PROCESS, pid) for pid in workers]
    assert len(workers) == 2 and niceness == [min(own + 5, 19)] * 2
    counts = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert min(counts) > len(gc.get_objects()) / 2
    assert gc.get_freeze_count() == frozen
