"""What the lab claims of a model: each claim with its bar, what was measured, and whether it holds.

Every number comes from `results`, which maps an experiment's name to its clips' rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Results = dict[str, list[dict]]
BUCKETS = (16, 112)  # a motion bucket that asks for little, and one that asks for much
ROOM = 0.8  # margin of a portrait, in face sizes, where it is tried what more room than the usual 0.5 tells
OVERLAP = 2  # frames that neighbouring windows share, where it is tried what that is worth


# ------------------------------------------------------------------------------------------------------- statistics


def values(rows: list[dict], name: str) -> np.ndarray:
    """One number per clip; NaN where it could not be measured."""
    found = [row[name] for row in rows]
    return np.array([math.nan if value is None else value for value in found], dtype=float)


def curve(row: dict, name: str) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in row[name]], dtype=float)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    both = np.isfinite(a) & np.isfinite(b)
    return float(np.corrcoef(a[both], b[both])[0, 1])


def wrong_speech(rows: list[dict]) -> np.ndarray:
    """r of every clip's mouth with the opening that every other clip's speech asks for."""
    pairs = [(one, other) for one in rows for other in rows if one is not other and one["speaker"] != other["speaker"]]
    return np.array([correlation(curve(one, "opening"), curve(other, "truth_opening")) for one, other in pairs])


def spread(found: np.ndarray, digits: int = 2) -> str:
    """Median, and the range of the middle 80 %."""
    found = found[np.isfinite(found)]
    low, middle, high = np.percentile(found, [10, 50, 90])
    return f"{middle:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"


# ------------------------------------------------------------------------------------------------------------ claims


@dataclass
class Row:
    """One claim: what was asked, what was found, and whether it holds."""

    claim: str
    bar: str
    found: str
    holds: bool


def follows(results: Results) -> list[Row]:
    rows = results["main"]
    made = []
    for kind in ("all", "synthetic", "recorded"):
        own = [row for row in rows if kind in ("all", row["kind"])]
        opening, width = np.nanmedian(values(own, "opening_r")), np.nanmedian(values(own, "width_r"))
        aligned = np.mean(np.abs(values(own, "opening_offset")) <= 1)
        made.append(
            Row(
                f"it follows the sound ({kind}: {len(own)} clips)",
                "median r: opening ≥ 0.93, width ≥ 0.6; offset 0 ± 1 frame in 95 %",
                f"opening {spread(values(own, 'opening_r'), 3)}, width {spread(values(own, 'width_r'))}, "
                f"offset in {aligned:.0%}",
                bool(opening >= 0.93 and width >= 0.6 and aligned >= 0.95),
            )
        )
    wrong = wrong_speech(rows)
    made.append(
        Row(
            "… and not somebody else's",
            "mean r within ± 0.2",
            f"mean {wrong.mean():.2f}, standard deviation {wrong.std():.2f} over {len(wrong)} pairs",
            bool(abs(wrong.mean()) <= 0.2),
        )
    )
    return made


def closes(results: Results) -> list[Row]:
    rows = results["silence"]
    truth = [row["truth"] for row in rows]
    closed = values(truth, "silent_opening")
    reach = values(truth, "wide_opening") - closed
    excess = (values(rows, "silent_opening") - closed) / reach
    return [
        Row(
            f"silence closes the mouth ({len(rows)} clips)",
            "opening in silence over that of the truth's closed mouth: median within 10 % of the mouth's range",
            f"{spread(100 * excess, 1)} % of the range; {spread(values(rows, 'silent_opening'), 3)} against "
            f"{spread(closed, 3)} distances between the eyes",
            bool(np.nanmedian(np.abs(excess)) <= 0.1),
        )
    ]


def keeps(results: Results) -> list[Row]:
    rows = results["main"]
    own, truth = values(rows, "identity"), values([row["truth"] for row in rows], "identity")
    ratio = np.nanmean(own) / np.nanmean(truth)
    encoded = np.nanmean(values([row["truth_through_vae"] for row in rows], "identity")) / np.nanmean(truth)
    background = values(rows, "background_psnr")
    return [
        Row(
            "it keeps the person",
            "mean distance to the portrait ≤ 1.3 × the truth video's",
            f"{np.nanmean(own):.3f} against {np.nanmean(truth):.3f}: {ratio:.2f} ×; the truth through the VAE: {encoded:.2f} ×",
            bool(ratio <= 1.3),
        ),
        Row(
            "… and the wall behind",
            "median PSNR of the still background ≥ 28 dB",
            f"{spread(background, 1)} dB",
            bool(np.nanmedian(background) >= 28),
        ),
    ]


@dataclass
class BucketChange:
    """What becomes of motion and mouth from a low bucket to a high one."""

    other: str  # the side whose bucket stays
    growth: float  # of the side's own motion, times
    leak: float  # of the other side's motion, share
    r: float  # of the mouth's opening with the truth's

    def __str__(self) -> str:
        return f"{self.growth:.2f} ×; r {self.r:+.3f}; {self.other} {self.leak:+.0%}"


def bucket_change(low: list[dict], high: list[dict], side: str, other: str) -> BucketChange:
    growth, leak = (float(np.nanmedian(values(high, name) / values(low, name))) for name in (side, other))
    r = float(np.nanmedian(values(high, "opening_r")) - np.nanmedian(values(low, "opening_r")))
    return BucketChange(other, growth, leak - 1, r)


def bucket_rows(results: Results) -> list[Row]:
    made = []
    for side, other in (("translation", "expression"), ("expression", "translation")):
        change = bucket_change(*(results[f"{side} bucket {bucket}"] for bucket in BUCKETS), side, other)
        made.append(
            Row(
                f"{side} bucket works alone ({BUCKETS[0]} → {BUCKETS[1]})",
                f"{side} motion ≥ 3 ×; mouth r changes ≤ 0.05; {other} motion ≤ 25 %",
                str(change),
                bool(change.growth >= 3 and abs(change.r) <= 0.05 and abs(change.leak) <= 0.25),
            )
        )
    rows, room = results["predicted buckets"], results["predicted buckets with room"]
    for column, name in enumerate(("translation", "expression")):
        errors, plain = prediction_errors(rows, column)
        gain, with_room = (share_saved(*prediction_errors(found, column)) for found in (rows, room))
        absolute = 1 - np.abs(errors).mean() / np.abs(plain).mean()
        made.append(
            Row(
                f"{name} bucket can be predicted ({len(rows)} clips)",
                "squared error ≥ 30 % below that of the mean",
                f"{gain:.0%} below (mean absolute error {absolute:.0%} below: "
                f"{np.abs(errors).mean():.1f} against {np.abs(plain).mean():.1f}); "
                f"from the portrait with more room, --crop {ROOM}: {with_room:.0%}",
                bool(gain >= 0.3),
            )
        )
    return made


def prediction_errors(rows: list[dict], column: int) -> tuple[np.ndarray, np.ndarray]:
    """How far the buckets of all windows lie from what was predicted, and from their mean."""
    true, predicted = (
        np.concatenate([np.array(row[name])[:, column] for row in rows]) for name in ("true", "predicted")
    )
    return true - predicted, true - true.mean()


def share_saved(errors: np.ndarray, plain: np.ndarray) -> float:
    """How much smaller the squared errors are than those of the mean."""
    return 1 - float(np.square(errors).mean() / np.square(plain).mean())


def guidance(results: Results) -> tuple[np.ndarray, np.ndarray]:
    """Scales and median r at each."""
    found = sorted(
        (float(name.rpartition(" ")[2]), np.nanmedian(values(rows, "opening_r")))
        for name, rows in results.items()
        if name.startswith("audio guidance")
    )
    return np.array([scale for scale, _ in found]), np.array([r for _, r in found])


def guidance_row(results: Results, default: float) -> list[Row]:
    scales, r = guidance(results)
    best = scales[r.argmax()]
    at_default = float(np.interp(default, scales, r))
    return [
        Row(
            "audio guidance",
            "r rises with the scale, then falls; the default within 0.02 of the top",
            f"r {r[0]:.2f} at {scales[0]:g}, {r.max():.3f} at {best:g}, {r[-1]:.2f} at {scales[-1]:g}; "
            f"{at_default:.3f} at the default {default:g}",
            bool(0 < r.argmax() < len(r) - 1 and r.max() - at_default <= 0.02),
        )
    ]


def shift_rows(results: Results) -> list[Row]:
    with_shift, without = results["long"], results["long without shift fusion"]
    near, near_without = values(with_shift, "seam_near_largest").max(), values(without, "seam_near").max()
    plain, plain_without = values(with_shift, "seam_largest").max(), values(without, "seam").max()
    shared = values(results["long with overlap"], "seam_near_largest").max()
    drift = np.nanmean(values(with_shift, "identity_last")) / np.nanmean(values(with_shift, "identity_first")) - 1
    first, last = [], []
    for row in with_shift:
        mouth, truth = curve(row, "opening"), curve(row, "truth_opening")
        first.append(correlation(mouth[:125], truth[:125]))
        last.append(correlation(mouth[-125:], truth[-125:]))
    change = np.mean(last) / np.mean(first) - 1
    lasting = values(with_shift, "opening_r")
    brief = values(results["main"], "opening_r")[: len(lasting)]  # of the same faces and speakers
    return [
        Row(
            "30 s of speech do as well as 4 s",
            "mean r at most 0.05 below that of the 4 s clips of the same faces and speakers",
            f"r {lasting.mean():.3f} against {brief.mean():.3f}",
            bool(lasting.mean() >= brief.mean() - 0.05),
        ),
        Row(
            "shift fusion leaves no seams (30 s)",
            "frame difference at borders over that beside them ≤ 1.1 with shift, worse without",
            f"with: {near:.2f} at the worst phase; without: {near_without:.2f} "
            f"(over all other steps: {plain:.2f} and {plain_without:.2f}); with, and --overlap {OVERLAP}: {shared:.2f}",
            bool(near <= 1.1 < near_without),
        ),
        Row(
            "no drift (30 s)",
            "identity and r of the last 5 s within 5 % of the first",
            f"distance to the portrait {drift:+.1%}; r {np.mean(first):.3f} → {np.mean(last):.3f} ({change:+.1%})",
            bool(abs(drift) <= 0.05 and abs(change) <= 0.05),
        ),
    ]


def logs(results: Results, kind: str) -> Results:
    """What validation said during every "run" or "trial", by its name."""
    prefix = f"log of {kind} "
    return {name.removeprefix(prefix): results[name] for name in sorted(results) if name.startswith(prefix)}


def training_curves(results: Results) -> dict[str, dict[str, np.ndarray]]:
    """Per run: steps and median r of its checkpoints, and what its log says of validation."""
    found = {}
    for seed, checks in logs(results, "run").items():
        points = sorted(
            (int(name.rpartition("-")[2]), np.nanmedian(values(rows, "opening_r")))
            for name, rows in results.items()
            if name.startswith(f"run {seed} checkpoint-")
        )
        if len(points) < 2:
            continue
        found[seed] = {
            "steps": np.array([step for step, _ in points]),
            "r": np.array([r for _, r in points]),
            "checked": np.array([row["step"] for row in checks]),
            **{
                name: np.array([row[name] for row in checks], dtype=float)
                for name in ("validation_loss", "audio_gap_sigma_1", "audio_gap_sigma_3", "validation_token_spread")
            },
        }
    return found


def training_row(curves: dict) -> list[Row]:
    better = [one["r"][-1] > one["r"][0] for one in curves.values()]
    text = "; ".join(
        f"{seed}: r {one['r'][0]:.2f} → {one['r'][-1]:.3f}, gap {one['audio_gap_sigma_3'][0]:.4f} → "
        f"{one['audio_gap_sigma_3'][-1]:.4f}, loss {one['validation_loss'][0]:.3f} → {one['validation_loss'][-1]:.3f}"
        for seed, one in curves.items()
    )
    return [Row("more training, better", "r grows with the steps, three seeds", text, all(better) and len(better) >= 3)]
