"""What the web page takes of its visitors, and how long it keeps it: limits, accounts, the store."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from sonic.config import PageConfig, Settings, UserError

SETTINGS_BYTES = 64_000  # a settings file has less than a thousand
IN_USE = 900  # seconds; what was touched since belongs to a job that waits or runs, or to a visitor who looks at it


@dataclass(frozen=True)
class Limits:
    """What one visitor may ask for and what all of them may leave behind; the defaults are for people one knows."""

    max_upload_mb: float = 200
    max_audio_seconds: float = 600
    max_image_megapixels: float = 50
    max_waiting: int = 20
    max_batch: int = 50
    max_stored_gb: float = 10
    keep_hours: float = 24
    max_steps: int = 200
    max_resolution: int = 2048
    max_compared_seconds: float = 120


STRICT = Limits(
    max_upload_mb=20,
    max_audio_seconds=30,
    max_image_megapixels=16,
    max_waiting=8,
    max_batch=4,
    max_stored_gb=2,
    keep_hours=2,
    max_compared_seconds=30,
)


def is_open_to_strangers(page: PageConfig, share: bool) -> bool:
    """Whether people may come whom nobody asked for a password."""
    return share and not page.auth


def resolve(page: PageConfig, share: bool, settings: Settings) -> Limits:
    """The limits that hold: what flags say, else the strict ones for strangers, else the wide ones.

    Strangers get the model's own resolution and twice its steps at most, for these decide what a job takes.
    """
    limits = Limits()
    if is_open_to_strangers(page, share):
        limits = dataclasses.replace(
            STRICT, max_steps=2 * settings.num_inference_steps, max_resolution=settings.resolution
        )
    names = {field.name for field in dataclasses.fields(Limits)} & {field.name for field in dataclasses.fields(page)}
    return dataclasses.replace(
        limits, **{name: getattr(page, name) for name in names if getattr(page, name) is not None}
    )


def accounts(auth: str | None) -> list[tuple[str, str]] | None:
    """`--auth` as pairs of user and password, None without it. UserError: it is neither such a pair nor a file of them."""
    if auth is None:
        return None
    try:
        lines = Path(auth).read_text(encoding="utf-8").splitlines() if Path(auth).is_file() else [auth]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--auth file '{auth}' cannot be read ({error}): give a text file") from None
    pairs = []
    for line in filter(None, (line.strip() for line in lines)):
        user, colon, password = line.partition(":")
        if not (user.strip() and colon and password):
            raise UserError("--auth needs USER:PASSWORD, or an existing file with one such line for each user")
        pairs.append((user.strip(), password))
    if not pairs:
        raise UserError(f"--auth file '{auth}' is empty: write one line USER:PASSWORD for each user")
    return pairs


# -------------------------------------------------------------------------------------------------------------- the store


class Store:
    """The one folder that the page writes to and serves from. Every upload and every result has a folder in it, under a
    name that nobody can guess; the oldest go first when there are too many, and all go with the page."""

    def __init__(self, folder: Path, limits: Limits):
        self.folder, self.limits = folder.resolve(), limits
        self._lock = threading.Lock()

    def new(self) -> Path:
        """An empty folder for a result."""
        folder = self.folder / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder

    def covers(self, path: str | Path) -> bool:
        """Whether a path lies below this folder, links followed; the file may be gone."""
        try:
            return Path(path).is_absolute() and Path(path).resolve().is_relative_to(self.folder)
        except (OSError, ValueError, RuntimeError):  # a name too long, with NUL in it, links in a ring
            return False

    def holds(self, path: str | Path) -> bool:
        """Whether a path names a file below this folder."""
        try:
            return self.covers(path) and Path(path).is_file()
        except OSError:
            return False

    def touch(self, path: Path) -> None:
        """Marks an upload as in use."""
        path.parent.touch()

    def clean(self, room: int = 0) -> bool:
        """Deletes what is too old, and the oldest until `room` more bytes fit. Whether they do."""
        most, now = self.limits.max_stored_gb * 1e9 - room, time.time()
        with self._lock:
            entries = []
            for entry in self.folder.iterdir() if self.folder.is_dir() else ():
                try:
                    size = sum(file.stat().st_size for file in [entry, *entry.rglob("*")])
                    entries.append((entry.stat().st_mtime, size, entry))
                except FileNotFoundError:  # gone meanwhile
                    continue
            total = sum(size for _, size, _ in entries)
            for changed, size, entry in sorted(entries, key=lambda entry: entry[0]):
                age = now - changed
                if not (age > self.limits.keep_hours * 3600 or (total > most and age > IN_USE)):
                    continue
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
                total -= size
            return total <= most
