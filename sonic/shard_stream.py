"""Shards to training samples: tar files, local or behind a URL, read from beginning to end by the webdataset library.

A clip's sample is what `dataset.SonicDataset` makes of the clip and the sample's number. Which clips come when follows from
the seed, the shards and the number of readers; a resumed run goes on with another order.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from safetensors import SafetensorError
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sonic.clips import Clip
from sonic.config import UserError
from sonic.dataset import SonicDataset, latent_name, latent_parts
from sonic.shards import AS_THEY_ARE, LATENTS, VERSION

SCHEME = re.compile(r"[a-z0-9]+:")  # of a URL, or of a command: pipe:aws s3 cp s3://...
MEMBERS = ("json", "mp4", "boxes.npy", "landmarks.npy", "features.safetensors")


def shard_list(pattern: str) -> list[str]:
    """The shards that a pattern means: files or URLs, with braces as in shard-{000000..000099}.tar; files also
    with * and ? in the name.

    UserError: no webdataset library, or no such file. Whether a URL is there shows when it is read.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise UserError("--data_shards needs the webdataset library: pip install webdataset") from error
    found = []
    for url in expand_urls(pattern):
        if SCHEME.match(url):
            found.append(url)
            continue
        files = sorted(str(path) for path in Path(url).parent.glob(Path(url).name) if path.is_file())
        if not files:
            raise UserError(f"{url} is not there: give shards that are with --data_shards")
        found += files
    return found


@dataclass(frozen=True)
class Reader:
    """One of all readers of a run: the workers of its processes."""

    index: int
    count: int

    @classmethod
    def of(cls, rank: int, world: int) -> Reader:
        """This worker's place; without workers the process is the reader."""
        worker = get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker else (0, 1)
        return cls(rank * count + index, world * count)

    def shards(self, shards: list[str]) -> list[str]:
        """Its own shards, or all where there are fewer of them than readers."""
        return shards[self.index :: self.count] if len(shards) >= self.count else shards

    def samples(self, samples: Iterable, shards: int) -> Iterable:
        """Its own samples of these shards."""
        return samples if shards >= self.count else itertools.islice(samples, self.index, None, self.count)


def samples_of_pictures(clips: Sequence[Clip], folder: Path, **settings) -> SonicDataset:
    """The samples of clips that were unpacked into a folder."""
    return SonicDataset(clips, **settings)


class ShardStream(IterableDataset):
    """Samples without end, as `SonicDataset` gives them, with their number: one window of every clip, lap after lap.

    settings: what `SonicDataset` takes. first: the number of the first sample. Of several processes each reads every
    `world`-th shard. latents: the kind of those that take the place of pictures; then `samples_of(clips, folder, **settings)`
    makes the dataset, the latents being in the folder. UserError: features or latents of another kind than the run's, or no
    clip that can be used in any shard.
    """

    def __init__(
        self,
        shards: list[str],
        extractor_name: str,
        settings: dict,
        *,
        needed: int,
        buffer: int,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
        latents: str | None = None,
        samples_of: Callable[..., SonicDataset] = samples_of_pictures,
    ):
        self.latents, self.samples_of = latents, samples_of
        self.shards, self.extractor_name, self.settings = shards, extractor_name, settings
        self.needed, self.buffer, self.first = needed, buffer, first
        self.rank, self.world = rank, world
        self._named: set[str] = set()

    def __iter__(self) -> Iterator[dict]:
        reader = Reader.of(self.rank, self.world)
        numbers = itertools.count(self.first + reader.index, reader.count)
        with tempfile.TemporaryDirectory(prefix="sonic-shards-") as scratch:
            for lap in itertools.count():
                used = 0
                for packed in self._lap(reader, lap):
                    sample = self._sample(packed, next(numbers), Path(scratch))
                    if sample is not None:
                        used += 1
                        yield sample
                if not used:
                    raise UserError(f"no clip in {len(self.shards)} shards can be used: look at what was skipped above")

    def _lap(self, reader: Reader, lap: int) -> Iterator[dict]:
        """This reader's packed clips, once each, in an order drawn anew each time."""
        seed = [self.settings.get("seed", 0), self.first, lap]
        order = np.random.default_rng(seed).permutation(len(self.shards))
        shards = reader.shards([self.shards[number] for number in order])
        packed = reader.samples(read_shards(shards, self._say), len(self.shards))
        return shuffled(packed, self.buffer, np.random.default_rng([*seed, reader.index]))

    def _sample(self, packed: dict, number: int, scratch: Path) -> dict | None:
        """The sample of a packed clip; None, and a line that names it, if it is no use."""
        try:
            clip, start = unpack(packed, scratch, self.extractor_name, self.latents, self.settings.get("flip", 0) > 0)
            if clip.num_ticks < self.needed:
                raise ValueError(f"too short: {clip.num_ticks} ticks, needs {self.needed}")
            samples = self.samples_of([clip], scratch, **self.settings)
            try:
                sample = samples[number]
            finally:
                samples.close()
            return sample | {"ticks": sample["ticks"] + start, "number": number}
        except Mismatch as error:
            raise UserError(str(error)) from error
        # A broken clip must not end a run of days; what is broken in it can be anything that readers and decoders meet.
        except (
            UserError,
            av.error.FFmpegError,
            SafetensorError,
            OSError,
            ValueError,
            KeyError,
            IndexError,
            TypeError,
        ) as error:
            self._say(f"{packed.get('__url__')}: {packed.get('__key__')}", error)
            return None
        finally:
            for path in scratch.iterdir():
                path.unlink()

    def _say(self, what: str, error: Exception) -> None:
        """Names what is skipped, once in each reader."""
        if what not in self._named:
            self._named.add(what)
            print(f"shards: {what} is skipped ({error or type(error).__name__})", flush=True)


