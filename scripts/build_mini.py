"""Builds the small model from nothing into checkpoints/sonic-mini: base model, Whisper and Sonic with random weights.

python scripts/build_mini.py [--output DIR] [--seed N]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere, without an install

from sonic.checkpoints import create_checkpoint
from sonic.config import PRESETS, SHIPPED
from sonic.weights import ROOT, atomic_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / SHIPPED, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    arguments = parser.parse_args()
    with atomic_folder(arguments.output) as folder:
        create_checkpoint(folder, PRESETS["mini"], arguments.seed)
    print(f"built {arguments.output}")


if __name__ == "__main__":
    main()
