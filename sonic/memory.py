"""How much memory a training run takes, found before it starts: one step of it on tensors that have no storage.

torch's FakeTensorMode runs the real model, loss, backward pass and frozen encoders on shapes alone, and `counting.Live` follows
which storages are alive at every moment. The fake tensors say that they are on a CPU, because torch built without CUDA cannot
fake a GPU's; `norms_as_on_gpu` gives them the types that autocast would give them there.

Axes: B clips, F frames of a window, C H W latent channels, height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import psutil
import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sonic.audio import LONG_LENGTH, SHORT_LENGTH
from sonic.checkpoints import Architecture, BaseModels, Checkpoint, build_base
from sonic.config import UserError
from sonic.counting import Live, default_type
from sonic.denoiser import Denoiser, Portrait, TrainingBatch
from sonic.optimizers import AT_ONCE, is_matrix
from sonic.trainable import PRECISIONS
from sonic.training import total_loss
from sonic.training_config import TrainingConfig

MOMENT = 4  # bytes of one fp32 number that an optimizer remembers of a parameter
SMALL_8BIT = 4096  # bitsandbytes keeps the state of smaller tensors in fp32
GUIDED = 3  # clips in the UNet at once when a sample video is made: one per guidance branch
ROOM = 0.9  # share of a GPU that a run should fill: CUDA's context and the gaps between blocks take the rest
# For `surely_small`: numbers kept per channel, pixel and layer of a UNet; the real ones keep less than a fifth of it.
KEPT_PER_LAYER = 150
KEPT_PER_PIXEL = 1024  # and of a VAE per pixel: eight maps of 128 channels


# ---------------------------------------------------------------------------------------------- one question per function


def norms_as_on_gpu(model: torch.nn.Module) -> None:
    """Has autocast on fake CPU tensors run norms in fp32, as it does on a GPU: their results are much of what is kept."""

    def in_fp32(norm: torch.nn.Module, args: tuple) -> tuple:
        return tuple(value.float() for value in args) if torch.is_autocast_enabled("cpu") else args

    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            module.register_forward_pre_hook(in_fp32)


def with_encoders(config: TrainingConfig) -> bool:
    """Whether VAE and CLIP are in memory during training."""
    return not config.cache_latents or config.validation_steps > 0


def optimizer_bytes(config: TrainingConfig, trainable: list[Tensor]) -> int:
    """Bytes of what the optimizer remembers of these parameters."""
    if config.use_8bit_adam:  # two moments of one byte each
        return sum(2 * value.numel() * (MOMENT if value.numel() < SMALL_8BIT else 1) for value in trainable)
    if config.optimizer == "muon":  # one momentum for matrices, AdamW's two moments for the rest
        return sum(MOMENT * value.numel() * (1 if is_matrix(value) else 2) for value in trainable)
    return sum(2 * MOMENT * value.numel() for value in trainable)


def update_bytes(config: TrainingConfig, trainable: list[Tensor], on_gpu: bool) -> int:
    """Bytes that the optimizer takes while it updates, beyond weights, gradients and its state."""
    sizes = [MOMENT * value.numel() for value in trainable]
    if config.use_8bit_adam or not sizes:
        return 0
    if config.optimizer == "muon":
        matrices = [MOMENT * value.numel() for value in trainable if is_matrix(value)]
        batch = max([MOMENT * AT_ONCE, *matrices])  # of which Newton and Schulz's iteration holds half a dozen
        return 6 * batch + (sum(sizes) - sum(matrices) if on_gpu else 0)
    if config.mixed_precision != "fp16":  # one kernel does it all
        return 0
    return sum(sizes) if on_gpu else 2 * max(sizes)  # on a GPU AdamW takes all parameters' square roots at once


def average_bytes(config: TrainingConfig, trainable: list[Tensor]) -> int:
    """Bytes of the moving average of the weights, if it lies on the training device."""
    return 4 * sum(value.numel() for value in trainable) if config.ema_decay and config.ema_device == "auto" else 0


# ---------------------------------------------------------------------------------------------- the estimate


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process by part at the moment when it holds most, when that is, and parameter counts."""

    parts: dict[str, int]
    moment: str
    parameters: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def table(self) -> str:
        """For people, in GB."""
        lines = ["parameters: " + ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in self.parameters.items())]
        lines += [f"  {name:14} {size / 1e9:8.2f} GB" for name, size in self.parts.items()]
        lines += [f"  {'together':14} {self.total / 1e9:8.2f} GB per process, estimated; the peak is {self.moment}"]
        return "\n".join(lines)


