"""Every setting of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from sonic.config import BASE_MODEL, POSITIVE, SCALE, SEED, SPEED, STEP, WHISPER, WHOLE, UserError, or_ramp
from sonic.flags import Checked, flag, number, one_of

# ln sigma ~ Normal(P_MEAN, P_STD) in training: SVD's values for high-resolution fine-tuning (SPEC.md section 6)
P_MEAN, P_STD = 0.7, 1.6

TRACKERS = ("none", "wandb", "tensorboard")
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
SHARE = number(float, low=0, high=1)
TRAIN_MODULES = ("all", "attention", "audio", "lora")
LORA_RANK = 16


@dataclass(frozen=True)
class TrainingConfig(Checked):
    """One training run."""

    data_root: str = flag("", "folder of .mp4 .mov .mkv .webm files with speech, also nested", group="data and output")
    data_shards: str | None = flag(
        None,
        "tar files of python -m sonic.prepare --export_shards to train on, files or URLs with braces, {000..099}, or stars; "
        "a --data_root beside them is for validation alone",
    )
    shard_buffer: int = flag(
        32, "clips out of --data_shards that each worker holds to draw the next one from", POSITIVE
    )
    output_dir: str = flag("outputs", "where checkpoints, logs and validation videos go")
    model_path: str = flag(
        BASE_MODEL, "where training starts: a Stable Video Diffusion folder, or a checkpoint of ours", group="models"
    )
    base_model: str | None = flag(None, "VAE and CLIP folder (default: --model_path, or what its checkpoint names)")
    whisper_path: str | None = flag(None, f"Whisper folder (default: the checkpoint's own, else {WHISPER})")
    audio_extractor: str | None = flag(
        None, "FILE.py:NAME of your own audio features instead of Whisper's: see docs/api.md"
    )
    cache_dir: str | None = flag(None, "prepared data (default: OUTPUT_DIR/cache)", group="data and output")

    num_frames: int | None = flag(
        None, "frames of a training window (default: the model's; SVD 25)", number(int, low=2), group="clips"
    )
    frame_step: int | None = flag(
        None, "1 trains 25 frames per second, 2 trains 12.5 (default: the model's; SVD 2)", STEP
    )
    resolution: int | None = flag(
        None,
        "side of the square training frames, a multiple of 64 (default: the model's; SVD 512)",
        number(int, low=64),
    )

    crop_per: str | None = flag(
        None,
        "window cuts each window with a square around the face's path in it, clip the whole clip with one around the "
        "path through all of it (default: window; clip with --cache_latents)",
        one_of("window", "clip"),
    )
    flip: float = flag(0.0, "share of samples that are mirrored left to right", SHARE)
    cache_latents: bool = flag(
        False,
        "encode every picture once before training and store the result in the cache; training then loads neither VAE "
        "nor CLIP nor Whisper and decodes no video",
    )

    train_batch_size: int = flag(1, "clips per process and step", POSITIVE, group="steps and noise")
    noise_draws: int = flag(
        1, "noise levels drawn per clip and step; VAE and CLIP, which cost much of a step, run once for all", POSITIVE
    )
    p_mean: float | tuple[float, float] = flag(
        P_MEAN,
        "EDM's P_mean: mean of the log noise level that is trained at, or FIRST,LAST to go linearly over the steps",
        or_ramp(number(float)),
    )
    p_std: float = flag(P_STD, "EDM's P_std: its standard deviation", SCALE)
    gradient_accumulation_steps: int = flag(1, "batches per optimizer step", POSITIVE)
    num_train_epochs: int = flag(100, "passes over the clips, one random window of each per pass", POSITIVE)
    max_train_steps: int | None = flag(None, "optimizer steps; overrides --num_train_epochs", POSITIVE)
    optimizer: str = flag(
        "adamw", "adamw, or muon for models that start from nothing", one_of("adamw", "muon"), group="optimizer"
    )
    use_8bit_adam: bool = flag(False, "AdamW with moments of 8 bits instead of 32, by bitsandbytes")
    learning_rate: float = flag(1e-5, "the optimizer's learning rate", number(float, above=0))
    lr_scheduler: str = flag("constant", ", ".join(LR_SCHEDULERS), one_of(*LR_SCHEDULERS))
    lr_warmup_steps: int = flag(0, "optimizer steps over which the learning rate rises", WHOLE)
    adam_weight_decay: float = flag(1e-2, "the optimizer's weight decay", SCALE)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0 clips nothing", SCALE)
    mixed_precision: str = flag(
        "no", "no, fp16 or bf16; trained weights stay in fp32", one_of("no", "fp16", "bf16"), group=SPEED
    )
    gradient_checkpointing: bool = flag(
        False, "compute activations again in the backward pass: much less memory, more time"
    )

    train_modules: str = flag(
        "all",
        "all; attention: the attention of all transformer blocks; audio: the audio attention's projections; lora: those, and "
        "low-rank adapters in the other attention, by peft. Both adapters always",
        one_of(*TRAIN_MODULES),
        group="what is trained",
    )
    lora_rank: int | None = flag(None, f"rank of the low-rank adapters (default: {LORA_RANK})", POSITIVE)
    ema_decay: float = flag(
        0.0, "keep an average of what is trained, by this share per step (0.9999), and ship it; 0 keeps none", SHARE
    )
    ema_device: str = flag(
        "auto", "where the average is kept: auto (the training device) or cpu", one_of("auto", "cpu")
    )
    audio_drop_prob: float = flag(0.05, "share of samples without audio", SHARE, group="dropout of conditions")
    image_drop_prob: float = flag(0.05, "share of samples without image (latent and CLIP)", SHARE)
    both_drop_prob: float = flag(0.05, "share of samples without both", SHARE)

    lip_loss_weight: float = flag(
        12.0,  # the best of 1, 4 and 12 (docs/lab.md, "The weight of the lips")
        "how much more the loss counts around the lips, which are a few percent of the picture; 1: no more",
        SCALE,
        group="lips and sound",
    )
    face_loss_weight: float = flag(1.0, "how much more the loss counts in the face, the lips included", SCALE)
    init_audio2token: bool = flag(
        False, "start audio2token anew, its first layer fitted to the mean and covariance of the clips' audio features"
    )

    num_workers: int = flag(
        4, "processes that prepare the data, then load it; 0 loads in the main process", WHOLE, group=SPEED
    )
    compile: bool = flag(False, "torch.compile the UNet: a minute or more at the start, faster steps")
    save_steps: int = flag(500, "optimizer steps between checkpoints", POSITIVE, group="the run")
    checkpoints_total_limit: int | None = flag(None, "newest checkpoints to keep (default: all)", POSITIVE)
    logging_steps: int = flag(10, "optimizer steps between log lines", POSITIVE)
    validation_steps: int = flag(500, "optimizer steps between validations; 0 turns them off", WHOLE)
    seed: int = flag(42, "seed of everything random", SEED)
    resume_from_checkpoint: str | None = flag(
        None, "a checkpoint folder of an earlier run, or 'latest' in --output_dir"
    )
    report_to: str = flag("none", "none, wandb or tensorboard", one_of(*TRACKERS))
    use_wandb: bool = flag(False, "the same as --report_to wandb")
    dry_run: bool = flag(False, "print the resolved settings, models, data and a memory estimate, and stop")
    device_memory_gb: float | None = flag(
        None,
        "memory of the GPU that --dry_run speaks of, such as 24 (default: the device here)",
        number(float, above=0),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.resolution and self.resolution % 64:
            raise UserError(f"resolution must be a multiple of 64, not {self.resolution}")
        if self.cache_latents and self.crop_per == "window":
            raise UserError("latents can only be cached where a clip has one square: use --crop_per clip")
        if self.audio_drop_prob + self.image_drop_prob + self.both_drop_prob > 1:
            raise UserError(
                "audio_drop_prob, image_drop_prob and both_drop_prob exclude each other and must add up to 1 at most"
            )
        if self.use_8bit_adam and self.optimizer != "adamw":
            raise UserError(f"use_8bit_adam is AdamW: leave it away with --optimizer {self.optimizer}")
        if self.lora_rank and self.train_modules != "lora":
            raise UserError("lora_rank is for --train_modules lora: give that too, or leave it away")
        if self.train_modules == "lora" and not self.lora_rank:
            object.__setattr__(self, "lora_rank", LORA_RANK)
        if self.ema_device != "auto" and not self.ema_decay:
            raise UserError("ema_device is for an average: give --ema_decay too, 0.9999 for one")
        if self.data_shards and not self.max_train_steps:
            raise UserError("a stream of shards has no epochs: give --max_train_steps beside --data_shards")
        if self.data_shards and self.init_audio2token:
            raise UserError(
                "init_audio2token needs all clips at the start: leave it away with --data_shards, or train on a folder"
            )
        if not (self.data_root or self.data_shards):
            raise UserError("data_root is missing: give the folder of your videos with --data_root")
