"""What a run remembers and tells: its state, its log, what it was made of, and the report at its end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from sonic.clips import Clip
from sonic.config import UserError
from sonic.training_config import TrainingConfig
from sonic.weights import ROOT, read_json

PROVENANCE = "run.json"
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "peft",
    "bitsandbytes",
    "deepspeed",
)
# What may be another at every start without changing what is learnt.
PRACTICAL = {
    *("output_dir", "cache_dir", "data_root", "model_path", "base_model", "whisper_path", "num_workers", "report_to"),
    *("use_wandb", "resume_from_checkpoint", "dry_run", "save_steps", "logging_steps", "validation_steps"),
    *("checkpoints_total_limit", "gradient_checkpointing", "compile", "cache_latents", "device_memory_gb"),
}
# What samples follow from, and what the optimizer's state is made of: a run that changes it is another run.
FIXED = {"seed", "optimizer", "train_modules", "lora_rank", "use_8bit_adam"}
SIGMA_BANDS = (0.7, 2.0, 6.0)  # about a quarter of SVD's training noise levels lies in each of the four bands
TOO_MANY = 10  # skipped steps in a row


# ---------------------------------------------------------------------------------------------------------- state


@dataclass
class RunState:
    """How far a run is, with the sums behind the next log line: saved and restored with every checkpoint."""

    step: int = 0
    samples: int = 0  # seen by all processes together: the number of the next one
    skipped: int = 0  # steps without an update because of a loss or gradient that is no number
    skipped_in_a_row: int = 0
    trained_seconds: float = 0.0
    sums: dict[str, list[float]] = field(default_factory=dict)  # name: [sum, count]
    # Of the time since the last log line, not part of the state: micro-batches, their seconds, those spent waiting for data.
    timed: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def time(self, wait: float, whole: float) -> None:
        """Counts a micro-batch's seconds."""
        self.timed += 1
        self.waited += wait
        self.seconds += whole
        self.trained_seconds += whole

    def count_skipped(self, bad: bool) -> None:
        """Counts a step that was skipped, or ends a row of them."""
        self.skipped += bad
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if bad else 0

    def timing(self) -> tuple[float, float]:
        """Seconds per micro-batch and the share of them spent waiting for data, since the last log line."""
        timing = self.seconds / max(self.timed, 1), self.waited / max(self.seconds, 1e-9)
        self.timed, self.seconds, self.waited = 0, 0.0, 0.0
        return timing

    def add(self, **values: float | Iterable[float]) -> None:
        """Adds to each name's mean; a list adds as many values as it holds, none if it is empty."""
        for name, value in values.items():
            value = np.atleast_1d(np.asarray(value, dtype=float))
            entry = self.sums.setdefault(name, [0.0, 0])
            entry[0] += float(value.sum())
            entry[1] += len(value)

    def share(self, accelerator: Accelerator) -> None:
        """Replaces the sums by those over all processes, each of which counts an equal part, so that the means are common."""
        if self.sums:
            own = torch.tensor(list(self.sums.values()), dtype=torch.float64, device=accelerator.device)
            self.sums = dict(zip(self.sums, accelerator.reduce(own, "mean").tolist(), strict=True))

    def means(self) -> dict[str, float | None]:
        """The means since the last call; None where nothing was counted."""
        means = {name: total / count if count else None for name, (total, count) in self.sums.items()}
        self.sums = {}
        return means

    def state_dict(self) -> dict:
        names = ("step", "samples", "skipped", "skipped_in_a_row", "trained_seconds", "sums")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def by_noise_level(velocity_map: Tensor, sigma: Tensor) -> dict[str, list[float]]:
    """Each clip's squared error of v [B, F, H, W], sorted into four bands of its sigma [B]: a band's name and its values."""
    errors = velocity_map.detach().float().mean(dim=(1, 2, 3)).tolist()
    edges = [0.0, *SIGMA_BANDS, float("inf")]
    bands = {}
    for low, high in pairwise(edges):
        name = f"loss_sigma_{low:g}_to_{high:g}".replace("_to_inf", "_up")
        bands[name] = [error for error, level in zip(errors, sigma.tolist(), strict=True) if low <= level < high]
    return bands


# ---------------------------------------------------------------------------------------------------- log and trackers


