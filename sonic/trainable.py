"""What a run trains, how the rest is held, the average of what is trained, and the plain model that a checkpoint ships.

Frozen means: no gradient, no optimizer state, no share in the average. A checkpoint ships all weights of a model, in fp32 and
without LoRA layers, whatever was trained, and frozen ones as the run found them.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers.models.attention_processor import Attention
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from sonic.audio import AudioExtractor
from sonic.checkpoints import Checkpoint, open_checkpoint, save_model, save_released
from sonic.config import UserError
from sonic.denoiser import Denoiser
from sonic.lora import add_lora, is_lora, load_lora, lora_matrices, merge, open_lora, save_lora
from sonic.training_config import TrainingConfig
from sonic.unet import AudioCrossAttention, SonicUNet
from sonic.weights import fill_strict, read_tensors

# The modules of the UNet that are trained whole.
WHOLE = {"all": SonicUNet, "attention": Attention, "audio": AudioCrossAttention, "lora": AudioCrossAttention}
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of --mixed_precision
LORA = "lora"  # in a checkpoint
RAW = "state/raw.safetensors"  # what is trained, where the checkpoint's own weights are averages of it


def require_packages(config: TrainingConfig) -> None:
    """Raises UserError if the flags need a package that is not installed."""
    for needed, flag, package in (
        (config.train_modules == "lora", "--train_modules lora", "peft"),
        (config.use_8bit_adam, "--use_8bit_adam", "bitsandbytes"),
    ):
        if needed and importlib.util.find_spec(package) is None:
            raise UserError(f"{flag} needs the package {package}: pip install {package}")


def open_start(config: TrainingConfig, resumed: Path | None, extractor: AudioExtractor | None) -> Checkpoint:
    """The model that a run begins with or goes on from; for LoRA always the one without."""
    places = config.base_model, config.whisper_path, extractor
    if resumed is None:
        return open_checkpoint(config.model_path, *places)
    if config.train_modules == "lora":
        return open_lora(resumed / LORA, config.model_path, *places)
    return open_checkpoint(resumed, *places)


def choose(model: Denoiser, config: TrainingConfig) -> None:
    """Freezes what the flags leave out, adds LoRA, and holds frozen matrices in the precision that autocast gives them anyway.

    Vectors (norms, biases, mixing factors) stay in fp32: autocast computes norms in it, and they weigh nothing.
    """
    unet = model.unet
    if config.train_modules == "lora":
        add_lora(unet, config.lora_rank)
    unet.requires_grad_(False)
    for module in unet.modules():
        if isinstance(module, WHOLE[config.train_modules]):
            module.requires_grad_(True)
    for matrix in lora_matrices(unet).values():
        matrix.requires_grad_(True)
    unet.freeze_unused()
    if config.train_modules == "all" or config.mixed_precision == "no":
        return
    for parameter in unet.parameters():
        half = not parameter.requires_grad and parameter.ndim > 1
        # What stays is copied: fresh from a file, it would keep all of the file's content in memory.
        parameter.data = parameter.data.to(PRECISIONS[config.mixed_precision]) if half else parameter.data.clone()


class Average:
    """The exponential moving average of some parameters, on a device of its own."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float, device: torch.device):
        self.decay = decay
        self.values = [parameter.detach().to(device, copy=True) for parameter in parameters]

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter], step: int) -> None:
        """Takes in the parameters after the run's step number `step`, counted from 1. The first steps count for more."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, value in zip(self.values, parameters, strict=True):
            average.lerp_(value.to(average.device), 1 - decay)

    @torch.no_grad()
    def swap(self, parameters: Iterable[nn.Parameter]) -> None:
        """Exchanges the parameters' values with the averages, one tensor at a time."""
        for average, value in zip(self.values, parameters, strict=True):
            raw = value.to(average.device, copy=True)
            value.copy_(average)
            average.copy_(raw)


class Trained:
    """A model in training: what of it is trained, the average of that, and how it is saved and found again.

    Changes `model`, which must be as `start` loads it, in place: see `choose`. With `resumed`, a checkpoint of the same run,
    it also takes up what that had learnt beyond `start`. `device` is where the model will be trained.
    """

    def __init__(
        self, model: Denoiser, config: TrainingConfig, start: Checkpoint, resumed: Path | None, device: torch.device
    ):
        self.model, self.config, self.start = model, config, start
        choose(model, config)
        # Not read before a save needs them, and there for as long as the run is, also if the file is deleted meanwhile.
        self.originals = {f"unet.{name}": tensor for name, tensor in read_tensors(start.tensors["unet"]).items()}
        if resumed and config.train_modules == "lora":
            load_lora(resumed / LORA, model)
        self.average = None
        if config.ema_decay:
            where = torch.device("cpu") if config.ema_device == "cpu" else device
            self.average = Average(self.parameters.values(), config.ema_decay, where)
        if resumed and (resumed / RAW).is_file():
            fill_strict(self.parameters, read_tensors(resumed / RAW), resumed / RAW)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def update(self, step: int) -> None:
        """Takes an optimizer step, number `step` of the run, into the average, if there is one."""
        if self.average:
            self.average.update(self.parameters.values(), step)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has the averaged weights, if there are any."""
        if not self.average:
            yield
            return
        self.average.swap(self.parameters.values())
        try:
            yield
        finally:
            self.average.swap(self.parameters.values())

    def plain(self) -> Denoiser:
        """The model as it is shipped: all weights in fp32 on the CPU, LoRA merged, frozen ones as the run found them."""
        frozen = {name for name, value in self.model.named_parameters() if not value.requires_grad}
        tensors = {}
        for name, value in self.model.state_dict().items():
            if is_lora(name):
                continue
            if isinstance(value, DTensor):
                value = value.full_tensor()  # of FSDP2; every process takes part
            plain_name = name.replace(".base_layer.", ".")  # peft's name for what lies under an adapter
            kept = self.originals.get(plain_name) if name in frozen else None
            tensors[plain_name] = (value if kept is None else kept).detach().cpu().float()
        merge(tensors, {f"unet.{name}": value for name, value in lora_matrices(self.model.unet).items()})
        with init_empty_weights():
            plain = self.start.architecture.build()
        plain.load_state_dict(tensors, assign=True)
        return plain

    def save(self, folder: Path, main: bool = True) -> None:
        """The averaged model, or the only one there is, in our form and in the released one, as LoRA too if it is; and what
        resuming needs beyond that. Called by every process, of which the main one writes."""
        if not main:
            with self.averaged():
                self.plain()  # weights that are spread over processes are gathered
            return
        if self.average:
            (folder / RAW).parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.detach().cpu() for name, value in self.parameters.items()}, folder / RAW)
        with self.averaged():
            plain = self.plain()
            save_model(folder, plain, self.start)
            save_released(folder / "released", plain)
            if self.config.train_modules == "lora":
                save_lora(folder / LORA, self.model, self.start)
