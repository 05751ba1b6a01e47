"""Weights and configurations on disk: where they lie, and strict loads that name what is wrong."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sonic.config import DOWNLOADS, UserError
from sonic.files import whole_file

# The project's own folder: its checkpoints/ is found from any current folder.
ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def described_by(path: Path) -> Iterator[None]:
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
    raise UserError(f"{what} folder '{path}' does not exist{how_to_get(path)}")


def portable(path: Path | None) -> str | None:
    """A path to store: a relative one as it is; from the project's folder if it lies inside, so that the project may move."""
    if path is None:
        return None
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def how_to_get(path: Path) -> str:
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
    raise UserError(f"no weights in '{folder}': looked for {', '.join(names)}{how_to_get(folder)}")


def read_json(path: Path) -> dict:
    """A configuration file. Raises UserError if it is missing or no JSON object."""
    if not path.is_file():
        raise UserError(f"'{path}' is missing{how_to_get(path.parent)}")
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
        raise UserError(f"'{path}' is missing{how_to_get(path.parent)}")
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


def content_hash(path: Path) -> str:
    """The sha256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def remembered(memo: Path, folder: Path, stem: str, name: Callable[[Path], str]) -> str:
    """What `name` calls a part's weights by their content, which takes a while: the JSON file `memo` keeps it.

    It is asked anew when the weights' size or time has changed. Weights that are gone keep their name, so that a run whose
    caches are full does without them; UserError if they never had one.
    """
    try:
        known = json.loads(memo.read_text())
    except (OSError, ValueError):  # none yet, or cut by a kill: it is made again
        known = {}
    entry = known.get(str(folder), {})
    try:
        path = find_weights(folder, stem)
    except UserError:
        if "name" in entry:
            return entry["name"]
        raise
    status = path.stat()
    stamp = [path.name, status.st_size, status.st_mtime_ns]
    if entry.get("stamp") != stamp:
        known[str(folder)] = entry = {"name": name(path), "stamp": stamp}
        try:
            memo.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(memo) as partial:
                partial.write_text(json.dumps(known, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"'{memo}' cannot be written ({error.strerror}): give another --cache_dir") from error
    return entry["name"]


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


@torch.no_grad()
def fill_strict(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor], source: Path) -> None:
    """Copies a file's tensors into parameters of the same names. Raises UserError if names or shapes differ."""
    expected = {name: tuple(value.shape) for name, value in parameters.items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = sorted(dict(expected.items() ^ found.items()))
    if wrong:
        name = wrong[0]
        raise UserError(
            f"'{source}' does not fit this model: tensor '{name}' has shape {found.get(name)}, expected {expected.get(name)}"
        )
    for name, value in parameters.items():
        value.copy_(tensors[name])


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict as safetensors takes it: on the CPU, contiguous."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
