"""What a three-branch call of the UNet with sound costs, against three branches of diffusers' own UNet, which hears nothing.

    python benchmarks/inference.py --size cpu                              # two cores; the target is at most 1.0
    python benchmarks/inference.py --size cpu --compile                    # at most 0.67
    python benchmarks/inference.py --size release --dtype fp16 --compile --video     # a GPU: 512 px, 25 frames, 25 steps

stock     diffusers' UNetSpatioTemporalConditionModel, a batch of three clips, eager
ours      Branches, as sonic_demo.py runs them: keys and values kept
again     the same with --key_memory 0: keys and values made in every call
compiled  ours with --compile

Weights are random and inputs are noise: both cost the same as real ones. The cases take turns; what is said of them against stock
is the median over the turns of the ratio within one turn, by the clock and, on a CPU, by CPU seconds of this process, which other
work on the machine disturbs less. The rate of matrix products is measured in the same run; operations are counted by torch's
FlopCounterMode. --video adds a whole video, decoded: seconds of compute per second of video, and the peak of memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere, without an install

import numpy as np
import torch
from common import denoiser_of, matrix_rate, sizes, timed
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from torch.utils.flop_counter import FlopCounterMode

from sonic.animator import Animator
from sonic.blocks import compile_unet, lay_out
from sonic.checkpoints import BaseModels
from sonic.config import KEY_MEMORY, TICK_RATE, Settings
from sonic.denoiser import Portrait
from sonic.flags import run
from sonic.guided import Branches, Speech
from sonic.memory import used_memory
from sonic.pipeline import DTYPES
from sonic.presets import Preset

IMAGE_SIDE = {"cpu": 256, "mini": 128, "release": 512}  # pixels
WANTED = [0, 1, 2]


class Case:
    """A way to make one call, and what it took in each turn."""

    def __init__(self, name: str, call: Callable[[], None]):
        self.name, self.call = name, call
        self.clock: list[float] = []
        self.busy: list[float] = []

    def turn(self, device: torch.device) -> None:
        begin = time.process_time()
        self.clock.append(timed(self.call, device))
        self.busy.append(time.process_time() - begin)


def noise(preset: Preset, frames: int, side: int, device: torch.device, dtype: torch.dtype) -> tuple[Portrait, Speech]:
    """A portrait and a speech of so many frames, with latents of `side`."""
    channels, width = preset.vae["latent_channels"], preset.unet["cross_attention_dim"]
    still = Portrait(torch.randn(1, channels, side, side), torch.randn(1, width), torch.rand(1, 1, 8 * side, 8 * side))
    tokens = torch.randn(frames, preset.audio_tokens, width, device=device, dtype=dtype)
    speech = Speech(tokens, tokens[0], torch.full((frames, 2), 32.0, device=device), fps=12.5)
    return Portrait(*(part.to(device) for part in (still.latent, still.clip, still.mask))), speech


def make_cases(flags, preset: Preset, frames: int, side: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    still, speech = noise(preset, frames, side, device, dtype)
    x, sigma, indices = torch.randn(frames, *still.latent.shape[1:], device=device), torch.ones((), device=device), []
    indices = list(range(frames))

    stock = UNetSpatioTemporalConditionModel(**preset.unet).eval().requires_grad_(False).to(device, dtype)
    sample = torch.cat([x, still.latent.expand(frames, -1, -1, -1)], dim=1).expand(3, -1, -1, -1, -1).to(dtype)
    token, ids = still.clip[:, None].expand(3, -1, -1).to(dtype), torch.tensor([[12.0, 32.0, 32.0]] * 3, device=device)
    cases = [Case("stock", lambda: stock(sample, torch.zeros(3, device=device), token, ids, return_dict=False))]

    denoiser = denoiser_of(preset).eval().requires_grad_(False).to(device, dtype)
    lay_out(denoiser.unet)
    for name, key_memory in (("ours", KEY_MEMORY), ("again", 0.0)):
        branches = Branches(denoiser, still, speech, key_memory)
        cases.append(Case(name, lambda branches=branches: branches(x, sigma, indices, WANTED)))
    if flags.compile:
        compiled = denoiser_of(preset).eval().requires_grad_(False).to(device, dtype)
        compiled.load_state_dict(denoiser.state_dict())
        lay_out(compiled.unet)
        compile_unet(compiled.unet, device)
        quick = Branches(compiled, still, speech, KEY_MEMORY)
        cases.append(Case("compiled", lambda: quick(x, sigma, indices, WANTED)))
    return [case for case in cases if case.name not in flags.without]


def calls(flags, preset: Preset, frames: int, side: int, device: torch.device, dtype: torch.dtype) -> None:
    """Times the cases in turns and prints the table."""
    cases = make_cases(flags, preset, frames, side, device, dtype)
    with FlopCounterMode(display=False) as counter:
        next(case for case in cases if case.name in ("ours", "again")).call()
    operations, rates = counter.get_total_flops(), []
    for case in cases:
        begin = time.perf_counter()
        for _ in range(flags.warmup):
            case.call()
        print(
            f"{case.name}: {flags.warmup} calls before the timing took {time.perf_counter() - begin:.1f} s", flush=True
        )
    for _ in range(flags.rounds):
        for case in cases:
            case.turn(device)
        rates.append(matrix_rate(device, dtype))
    rate, stock = max(rates), cases[0]
    print(f"{operations / 1e12:.3f} T operations a call of ours, {rate / 1e12:.2f} T/s in matrices")
    print(
        "| case | seconds a call: median (all) | CPU seconds | against stock: clock | CPU seconds | of the matrix rate |"
    )
    print("|---|---|---|---|---|---|")
    for case in cases:
        ratios = ["–", "–"]
        if stock.name == "stock":
            ratios = [
                f"{np.median(np.divide(mine, its)):.2f}"
                for mine, its in ((case.clock, stock.clock), (case.busy, stock.busy))
            ]
        middle = float(np.median(case.clock))
        print(
            f"| {case.name} | {middle:.3f} ({min(case.clock):.3f} … {max(case.clock):.3f}) | {np.median(case.busy):.3f} "
            f"| {ratios[0]} | {ratios[1]} | {operations / middle / rate:.0%} |"
        )


def video(flags, preset: Preset, frames: int, side: int, device: torch.device, dtype: torch.dtype) -> None:
    """One window through all steps and the VAE."""
    denoiser = denoiser_of(preset).eval().requires_grad_(False).to(device, dtype)
    lay_out(denoiser.unet)
    vae = AutoencoderKLTemporalDecoder(**preset.vae).eval().requires_grad_(False)
    vae = vae.to(device, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    if flags.compile:
        compile_unet(denoiser.unet, device)
    base = BaseModels(vae, None, EulerDiscreteScheduler.from_config(preset.scheduler))
    animator = Animator(denoiser, base, device)
    still, speech = noise(preset, frames, side, device, dtype)
    settings = Settings(num_frames=frames, num_inference_steps=flags.steps)
    animator.animate(still, speech, Settings(num_frames=frames, num_inference_steps=1), seed=0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = timed(lambda: animator.animate(still, speech, settings, seed=0), device)
    length = frames * settings.frame_step / TICK_RATE
    peak = f"{used_memory(device):.1f} GB at most" if device.type == "cuda" else "memory is measured on a GPU only"
    how = "compiled" if flags.compile else "eager"
    print(
        f"a video of {length:.2f} s, {flags.steps} steps, {how}: {seconds / length:.2f} s per second of video, {peak}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=IMAGE_SIDE, default="cpu", help="of the models (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compiled as well; with --video the video is")
    parser.add_argument("--video", action="store_true", help="a whole video too")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps of --video (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each case (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="calls of each before that (default: %(default)s)")
    parser.add_argument("--frames", type=int, help="of a window (default: the size's)")
    parser.add_argument("--resolution", type=int, help="pixels (default: the size's)")
    parser.add_argument("--without", nargs="*", default=[], help="cases to leave out, by name")
    flags = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, dtype = sizes()[flags.size], DTYPES[flags.dtype]
    frames = flags.frames or size.frames
    side = (flags.resolution or IMAGE_SIDE[flags.size]) // 8
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {flags.size}, {flags.dtype}, {frames} frames, latents {side} x {side}")
    with torch.inference_mode():
        calls(flags, size.preset, frames, side, device, dtype)
        if flags.video:
            video(flags, size.preset, frames, side, device, dtype)


if __name__ == "__main__":
    run(main)
