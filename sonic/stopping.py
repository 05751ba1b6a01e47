"""Ends of a run that nobody planned.

A preemptible machine sends SIGTERM and gives a minute; a person presses Ctrl-C. The step under way is finished and saved. A
second signal ends at once.
"""

from __future__ import annotations

import signal
from types import FrameType


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
