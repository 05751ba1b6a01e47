"""Settings, and nothing that computes: constants of the method, a model's own settings, what animates and what the page allows."""

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

# GB: little beside what the smallest model takes with torch, so that a long video takes hardly more than a short one. Five seconds
# of the real model's in fp16 fit; making them again is 0.1 % of its work (docs/inference.md).
KEY_MEMORY = 0.2

DEVICE = one_of("auto", "cpu", "cuda", "mps")
DTYPE = one_of("auto", "fp32", "fp16", "bf16")
WHOLE, POSITIVE = number(int, low=0), number(int, low=1)
SEED = number(int, low=0, high=2**53 - 1)  # what torch takes and a web page can hold
STEP, SIDE = number(int, low=1, high=5), number(int, low=64, high=8192)
SCALE, BUCKET = number(float, low=0), number(float, low=0, high=127)


def or_ramp(check: Callable) -> Callable:
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


_GUIDANCE = or_ramp(SCALE)
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
    translation_contrast: float = flag(
        0.0, "how far a translation bucket set by hand is guided away from its opposite", SCALE
    )
    expression_contrast: float = flag(0.0, "the same for the expression bucket", SCALE)
    expression_floor: float = flag(0.0, "the least expression bucket set by hand that the UNet is asked for", BUCKET)
    solver: str = flag("euler", "euler or dpmpp_2m", _SOLVER)
    guidance_interval: tuple[float, float] | None = flag(None, "noise levels with guidance; None: all", _interval)
    decode_chunk_size: int = flag(8, "frames that the VAE decodes at once", POSITIVE)
    crop: float | None = flag(None, "margin of the square cut around the face; None takes the whole picture", SCALE)


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
    translation_contrast: float | None = flag(
        None,
        "guides away from the opposite of a translation bucket set by hand: 0 not (released), 1 from the predicted one, 2 from "
        "its mirror image beyond that; needs an image guidance above 1",
        SCALE,
    )
    expression_contrast: float | None = flag(None, "the same for the expression bucket", SCALE)
    expression_floor: float | None = flag(
        None,
        "the least expression bucket set by hand that the UNet is asked for (released: 0); below it, expression_contrast alone "
        "calms a face",
        BUCKET,
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
