"""Work on many files that takes long: in worker processes, where one that dies harms no work but its own, and shared out
among processes that were started together."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeVar

import cv2

Result = TypeVar("Result")
M_MMAP_THRESHOLD, M_MMAP_MAX = -3, -4  # as malloc.h numbers them


@dataclass(frozen=True)
class Share:
    """One process's share of work that `count` processes do together: every count-th item, from the index-th on.

    `gather` gives the items of all processes, in their order, and so waits for all; they are in one list.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[list], list] = list

    def of(self, items: Sequence) -> list:
        return list(items[self.index :: self.count])


def be_a_worker() -> None:
    """How a worker process begins."""
    cv2.setNumThreads(1)  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the whole group: without each worker's traceback
    # Left to itself, glibc lays pictures and landmarks side by side, and what is kept of each tick holds 45 kB of gaps open:
    # 4 GB per hour. Blocks of their own for whatever is larger than 64 kB keep them apart.
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_MAX, 1 << 16)
            mallopt(M_MMAP_THRESHOLD, 1 << 16)


def in_workers(
    work: Callable[..., Result], tasks: Sequence[tuple], num_workers: int
) -> Iterator[tuple[int, Result | None, bool]]:
    """`work(*task)` for each task, in so many processes, or here with none; yields (its number, result, False) as they finish.

    A task that kills its process, as a crash in a decoder does, yields (its number, None, True). An exception of `work` is
    raised here and ends the others: what is to go on must be caught there.
    """
    if num_workers == 0:
        for number, task in enumerate(tasks):
            yield number, work(*task), False
        return
    waiting = list(reversed(range(len(tasks))))
    while waiting:
        suspects = []
        with _Pool(min(num_workers, len(waiting))) as pool:
            running: dict[Future, int] = {}
            while (waiting or running) and not suspects:
                # No more than one task per worker is handed out: when a worker dies, only these can have killed it.
                while waiting and len(running) < num_workers:
                    number = waiting.pop()
                    try:
                        running[pool.submit(work, *tasks[number])] = number
                    except BrokenProcessPool:
                        suspects.append(number)
                done, _ = wait(running, return_when=FIRST_COMPLETED) if running else ((), ())
                for future in done:
                    number = running.pop(future)
                    if isinstance(future.exception(), BrokenProcessPool):
                        suspects.append(number)
                    else:
                        yield number, future.result(), False
            suspects += running.values()
        for number in suspects:  # each alone, so that the innocent are not blamed
            with _Pool(1) as pool:
                future = pool.submit(work, *tasks[number])
                died = isinstance(future.exception(), BrokenProcessPool)
                yield number, None if died else future.result(), died


class _Pool(ProcessPoolExecutor):
    """Ends at once when something goes wrong or is interrupted: what a worker has not finished yet is made again next time.

    Its processes are spawned: forking one that holds torch's threads and a CUDA context deadlocks.
    """

    def __init__(self, size: int):
        super().__init__(size, mp_context=multiprocessing.get_context("spawn"), initializer=be_a_worker)

    def __exit__(self, kind, error, trace):
        if kind is not None:
            for worker in multiprocessing.active_children():
                worker.terminate()
        return super().__exit__(kind, error, trace)
