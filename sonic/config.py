"""Everything that is a setting, and nothing that computes: constants of the method, presets, model and run configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sonic.flags import Checked, flag, number, one_of
from sonic.flags import UserError as UserError  # every module takes it from here

SAMPLE_RATE = 16_000  # Hz; Whisper's input rate
TICK_RATE = 25  # the method's clock: video ticks per second of speech
SAMPLES_PER_TICK = SAMPLE_RATE // TICK_RATE  # 640
FEATURES_PER_TICK = 2  # Whisper's encoder gives 50 features per second

# Where the README's download commands put the weights.
CHECKPOINTS = "checkpoints"
BASE_MODEL = f"{CHECKPOINTS}/stable-video-diffusion-img2vid-xt"
WHISPER = f"{CHECKPOINTS}/whisper-tiny"
RELEASED = f"{CHECKPOINTS}/Sonic"
SHIPPED = f"{CHECKPOINTS}/sonic-mini"
DOWNLOADS = {
    BASE_MODEL: f"hf download stabilityai/stable-video-diffusion-img2vid-xt --local-dir {BASE_MODEL}",
    WHISPER: f"hf download openai/whisper-tiny --local-dir {WHISPER}",
    RELEASED: f"hf download LeonJoe13/Sonic --include 'Sonic/*' --local-dir {CHECKPOINTS}",
    SHIPPED: "bash scripts/quickstart.sh",
}

MOTION_SCALES = {"mild": 1.0, "moderate": 1.5, "intense": 2.0}  # motion buckets are multiplied by (SPEC.md section 5)

# ln sigma ~ Normal(P_MEAN, P_STD) in training: SVD's values for high-resolution fine-tuning (SPEC.md section 6)
P_MEAN, P_STD = 0.7, 1.6

KEY_MEMORY = 1.0  # GB; a minute of the real model's in fp16 takes a multiple of it, a sentence does not

DEVICE = one_of("auto", "cpu", "cuda", "mps")
DTYPE = one_of("auto", "fp32", "fp16", "bf16")
WHOLE, POSITIVE = number(int, low=0), number(int, low=1)
SEED = number(int, low=0, high=2**53 - 1)  # what torch takes and a web page can hold
STEP, SIDE = number(int, low=1, high=5), number(int, low=64, high=8192)
SCALE, BUCKET = number(float, low=0), number(float, low=0, high=127)


def _or_ramp(check: Callable) -> Callable:
    """Lets a number through, or the first and the last of one that goes linearly over the steps: `2.0`, `1.0,3.0`, or a pair."""

    def check_ends(value):
        ends = value.split(",") if isinstance(value, str) else value
        if not isinstance(ends, list | tuple):
            return check(value)
        if len(ends) > 2:
            raise ValueError(f"must be one number or two, FIRST,LAST, not {value!r}")
        ends = tuple(check(end) for end in ends)
        return ends if len(ends) == 2 else ends[0]

    check_ends.metavar = "X[,X]"
    return check_ends


_GUIDANCE = _or_ramp(SCALE)
SOLVERS = ("euler", "dpmpp_2m")
_SOLVER = one_of(*SOLVERS)


def _interval(value):
    """Two noise levels, LOW,HIGH, or a pair."""
    ends = value.split(",") if isinstance(value, str) else value
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        raise ValueError(f"must be two noise levels, LOW,HIGH, not {value!r}")
    low, high = (SCALE(end) for end in ends)
    if low > high:
        raise ValueError(f"must begin with the lower noise level, not {value!r}")
    return low, high


NO_CROP = "none"


def _crop(value):
    """A margin in face sizes, or the word that takes the whole picture."""
    return value if value == NO_CROP else SCALE(value)


_crop.metavar = SCALE.metavar


@dataclass(frozen=True)
class Settings(Checked):
    """How a model was trained and how it is sampled unless a flag says otherwise; saved with its weights."""

    num_frames: int = flag(25, "frames of a window", POSITIVE)
    frame_step: int = flag(2, "ticks per frame: 1 is 25 fps, 2 is 12.5 fps", STEP)
    resolution: int = flag(512, "pixels of the short side", SIDE)
    shift_offset: int = flag(
        7, "frames that the windows move per denoising step (the paper has 3, released is 7)", WHOLE
    )
    overlap: int = flag(0, "frames that neighbouring windows share", WHOLE)
    num_inference_steps: int = flag(25, "denoising steps", POSITIVE)
    guidance_scale_image: float | tuple[float, float] = flag(2.0, "image guidance", _GUIDANCE)
    guidance_scale_audio: float | tuple[float, float] = flag(7.5, "audio guidance", _GUIDANCE)
    solver: str = flag("euler", "euler or dpmpp_2m", _SOLVER)
    guidance_interval: tuple[float, float] | None = flag(None, "noise levels with guidance; None: all", _interval)
    decode_chunk_size: int = flag(8, "frames that the VAE decodes at once", POSITIVE)
    crop: float | None = flag(None, "margin of the square cut around the face; None takes the whole picture", SCALE)


@dataclass(frozen=True)
class Preset:
    """A model at one size: its settings and the configurations of its parts, in the libraries' own terms."""

    settings: Settings
    scheduler: dict
    unet: dict
    vae: dict
    image_encoder: dict
    whisper: dict
    adapter_hidden: int  # width of the adapters' hidden layers
    audio_tokens: int  # audio tokens per frame


