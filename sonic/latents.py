"""Pictures that are encoded once, before training (--cache_latents): a latent and a CLIP embedding per tick, on disk.

One square per clip makes this possible: a tick then looks the same in every window that it is in, and as a reference. So a
window's latents are those of its ticks, read by slices, and training needs neither the VAE nor CLIP nor the video.

    CACHE/latents/SIDE-PRECISION-WEIGHTS/VIDEO@START+TICKS-SQUARE.FIRST[.mirrored].safetensors
        latents [T, C, H, W], not scaled, and embeddings [T, E], in the precision that the VAE computes in

A file holds a minute at most, so that a kill loses no more and long clips are spread over the processes. Its name says all
that it depends on: the video as `prepare` knows it, the clip's ticks and square, mirrored or not; its folder's name the side
in pixels, the precision, and what the VAE's and CLIP's files hold, wherever those lie.

Axes: T ticks, F frames of a window, C H W latent channels, height and width, R pixels of a side, E CLIP width.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from sonic.checkpoints import BaseModels, BaseSizes, load_base
from sonic.clips import Clip
from sonic.config import TICK_RATE, UserError
from sonic.dataset import PART_TICKS, VAE_FACTOR, SonicDataset, clip_square, cut, latent_name, mirror, pixels
from sonic.files import whole_file
from sonic.media import VideoReader
from sonic.pictures import resize_square
from sonic.portrait import clip_pixels
from sonic.training import EncodedClip, encode_frames, encoded_clip, sample_settings
from sonic.training_config import TrainingConfig
from sonic.weights import content_hash, remembered
from sonic.workers import Share

# Of what is encoded: raise it when pictures or embeddings come out otherwise, and cached ones are made anew.
VERSION = 1
PIECE = 16  # pictures that travel from a worker to the encoders at once
STORED = {torch.float32: "F32", torch.bfloat16: "BF16"}  # as safetensors calls them
WEIGHTS = {"vae": "diffusion_pytorch_model", "image_encoder": "model"}


@dataclass(frozen=True)
class LatentFiles:
    """Where latents of one kind lie, and what they look like there."""

    folder: Path
    resolution: int
    sizes: BaseSizes
    dtype: torch.dtype

    def path(self, clip: Clip, part: int, mirrored: bool) -> Path:
        """The file of the clip's ticks from the part's first on, counted from the start of the whole clip."""
        return self.folder / latent_name(clip, part, mirrored)

    def shapes(self, ticks: int) -> dict[str, list[int]]:
        """The tensors of so many ticks."""
        side = self.resolution // VAE_FACTOR
        return {
            "latents": [ticks, self.sizes.latent_channels, side, side],
            "embeddings": [ticks, self.sizes.clip_width],
        }

    def bytes(self, ticks: int) -> int:
        """What so many ticks take, mirror images not counted."""
        return self.dtype.itemsize * sum(math.prod(shape) for shape in self.shapes(ticks).values())

    def holds(self, path: Path, ticks: int) -> bool:
        """Whether a file is there and of the right form; only its header is read."""
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_slice(name) for name in self.shapes(ticks)}
                shapes = {name: tensor.get_shape() for name, tensor in tensors.items()}
                kinds = {tensor.get_dtype() for tensor in tensors.values()}
        except (SafetensorError, OSError):  # damaged, so it is made again
            return False
        return shapes == self.shapes(ticks) and kinds == {STORED[self.dtype]}

    def write(self, path: Path, latents: Tensor, embeddings: Tensor) -> None:
        """Whole or not at all."""
        try:
            with whole_file(path) as partial:
                save_file({"latents": latents, "embeddings": embeddings}, partial)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be written ({error}): give another --cache_dir") from error

    def read(self, clip: Clip, name: str, first: int, last: int, mirrored: bool) -> Tensor:
        """A tensor's rows of the ticks [first, last) of a clip, counted from the clip's own start."""
        offset = clip.start - clip.whole.start
        first, last, rows = first + offset, last + offset, []
        for part in range(first // PART_TICKS * PART_TICKS, last, PART_TICKS):
            path = self.path(clip, part, mirrored)
            try:
                with safe_open(path, "pt") as file:
                    rows.append(file.get_slice(name)[max(first - part, 0) : min(last - part, PART_TICKS)])
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} cannot be read ({error}): start again, and it is made anew") from error
        return torch.cat(rows)


class CachedDataset(SonicDataset):
    """`SonicDataset`'s samples with latents in place of pictures: latents [F, C, H, W] and reference [C, H, W], not scaled,
    and embedding [E], in the precision of the cache."""

    def __init__(self, clips: Sequence[Clip], files: LatentFiles, **settings):
        super().__init__(clips, clip_size=files.sizes.clip_size, **settings)
        self.files = files

    def _look(self, clip: Clip, window: np.ndarray, reference: int, square, mirrored: bool) -> dict[str, Tensor]:
        latents = self.files.read(clip, "latents", int(window[0]), int(window[-1]) + 1, mirrored)
        return {
            "latents": latents[:: self.frame_step].contiguous(),
            "reference": self.files.read(clip, "latents", reference, reference + 1, mirrored)[0],
            "embedding": self.files.read(clip, "embeddings", reference, reference + 1, mirrored)[0],
        }


def streamed(clips: Sequence[Clip], folder: Path, files: LatentFiles, **settings) -> CachedDataset:
    """The samples of clips whose latents were unpacked into a folder (`shard_stream`)."""
    return CachedDataset(clips, replace(files, folder=folder), **settings)


class CachedLatents:
    """Stands in for `Encoders`, with what they made before. `clips`: those that were encoded."""

    def __init__(self, files: LatentFiles, clips: list[Clip], base: Path, device: torch.device):
        self.files, self.clips, self.base, self.device = files, clips, base, device

    def models(self) -> BaseModels:
        """What a validation video is decoded with: loaded for each, and kept by nobody."""
        return load_base(self.base, self.files.dtype, self.files.dtype).to(self.device)

    def dataset(self, clips: Sequence[Clip], config: TrainingConfig) -> CachedDataset:
        """The samples that a call takes, collated, of clips of the cache or parts of them."""
        return CachedDataset(clips, self.files, **sample_settings(config))

    def __call__(self, samples: dict) -> EncodedClip:
        """Collated samples of `CachedDataset` -> latents [B, F, C, H, W] (scaled) and conditions."""
        latents, reference, embedding = (
            samples[name].to(self.device).float() for name in ("latents", "reference", "embedding")
        )
        return encoded_clip(samples, latents * self.files.sizes.scaling_factor, reference, embedding, self.device)


# --------------------------------------------------------------------------------------------------------- making them


@dataclass(frozen=True)
class _Part:
    """A minute at most of a clip, encoded and written in one go. It goes to workers, so it holds no tracks."""

    clip: str
    video: Path
    ticks: range  # on the video's clock
    square: tuple[int, int, int, int]
    files: dict[bool, Path]  # of the plain pictures (False) and the mirrored ones (True)


def cache_latents(
    clips: Sequence[Clip],
    config: TrainingConfig,
    base: Path,
    cache_dir: Path,
    dtype: torch.dtype,
    device: torch.device,
    share: Share,
) -> CachedLatents:
    """Encodes what the cache does not hold of these clips, each process its share, and waits for all.

    A clip that cannot be read is left out and named. `base` is the folder with VAE and CLIP, which nothing is loaded of when
    all is there. Without clips, as beside shards, it only says where they would lie. UserError: too little room on the disk,
    or no clip that can be read.
    """
    assert config.crop_per == "clip", "latents of a tick need one square per clip"
    files = LatentFiles(_folder(cache_dir, config, base, dtype, share), config.resolution, BaseSizes.of(base), dtype)
    kinds = (False, True) if config.flip else (False,)  # validation takes plain pictures, whatever a run trains with
    parts = [part for clip in clips for part in _parts(clip, files, kinds)]
    missing = [_missing(part, files) for part in parts]
    _check_room(files, parts, missing, share)
    share.gather([])  # nobody writes before all have looked

    lost = _encode(files, [part for part in share.of(missing) if part.files], base, device, config.num_workers, share)
    lost = dict(share.gather(list(lost.items())))
    if any(_missing(part, files).files for part in missing if part.files and part.clip not in lost):
        raise UserError(
            f"another process's latents are not in {files.folder}: give a --cache_dir that all machines see"
        )
    if lost and share.index == 0:
        print(f"latents: {len(lost)} clips left out")
        print("\n".join(f"  {name!r}  {reason}" for name, reason in lost.items()))
    left = [clip for clip in clips if clip.name not in lost]
    if clips and not left:
        raise UserError(f"no clip can be encoded, {clips[0].name!r} for one: {lost[clips[0].name]}")
    return CachedLatents(files, left, base, device)


def gb_per_hour(config: TrainingConfig, base: Path, dtype: torch.dtype) -> float:
    """What an hour of video takes in the cache."""
    files = LatentFiles(Path(), config.resolution, BaseSizes.of(base), dtype)
    return files.bytes(3600 * TICK_RATE) * (2 if config.flip else 1) / 1e9


def _folder(cache_dir: Path, config: TrainingConfig, base: Path, dtype: torch.dtype, share: Share) -> Path:
    """The folder for latents of this kind. The first process looks at the weights, the others take its word."""
    latents, kinds = cache_dir / "latents", []
    if share.index == 0:
        kind = {"version": VERSION, "resolution": config.resolution, "precision": STORED[dtype]}
        for part, stem in WEIGHTS.items():
            kind[part] = remembered(latents / "weights.json", base / part, stem, content_hash)
            kind[f"{part} config"] = _settings(base / part / "config.json")
        kinds.append(kind)
    (kind,) = share.gather(kinds)
    digest = hashlib.sha256(json.dumps(kind, sort_keys=True).encode()).hexdigest()[:12]
    folder = latents / f"{config.resolution}-{STORED[dtype].lower()}-{digest}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): give another --cache_dir") from error
    return folder


def _settings(config: Path) -> dict:
    """What a model's config.json says of the model, without who wrote the file and from where it was loaded."""
    return {name: value for name, value in json.loads(config.read_text()).items() if not name.startswith("_")}


