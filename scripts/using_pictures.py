"""Draws the strips of docs/using.md: what the settings of sonic_demo.py do, by sonic-mini on the example portrait.

    python scripts/using_pictures.py --output docs/using

Each strip has a row for each value: frames of the same speech, one after the other.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sonic.config import SAMPLE_RATE, TICK_RATE  # noqa: E402
from sonic.flags import Parser, run  # noqa: E402
from sonic.media import load_audio  # noqa: E402
from sonic.pipeline import SonicPipeline  # noqa: E402

# Of each strip: the setting, its values, and the words for them.
STRIPS = {
    "motion": ("motion", {"mild": "mild", "moderate": "moderate", "intense": "intense"}),
    "expression": ("expression_bucket", {"bucket 5": 5, "predicted": None, "bucket 120": 120}),
    "audio-guidance": ("guidance_scale_audio", {"1": 1.0, "3": 3.0, "7": 7.0}),
    "seed": ("seed", {"seed 42": 42, "seed 1": 1, "seed 2": 2}),
}
BEGIN, SECONDS = 0.5, 0.8  # of the example speech: where it says something; two windows
SHOWN = 7  # frames of a row
LABEL = 92  # pixels at the left of a row


def strip(pipeline: SonicPipeline, speech: np.ndarray, setting: str, values: dict, made: dict) -> Image.Image:
    """Rows of frames, one for each value. `made` keeps what other strips can use again: the clip of all defaults."""
    features, rows = pipeline.extract_audio_features(speech), []
    default = {"motion": "moderate", "expression_bucket": None, "guidance_scale_audio": 3.0, "seed": 42}[setting]
    for value in values.values():
        key = "default" if value == default else (setting, value)
        if key not in made:
            made[key] = pipeline.generate(ROOT / "examples/portrait.jpg", features, **{setting: value}).frames
        frames = made[key]
        rows.append(np.concatenate(frames[np.linspace(0, len(frames) - 1, SHOWN).round().astype(int)], axis=1))
    height, width = rows[0].shape[:2]
    sheet = Image.new("RGB", (LABEL + width, height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (label, row) in enumerate(zip(values, rows, strict=True)):
        sheet.paste(Image.fromarray(row), (LABEL, number * height))
        draw.text((LABEL - 6, (number + 0.5) * height), label, "black", anchor="rm", font_size=15)
    return sheet


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/using", help="folder for the JPEGs")
    flags = parser.parse_args(arguments)
    flags.output.mkdir(parents=True, exist_ok=True)
    begin = round(BEGIN * SAMPLE_RATE)
    speech = load_audio(ROOT / "examples/audio.wav")[begin : begin + round(SECONDS * SAMPLE_RATE)]
    pipeline, made = SonicPipeline(), {}
    for name, (setting, values) in STRIPS.items():
        path = flags.output / f"{name}.jpg"
        strip(pipeline, speech, setting, values, made).save(path, quality=85)
        print(f"{path}: {int(SECONDS * TICK_RATE)} frames each at {', '.join(values)}", flush=True)


if __name__ == "__main__":
    run(main)
