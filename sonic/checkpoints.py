"""Models in and out: base models, the released .pth files, our own folders (SPEC.md sections 1 and 3).

Our own folder holds `sonic.json` (architecture, settings, where base model and Whisper lie) and three safetensors files.
A base folder is Stable Video Diffusion's, in diffusers' layout; a Whisper folder is transformers'.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from sonic.adapters import AudioBucket, AudioToken
from sonic.audio import AudioExtractor, WhisperFeatures
from sonic.blocks import lay_out
from sonic.config import BASE_MODEL, WHISPER, Settings, UserError
from sonic.denoiser import Denoiser
from sonic.files import restore
from sonic.presets import Preset
from sonic.unet import SonicUNet
from sonic.weights import (
    described_by,
    find_weights,
    how_to_get,
    load_strict,
    locate,
    portable,
    read_json,
    read_tensors,
    remembered,
    tensors_of,
)

INDEX = "sonic.json"
FORMAT = 1
WHISPER_NAME = "whisper"  # what a checkpoint calls the features of any Whisper encoder
PARTS = ("unet", "audio2token", "audio2bucket")


# ---------------------------------------------------------------------------------------------- base models


@dataclass
class BaseModels:
    """The frozen parts around the UNet."""

    vae: AutoencoderKLTemporalDecoder
    image_encoder: CLIPVisionModelWithProjection
    scheduler: EulerDiscreteScheduler

    def to(self, device: torch.device) -> BaseModels:
        """The same, with the models moved to a device."""
        return BaseModels(self.vae.to(device), self.image_encoder.to(device), self.scheduler)

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels [n, 3, 8 H, 8 W] in -1..1 -> the mean of the VAE's posterior, *not* scaled, float32 [n, C, H, W]."""
        posterior = self.vae.encode(pixels.to(computing_device(self.vae), self.vae.dtype)).latent_dist
        return posterior.mode().float().contiguous()  # not as the VAE lays pictures out, but as files take them

    def embeddings(self, clip_pixels: Tensor) -> Tensor:
        """Normalised pixels [n, 3, S, S] -> CLIP embeddings, float32 [n, E]."""
        encoder = self.image_encoder
        return encoder(clip_pixels.to(computing_device(encoder), encoder.dtype)).image_embeds.float()


def computing_device(model: torch.nn.Module) -> torch.device:
    """Where a model computes: where it lies, or where accelerate's hooks fetch its weights to."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if getattr(one, "execution_device", None) is not None:
                return torch.device(one.execution_device)
    return model.device


@dataclass(frozen=True)
class BaseSizes:
    """What the configurations of a Stable Video Diffusion folder say of its latents and embeddings."""

    latent_channels: int
    scaling_factor: float
    clip_size: int  # pixels of a side that CLIP reads
    clip_width: int

    @classmethod
    def of(cls, folder: Path) -> BaseSizes:
        """Nothing is loaded."""
        with init_empty_weights():
            vae, clip = (part.config for part in build_base(folder))
        return cls(vae.latent_channels, vae.scaling_factor, clip.image_size, clip.projection_dim)


def build_base(folder: Path) -> tuple[AutoencoderKLTemporalDecoder, CLIPVisionModelWithProjection]:
    """VAE and CLIP encoder of a Stable Video Diffusion folder with fresh weights."""
    vae_path, clip_path = folder / "vae/config.json", folder / "image_encoder/config.json"
    vae_config, clip_config = read_json(vae_path), read_json(clip_path)
    with described_by(vae_path):
        vae = AutoencoderKLTemporalDecoder.from_config(vae_config)
    with described_by(clip_path):
        return vae, CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(clip_config))


def load_base(folder: Path, dtype: torch.dtype = torch.float32, vae_dtype: torch.dtype = torch.float32) -> BaseModels:
    """VAE, CLIP encoder and scheduler of a Stable Video Diffusion folder, frozen, on the CPU."""
    with init_empty_weights():
        vae, image_encoder = build_base(folder)
    for part, name, stem, kind in (
        (vae, "vae", "diffusion_pytorch_model", vae_dtype),
        (image_encoder, "image_encoder", "model", dtype),
    ):
        path = find_weights(folder / name, stem)
        load_strict(part, read_tensors(path), path, kind)
        part.eval().requires_grad_(False)
    if vae_dtype == torch.bfloat16:  # twice as fast on CPUs; float32 gains in encoding what it loses in decoding
        lay_out(vae)
    path = folder / "scheduler/scheduler_config.json"
    config = read_json(path)
    with described_by(path):
        scheduler = EulerDiscreteScheduler.from_config(config)
    return BaseModels(vae, image_encoder, scheduler)


def load_whisper(folder: Path) -> WhisperFeatures:
    """The encoder of a Whisper folder as a feature extractor."""
    config = read_json(folder / "config.json")
    with init_empty_weights(), described_by(folder / "config.json"):
        encoder = WhisperEncoder(WhisperConfig.from_dict(config))
    path = find_weights(folder, _whisper_stem(folder))
    tensors = {name.removeprefix("model."): tensor for name, tensor in read_tensors(path).items()}
    tensors = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
    load_strict(encoder, tensors, path)
    return WhisperFeatures(encoder)


def _whisper_stem(folder: Path) -> str:
    """transformers' old name for .bin files is another stem."""
    return "pytorch_model" if (folder / "pytorch_model.bin").is_file() else "model"


