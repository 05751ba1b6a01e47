"""Low-rank adapters in the UNet's attention, by peft: put in, saved, loaded, and merged into plain weights.

    python -m sonic.lora --lora OUT/checkpoint-500/lora --output MERGED

A lora/ folder holds all that such a run trains: the low-rank matrices in peft's layout, the audio projections and adapters,
which are trained whole, and sonic.json. With the UNet's file that the run began from, it is the whole model.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sonic import flags
from sonic.audio import AudioExtractor, load_extractor
from sonic.checkpoints import Checkpoint, open_checkpoint, save_index, save_model, save_released
from sonic.config import UserError
from sonic.denoiser import Denoiser
from sonic.files import atomic_folder
from sonic.unet import SonicUNet
from sonic.weights import ROOT, content_hash, described_by, fill_strict, portable, read_json, read_tensors

CONFIG, MATRICES = "adapter_config.json", "adapter_model.safetensors"  # peft's names
WHOLE = "trained_whole.safetensors"
PREFIX = "base_model.model."  # peft writes it before the names of a model's own modules
ADAPTER = "default"
# All projections that can learn: the key of a single image token gets no gradient (SonicUNet.freeze_unused).
TARGETS = r".*\.(attn1\.to_k|attn[12]\.(to_q|to_v|to_out\.0))"
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
DIGEST = "base_sha256"
digest = functools.cache(content_hash)  # of gigabytes, and at every save: taken once per process


def add_lora(unet: SonicUNet, rank: int) -> None:
    """Puts low-rank adapters beside the attention's projections. They start as zero: the output stays as it was."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer  # here, because only a run with LoRA needs it

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), unet, ADAPTER)
    for module in unet.modules():
        if isinstance(module, BaseTunerLayer):
            # Autocast sees to that; a copy in fp32 would be kept for every layer.
            module.cast_input_dtype_enabled = False


def lora_matrices(unet: nn.Module) -> dict[str, Tensor]:
    """The low-rank matrices of a UNet, by the names that peft saves: MODULE.lora_A.weight and MODULE.lora_B.weight."""
    return {name.replace(f".{ADAPTER}.", "."): value for name, value in unet.named_parameters() if is_lora(name)}


def is_lora(name: str) -> bool:
    """Whether a parameter, by its name, is a low-rank matrix."""
    return ".lora_" in name


def merge(tensors: dict[str, Tensor], matrices: dict[str, Tensor], scale: float = 1.0) -> None:
    """Adds scale · B A to the weight of each module, on the CPU in fp32. KeyError for a module that is not there."""
    for name, down in matrices.items():
        if name.endswith(DOWN):
            module = name.removesuffix(DOWN)
            change = matrices[module + UP].detach().cpu().float() @ down.detach().cpu().float()
            tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + scale * change


def save_lora(folder: Path, model: Denoiser, start: Checkpoint) -> None:
    """Writes a lora/ folder. `start` names the UNet's file without adapters; it is told by its content when it is looked for."""
    folder.mkdir(parents=True, exist_ok=True)
    save_index(folder, start)
    config = model.unet.peft_config[ADAPTER]
    config.base_model_name_or_path = portable(start.tensors["unet"])
    config.save_pretrained(folder)
    matrices = {PREFIX + name: value.detach().cpu() for name, value in lora_matrices(model.unet).items()}
    save_file(matrices, folder / MATRICES, {"format": "pt", DIGEST: digest(start.tensors["unet"])})
    save_file({name: value.detach().cpu() for name, value in trained_whole(model).items()}, folder / WHOLE)


def load_lora(folder: Path, model: Denoiser) -> None:
    """Fills a model that has adapters, and whose other weights are frozen, with what `save_lora` wrote."""
    matrices = {PREFIX + name: value for name, value in lora_matrices(model.unet).items()}
    fill_strict(matrices, read_tensors(folder / MATRICES), folder / MATRICES)
    fill_strict(trained_whole(model), read_tensors(folder / WHOLE), folder / WHOLE)


def trained_whole(model: Denoiser) -> dict[str, nn.Parameter]:
    """What is trained beside the low-rank matrices."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad and not is_lora(name)}


def open_lora(
    folder: Path,
    model_path: str | Path | None = None,
    base_model: str | Path | None = None,
    whisper_path: str | Path | None = None,
    extractor: AudioExtractor | None = None,
) -> Checkpoint:
    """The model that a lora/ folder belongs to, without what the run has learnt; settings are the run's.

    Its UNet is looked for where the run found it, then in `model_path`. Raises UserError unless one has the same content.
    """
    config, path = read_json(folder / CONFIG), folder / MATRICES
    read_tensors(path)  # names what is wrong with the file
    with safe_open(path, "pt") as file:
        wanted = (file.metadata() or {}).get(DIGEST)
    with described_by(folder / CONFIG):
        found = [ROOT / config["base_model_name_or_path"]]
    if model_path:
        with contextlib.suppress(UserError):
            found.append(open_checkpoint(model_path, base_model, whisper_path, extractor).tensors["unet"])
    for file in found:
        if file.is_file() and digest(file) == wanted:
            return replace(open_checkpoint(folder, base_model, whisper_path, extractor), tensors={"unet": file})
    raise UserError(
        f"'{folder}' belongs to the UNet in '{found[0]}', which is missing or has changed: "
        "give the same model with --model_path"
    )


def load_merged(folder: Path, start: Checkpoint) -> Denoiser:
    """The plain model, on the CPU: `start`, as `open_lora` gives it, with what the lora/ folder holds."""
    model, config = start.load(), read_json(folder / CONFIG)
    matrices = {name.removeprefix(PREFIX): value for name, value in read_tensors(folder / MATRICES).items()}
    whole, parameters = read_tensors(folder / WHOLE), dict(model.named_parameters())
    with described_by(folder / CONFIG):
        tensors = model.unet.state_dict()
        merge(tensors, matrices, config["lora_alpha"] / config["r"])
        model.unet.load_state_dict(tensors)
    fill_strict({name: parameters[name] for name in whole if name in parameters}, whole, folder / WHOLE)
    return model


def main(arguments: Iterable[str] | None = None) -> None:
    """The command: a lora/ folder becomes a checkpoint of ours, with the released form beside it."""
    parser = flags.Parser(__doc__)
    files, model = parser.group("input and output"), parser.group("model")
    files.add_argument("--lora", type=Path, required=True, help="the lora/ folder of a checkpoint")
    files.add_argument("--output", type=Path, required=True, help="the folder to write, which must not exist yet")
    model.add_argument(
        "--model_path", help="the model that the run began from, if it does not lie any more where the run found it"
    )
    model.add_argument("--audio_extractor", help="FILE.py:NAME of your own audio features, if it was trained on them")
    args = parser.parse_args(arguments)
    if args.output.exists():
        raise UserError(f"'{args.output}' exists already: give a new folder with --output")
    extractor = load_extractor(args.audio_extractor) if args.audio_extractor else None
    start = open_lora(args.lora, args.model_path, extractor=extractor)
    model = load_merged(args.lora, start)
    with atomic_folder(args.output) as folder:
        save_model(folder, model, start)
        save_released(folder / "released", model)
    print(f"the merged model is in {args.output}")


if __name__ == "__main__":
    flags.run(main)
