"""Files and folders that appear whole or not at all, also where several processes make the same one at once."""

from __future__ import annotations

import contextlib
import errno
import glob
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

_NUMBERS = itertools.count()  # several threads of a process may make the same thing


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path in the same folder, of a file to write, which takes the name `path` at the end and not before."""
    partial = path.with_name(f"{_own_name(path)}{next(_NUMBERS)}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path, main: bool = True, wait: Callable[[], None] | None = None) -> Iterator[Path]:
    """Gives a temporary folder to fill, which takes the name `path` at the end and not before: a kill leaves the old state.

    A folder that has that name at the beginning is replaced. One that another process has put there meanwhile stays, and
    what was made here is dropped. Of several processes that fill it together, one is `main`, and `wait` is their
    barrier; they find each other by the temporary folder's name, so others must not make the same folder then.
    """
    together = f".{path.name}.partial"
    unfinished = path.with_name(together if wait else f"{_own_name(path)}{next(_NUMBERS)}.partial")
    wait = wait or (lambda: None)
    try:
        if main:
            path.parent.mkdir(parents=True, exist_ok=True)
            restore(path)
            for left in (path.with_name(together), *_left_by_the_dead(path)):
                remove_folder(left)
            unfinished.mkdir()
            before = _identity(path)
        wait()
        yield unfinished
        wait()
        if main:
            for file in [*unfinished.rglob("*"), unfinished]:
                _flush(file)
            _put(unfinished, path, before)
            _flush(path.parent)
        wait()
    finally:
        if main:
            restore(path)
            remove_folder(unfinished)


def restore(path: Path) -> None:
    """Between two renames there is a moment without `path`; if that was the end, the old folder takes its name again."""
    old = _old(path)
    if not old.exists():
        return
    if path.exists():
        remove_folder(old)
    else:
        with _unless_another_did():
            old.rename(path)


def remove_folder(folder: Path) -> None:
    """Deletes a folder that may not exist. One with a visible name loses that first: a kill on the way leaves no half of it."""
    if folder.exists():
        with _unless_another_did():
            if not folder.name.startswith("."):
                hidden = folder.with_name(f".{folder.name}.deleted")
                remove_folder(hidden)
                folder = folder.rename(hidden)
            shutil.rmtree(folder)


def _put(unfinished: Path, path: Path, before: int | None) -> None:
    """Gives a folder its name, unless there is another one there now than `before`."""
    while True:
        if before is not None and _identity(path) == before:
            with _unless_another_did():
                path.rename(_old(path))
        try:
            unfinished.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if _identity(path) == before:  # put back by a process that has begun just now
                restore(path)
                continue
        return


def _own_name(path: Path) -> str:
    """How the temporary names of this process begin."""
    return f".{path.name}.{os.uname().nodename}.{os.getpid()}."


def _left_by_the_dead(path: Path) -> Iterator[Path]:
    """What processes of this machine that are gone had begun to make of `path`."""
    beginning = f".{path.name}.{os.uname().nodename}."
    for partial in path.parent.glob(f"{glob.escape(beginning)}*.partial"):
        process = partial.name.removeprefix(beginning).partition(".")[0]
        if process.isdigit() and not _is_alive(int(process)):
            yield partial


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks, and sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def _old(path: Path) -> Path:
    """Where a folder waits while another one takes its name."""
    return path.with_name(f".{path.name}.old")


def _identity(path: Path) -> int | None:
    """What tells a folder from another one of the same name."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _unless_another_did() -> Iterator[None]:
    """What another process has moved or deleted just now is no error."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise


def _flush(path: Path) -> None:
    """Asks the operating system to put a file's or folder's content on the disk before the rename that makes it count."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
