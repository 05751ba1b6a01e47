"""Weights in and out: base models, the released .pth files, our own folders; strict loads, atomic saves (SPEC.md sections 1 and 3).

Our own folder holds `sonic.json` (architecture, settings, where base model and Whisper lie) and three safetensors files.
A base folder is Stable Video Diffusion's, in diffusers' layout; a Whisper folder is transformers'.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from sonic.adapters import AudioBucket, AudioToken
from sonic.audio import AudioExtractor, WhisperFeatures
from sonic.config import BASE_MODEL, CHECKPOINTS, RELEASED, SCHEDULER, SHIPPED, WHISPER, Preset, Settings, UserError
from sonic.denoiser import Denoiser
from sonic.unet import SonicUNet

INDEX = "sonic.json"
FORMAT = 1
WHISPER_NAME = "whisper"  # what a checkpoint calls the features of any Whisper encoder
PARTS = ("unet", "audio2token", "audio2bucket")
DOWNLOADS = {
    BASE_MODEL: f"hf download stabilityai/stable-video-diffusion-img2vid-xt --local-dir {BASE_MODEL}",
    WHISPER: f"hf download openai/whisper-tiny --local-dir {WHISPER}",
    RELEASED: f"hf download LeonJoe13/Sonic --include 'Sonic/*' --local-dir {CHECKPOINTS}",
    SHIPPED: "bash scripts/quickstart.sh",
}
ROOT = (
    Path(__file__).resolve().parent.parent
)  # the project's own folder: its checkpoints/ is found from any current folder


# ---------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def _described_by(path: Path) -> Iterator[None]:
    """Building something from a configuration file: what goes wrong then is the file's fault, and says so."""
    try:
        yield
    except UserError as error:
        raise UserError(f"'{path}': {error}") from None
    except Exception as error:  # every library has its own kinds for a value that it does not like
        raise UserError(f"'{path}' describes nothing that can be built: {type(error).__name__}: {error}") from error


def locate(path: str | Path, what: str) -> Path:
    """The folder a path names, seen from here or, if relative, from the project. Raises UserError with the download command."""
    path = Path(path)
    for candidate in (path, ROOT / path):
        if candidate.is_dir():
            return candidate.resolve()
    raise UserError(f"{what} folder '{path}' does not exist{_how_to_get(path)}")


def _portable(path: Path | None) -> str | None:
    """A path to store: a relative one as it is; from the project's folder if it lies inside, so that the project may move."""
    if path is None:
        return None
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _how_to_get(path: Path) -> str:
    for folder, command in DOWNLOADS.items():
        if Path(folder).name in Path(path).parts:
            return f"; get it with: {command}"
    return ""


def find_weights(folder: Path, stem: str) -> Path:
    """The weights file of a part: `stem.safetensors`, its fp16 variant, or `stem.bin`. Raises UserError if there is none."""
    names = [f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{stem}.bin", f"{stem}.fp16.bin"]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"no weights in '{folder}': looked for {', '.join(names)}{_how_to_get(folder)}")


def read_json(path: Path) -> dict:
    """A configuration file. Raises UserError if it is missing or no JSON object."""
    if not path.is_file():
        raise UserError(f"'{path}' is missing{_how_to_get(path.parent)}")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not a JSON file: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"'{path}' is not a JSON object")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth or .bin file, on the CPU. Raises UserError if it is missing, broken or no state dict."""
    if not path.is_file():
        raise UserError(f"'{path}' is missing{_how_to_get(path.parent)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
        raise UserError(
            f"'{path}' cannot be read as weights, download it again: {str(error).splitlines()[0]}"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"'{path}' holds something else than a state dict")
    return tensors


def load_strict(
    module: nn.Module, tensors: dict[str, Tensor], source: Path, dtype=torch.float32, missing_ok: str = ""
) -> None:
    """Fills a module that may be on the meta device. Raises UserError that names the tensor, what was expected and what was found.

    Only parameters whose name contains `missing_ok` may be absent; they are left as they are.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    # transformers once saved these index buffers with the weights; they are rebuilt, not loaded.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    for name, shape in expected.items():
        if name not in tensors:
            if not missing_ok or missing_ok not in name:
                raise UserError(
                    f"'{source}' has no tensor '{name}' (expected shape {shape}): it is of another architecture"
                )
        elif tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape)
            raise UserError(
                f"'{source}': tensor '{name}' has shape {found}, expected {shape}: it is of another architecture"
            )
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise UserError(f"'{source}' has {len(unknown)} tensors that do not belong here, '{unknown[0]}' for one")
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    module.load_state_dict(tensors, strict=not missing_ok, assign=True)


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