def _parts(clip: Clip, files: LatentFiles, kinds: Sequence[bool]) -> Iterator[_Part]:
    square = clip_square(clip)
    for first in range(0, clip.num_ticks, PART_TICKS):
        ticks = range(clip.start + first, clip.start + min(first + PART_TICKS, clip.num_ticks))
        yield _Part(clip.name, clip.path, ticks, square, {kind: files.path(clip, first, kind) for kind in kinds})


def _missing(part: _Part, files: LatentFiles) -> _Part:
    """The part with those files alone that have yet to be made."""
    todo = {kind: path for kind, path in part.files.items() if not files.holds(path, len(part.ticks))}
    return replace(part, files=todo)


def _check_room(files: LatentFiles, parts: list[_Part], missing: list[_Part], share: Share) -> None:
    """Says how much the cache takes. Raises UserError if the disk has less."""
    whole, needed = (sum(len(part.files) * files.bytes(len(part.ticks)) for part in some) for some in (parts, missing))
    minutes = sum(len(part.ticks) for part in parts) / TICK_RATE / 60
    if share.index == 0 and parts:
        print(
            f"latents: {whole / 1e9:.3f} GB for {minutes:.1f} minutes of video in {files.folder}, "
            f"of which {needed / 1e9:.3f} GB are to be made"
        )
    free = shutil.disk_usage(files.folder).free
    if needed > free:
        raise UserError(
            f"latents need {needed / 1e9:.1f} GB more, and {files.folder} has {free / 1e9:.1f} GB left: give a --cache_dir "
            "with more room, or a smaller --resolution, or go without --cache_latents"
        )


