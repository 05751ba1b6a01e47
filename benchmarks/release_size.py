"""The real model's sizes on a CPU: made with random weights, trained for two steps, cut, and resumed.

    python benchmarks/release_size.py WORK [--resolution 256] [--num_frames 8]

makes Stable Video Diffusion's and Whisper-tiny's folders in WORK (about 9 GB, once), and runs `sonic_training.py` on two example
clips with `--train_modules audio --cache_latents`: one step and a checkpoint, then on from there to the second. Prints the peak of
memory and the seconds of each. Weights and clips are of no use; sizes, files and memory are the real ones. Needs about 20 GB of
RAM and 45 GB of disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere, without an install

import psutil
import torch

from sonic.checkpoints import create_base, create_whisper, training_checkpoints
from sonic.config import UserError
from sonic.files import atomic_folder
from sonic.flags import run
from sonic.presets import PRESETS
from sonic.weights import ROOT

CLIPS = ("puppet_0000.mp4", "puppet_0001.mp4")
STEPS = 2


def peak_of(command: list[str]) -> tuple[float, float, float]:
    """Runs a command: GB of its own memory and of all that it has mapped and touched at their peaks, and seconds."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    own = touched = 0

    def watch() -> None:
        nonlocal own, touched
        while process.poll() is None:
            try:
                memory = psutil.Process(process.pid).memory_info()
            except psutil.NoSuchProcess:
                return
            own, touched = max(own, memory.rss - memory.shared), max(touched, memory.rss)
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    watcher.join()
    if code:
        raise UserError(f"{command[1]} ended with exit code {code}")
    return own / 1e9, touched / 1e9, time.perf_counter() - begin


def make_folders(work: Path) -> None:
    """Stable Video Diffusion's folder, work/base, and Whisper-tiny's, work/whisper, with random weights; once."""
    torch.manual_seed(0)
    for name, create in (("base", create_base), ("whisper", create_whisper)):
        if not (work / name).is_dir():
            with atomic_folder(work / name) as folder:
                create(folder, PRESETS["svd-xt"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for models, data and run")
    parser.add_argument("--resolution", type=int, default=256, help="(default: %(default)s; the real one is 576)")
    parser.add_argument("--num_frames", type=int, default=8, help="(default: %(default)s; the real ones are 25)")
    flags = parser.parse_args()
    work = flags.work.resolve()
    make_folders(work)
    data = work / "videos"
    data.mkdir(exist_ok=True)
    for name in CLIPS:
        shutil.copy(ROOT / "examples/clips" / name, data / name)
    output = work / "run"
    shutil.rmtree(output, ignore_errors=True)
    command = [
        *(sys.executable, "sonic_training.py", "--model_path", work / "base", "--whisper_path", work / "whisper"),
        *("--data_root", data, "--output_dir", output, "--cache_dir", work / "cache", "--train_modules", "audio"),
        *("--cache_latents", "--mixed_precision", "bf16", "--gradient_checkpointing", "--validation_steps", "0"),
        *("--resolution", flags.resolution, "--num_frames", flags.num_frames, "--logging_steps", "1"),
        *("--num_workers", "1", "--save_steps", "1", "--checkpoints_total_limit", "1"),
        *("--resume_from_checkpoint", "latest"),
    ]
    print("| run to step | own memory, GB | with mapped files, GB | seconds |\n|---|---|---|---|", flush=True)
    for step in range(1, STEPS + 1):
        own, touched, seconds = peak_of([*map(str, command), "--max_train_steps", str(step)])
        print(f"| {step} | {own:.1f} | {touched:.1f} | {seconds:.0f} |", flush=True)
    (saved,) = training_checkpoints(output)
    size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file()) / 1e9
    print(f"{saved}: {size:.1f} GB")


if __name__ == "__main__":
    run(main)