@dataclass(frozen=True)
class Step:
    """A step on fake tensors: the model's parameters, those that are trained, and what is alive beside them at its peak."""

    parameters: list[Tensor]
    trainable: list[Tensor]
    at_peak: dict[str, int]


Select = Callable[[Denoiser, TrainingConfig], None]


class Estimator:
    """Estimates for one model and any flags; `select` freezes what the flags do not train.

    `on_gpu` says for which kind of device, whatever there is here. Nothing is loaded: only configurations are read.
    """

    def __init__(self, start: Checkpoint, select: Select, on_gpu: bool):
        self.start, self.select, self.on_gpu = start, select, on_gpu
        self._made: dict[tuple, object] = {}

    def __call__(self, config: TrainingConfig) -> Estimate:
        # A step is the same with these, and an estimate of a real model takes seconds.
        alike = replace(
            config, use_8bit_adam=False, cache_latents=False, ema_decay=0.0, ema_device="auto", optimizer="adamw"
        )
        step = self._once(("step", alike), lambda: self.step(alike))
        half = config.mixed_precision == "bf16"
        shape = (config.train_batch_size, config.num_frames, config.resolution, half)
        frozen, encoding, decoding = self._once(("frozen", shape), lambda: self.frozen(*shape))
        gradients = sum(value.nbytes for value in step.trainable)
        held = {
            "weights": sum(value.nbytes for value in step.parameters),
            "optimizer": optimizer_bytes(config, step.trainable),
            "moving average": average_bytes(config, step.trainable),
            "encoders": sum(value.nbytes for value in frozen) if with_encoders(config) else 0,
        }
        kept = gradients if config.gradient_accumulation_steps > 1 else 0
        moments = {
            "in the forward and backward pass": step.at_peak,
            "in the optimizer's update": {
                "gradients": gradients,
                "working space": update_bytes(config, step.trainable, self.on_gpu),
            },
        }
        if not config.cache_latents:
            moments["when the VAE encodes"] = {"gradients": kept, "working space": encoding}
        if config.validation_steps:
            guided = self._once(("guided", alike), lambda: self.guided(alike))
            moments["when a sample video is made"] = {"working space": max(guided, decoding)}
        moment, most = max(moments.items(), key=lambda item: sum(item[1].values()))
        parts = {name: size for name, size in {**held, **most}.items() if size}
        counts = {
            "all": sum(value.numel() for value in step.parameters),
            "trainable": sum(value.numel() for value in step.trainable),
            "frozen encoders": sum(value.numel() for value in frozen) if with_encoders(config) else 0,
        }
        return Estimate(parts, moment, counts)

    def _once(self, key: tuple, make: Callable):
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _model(self, config: TrainingConfig) -> Denoiser:
        with init_empty_weights():  # fake parameters cannot be exchanged for others of another type
            model = self.start.architecture.build().train()
            self.select(model, config)
        if config.gradient_checkpointing:
            model.unet.enable_gradient_checkpointing()
        if self.on_gpu:
            norms_as_on_gpu(model)
        return model

    def precision(self, config: TrainingConfig) -> torch.autocast:
        """Autocast as the flags want it."""
        kind = PRECISIONS[config.mixed_precision]
        return torch.autocast("cpu", kind, enabled=kind != torch.float32)

    def _following(self, model: torch.nn.Module) -> Live:
        return Live([*model.parameters(), *model.buffers()], self.on_gpu)

    def step(self, config: TrainingConfig) -> Step:
        """One micro-batch's forward and backward pass, the last one before an update."""
        model = self._model(config)
        with FakeTensorMode(allow_non_fake_inputs=True):  # which only `to_empty` has
            model.to_empty(device="cpu")
            trainable = [value for value in model.parameters() if value.requires_grad]
            with self._following(model) as live:
                if config.gradient_accumulation_steps > 1:  # from the second batch on, the first one's are there
                    for value in trainable:
                        value.grad = torch.zeros_like(value)
                        live.rename(value.grad, "gradients")
                live.follow_gradients(model)
                train_step(model, empty_batch(self.start.architecture, config), lambda: self.precision(config))
            return Step(list(model.parameters()), trainable, live.at_peak)

    def guided(self, config: TrainingConfig) -> int:
        """Bytes of the UNet's pass over one window for a sample video."""
        model = self._model(config).eval()
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model.to_empty(device="cpu")
            with self._following(model) as live, self.precision(config):
                batch = empty_batch(self.start.architecture, replace(config, train_batch_size=GUIDED, noise_draws=1))
                tokens = model.audio2token(batch.short_windows)
                model.velocity(batch.latents, batch.sigma, batch.portrait, tokens, batch.buckets, batch.fps)
            return live.peak

    def frozen(self, clips: int, frames: int, resolution: int, half: bool) -> tuple[list[Tensor], int, int]:
        """The encoders' parameters, and the bytes that they take beyond those for encoding and for decoding."""
        with FakeTensorMode(), torch.no_grad(), default_type(torch.bfloat16 if half else torch.float32):
            vae, clip = (part.eval() for part in build_base(self.start.base_model))
            base = BaseModels(vae, clip, None)
            models = torch.nn.ModuleList([vae, clip])
            with self._following(models) as live:
                latents = base.latents(torch.zeros(1, 3, resolution, resolution))  # one by one, as `encode_frames` does
                base.embeddings(torch.zeros(clips, 3, *[clip.config.image_size] * 2))
            encoding = live.peak
            with self._following(models) as live:
                chunk = min(self.start.settings.decode_chunk_size, frames)
                part = latents[:1].to(vae.dtype).repeat(chunk, 1, 1, 1)
                vae.decode(part, num_frames=chunk)
            return list(models.parameters()), encoding, live.peak


