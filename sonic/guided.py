"""The guidance branches of a window as one UNet call, in which whatever they share is computed once (SPEC.md sections 5 and 7).

Once per video: image and audio keys and values of every layer, and the face mask at every level. Once per call: the time
embedding, and the UNet up to its first cross-attention for the two branches that differ only in what they hear.

Axes: N frames of the video, W frames of a window, B branches of a call, K audio tokens, D their width, C H W latent channels,
height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sonic.denoiser import Denoiser, Portrait
from sonic.motion import MAX_BUCKET
from sonic.unet import Conditions, Projection, SonicUNet, gate_of

NOTHING, IMAGE, SOUND = range(3)  # the branches: neither, the image, image and audio


class LongTokens:
    """Audio tokens of a long speech, made for the frames that are asked for: the whole of them would grow with its length."""

    def __init__(self, ticks: Tensor, make: Callable[[Tensor], Tensor]):
        self._ticks, self._make = ticks, make

    def __len__(self) -> int:
        return len(self._ticks)

    def __getitem__(self, indices: list[int]) -> Tensor:
        return self._make(self._ticks[indices])


@dataclass
class Speech:
    """The spoken side of a condition: audio tokens [N, K, D], those of silence [K, D], motion buckets [N, 2], frames per second,
    and the buckets [N, 2] that portrait and speech have by themselves, where others were set by hand (default: `buckets`)."""

    tokens: Tensor | LongTokens
    silence: Tensor
    buckets: Tensor
    fps: float
    own_buckets: Tensor | None = None

    def __post_init__(self):
        if self.own_buckets is None:
            self.own_buckets = self.buckets

    def __len__(self) -> int:
        return len(self.tokens)


class VideoKeys:
    """What every cross-attention makes of a video's image and sounds.

    Keys and values are linear in their tokens: those of the mean over a window, which temporal blocks attend to, are the mean
    of the frames' own.
    """

    def __init__(self, unet: SonicUNet, images: Tensor, tokens: Tensor, silence: Tensor):
        """images [2, 1, D]: the dropped one and the portrait's; tokens [N, K, D]; silence [K, D]."""
        self.attentions = unet.cross_attentions()
        self.quiet = [attn.processor.project(attn, images, silence[None]) for attn in self.attentions]
        self.heard = [attn.processor.project(attn, images[:0], tokens)[1:] for attn in self.attentions]

    @staticmethod
    def gigabytes(unet: SonicUNet, frames: int, tokens: int, element: int) -> float:
        """What they take for this many frames and tokens per frame, with elements of so many bytes."""
        width = sum(2 * attn.to_k.out_features for attn in unet.cross_attentions())
        return frames * tokens * width * element / 1e9

    def window(self, indices: Tensor, wanted: list[int]) -> list[Projection]:
        """The projections of these frames [W] for these branches, layer by layer."""
        frames = len(indices)
        found = []
        for attn, quiet, heard in zip(self.attentions, self.quiet, self.heard, strict=True):
            temporal = attn.processor.temporal
            seen = quiet.seen[[min(branch, IMAGE) for branch in wanted]]  # [B, 1, C]
            keys, values = [], []
            for branch in wanted:
                key, value = heard if branch == SOUND else (quiet.key, quiet.value)
                if branch == SOUND:
                    key, value = key[indices], value[indices]
                    if temporal:
                        key, value = key.mean(0, keepdim=True), value.mean(0, keepdim=True)
                elif not temporal:
                    key, value = (part.expand(frames, -1, -1) for part in (key, value))
                keys.append(key)
                values.append(value)
            seen = seen if temporal else seen.repeat_interleave(frames, dim=0)
            found.append(Projection(seen, torch.cat(keys), torch.cat(values)))
        return found


