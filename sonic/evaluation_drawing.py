"""How an evaluation is shown: the plot of its curves, and the video beside its truth or portrait over a moving cursor.

What is drawn is a `sonic.evaluation.Report`; T frames, lengths in a face over its inter-ocular distance (eyes).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from sonic.media import VideoWriter
from sonic.motion import RIGID, face_size
from sonic.sync import MAX_OFFSET

VIDEO, TRUTH, WIDTH, PALE = "#1f6fc4", "#e07b1a", "#7aa93c", "#b9cfe6"
INK, GREY, LINE, SILENCE = "#333333", "#777777", "#bbbbbb", "#e9e9ee"
SAME_PERSON = 0.6  # distance of face descriptors; dlib's authors take less for one person

PANE = (512, 384)  # pixels; the pictures of the video are fitted into this
NARROWEST = 512  # pixels of the curve below them
EDGE, CAPTION, STRIP, BELOW = 16, 26, 150, 30  # pixels: white around and between, a line of text, the curve, its ticks


def text(value: float | None, form: str = ".3f") -> str:
    """A number as people read it, in plots and tables: - for what is not known."""
    return "-" if value is None or math.isnan(value) else format(value, form if value or "+" not in form else "g")


# ------------------------------------------------------------------------------------------------------------------ plot


def draw_plot(report, path: Path) -> None:
    """The curves over time, and what was made of them, as one picture."""
    found = report.result
    figure = _figure(figsize=(14, 9), dpi=110, layout="constrained")
    rows = [["opening"] * 4, ["width"] * 4, ["offsets", "head", "identity", "seams"]]
    axes = figure.subplot_mosaic(rows, height_ratios=[1.15, 1, 1.15])
    title = f"{report.video.name}    {found.num_frames} frames, {found.fps:g} fps, face in {found.face_share:.0%}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    _plot_mouth(axes["opening"], report, "opening", found.opening_by_truth or found.opening_by_speech)
    _plot_mouth(axes["width"], report, "width", found.width_by_truth)
    _plot_offsets(axes["offsets"], found)
    _plot_head(axes["head"], report)
    _plot_identity(axes["identity"], report)
    _plot_seams(axes["seams"], found)
    figure.savefig(path)


def _plot_mouth(axis, report, name: str, sync) -> None:
    _title(axis, f"mouth {name}" + (f"    r {text(sync.r, '.2f')}" if sync else ""), "seconds", "eyes")
    _curves(axis, report, name)
    axis.margins(x=0)
    _legend_above(axis, 1)


def _plot_offsets(axis, found) -> None:
    sync = found.opening_by_truth or found.opening_by_speech
    title = f"lip sync    offset {text(sync.offset, '+.0f')}, confidence {text(sync.confidence, '.2f')}"
    other = "truth" if found.opening_by_truth else "speech energy"
    _title(axis, title, "offset in frames (mouth late: +)", f"r with the {other}")
    offsets = np.arange(-MAX_OFFSET, MAX_OFFSET + 1)
    axis.axvline(0, color=LINE, lw=1, zorder=0)
    for name, curve, colour in (("opening", sync, VIDEO), ("width", found.width_by_truth, WIDTH)):
        if curve:
            axis.plot(offsets, curve.r_by_offset, color=colour, lw=1.6, label=name)
            axis.plot(curve.offset, curve.best_r, "o", color=colour, ms=6)
    axis.legend(loc="upper left", frameon=False, fontsize=9)


def _plot_head(axis, report) -> None:
    motion = report.result.motion
    title = f"head    buckets: {motion.translation_bucket:.0f} head, {motion.expression_bucket:.0f} expression"
    _title(axis, title, "seconds (solid: across, dashed: down)", "eyes")
    for result, colour, label in _video_over_truth(report):
        place = result.landmarks[:, RIGID].mean(axis=1) / np.nanmedian(face_size(result.landmarks))
        place = place - np.nanmean(place, axis=0)
        seconds = np.arange(len(place)) / result.fps
        axis.plot(seconds, place[:, 0], color=colour, lw=1.5, label=label)
        axis.plot(seconds, place[:, 1], color=colour, lw=1.2, ls=(0, (3, 1.5)))
    axis.margins(y=0.15)
    axis.legend(loc="upper right", frameon=False, fontsize=9, ncols=2)


def _plot_identity(axis, report) -> None:
    identity = report.result.identity
    if not identity:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "no portrait given,\nno identity", ha="center", va="center", color=GREY, fontsize=10)
        return
    _title(axis, f"distance to the portrait    {identity.distance:.2f}", "seconds")
    for result, colour, label in _video_over_truth(report):
        axis.plot(result.identity.seconds, result.identity.distances, color=colour, lw=1.5, label=label)
    axis.set_ylim(0, max(SAME_PERSON + 0.1, float(identity.distances.max()) * 1.05))
    axis.axhline(SAME_PERSON, color=LINE, lw=1, ls=":")
    axis.text(0, SAME_PERSON + 0.005, "another person, in photographs", fontsize=8, color=GREY, va="bottom")
    axis.legend(loc="lower right", frameon=False, fontsize=9, ncols=2)


def _plot_seams(axis, found) -> None:
    seams = found.seams
    if not seams:
        _title(axis, "change from frame to frame", "seconds", "mean difference, of 255")
        axis.plot(np.arange(1, found.num_frames) / found.fps, found.differences, color=VIDEO, lw=1.2)
        return
    title = f"seams    {seams.near_ratio:.2f} at phase 0"
    _title(axis, title, f"phase of the border, window {seams.window}", "change, over that beside it")
    colours = [VIDEO] + [PALE] * (seams.window - 1)
    axis.bar(np.arange(seams.window), seams.near_ratios, color=colours, width=0.8)
    axis.axhline(1, color=LINE, lw=1)


def _figure(**options):
    """A figure of its own, drawn in memory; matplotlib is imported where it is needed, as half a second of start."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure


