"""Builds checkpoints/sonic-mini from nothing: speech, puppets, base model, then training with sonic_training.py itself.

    python scripts/build_mini.py [--output DIR] [--work DIR] [--seed N]
    python scripts/build_mini.py --untrained --output DIR      # the same sizes with random weights, in a second

Each stage leaves its result in the work folder and is not done again, so an interrupted build goes on. Nothing is
downloaded but Debian's speech packages (scripts/make_speech.py). `build.json` in the output says how long every stage
took, on what, and what it measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere, without an install

import torch
from mini_vae import MEASURED
from safetensors.torch import load_file, save_file

from sonic.checkpoints import create_checkpoint, open_checkpoint, save_model
from sonic.config import SHIPPED, UserError
from sonic.files import atomic_folder
from sonic.flags import run
from sonic.presets import PRESETS
from sonic.run_log import read_log
from sonic.weights import ROOT

# What decides how good the model gets, and how long it takes.
CLIPS, SECONDS, SIZE = 3600, 2.4, 192
PROCESSES = 2  # draw puppets side by side, each into a folder and with a seed of its own, and prepare them
HEAD_AMPLITUDES, EXPRESSION_AMPLITUDES = (0.05, 5.0), (0.0, 6.0)
STEPS, FURTHER_STEPS = 4000, 24000
# glibc gives large blocks back at once and fetches them anew at every layer, which can take half of a step.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
TRAINING = {
    "optimizer": "muon",  # AdamW is slower, and under it the audio tokens come out nearly the same in every frame
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 50,
    "train_batch_size": 2,
    "mixed_precision": "bf16",  # a tenth faster than fp32, to the same losses
    "noise_draws": 3,
    "p_mean": "1.4,0.2",  # what sound and buckets ask for is decided under much noise, what a face looks like under little
    "face_loss_weight": 3,
    "lip_loss_weight": 12,
    "num_workers": 1,
    "logging_steps": 20,
    "validation_steps": 500,
    "save_steps": 500,
}
# The first training is under much noise, until sound and buckets are heard; its rate does not fall, as the second goes on from
# there, to little noise, where a likeness is lost. That one minds faces more: what brows do weighs little in a picture.
FAST = {"cache_latents": True, "compile": True, "num_workers": PROCESSES}
FIRST = TRAINING | FAST | {"lr_scheduler": "constant_with_warmup", "p_mean": "1.4,1.0"}
FURTHER = TRAINING | FAST | {"p_mean": "1.0,0.0", "p_std": 1.4, "face_loss_weight": 8, "ema_decay": 0.999}


class Build:
    """The stages, each a folder in `work`, and what is known of them."""

    def __init__(self, work: Path, seed: int):
        self.work, self.seed = work, seed
        self.notes = work / "build.json"
        self.known = json.loads(self.notes.read_text()) if self.notes.is_file() else {}
        self.known |= {"seed": seed, "machine": machine()}

    def stage(self, name: str, make) -> Path:
        """The folder that `make(folder)` fills, from an earlier call if there is one. What `make` returns is noted."""
        target = self.work / name
        if target.is_dir() and name in self.known:
            return target
        begin = time.perf_counter()
        print(f"--- {name}", flush=True)
        measured = make(target) or {}
        self.known[name] = {"seconds": round(time.perf_counter() - begin), **measured}
        self.notes.write_text(json.dumps(self.known, indent=1) + "\n")
        print(f"--- {name}: {self.known[name]}", flush=True)
        return target

    def speech(self, folder: Path) -> None:
        call("scripts/make_speech.py", folder)

    def clips(self, folder: Path) -> None:
        """Puppets in as many folders as there are processes to draw them."""
        with ThreadPoolExecutor(PROCESSES) as pool:
            for drawn in [pool.submit(self.draw, folder, part) for part in range(PROCESSES)]:
                drawn.result()

    def draw(self, folder: Path, part: int) -> None:
        seed = 100 + PROCESSES * self.seed + part
        call(
            *("-m", "sonic.puppets", "--output", folder / f"part-{part}", "--speech", self.work / "speech/training"),
            *("--clips", CLIPS // PROCESSES, "--seconds", SECONDS, "--size", SIZE, "--seed", seed),
            *("--head_amplitude", *HEAD_AMPLITUDES, "--expression_amplitude", *EXPRESSION_AMPLITUDES),
        )

    def vae_before(self, folder: Path) -> dict:
        """The VAE before its decoder goes on alone."""
        return self.train_vae(folder, "--decoder_steps", 0)

    def vae(self, folder: Path) -> dict:
        return self.train_vae(folder, "--of", self.work / "vae_before")

    def train_vae(self, folder: Path, *options) -> dict:
        call("scripts/mini_vae.py", folder, "--seed", self.seed, *options)
        return json.loads((folder / MEASURED).read_text())

    def start(self, folder: Path) -> None:
        """The complete checkpoint with that VAE and everything else random, in numbers that fp16 holds."""
        with atomic_folder(folder) as target:
            create_checkpoint(target, PRESETS["mini"], self.seed)
            for name in ("config.json", "diffusion_pytorch_model.safetensors"):
                (target / "base/vae" / name).write_bytes((self.work / "vae" / name).read_bytes())
            for part in ("base/vae", "base/image_encoder", "whisper"):
                halve(target / part)

    def training(self, folder: Path) -> dict:
        return self.train(folder, "start", STEPS, FIRST)

    def further(self, folder: Path) -> dict:
        return self.train(folder, f"training/checkpoint-{STEPS}", FURTHER_STEPS, FURTHER)

    def train(self, folder: Path, start: str, steps: int, flags: dict) -> dict:
        options = [part for name, value in flags.items() for part in (f"--{name}", value) if part is not True]
        call(
            *("sonic_training.py", "--model_path", self.work / start, "--data_root", self.work / "clips"),
            *("--cache_dir", self.work / "cache", "--output_dir", folder, "--max_train_steps", steps),
            *("--seed", self.seed, "--resume_from_checkpoint", "latest", *options),
        )
        # The stage's own clock has not seen what came before an interruption.
        seconds = max(row.get("trained_seconds", 0) for row in read_log(folder / "log.jsonl"))
        return {"seconds": round(seconds), "steps": steps}

    def ship(self, output: Path) -> None:
        """Base model, Whisper and trained weights in fp16; the base's own UNet is only described, it is not needed."""
        trained = open_checkpoint(self.work / f"further/checkpoint-{FURTHER_STEPS}")
        with atomic_folder(output) as target:
            here = replace(trained, base_model=Path("base"), whisper_path=Path("whisper"))
            save_model(target, trained.load().half(), here)
            for part in ("base/vae", "base/image_encoder", "base/scheduler", "whisper"):
                copy_files(self.work / "start" / part, target / part)
            copy_files(self.work / "start/base/unet", target / "base/unet", "config.json")
            (target / "build.json").write_text(json.dumps(self.known, indent=1) + "\n")


