"""What comes before a run's loop: where it goes on from, its folder, processes and data, and the dry run that stops there."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from sonic.checkpoints import Checkpoint, training_checkpoints
from sonic.config import NO_CROP, UserError
from sonic.latents import CachedLatents, gb_per_hour, streamed
from sonic.memory import Estimator, available_memory, require_memory, verdict
from sonic.pieces import Screening
from sonic.prepare import find_videos, prepare
from sonic.prepared import PreparedData
from sonic.processes import leave_at_exit
from sonic.run_log import start_trackers
from sonic.shard_stream import ShardStream, shard_list
from sonic.sharding import ready_for_sharding
from sonic.trainable import choose
from sonic.training import Encoders, sample_settings
from sonic.training_config import TrainingConfig
from sonic.weights import locate
from sonic.workers import Share

SMALL = 128  # pixels; what attends to itself in a mini model is then 64 tokens at most


def checkpoint_to_resume(config: TrainingConfig, output_dir: Path) -> Path | None:
    """The folder that --resume_from_checkpoint means; 'latest' of a run that has saved nothing yet starts anew."""
    if config.resume_from_checkpoint is None:
        return None
    if config.resume_from_checkpoint == "latest":
        found = training_checkpoints(output_dir)
        if not found:
            print(f"no checkpoint in {output_dir} yet: starting anew")
        return found[-1] if found else None
    folder = locate(config.resume_from_checkpoint, "checkpoint")
    if not (folder / "state").is_dir():
        raise UserError(f"'{folder}' holds no training state; to start from its weights use --model_path {folder}")
    return folder


def for_this_run(start: Checkpoint, config: TrainingConfig, screening: Screening) -> Checkpoint:
    """What the run's checkpoints will say of themselves."""
    settings = dataclasses.replace(
        start.settings,
        num_frames=config.num_frames,
        frame_step=config.frame_step,
        resolution=config.resolution,
        shift_offset=3 if config.frame_step == 1 else 7,  # SPEC.md section 5
        overlap=min(start.settings.overlap, config.num_frames - 1),
        # Training crops a square around the face, so animating should too.
        crop=None if screening.crop == NO_CROP else screening.crop_expand,
    )
    return dataclasses.replace(start, settings=settings)


def make_output_dir(output_dir: Path) -> None:
    """Creates the output folder and proves that it can be written to, before hours are spent."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()  # a name of its own: every process of a run comes here at once
    except OSError as error:
        raise UserError(f"cannot write to output folder '{output_dir}': {error.strerror}") from None


def cache_dir(config: TrainingConfig) -> Path:
    """Where prepared data and cached latents lie."""
    return Path(config.cache_dir or Path(config.output_dir) / "cache")


def half_precision(config: TrainingConfig) -> torch.dtype:
    """What the frozen encoders compute in: not in fp16, in which SVD's VAE overflows."""
    return torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32


def start_accelerator(config: TrainingConfig, start: Checkpoint) -> Accelerator:
    """The processes and what they report to. Raises UserError for a run that cannot fit into the memory, or be sharded."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # torchrun does not tell it so
        mixed_precision="fp16" if config.mixed_precision == "fp16" else "no",  # for the scaler; see `autocast_for`
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.output_dir,
        # A process that has prepared its share of the data waits for the others, for hours if it must be.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    leave_at_exit()
    ready_for_sharding(accelerator, config)
    # What shards a model, FSDP and DeepSpeed, needs less than an estimate for one process says.
    if accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        estimator = Estimator(start, choose, on_gpu=accelerator.device.type == "cuda")
        if tight := require_memory(estimator, config, accelerator.device):
            accelerator.print(tight)
    start_trackers(accelerator, config)
    return accelerator


def fused_is_faster(config: TrainingConfig, device: torch.device) -> bool:
    """Whether torch's fused attention is the faster one to train with, as it is but for few tokens in bf16 on a CPU.

    There the fused kernel's backward pass takes several times as long. From 256 tokens on it wins, and never keeps L × L weights.
    """
    few = config.mixed_precision == "bf16" and config.resolution <= SMALL
    return not few or device.type != "cpu"


def prepare_data(config: TrainingConfig, screening: Screening, extractor, share: Share) -> PreparedData:
    """Tracks and audio features of every video, made or reused; prints what was left out and why."""
    data = PreparedData()
    if config.data_root:
        data = prepare(
            config.data_root,
            cache_dir(config),
            extractor,
            num_frames=config.num_frames,
            frame_step=config.frame_step,
            screening=screening,
            num_workers=config.num_workers,
            progress=share.index == 0,
            share=share,
        )
    if share.index == 0:
        if config.data_root:
            print(data.table())
        path = Path(config.output_dir) / "config.json"
        path.write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    return data


def shortest_clip(config: TrainingConfig) -> int:
    """Ticks of a window and a reference frame."""
    return config.num_frames * config.frame_step + 1


def stream_shards(config: TrainingConfig, extractor, encoders: Encoders | CachedLatents, share: Share) -> ShardStream:
    """This process's part of the samples in --data_shards."""
    settings = sample_settings(config)
    if isinstance(encoders, CachedLatents):
        kind = {"latents": encoders.files.folder.name, "samples_of": partial(streamed, files=encoders.files)}
    else:
        kind, settings["clip_size"] = {}, encoders.base.image_encoder.config.image_size
    return ShardStream(
        shard_list(config.data_shards),
        extractor.name,
        settings,
        needed=shortest_clip(config),
        buffer=config.shard_buffer,
        rank=share.index,
        world=share.count,
        **kind,
    )


def dry_run(config: TrainingConfig, start: Checkpoint) -> None:
    """Prints what a run with these flags is made of, and stops before anything is loaded or written."""
    print(json.dumps(dataclasses.asdict(config), indent=1))
    if config.data_shards:
        print(f"data: {len(shard_list(config.data_shards))} shards, {config.data_shards}")
    if config.data_root:
        videos = find_videos(Path(config.data_root))
        if not videos:
            raise UserError(f"{config.data_root} holds no video: give the folder of your videos with --data_root")
        print(f"data: {len(videos)} video files in {config.data_root}")
    print("model:", {part: str(path) for part, path in start.tensors.items()})
    print(f"base model: {start.base_model}; Whisper: {start.whisper_path}")
    if config.cache_latents:
        print(f"latents: {gb_per_hour(config, start.base_model, half_precision(config)):.2f} GB per hour of video")
    on_gpu = torch.cuda.is_available() or config.device_memory_gb is not None
    estimator = Estimator(start, choose, on_gpu)
    print(estimator(config).table())
    room, where = available_memory(config, torch.device("cuda" if on_gpu else "cpu"))
    print("this run " + verdict(estimator, config, room, where)[1])
