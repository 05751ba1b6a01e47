"""What a preparation gives: clips for training, and for a person what became of every video."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field

from sonic.clips import Clip
from sonic.config import TICK_RATE, UserError
from sonic.pieces import Piece, Screening, by_step
from sonic.track_cache import VERSION


@dataclass
class Report:
    """How much work a preparation did, and how much of an earlier one it could use."""

    tracks_made: int = 0
    tracks_reused: int = 0
    features_made: int = 0
    features_reused: int = 0

    @staticmethod
    def sum(reports: Sequence[Report]) -> Report:
        """The work of several processes together."""
        return Report(*(sum(counts) for counts in zip(*(astuple(one) for one in reports), strict=True)))


@dataclass
class PreparedData:
    """What training reads: the usable clips, all pieces with what was measured, and each unusable video with its reason."""

    clips: list[Clip] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)  # of all videos, kept and dropped
    report: Report = field(default_factory=Report)

    def table(self) -> str:
        """One line per video that was left out, and a summary, as plain text."""
        kept = self.clips or [piece for piece in self.pieces if piece.kept]
        videos = len({one.video for one in kept})
        seconds = sum(one.num_ticks for one in kept) / TICK_RATE
        lines = [f"{videos} videos used: {len(kept)} clips, {seconds:.1f} s; {len(self.left_out)} videos left out"]
        dropped = [piece for piece in self.pieces if not piece.kept]
        if dropped:
            counts = ", ".join(f"{step} {count}" for step, count in by_step(dropped).items() if count)
            lines[0] += f"; {len(dropped)} pieces dropped ({counts})"
        # A name may hold a line break, which must not break the table.
        names = [repr(name)[1:-1] for name, _ in self.left_out]
        column = min(max(map(len, names), default=0), 60)
        lines += [f"  {name:<{column}}  {reason}" for name, (_, reason) in zip(names, self.left_out, strict=True)]
        return "\n".join(lines)


class NothingUsable(UserError):
    """All videos were left out. `data` says why."""

    def __init__(self, message: str, data: PreparedData):
        super().__init__(message)
        self.data = data


def listing(data: PreparedData, videos: list[str], screening: Screening, extractor) -> str:
    """prepared.json: every video with what is used of it, or why nothing is; all pieces; the thresholds."""
    reasons = dict(data.left_out)
    rows = [{"video": name, "used": name not in reasons} for name in videos]
    kept: dict[str, list[dict]] = {}
    for piece in data.pieces:
        if piece.kept:
            facts = {"name": f"{piece.video}@{piece.start}", "start": piece.start, "num_ticks": piece.num_ticks}
            kept.setdefault(piece.video, []).append(facts)
    for row in rows:
        row |= {"clips": kept[row["video"]]} if row["used"] else {"reason": reasons[row["video"]]}
    facts = {
        "version": VERSION,
        "extractor": extractor.name if extractor else None,
        "screening": asdict(screening),
        "videos": rows,
        "pieces": [piece.to_json() for piece in data.pieces],
    }
    return json.dumps(facts, indent=1) + "\n"