# SVD's sampler; the same file lies in its scheduler/ folder.
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "sigma_max": 700.0,
    "sigma_min": 0.002,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
}

PRESETS = {
    # The released sizes (SPEC.md section 1; unet_config of the released checkpoint's manifest).
    "svd-xt": Preset(
        settings=Settings(),
        scheduler=SCHEDULER,
        unet={
            "sample_size": 96,
            "in_channels": 8,
            "out_channels": 4,
            "down_block_types": ["CrossAttnDownBlockSpatioTemporal"] * 3 + ["DownBlockSpatioTemporal"],
            "up_block_types": ["UpBlockSpatioTemporal"] + ["CrossAttnUpBlockSpatioTemporal"] * 3,
            "block_out_channels": [320, 640, 1280, 1280],
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 768,
            "layers_per_block": 2,
            "cross_attention_dim": 1024,
            "transformer_layers_per_block": 1,
            "num_attention_heads": [5, 10, 20, 20],
            "num_frames": 25,
        },
        vae={
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "layers_per_block": 2,
            "latent_channels": 4,
            "sample_size": 768,
            "scaling_factor": 0.18215,
            "force_upcast": True,
        },
        image_encoder={  # CLIP ViT-H/14
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "projection_dim": 1024,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "hidden_act": "gelu",
        },
        whisper={"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536},
        adapter_hidden=1024,
        audio_tokens=32,
    ),
    # The same classes at a few million parameters: trains and animates on two CPU cores.
    "mini": Preset(
        settings=Settings(
            num_frames=10,
            frame_step=1,
            resolution=128,
            shift_offset=3,
            num_inference_steps=12,
            guidance_scale_audio=3.0,
            decode_chunk_size=10,
            crop=0.5,
        ),
        # Where pictures of this size are decided; of 12 steps over SVD's range, half change nothing and the others are too long.
        scheduler=SCHEDULER | {"sigma_max": 40.0, "sigma_min": 0.05},
        unet={
            "sample_size": 16,
            "in_channels": 16,
            "out_channels": 8,
            # Attention at 8 x 8 and below: at 16 x 16 it would take two thirds of the time.
            "down_block_types": ["DownBlockSpatioTemporal"] + ["CrossAttnDownBlockSpatioTemporal"] * 2,
            "up_block_types": ["CrossAttnUpBlockSpatioTemporal"] * 2 + ["UpBlockSpatioTemporal"],
            # 64 at least: GroupNorm has 32 groups, and with one channel each it would norm the noise level away.
            "block_out_channels": [64, 64, 64],
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 96,
            "layers_per_block": 1,
            "cross_attention_dim": 64,
            "transformer_layers_per_block": 1,
            "num_attention_heads": [2, 2, 2],
            "num_frames": 10,
        },
        vae={
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": [64, 32, 32, 64],  # 64 at full size: one channel per group would lose colours
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "layers_per_block": 1,
            "latent_channels": 8,  # SVD has 4; 8 leave so small a VAE more room for what makes a face known
            "sample_size": 128,
            "scaling_factor": 0.18215,
            "force_upcast": True,
        },
        image_encoder={
            "hidden_size": 64,
            "intermediate_size": 128,
            "projection_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "hidden_act": "gelu",
        },
        whisper={"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 128},
        adapter_hidden=192,
        audio_tokens=8,
    ),
}


# Headings of --help, in its order.
MODEL, MOTION = "model", "motion"
SAMPLING = "guidance and sampling (default: the checkpoint's own)"
PICTURE = "picture (default: the checkpoint's own)"
SPEED = "speed and memory"
PAGE = "the web page (--gradio)"


@dataclass(frozen=True)
class SonicConfig(Checked):
    """Which model animates, and how. What is None comes from the checkpoint's own settings."""

    checkpoint: str = flag(
        SHIPPED,
        "folder with the trained weights, ours or the released unet.pth, audio2token.pth, audio2bucket.pth",
        group=MODEL,
    )
    base_model: str | None = flag(
        None, f"Stable Video Diffusion folder (default: the checkpoint's own, else {BASE_MODEL})"
    )
    whisper_path: str | None = flag(None, f"Whisper folder (default: the checkpoint's own, else {WHISPER})")
    audio_extractor: str | None = flag(
        None, "FILE.py:NAME of your own audio features, if the checkpoint was trained on them"
    )
    device: str = flag("auto", "auto, cpu, cuda or mps", DEVICE, group=SPEED)
    dtype: str = flag("auto", "auto (fp16 on cuda, else fp32), fp32, fp16 or bf16", DTYPE)
    compile: bool = flag(False, "torch.compile the UNet: minutes at the first clip, faster steps in all")
    key_memory: float = flag(
        KEY_MEMORY,
        "GB that keys and values of image and audio may take, made once per video; a video that needs more makes them at "
        "every step, with the same result",
        SCALE,
    )
    motion: str = flag(
        "moderate",
        "mild, moderate or intense: motion buckets times 1.0, 1.5 or 2.0",
        one_of(*MOTION_SCALES),
        group=MOTION,
    )
    dynamic_scale: float | None = flag(None, "motion buckets times this number, instead of --motion", SCALE)
    translation_bucket: float | None = flag(
        None, "head motion, 0 to 127 (default: predicted from portrait and speech)", BUCKET
    )
    expression_bucket: float | None = flag(
        None, "expression, 0 to 127 (default: predicted from portrait and speech)", BUCKET
    )
    guidance_scale_image: float | tuple[float, float] | None = flag(
        None,
        "image guidance (released weights: 2.0), or FIRST,LAST to go linearly over the steps",
        _GUIDANCE,
        group=SAMPLING,
    )
    guidance_scale_audio: float | tuple[float, float] | None = flag(
        None, "audio guidance (released weights: 7.5), or FIRST,LAST to go linearly over the steps", _GUIDANCE
    )
    shift_offset: int | None = flag(
        None, "frames that the windows move per denoising step; 0 turns shift fusion off", WHOLE
    )
    overlap: int | None = flag(None, "frames that neighbouring windows share", WHOLE)
    num_inference_steps: int | None = flag(None, "denoising steps", POSITIVE)
    solver: str | None = flag(None, "euler, or dpmpp_2m (DPM-Solver++(2M)); docs/inference.md compares them", _SOLVER)
    guidance_interval: tuple[float, float] | None = flag(
        None,
        "LOW,HIGH: guidance at these noise levels only, a third of the work at the others; approximate (default: at all)",
        _interval,
    )
    resolution: int | None = flag(
        None,
        "short side of the video in pixels, rounded to a multiple of 64",
        number(int, low=64),
        group=PICTURE,
    )
    frame_step: int | None = flag(None, "1 makes 25 frames per second, 2 makes 12.5", STEP)
    decode_chunk_size: int | None = flag(
        None,
        "frames that the VAE decodes at once (default: the model's; SVD 8; fewer where memory does not hold them)",
        POSITIVE,
        group=SPEED,
    )
    offload: str = flag(
        "none",
        "none; model: UNet, VAE and CLIP encoder are on the device in turn; sequential: layer by layer, slow",
        one_of("none", "model", "sequential"),
    )
    quantize: str = flag(
        "none",
        "none, or int8: the UNet's matrices with 8 bits, by torchao; changes the result a little",
        one_of("none", "int8"),
    )
    fps: str = flag(
        "native",
        "frames per second: native (25 / frame_step), 25 or 50; those in between by motion compensation",
        one_of("native", "25", "50"),
        group=PICTURE,
    )
    crop: float | str | None = flag(
        None, "cut a square around the face, grown by this share of it on each side (released: 0.5), or none", _crop
    )
    seed: int = flag(
        42,
        "the same seed on the same machine gives the same file",
        SEED,
        group=SAMPLING,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.compile and (self.offload != "none" or self.quantize != "none"):
            raise UserError(
                "compile goes with whole weights on the device: leave --offload and --quantize away, or --compile"
            )


_SOME = number(float, above=0)


@dataclass(frozen=True)
class PageConfig(Checked):
    """Who may use the web page, and for how much. What is None is wide, or strict with --share and without --auth."""

    auth: str | None = flag(
        None,
        "who may use the page: a file with lines USER:PASSWORD, or one such pair (which others on this machine can see)",
        group=PAGE,
        secret=True,
    )
    max_upload_mb: float | None = flag(
        None, "largest file that is taken, in MB (default: 200; 20 with --share and without --auth)", _SOME
    )
    max_audio_seconds: float | None = flag(
        None, "longest speech that is taken, in seconds (default: 600; 30 with --share and without --auth)", _SOME
    )
    max_image_megapixels: float | None = flag(
        None, "largest portrait that is taken, in megapixels (default: 50; 16 with --share and without --auth)", _SOME
    )
    max_waiting: int | None = flag(
        None,
        "jobs that may wait; who comes later is told so (default: 20; 8 with --share and without --auth)",
        POSITIVE,
    )
    max_batch: int | None = flag(None, "videos of one batch (default: 50; 4 with --share and without --auth)", POSITIVE)
    max_stored_gb: float | None = flag(
        None, "uploads and results kept on disk, in GB (default: 10; 2 with --share and without --auth)", _SOME
    )
    keep_hours: float | None = flag(
        None, "hours that they are kept (default: 24; 2 with --share and without --auth)", _SOME
    )


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
        _or_ramp(number(float)),
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
        if self.data_shards and (self.cache_latents or self.init_audio2token):
            raise UserError(
                "cache_latents and init_audio2token need all clips at the start: leave them away with --data_shards, or train "
                "on a folder"
            )
        if not (self.data_root or self.data_shards):
            raise UserError("data_root is missing: give the folder of your videos with --data_root")
