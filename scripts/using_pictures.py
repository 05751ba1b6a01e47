"""Draws what the documents show of sonic-mini: the animation of the README, and the strips of docs/using.md, which tell what
the settings of sonic_demo.py do to the example portrait.

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
from sonic.media import VideoReader  # noqa: E402
from sonic.pipeline import SonicPipeline  # noqa: E402
from sonic.sound import load_audio  # noqa: E402

# Of each strip: the setting, its values, and the words for them.
STRIPS = {
    "motion": ("motion", {"mild": "mild", "moderate": "moderate", "intense": "intense"}),
    "expression": ("expression_bucket", {"bucket 5": 5, "predicted": None, "bucket 120": 120}),
    "audio-guidance": ("guidance_scale_audio", {"1": 1.0, "1.8": 1.8, "7": 7.0}),
    "seed": ("seed", {"seed 42": 42, "seed 1": 1, "seed 2": 2}),
}
BEGIN, SECONDS = 0.5, 0.8  # of the example speech: where it says something; two windows
SHOWN = 7  # frames of a row
LABEL = 92  # pixels at the left of a row
# Of the animation: faces that sonic-mini has not seen, which speak the same; its side in pixels, and every how manieth frame.
SPEAKERS = ("portrait.jpg", "clips/puppet_0004.mp4", "clips/puppet_0011.mp4")
SIDE, EVERY, QUALITY = 192, 2, 60


def strip(pipeline: SonicPipeline, speech: np.ndarray, setting: str, values: dict, made: dict) -> Image.Image:
    """Rows of frames, one for each value. `made` keeps what other strips can use again: the clip of all defaults."""
    features, rows = pipeline.extract_audio_features(speech), []
    usual = {"motion": "moderate", "expression_bucket": None, "seed": 42}
    default = usual[setting] if setting in usual else getattr(pipeline.settings, setting)
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


def animation(pipeline: SonicPipeline, speech: np.ndarray, path: Path) -> None:
    """The speakers beside each other, as a moving WebP."""
    features, rows = pipeline.extract_audio_features(speech), []
    for name in SPEAKERS:
        portrait = ROOT / "examples" / name
        if portrait.suffix == ".mp4":
            with VideoReader(portrait) as reader:
                portrait = Image.fromarray(reader.read(range(1))[0])
        video = pipeline.generate(portrait, features, crop=0.5)
        rows.append([Image.fromarray(frame).resize((SIDE, SIDE), Image.LANCZOS) for frame in video.frames[::EVERY]])
    first, *others = [
        Image.fromarray(np.concatenate([np.asarray(one) for one in row], axis=1)) for row in zip(*rows, strict=True)
    ]
    shown = round(1000 * EVERY / video.fps)
    first.save(path, save_all=True, append_images=others, duration=shown, loop=0, quality=QUALITY, method=6)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/using", help="folder for the JPEGs")
    flags = parser.parse_args(arguments)
    flags.output.mkdir(parents=True, exist_ok=True)
    begin = round(BEGIN * SAMPLE_RATE)
    whole = load_audio(ROOT / "examples/audio.wav")
    speech = whole[begin : begin + round(SECONDS * SAMPLE_RATE)]
    pipeline, made = SonicPipeline(), {}
    animation(pipeline, whole, flags.output / "animation.webp")
    for name, (setting, values) in STRIPS.items():
        path = flags.output / f"{name}.jpg"
        strip(pipeline, speech, setting, values, made).save(path, quality=85)
        print(f"{path}: {int(SECONDS * TICK_RATE)} frames each at {', '.join(values)}", flush=True)


if __name__ == "__main__":
    run(main)
