"""The blocks of SVD's UNet with its own weights and forwards that move less memory: same result up to rounding.

Pictures stay in the channels-last layout from the first convolution to the last, in which [B·F, C, H, W] is also a row of
tokens [B·F, H·W, C] and, seen along time, a picture [B, C, F, H·W] that is F high: no block has to copy it from one form to
the other. Divisions by 1, additions of 0 and dropout of nothing are left out, and what no gradient needs is written over.

Axes: B clips, F frames of a window, C channels, H W latent height and width, L tokens of one attention call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock, FeedForward, TemporalBasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import AlphaBlender, SpatioTemporalResBlock
from einops import rearrange
from torch import Tensor, nn

from sonic.config import UserError


def plus(fresh: Tensor, other: Tensor) -> Tensor:
    """fresh + other, written into `fresh`, a tensor that nobody else holds, unless a gradient may be asked for."""
    if torch.is_grad_enabled() or fresh.dtype != other.dtype:
        return fresh + other
    return fresh.add_(other)


def silu(fresh: Tensor) -> Tensor:
    """F.silu, written into `fresh` unless a gradient may be asked for."""
    return F.silu(fresh, inplace=not torch.is_grad_enabled())


def feed_forward(ff: FeedForward, x: Tensor) -> Tensor:
    """GEGLU and the projection behind it."""
    value, gate = ff.net[0].proj(x).chunk(2, dim=-1)
    gate = F.gelu(gate)
    return ff.net[2](gate * value if torch.is_grad_enabled() else gate.mul_(value))


def heads_of(attn: Attention, x: Tensor) -> Tensor:
    """[G, L, C] -> [G, heads, L, C / heads], a view."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, fused: bool) -> Tensor:
    """Attention of [..., L, C] to [..., K, C]: by torch's fused kernel, or by products of matrices that keep all L × K weights."""
    if fused:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    weights = (query @ key.mT * scale).float().softmax(-1)
    return weights.to(value.dtype) @ value


class Mixer(AlphaBlender):
    """How much the temporal half counts; the spatial one counts for the rest. The published `image_only_indicator` is 0."""

    def forward(self, like: Tensor) -> Tensor:
        """The share, [1], in the precision of `like`."""
        return (1 - torch.sigmoid(self.mix_factor)).to(like.dtype)


class FrameConv(nn.Conv3d):
    """SVD's temporal convolution (3, 1, 1), as one over pictures that are F high and H·W wide: x [B, C, F, H·W]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[..., 0], self.bias, padding=self.padding[:2])


class ResBlock(SpatioTemporalResBlock):
    """A spatial and a temporal residual block, mixed."""

    def forward(self, hidden_states: Tensor, temb: Tensor, image_only_indicator: int) -> Tensor:
        """hidden_states [B·F, C, H, W], temb [B or 1, E]; the stock caller's third argument is here the number of frames."""
        x, frames = hidden_states, image_only_indicator
        block, emb = self.spatial_res_block, F.silu(temb)
        h = block.conv1(silu(block.norm1(x)))
        shift = block.time_emb_proj(emb)[:, None, :, None, None]
        h = plus(h.unflatten(0, (-1, frames)), shift).flatten(0, 1)
        h = block.conv2(silu(block.norm2(h)))
        x = plus(h, x if block.conv_shortcut is None else block.conv_shortcut(x))

        block = self.temporal_res_block
        h = rearrange(x, "(b f) c h w -> b c f (h w)", f=frames)
        h = block.conv1(silu(block.norm1(h)))
        h = plus(h, block.time_emb_proj(emb)[:, :, None, None])
        h = block.conv2(silu(block.norm2(h)))
        h = rearrange(h, "b c f (h w) -> (b f) c h w", h=x.shape[-2])
        # alpha · x + (1 - alpha) · (x + h)
        return torch.addcmul(x, h.to(x.dtype), self.time_mixer(x))