class Mismatch(ValueError):
    """Shards that were made for another model: every clip in them will be as wrong."""


def read_shards(shards: list[str], say: Callable[[str, Exception], None]) -> Iterator[dict]:
    """The packed clips of shards: their members' bytes by ending, with __key__ and __url__. What cannot be read is told."""
    from webdataset.tariterators import tarfile_samples

    for shard in shards:
        # One by one, so that the name of a shard that breaks off is known.
        yield from tarfile_samples([{"url": shard}], handler=lambda error, shard=shard: say(shard, error) or True)


def shuffled(items: Iterable, size: int, rng: np.random.Generator) -> Iterator:
    """The items, each drawn at random from a buffer of `size` that is filled as it is emptied."""
    buffer = []
    for item in items:
        buffer.append(item)
        if len(buffer) >= size:
            yield buffer.pop(int(rng.integers(len(buffer))))
    while buffer:
        yield buffer.pop(int(rng.integers(len(buffer))))


def unpack(
    packed: dict, folder: Path, extractor_name: str, latents: str | None = None, mirrored: bool = False
) -> tuple[Clip, int]:
    """A packed clip as a Clip whose files lie in a folder, and the tick of its video at which it begins.

    latents: their kind, if they are to be unpacked; mirrored: with those of mirror images. ValueError, KeyError: it is broken;
    `Mismatch` for the features or latents of another model.
    """
    missing = [ending for ending in MEMBERS if ending not in packed]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    facts = json.loads(packed["json"])
    if facts["version"] != VERSION or facts["extractor"] != extractor_name:
        raise Mismatch(
            f"{packed.get('__url__')} holds features of {facts['extractor']}, and this model hears by {extractor_name}: "
            "export the shards again with this model's --whisper_path or --audio_extractor"
        )
    if latents and facts.get("latents") != latents:
        raise Mismatch(
            f"{packed.get('__url__')} holds {facts.get('latents') or 'no'} latents, and this run needs {latents}: export the "
            f"shards again with --shard_latents CACHE/latents/{latents}, or go without --cache_latents"
        )
    boxes, landmarks = (
        np.load(io.BytesIO(packed[ending]), allow_pickle=False) for ending in ("boxes.npy", "landmarks.npy")
    )
    ticks = facts["num_ticks"]
    if boxes.shape != (ticks, 4) or landmarks.shape != (ticks, 68, 2):
        raise ValueError(f"its tracks are not of {ticks} ticks")
    video, features = folder / "clip.mp4", folder / "clip.safetensors"
    video.write_bytes(packed["mp4"])
    features.write_bytes(packed["features.safetensors"])
    settings = {name: facts[name] for name in AS_THEY_ARE}
    settings["area"] = settings["area"] and tuple(settings["area"])
    clip = Clip(
        facts["name"],
        video,
        0,
        boxes,
        landmarks,
        features,
        offset=facts["offset"],
        late=Fraction(*facts["late"]),
        **settings,
    )
    for kind in (False, True)[: 1 + mirrored] if latents else ():
        for part in latent_parts(clip):
            ending = LATENTS[kind].format(part)
            if kind and ending not in packed:
                raise Mismatch(f"{packed.get('__url__')} holds no latents of mirror images: go without --flip")
            (folder / latent_name(clip, part, kind)).write_bytes(packed[ending])
    return clip, facts["start"]


class Batches:
    """So many batches of a loader that has no end."""

    def __init__(self, loader: DataLoader, count: int):
        self.loader, self.count = loader, count

    def __iter__(self) -> Iterator[dict]:
        return itertools.islice(iter(self.loader), self.count)

    def __len__(self) -> int:
        return self.count


def stream_loader(stream: ShardStream, batches: int, **settings) -> Batches:
    """So many batches of a stream; settings: what DataLoader takes."""
    return Batches(DataLoader(stream, **settings), batches)