def _title(axis, title: str, across: str = "", up: str = "") -> None:
    axis.set_title(title, loc="left", fontsize=11, color=INK)
    axis.set_xlabel(across, color=INK)
    axis.set_ylabel(up, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(LINE)
    axis.tick_params(colors=GREY, labelsize=9)
    axis.grid(color="#eeeeee", lw=0.8)
    axis.set_axisbelow(True)


def _legend_above(axis, height: float) -> None:
    """A legend on the line of the title, where it hides no curve."""
    axis.legend(loc="lower right", bbox_to_anchor=(1, height), ncols=3, frameon=False, fontsize=9, borderaxespad=0.1)


def _video_over_truth(report):
    """(evaluation, colour, name) of what there is, the video last, so that it lies on top."""
    both = ((report.truth_result, TRUTH, "truth"), (report.result, VIDEO, "video"))
    return [(result, colour, name) for result, colour, name in both if result]


def _curves(axis, report, name: str) -> None:
    """The mouth's curve over what it should follow, that at its mean and spread; silent stretches are shaded."""
    found = report.result
    edges = np.flatnonzero(np.diff(np.concatenate([[False], found.silent, [False]])))
    for number, (start, end) in enumerate(edges.reshape(-1, 2) / found.fps):
        axis.axvspan(start, end, color=SILENCE, lw=0, label="" if number else "silence")
    own, seconds = getattr(found, name), np.arange(found.num_frames) / found.fps
    other, label = found.truth_curves.get(name), f"{report.truth_kind} truth, scaled"
    if other is None and name == "opening":
        other, label = found.energy, "speech energy, scaled"
    if other is not None:
        scale = np.nanstd(own) / max(np.nanstd(other), 1e-9)
        other = np.nanmean(own) + (other - np.nanmean(other)) * scale
        axis.plot(seconds, other, color=TRUTH, lw=1.6, label=label)
    axis.plot(seconds, own, color=VIDEO, lw=1.8, label="video")


# ----------------------------------------------------------------------------------------------------------------- video


def write_side_by_side(report, sources: Mapping[str, Sequence[np.ndarray]], speech: np.ndarray, path: Path) -> None:
    """The sources (name: frames uint8 [T, H, W, 3]) beside each other, with sound, over the mouth's curve with a cursor."""
    sizes = [_fitted(source[0]) for source in sources.values()]
    across = sum(width for width, _ in sizes) + EDGE * (len(sizes) - 1)
    tall, width = max(height for _, height in sizes), max(across, NARROWEST) + 2 * EDGE
    height = EDGE + CAPTION + tall + STRIP
    corners, x = [], (width - across) // 2
    for pane_width, pane_height in sizes:
        corners.append((x, EDGE // 2 + CAPTION + (tall - pane_height) // 2))
        x += pane_width + EDGE
    backdrop, points = _backdrop(report, width, height, zip(sources, corners, strict=True))

    streams, shown = [iter(source) for source in sources.values()], [None] * len(sources)
    with VideoWriter(path, report.result.fps, width, height, speech) as writer:
        for point in points:
            picture = backdrop.copy()
            for pane, (stream, (x, y), (w, h)) in enumerate(zip(streams, corners, sizes, strict=True)):
                shown[pane] = next(stream, shown[pane])  # a truth may be one frame short
                picture[y : y + h, x : x + w] = _scaled(shown[pane], w, h)
            x, y = (round(float(value)) for value in point)
            cv2.line(picture, (x, height - STRIP + CAPTION), (x, height - BELOW), (150, 150, 150), 1)
            cv2.circle(picture, (x, y), 5, tuple(bytes.fromhex(VIDEO[1:])), -1, cv2.LINE_AA)
            writer.write(picture[None])


def _fitted(picture: np.ndarray) -> tuple[int, int]:
    """Width and height of a picture that fills a pane."""
    scale = min(PANE[0] / picture.shape[1], PANE[1] / picture.shape[0])
    return max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))


def _scaled(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    smaller = width < picture.shape[1]
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)


def _backdrop(report, width: int, height: int, captions) -> tuple[np.ndarray, np.ndarray]:
    """What does not move, uint8 [height, width, 3], and where the cursor stands in each frame: pixels [T, 2]."""
    found, dpi = report.result, 100
    figure = _figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    for name, (x, y) in captions:
        figure.text(x / width, 1 - (y - 7) / height, name, fontsize=11, color=INK, va="bottom")
    left, tall = EDGE + 4, STRIP - BELOW - CAPTION
    axis = figure.add_axes((left / width, BELOW / height, (width - left - EDGE) / width, tall / height))
    _title(axis, "mouth opening")
    axis.spines["left"].set_visible(False)
    axis.set_yticks([])
    _curves(axis, report, "opening")
    axis.margins(x=0, y=0.12)
    _legend_above(axis, 0.98)
    figure.canvas.draw()
    opening = np.nan_to_num(found.opening, nan=np.nanmin(found.opening))
    points = axis.transData.transform(np.stack([np.arange(found.num_frames) / found.fps, opening], axis=1))
    points[:, 1] = height - points[:, 1]
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy(), points
