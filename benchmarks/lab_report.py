"""The lab's document out of the numbers that `lab.py` left: one row per claim, the tables behind it, and the plots.

Nothing in here is a result: every number comes from `results`, which maps an experiment's name to its clips' rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from lab_claims import (
    BUCKETS,
    ROOM,
    Results,
    Row,
    bucket_change,
    bucket_rows,
    closes,
    curve,
    follows,
    guidance,
    guidance_row,
    keeps,
    logs,
    shift_rows,
    spread,
    training_curves,
    training_row,
    values,
)
from matplotlib.figure import Figure
from PIL import Image

from sonic.weights import portable

GAP_OPEN = 0.002  # at sigma 3; untrained models were seen at -0.0009 to 0.0003
BLUE, ORANGE, GREEN, GREY = "#2b6cb0", "#dd6b20", "#2f855a", "#a0aec0"


Part = tuple[tuple[str, ...], Callable[[Results], list[Row]]]
PARTS: list[Part] = [
    (("main",), follows),
    (("silence",), closes),
    (("main",), keeps),
    (
        (
            *(f"{side} bucket {b}" for side in ("translation", "expression") for b in BUCKETS),
            *("predicted buckets", "predicted buckets with room"),
        ),
        bucket_rows,
    ),
]


def write_report(results: Results, checkpoint: Path, dtype: str, document: Path) -> None:
    """Writes `document` (NAME.md) and its plots (NAME/*.png) with what has been measured so far; what has not is named."""
    plots = document.with_suffix("")
    plots.mkdir(exist_ok=True)
    settings = json.loads((checkpoint / "sonic.json").read_text())["settings"]
    rows, missing = [], []
    parts = [
        *PARTS,
        (
            ("audio guidance 0", "audio guidance 10"),
            lambda found: guidance_row(found, settings["guidance_scale_audio"]),
        ),
        (("main", "long", "long without shift fusion", "long with overlap"), shift_rows),
    ]
    for needed, make in parts:
        if all(name in results for name in needed):
            rows += make(results)
        else:
            missing += [name for name in needed if name not in results]
    curves, trials = training_curves(results), logs(results, "trial")
    rows += training_row(curves) if curves else []
    missing += [] if curves else ["more training (--runs)"]
    missing += [] if trials else ["flags of training (--trials)"]

    lines = [
        f"# The lab: what {checkpoint.resolve().name} does, measured",
        "",
        "Faces and voices that no training run has met, held against the truth that puppets are drawn from. Written by",
        "`benchmarks/lab.py`; every number is measured, from the landmarks of the finished frames (`sonic/metrics.py`).",
        "Half of the voices are espeak-ng's, half are people's (telephone prompts); none of them was trained on.",
        f"Animated in {dtype}. Steps, guidance, contrast and floor were chosen by trials of the shipped weights on these",
        "clips; the weights measured here have met none of them.",
        "",
        f"Checkpoint: `{portable(checkpoint)}` ({build_note(checkpoint)}).",
        "Numbers are medians over clips with the range of the middle 80 % in brackets, unless they say otherwise.",
        "",
        "| claim | bar | measured | |",
        "|---|---|---|---|",
        *(f"| {row.claim} | {row.bar} | {row.found} | {'holds' if row.holds else '**missed**'} |" for row in rows),
        "",
    ]
    if missing:
        lines += [f"Not measured: {', '.join(dict.fromkeys(missing))}.", ""]
    if "main" in results:
        plot_clips(results["main"], plots / "clips.png")
        lines += [f"![mouths]({plots.name}/clips.png)", ""]
    if "audio guidance 0" in results:
        plot_guidance(results, settings["guidance_scale_audio"], plots / "guidance.png")
        lines += [f"![audio guidance]({plots.name}/guidance.png)", ""]
    lines += [*ablation_table(results), *contrast_section(results, settings), *room_section(results, settings["crop"])]
    if curves:
        plot_training(curves, plots / "training.png")
        steps = max(one["steps"][-1] for one in curves.values())
        lines += [
            "## More training",
            "",
            f"Runs from nothing of {steps} steps that differ in their seed (`benchmarks/trials.py`): weights, noise and order of",
            "the samples. The learning rate falls to 0 within them. `sonic-mini` itself was trained longer.",
            "",
            f"![more training]({plots.name}/training.png)",
            "",
        ]
    lines += init_table(trials)
    lines += lips_table(results)
    document.write_text("\n".join(lines))
    print(f"written: {document}")


def build_note(checkpoint: Path) -> str:
    """How it was built, in its own words."""
    path = checkpoint / "build.json"
    if not path.is_file():
        return "no record of how it was built"
    build = json.loads(path.read_text())
    minutes = {name: round(stage["seconds"] / 60) for name, stage in build.items() if isinstance(stage, dict)}
    stages = ", ".join(f"{name.replace('_', ' ')} {time} min" for name, time in minutes.items())
    quality = f"VAE {build['vae']['psnr_unseen_mean']:.1f} dB on unseen faces"
    return "; ".join([f"seed {build['seed']}", stages, build["machine"], quality, *build.get("notes", [])])


def contrast_section(results: Results, settings: dict) -> list[str]:
    """What contrast and floor make of the expression bucket."""
    plain, shown = ([f"{kind}expression bucket {bucket}" for bucket in BUCKETS] for kind in ("uncontrasted ", ""))
    if not {*plain, *shown} <= results.keys():
        return []
    clips = {row["clip"] for row in results[plain[0]]}
    lines = [
        "## Contrast",
        "",
        f"The expression bucket from {BUCKETS[0]} to {BUCKETS[1]} as above, on {len(clips)} of the clips. With",
        "`--expression_contrast 0` all guidance branches have the same expression bucket, as published, and with",
        "`--expression_floor 0` the UNet is asked for the bucket as it is.",
        "",
        "| contrast, floor | expression motion | opening r | change |",
        "|---|---|---|---|",
    ]
    own = f"{settings['expression_contrast']:g}, {settings['expression_floor']:g}"
    for label, names in ((own, shown), ("0, 0", plain)):
        low, high = ([row for row in results[name] if row["clip"] in clips] for name in names)
        cells = [
            " → ".join(spread(values(rows, name), 3) for rows in (low, high)) for name in ("expression", "opening_r")
        ]
        change = bucket_change(low, high, "expression", "translation")
        lines.append(f"| {label} | {' | '.join(cells)} | {change} |")
    return [*lines, ""]


def room_section(results: Results, crop: float) -> list[str]:
    """What the framing of a portrait does to the predicted translation bucket."""
    if not {"predicted buckets", "predicted buckets with room"} <= results.keys():
        return []
    true, tight, roomy = (
        np.mean([window[0] for row in results[name] for window in row[kind]])
        for name, kind in (
            ("predicted buckets", "true"),
            ("predicted buckets", "predicted"),
            ("predicted buckets with room", "predicted"),
        )
    )
    return [
        "## The room around a face",
        "",
        "Training squares have the margin of a portrait, however the head moves in them, as far as its path fits. Squares around",
        "the whole path would give a lively head more room than a calm one, and any portrait would pass for calm. So trained, the",
        f"predicted translation buckets have a mean of {tight:.1f} where the true ones have {true:.1f}.",
        f"With a margin of {ROOM} around the portrait instead of {crop} it is {roomy:.1f}.",
        "",
    ]


def ablation_table(results: Results) -> list[str]:
    """What each part is worth, switched off at sampling time."""
    names = [name for name in results if name.startswith("without")]
    if not names or "main" not in results:
        return []
    lines = [
        "## What each part is worth",
        "",
        f"Switched off while sampling, on the same {len(results[names[0]])} clips and seeds; the model was trained with all of",
        "them.",
        "",
        "| | opening r | width r | head motion | expression | identity | largest seam |",
        "|---|---|---|---|---|---|---|",
    ]
    clips = {row["clip"] for row in results[names[0]]}
    for name in ("main", *sorted(names)):
        rows = [row for row in results[name] if row["clip"] in clips]
        cells = [
            spread(values(rows, key), digits)
            for key, digits in (
                ("opening_r", 3),
                ("width_r", 3),
                ("translation", 3),
                ("expression", 3),
                ("identity", 3),
                ("seam_near_largest", 2),
            )
        ]
        lines.append(f"| {'everything on' if name == 'main' else name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def opened(checks: list[dict]) -> int | None:
    """The validated step from which on the audio gap at sigma 3 stays open, if it does."""
    step = None
    for row in reversed(checks):
        if row["audio_gap_sigma_3"] < GAP_OPEN:
            break
        step = row["step"]
    return step


def init_table(trials: Results) -> list[str]:
    """What a fitted audio2token is worth (`--init_audio2token`), with both kinds of Whisper positions."""
    trials = {name: checks for name, checks in trials.items() if name.startswith("init")}
    if not trials:
        return []
    lines = [
        "## A fitted start of audio2token",
        "",
        "Runs from nothing that differ in `--init_audio2token` and in the positions of the (random) Whisper:",
        "zero, as sonic-mini's, or sinusoidal, as every released Whisper's (`benchmarks/trials.py`). The gap is how much the",
        f"validation loss grows when the audio is exchanged; open: at sigma 3 it stays above {GAP_OPEN}.",
        "",
        "| run | gap open after | gap at sigma 1 / 3 at the end | token spread: start → end | validation loss |",
        "|---|---|---|---|---|",
    ]
    for name, checks in trials.items():
        first, last, step = checks[0], checks[-1], opened(checks)
        when = f"{step} steps" if step else f"not in {last['step']} steps"
        lines.append(
            f"| {name.removeprefix('init-')} | {when} | "
            f"{last['audio_gap_sigma_1']:.4f} / {last['audio_gap_sigma_3']:.4f} | "
            f"{first['validation_token_spread']:.2f} → {last['validation_token_spread']:.2f} | {last['validation_loss']:.3f} |"
        )
    return [*lines, ""]


def lips_table(results: Results) -> list[str]:
    """What a weight on the loss around the lips is worth (`--lip_loss_weight`)."""
    trials = {
        int(name.rpartition("-")[2]): (results[f"trial {name}"], checks[-1])
        for name, checks in logs(results, "trial").items()
        if f"trial {name}" in results
    }
    if not trials:
        return []
    steps = max(last["step"] for _, last in trials.values())
    lines = [
        "## The weight of the lips",
        "",
        f"Runs from nothing of {steps} steps that differ in `--lip_loss_weight` (`benchmarks/trials.py`).",
        "",
        "| weight | opening r | width r | identity | gap at sigma 1 / 3 | validation loss (unweighted) |",
        "|---|---|---|---|---|---|",
    ]
    for weight, (rows, last) in sorted(trials.items()):
        cells = [spread(values(rows, key), 3) for key in ("opening_r", "width_r", "identity")]
        gaps = f"{last['audio_gap_sigma_1']:.4f} / {last['audio_gap_sigma_3']:.4f}"
        lines.append(f"| {weight} | {' | '.join(cells)} | {gaps} | {last['validation_loss']:.3f} |")
    return [*lines, ""]


# -------------------------------------------------------------------------------------------------------------- plots


def save_plot(figure: Figure, path: Path) -> None:
    """As a picture with a palette: a plot has few colours, and takes a quarter of the bytes so."""
    figure.savefig(path, dpi=90)
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(64)
    few.save(path, optimize=True)


def plot_clips(rows: list[dict], path: Path) -> None:
    """Measured and drawn mouth openings of four clips: the best, two between, and the worst."""
    order = np.argsort(values(rows, "opening_r"))
    chosen = [rows[order[place]] for place in (-1, len(order) * 2 // 3, len(order) // 3, 0)]
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axis, row in zip(figure.subplots(len(chosen), sharex=True), chosen, strict=True):
        seconds = np.arange(len(row["opening"])) / 25
        for name, colour, label in (("truth_opening", ORANGE, "drawn truth"), ("opening", BLUE, "animated")):
            drawn = curve(row, name)
            axis.plot(seconds, drawn / np.nanpercentile(drawn, 98), color=colour, label=label, lw=1.6)
        axis.set_title(f"clip {row['clip']}, {row['speaker']}: r {row['opening_r']:.3f}", fontsize=10, loc="left")
        axis.set_yticks([])
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.axes[0].legend(ncols=2, frameon=False, loc="upper right", fontsize=9)
    figure.axes[-1].set_xlabel("seconds")
    figure.suptitle("Mouth opening, each curve over its own 98th percentile")
    save_plot(figure, path)


def plot_guidance(results: Results, default: float, path: Path) -> None:
    scales, r = guidance(results)
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.plot(scales, r, "o-", color=BLUE)
    axis.axvline(default, color=GREY, ls="--", lw=1)
    axis.annotate("default", (default, r.min()), xytext=(4, 0), textcoords="offset points", color="#4a5568", fontsize=9)
    axis.set(xlabel="audio guidance", ylabel="median r of the opening")
    axis.spines[["top", "right"]].set_visible(False)
    save_plot(figure, path)


def plot_training(curves: dict, path: Path) -> None:
    """r, audio gap and validation loss against steps, one line per seed."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    for (seed, one), colour in zip(curves.items(), (BLUE, ORANGE, GREEN), strict=False):
        panels[0].plot(one["steps"], one["r"], "o-", color=colour, label=seed)
        panels[1].plot(one["checked"], one["audio_gap_sigma_3"], color=colour)
        panels[2].plot(one["checked"], one["validation_loss"], color=colour)
    for axis, title in zip(panels, ("median r of the opening", "audio gap at sigma 3", "validation loss"), strict=True):
        axis.set(title=title, xlabel="steps")
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    save_plot(figure, path)
