"""Counts the bytes that tensors take while a model runs, also on tensors without storage (torch's FakeTensorMode).

What happens inside of a GPU's kernels is not seen that way and is added from what is known of them (`inside_kernel`).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Live(TorchDispatchMode):
    """Follows the storages that operations make, from allocation to release; `peak` is the most bytes alive at once.

    Storages of `known` tensors do not count. `at_peak` says what the bytes were: gradients (see `follow_gradients`), working
    space (made without autograd, as in a backward pass), or activations (everything else).
    """

    def __init__(self, known: Iterator[Tensor], on_gpu: bool):
        super().__init__()
        self.on_gpu, self.peak, self.at_peak = on_gpu, 0, {}
        self.now = {"activations": 0, "gradients": 0, "working space": 0}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._followed: dict[int, tuple[weakref.ref, int, str]] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._follow(value)
        inside = inside_kernel(operation, args, result) if self.on_gpu else 0
        total = sum(self.now.values()) + inside
        if total > self.peak:
            self.peak = total
            self.at_peak = self.now | {"working space": self.now["working space"] + inside}
        return result

    def follow_gradients(self, model: torch.nn.Module) -> None:
        """Counts what becomes a parameter's gradient as such."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda owner: self.rename(owner.grad, "gradients"))

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._followed or not size:
            return
        kind = "activations" if torch.is_grad_enabled() else "working space"
        self._followed[key] = (weakref.ref(storage, lambda _: self._release(key)), size, kind)
        self.now[kind] += size

    def rename(self, tensor: Tensor, kind: str) -> None:
        """From now on this tensor counts as of that kind."""
        key = tensor.untyped_storage()._cdata
        if key in self._followed:
            reference, size, old = self._followed[key]
            self._followed[key] = reference, size, kind
            self.now[old] -= size
            self.now[kind] += size

    def _release(self, key: int) -> None:
        _, size, kind = self._followed.pop(key)
        self.now[kind] -= size


def inside_kernel(operation, args: tuple, result) -> int:
    """Bytes that a GPU's kernel for an operation takes while it runs, beyond its inputs and outputs.

    cuDNN's convolutions compute on channels-last copies of tensors that lie channels first. FlashAttention sums its query's
    gradient in fp32, with the queries rounded up to blocks of 128: five times as many as the 25 frames of a window.
    """
    packet = operation.overloadpacket
    if packet is torch.ops.aten.convolution:
        return args[0].nbytes + result.nbytes
    if packet is torch.ops.aten.convolution_backward:
        return args[0].nbytes + args[1].nbytes
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        query = args[1]  # [G, heads, L, width]
        if query.dtype != torch.float32:
            groups, heads, length, width = query.shape
            return 4 * groups * heads * (128 * math.ceil(length / 128)) * (32 * math.ceil(width / 32))
    return 0


@contextmanager
def default_type(kind: torch.dtype) -> Iterator[None]:
    """New models are of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
