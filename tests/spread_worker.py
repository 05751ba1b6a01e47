"""One of several processes: animates a few frames and saves its latents. `torchrun ... spread_worker.py MODEL SPEECH OUT`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from sonic.config import SonicConfig
from sonic.pipeline import SonicPipeline
from sonic.processes import Processes


def animate(model, speech, output, processes):
    """Latents, the first frames and the number of calls of the UNet, in OUTPUT.INDEX."""
    pipeline = SonicPipeline(SonicConfig(checkpoint=str(model), device="cpu"), processes=processes)
    calls, predict = [], pipeline.animator.denoiser.predict
    pipeline.animator.denoiser.predict = lambda *arguments: calls.append(1) or predict(*arguments)
    portrait = Path(__file__).resolve().parent.parent / "examples/portrait.jpg"
    with torch.inference_mode():
        features = pipeline.extract_audio_features(speech)
        job = pipeline._job(portrait, features, None, None, pipeline.config)
        latents = pipeline._latents(job, None)
        frames = torch.from_numpy(next(pipeline.animator.decode(latents, 4)))
    torch.save({"latents": latents.clone(), "frames": frames, "calls": len(calls)}, f"{output}.{processes.index}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    animate(*sys.argv[1:], Processes.started("cpu"))
