"""Frames go into a file while the next ones are computed, so that a video is never in memory as a whole."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
AHEAD = 2  # chunks that may wait for the encoder
_END = object()


@contextmanager
def in_background(consume: Callable[[Iterator[Item]], None]) -> Iterator[Callable[[Item], None]]:
    """Gives a `put`; what is put is iterated over by `consume` in a thread, whose failure `put` or the end of the block raises."""
    items: queue.Queue = queue.Queue(AHEAD)
    failures: list[BaseException] = []

    def taken() -> Iterator[Item]:
        while (item := items.get()) is not _END:
            yield item

    def work() -> None:
        rest = taken()
        try:
            consume(rest)
        except BaseException as error:  # raised again where it can be handled
            failures.append(error)
            for _ in rest:  # nobody must wait for room in the queue
                pass

    def put(item: Item) -> None:
        if failures:
            raise failures[0]
        items.put(item)

    thread = threading.Thread(target=work, name="encoder", daemon=True)
    thread.start()
    try:
        yield put
    finally:
        items.put(_END)
        thread.join()
    if failures:
        raise failures[0]
