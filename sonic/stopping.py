"""Ends of a run that nobody planned.

A preemptible machine sends SIGTERM and gives a minute; a person presses Ctrl-C. While libraries load, the process ends at
once; in a script's work either signal is an exception; and training finishes and saves the step under way. A second signal
does not wait.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM: as clean an end as Ctrl-C."""


def leave_quietly() -> None:
    """Until `signals_raise`, Ctrl-C ends the process with code 130 and no traceback: heavy imports take seconds, and inside
    them an exception would not come through whole. Nothing has been begun then that could be left half done."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os.write(sys.stderr.fileno(), b"terminated\n" if number == signal.SIGTERM else b"interrupted\n")
    os._exit(128 + number)


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Inside, SIGTERM raises Terminated and Ctrl-C KeyboardInterrupt, but in an import only when it is done: one in C takes
    the exception for a failure of its own, and one in C++ ends the process with it. Outside the main thread, nothing."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        stop = _Stop()
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, stop)
        if signal.getsignal(signal.SIGINT) in (_leave, signal.default_int_handler):  # else a shell's background job
            before[signal.SIGINT] = signal.default_int_handler
            signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stop:
    """The handler of `signals_raise`."""

    def __init__(self):
        self._waiting = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not _importing(frame):
            raise Terminated("terminated") if number == signal.SIGTERM else KeyboardInterrupt
        if self._waiting:
            _leave(number, frame)
        self._waiting = True
        threading.Thread(target=self._again, args=(number,), daemon=True).start()

    def _again(self, number: int) -> None:
        """Sends the signal once more when the main thread has done its import."""
        main = threading.main_thread().ident
        while _importing(sys._current_frames().get(main)):
            time.sleep(0.01)
        self._waiting = False
        os.kill(os.getpid(), number)


def _importing(frame: FrameType | None) -> bool:
    """Whether an import is under way in this frame or in one that called it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


class StopSignals:
    """Between `with` and its end, SIGTERM and Ctrl-C are noted in `received` instead of ending the process."""

    def __init__(self):
        self.received: signal.Signals | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        print(f"\n{self.received.name}: finishing this step and saving; once more ends at once", flush=True)


def ignore_signals(worker: int) -> None:
    """For loader workers: both signals reach a whole group of processes, and these must live until the step is finished."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
