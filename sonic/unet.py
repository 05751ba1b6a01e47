"""SVD's spatio-temporal UNet with audio cross-attention (SPEC.md section 3; paper section 3.2).

Axes: B clips, F frames of a window, H W latent height and width, C channels, D cross-attention width,
K audio tokens per frame, G contexts of one attention call (B·F in spatial blocks, B in temporal ones), L queries of one context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from einops import rearrange
from torch import Tensor, nn

from sonic.blocks import TemporalBlock, attend, heads_of, plus, take_over


class Projection(NamedTuple):
    """What one cross-attention makes of its context: seen [G, 1, C] of the image; key and value [G, K, C] of the audio."""

    seen: Tensor
    key: Tensor
    value: Tensor


@dataclass
class Context:
    """What one cross-attention call sees: image [G, 1, D] and audio [G, K, D], or every layer's projections of them; the gate on
    the audio part [G or 1, L, 1], or None."""

    image: Tensor | None
    audio: Tensor | None
    gate: Tensor | None = None
    projections: Sequence[Projection] | None = None


@dataclass
class Conditions:
    """What the UNet attends to: image [B, F, 1, D], audio [B, F, K, D], face mask [B or 1, 1, h, w] in 0..1 or None (no gating).

    The mask may have any size; every level resizes it for itself. Source: SPEC.md section 3. In place of image and audio,
    there may be `projections` of every layer, in the order of `SonicUNet.cross_attentions`, with `clips` and `frames`.
    """

    image: Tensor | None
    audio: Tensor | None
    mask: Tensor | None = None
    projections: Sequence[Projection] | None = None
    clips: int = 0
    frames: int = 0
    gates: dict[tuple[int, int], Tensor] = field(
        default_factory=dict, repr=False
    )  # the mask at the sizes already asked for

    def __post_init__(self):
        if self.audio is not None:
            self.clips, self.frames = self.audio.shape[:2]

    def spatial(self, height: int, width: int) -> Context:
        """Per frame: its own image token, its own audio tokens, and the face mask at this level's size."""
        gate = self._gate(height, width)
        if self.projections is not None:
            return Context(None, None, gate, self.projections)
        return Context(self.image.flatten(0, 1), self.audio.flatten(0, 1), gate)

    def temporal(self) -> Context:
        """Per clip: the mean of the tokens over the window's frames, the same for every pixel; no mask."""
        if self.projections is not None:
            return Context(None, None, None, self.projections)
        return Context(self.image.mean(1), self.audio.mean(1))

    def fork(self, x: Tensor) -> Tensor:
        """x [B·F, ...] as it is. With one clip less, the last one twice: the two differ only in what they hear, and have
        been one until here."""
        return x if len(x) == self.clips * self.frames else torch.cat([x, x[-self.frames :]])

    def _gate(self, height: int, width: int) -> Tensor | None:
        if self.mask is None:
            return None
        if (height, width) not in self.gates:
            self.gates[height, width] = gate_of(self.mask, height, width, self.frames)
        return self.gates[height, width]


def gate_of(mask: Tensor, height: int, width: int, frames: int) -> Tensor:
    """Face masks [B or 1, 1, h, w] at one level's size, [B·F or 1, H·W, 1]."""
    level = F.interpolate(mask.float(), size=(height, width), mode="bicubic")
    level = rearrange(level, "b 1 h w -> b (h w) 1")
    return level if len(level) == 1 else level.repeat_interleave(frames, dim=0)


class AudioCrossAttention(nn.Module):
    """Attention processor of every `attn2`: out = to_out(attention(q, image) + gate · attention(q, audio)).

    `to_k_ip`/`to_v_ip` are lists of one, because the released state dict names them `processor.to_k_ip.0.weight`.
    """

    fused_attention = True  # see `attend`

    def __init__(self, width: int, inner: int, number: int, temporal: bool):
        """`number` is this layer's place among all cross-attentions; `temporal` ones have one context per clip."""
        super().__init__()
        self.number, self.temporal = number, temporal
        self.to_k_ip = nn.ModuleList([nn.Linear(width, inner, bias=False)])
        self.to_v_ip = nn.ModuleList([nn.Linear(width, inner, bias=False)])

    def project(self, attn: Attention, image: Tensor, audio: Tensor) -> Projection:
        """image [G, 1, D], audio [G, K, D]. The softmax over a single image token is 1, so its attention is its value,
        whatever the query and the key."""
        return Projection(attn.to_v(image), self.to_k_ip[0](audio), self.to_v_ip[0](audio))

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Context, **_) -> Tensor:
        context, shape = encoder_hidden_states, hidden_states.shape
        if context.projections is None:
            seen, key, value = self.project(attn, context.image, context.audio)
        else:
            seen, key, value = context.projections[self.number]
        # All frames of a clip share one context in temporal blocks: fold them into its queries.
        hidden_states = hidden_states.reshape(len(key), -1, shape[-1])  # [G, L, C]
        query, key, value = (heads_of(attn, part) for part in (attn.to_q(hidden_states), key, value))
        heard = attend(query, key, value, attn.scale, self.fused_attention)
        heard = rearrange(heard, "g heads l c -> g l (heads c)")
        gate = context.gate
        both = plus(heard, seen) if gate is None else torch.addcmul(seen, heard, gate.to(heard.dtype))
        return attn.to_out[0](both).reshape(shape)


