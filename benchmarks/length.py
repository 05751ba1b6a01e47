"""Peak memory against the length of the speech, and time against the number of processes, of `sonic_demo.py` on the CPU.

    python benchmarks/length.py WORK --minutes 1 10              # memory: sonic-mini, one step
    python benchmarks/length.py WORK --minutes 1 10 --resolution 64 --guidance_scale_image 1 --guidance_scale_audio 1   # sooner
    python benchmarks/length.py WORK --minutes 1 --processes 1 2    # time: one thread each, so that no core is lent

For each, `sonic_demo.py` runs as a user would start it, on the example speech repeated. Prints a table. Flags that are not
among those below go to it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import soundfile
from release_size import peak_of

from sonic.config import SAMPLE_RATE, TICK_RATE
from sonic.flags import run
from sonic.presets import PRESETS
from sonic.sound import load_audio
from sonic.weights import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for speech and videos")
    parser.add_argument("--minutes", nargs="+", type=float, default=[1, 10], help="(default: %(default)s)")
    parser.add_argument("--processes", nargs="+", type=int, default=[1], help="(default: %(default)s)")
    parser.add_argument("--num_inference_steps", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument(
        "--resolution", type=int, default=PRESETS["mini"].settings.resolution, help="(default: %(default)s)"
    )
    flags, others = parser.parse_known_args()
    flags.work.mkdir(parents=True, exist_ok=True)
    work = flags.work.resolve()
    if max(flags.processes) > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    speech, preset = load_audio(ROOT / "examples/audio.wav"), PRESETS["mini"]
    side = flags.resolution // 8
    print("| minutes | processes | own memory, GB | latents, GB | seconds |\n|---|---|---|---|---|", flush=True)
    for minutes in flags.minutes:
        sound = work / f"{minutes:g}min.wav"
        soundfile.write(sound, np.resize(speech, round(minutes * 60 * SAMPLE_RATE)), SAMPLE_RATE)
        latents = 4 * preset.vae["latent_channels"] * side**2 * minutes * 60 * TICK_RATE / 1e9
        for processes in flags.processes:
            launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
            command = [
                *(sys.executable, *(launcher if processes > 1 else ()), "sonic_demo.py", "--device", "cpu"),
                *("--image", ROOT / "examples/portrait.jpg", "--audio", sound, "--output", work / "long.mp4"),
                *("--num_inference_steps", flags.num_inference_steps, "--resolution", flags.resolution, *others),
            ]
            own, _, seconds = peak_of([*map(str, command)])
            memory = f"{own:.2f}" if processes == 1 else "-"  # the launcher's own would be shown
            print(f"| {minutes:g} | {processes} | {memory} | {latents:.3f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    run(main)
