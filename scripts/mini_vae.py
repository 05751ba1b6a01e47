"""Trains the small VAE of sonic-mini on puppets: all of it first, then the decoder alone, for likeness.

The decoder is SVD's temporal one, so it is trained on clips, of 1 to 10 frames: one that had only seen single frames would
shift the colours of clips. A stage of `scripts/build_mini.py`; axes: n clips, F frames, R pixels, h = R / 8.

    python scripts/mini_vae.py OUTPUT [--steps N] [--decoder_steps N] [--seed N]
    python scripts/mini_vae.py OUTPUT --of FOLDER     the second part alone: a VAE with the encoder, and the latents, of that one
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from copy import deepcopy
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere, without an install

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLTemporalDecoder
from torch import Tensor, nn

from sonic.faces import square_crop, union_box
from sonic.optimizers import Muon
from sonic.presets import PRESETS
from sonic.puppets import Identity, articulation, clip_truth, random_motion, render_clip

DRAWN = 192  # pixels at which a puppet is drawn before its face is cut out
MARGIN = 0.5  # of the crop, as in training and animating
CLIPS, LENGTH = 500, 10  # puppets to learn from, frames of each
# (share of the steps, part of the picture's side, frames of a step, lengths of their clips). Few single frames first, and
# quarters of them, which teach the filters as well (6 a step get as far as 20 in less than half of the time); then clips;
# then whole pictures, as they will be. What is missing is what torch 2.13 cannot do in bf16 on some CPUs: for clips of 2 frames
# its gradients are NaN, and for whole pictures in clips of 1 or 5 it is slow, and ends the process (heap corruption in oneDNN).
PHASES = ((0.6, 2, 6, (1,)), (0.2, 2, 10, (1, 5, 10)), (0.2, 1, 10, (10,)))
FACE_WEIGHT = 4  # eyes and mouth are small, and what makes a face known
# Errors count in brightness and two colour axes. Those weigh more at first, or learning stays at grey pictures for a long
# time, and go down to their due over the first part of the steps (worth 0.8 dB after 200).
COLOUR_AXES = torch.tensor([[0.577, 0.577, 0.577], [0.707, 0.0, -0.707], [0.408, -0.816, 0.408]])
COLOUR_WEIGHT, COLOUR_SHARE = 3.0, 0.6
STEPS, LEARNING_RATE = 6000, 1.5e-3
# The decoder alone: faces as lively as training's, cut out with room around them, and now and then a whole picture. Absolute
# errors, as squared ones are smallest where edges are blurred.
DECODER_STEPS, DECODER_RATE = 1500, 1.5e-4
DECODER_CLIPS, FACE_SIDE, WHOLE_EVERY = 400, 72, 6
HEAD, EXPRESSION = 5.0, 6.0  # the largest amplitudes of `scripts/build_mini.py`
UNSEEN, MEASURED = 32, "measured.json"  # clips to measure with, and where it is written
KL_WEIGHT, START_LOG_VARIANCE = 1e-5, -6.0


def puppet_clip(
    rng: np.random.Generator, frames: int, resolution: int, lively: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """A new puppet that moves and babbles: uint8 [F, R, R, 3], and the box of its face in each, [F, 4]. A lively one moves at
    times as far as any in training does."""
    head, face, talk = rng.uniform(size=3)
    amplitudes, reach, widest = (2 * head, 2 * face), 1.0, 1.3
    if lively:  # calm ones are more frequent, as in training
        amplitudes, reach, widest = (HEAD * head**2, EXPRESSION * face**2), articulation(EXPRESSION * talk**2), 1.0
    motion = random_motion(frames, rng, *amplitudes)
    seconds = np.arange(frames) / 25
    wave = np.sin(2 * np.pi * rng.uniform(1, 5, 2)[:, None] * seconds + rng.uniform(0, 6.3, 2)[:, None])
    opening = np.clip(rng.uniform(-0.2, 1.1) + rng.uniform(0, 0.6) * wave[0], 0, widest)
    width = np.clip(rng.uniform(-1, 1) + 0.5 * wave[1], -1, 1) * np.minimum(4 * opening, 1)
    motion.opening, motion.width = ((reach * curve).astype(np.float32) for curve in (opening, width))
    identity = Identity.random(rng)
    pictures = render_clip(identity, motion, DRAWN)
    faces = clip_truth(identity, motion, DRAWN)["face_box"]
    x0, y0, x1, y1 = square_crop(union_box(faces), MARGIN + rng.uniform(-0.1, 0.1), DRAWN, DRAWN)
    size = (resolution, resolution)
    cut = np.stack([cv2.resize(p[y0:y1, x0:x1], size, interpolation=cv2.INTER_AREA) for p in pictures])
    return cut, (faces - [x0, y0, x0, y0]) * resolution / (x1 - x0)


def draw(rng: np.random.Generator, clips: int, resolution: int, lively: bool = False) -> tuple[Tensor, np.ndarray]:
    """Clips of LENGTH frames, uint8 [n, F, 3, R, R], and the boxes of their faces, [n, F, 4]."""
    pictures, faces = zip(*(puppet_clip(rng, LENGTH, resolution, lively) for _ in range(clips)), strict=True)
    return torch.from_numpy(np.stack(pictures)).permute(0, 1, 4, 2, 3), np.stack(faces)


def face_weights(faces: np.ndarray, side: int) -> Tensor:
    """How much each pixel counts, [F, 1, side, side], for boxes [F, 4]."""
    weight = torch.ones(len(faces), 1, side, side)
    for frame, (left, top, right, bottom) in enumerate(faces):
        rows = slice(max(int(top), 0), max(math.ceil(bottom), 0))
        columns = slice(max(int(left), 0), max(math.ceil(right), 0))
        weight[frame, 0, rows, columns] = FACE_WEIGHT
    return weight


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 0..255 -> float -1..1."""
    return pictures.float() / 127.5 - 1