class AudioTransformer(TransformerSpatioTemporalModel):
    """A spatial and a temporal transformer block that read their context from `Conditions`."""

    def forward(self, hidden_states, encoder_hidden_states: Conditions, image_only_indicator: int, return_dict=True):
        """hidden_states [B·F, C, H, W] -> the same shape, in a tuple. The stock class takes the *first* frame's token as
        temporal context; the method takes the mean over the window, and positions always start at 0."""
        height, width = hidden_states.shape[-2:]
        conditions, frames = encoder_hidden_states, image_only_indicator
        spatial, temporal = conditions.spatial(height, width), conditions.temporal()

        x = rearrange(self.norm(hidden_states), "bf c h w -> bf (h w) c")
        x = self.proj_in(x)
        position = self.time_proj(torch.arange(frames, device=x.device)).to(x.dtype)
        position = self.time_pos_embed(position)[:, None]  # [F, 1, C]
        for block, temporal_block in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            x = self._run(block, x, spatial, conditions.fork)
            placed = (x.unflatten(0, (-1, frames)) + position).flatten(0, 1)
            mixed = self._run(temporal_block, placed, temporal, frames)
            x = torch.lerp(x, mixed.to(x.dtype), self.time_mixer(x))
        x = rearrange(self.proj_out(x), "bf (h w) c -> bf c h w", h=height)
        return (plus(x, conditions.fork(hidden_states)),)

    def _run(self, block: nn.Module, *args) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)


class SonicUNet(UNetSpatioTemporalConditionModel):
    """`UNetSpatioTemporalConditionModel` whose `encoder_hidden_states` is a `Conditions`.

    Its state dict has exactly the names and shapes of the released `unet.pth`.
    """

    def __init__(self, **config):
        super().__init__(**config)
        for module in self.modules():
            if type(module) is TransformerSpatioTemporalModel:
                module.__class__ = AudioTransformer  # same weights, other forward
        take_over(self)
        temporal = {block.attn2 for block in self.modules() if isinstance(block, TemporalBlock)}
        for number, attn in enumerate(self.cross_attentions()):
            # Head counts and widths differ by level: read them off the layer itself.
            sizes = attn.to_k.in_features, attn.to_k.out_features
            attn.set_processor(AudioCrossAttention(*sizes, number, attn in temporal))
        self.start_audio_attention()

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Conditions,
        added_time_ids: Tensor,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        """sample [B, F, C, H, W], timestep [B] and added_time_ids [B, 3], or one for all clips -> velocities like
        sample, in a tuple. With one clip less in `sample` than in the conditions, see `Conditions.fork`."""
        conditions, frames = encoder_hidden_states, sample.shape[1]
        emb = self.time_embedding(self.time_proj(timestep.reshape(-1)).to(sample.dtype))
        ids = self.add_time_proj(added_time_ids.flatten()).reshape(len(added_time_ids), -1)
        emb = emb + self.add_embedding(ids.to(emb.dtype))

        x = self.conv_in(sample.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, emb, *self._attended(block, conditions), frames)
            skips += more
        x = self.mid_block(x, emb, conditions, frames)
        for block in self.up_blocks:
            count = len(block.resnets)
            own, skips = tuple(conditions.fork(skip) for skip in skips[-count:]), skips[:-count]
            # Sizes that are no multiple of the downsampling grow back to those of the skips.
            size = skips[-1].shape[-2:] if skips else None
            attended = self._attended(block, conditions)
            x = block(x, own, emb, *attended, image_only_indicator=frames, upsample_size=size)
        x = self.conv_out(self.conv_act(self.conv_norm_out(x)))
        return (x.unflatten(0, (-1, frames)),)

    @staticmethod
    def _attended(block: nn.Module, conditions: Conditions) -> tuple[Conditions, ...]:
        """What stands between time embedding and frames in the arguments of a stock block."""
        return (conditions,) if getattr(block, "has_cross_attention", False) else ()

    def level_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Heights and widths from the latents' own to the smallest; each level halves them, rounding up."""
        sizes = [(height, width)]
        for _ in self.down_blocks[1:]:
            sizes.append(tuple((side + 1) // 2 for side in sizes[-1]))
        return sizes

    def cross_attentions(self) -> list[Attention]:
        """Every `attn2` of the spatial and temporal transformer blocks."""
        return [module for name, module in self.named_modules() if name.endswith(".attn2")]

    @torch.no_grad()
    def start_audio_attention(self) -> None:
        """Starts the audio projections as copies of each layer's own `to_k` and `to_v` (SPEC.md section 3)."""
        for attn in self.cross_attentions():
            attn.processor.to_k_ip[0].weight.copy_(attn.to_k.weight)
            attn.processor.to_v_ip[0].weight.copy_(attn.to_v.weight)

    def fuse_attention(self, fused: bool) -> None:
        """Whether attention is left to torch's fused kernel, as it is at first, or computed by products of matrices."""
        for module in self.modules():
            if hasattr(module, "fused_attention"):
                module.fused_attention = fused

    def freeze_unused(self) -> None:
        """The key of a single image token never receives a gradient; DDP wants to know which parameters never will."""
        for attn in self.cross_attentions():
            attn.to_k.requires_grad_(False)
