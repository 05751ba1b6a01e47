"""SVD's spatio-temporal UNet with audio cross-attention (SPEC.md section 3; paper section 3.2).

Axes: B clips, F frames of a window, H W latent height and width, C channels, D cross-attention width,
K audio tokens per frame, G contexts of one attention call (B·F in spatial blocks, B in temporal ones), L queries of one context.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from einops import rearrange
from torch import Tensor, nn


@dataclass
class Context:
    """What one cross-attention call sees: image [G, 1, D], audio [G, K, D], gate on the audio part [G, L, 1] or None."""

    image: Tensor
    audio: Tensor
    gate: Tensor | None = None


@dataclass
class Conditions:
    """What the UNet attends to: image [B, F, 1, D], audio [B, F, K, D], face mask [B or 1, 1, h, w] in 0..1 or None (no gating).

    The mask may have any size; every level resizes it for itself. Source: SPEC.md section 3.
    """

    image: Tensor
    audio: Tensor
    mask: Tensor | None = None
    _gates: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    # All that the stock UNet does with its context, before the transformers see it, is to repeat the one per clip for
    # every frame. Ours has one per frame already, so these two let it pass through the stock forward untouched.
    @property
    def shape(self) -> torch.Size:
        return self.audio.shape

    def repeat_interleave(self, *args, **kwargs) -> Conditions:
        return self

    def spatial(self, height: int, width: int) -> Context:
        """Per frame: its own image token, its own audio tokens, and the face mask at this level's size."""
        return Context(self.image.flatten(0, 1), self.audio.flatten(0, 1), self._gate(height, width))

    def temporal(self) -> Context:
        """Per clip: the mean of the tokens over the window's frames, the same for every pixel; no mask."""
        return Context(self.image.mean(1), self.audio.mean(1))

    def _gate(self, height: int, width: int) -> Tensor | None:
        if self.mask is None:
            return None
        if (height, width) not in self._gates:
            clips, frames = self.audio.shape[:2]
            level = F.interpolate(self.mask.float(), size=(height, width), mode="bicubic").to(self.audio.dtype)
            level = rearrange(level, "b 1 h w -> b 1 (h w) 1").expand(clips, frames, -1, -1)
            self._gates[height, width] = level.flatten(0, 1)  # [B·F, H·W, 1]
        return self._gates[height, width]


class AudioCrossAttention(nn.Module):
    """Attention processor of every `attn2`: out = to_out(attention(q, image) + gate · attention(q, audio)).

    `to_k_ip`/`to_v_ip` are lists of one, because the released state dict names them `processor.to_k_ip.0.weight`.
    """

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.to_k_ip = nn.ModuleList([nn.Linear(width, inner, bias=False)])
        self.to_v_ip = nn.ModuleList([nn.Linear(width, inner, bias=False)])

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Context, **_) -> Tensor:
        context, shape = encoder_hidden_states, hidden_states.shape
        # Temporal blocks come as [B·H·W, F, C], but all pixels of a clip share one context: fold them into its queries.
        hidden_states = hidden_states.reshape(context.audio.shape[0], -1, shape[-1])  # [G, L, C]
        query = attn.head_to_batch_dim(attn.to_q(hidden_states), out_dim=4)
        key = attn.head_to_batch_dim(self.to_k_ip[0](context.audio), out_dim=4)
        value = attn.head_to_batch_dim(self.to_v_ip[0](context.audio), out_dim=4)
        heard = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        heard = rearrange(heard, "g heads l c -> g l (heads c)")
        if context.gate is not None:
            heard = heard * context.gate
        # The softmax over a single image token is 1, so its attention is its value, whatever the query and the key.
        seen = attn.to_v(context.image)  # [G, 1, C]
        return attn.to_out[1](attn.to_out[0](seen + heard)).reshape(shape)


class AudioTransformer(TransformerSpatioTemporalModel):
    """A spatial and a temporal transformer block that read their context from `Conditions`."""

    def forward(self, hidden_states, encoder_hidden_states: Conditions, image_only_indicator, return_dict=True):
        """hidden_states [B·F, C, H, W] -> the same shape, in a tuple. The stock class takes the *first* frame's token as
        temporal context; the method takes the mean over the window, and positions always start at 0."""
        height, width = hidden_states.shape[-2:]
        clips, frames = image_only_indicator.shape
        spatial, temporal = encoder_hidden_states.spatial(height, width), encoder_hidden_states.temporal()

        x = rearrange(self.norm(hidden_states), "bf c h w -> bf (h w) c")
        x = self.proj_in(x)
        position = self.time_proj(torch.arange(frames, device=x.device)).to(x.dtype)
        position = self.time_pos_embed(position).repeat(clips, 1)[:, None]  # [B·F, 1, C]
        for block, temporal_block in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            x = self._run(block, x, None, spatial)
            mixed = self._run(temporal_block, x + position, frames, temporal)
            x = self.time_mixer(x_spatial=x, x_temporal=mixed, image_only_indicator=image_only_indicator)
        x = rearrange(self.proj_out(x), "bf (h w) c -> bf c h w", h=height).contiguous()
        return (x + hidden_states,)

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
        for block in self.cross_attentions():
            # Head counts and widths differ by level: read them off the layer itself.
            block.set_processor(AudioCrossAttention(block.to_k.in_features, block.to_k.out_features))
        self.start_audio_attention()

    def cross_attentions(self) -> list[Attention]:
        """Every `attn2` of the spatial and temporal transformer blocks."""
        return [module for name, module in self.named_modules() if name.endswith(".attn2")]

    @torch.no_grad()
    def start_audio_attention(self) -> None:
        """Starts the audio projections as copies of each layer's own `to_k` and `to_v` (SPEC.md section 3)."""
        for attn in self.cross_attentions():
            attn.processor.to_k_ip[0].weight.copy_(attn.to_k.weight)
            attn.processor.to_v_ip[0].weight.copy_(attn.to_v.weight)

    def freeze_unused(self) -> None:
        """The key of a single image token never receives a gradient; DDP wants to know which parameters never will."""
        for attn in self.cross_attentions():
            attn.to_k.requires_grad_(False)
