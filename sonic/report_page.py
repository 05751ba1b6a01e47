"""The data report as one HTML page: no scripts, no other files, light and dark, readable on a phone.

Everything that comes from outside, names of files above all, goes through `text`.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from sonic.config import TICK_RATE
from sonic.pieces import Piece

if TYPE_CHECKING:
    from sonic.data_report import Example

FIRST_CHARTS = 7  # that are open; the others are folded
LISTED = 5000  # dropped pieces in the page's table; a browser takes long for more, and report.json has them all
CHART_WIDTH, CHART_HEIGHT = 320, 110
CURVE_WIDTH, CURVE_HEIGHT = 600, 56
OPEN_MOUTH = 0.15  # distances between the eyes; a mouth that opens less is not drawn as if it opened wide

STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #fff; --ink: #1d2327; --soft: #626b73; --line: #dfe3e6;
  --kept: #2a78b8; --dropped: #d9772b; --mouth: #b02e6a; --speech: #8a949c; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1d2226; --ink: #e6e9eb; --soft: #9aa5ad;
  --line: #343c42; --kept: #5fa8e0; --dropped: #ee9a55; --mouth: #f07db1; --speech: #7d8890; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.2rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: .2rem 0; font-size: 1.6rem; }
h2 { margin: 2.2rem 0 .6rem; font-size: 1.2rem; }
p { margin: .3rem 0 .8rem; }
.soft, figcaption, th, summary, footer { color: var(--soft); }
.facts { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.facts div { flex: 1 1 9rem; padding: .7rem .9rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.facts b { display: block; font-size: 1.4rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: .8rem; }
figure { margin: 0; padding: .7rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
figcaption { font-size: .9rem; overflow-wrap: anywhere; }
figcaption b { color: var(--ink); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11px; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 32rem), 1fr)); gap: .8rem; }
.strip { overflow-x: auto; margin-top: .4rem; }
.strip > div { min-width: min(30rem, var(--wide)); max-width: var(--wide); }
.strip img { display: block; width: 100%; height: auto; border-radius: 4px; }
.kept { fill: var(--kept); background: var(--kept); }
.dropped { fill: var(--dropped); background: var(--dropped); }
.mouth, .speech { fill: none; stroke-width: 1.6; vector-effect: non-scaling-stroke; stroke: var(--speech); }
.mouth { stroke: var(--mouth); }
.limit { stroke: var(--ink); stroke-dasharray: 3 3; }
.axis { stroke: var(--line); }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 .8em; border-radius: 2px; }
.key.line { height: 0; width: 1.4em; border-top: 2px solid var(--speech); background: none; vertical-align: middle; }
.key.line.m { border-color: var(--mouth); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { overflow-wrap: anywhere; min-width: 11rem; }
td.bar { width: 30%; min-width: 6rem; }
td.bar i { display: block; height: .8rem; margin-top: .3rem; border-radius: 2px; }
details { margin: .8rem 0; }
summary { cursor: pointer; margin-bottom: .6rem; }
footer { margin-top: 2rem; font-size: .85rem; }
"""

STEP_HELP = {
    "probe": "the file itself",
    "shots": "cut at scene changes",
    "faces": "one face, large enough, turned to the camera",
    "picture": "sharp, exposed, moving",
    "sound": "loud enough, speech, no music",
    "sync": "the mouth goes with the speech",
    "motion": "not more motion than a bucket holds",
    "crop": "a square around the face",
}


def text(value: object) -> str:
    """Anything as harmless HTML; what cannot be printed (line breaks, half characters, marks of direction) is spelt out."""
    plain = str(value)
    if not plain.isprintable():
        plain = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in plain)
    return html.escape(plain, quote=True)