def halve(folder: Path) -> None:
    """Rounds the weights in a folder to fp16, before anything is trained on them: what is shipped is then the very same."""
    for path in folder.glob("*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)


def copy_files(source: Path, target: Path, pattern: str = "*") -> None:
    target.mkdir(parents=True)
    for path in source.glob(pattern):
        (target / path.name).write_bytes(path.read_bytes())


def call(*arguments) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True, env=os.environ | KEEP_MEMORY)


def machine() -> str:
    """Processor, cores that torch uses, and its version."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / SHIPPED, help="folder to write (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/mini", help="folder for what lies between")
    parser.add_argument("--seed", type=int, default=0, help="of weights, puppets and training (default: %(default)s)")
    parser.add_argument("--untrained", action="store_true", help="only create the model, with random weights")
    arguments = parser.parse_args()
    if arguments.untrained:
        with atomic_folder(arguments.output) as folder:
            create_checkpoint(folder, PRESETS["mini"], arguments.seed)
        print(f"built {arguments.output}, untrained")
        return
    work = (arguments.work / f"seed-{arguments.seed}").resolve()
    work.mkdir(parents=True, exist_ok=True)
    build = Build(work, arguments.seed)
    try:
        for name in ("speech", "clips", "vae_before", "vae", "start", "training", "further"):
            build.stage(name, getattr(build, name))
    except subprocess.CalledProcessError as error:
        raise UserError(f"a stage of the build failed: {error}") from error
    build.ship(arguments.output)
    size = sum(path.stat().st_size for path in arguments.output.rglob("*") if path.is_file()) / 1e6
    print(f"built {arguments.output}: {size:.1f} MB; see its build.json")


if __name__ == "__main__":
    run(main)
