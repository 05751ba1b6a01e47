"""Train Sonic on a folder of videos.

    python sonic_training.py --model_path checkpoints/stable-video-diffusion-img2vid-xt --data_root VIDEOS --output_dir OUT \\
        --train_batch_size 1 --num_train_epochs 100 --learning_rate 1e-5 --mixed_precision fp16 --num_frames 25 --resolution 576
    accelerate launch sonic_training.py ...                        # several processes or machines
    python sonic_training.py ... --resume_from_checkpoint latest   # goes on where it was
    python sonic_training.py --data_shards 'https://host/shard-{000000..000099}.tar' --max_train_steps 100000 ...
    python sonic_training.py ... --dry_run                         # what would happen, and what it needs
    python sonic_training.py --config OUT/config.json --output_dir OTHER    # the settings of an earlier run

Window length, frame step and resolution that no flag gives are those of the model that training starts from.

Exit codes: 0 done; 2 wrong flags, input or losses; 130 Ctrl-C and 143 SIGTERM, in the loop after its step has been saved.
"""

from __future__ import annotations

if __name__ == "__main__":
    from sonic.stopping import leave_quietly

    leave_quietly()  # the imports below take seconds

import dataclasses
import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from sonic.animator import Animator
from sonic.audio import load_extractor
from sonic.blocks import require_compiler
from sonic.checkpoints import Checkpoint, LazyWhisper, load_base, training_checkpoints
from sonic.clips import Clip, hold_out
from sonic.config import UserError
from sonic.files import atomic_folder
from sonic.flags import Parser, config_from, given, run
from sonic.latents import CachedLatents, cache_latents
from sonic.memory import used_memory
from sonic.optimizers import make_optimizer
from sonic.pieces import Screening
from sonic.prepare import screening_for
from sonic.run_log import (
    TOO_MANY,
    Log,
    RunState,
    by_noise_level,
    check_resumable,
    differences,
    only_run_in,
    provenance,
    write_report,
)
from sonic.run_setup import (
    cache_dir,
    checkpoint_to_resume,
    dry_run,
    for_this_run,
    fused_is_faster,
    half_precision,
    make_output_dir,
    prepare_data,
    shortest_clip,
    start_accelerator,
    stream_shards,
)
from sonic.sampling import ramp
from sonic.shard_stream import ShardStream, stream_loader
from sonic.sharding import any_says, autocast_for, callable_parts, gradient_norm
from sonic.stopping import StopSignals, ignore_signals
from sonic.trainable import Trained, open_start, require_packages
from sonic.training import (
    Encoders,
    Numbered,
    SampleNumbers,
    audio_windows,
    draw,
    keep_checkpoints,
    keep_model_out_of_state,
    lip_loss,
    loss_weight,
    optimizer_steps,
    readable,
    resume_state,
    save_training_checkpoint,
    saved_or_said,
    total_loss,
    with_model_defaults,
)
from sonic.training_config import TrainingConfig
from sonic.validation import Validation
from sonic.workers import Share

WINDOWS_TO_FIT = 4096  # of audio features, for --init_audio2token


def parse(arguments: list[str] | None = None) -> TrainingConfig:
    """The command line as a checked configuration."""
    return parse_all(arguments)[0]


def parse_all(arguments: list[str] | None = None) -> tuple[TrainingConfig, Screening]:
    """The same with the thresholds that decide which pieces of the videos are trained on."""
    parser = Parser(__doc__)
    parser.add_config(TrainingConfig)
    parser.add_config(Screening, only_given=True)
    parsed = parser.parse_args(arguments)
    config = config_from(TrainingConfig, parsed)
    config = dataclasses.replace(config, report_to="wandb") if config.use_wandb else config
    return config, screening_for(given(Screening, parsed), cache_dir(config))


