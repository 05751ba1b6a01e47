"""How fast are puppets drawn, and does the ordinary face tracker see what was drawn?

    python benchmarks/puppets.py --size 128
    python benchmarks/puppets.py --identities 200      # the second question, too: some minutes

Prints frames per second on one core (500 at 128 pixels are the target). With `--identities`: the share of frames in which the
tracker of the data path has the face (target 99.5 %), and how the opening that its landmarks show correlates with the drawn one
(target 0.9), of as many random puppets, each saying two seconds of the example speech.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere, without an install

import cv2
import numpy as np
from tqdm import tqdm

from sonic.config import POSITIVE, SAMPLE_RATE, TICK_RATE, WHOLE
from sonic.flags import Parser, run
from sonic.metrics import follow
from sonic.motion import mouth_opening
from sonic.puppets import Identity, Liveliness, Pose, choose_excerpt, draw, random_motion, render_clip
from sonic.sound import load_audio
from sonic.weights import ROOT

SECONDS = 2.0


def speed(size: int, frames: int) -> float:
    """Frames per second that one core draws of one puppet."""
    rng = np.random.default_rng(0)
    who, motion = Identity.random(rng), random_motion(frames, rng)
    motion.opening[:] = rng.uniform(0, 1, frames)
    draw(who, Pose(), size)  # paints what does not move
    start = time.perf_counter()
    render_clip(who, motion, size)
    return frames / (time.perf_counter() - start)


def seen(size: int, identity: int, speech: np.ndarray) -> tuple[float, float]:
    """Of one random puppet: the share of frames with a face, and r of the opening seen and the opening drawn."""
    rng = np.random.default_rng([1, identity])
    who = Identity.random(rng)
    excerpt, _ = choose_excerpt(speech, round(SECONDS * SAMPLE_RATE), rng)
    ordinary = Liveliness(head=1.0, expression=np.ones(round(SECONDS * TICK_RATE)))
    motion = ordinary.motion(excerpt, rng)
    opening = mouth_opening(follow(render_clip(who, motion, size))[0])
    found = np.isfinite(opening)
    r = np.corrcoef(opening[found], motion.opening[found])[0, 1] if found.sum() > 1 else np.nan
    return found.mean(), r


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--size", type=POSITIVE, default=128, help="pixels on each side")
    parser.add_argument("--frames", type=POSITIVE, default=500, help="frames to draw")
    parser.add_argument("--identities", type=WHOLE, default=0, help="puppets that are given to the face tracker")
    flags = parser.parse_args()

    cv2.setNumThreads(1)
    print(f"{speed(flags.size, flags.frames):.0f} frames/s at {flags.size} pixels")
    if flags.identities:
        speech = load_audio(ROOT / "examples/audio.wav")
        found = np.array([seen(flags.size, number, speech) for number in tqdm(range(flags.identities), disable=None)])
        shares, rs = found.T
        low, middle = np.nanpercentile(rs, [5, 50])
        print(
            f"{flags.identities} identities: a face in {shares.mean():.2%} of the frames; opening seen against drawn: "
            f"r {np.nanmean(rs):.3f} on average, median {middle:.3f}, {low:.3f} at the 5th percentile"
        )


if __name__ == "__main__":
    run(main)
