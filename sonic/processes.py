"""Several processes that animate together: each takes its share of the windows, and all end a step with the same latents.

`accelerate launch` starts them. One process alone goes through the same calls.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

Job = TypeVar("Job")


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is, and the device of its own, None where --device decides alone."""

    index: int = 0
    count: int = 1
    device: torch.device | None = None

    @classmethod
    def started(cls, device: str = "auto") -> Processes:
        """The processes that a launcher has started; without one, this process alone. `device` is the flag's word."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        state = PartialState(cpu=True) if on_cpu else PartialState()
        leave_at_exit()
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def main(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.index == 0

    def alone(self) -> Processes:
        """The same process, working by itself on its own device."""
        return replace(self, index=0, count=1)

    def share(self, jobs: list[Job]) -> list[Job]:
        """The jobs of this process, for those that need nothing of each other."""
        return jobs[self.index :: self.count]

    def spread(self, work: Callable[[Job], Tensor], jobs: list[Job]) -> Iterator[tuple[Job, Tensor]]:
        """Yields each job with its result, in order and on every process; the work itself is shared out.

        All results must have one shape. They are exchanged after every round of one job per process, so that no process holds
        more than a round. Where jobs are left over, the idle processes repeat the last one, which takes no longer than waiting.
        """
        if self.count == 1:
            for job in jobs:
                yield job, work(job)
            return
        for first in range(0, len(jobs), self.count):
            round_ = jobs[first : first + self.count]
            result = work(round_[min(self.index, len(round_) - 1)]).contiguous()
            sent = result if self.device is None else result.to(self.device)
            received = [torch.empty_like(sent) for _ in range(self.count)]
            dist.all_gather(received, sent)
            for job, value in zip(round_, received[: len(round_)], strict=True):
                yield job, value.to(result.device)

    def collect(self, values: list) -> list:
        """The values of all processes, one process after the other; small ones that pickle."""
        if self.count == 1:
            return values
        gathered: list = [None] * self.count
        dist.all_gather_object(gathered, values)
        return [value for part in gathered for value in part]


def leave_at_exit() -> None:
    """The group of processes, if there is one, is left before Python ends. Gloo's threads may still hold tensors then, and one
    that lets go of them while the interpreter goes down aborts the process, its work done (pytorch PR 179291). NCCL has none
    of that, and to leave it may mean to wait for a process that has failed."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
