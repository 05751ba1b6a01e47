"""What choices of training are worth, and chance: short runs of sonic_training.py from nothing that differ in one thing.

    python benchmarks/trials.py outputs/mini/seed-0 [--only NAMES] [--threads N]

`--init_audio2token`, with the zero positions of sonic-mini's Whisper and with the usual sinusoidal ones; `--lip_loss_weight`; the
seed of weights, noise and order. Start and clips are those of a build (`scripts/build_mini.py`), its VAE serves all. Each trial
is a run folder in `--output`, from which `lab.py --trials` takes its numbers, or `lab.py --runs` for the seeds; one that was cut
goes on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, without an install

from build_mini import KEEP_MEMORY, TRAINING, halve
from safetensors.torch import load_file, save_file
from transformers.models.whisper.modeling_whisper import sinusoids

from sonic.checkpoints import create_checkpoint
from sonic.files import atomic_folder
from sonic.flags import run
from sonic.presets import PRESETS
from sonic.weights import ROOT

POSITIONS = "model.encoder.embed_positions.weight"
FITTED = {"init_audio2token": True}
STEPS = 600
SEEDS = (0, 1, 2)
# name: (start, flags that differ from the build's)
TRIALS: dict[str, tuple[str, dict]] = {
    "init usual positions": ("usual", {}),
    "init usual positions, fitted": ("usual", FITTED),
    "init zero positions": ("start", {}),
    "init zero positions, fitted": ("start", FITTED),
    **{f"lips {weight}": ("start", {"lip_loss_weight": weight}) for weight in (1, 4, 12)},
    **{f"seed {seed}": (f"seed-{seed}", {"seed": seed, "save_steps": 150}) for seed in SEEDS},
}


def usual_start(start: Path, target: Path) -> None:
    """The same start, but that its Whisper has the sinusoidal positions that a released Whisper has."""
    if target.is_dir():
        return
    with atomic_folder(target) as folder:
        shutil.copytree(start, folder, dirs_exist_ok=True)
        path = folder / "whisper/model.safetensors"
        tensors = load_file(path)
        tensors[POSITIONS] = sinusoids(*tensors[POSITIONS].shape).to(tensors[POSITIONS])
        save_file(tensors, path)


def seed_start(start: Path, target: Path, seed: int) -> None:
    """A start with other random weights, but the same VAE."""
    if target.is_dir():
        return
    with atomic_folder(target) as folder:
        create_checkpoint(folder, PRESETS["mini"], seed)
        shutil.copytree(start / "base/vae", folder / "base/vae", dirs_exist_ok=True)
        for part in ("base/image_encoder", "whisper"):
            halve(folder / part)


def make_start(name: str, start: Path, output: Path) -> Path:
    """The folder a trial starts from, made if it needs one of its own."""
    if name == "start":
        return start
    target = output / f"start-{name}"
    if name == "usual":
        usual_start(start, target)
    else:
        seed_start(start, target, int(name.removeprefix("seed-")))
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, help="work folder of a build, with start/ and clips/")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/trials", help="folder for the runs")
    parser.add_argument("--only", nargs="*", help="trials whose name begins so")
    parser.add_argument("--threads", type=int, help="of torch, when several calls run side by side")
    arguments = parser.parse_args()
    build, output = arguments.build.resolve(), arguments.output.resolve()
    environment = os.environ | KEEP_MEMORY
    if arguments.threads:
        environment["OMP_NUM_THREADS"] = str(arguments.threads)
    for name, (start, flags) in TRIALS.items():
        if arguments.only and not any(name.startswith(part) for part in arguments.only):
            continue
        own_start = make_start(start, build / "start", output)
        folder = output / name.replace(" ", "-").replace(",", "")
        options = TRAINING | {"validation_steps": 50, "save_steps": STEPS, "max_train_steps": STEPS} | flags
        command = [
            *(sys.executable, "sonic_training.py", "--model_path", own_start, "--data_root", build / "clips"),
            *("--output_dir", folder, "--cache_dir", output / f"cache-{start}", "--resume_from_checkpoint", "latest"),
        ]
        for flag, value in options.items():
            command += [f"--{flag}"] if value is True else [f"--{flag}", value]
        print(f"--- {name}", flush=True)
        subprocess.run([str(part) for part in command], cwd=ROOT, check=True, env=environment)


if __name__ == "__main__":
    run(main)
