"""What a video says of how it was made: one JSON object in its `comment`.

`settings` are flags of sonic_demo.py, so that `--config VIDEO.mp4` makes the same again from the same portrait and speech. The
object names files, and never the folders that they lie in.
"""

from __future__ import annotations

import json
from pathlib import Path

from sonic import __version__
from sonic.config import UserError
from sonic.media import read_metadata
from sonic.weights import content_hash

PROGRAM = "Sonic"


def name_model(folder: str | Path, weights: Path) -> dict[str, str]:
    """A checkpoint's name, and 12 digits that tell it from others. `weights` are its audio2token's: every training changes
    them, and they are small enough to be read whole each time."""
    return {"name": Path(folder).resolve().name, "hash": content_hash(weights)[:12]}


def make_record(model: dict[str, str], settings: dict, **more) -> dict:
    """What `to_metadata` writes and `read_record` reads; what is None in `settings` or `more` is left out."""
    known = {name: value for name, value in settings.items() if value is not None}
    extra = {name: value for name, value in more.items() if value is not None}
    return {"program": PROGRAM, "version": __version__, "model": model, "settings": known, **extra}


def to_metadata(record: dict | None) -> dict[str, str]:
    """For `media.VideoWriter`."""
    return {} if record is None else {"comment": json.dumps(record, ensure_ascii=False, separators=(",", ":"))}


def read_record(path: str | Path) -> dict:
    """The object that a video of ours carries. UserError: the file cannot be read, or says nothing of that kind."""
    try:
        record = json.loads(read_metadata(path).get("comment", ""))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        record = None
    if not isinstance(record, dict) or record.get("program") != PROGRAM or not isinstance(record.get("settings"), dict):
        raise UserError(
            f"'{path}' holds no settings: only videos that sonic_demo.py has written do, if nobody cut them"
        )
    return record