class SpatialBlock(BasicTransformerBlock):
    """Attention within each frame, to image and sound, and a feed-forward layer."""

    fused_attention = True  # see `attend`

    def forward(self, x: Tensor, context, fork: Callable[[Tensor], Tensor]) -> Tensor:
        """x [B·F, H·W, C] -> the same; `fork` adds the clip that has been like the one before it until it hears."""
        normed, attn = self.norm1(x), self.attn1
        query, key, value = (heads_of(attn, to(normed)) for to in (attn.to_q, attn.to_k, attn.to_v))
        seen = attend(query, key, value, attn.scale, self.fused_attention)
        x = fork(plus(attn.to_out[0](rearrange(seen, "g heads l c -> g l (heads c)")), x))
        x = plus(self.attn2(self.norm2(x), encoder_hidden_states=context), x)
        return plus(feed_forward(self.ff, self.norm3(x)), x)


class TemporalBlock(TemporalBasicTransformerBlock):
    """Attention along time at each pixel, to image and sound, and feed-forward layers."""

    fused_attention = True  # see `attend`

    def forward(self, x: Tensor, context, frames: int) -> Tensor:
        """x [B·F, H·W, C] -> the same. Only attention itself needs the pixels in front of the frames."""
        x = plus(feed_forward(self.ff_in, self.norm_in(x)), x)
        x = plus(self._along_time(self.norm1(x), frames), x)
        x = plus(self.attn2(self.norm2(x), encoder_hidden_states=context), x)
        return plus(feed_forward(self.ff, self.norm3(x)), x)

    def _along_time(self, x: Tensor, frames: int) -> Tensor:
        attn = self.attn1
        pixels = "(b f) p (heads c) -> b p heads f c"
        query, key, value = (
            rearrange(to(x), pixels, f=frames, heads=attn.heads) for to in (attn.to_q, attn.to_k, attn.to_v)
        )
        # One clip at a time, because the kernels take four axes, and two cannot be seen as one without a copy.
        clips = [attend(*clip, attn.scale, self.fused_attention) for clip in zip(query, key, value, strict=True)]
        seen = torch.stack([rearrange(clip, "p heads f c -> f p (heads c)") for clip in clips])
        return attn.to_out[0](seen.flatten(0, 1))


def take_over(unet: nn.Module) -> None:
    """Gives the stock blocks of a UNet these forwards; weights and their names stay."""
    ours = {
        SpatioTemporalResBlock: ResBlock,
        BasicTransformerBlock: SpatialBlock,
        TemporalBasicTransformerBlock: TemporalBlock,
        AlphaBlender: Mixer,
        nn.Conv3d: FrameConv,
    }
    for name, module in unet.named_modules():
        if type(module) in ours:
            module.__class__ = ours[type(module)]
        if isinstance(module, AlphaBlender):
            assert module.merge_strategy == "learned_with_images" and not module.switch_spatial_to_temporal_mix, name


def lay_out(model: nn.Module) -> None:
    """Convolution weights in channels-last layout, so that no call has to copy pictures or them into it. For inference."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        elif isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)


def require_compiler(device: torch.device) -> None:
    """UserError where torch.compile cannot work on a CPU, which would be known only after the first step's minutes."""
    if device.type != "cpu":
        return
    from torch._inductor import cpp_builder, exc  # takes a second to import

    if " " in torch.__path__[0]:
        raise UserError(f"torch.compile cannot work in a path with a space, {torch.__path__[0]}: leave --compile away")
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise UserError("--compile needs a C++ compiler: apt-get install g++, or leave --compile away") from None


def compile_unet(unet: nn.Module, device: torch.device) -> None:
    """torch.compile in place. On a GPU calls are replayed as CUDA graphs; on a CPU weights are packed for its matrix kernels.

    UserError: it cannot work here.
    """
    require_compiler(device)
    if device.type == "cuda":
        unet.compile(mode="reduce-overhead", dynamic=False)
    else:
        unet.compile(dynamic=False, options={"freezing": True})
