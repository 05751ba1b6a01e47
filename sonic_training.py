"""Train Sonic on a folder of videos.

    python sonic_training.py --model_path checkpoints/stable-video-diffusion-img2vid-xt --data_root VIDEOS --output_dir OUT \\
        --train_batch_size 1 --num_train_epochs 100 --learning_rate 1e-5 --mixed_precision fp16 --num_frames 25 --resolution 576
    accelerate launch sonic_training.py ...                        # several processes or machines
    python sonic_training.py ... --resume_from_checkpoint latest   # goes on where it was
    python sonic_training.py ... --dry_run                         # what would happen, and what it needs

Window length, frame step and resolution that no flag gives are those of the model that training starts from.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from sonic.audio import load_extractor
from sonic.checkpoints import (
    Checkpoint,
    LazyWhisper,
    count_base_parameters,
    load_base,
    open_checkpoint,
    training_checkpoints,
)
from sonic.config import TrainingConfig, UserError
from sonic.flags import Parser, config_from, run
from sonic.latents import cache_latents, gb_per_hour
from sonic.optimizers import OPTIMIZERS
from sonic.pipeline import Animator
from sonic.prepare import PreparedData, Share, find_videos, hold_out, prepare
from sonic.sampling import ramp
from sonic.training import (
    Encoders,
    Log,
    Numbered,
    RunState,
    SampleNumbers,
    audio_windows,
    draw,
    estimate_memory,
    lip_loss,
    loss_weight,
    optimizer_steps,
    readable,
    resume_state,
    save_training_checkpoint,
    start_trackers,
    total_loss,
    used_memory,
    with_model_defaults,
)
from sonic.validation import Validation
from sonic.weights import atomic_folder, locate

WINDOWS_TO_FIT = 4096  # of audio features, for --init_audio2token


def parse(arguments: list[str] | None = None) -> TrainingConfig:
    """The command line as a checked configuration."""
    parser = Parser(__doc__)
    parser.add_config(TrainingConfig)
    config = config_from(TrainingConfig, parser.parse_args(arguments))
    return dataclasses.replace(config, report_to="wandb") if config.use_wandb else config


def main(arguments: list[str] | None = None) -> None:
    config = parse(arguments)
    extractor = load_extractor(config.audio_extractor) if config.audio_extractor else None
    output_dir = Path(config.output_dir)
    resumed = checkpoint_to_resume(config, output_dir)
    if not config.resume_from_checkpoint and training_checkpoints(output_dir) and not config.dry_run:
        raise UserError(
            f"'{output_dir}' already holds a run: go on with --resume_from_checkpoint latest, or give another --output_dir"
        )
    start = open_checkpoint(resumed or config.model_path, config.base_model, config.whisper_path, extractor)
    config = with_model_defaults(config, start.settings)
    start = for_this_run(start, config)
    if config.dry_run:
        return dry_run(config, start)
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed_precision fp16 needs a CUDA GPU: use --mixed_precision bf16, or no, on this machine")

    make_output_dir(output_dir)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=output_dir,
        # A process that has prepared its share of the data waits for the others, for hours if it must be.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    start_trackers(accelerator, config)
    share = Share(accelerator.process_index, accelerator.num_processes, gather_object)
    clips = prepare_data(config, start, extractor, accelerator.device, share).clips
    half = half_precision(config)
    if config.cache_latents:
        encoders = cache_latents(clips, config, start.base_model, cache_dir(config), half, accelerator.device, share)
        clips = encoders.clips
    else:
        encoders = Encoders(load_base(start.base_model, half, half).to(accelerator.device), accelerator.device)
    train_clips, held_out = hold_out(clips, window=config.num_frames * config.frame_step + 1)

    torch.manual_seed(config.seed)  # for the start weights of new adapters; all else is drawn per sample
    model = start.load().train()
    model.unet.freeze_unused()
    if config.init_audio2token and not resumed:
        model.audio2token.fit(audio_windows(train_clips, WINDOWS_TO_FIT, config.seed))
    if config.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[config.optimizer](trainable, lr=config.learning_rate, weight_decay=config.adam_weight_decay)
    per_epoch, total_steps = optimizer_steps(config, len(train_clips), accelerator.num_processes)
    # "constant" as diffusers knows it ignores the warmup that was asked for.
    schedule = "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler
    lr_scheduler = get_scheduler(
        schedule, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=total_steps
    )
    model, optimizer = accelerator.prepare(model, optimizer)

    state = RunState()
    accelerator.register_for_checkpointing(lr_scheduler, state)
    keep_model_out_of_state(accelerator)
    if resumed:
        resume_state(accelerator, resumed)
        accelerator.print(f"resumed at step {state.step} from {resumed}")
    accelerator.print(
        f"{len(train_clips)} training clips, {len(held_out)} held-out clips, {len(trainable)} trainable tensors of "
        f"{sum(parameter.numel() for parameter in trainable) / 1e6:.1f} M parameters on {accelerator.device}; "
        f"{total_steps} steps, {per_epoch} per epoch"
    )
    log = Log(output_dir / "log.jsonl", state.step) if accelerator.is_main_process else None

    accumulated = config.gradient_accumulation_steps
    loader = DataLoader(
        Numbered(encoders.dataset(train_clips, config)),
        batch_sampler=SampleNumbers(
            first=state.samples,
            batches=max(total_steps - state.step, 0) * accumulated,
            batch_size=config.train_batch_size,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        ),
        num_workers=config.num_workers,
        multiprocessing_context="spawn" if config.num_workers else None,
        pin_memory=accelerator.device.type == "cuda",
    )
    validation = (
        Validation(held_out, config, start.settings, encoders) if config.validation_steps and held_out else None
    )
    if validation is None and config.validation_steps:
        accelerator.print("no clip is long enough to be held out: this run does not validate")

    def report(values: dict) -> None:
        if accelerator.is_main_process:
            log.write(state.step, values)
            accelerator.log({name: value for name, value in values.items() if value is not None}, step=state.step)

    def save() -> None:
        target = output_dir / f"checkpoint-{state.step}"
        with atomic_folder(target, accelerator.is_main_process, accelerator.wait_for_everyone) as folder:
            save_training_checkpoint(folder, accelerator, model, start, state)

    def validate(video: bool) -> None:
        plain = accelerator.unwrap_model(model)
        plain.eval()
        values = validation.measure(plain)
        if video:
            path = output_dir / "validation" / f"step-{state.step:06d}.mp4"
            path = path if accelerator.is_main_process else None
            animator = Animator(plain, encoders.models(), accelerator.device, accelerator.autocast)
            validation.video(animator, path, accelerator.trackers, state.step)
        plain.train()
        report(values)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None)
        accelerator.print(f"step {state.step}: {shown}")

    if validation and state.step == 0:
        validate(video=False)  # where it starts from; without it the first fall would not be seen

    # The loop. A step is: encode with the frozen models, draw noise by sample number, one loss, one update.
    bar = tqdm(
        total=total_steps, initial=state.step, unit="step", disable=None if accelerator.is_main_process else True
    )
    clock = time.perf_counter()
    for samples in readable(loader):
        waited = time.perf_counter() - clock
        with accelerator.accumulate(model):
            clip = encoders(samples).repeated(config.noise_draws)
            now = dataclasses.replace(config, p_mean=ramp(config.p_mean, state.step, total_steps))
            noise = draw(now, samples["number"].tolist(), clip.latents.shape[1:])
            losses = model(clip.with_noise(noise))
            lips = samples["lips"].to(accelerator.device).repeat(config.noise_draws, 1, 1, 1)
            accelerator.backward(total_loss(losses, loss_weight(config, lips, clip.portrait.mask)))
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(trainable, config.max_grad_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
        state.add(
            loss=losses.velocity.item(),
            lip_loss=lip_loss(losses, lips),
            bucket_loss=losses.bucket.item(),
            token_spread=losses.token_spread.item(),
        )
        state.time(wait=waited, whole=time.perf_counter() - clock)
        state.samples += config.train_batch_size * accelerator.num_processes
        clock = time.perf_counter()
        if not math.isfinite(losses.velocity.item()):
            names = ", ".join(samples["name"])
            raise UserError(
                f"the loss is {losses.velocity.item()} at step {state.step + 1} ({names}): lower --learning_rate"
            )
        if not accelerator.sync_gradients:
            continue

        if not accelerator.optimizer_step_was_skipped:  # fp16's scaler skips a step that overflows
            lr_scheduler.step()
        state.step += 1
        bar.update()
        if state.step % config.logging_steps == 0 or state.step == total_steps:
            seconds, wait = state.timing()
            names, means = zip(*state.means().items(), strict=True)
            means = accelerator.reduce(torch.tensor(means, device=accelerator.device), "mean")
            values = dict(zip(names, means.tolist(), strict=True))
            values |= {"grad_norm": float(norm), "learning_rate": lr_scheduler.get_last_lr()[0]}
            clips = config.train_batch_size * accelerator.num_processes
            values |= {
                "clips_per_second": clips / seconds,
                "data_wait": wait,
                "memory_gb": used_memory(accelerator.device),
            }
            report(values)
            bar.set_postfix(loss=f"{values['loss']:.4f}", lr=f"{values['learning_rate']:.1e}")
        if validation and (state.step % config.validation_steps == 0 or state.step == total_steps):
            validate(video=True)
        if state.step % config.save_steps == 0 or state.step == total_steps:
            save()
        clock = time.perf_counter()
    bar.close()
    accelerator.end_training()
    accelerator.print(f"done: {state.step} steps; the model is in {output_dir / f'checkpoint-{state.step}'}")


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


def for_this_run(start: Checkpoint, config: TrainingConfig) -> Checkpoint:
    """What the run's checkpoints will say of themselves."""
    settings = dataclasses.replace(
        start.settings,
        num_frames=config.num_frames,
        frame_step=config.frame_step,
        resolution=config.resolution,
        shift_offset=3 if config.frame_step == 1 else 7,  # SPEC.md section 5
        overlap=min(start.settings.overlap, config.num_frames - 1),
        crop=0.5,  # training crops a square around the face, so animating should too
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


def prepare_data(
    config: TrainingConfig, start: Checkpoint, extractor, device: torch.device, share: Share
) -> PreparedData:
    """Tracks and audio features of every video, made or reused; prints what was left out and why."""
    cache = cache_dir(config)
    data = prepare(
        config.data_root,
        cache,
        extractor or LazyWhisper(start.whisper_path, cache / "whisper.json", device),
        num_frames=config.num_frames,
        frame_step=config.frame_step,
        num_workers=config.num_workers,
        progress=share.index == 0,
        share=share,
    )
    if share.index == 0:
        print(data.table())
        path = Path(config.output_dir) / "config.json"
        path.write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    return data


def keep_model_out_of_state(accelerator: Accelerator) -> None:
    """Weights are saved once, in our own form, and loaded from there before accelerate restores the rest."""
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())


def dry_run(config: TrainingConfig, start: Checkpoint) -> None:
    """Prints what a run with these flags is made of, and stops before anything is loaded or written."""
    print(json.dumps(dataclasses.asdict(config), indent=1))
    videos = find_videos(Path(config.data_root))
    if not videos:
        raise UserError(f"{config.data_root} holds no video: give the folder of your videos with --data_root")
    print(f"data: {len(videos)} video files in {config.data_root}")
    print("model:", {part: str(path) for part, path in start.tensors.items()})
    print(f"base model: {start.base_model}; Whisper: {start.whisper_path}")
    if config.cache_latents:
        print(f"latents: {gb_per_hour(config, start.base_model, half_precision(config)):.2f} GB per hour of video")
    frozen = 0 if config.cache_latents else count_base_parameters(start.base_model)
    parts, counts = estimate_memory(start.architecture, config, frozen)
    print("parameters: " + ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in counts.items()))
    for name, size in parts.items():
        print(f"  {name:12} {size:8.2f} GB")
    print(f"  {'together':12} {sum(parts.values()):8.2f} GB per process, estimated")


if __name__ == "__main__":
    run(main)