def main(arguments: list[str] | None = None) -> int | None:
    config, screening = parse_all(arguments)
    extractor = load_extractor(config.audio_extractor) if config.audio_extractor else None
    output_dir = Path(config.output_dir)
    resumed = checkpoint_to_resume(config, output_dir)
    if not config.resume_from_checkpoint and training_checkpoints(output_dir) and not config.dry_run:
        raise UserError(
            f"'{output_dir}' already holds a run: go on with --resume_from_checkpoint latest, or give another --output_dir"
        )
    require_packages(config)
    if resumed:
        check_resumable(config, resumed)
    start = open_start(config, resumed, extractor)
    config = with_model_defaults(config, start.settings)
    start = for_this_run(start, config, screening)
    if config.dry_run:
        return dry_run(config, start)
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed_precision fp16 needs a CUDA GPU: use --mixed_precision bf16, or no, on this machine")

    make_output_dir(output_dir)
    accelerator = start_accelerator(config, start)
    with only_run_in(output_dir, accelerator.is_main_process):
        share = Share(accelerator.process_index, accelerator.num_processes, gather_object)
        extractor = extractor or LazyWhisper(start.whisper_path, cache_dir(config) / "whisper.json", accelerator.device)
        clips = prepare_data(config, screening, extractor, share).clips
        half = half_precision(config)
        if config.cache_latents:
            encoders = cache_latents(
                clips, config, start.base_model, cache_dir(config), half, accelerator.device, share
            )
            clips = encoders.clips
        else:
            encoders = Encoders(load_base(start.base_model, half, half).to(accelerator.device), accelerator.device)
        stream = stream_shards(config, extractor, encoders, share) if config.data_shards else None
        return Run(config, accelerator, start, encoders, clips, resumed, stream).train()