def count_base_parameters(folder: Path) -> int:
    """Parameters of the frozen VAE and CLIP encoder of a Stable Video Diffusion folder, without loading them."""
    vae, image_encoder = _empty_base(folder)
    return sum(parameter.numel() for part in (vae, image_encoder) for parameter in part.parameters())


def _empty_base(folder: Path) -> tuple[AutoencoderKLTemporalDecoder, CLIPVisionModelWithProjection]:
    vae_path, clip_path = folder / "vae/config.json", folder / "image_encoder/config.json"
    with init_empty_weights(), _described_by(vae_path):
        vae = AutoencoderKLTemporalDecoder.from_config(read_json(vae_path))
    with init_empty_weights(), _described_by(clip_path):
        return vae, CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(read_json(clip_path)))


def load_base(folder: Path, dtype: torch.dtype = torch.float32, vae_dtype: torch.dtype = torch.float32) -> BaseModels:
    """VAE, CLIP encoder and scheduler of a Stable Video Diffusion folder, frozen, on the CPU."""
    vae, image_encoder = _empty_base(folder)
    for part, name, stem, kind in (
        (vae, "vae", "diffusion_pytorch_model", vae_dtype),
        (image_encoder, "image_encoder", "model", dtype),
    ):
        path = find_weights(folder / name, stem)
        load_strict(part, read_tensors(path), path, kind)
        part.eval().requires_grad_(False)
    path = folder / "scheduler/scheduler_config.json"
    with _described_by(path):
        scheduler = EulerDiscreteScheduler.from_config(read_json(path))
    return BaseModels(vae, image_encoder, scheduler)


def load_whisper(folder: Path) -> WhisperFeatures:
    """The encoder of a Whisper folder as a feature extractor."""
    with init_empty_weights(), _described_by(folder / "config.json"):
        encoder = WhisperEncoder(WhisperConfig.from_dict(read_json(folder / "config.json")))
    # transformers' old name for .bin files is another stem
    path = find_weights(folder, "pytorch_model" if (folder / "pytorch_model.bin").is_file() else "model")
    tensors = {name.removeprefix("model."): tensor for name, tensor in read_tensors(path).items()}
    tensors = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
    load_strict(encoder, tensors, path)
    return WhisperFeatures(encoder)


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
            with init_empty_weights(), _described_by(source):
                denoiser = self.architecture.build()
            for part, path in self.tensors.items():
                load_strict(getattr(denoiser, part), read_tensors(path), path, dtype)
            return denoiser
        with _described_by(source):
            denoiser = self.architecture.build()
        load_strict(denoiser.unet, read_tensors(self.tensors["unet"]), self.tensors["unet"], missing_ok=".processor.")
        denoiser.unet.start_audio_attention()
        return denoiser.to(dtype)


def save_model(folder: Path, denoiser: Denoiser, origin: Checkpoint) -> None:
    """Our own form: weights, architecture and settings, and where the base model and Whisper lie.

    When those paths are read, a relative one is looked for inside the folder first, then from the project.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index = {
        "format": FORMAT,
        "architecture": asdict(origin.architecture),
        "settings": asdict(origin.settings),
        "base_model": _portable(origin.base_model),
        "whisper_path": _portable(origin.whisper_path),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    for part in PARTS:
        save_file(tensors_of(getattr(denoiser, part)), folder / f"{part}.safetensors")


def save_released(folder: Path, denoiser: Denoiser) -> None:
    """The released form: unet.pth, audio2token.pth and audio2bucket.pth, which the published implementation loads."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        torch.save(tensors_of(getattr(denoiser, part)), folder / f"{part}.pth")


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict as safetensors takes it: on the CPU, contiguous."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


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
        raise UserError(f"'{folder}' is no checkpoint: {what}{_how_to_get(folder)}")
    whisper = None if extractor else whisper_folder(folder, whisper_path)
    checkpoint = opener(folder, whisper, extractor)
    _check_sizes(checkpoint, folder, extractor or _WhisperSize.of(whisper))
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