class Puppets:
    """A store of drawn clips, and random batches of it."""

    def __init__(self, seed: int, resolution: int, clips: int = CLIPS):
        self.rng, self.resolution = np.random.default_rng([seed, 1]), resolution
        self.pictures, boxes = draw(self.rng, clips, resolution)
        self.weights = torch.stack([face_weights(faces, resolution).to(torch.uint8) for faces in boxes])

    def batch(self, frames: int, side: int, count: int) -> tuple[Tensor, Tensor]:
        """Pixels and weights of `count` frames, [n · F, ..., side, side], of clips of F frames, cut out at one random place."""
        chosen = self.rng.integers(len(self.pictures), size=count // frames)
        first = self.rng.integers(LENGTH - frames + 1)
        y, x = self.rng.integers(0, (self.resolution - side) // 8 + 1, size=2) * 8
        part = (chosen, slice(first, first + frames), slice(None), slice(y, y + side), slice(x, x + side))
        pictures, weight = (store[part].flatten(0, 1) for store in (self.pictures, self.weights))
        return to_pixels(pictures), weight.float()


@torch.no_grad()
def start(vae: AutoencoderKLTemporalDecoder) -> None:
    """Starts the network as a blurring one that keeps colours: residual blocks do nothing, the convolutions between them
    average, repeat or mix channels without loss. Stock weights take twice as many steps to get as far (15 dB after 50,
    where these have 19; AdamW, quarters of pictures)."""
    blur = torch.tensor([0.25, 0.5, 0.25])
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Conv3d):
            continue
        weight, last = module.weight, name.rpartition(".")[2]
        torch.nn.init.normal_(weight, std=0.3 / weight[0].numel() ** 0.5)
        module.bias.zero_()
        same = torch.eye(*weight.shape[:2])[..., None, None]
        if last == "conv1":
            torch.nn.init.normal_(weight, std=(2 / weight[0].numel()) ** 0.5)
        elif last == "conv2":
            weight.zero_()
        elif last == "time_conv_out":
            weight.copy_(same[..., None] * torch.tensor([0.0, 1.0, 0.0])[:, None, None])
        elif last in ("conv_shortcut", "quant_conv"):
            mix = torch.nn.init.orthogonal_(torch.empty(weight.shape[:2]))
            weight.copy_(mix[..., None, None] * max(1, len(weight) / weight.shape[1]) ** 0.5)
        elif last in ("conv_in", "conv_out"):
            weight[:, :, 1, 1] += torch.randn(weight.shape[:2]) / weight.shape[1] ** 0.5
        elif "downsamplers" in name:
            weight[:, :, :2, :2] += same / 4
        elif "upsamplers" in name:
            weight += same * blur * blur[:, None]
    vae.quant_conv.bias[vae.config.latent_channels :].fill_(
        START_LOG_VARIANCE
    )  # as wide as its means it would be noise


def phase(progress: float) -> tuple[int, int, tuple[int, ...]]:
    """Part of the side, frames, and lengths of clips, when this share of the steps is done."""
    for share, *what in PHASES:
        if progress <= share:
            return tuple(what)
        progress -= share
    return tuple(what)


def colour_weight(progress: float) -> float:
    """How much the colour axes weigh when this share of the steps is done."""
    return max(1.0, COLOUR_WEIGHT + (1 - COLOUR_WEIGHT) * progress / COLOUR_SHARE)


def train(vae: AutoencoderKLTemporalDecoder, steps: int, seed: int, clips: int = CLIPS) -> None:
    """Trains in place. The latents' scale goes into the configuration as `scaling_factor`."""
    resolution = vae.config.sample_size
    puppets = Puppets(seed, resolution, clips)
    start(vae)
    optimizer, warm = Muon(vae.parameters(), LEARNING_RATE), steps // 20 + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.51 + 0.49 * math.cos(math.pi * step / steps))
    )
    begin, errors = time.perf_counter(), []
    vae.train()
    for step in range(1, steps + 1):
        part, count, lengths = phase(step / steps)
        frames = int(puppets.rng.choice(lengths))
        pixels, weight = puppets.batch(frames, resolution // part, count)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            made = vae.decode(posterior.sample(), num_frames=frames).sample.float()
        axes = COLOUR_AXES * torch.tensor([1.0, *[colour_weight(step / steps)] * 2])[:, None]
        error = (weight * torch.einsum("kc,ncij->nkij", axes, made - pixels).square()).mean()
        loss = error + KL_WEIGHT * posterior.kl().float().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        errors.append(F.mse_loss(made.detach(), pixels).item())
        if step % 50 == 0 or step == steps:
            print(
                f"vae step {step} of {steps}: {psnr(np.mean(errors)):.1f} dB, {time.perf_counter() - begin:.0f} s, "
                f"latents' deviation {posterior.mode().std().item():.2f}",
                flush=True,
            )
            errors = []
    vae.eval()
    with torch.no_grad():
        latents = torch.cat([vae.encode(puppets.batch(1, resolution, 10)[0]).latent_dist.mode() for _ in range(10)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())


class LivelyFaces:
    """A store of lively clips with their latents, which stay, and random batches of what lies around their faces."""

    @torch.no_grad()
    def __init__(self, vae: AutoencoderKLTemporalDecoder, seed: int, clips: int):
        self.rng, self.side = np.random.default_rng([seed, 3]), vae.config.sample_size
        self.pictures, self.faces = draw(self.rng, clips, self.side, lively=True)
        encoder = deepcopy(vae).bfloat16()
        self.latents = torch.stack(
            [encoder.encode(to_pixels(clip).bfloat16()).latent_dist.mode().float() for clip in self.pictures]
        )

    def whole(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [F, C, h, h], pixels [F, 3, R, R] and weights [F, 1, R, R] of one clip."""
        clip = int(self.rng.integers(len(self.latents)))
        return self.latents[clip], to_pixels(self.pictures[clip]), face_weights(self.faces[clip], self.side)

    def around_face(self, frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same of a square of FACE_SIDE pixels around a face, in some frames of a clip."""
        clip, first = int(self.rng.integers(len(self.latents))), int(self.rng.integers(LENGTH - frames + 1))
        left, top, right, bottom = self.faces[clip, first + frames // 2]
        middle = np.array([left + right, top + bottom]) / 2 + self.rng.uniform(-6, 6, 2)
        last = (self.side - FACE_SIDE) // 8
        x, y = (int(np.clip(round((at - FACE_SIDE / 2) / 8), 0, last)) for at in middle)
        cells, side = FACE_SIDE // 8, FACE_SIDE
        latents = self.latents[clip, first : first + frames, :, y : y + cells, x : x + cells]
        pictures = self.pictures[clip, first : first + frames, :, 8 * y : 8 * y + side, 8 * x : 8 * x + side]
        weights = face_weights(self.faces[clip, first : first + frames] - 8 * np.array([x, y, x, y]), side)
        inside = torch.zeros_like(weights)
        inside[..., 8:-8, 8:-8] = 1  # at the edges, the decoder sees zeros where there is picture
        return latents, to_pixels(pictures), weights * inside


def train_decoder(vae: AutoencoderKLTemporalDecoder, steps: int, seed: int, clips: int = DECODER_CLIPS) -> None:
    """Trains the decoder alone, in place, and meets its start halfway: faces through the mean of two such decoders are nearer to
    the true ones, for dlib, than through either (Wortsman et al. 2022, "Model soups")."""
    torch.set_flush_denormal(True)
    faces, began = LivelyFaces(vae, seed, clips), deepcopy(vae.decoder.state_dict())
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    optimizer, warm = Muon(vae.decoder.parameters(), DECODER_RATE), 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    begin, errors = time.perf_counter(), []
    vae.train()
    for step in range(1, steps + 1):
        frames = int(faces.rng.choice((1, 5, 10)))
        whole = step % WHOLE_EVERY == 0
        parts = [faces.whole()] if whole else [faces.around_face(frames) for _ in range(LENGTH // frames)]
        latents, pixels, weight = (torch.cat(part) for part in zip(*parts, strict=True))
        with torch.autocast("cpu", torch.bfloat16):
            made = vae.decode(latents, num_frames=LENGTH if whole else frames).sample.float()
        error = torch.einsum("kc,ncij->nkij", COLOUR_AXES, made - pixels).abs()
        loss = (weight * error).mean() / weight.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        errors.append(loss.item())
        if step % 50 == 0 or step == steps:
            mean, seconds = np.mean(errors), time.perf_counter() - begin
            print(f"decoder step {step} of {steps}: mean error {mean:.4f}, {seconds:.0f} s", flush=True)
            errors = []
    vae.decoder.load_state_dict({name: (tensor + began[name]) / 2 for name, tensor in vae.decoder.state_dict().items()})
    vae.eval()


@torch.no_grad()
def unseen_psnr(vae: AutoencoderKLTemporalDecoder, clips: int, seed: int, lively: bool) -> list[float]:
    """dB between clips of 10 frames of new identities and what the VAE makes of them, one value per clip."""
    rng = np.random.default_rng([seed, 2])
    values = []
    for _ in range(clips):
        pictures, _ = puppet_clip(rng, 10, vae.config.sample_size, lively)
        pixels = to_pixels(torch.from_numpy(pictures).permute(0, 3, 1, 2))
        made = vae.decode(vae.encode(pixels).latent_dist.mode(), num_frames=10).sample.clamp(-1, 1)
        values.append(psnr(F.mse_loss(made, pixels).item()))
    return values


def psnr(mean_square: float) -> float:
    """dB of a mean squared error of pixels in -1..1."""
    return 10 * math.log10(4 / mean_square)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write, in diffusers' layout")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--decoder_steps", type=int, default=DECODER_STEPS, help="of the decoder alone (default: %(default)s)"
    )
    parser.add_argument("--of", type=Path, metavar="FOLDER", help="a VAE that is there, instead of a new one")
    parser.add_argument("--seed", type=int, default=0, help="of weights and puppets (default: %(default)s)")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    if arguments.of:
        vae = AutoencoderKLTemporalDecoder.from_pretrained(arguments.of, torch_dtype=torch.float32)
    else:
        vae = AutoencoderKLTemporalDecoder(**PRESETS["mini"].vae)
        train(vae, arguments.steps, arguments.seed)
    if arguments.decoder_steps:
        train_decoder(vae, arguments.decoder_steps, arguments.seed)
    vae.save_pretrained(arguments.output)
    measured = {}
    for kind, lively in (("unseen", False), ("lively", True)):
        found = unseen_psnr(vae, UNSEEN, arguments.seed, lively)
        measured |= {f"psnr_{kind}_mean": round(float(np.mean(found)), 2), f"psnr_{kind}_min": round(min(found), 2)}
    (arguments.output / MEASURED).write_text(json.dumps(measured) + "\n")
    print(f"{UNSEEN} clips of unseen identities: {measured}")


if __name__ == "__main__":
    main()