class Log:
    """One JSON object per line in `log.jsonl`; lines beyond the step that a run resumes at are dropped."""

    def __init__(self, path: Path, step: int):
        self.path = path
        path.write_text("".join(json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= step))

    def write(self, step: int, values: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_log(path: Path) -> list[dict]:
    """A log's lines, without one that a kill has cut."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            found.append(entry)
    return found


def start_trackers(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Opens the tracker that the flags name, which writes below the output folder. Raises UserError if it refuses."""
    settings = {name: str(value) for name, value in vars(config).items()}
    if config.report_to != "wandb":
        accelerator.init_trackers("sonic", settings)
        return
    import wandb  # only a run that reports there needs it

    try:
        accelerator.init_trackers("sonic", settings, init_kwargs={"wandb": {"dir": config.output_dir}})
    except wandb.errors.Error as error:
        raise UserError(
            f"wandb refuses to start ({error}): call `wandb login`, or set WANDB_MODE=offline, or use --report_to none"
        ) from None


@contextlib.contextmanager
def only_run_in(folder: Path, main: bool) -> Iterator[None]:
    """Inside, no other run writes to the folder. Raises UserError if one does. Of several processes the main one asks."""
    if not main:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however that ends
        except BlockingIOError:
            raise UserError(
                f"another run is writing to '{folder}': wait for its end, or give another --output_dir"
            ) from None
        yield
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------------------- provenance


def provenance(config: TrainingConfig, clips: Iterable[Clip]) -> dict:
    """What a run is made of: every flag, the versions of what computes, the commit, the data."""
    return {
        "config": asdict(config),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _installed(name))},
        "git_commit": _commit(),
        "data": fingerprint(clips),
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The project's commit, with a + if files differ from it; None outside of a repository."""
    try:
        said = [
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return said[0] + "+" * bool(said[1])


def fingerprint(clips: Iterable[Clip]) -> str:
    """Clips, their lengths and tracks in 16 hexadecimal digits: the same as long as the same windows can be drawn."""
    digest = sha256()
    for clip in clips:
        digest.update(f"{clip.name} {clip.start} {clip.num_ticks}\n".encode())
        digest.update(np.ascontiguousarray(clip.landmarks).tobytes())
    return digest.hexdigest()[:16]


def changes(config: TrainingConfig, folder: Path) -> dict[str, str]:
    """What the flags of a resumed run ask for that those that left `folder` did not: a sentence by flag."""
    before, now = read_json(folder / PROVENANCE)["config"], json.loads(json.dumps(asdict(config)))
    return {
        name: f"--{name} {value} instead of {before[name]}"
        for name, value in now.items()
        if name in before and value != before[name] and name not in PRACTICAL
    }


def check_resumable(config: TrainingConfig, folder: Path) -> None:
    """Raises UserError if the flags change what cannot be changed in the middle of a run."""
    stuck = [text for name, text in changes(config, folder).items() if name in FIXED]
    if stuck:
        raise UserError(
            f"cannot resume {folder} with {', '.join(stuck)}: give the old value, or start a new run from its weights with "
            f"--model_path {folder}"
        )


def differences(config: TrainingConfig, made_of: dict, folder: Path) -> list[str]:
    """What a resumed run does otherwise than the one that left `folder`, a sentence each; `made_of` is its `provenance`."""
    lines = list(changes(config, folder).values())
    if read_json(folder / PROVENANCE)["data"] != made_of["data"]:
        lines.append("other data: the samples that follow are not those that would have followed")
    return lines


# ------------------------------------------------------------------------------------------------------------ report


def write_report(output_dir: Path, state: RunState, checkpoint: Path) -> str:
    """Reads the log, draws `loss.png`, and gives the short text that it writes to `report.md` as well."""
    rows = read_log(output_dir / "log.jsonl")
    trained = [row for row in rows if "loss" in row]
    checked = [row for row in rows if "validation_loss" in row]
    hours, rest = divmod(round(state.trained_seconds), 3600)
    lines = [f"{state.step} steps, {state.samples} samples in {hours} h {rest // 60} min {rest % 60} s of training"]
    if trained:
        last = trained[-1]
        names = ("loss", "lip_loss", "bucket_loss", "token_spread")
        lines.append("last: " + ", ".join(f"{name} {last[name]:.4g}" for name in names if last.get(name) is not None))
    if state.skipped:
        lines.append(f"{state.skipped} steps skipped for losses or gradients that are no number")
    if checked:
        best = min(checked, key=lambda row: row["validation_loss"])
        lines.append(
            f"validation_loss {checked[-1]['validation_loss']:.4g} at the end, best {best['validation_loss']:.4g} "
            f"at step {best['step']}"
        )
    lines.append(f"model: {checkpoint}")
    videos = output_dir / "validation"
    if videos.is_dir():
        lines.append(f"validation videos: {videos}")
    lines.append(f"log: {output_dir / 'log.jsonl'}; losses drawn: {output_dir / 'loss.png'}")
    plot_losses(trained, checked, output_dir / "loss.png")
    (output_dir / "report.md").write_text("# Training run\n\n" + "".join(f"- {line}\n" for line in lines))
    return "\n".join(lines)


def plot_losses(trained: list[dict], checked: list[dict], path: Path) -> None:
    """Training loss (also by noise level), validation loss, and the audio gap, against steps."""
    from matplotlib.figure import Figure  # a node that only trains for hours needs it once, at the end

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    losses, levels, gaps = figure.subplots(1, 3)

    def draw(axis, rows: list[dict], name: str, label: str, **style) -> None:
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)

    draw(losses, trained, "loss", "training", color="#a0aec0", lw=1)
    draw(losses, checked, "validation_loss", "validation", color="#2b6cb0", marker="o", ms=3)
    bands = dict.fromkeys(name for row in trained for name in row if name.startswith("loss_sigma"))  # in their order
    for name in bands:
        draw(levels, trained, name, name.removeprefix("loss_sigma_").replace("_", " "), lw=1)
    draw(gaps, checked, "audio_gap_sigma_1", "sigma 1", color="#2b6cb0", marker="o", ms=3)
    draw(gaps, checked, "audio_gap_sigma_3", "sigma 3", color="#dd6b20", marker="o", ms=3)
    for axis, title in ((losses, "loss"), (levels, "training loss by noise level"), (gaps, "audio gap")):
        axis.set(title=title, xlabel="steps")
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=90)