class _Pictures(IterableDataset):
    """The pictures of parts, a few at a time, as a worker reads them from beginning to end: dicts with the part's index and
    either pictures uint8 [n, R, R, 3], clip_pixels [n, 3, S, S] and mirrored, or the reason why there are no more."""

    def __init__(self, parts: list[_Part], resolution: int, clip_size: int):
        self.parts, self.resolution, self.clip_size = parts, resolution, clip_size

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        for index in range(worker.id, len(self.parts), worker.num_workers) if worker else range(len(self.parts)):
            part = self.parts[index]
            try:
                yield from ({"part": index, **piece} for piece in self._pieces(part))
            except (UserError, av.error.FFmpegError, OSError, ValueError, IndexError) as error:  # bad or changed files
                reason = str(error).removeprefix(f"{part.video.absolute()}").lstrip(" :") or type(error).__name__
                yield {"part": index, "reason": reason}

    def _pieces(self, part: _Part) -> Iterator[dict]:
        with VideoReader(part.video) as reader:
            pictures = []
            for tick, picture in reader.frames(part.ticks):
                pictures.append(resize_square(cut(picture, part.square), self.resolution))
                if len(pictures) < PIECE and tick != part.ticks[-1]:
                    continue
                for mirrored in part.files:
                    shown = mirror(np.stack(pictures)) if mirrored else np.stack(pictures)
                    seen = torch.stack([clip_pixels(Image.fromarray(one), self.clip_size) for one in shown])
                    yield {"pictures": shown, "clip_pixels": seen, "mirrored": mirrored}
                pictures = []


@torch.no_grad()
def _encode(
    files: LatentFiles, parts: list[_Part], base: Path, device: torch.device, num_workers: int, share: Share
) -> dict[str, str]:
    """Makes the files of the parts; the names of clips that cannot be read, with the reasons."""
    if not parts:
        return {}
    models, lost = load_base(base, files.dtype, files.dtype).to(device), {}
    num_workers = min(num_workers, len(parts))
    loader = DataLoader(
        _Pictures(parts, files.resolution, files.sizes.clip_size),
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context="spawn" if num_workers else None,
    )
    made: dict[Path, list[tuple[Tensor, Tensor]]] = {}
    ticks = sum(len(part.ticks) * len(part.files) for part in parts)
    with tqdm(total=ticks, desc="latents", unit="picture", disable=None if share.index == 0 else True) as bar:
        for piece in loader:
            part = parts[piece["part"]]
            if "reason" in piece:
                lost[part.clip] = piece["reason"]
                continue
            path = part.files[piece["mirrored"]]
            latents = encode_frames(models, pixels(np.asarray(piece["pictures"])))
            embeddings = models.embeddings(piece["clip_pixels"])
            rows = made.setdefault(path, [])
            rows.append((latents.to("cpu", files.dtype), embeddings.to("cpu", files.dtype)))
            bar.update(len(latents))
            if sum(len(latents) for latents, _ in rows) == len(part.ticks):
                files.write(path, *(torch.cat(tensors) for tensors in zip(*made.pop(path), strict=True)))
    return lost