class Branches:
    """What `sampling.sample` asks for velocities: (x [W, C, H, W], sigma, frame indices, wanted branches) -> [B, W, C, H, W]."""

    def __init__(
        self,
        denoiser: Denoiser,
        still: Portrait,
        speech: Speech,
        key_memory: float,
        contrast: tuple[float, float] = (0.0, 0.0),
        expression_floor: float = 0.0,
    ):
        """Projects keys and values if they take at most `key_memory` GB; else every call does it for its own frames.

        contrast, of translation and expression: where a bucket b was set by hand, the branch without image and audio has its
        opposite, b - contrast (b - the face's own), which guidance so leads away from. Ours, after Ho and Salimans 2022,
        "Classifier-free diffusion guidance"; 0: published. expression_floor: an expression bucket set below it and below the
        face's own is taken to be the lower of these two, while its opposite stays what it was. Of windows calmer than a speaking
        face a model has met pauses only, and asked for them it shuts the mouth. Ours.
        Call it, and make it, in the autocast that the denoiser is to compute in.
        """
        self.denoiser, self.still, self.speech = denoiser, still, speech
        by_hand = not torch.equal(speech.buckets, speech.own_buckets)
        self.contrast = contrast if by_hand else (0.0, 0.0)  # without any, branches share their first layers
        self.expression_floor = expression_floor
        dtype, device = denoiser.dtype, still.latent.device
        images = torch.stack([torch.zeros_like(still.clip), still.clip])  # [2, 1, D]
        self.images, self.silence = images.to(dtype), speech.silence.to(device, dtype)
        self.references = torch.cat([torch.zeros_like(still.latent), still.latent])  # the image is dropped from both
        unet, self.keys = denoiser.unet, None
        size = VideoKeys.gigabytes(unet, len(speech), len(self.silence), self.silence.element_size())
        # Weights that FSDP2 has spread over processes can only be used inside the forward pass.
        if size <= key_memory and isinstance(speech.tokens, Tensor) and not isinstance(denoiser, FSDPModule):
            # accelerate's: fetches weights that wait elsewhere until a call
            if hook := getattr(unet, "_hf_hook", None):
                hook.pre_forward(unet)
            self.keys = VideoKeys(unet, self.images, speech.tokens.to(device, dtype), self.silence)
        self.gates = {}
        if still.mask is not None:
            sizes = unet.level_sizes(*still.latent.shape[-2:])
            self.gates = {(height, width): gate_of(still.mask, height, width, 1).to(dtype) for height, width in sizes}

    def __call__(self, x: Tensor, sigma: Tensor, indices: list[int], wanted: list[int]) -> Tensor:
        time_ids = self._time_ids(indices, wanted).to(x.device)
        # Image and sound are one branch with the image alone until sound comes in; the UNet tells them apart there, if
        # one embedding of time serves all branches.
        together = len(time_ids) == 1 and wanted[-2:] == [IMAGE, SOUND]
        distinct = wanted[:-1] if together else wanted
        references = self.references[[min(branch, IMAGE) for branch in distinct]]
        clips = x.expand(len(distinct), -1, -1, -1, -1)
        conditions = self._conditions(indices, wanted, x.device)
        return self.denoiser.predict(clips, sigma.reshape(1), references, conditions, time_ids).float()

    def _time_ids(self, indices: list[int], wanted: list[int]) -> Tensor:
        """Frame rate and the window's buckets, which are the mean of its frames': [1, 3], or [B, 3] if branches differ."""
        buckets, own = self.speech.buckets[indices].mean(0), self.speech.own_buckets[indices].mean(0)
        lowest = torch.minimum(own, buckets.new_tensor([0.0, self.expression_floor]))
        time_ids = torch.cat([buckets.new_tensor([self.speech.fps]), torch.maximum(buckets, lowest)])[None]
        if not any(self.contrast) or NOTHING not in wanted:
            return time_ids
        time_ids = time_ids.repeat(len(wanted), 1)
        opposite = buckets - buckets.new_tensor(self.contrast) * (buckets - own)
        time_ids[wanted.index(NOTHING), 1:] = opposite.clamp(0, MAX_BUCKET)
        return time_ids

    def _conditions(self, indices: list[int], wanted: list[int], device: torch.device) -> Conditions:
        frames, mask = len(indices), self.still.mask
        if self.keys is not None:
            projections = self.keys.window(torch.tensor(indices, device=device), wanted)
            return Conditions(None, None, mask, projections, len(wanted), frames, self.gates)
        images = self.images[[min(branch, IMAGE) for branch in wanted]]
        quiet = self.silence.expand(frames, -1, -1)
        heard = self.speech.tokens[indices].to(device, quiet.dtype)
        audio = torch.stack([heard if branch == SOUND else quiet for branch in wanted])
        return Conditions(images[:, None].expand(-1, frames, -1, -1), audio, mask, gates=self.gates)