def empty_batch(architecture: Architecture, config: TrainingConfig) -> TrainingBatch:
    """A batch of the shapes that the flags give, full of ones and zeros."""
    side, clips, frames = config.resolution // 8, config.train_batch_size * config.noise_draws, config.num_frames
    layers, width = architecture.audio_layers, architecture.audio_width

    def latents() -> Tensor:
        return torch.zeros(clips, frames, architecture.unet["out_channels"], side, side)

    return TrainingBatch(
        latents=latents(),
        portrait=Portrait(
            latents()[:, 0], torch.zeros(clips, architecture.clip_width), torch.ones(clips, 1, 8 * side, 8 * side)
        ),
        short_windows=torch.zeros(clips, frames, SHORT_LENGTH, layers, width),
        long_windows=torch.zeros(clips, frames, LONG_LENGTH, 1, width),
        buckets=torch.zeros(clips, 2),
        fps=torch.zeros(clips),
        keep_audio=torch.ones(clips),
        keep_image=torch.ones(clips),
        sigma=torch.ones(clips),
        noise=latents(),
    )


def train_step(model: Denoiser, batch: TrainingBatch, precision: Callable) -> None:
    """Forward and backward pass as accelerate runs them: autocast ends with the model's forward."""
    with precision():
        losses = model(batch)
    total_loss(losses).backward()


# ---------------------------------------------------------------------------------------------- does it fit


def used_memory(device: torch.device) -> float:
    """GB: the peak so far of the GPU's allocator, or what this process holds now on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


def available_memory(config: TrainingConfig, device: torch.device) -> tuple[int, str]:
    """Bytes that a run may take, and of what: the card that --device_memory_gb names, this GPU, or this machine's free RAM."""
    if config.device_memory_gb is not None:
        return int(config.device_memory_gb * 1e9), f"a device of {config.device_memory_gb:g} GB"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.total_memory, f"{properties.name} with {properties.total_memory / 1e9:.0f} GB"
    free = psutil.virtual_memory().available
    return free, f"{free / 1e9:.0f} GB of free RAM"


