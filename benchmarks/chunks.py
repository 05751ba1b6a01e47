"""What chunks of frames do to brightness and seams, of the example clips decoded by sonic-mini's VAE: the table of
docs/inference.md.

    python benchmarks/chunks.py

Each cell has a number for each clip. Both measures are held against those of the same frames decoded at once: where somebody
happens to move, neighbouring pictures differ without any chunks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere, without an install

import numpy as np
import torch

from sonic.animator import Animator, to_pictures
from sonic.config import SonicConfig
from sonic.dataset import pixels
from sonic.flags import run
from sonic.media import VideoReader
from sonic.metrics import find_seams, frame_differences
from sonic.pipeline import SonicPipeline
from sonic.training import encode_frames
from sonic.weights import ROOT

CHUNKS = ((8, 0), (8, 3), (8, 4), (10, 0), (10, 3), (10, 5))  # frames of a chunk, and how many the next has in common


def decoded(animator: Animator, clip: Path, frames: int, chunks: tuple[tuple[int, int], ...]) -> list[np.ndarray]:
    """The first frames of a clip through the VAE, at once and then in each kind of chunks: uint8 [frames, 128, 128, 3] each."""
    with torch.inference_mode(), VideoReader(clip) as reader:
        pictures = np.stack([picture for _, picture in reader.frames(range(frames), max_side=128)])
        base = animator.base
        latents = encode_frames(base, pixels(pictures)) * base.vae.config.scaling_factor
        return [
            to_pictures(torch.cat(list(animator.decode_pixels(latents, chunk, overlap))))
            for chunk, overlap in ((frames, 0), *chunks)
        ]


def strobe(made: np.ndarray, whole: np.ndarray) -> float:
    """The largest step of the brightness from one frame to the next, of 255, beyond that of the whole."""
    return np.abs(np.diff(made.mean((1, 2, 3)) - whole.mean((1, 2, 3)))).max()


def seam(made: np.ndarray, whole: np.ndarray, period: int) -> float:
    """Frame difference at every period-th border over that elsewhere, in units of the whole's."""
    there, usual = (find_seams(frame_differences(pictures), period).ratios[0] for pictures in (made, whole))
    return there / usual


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=3, help="of examples/clips (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=33, help="of each clip (default: %(default)s)")
    flags = parser.parse_args()
    animator = SonicPipeline(SonicConfig(device="cpu")).animator
    paths = sorted((ROOT / "examples/clips").glob("puppet_*.mp4"))[: flags.clips]
    clips = [decoded(animator, path, flags.frames, CHUNKS) for path in paths]
    print("| chunks of | in common | step of the brightness | seam measure | frames decoded per frame |")
    print("|" + "---|" * 5)
    for number, (chunk, overlap) in enumerate(CHUNKS, start=1):
        period = chunk - overlap
        strobes = ", ".join(f"{strobe(made[number], made[0]):.2f}" for made in clips)
        seams = ", ".join(f"{seam(made[number], made[0], period):.2f}" for made in clips)
        print(f"| {chunk} | {overlap} | {strobes} | {seams} | {chunk / period:.1f} |", flush=True)


if __name__ == "__main__":
    run(main)
