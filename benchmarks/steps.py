"""Picture quality and lip sync against the number of denoising steps, for every solver, on the example clips.

    python benchmarks/steps.py                                             # sonic-mini, all steps and solvers
    python benchmarks/steps.py --clips 3 --seconds 2 --pictures /tmp/steps --interval 0.3,5

Portrait and speech are those of a puppet clip in examples/. Each line is a mean over the clips:

r         correlation of the mouth's opening with that of the clip the speech is taken from (sonic.metrics)
found     share of frames in which a face is found
identity  distance of the face descriptor to the portrait's; smaller is more alike
sharp     standard deviation of the picture's Laplacian over that of the portrait; 1 is as sharp, more is noisy
to 50     PSNR, dB, against the same clip and seed made with the most steps of Euler: how far the solver is from done
seconds   to make a clip, by the clock of a machine that may be doing other things
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere, without an install

import cv2
import numpy as np
from PIL import Image

from sonic.config import SAMPLE_RATE, SHIPPED, SOLVERS, SonicConfig
from sonic.flags import run
from sonic.media import VideoReader
from sonic.metrics import measure, portrait_face
from sonic.pipeline import SonicPipeline
from sonic.portrait import prepare_portrait
from sonic.sound import load_audio
from sonic.weights import ROOT

STEPS = (4, 6, 8, 12, 16, 25, 50)
COLUMNS = ("r", "found", "identity", "sharp", "to 50", "seconds")


class Clip:
    """A puppet's first picture as portrait, its speech, and how its mouth really moved."""

    def __init__(self, path: Path, seconds: float, pipeline: SonicPipeline):
        settings = pipeline.settings
        self.speech = load_audio(path)[: round(seconds * SAMPLE_RATE)]
        with VideoReader(path) as reader:
            self.portrait = Image.fromarray(reader.read([0])[0])
        pixels = prepare_portrait(self.portrait, settings.resolution, crop=settings.crop).pixels
        self.seen = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        self.face = portrait_face(self.seen)
        with np.load(path.with_suffix(".truth.npz")) as truth:
            self.curves = {name: truth[name] for name in ("opening", "width")}
        self.features = pipeline.extract_audio_features(self.speech)


def sharpness(picture: np.ndarray) -> float:
    return float(cv2.Laplacian(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.CV_64F).std())


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.square(found.astype(float) - wanted).mean(), 1e-9)))


def line(
    clip: Clip, pipeline: SonicPipeline, best: np.ndarray | None, **overrides
) -> tuple[np.ndarray, dict[str, float]]:
    """One clip made and measured; `best` is what it is held against."""
    begin = time.perf_counter()
    made = pipeline.generate(clip.portrait, clip.features, seed=1, **overrides)
    seconds = time.perf_counter() - begin
    curves = {name: curve[: len(made)] for name, curve in clip.curves.items()}
    found = measure(made.frames, clip.speech, made.fps, portrait=clip.face, truth_curves=curves)
    sharp = np.mean([sharpness(frame) for frame in made.frames]) / sharpness(clip.seen)
    values = (
        found.opening_by_truth.r,
        found.face_share,
        found.identity.distance,
        sharp,
        np.nan if best is None else psnr(made.frames, best),
        seconds,
    )
    return made.frames, dict(zip(COLUMNS, map(float, values), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=SHIPPED, help="(default: %(default)s)")
    parser.add_argument("--clips", type=int, default=6, help="of examples/clips (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each clip (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="(default: %(default)s)")
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=SOLVERS, help="(default: %(default)s)")
    parser.add_argument("--interval", help="LOW,HIGH: every line again with --guidance_interval")
    parser.add_argument("--pictures", type=Path, help="a folder for one frame of each line's first clip")
    parser.add_argument("--output", type=Path, help="a JSON file of all numbers")
    flags = parser.parse_args()
    pipeline = SonicPipeline(SonicConfig(checkpoint=flags.checkpoint))
    paths = sorted((ROOT / "examples/clips").glob("puppet_*.mp4"))[: flags.clips]
    clips = [Clip(path, flags.seconds, pipeline) for path in paths]
    most = max(flags.steps)
    best = [line(clip, pipeline, None, num_inference_steps=most, solver="euler")[0] for clip in clips]

    rows = []
    print(f"{len(clips)} clips of {flags.seconds:g} s, {flags.checkpoint}, {pipeline.device}")
    print(f"| solver | steps | {' | '.join(COLUMNS).replace('50', str(most))} |")
    print("|" + "---|" * (2 + len(COLUMNS)))
    for interval in filter(None, ("all", flags.interval)):
        more = {} if interval == "all" else {"guidance_interval": interval}
        for solver in flags.solvers:
            for steps in flags.steps:
                settings = {"num_inference_steps": steps, "solver": solver, **more}
                made = [line(clip, pipeline, one, **settings) for clip, one in zip(clips, best, strict=True)]
                means = {name: float(np.nanmean([numbers[name] for _, numbers in made])) for name in COLUMNS}
                name = solver + (f", guidance in {interval}" if more else "")
                rows.append({"solver": name, "steps": steps, **means})
                shown = " | ".join(f"{means[column]:.2f}" for column in COLUMNS)
                print(f"| {name} | {steps} | {shown} |", flush=True)
                if flags.pictures:
                    flags.pictures.mkdir(parents=True, exist_ok=True)
                    frames = made[0][0]
                    shot = Image.fromarray(frames[len(frames) // 2])
                    shot.save(flags.pictures / f"{solver}_{steps}_{interval.replace(',', '-')}.png")
    if flags.output:
        flags.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