class LazyWhisper:
    """`load_whisper`'s extractor, which is loaded onto a device when the first speech comes. `memo` keeps its name, so that
    nothing is loaded to find out that all features are there."""

    stretch = WhisperFeatures.stretch

    def __init__(self, folder: Path, memo: Path, device: torch.device):
        size = _WhisperSize.of(folder)
        self.layers, self.width = size.layers, size.width
        self._load = cache(lambda: load_whisper(folder).to(device))
        self.name = remembered(memo, folder, _whisper_stem(folder), lambda _: self._load().name)

    def __call__(self, speech: np.ndarray) -> Tensor:
        return self._load()(speech)


# ---------------------------------------------------------------------------------------------- our model


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build a `Denoiser`: the UNet's diffusers configuration and the adapters' sizes."""

    unet: dict
    audio_name: str  # the extractor whose features the adapters read
    audio_layers: int
    audio_width: int
    clip_width: int
    adapter_hidden: int = 1024
    audio_tokens: int = 32
    bucket_outputs: int = 2

    def build(self) -> Denoiser:
        """A new model with fresh weights."""
        token_width = self.unet["cross_attention_dim"]
        unet = SonicUNet(**{key: value for key, value in self.unet.items() if not key.startswith("_")})
        return Denoiser(
            unet,
            AudioToken(self.audio_layers, self.audio_width, self.adapter_hidden, token_width, self.audio_tokens),
            AudioBucket(self.audio_width, self.clip_width, self.adapter_hidden, self.bucket_outputs),
        )


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: what it is, and where everything lies that it needs. Nothing is loaded yet.

    `tensors` gives each part's weights file; the UNet of a Stable Video Diffusion folder has no audio attention yet, and
    parts without a file start fresh.
    """

    architecture: Architecture
    settings: Settings
    tensors: dict[str, Path]
    base_model: Path
    whisper_path: Path | None

    def load(self, dtype: torch.dtype = torch.float32) -> Denoiser:
        """The model, on the CPU. Raises UserError for missing files and other shapes."""
        source = self.tensors["unet"].parent
        if set(self.tensors) == set(PARTS):
            with init_empty_weights(), described_by(source):
                denoiser = self.architecture.build()
            for part, path in self.tensors.items():
                load_strict(getattr(denoiser, part), read_tensors(path), path, dtype)
            return denoiser
        with described_by(source):
            denoiser = self.architecture.build()
        load_strict(denoiser.unet, read_tensors(self.tensors["unet"]), self.tensors["unet"], missing_ok=".processor.")
        denoiser.unet.start_audio_attention()
        return denoiser.to(dtype)


def save_model(folder: Path, denoiser: Denoiser, origin: Checkpoint) -> None:
    """Our own form: weights, and `save_index`'s description."""
    folder.mkdir(parents=True, exist_ok=True)
    save_index(folder, origin)
    for part in PARTS:
        save_file(tensors_of(getattr(denoiser, part)), folder / f"{part}.safetensors")


