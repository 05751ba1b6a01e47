"""Files of strangers are decoded in a process of their own: what kills the decoder does not kill the page.

A helper process that holds the decoders and nothing else (no model, no socket, no visitor) is forked for each file, with
limits of time and memory. It answers with numbers and text, never with objects. It is no sandbox: it runs as the same user.

multiprocessing runs the top lines of the script that was called again in each such process; those of `sonic_demo.py` are light.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sonic import pictures, sound
from sonic.config import UserError
from sonic.page_limits import Limits
from sonic.record import read_record

CPU_SECONDS, SECONDS = 30, 120  # that a file may take, the second on the wall's clock
MEMORY = 3_000_000_000  # bytes beyond what the decoders take themselves
OVER = (-signal.SIGKILL, -signal.SIGXCPU)  # how a process ends that went over them, the system's own memory included
_starting = threading.Lock()  # multiprocessing's list of children is not made for threads


class Undecodable(Exception):
    """The decoder failed in a way that it has no sentence for, or died."""


class TooHeavy(Exception):
    """The file would take more time or memory than is given to it."""


def prepare() -> None:
    """Starts the process that the others are forked from, so that the first visitor need not wait for it."""
    _context().set_forkserver_preload([__name__])
    forkserver.ensure_running()


def read_portrait(path: Path, limits: Limits) -> Image.Image:
    """An uploaded picture as RGB. UserError: no picture, too small, too large."""
    return Image.fromarray(apart(_portrait, path, int(limits.max_image_megapixels * 1e6)))


def read_speech(path: Path, limits: Limits) -> np.ndarray:
    """An uploaded sound as float32 [samples] at 16 kHz. UserError: no sound, too short, too long, too many channels."""
    return apart(sound.load_audio, path, limits.max_audio_seconds).copy()  # who listens may write into it


def read_video_settings(path: Path) -> dict:
    """The settings that an uploaded MP4 carries. UserError: none."""
    return apart(read_record, path)["settings"]


def apart(read: Callable, path: Path, *arguments) -> Any:
    """`read(path, *arguments)` in a process of its own. It gives an array (read-only), or what JSON can hold.

    Its UserError is raised here; Undecodable and TooHeavy say what else may become of it.
    """
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = _context().Process(target=_work, args=(theirs, read, path, arguments), daemon=True)
    with _starting:
        process.start()
    theirs.close()
    late = threading.Timer(SECONDS, process.kill)
    late.start()
    try:
        head = json.loads(ours.recv_bytes())
        if "shape" in head:
            return np.frombuffer(ours.recv_bytes(), np.dtype(head["type"])).reshape(head["shape"])
    except (EOFError, OSError, ValueError, TypeError, KeyError, MemoryError):  # it ended, or sent what is no answer
        with _starting:
            process.join(1)
        print(f"page: a file could not be read, its decoder ended with {process.exitcode}", file=sys.stderr)
        head = {"failed": MemoryError.__name__ if process.exitcode in OVER else "no answer"}
    finally:
        late.cancel()
        ours.close()
        process.kill()
        with _starting:
            process.join()
    if "error" in head:
        raise UserError(head["error"])
    if "failed" in head:
        raise (TooHeavy if head["failed"] == MemoryError.__name__ else Undecodable)(head["failed"])
    return head["value"]


def _context():
    return multiprocessing.get_context("forkserver")


def _portrait(path: Path, max_pixels: int) -> np.ndarray:
    return np.asarray(pictures.load_image(path, max_pixels))


def _work(connection: Connection, read: Callable, path: Path, arguments: tuple) -> None:
    """In the process of its own, which the page ends: Ctrl-C in its terminal reaches this one too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit()
    try:
        value = read(path, *arguments)
        if isinstance(value, np.ndarray):
            connection.send_bytes(json.dumps({"shape": value.shape, "type": value.dtype.str}).encode())
            connection.send_bytes(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
            return
        answer = {"value": value}
    except UserError as error:
        answer = {"error": str(error)}
    except Exception as error:  # libraries meet broken files with errors of every kind; the file is at fault
        answer = {"failed": type(error).__name__}
    connection.send_bytes(json.dumps(answer).encode())


def _limit() -> None:
    """Where the system can, this process gets CPU_SECONDS, and MEMORY bytes beyond what it has."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY, has + MEMORY))
