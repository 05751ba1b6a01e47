"""Training runs at the smallest size: their flags, what they leave, and the script in a process of its own."""

import json
import os
import subprocess
import sys
import time

import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import ROOT
from safetensors.torch import load_file
from torch.utils.data import default_collate

from sonic.checkpoints import PARTS, load_base, load_whisper, open_checkpoint
from sonic.dataset import SonicDataset
from sonic.prepare import prepare
from sonic.training import Encoders, draw, with_model_defaults
from sonic.training_config import TrainingConfig


def fresh():
    """accelerate keeps its state for the process's life; after this, the next run is the first again."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def flags(tiny, clips, cache, output, **more):
    """Arguments of a short run."""
    given = {
        "model_path": tiny,
        "data_root": clips,
        "cache_dir": cache,
        "output_dir": output,
        "learning_rate": 1e-3,
        "max_train_steps": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "validation_steps": 0,
        "num_workers": 0,
        **more,
    }
    switches = [f"--{name}" for name, value in given.items() if value is True]
    return switches + [text for name, value in given.items() if value is not True for text in (f"--{name}", str(value))]


def losses(output):
    """Loss, loss of the buckets and norm of the gradient by step, of a run's log."""
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {row["step"]: (row["loss"], row["bucket_loss"], row["grad_norm"]) for row in rows if "loss" in row}


def weights(checkpoint):
    """A checkpoint's tensors by name."""
    return {
        f"{part}.{name}": tensor
        for part in PARTS
        for name, tensor in load_file(checkpoint / f"{part}.safetensors").items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def make_parts(tiny, clips, cache):
    start = open_checkpoint(tiny)
    config = with_model_defaults(TrainingConfig(data_root=str(clips)), start.settings)
    whisper = load_whisper(start.whisper_path)
    data = prepare(clips, cache, whisper, num_frames=4, frame_step=1, num_workers=0, progress=False)
    return start, config, data, Encoders(load_base(start.base_model), torch.device("cpu"))


def fixed_batch(parts, size=2):
    _, config, data, encoders = parts
    dataset = SonicDataset(data.clips, num_frames=4, frame_step=1, resolution=64, clip_size=28, seed=0)
    clip = encoders(default_collate([dataset[number] for number in range(size)]))
    return clip, draw(config, list(range(size)), clip.latents.shape[1:])


def start(arguments, cwd, launcher=(), **environment):
    """The training script in a process of its own; its output goes to `cwd`/printed.txt.

    One thread: at this size more of them only wait for each other, for seconds per step where cores are shared.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *launcher, ROOT / "sonic_training.py", *arguments]
    with (cwd / "printed.txt").open("a") as printed:
        return subprocess.Popen(command, cwd=cwd, env=environment, stdout=printed, stderr=subprocess.STDOUT)


def finish(process, cwd):
    """Waits for the end and gives what was printed."""
    try:
        process.wait(timeout=300)
    finally:
        process.kill()  # nothing happens to one that has ended
    printed = (cwd / "printed.txt").read_text()
    assert process.returncode == 0, printed
    return printed


def wait_for(path, process):
    """Returns when the path exists, or when it will not any more."""
    until = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