def _open_own(folder: Path, whisper: Path | None, extractor: AudioExtractor | None, base_model) -> Checkpoint:
    index = _read_index(folder)
    with _described_by(folder / INDEX):
        architecture, settings = Architecture(**index["architecture"]), Settings(**index["settings"])
    given = extractor.name if extractor else WHISPER_NAME
    if given != architecture.audio_name:
        raise UserError(
            f"'{folder}' was trained on audio features '{architecture.audio_name}', not '{given}': "
            "give the extractor it was trained with (--audio_extractor FILE.py:NAME)"
        )
    base = _beside(folder, base_model or index["base_model"], "base model")
    return Checkpoint(architecture, settings, {part: folder / f"{part}.safetensors" for part in PARTS}, base, whisper)


def _open_released(folder: Path, whisper: Path | None, extractor: AudioExtractor | None, base_model) -> Checkpoint:
    base = locate(base_model or BASE_MODEL, "base model")
    paths = {part: folder / f"{part}.pth" for part in PARTS}
    token, bucket = read_tensors(paths["audio2token"]), read_tensors(paths["audio2bucket"])
    architecture = _architecture_for(base, extractor or _WhisperSize.of(whisper))
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


def _open_base(folder: Path, whisper: Path | None, extractor: AudioExtractor | None) -> Checkpoint:
    architecture = _architecture_for(folder, extractor or _WhisperSize.of(whisper))
    return Checkpoint(
        architecture, Settings(), {"unet": find_weights(folder / "unet", "diffusion_pytorch_model")}, folder, whisper
    )


def _architecture_for(base: Path, audio: AudioExtractor | _WhisperSize) -> Architecture:
    """A base folder's UNet and CLIP with audio features of this size, and adapters of the released sizes."""
    unet = read_json(base / "unet/config.json")
    return Architecture(unet, audio.name, audio.layers, audio.width, _clip_width(base))


def _clip_width(base: Path) -> int:
    path = base / "image_encoder/config.json"
    with _described_by(path):
        return read_json(path)["projection_dim"]


@dataclass
class _WhisperSize:
    """What a Whisper folder's configuration says of its features, without loading the weights."""

    layers: int
    width: int
    name: str

    @classmethod
    def of(cls, folder: Path) -> _WhisperSize:
        config = read_json(folder / "config.json")
        with _described_by(folder / "config.json"):
            return cls(config["encoder_layers"] + 1, config["d_model"], WHISPER_NAME)


# ---------------------------------------------------------------------------------------------- making and saving folders


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
    config.save_pretrained(folder / "image_encoder")
    save_file(tensors_of(CLIPVisionModelWithProjection(config)), folder / "image_encoder/model.safetensors")
    EulerDiscreteScheduler.from_config(SCHEDULER).save_pretrained(folder / "scheduler")


def create_whisper(folder: Path, preset: Preset) -> None:
    """Writes a Whisper folder with the preset's sizes and random weights; only the encoder is used, so only that is written."""
    config = WhisperConfig(**preset.whisper)
    encoder = WhisperEncoder(config)
    config.save_pretrained(folder)
    save_file(
        {f"model.encoder.{name}": tensor for name, tensor in tensors_of(encoder).items()}, folder / "model.safetensors"
    )


@contextlib.contextmanager
def atomic_folder(path: Path, main: bool = True, wait: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Gives a temporary folder to fill, which takes the name `path` at the end and not before: a kill leaves the old state.

    A folder that already has that name is replaced. Of several processes that fill it together, one is `main`, and `wait`
    is their barrier.
    """
    unfinished, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    try:
        if main:
            _restore(old, path)
            _remove(unfinished)
            unfinished.mkdir(parents=True)
        wait()
        yield unfinished
        wait()
        if main:
            for file in [*unfinished.rglob("*"), unfinished]:
                _flush(file)
            if path.exists():
                path.rename(old)
            unfinished.rename(path)
            _flush(path.parent)
        wait()
    finally:
        if main:
            _restore(old, path)
            _remove(unfinished)


def _restore(old: Path, path: Path) -> None:
    """Between two renames there is a moment without `path`; if that was the end, the old folder takes its name again."""
    if old.exists() and not path.exists():
        old.rename(path)
    _remove(old)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _flush(path: Path) -> None:
    """Asks the operating system to put a file's or folder's content on the disk before the rename that makes it count."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def training_checkpoints(output_dir: Path) -> list[Path]:
    """The complete `checkpoint-STEP` folders of a run, by step."""
    for old in output_dir.glob(".checkpoint-*.old"):
        _restore(old, output_dir / old.name.removeprefix(".").removesuffix(".old"))
    found = {
        int(path.name.rpartition("-")[2]): path for path in output_dir.glob("checkpoint-*") if path.name[11:].isdigit()
    }
    return [found[step] for step in sorted(found)]
