"""Decoders as nobody wants them, for tests of what reads files of strangers in a process of its own."""

import os
import resource
import time
from pathlib import Path

import numpy as np


def breaks(path: Path, *_) -> None:
    raise RuntimeError(f"no sentence for anybody, with {path} in it")


def dies(path: Path, *_) -> None:
    os.abort()


class _Liar(np.ndarray):
    shape = (1000, 1000, 3)


def lies(path: Path, *_) -> np.ndarray:
    """Claims more numbers than it sends."""
    return np.zeros(8, np.uint8).view(_Liar)


def hangs(path: Path, *_) -> None:
    time.sleep(600)


def spins(path: Path, *_) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (1, 2))  # the test would take as long as the page's own limit
    while True:
        pass


def swells(path: Path, *_) -> np.ndarray:
    return np.ones(10**11, np.uint8)