def page(
    numbers: dict,
    names: Mapping[str, str],
    left_out: Sequence[Piece],
    examples: Mapping[str, Sequence[Example]],
    source: str,
) -> str:
    """The whole page. numbers: `data_report.summary`; names: of the histograms, in their order; left_out: every piece with a
    step; examples: kept and dropped ones."""
    charts = [_chart(title, numbers["histograms"][name]) for name, title in names.items()]
    more = "".join(charts[FIRST_CHARTS:])
    if more:
        more = f'<details><summary>Everything else that was measured</summary><div class="grid">{more}</div></details>'
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Data report: {text(source)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Data report</h1>
<p class="soft">{text(source)}</p>
{_facts(numbers)}
<h2>What was dropped, step by step</h2>
{_steps(numbers)}
<h2>How the pieces are spread</h2>
<p class="soft"><i class="key kept"></i>kept<i class="key dropped"></i>dropped; a dashed line is the threshold that dropped
pieces.</p>
<div class="grid">{"".join(charts[:FIRST_CHARTS])}</div>
{more}
{_examples("Kept pieces", examples["kept"], numbers["kept"]["pieces"])}
{_examples("Dropped pieces", examples["dropped"], numbers["dropped"]["pieces"])}
<h2>Every dropped piece</h2>
{_list(left_out)}
<details><summary>The thresholds of this preparation</summary>{_thresholds(numbers["thresholds"])}</details>
<footer>The same numbers are in report.json; every piece with all that was measured is in prepared.json.</footer>
</body>
</html>
"""


# -------------------------------------------------------------------------------------------------------------- numbers


def _facts(numbers: dict) -> str:
    kept, dropped = numbers["kept"], numbers["dropped"]
    cards = [
        (f"{numbers['videos_used']} of {numbers['videos']}", "videos used"),
        (f"{kept['pieces']} pieces", f"kept: {_time(kept['seconds'])}"),
        (f"{dropped['pieces']} pieces", f"dropped: {_time(dropped['seconds'])}"),
    ]
    if numbers["annotated"]:
        cards.append((f"{numbers['annotated']} pieces", "kept by --keep_all in spite of a step"))
    return f'<div class="facts">{"".join(f"<div><b>{text(a)}</b>{text(b)}</div>" for a, b in cards)}</div>'


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _steps(numbers: dict) -> str:
    total = max(numbers["kept"]["pieces"] + numbers["dropped"]["pieces"], 1)
    rows = [("kept", "", numbers["kept"], "kept")]
    rows += [(step, STEP_HELP[step], counts, "dropped") for step, counts in numbers["steps"].items()]
    lines = []
    for name, meaning, counts, kind in rows:
        share = 100 * counts["pieces"] / total
        bar = f'<i class="{kind}" style="width: {share:.1f}%"></i>' if counts["pieces"] else ""
        lines.append(
            f'<tr><td><b>{name}</b> <span class="soft">{meaning}</span></td><td class="n">{counts["pieces"]}</td>'
            f'<td class="n">{_time(counts["seconds"])}</td><td class="bar">{bar}</td></tr>'
        )
    head = '<tr><th>step</th><th class="n">pieces</th><th class="n">time</th><th></th></tr>'
    return f'<div class="scroll"><table>{head}{"".join(lines)}</table></div>'


def _thresholds(thresholds: dict) -> str:
    rows = "".join(f"<tr><td>--{text(name)}</td><td>{text(value)}</td></tr>" for name, value in thresholds.items())
    return f'<div class="scroll"><table>{rows}</table></div>'


def _chart(title: str, bins: dict) -> str:
    """One histogram: kept below, dropped on top of it."""
    edges, tallest = bins["edges"], max([a + b for a, b in zip(bins["kept"], bins["dropped"], strict=True)], default=0)
    if not tallest:
        return f"<figure><figcaption><b>{text(title)}</b><br>nothing was measured</figcaption></figure>"
    top, bottom = 14, CHART_HEIGHT - 16
    low, span = edges[0], edges[-1] - edges[0]
    shapes = []
    for (left, right), kept, dropped in zip(pairwise(edges), bins["kept"], bins["dropped"], strict=True):
        x, width = (left - low) / span * CHART_WIDTH, (right - left) / span * CHART_WIDTH
        y = float(bottom)
        for kind, count in (("kept", kept), ("dropped", dropped)):
            height = count / tallest * (bottom - top)
            y -= height
            if count:
                box = f'x="{x + 0.5:.1f}" y="{y:.1f}" width="{max(width - 1, 0.5):.1f}" height="{height:.1f}"'
                shapes.append(f'<rect class="{kind}" {box}/>')
    for limit in bins["thresholds"]:
        if edges[0] <= limit <= edges[-1]:
            x = (limit - low) / span * CHART_WIDTH
            shapes.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
    unmeasured = f"; {bins['unmeasured']} not measured" if bins["unmeasured"] else ""
    limits = ", ".join(f"{limit:g}" for limit in bins["thresholds"])
    return (
        f"<figure><figcaption><b>{text(title)}</b><br>most in a bar: {tallest}{unmeasured}"
        f"{f'; threshold {limits}' if limits else ''}</figcaption>"
        f'<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img" aria-label="{text(title)}">{"".join(shapes)}'
        f'<line class="axis" x1="0" x2="{CHART_WIDTH}" y1="{bottom}" y2="{bottom}"/>'
        f'<text x="0" y="{CHART_HEIGHT - 3}">{bins["range"][0]:.4g}</text>'
        f'<text x="{CHART_WIDTH}" y="{CHART_HEIGHT - 3}" text-anchor="end">{bins["range"][1]:.4g}</text></svg></figure>'
    )


# --------------------------------------------------------------------------------------------------------------- pieces


def _examples(title: str, examples: Sequence[Example], total: int) -> str:
    if not examples:
        return f'<h2>{title}</h2><p class="soft">There are none.</p>'
    which = "All of them." if len(examples) == total else f"{len(examples)} of {total}, chosen at random."
    keys = '<i class="key line m"></i>mouth opening<i class="key line"></i>energy of the speech'
    return (
        f'<h2>{title}</h2><p class="soft">{which}{keys}</p>'
        f'<div class="examples">{"".join(_example(one) for one in examples)}</div>'
    )


def _example(example: Example) -> str:
    piece = example.piece
    said = [f"<b>{text(piece.video)}</b>"]
    if piece.num_ticks:
        said.append(f"from {_clock(piece.start)}, {piece.seconds:.1f} s")
    if piece.step:
        said.append(f"<b>{text(piece.step)}</b>: {text(piece.reason)}")
    numbers = {"face_size": "face {:.0f} px", "sync_offset": "offset {:+.0f}", "sync_confidence": "confidence {:.2f}"}
    known = [
        form.format(value)
        for name, form in numbers.items()
        if (value := piece.numbers.get(name)) is not None and math.isfinite(value)
    ]
    if known:
        said.append(", ".join(known))
    shown = ""
    if example.strip:
        picture = base64.b64encode(example.strip).decode()
        name = text(f"{piece.video}, six pictures")
        shown = (
            f'<div class="strip"><div style="--wide: {example.width}px">'
            f'<img alt="{name}" loading="lazy" src="data:image/jpeg;base64,{picture}">{_curves(example)}</div></div>'
        )
    if example.trouble and example.trouble != piece.reason:
        said.append(text(example.trouble))
    return f"<figure><figcaption>{'<br>'.join(said)}</figcaption>{shown}</figure>"


def _clock(tick: int) -> str:
    """A tick as minutes and seconds of its video."""
    seconds = tick / TICK_RATE
    return f"{int(seconds // 60)}:{seconds % 60:04.1f}"


def _curves(example: Example) -> str:
    lines = "".join(
        f'<polyline class="{kind}" points="{_points(curve, least)}"/>'
        for kind, curve, least in (("speech", example.speech, 1.0), ("mouth", example.mouth, OPEN_MOUTH))
        if curve
    )
    if not lines:
        return ""
    return f'<svg viewBox="0 0 {CURVE_WIDTH} {CURVE_HEIGHT}" role="img" aria-label="mouth opening and speech">{lines}</svg>'


def _points(curve: Sequence[float], least: float) -> str:
    """A curve over the whole width; the top is its peak, or `least` where the peak is lower."""
    top, step = max(*curve, least), CURVE_WIDTH / max(len(curve) - 1, 1)
    return " ".join(
        f"{i * step:.0f},{CURVE_HEIGHT - 2 - value / top * (CURVE_HEIGHT - 6):.1f}" for i, value in enumerate(curve)
    )


def _list(pieces: Sequence[Piece]) -> str:
    if not pieces:
        return '<p class="soft">There are none.</p>'
    rows = "".join(_row(piece) for piece in pieces[:LISTED])
    cut = f"<p>The first {LISTED} of {len(pieces)}; report.json lists all.</p>" if len(pieces) > LISTED else ""
    head = (
        '<tr><th>video</th><th class="n">from</th><th class="n">seconds</th><th>step</th><th>reason</th><th>measure</th>'
        '<th class="n">measured</th><th class="n">threshold</th></tr>'
    )
    return f'{cut}<div class="scroll"><table>{head}{rows}</table></div>'


def _row(piece: Piece) -> str:
    numbers = [f"{value:.4g}" if value is not None else "" for value in (piece.measured, piece.threshold)]
    place = [_clock(piece.start), f"{piece.seconds:.1f}"] if piece.num_ticks else ["", ""]
    step = f"{piece.step} (kept)" if piece.kept else piece.step
    return (
        f'<tr><td class="name">{text(piece.video)}</td><td class="n">{place[0]}</td><td class="n">{place[1]}</td>'
        f"<td>{text(step)}</td><td>{text(piece.reason or '')}</td><td>{text(piece.measure or '')}</td>"
        f'<td class="n">{numbers[0]}</td><td class="n">{numbers[1]}</td></tr>'
    )
