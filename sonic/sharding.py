"""One process, many with the whole model each (DDP), or with a share of it (FSDP2, DeepSpeed): what differs between them.

accelerate starts and wraps them; this is what it leaves to its users.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator, DistributedType
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from sonic.config import UserError
from sonic.trainable import PRECISIONS
from sonic.training_config import TrainingConfig


def any_says(accelerator: Accelerator, said: bool) -> bool:
    """Whether any process says so; all of them must ask."""
    if accelerator.num_processes == 1:
        return said
    return accelerator.reduce(torch.tensor(float(said), device=accelerator.device), "sum").item() > 0


def autocast_for(config: TrainingConfig, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Makes the context in which the model computes in `--mixed_precision`; its weights stay in fp32.

    The same for one process, DDP, FSDP2 and DeepSpeed, each of which would have a way of its own.
    """
    dtype = PRECISIONS[config.mixed_precision]
    return lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def ready_for_sharding(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Tells DeepSpeed what the flags say, and refuses what a sharded model cannot do. Raises UserError."""
    kind = accelerator.distributed_type
    if kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("FSDP 1 is not supported: set fsdp_version: 2 in accelerate's configuration")
    if config.mixed_precision == "fp16":
        raise UserError(f"--mixed_precision fp16 does not go with {kind.value}: use bf16, or no")
    if config.optimizer == "muon":
        raise UserError(f"--optimizer muon needs whole matrices, which {kind.value} takes apart: use adamw")
    if kind == DistributedType.FSDP and (config.train_modules == "lora" or config.ema_decay or config.use_8bit_adam):
        raise UserError(
            "--train_modules lora, --ema_decay and --use_8bit_adam need whole weights: use DDP or ZeRO-2, not FSDP2"
        )
    if kind == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero_stage > 2:
            raise UserError(
                "DeepSpeed's ZeRO-3 is not supported: use zero_stage 2, or FSDP2, which takes weights apart as well"
            )
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": config.train_batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "gradient_clipping": config.max_grad_norm,
            "zero_allow_untested_optimizer": True,  # any that torch knows
        }


def callable_parts(model: torch.nn.Module) -> None:
    """FSDP2 gathers weights when `forward` is called; validation also asks for velocities alone."""
    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, "velocity")
        register_fsdp_forward_method(model, "predict")


def gradient_norm(accelerator: Accelerator, model: torch.nn.Module, limit: float) -> float:
    """The norm of all gradients, which are clipped to `limit` unless that is 0."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = accelerator.clip_grad_norm_(trainable, limit or float("inf"))
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # it clips by itself, and has made its step already
        norm = model.get_global_grad_norm()
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