def save_index(folder: Path, origin: Checkpoint) -> None:
    """Architecture and settings, and where the base model and Whisper lie.

    When those paths are read, a relative one is looked for inside the folder first, then from the project.
    """
    index = {
        "format": FORMAT,
        "architecture": asdict(origin.architecture),
        "settings": asdict(origin.settings),
        "base_model": portable(origin.base_model),
        "whisper_path": portable(origin.whisper_path),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def save_released(folder: Path, denoiser: Denoiser) -> None:
    """The released form: unet.pth, audio2token.pth and audio2bucket.pth, which the published implementation loads."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        torch.save(tensors_of(getattr(denoiser, part)), folder / f"{part}.pth")


def open_checkpoint(
    folder: str | Path,
    base_model: str | Path | None = None,
    whisper_path: str | Path | None = None,
    extractor: AudioExtractor | None = None,
) -> Checkpoint:
    """Our own folder, the released files, or, to start training, a Stable Video Diffusion folder alone.

    Without `extractor`, the features are those of the checkpoint's Whisper. Raises UserError for what is missing.
    """
    folder = locate(folder, "checkpoint")
    if (folder / INDEX).is_file():
        opener = partial(_open_own, base_model=base_model)
    elif any((folder / f"{part}.pth").is_file() for part in PARTS):
        opener = partial(_open_released, base_model=base_model)
    elif (folder / "unet").is_dir():
        opener = _open_base
    else:
        what = f"it has neither {INDEX} nor unet.pth nor a unet/ folder"
        raise UserError(f"'{folder}' is no checkpoint: {what}{how_to_get(folder)}")
    whisper = None if extractor else whisper_folder(folder, whisper_path)
    audio = extractor or _WhisperSize.of(whisper)
    checkpoint = opener(folder, whisper, audio)
    _check_sizes(checkpoint, folder, audio)
    return checkpoint


def _check_sizes(checkpoint: Checkpoint, folder: Path, audio: AudioExtractor | _WhisperSize) -> None:
    """What the model reads must be what its audio features and its CLIP encoder give."""
    architecture, clip_width = checkpoint.architecture, _clip_width(checkpoint.base_model)
    if architecture.clip_width != clip_width:
        raise UserError(
            f"'{folder}' reads CLIP embeddings of width {architecture.clip_width}, but the base model "
            f"'{checkpoint.base_model}' gives {clip_width}: it is of another architecture"
        )
    expected, found = (architecture.audio_layers, architecture.audio_width), (audio.layers, audio.width)
    if expected != found:
        raise UserError(
            f"'{folder}' reads audio features of {expected[0]} layers and width {expected[1]}, but '{audio.name}' "
            f"({checkpoint.whisper_path or 'your extractor'}) gives {found[0]} layers and width {found[1]}"
        )


def whisper_folder(checkpoint: str | Path, whisper_path: str | Path | None = None) -> Path:
    """Where the Whisper that a checkpoint listens with lies, found without loading anything."""
    folder = locate(checkpoint, "checkpoint")
    if whisper_path is None and (folder / INDEX).is_file():
        whisper_path = _read_index(folder)["whisper_path"]
    return _beside(folder, whisper_path or WHISPER, "Whisper")


def _beside(folder: Path, path: str | Path, what: str) -> Path:
    """A path stored in a checkpoint: inside its folder first, then as it stands."""
    return (folder / path).resolve() if (folder / path).is_dir() else locate(path, what)


def _read_index(folder: Path) -> dict:
    path = folder / INDEX
    index = read_json(path)
    if index.get("format") != FORMAT:
        raise UserError(f"'{path}' has format {index.get('format')!r}, this version reads {FORMAT}")
    if not isinstance(index.get("base_model"), str) or not isinstance(index.get("whisper_path", 0), str | None):
        raise UserError(f"'{path}': base_model and whisper_path must be paths")
    return index


def _open_own(folder: Path, whisper: Path | None, audio: AudioExtractor | _WhisperSize, base_model) -> Checkpoint:
    index = _read_index(folder)
    with described_by(folder / INDEX):
        architecture, settings = Architecture(**index["architecture"]), Settings(**index["settings"])
    if audio.name != architecture.audio_name:
        raise UserError(
            f"'{folder}' was trained on audio features '{architecture.audio_name}', not '{audio.name}': "
            "give the extractor it was trained with (--audio_extractor FILE.py:NAME)"
        )
    base = _beside(folder, base_model or index["base_model"], "base model")
    return Checkpoint(architecture, settings, {part: folder / f"{part}.safetensors" for part in PARTS}, base, whisper)


def _open_released(folder: Path, whisper: Path | None, audio: AudioExtractor | _WhisperSize, base_model) -> Checkpoint:
    base = locate(base_model or BASE_MODEL, "base model")
    paths = {part: folder / f"{part}.pth" for part in PARTS}
    token, bucket = read_tensors(paths["audio2token"]), read_tensors(paths["audio2bucket"])
    architecture = _architecture_for(base, audio)
    if "proj3.weight" not in token or "proj3.weight" not in bucket:
        raise UserError(f"'{folder}': audio2token.pth or audio2bucket.pth has no tensor 'proj3.weight'")
    # The files carry no configuration: what the base folder does not say stands in the adapters' last layers.
    tokens_times_width, hidden = token["proj3.weight"].shape
    architecture = replace(
        architecture,
        adapter_hidden=hidden,
        audio_tokens=tokens_times_width // architecture.unet["cross_attention_dim"],
        bucket_outputs=len(bucket["proj3.weight"]),
    )
    return Checkpoint(architecture, Settings(), paths, base, whisper)


def _open_base(folder: Path, whisper: Path | None, audio: AudioExtractor | _WhisperSize) -> Checkpoint:
    architecture = _architecture_for(folder, audio)
    return Checkpoint(
        architecture, Settings(), {"unet": find_weights(folder / "unet", "diffusion_pytorch_model")}, folder, whisper
    )


def _architecture_for(base: Path, audio: AudioExtractor | _WhisperSize) -> Architecture:
    """A base folder's UNet and CLIP with audio features of this size, and adapters of the released sizes."""
    unet = read_json(base / "unet/config.json")
    return Architecture(unet, audio.name, audio.layers, audio.width, _clip_width(base))


def _clip_width(base: Path) -> int:
    path = base / "image_encoder/config.json"
    config = read_json(path)
    with described_by(path):
        return config["projection_dim"]


@dataclass
class _WhisperSize:
    """What a Whisper folder's configuration says of its features, without loading the weights."""

    layers: int
    width: int
    name: str

    @classmethod
    def of(cls, folder: Path) -> _WhisperSize:
        config = read_json(folder / "config.json")
        with described_by(folder / "config.json"):
            return cls(config["encoder_layers"] + 1, config["d_model"], WHISPER_NAME)


# ---------------------------------------------------------------------------------------------- making models, finding a run's


def create_checkpoint(folder: Path, preset: Preset, seed: int = 0) -> None:
    """Writes a complete checkpoint with the preset's sizes and random weights: base/ (SVD's layout), whisper/ and the model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        create_base(folder / "base", preset)
        create_whisper(folder / "whisper", preset)
        start = open_checkpoint(folder / "base", whisper_path=folder / "whisper")
        architecture = replace(
            start.architecture, adapter_hidden=preset.adapter_hidden, audio_tokens=preset.audio_tokens
        )
        start = replace(start, architecture=architecture, settings=preset.settings)
        save_model(folder, start.load(), replace(start, base_model=Path("base"), whisper_path=Path("whisper")))


def create_base(folder: Path, preset: Preset) -> None:
    """Writes a base folder in SVD's layout with the preset's sizes and random weights."""
    UNetSpatioTemporalConditionModel(**preset.unet).save_pretrained(folder / "unet")
    AutoencoderKLTemporalDecoder(**preset.vae).save_pretrained(folder / "vae")
    config = CLIPVisionConfig(**preset.image_encoder)
    encoder = CLIPVisionModelWithProjection(config)
    with torch.no_grad():  # random layers tell pictures apart by a quarter of a unit, and would drown beside the sound
        encoder.visual_projection.weight.mul_(8)
    config.save_pretrained(folder / "image_encoder")
    save_file(tensors_of(encoder), folder / "image_encoder/model.safetensors")
    EulerDiscreteScheduler.from_config(preset.scheduler).save_pretrained(folder / "scheduler")


def create_whisper(folder: Path, preset: Preset) -> None:
    """Writes a Whisper folder with the preset's sizes and random weights; only the encoder is used, so only that is written.

    Random weights can carry sound as well as trained ones if they let it through: they are scaled to keep the variance from
    layer to layer, and the positions are zero, because untrained layers cannot tell them from sound. Nor does attention pass
    anything on: untrained, it says how much of Whisper's 30 s is silence behind the end, and so moves every feature with the
    sound's length.
    """
    config = WhisperConfig(**preset.whisper)
    encoder = WhisperEncoder(config)
    with torch.no_grad():
        encoder.embed_positions.weight.zero_()
        for name, parameter in encoder.named_parameters():
            if parameter.ndim > 1 and "embed_positions" not in name:
                # What joins the residual stream is halved: it must not drown the sound that is in there.
                gain = 0 if name.endswith("out_proj.weight") else 0.5 if name.endswith("fc2.weight") else 1
                torch.nn.init.normal_(parameter, std=gain * (2 / parameter[0].numel()) ** 0.5)
    config.save_pretrained(folder)
    save_file(
        {f"model.encoder.{name}": tensor for name, tensor in tensors_of(encoder).items()}, folder / "model.safetensors"
    )


def training_checkpoints(output_dir: Path) -> list[Path]:
    """The complete `checkpoint-STEP` folders of a run, by step. What a kill in the midst of a change has left is put right."""
    for half in output_dir.glob(".checkpoint-*.deleted"):
        shutil.rmtree(half, ignore_errors=True)  # another process of the run may be at it, too
    for old in output_dir.glob(".checkpoint-*.old"):
        restore(output_dir / old.name.removeprefix(".").removesuffix(".old"))
    steps = [path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*")]
    return [output_dir / f"checkpoint-{step}" for step in sorted(map(int, filter(str.isdigit, steps)))]
