"""One process of a sharded run on the CPU: `torchrun ... sharded_worker.py KIND flags of sonic_training.py`.

accelerate starts FSDP2 and DeepSpeed only where there are accelerators. This makes it do so on CPU processes over gloo; all
that follows is its own code.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import yaml
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin

import sonic.run_setup
import sonic_training

CONFIGS = Path(__file__).resolve().parent.parent / "configs/accelerate"


def fsdp2(**options) -> Accelerator:
    """An accelerator as configs/accelerate/8x24gb_fsdp2.yaml asks for it."""
    asked = yaml.safe_load((CONFIGS / "8x24gb_fsdp2.yaml").read_text())["fsdp_config"]
    accelerator = Accelerator(**options | {"cpu": True})  # also where there is a GPU
    names = asked["fsdp_transformer_layer_cls_to_wrap"].split(",")
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=asked["fsdp_version"],
        auto_wrap_policy=asked["fsdp_auto_wrap_policy"].lower(),
        transformer_cls_names_to_wrap=names,
        reshard_after_forward=asked["fsdp_reshard_after_forward"],
        cpu_ram_efficient_loading=asked["fsdp_cpu_ram_efficient_loading"],
        state_dict_type=asked["fsdp_state_dict_type"],
    )
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator


def zero2(**options) -> Accelerator:
    """An accelerator as configs/accelerate/8x80gb_zero2.yaml asks for it."""
    from accelerate.utils import DeepSpeedPlugin

    asked = yaml.safe_load((CONFIGS / "8x80gb_zero2.yaml").read_text())["deepspeed_config"]
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true"}
    plugin = DeepSpeedPlugin(zero_stage=asked["zero_stage"], gradient_clipping=1.0)
    return Accelerator(deepspeed_plugin=plugin, **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sonic.run_setup.Accelerator = {"fsdp2": fsdp2, "zero2": zero2}[sys.argv[1]]
    sonic_training.run(lambda: sonic_training.main(sys.argv[2:]))
