"""How fast are puppets drawn? Prints frames per second on one core; 500 at 128 pixels are the target.

python benchmarks/puppets.py --size 128
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere, without an install

import cv2
import numpy as np

from sonic.config import POSITIVE
from sonic.flags import Parser, run
from sonic.puppets import Identity, Pose, draw, random_motion, render_clip


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--size", type=POSITIVE, default=128, help="pixels on each side")
    parser.add_argument("--frames", type=POSITIVE, default=500, help="frames to draw")
    flags = parser.parse_args()

    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    who, motion = Identity.random(rng), random_motion(flags.frames, rng)
    motion.opening[:] = rng.uniform(0, 1, flags.frames)
    draw(who, Pose(), flags.size)  # paints what does not move
    start = time.perf_counter()
    render_clip(who, motion, flags.size)
    print(f"{flags.frames / (time.perf_counter() - start):.0f} frames/s at {flags.size} pixels")


if __name__ == "__main__":
    run(main)
