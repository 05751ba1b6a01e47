"""The two small networks between Whisper and the UNet (SPEC.md section 2; paper sections 3.2 and 3.3).

Axes: T Whisper features of a window, S hidden states per feature, W Whisper's width, K audio tokens, D token width,
E CLIP width; leading axes (clips, frames) are free.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, cat, nn

from sonic.audio import LONG_LENGTH, SHORT_LENGTH

WHITEN_FLOOR = 0.01
BUCKET_SCALE = 16.0  # the released network's outputs times 16 plus 16 are buckets


class AudioToken(nn.Module):
    """`audio2token`: windows [..., T, S, W] -> tokens [..., K, D]."""

    def __init__(self, layers: int, width: int, hidden: int = 1024, token_width: int = 1024, tokens: int = 32):
        super().__init__()
        self.layers, self.width, self.tokens, self.token_width = layers, width, tokens, token_width
        self.proj1 = nn.Linear(SHORT_LENGTH * layers * width, hidden)
        self.proj2 = nn.Linear(hidden, hidden)
        self.proj3 = nn.Linear(hidden, tokens * token_width)
        self.norm = nn.LayerNorm(token_width)

    def forward(self, windows: Tensor) -> Tensor:
        x = F.relu(self.proj1(windows.flatten(-3)))
        x = F.relu(self.proj2(x))
        return self.norm(self.proj3(x).unflatten(-1, (self.tokens, self.token_width)))

    @torch.no_grad()
    def fit(self, windows: Tensor) -> None:
        """Starts the network anew with a first layer that gives windows like these [n, T, S, W] mean 0 and variance 1 in every
        direction in which they vary, so that what changes from frame to frame is heard beside what does not.

        Mean and covariance are folded into the layer's weights: the form of the network stays the released one. (ours)
        """
        for layer in (self.proj1, self.proj2, self.proj3, self.norm):
            layer.reset_parameters()
        x = windows.flatten(1).float()
        mean = x.mean(0)
        _, deviation, directions = torch.linalg.svd((x - mean) / len(x) ** 0.5, full_matrices=False)
        deviation, directions = deviation[: self.proj1.out_features], directions[: self.proj1.out_features]
        # Directions of less than a hundredth of the largest deviation are noise: they are not blown up to the same size.
        whiten = directions / deviation.clamp_min(WHITEN_FLOOR * deviation[0])[:, None]  # [k, D]
        mix = torch.nn.init.orthogonal_(self.proj1.weight.new_empty(self.proj1.out_features, len(whiten)))
        weight = mix * (self.proj1.out_features / len(whiten)) ** 0.5 @ whiten.to(mix)
        self.proj1.weight.copy_(weight)
        self.proj1.bias.copy_(-weight @ mean.to(weight))

    def silence(self) -> Tensor:
        """The tokens of the unconditional branch, [K, D]: `audio2token(zeros)`, not zeros."""
        weight = self.proj1.weight
        return self(torch.zeros(SHORT_LENGTH, self.layers, self.width, dtype=weight.dtype, device=weight.device))


class AudioBucket(nn.Module):
    """`audio2bucket`: windows [..., T, 1, W] and the CLIP embedding [..., E] -> raw outputs [..., outputs].

    Outputs 0 and 1 are translation and expression. The released network is `outputs = output_dim × context_tokens` wide.
    """

    def __init__(self, width: int, clip_width: int, hidden: int = 1024, outputs: int = 2):
        super().__init__()
        self.width, self.clip_width = width, clip_width
        self.proj1 = nn.Linear(LONG_LENGTH * width + clip_width, hidden)
        self.proj2 = nn.Linear(hidden, hidden)
        self.proj3 = nn.Linear(hidden, outputs)

    def forward(self, windows: Tensor, clip_embedding: Tensor) -> Tensor:
        x = cat([windows.flatten(-3), clip_embedding], dim=-1)
        x = F.silu(self.proj1(x))
        x = F.silu(self.proj2(x))
        return self.proj3(x)

    def buckets(self, windows: Tensor, clip_embedding: Tensor) -> Tensor:
        """The same as motion buckets [..., 2] (translation, expression): outputs · 16 + 16 (SPEC.md section 2)."""
        return self(windows, clip_embedding) * BUCKET_SCALE + BUCKET_SCALE


def bucket_targets(buckets: Tensor) -> Tensor:
    """What `audio2bucket` learns to give: (b - 16) / 16 (SPEC.md section 6)."""
    return (buckets - BUCKET_SCALE) / BUCKET_SCALE
