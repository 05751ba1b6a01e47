"""Can the model learn at all? Trains on one fixed batch with fixed noise and prints the loss; nothing is written but the cache.

    python benchmarks/one_batch.py --model_path checkpoints/sonic-mini --data_root VIDEOS --cache_dir CACHE --steps 150

The loss should fall to under half within 150 steps. It says that gradients flow, not that the model generalises.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere, without an install

import torch
from torch.utils.data import default_collate

from sonic.checkpoints import load_base, load_whisper, open_checkpoint
from sonic.config import POSITIVE, SHIPPED
from sonic.dataset import SonicDataset
from sonic.flags import Parser, run
from sonic.prepare import prepare
from sonic.training import Encoders, draw, total_loss, with_model_defaults
from sonic.training_config import TrainingConfig


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model_path", default=SHIPPED, help="checkpoint to start from")
    parser.add_argument("--data_root", required=True, help="folder of videos")
    parser.add_argument("--cache_dir", required=True, help="where their preparation lies or goes")
    parser.add_argument("--steps", type=POSITIVE, default=150, help="optimizer steps")
    parser.add_argument("--batch", type=POSITIVE, default=2, help="clips in the batch")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="AdamW's learning rate")
    flags = parser.parse_args()

    start = open_checkpoint(flags.model_path)
    config = with_model_defaults(TrainingConfig(data_root=flags.data_root), start.settings)
    data = prepare(
        config.data_root,
        flags.cache_dir,
        load_whisper(start.whisper_path),
        num_frames=config.num_frames,
        frame_step=config.frame_step,
    )
    encoders = Encoders(load_base(start.base_model), torch.device("cpu"))
    dataset = SonicDataset(
        data.clips,
        num_frames=config.num_frames,
        frame_step=config.frame_step,
        resolution=config.resolution,
        clip_size=encoders.base.image_encoder.config.image_size,
        seed=config.seed,
    )
    numbers = list(range(flags.batch))
    samples = default_collate([dataset[number] for number in numbers])
    clip = encoders(samples)
    batch = clip.with_noise(draw(config, numbers, clip.latents.shape[1:]))

    torch.manual_seed(config.seed)
    model = start.load().train()
    model.unet.freeze_unused()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, flags.learning_rate)
    clock = time.perf_counter()
    for step in range(flags.steps + 1):
        losses = model(batch)
        if step % 10 == 0:
            print(
                f"step {step:4}  loss {losses.velocity.item():.4f}  bucket loss {losses.bucket.item():.4f}", flush=True
            )
        optimizer.zero_grad()
        total_loss(losses).backward()
        optimizer.step()
    print(f"{(time.perf_counter() - clock) / (flags.steps + 1):.2f} s per step on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    run(main)