def surely_small(start: Checkpoint, config: TrainingConfig) -> int:
    """Bytes that a run stays below, however it is made: every layer of the UNet at full width and resolution.

    Far too much for a real model, but enough to spare small runs the seconds that an estimate takes.
    """
    unet, side = start.architecture.unet, config.resolution // 8
    layers = (2 * unet.get("layers_per_block", 2) + 2) * len(unet["block_out_channels"]) + 2
    pixels = config.train_batch_size * config.noise_draws * config.num_frames * side**2
    activations = 4 * KEPT_PER_LAYER * layers * max(unet["block_out_channels"]) * pixels
    files = sum(path.stat().st_size for path in start.tensors.values())  # of fp16 it may be, so twice that
    return activations + 2 * 4 * files + 4 * KEPT_PER_PIXEL * config.resolution**2


def ways_to_save(config: TrainingConfig, on_gpu: bool) -> Iterator[tuple[str, dict]]:
    """Flags that take less memory and what they change, the most harmless first; only those not in use yet."""
    if not config.gradient_checkpointing:
        yield "--gradient_checkpointing", {"gradient_checkpointing": True}
    if config.mixed_precision != "bf16":
        yield "--mixed_precision bf16", {"mixed_precision": "bf16"}
    if config.ema_decay and config.ema_device == "auto":
        yield "--ema_device cpu", {"ema_device": "cpu"}
    if on_gpu and config.optimizer == "adamw" and not config.use_8bit_adam:
        yield "--use_8bit_adam", {"use_8bit_adam": True}
    if not config.cache_latents:
        yield "--cache_latents", {"cache_latents": True, "crop_per": "clip"}
    if config.train_batch_size > 1:
        batches = config.train_batch_size * config.gradient_accumulation_steps
        changes = {"train_batch_size": 1, "gradient_accumulation_steps": batches}
        yield f"--train_batch_size 1 --gradient_accumulation_steps {batches}", changes
    if config.noise_draws > 1:
        yield "--noise_draws 1", {"noise_draws": 1}
    if config.train_modules == "all":
        yield "--train_modules audio", {"train_modules": "audio"}
    if config.validation_steps:
        yield "--validation_steps 0", {"validation_steps": 0}
    for side in (512, 384, 256):
        if side < config.resolution:
            yield f"--resolution {side}", {"resolution": side}


def flags_that_fit(estimator: Estimator, config: TrainingConfig, room: int) -> tuple[str, Estimate] | None:
    """The most harmless flags with which a run fits into `room` bytes, and its estimate with them; None if none do."""
    ways = list(ways_to_save(config, estimator.on_gpu))
    chosen: list[tuple[str, dict]] = []
    for way in ways:
        chosen.append(way)
        if estimator(_with(config, chosen)).total <= room:
            break
    else:
        return None
    for way in chosen[-2::-1]:  # the harshest first: what is not needed goes
        fewer = [one for one in chosen if one is not way]
        if estimator(_with(config, fewer)).total <= room:
            chosen = fewer
    return " ".join(text for text, _ in chosen), estimator(_with(config, chosen))


def _with(config: TrainingConfig, ways: list[tuple[str, dict]]) -> TrainingConfig:
    for _, changes in ways:
        config = replace(config, **changes)
    return config


def verdict(estimator: Estimator, config: TrainingConfig, room: int, where: str) -> tuple[bool, str]:
    """Whether a run of these flags fits into `room` bytes of `where`, and a sentence that says so, or what would make it fit."""
    needed = estimator(config).total
    wanted = ROOM * room
    if needed <= wanted:
        return True, f"fits into {where}"
    says = f"needs about {needed / 1e9:.1f} GB" + (f", which fills {where}" if needed <= room else f", but has {where}")
    found = flags_that_fit(estimator, config, wanted)
    if found is None:
        return needed <= room, f"{says}: no flag makes it fit, it takes a smaller model or a larger device"
    flags, estimate = found
    return needed <= room, f"{says}: it would fit with {flags} ({estimate.total / 1e9:.1f} GB)"


def require_memory(estimator: Estimator, config: TrainingConfig, device: torch.device) -> str | None:
    """A warning if a run's memory is tight, None if not. Raises UserError if it cannot fit, and says what would."""
    room, where = available_memory(config, device)
    if surely_small(estimator.start, config) < room / 2 and not estimator.on_gpu:
        return None
    fits, sentence = verdict(estimator, config, room, where)
    if not fits:
        raise UserError(f"this run {sentence}")
    return None if sentence.startswith("fits") else f"this run {sentence}"