class Run:
    """One training run: what it is made of, in the order in which that is made, and the loop."""

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        start: Checkpoint,
        encoders: Encoders | CachedLatents,
        clips: list[Clip],
        resumed: Path | None,
        stream: ShardStream | None = None,
    ):
        self.config, self.accelerator, self.encoders = config, accelerator, encoders
        self.output_dir = Path(config.output_dir)
        # Beside a stream, a folder is there to be held out.
        train_clips, held_out = ([], clips) if stream else hold_out(clips, window=shortest_clip(config))
        self.made_of = provenance(config, train_clips)

        torch.manual_seed(config.seed)  # for the start weights of new adapters; all else is drawn per sample
        model = start.load().train()
        if config.init_audio2token and not resumed:
            model.audio2token.fit(audio_windows(train_clips, WINDOWS_TO_FIT, config.seed))
        self.trained = Trained(model, config, start, resumed, accelerator.device)
        model.unet.fuse_attention(fused_is_faster(config, accelerator.device))
        if config.gradient_checkpointing:
            model.unet.enable_gradient_checkpointing()
        if config.compile:
            require_compiler(accelerator.device)
            model.unet.compile()
        trainable = list(self.trained.parameters.values())
        count = sum(parameter.numel() for parameter in trainable)

        optimizer = make_optimizer(config, trainable)
        per_epoch, self.total_steps = optimizer_steps(config, len(train_clips), accelerator.num_processes)
        # "constant" as diffusers knows it ignores the warmup that was asked for.
        schedule = "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler
        self.lr_scheduler = get_scheduler(
            schedule, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=self.total_steps
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        callable_parts(self.model)
        self.autocast = autocast_for(config, accelerator.device)

        self.state = RunState()
        accelerator.register_for_checkpointing(self.lr_scheduler, self.state)
        keep_model_out_of_state(accelerator)
        if resumed:
            resume_state(accelerator, resumed)
            accelerator.print(f"resumed at step {self.state.step} from {resumed}")
            for difference in differences(config, self.made_of, resumed):
                accelerator.print(f"resuming with a difference: {difference}")
        self.log = Log(self.output_dir / "log.jsonl", self.state.step) if accelerator.is_main_process else None
        trained_on = f"clips out of {len(stream.shards)} shards" if stream else f"{len(train_clips)} training clips"
        accelerator.print(
            f"{trained_on}, {len(held_out)} held-out clips, {len(trainable)} trainable tensors of "
            f"{count / 1e6:.1f} M parameters on {accelerator.device}; {self.total_steps} steps, {per_epoch} per epoch"
        )

        batches = max(self.total_steps - self.state.step, 0) * config.gradient_accumulation_steps
        reading = {
            "num_workers": config.num_workers,
            "multiprocessing_context": "spawn" if config.num_workers else None,
            "worker_init_fn": ignore_signals,
            "pin_memory": accelerator.device.type == "cuda",
        }
        if stream:
            stream.first = self.state.samples
            self.loader = stream_loader(stream, batches, batch_size=config.train_batch_size, **reading)
        else:
            numbers = SampleNumbers(
                first=self.state.samples,
                batches=batches,
                batch_size=config.train_batch_size,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
            )
            self.loader = DataLoader(Numbered(encoders.dataset(train_clips, config)), batch_sampler=numbers, **reading)
        self.bad, self.suspects = False, []  # whether the step under way has met what is no number, and where
        self.validation = None
        if config.validation_steps and held_out:
            self.validation = Validation(held_out, config, start.settings, encoders)
        elif config.validation_steps:
            accelerator.print("no clip is long enough to be held out: this run does not validate")

    def train(self) -> int | None:
        """The loop, and what is said at its end. Gives the exit code: None, or that of a signal."""
        config, accelerator, state = self.config, self.accelerator, self.state
        if self.validation and state.step == 0:
            self.validate(video=False)  # where it starts from; without it the first fall would not be seen
        bar = tqdm(
            total=self.total_steps,
            initial=state.step,
            unit="step",
            disable=None if accelerator.is_main_process else True,
        )
        stopped = save_due = False
        with StopSignals() as signals:
            clock = time.perf_counter()
            for samples in readable(self.loader):
                waited = time.perf_counter() - clock
                ended = self.learn(samples)
                state.time(wait=waited, whole=time.perf_counter() - clock)
                clock = time.perf_counter()
                if not ended:  # more batches belong to this step
                    continue
                bar.update()
                last = state.step == self.total_steps
                if state.skipped_in_a_row == TOO_MANY:
                    break
                if state.step % config.logging_steps == 0 or last:
                    values = self.log_line()
                    self.report(values)
                    bar.set_postfix(loss=values.get("loss"), lr=values["learning_rate"])
                if self.validation and (state.step % config.validation_steps == 0 or last):
                    self.validate(video=True)
                stopped = any_says(accelerator, signals.received is not None)
                save_due |= state.step % config.save_steps == 0 or last or stopped
                if save_due and not state.skipped_in_a_row:  # what is behind a skipped step may be spoilt
                    self.save()
                    save_due = False
                if stopped:
                    break
                clock = time.perf_counter()
        bar.close()
        accelerator.end_training()
        saved = training_checkpoints(self.output_dir)
        if state.skipped_in_a_row:
            last_good = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint has been saved"
            raise UserError(
                f"the last {state.skipped_in_a_row} steps had losses or gradients that are no number and were skipped "
                f"({self.blamed}): {last_good}; lower --learning_rate, or look at these clips"
            )
        if stopped and state.step < self.total_steps:
            accelerator.print(f"{signals.received.name}: saved {saved[-1]}; go on with --resume_from_checkpoint latest")
            return 128 + signals.received
        if accelerator.is_main_process:
            print(f"done: {write_report(self.output_dir, state, saved[-1])}")
        return None

    def learn(self, samples: dict) -> bool:
        """One batch: encode with the frozen models, draw noise by sample number, one loss, and, with the last batch of a
        step, one update. Gives whether it was the last."""
        config, accelerator, state = self.config, self.accelerator, self.state
        with accelerator.accumulate(self.model):
            clip = self.encoders(samples).repeated(config.noise_draws)
            now = dataclasses.replace(config, p_mean=ramp(config.p_mean, state.step, self.total_steps))
            noise = draw(now, samples["number"].tolist(), clip.latents.shape[1:])
            with self.autocast():
                losses = self.model(clip.with_noise(noise))
            lips = samples["lips"].to(accelerator.device).repeat(config.noise_draws, 1, 1, 1)
            loss = total_loss(losses, loss_weight(config, lips, clip.portrait.mask))
            if self.is_number(loss.item(), samples):
                accelerator.backward(loss)
                state.add(
                    loss=losses.velocity.item(),
                    lip_loss=lip_loss(losses, lips),
                    bucket_loss=losses.bucket.item(),
                    token_spread=losses.token_spread.item(),
                    **by_noise_level(losses.velocity_map, noise.sigma),
                )
            if accelerator.sync_gradients:
                self.norm = gradient_norm(accelerator, self.model, config.max_grad_norm)
                self.is_number(self.norm, samples)
                if not self.bad or accelerator.scaler:  # which leaves out a bad step by itself, and learns from it
                    self.optimizer.step()
            self.optimizer.zero_grad()
        state.samples += config.train_batch_size * accelerator.num_processes
        if accelerator.sync_gradients:
            self.end_step()
        return accelerator.sync_gradients

    def is_number(self, value: float, samples: dict) -> bool:
        """Whether a loss or a gradient's norm is a number in every process. If not, the step is bad, for one of these samples."""
        own = math.isfinite(value)
        self.suspects += [] if own else samples["name"]
        bad = any_says(self.accelerator, not own)
        self.bad |= bad
        return not bad

    def end_step(self) -> None:
        """Counts a step, also one that was skipped."""
        self.lr_scheduler.step()
        self.state.step += 1
        self.state.count_skipped(self.bad)
        if not self.bad:
            self.trained.update(self.state.step)
            return
        self.blamed = ", ".join(dict.fromkeys(gather_object(self.suspects)))
        self.accelerator.print(f"step {self.state.step} skipped: its loss or gradient is no number ({self.blamed})")
        self.bad, self.suspects = False, []

    def log_line(self) -> dict:
        """What has been measured since the last one."""
        accelerator, state = self.accelerator, self.state
        seconds, wait = state.timing()
        state.share(accelerator)
        values = state.means() | {
            "grad_norm": self.norm if math.isfinite(self.norm) else None,
            "learning_rate": self.lr_scheduler.get_last_lr()[0],
            "skipped_steps": state.skipped,
            "clips_per_second": self.config.train_batch_size * accelerator.num_processes / seconds,
            "data_wait": wait,
            "trained_seconds": round(state.trained_seconds, 1),
            "memory_gb": used_memory(accelerator.device),
        }
        if accelerator.scaler:
            values["loss_scale"] = accelerator.scaler.get_scale()
        return values

    def report(self, values: dict) -> None:
        """To the log and the tracker."""
        if self.accelerator.is_main_process:
            self.log.write(self.state.step, values)
            known = {name: value for name, value in values.items() if value is not None}
            self.accelerator.log(known, step=self.state.step)

    def validate(self, video: bool) -> None:
        """Measures the held-out clips, with the averaged weights if there are any, and animates one."""
        accelerator, step = self.accelerator, self.state.step
        plain = accelerator.unwrap_model(self.model)
        plain.eval()
        with self.trained.averaged():
            with self.autocast():
                values = self.validation.measure(plain)
            if video:
                path = self.output_dir / "validation" / f"step-{step:06d}.mp4" if accelerator.is_main_process else None
                animator = Animator(plain, self.encoders.models(), accelerator.device, self.autocast)
                self.validation.video(animator, path, accelerator.trackers, step)
        plain.train()
        self.report(values)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None)
        accelerator.print(f"step {step}: {shown}")

    def save(self) -> None:
        """A checkpoint, whole or not at all."""
        accelerator = self.accelerator
        target = self.output_dir / f"checkpoint-{self.state.step}"
        with (
            saved_or_said(target),
            atomic_folder(target, accelerator.is_main_process, accelerator.wait_for_everyone) as folder,
        ):
            save_training_checkpoint(folder, accelerator, self.trained, self.state, self.made_of)
        if accelerator.is_main_process:
            keep_checkpoints(self.output_dir, self.config.checkpoints_total_limit)


if __name__ == "__main__":
    run(main)
