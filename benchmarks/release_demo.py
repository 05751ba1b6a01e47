"""The real model's sizes on a CPU: folders in the released layout, made with random weights, animate six frames.

    python benchmarks/release_demo.py WORK [--resolution 256] [--dtype fp32] [--num_inference_steps 2] [--offload none]

makes Stable Video Diffusion's and Whisper-tiny's folders in WORK (about 9 GB, shared with release_size.py) and from them
WORK/Sonic with unet.pth, audio2token.pth and audio2bucket.pth (about 3 GB), once, and runs `sonic_demo.py` on half a second of
the example speech. Prints the peak of its memory and its seconds. The picture is noise; sizes, files and memory are the real ones.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from pathlib import Path

import soundfile
import torch
from release_size import make_folders, peak_of

from sonic.checkpoints import open_checkpoint, save_released
from sonic.config import SAMPLES_PER_TICK
from sonic.files import atomic_folder
from sonic.flags import run
from sonic.weights import ROOT

FRAMES, FRAME_STEP = 6, 2


def make_released(work: Path) -> None:
    """The released files, in fp16, of a model that starts from the base folder."""
    make_folders(work)
    if not (work / "Sonic").is_dir():
        denoiser = open_checkpoint(work / "base", whisper_path=work / "whisper").load(torch.float16)
        with atomic_folder(work / "Sonic") as folder:
            save_released(folder, denoiser)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for models and video")
    parser.add_argument("--resolution", default="256", help="(default: %(default)s; the real one is 512)")
    parser.add_argument("--dtype", default="fp32", help="(default: %(default)s)")
    parser.add_argument("--num_inference_steps", default="2", help="(default: %(default)s; the real ones are 25)")
    parser.add_argument("--offload", default="none", help="(default: %(default)s)")
    flags = parser.parse_args()
    work = flags.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    # In a process of its own, whose memory is gone before the one that is measured begins.
    maker = multiprocessing.get_context("spawn").Process(target=make_released, args=(work,))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise SystemExit(maker.exitcode)
    speech, rate = soundfile.read(ROOT / "examples/audio.wav")
    soundfile.write(work / "speech.wav", speech[: FRAMES * FRAME_STEP * SAMPLES_PER_TICK], rate)
    command = [
        *(sys.executable, "sonic_demo.py", "--image", ROOT / "examples/portrait.jpg", "--audio", work / "speech.wav"),
        *("--checkpoint", work / "Sonic", "--base_model", work / "base", "--whisper_path", work / "whisper"),
        *("--output", work / "release.mp4", "--device", "cpu", "--dtype", flags.dtype, "--offload", flags.offload),
        *("--resolution", flags.resolution, "--num_inference_steps", flags.num_inference_steps),
    ]
    own, touched, seconds = peak_of([*map(str, command)])
    print(f"own memory {own:.1f} GB, with mapped files {touched:.1f} GB, {seconds:.0f} s")


if __name__ == "__main__":
    run(main)
