"""What a long animation keeps beside its output while it is not done: OUTPUT.mp4.partial/, from which --resume goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sonic.config import UserError
from sonic.files import atomic_folder, remove_folder

KEEP_EVERY = 120.0  # seconds between two states; a shorter run keeps none
LATENTS, INDEX = "latents-{}.npy", "state.json"


class Unfinished:
    """The latents of an output that is being made, with what else its solver remembers, after how many steps. `key` stands for
    all that decides the result; `say` is told in a sentence what is done about an earlier state."""

    def __init__(self, output: Path, key: str, resume: bool, say: Callable[[str], None]):
        self.folder = output.absolute().with_name(f"{output.name}.partial")
        self.key, self.resume, self.say = key, resume, say
        self._last = time.monotonic()

    def load(self) -> tuple[list[Tensor], int] | None:
        """What `keep` was given, on the CPU, if there is something of this very video and it is to resume."""
        if not self.resume:
            return None
        try:
            state = json.loads((self.folder / INDEX).read_text())
            known = state["key"] == self.key
            kept = [np.load(self.folder / LATENTS.format(number)) for number in range(state["kept"])] if known else []
        except (OSError, EOFError, ValueError, KeyError, TypeError):  # a file cut short is one of these, too
            self.say(f"nothing to resume in '{self.folder}': beginning anew")
            return None
        if not known:
            self.say(f"'{self.folder}' is of other inputs, settings or weights: beginning anew")
            return None
        self.say(f"resumed after step {state['step']} from '{self.folder}'")
        return [torch.from_numpy(latents) for latents in kept], state["step"]

    def keep(self, latents: list[Tensor], step: int) -> None:
        """Saves latents [N, C, H, W] after so many steps, whole or not at all, if the last time is long ago."""
        if time.monotonic() - self._last < KEEP_EVERY:
            return
        try:
            with atomic_folder(self.folder) as folder:
                for number, one in enumerate(latents):
                    np.save(folder / LATENTS.format(number), one.cpu().numpy())
                state = {"key": self.key, "step": step, "kept": len(latents)}
                (folder / INDEX).write_text(json.dumps(state))
        except OSError as error:
            raise UserError(f"'{self.folder}' cannot be written ({error.strerror}): make room on the disk") from error
        self._last = time.monotonic()

    def remove(self) -> None:
        """The video is made, or will not be."""
        remove_folder(self.folder)
