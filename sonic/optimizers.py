"""What moves the weights: AdamW, as the method's authors use, or Muon, which starts a model from nothing several times faster."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sonic.training_config import TrainingConfig

# Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a quintic that drives singular values towards 1
ITERATIONS = 5
ADAM_RMS = 0.2  # of an AdamW update over its learning rate (Liu et al., "Muon is scalable for LLM training", 2025)
AT_ONCE = 2**22  # numbers in one batch of matrices of the same shape: many small ones cost a third of one after another
FEW = 8  # rows or columns; smaller matrices are left to AdamW


class Muon(torch.optim.AdamW):
    """Muon for matrices and convolutions between more than 8 channels, AdamW for everything else.

    Muon's updates are scaled to the size of AdamW's, so one learning rate serves both (1e-3 is a good start for a model
    from nothing). A convolution [out, in, ...] counts as a matrix of `out` rows.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0):
        parameters = list(parameters)
        matrices = [value for value in parameters if is_matrix(value)]
        others = [value for value in parameters if not is_matrix(value)]
        groups = [{"params": group, "muon": muon} for group, muon in ((matrices, True), (others, False)) if group]
        super().__init__(groups, lr=lr, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure=None):
        """One update; parameters without a gradient stay."""
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                self._step_matrices(group)
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _step_matrices(self, group: dict) -> None:
        alike = defaultdict(list)
        for value in group["params"]:
            if value.grad is not None:
                alike[len(value), value[0].numel()].append(value)
        for shape, values in alike.items():
            size = ADAM_RMS * max(shape) ** 0.5
            count = max(1, AT_ONCE // math.prod(shape))
            for some in (values[start : start + count] for start in range(0, len(values), count)):
                updates = orthogonal(torch.stack([self._ahead(value).flatten(1) for value in some]))
                for value, update in zip(some, updates, strict=True):
                    value.mul_(1 - group["lr"] * group["weight_decay"])
                    value.add_(update.view_as(value), alpha=-group["lr"] * size)

    def _ahead(self, value: nn.Parameter) -> Tensor:
        """The gradient with Nesterov's momentum, which is kept in the state."""
        state = self.state[value]
        if not state:
            state["momentum"] = torch.zeros_like(value)
            state["step"] = torch.tensor(0.0)  # AdamW looks for it when a state is loaded
        state["momentum"].lerp_(value.grad, 1 - MOMENTUM)
        return value.grad.lerp(state["momentum"], MOMENTUM)


def is_matrix(value: Tensor) -> bool:
    """Whether a weight has more than a few rows and columns."""
    return value.ndim >= 2 and min(len(value), value[0].numel()) > FEW


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [n, rows, columns] with their singular values near 1 (0.7 to 1.2), their directions kept: Newton and Schulz's
    iteration."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).float()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def make_optimizer(config: TrainingConfig, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """The optimizer that the flags name."""
    settings = {"lr": config.learning_rate, "weight_decay": config.adam_weight_decay}
    if config.optimizer == "muon":
        return Muon(parameters, **settings)
    if config.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit  # optional

        return AdamW8bit(parameters, **settings)
    # With fp16 the fused step itself leaves out what overflows, and accelerate would count such a step as done.
    return torch.optim.AdamW(parameters, fused=config.mixed_precision != "fp16", **settings)
