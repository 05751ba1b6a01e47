"""The proof: what a checkpoint of sonic-mini does on faces and voices that it never met, held against the drawn truth.

    python benchmarks/trials.py outputs/mini/seed-0
    python benchmarks/lab.py --speech outputs/mini/seed-0/speech/unseen --runs outputs/trials/seed-* --trials outputs/trials/*

animates and measures, and writes docs/lab.md with its plots (`lab_claims.py`, `lab_report.py`). Every experiment's numbers lie in
docs/lab/, in a folder named by the weights and settings, and are not made again: an interrupted call goes on; the document can be
written without the runs. Another checkpoint begins anew, with a document of its own in outputs/. Axes: T frames.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, without an install

import numpy as np
import torch
from build_mini import EXPRESSION_AMPLITUDES, HEAD_AMPLITUDES, SIZE
from lab_claims import BUCKETS, OVERLAP, ROOM
from lab_report import write_report
from PIL import Image
from tqdm import tqdm

from sonic import pipeline, unet
from sonic.audio import LONG_BEFORE, SHORT_BEFORE, SHORT_LENGTH
from sonic.checkpoints import INDEX, open_checkpoint, training_checkpoints
from sonic.config import SAMPLE_RATE, SHIPPED, TICK_RATE, Settings, SonicConfig
from sonic.dataset import pixels
from sonic.flags import run
from sonic.metrics import Evaluation, follow, measure, portrait_face
from sonic.motion import motion_buckets
from sonic.pipeline import SonicPipeline
from sonic.portrait import prepare_portrait
from sonic.puppets import (
    Identity,
    Liveliness,
    Motion,
    Pose,
    choose_excerpt,
    clip_truth,
    draw,
    find_speech,
    make_clip,
    moods,
    render_clip,
    speech_to_mouth,
)
from sonic.run_log import read_log
from sonic.sound import load_audio
from sonic.training import encode_frames
from sonic.weights import ROOT

CLIPS, SECONDS = 24, 4.0
LONG_CLIPS, LONG_SECONDS = 2, 30.0
SILENCE = (1.4, 2.8)  # seconds without speech, in the clips that ask for it
PORTRAIT_SIZE = 256
SEED = 9000  # of faces and excerpts; training clips have others
GUIDANCE = (0.0, 1.0, 4.0, 10.0)  # and the model's own
SWEEP_CLIPS = 12  # for what is compared over many settings
CURVE_CLIPS = 6  # for every checkpoint of every run
DTYPE = "bf16"  # on CPUs that know it, two thirds of the time; the pictures differ by less than the VAE's own error
USUAL = {"translation": 16, "expression": 48}  # buckets in the middle of what puppets do
# What is kept of the first experiment's clips only.
MAIN_ALONE = ("truth", "truth_through_vae", "opening", "truth_opening")
NO_CONTRAST = {"expression_contrast": 0, "expression_floor": 0}
NO_SCALE = {"dynamic_scale": 1.0}  # buckets as predicted or given, not 1.5 times that


@dataclass(frozen=True)
class Experiment:
    """Settings of one measurement over several clips."""

    name: str
    overrides: dict  # of `SonicPipeline.generate`
    clips: int = CLIPS
    seconds: float = SECONDS
    silence: bool = False
    without: str | None = None  # a part that is switched off, see WITHOUT
    checkpoint: str | None = None  # another one than the one that is measured
    buckets_only: bool = False  # nothing is animated; what audio2bucket says is held against the clips' buckets
    curves: bool = False  # keeps every frame's mouth opening, too


# ---------------------------------------------------------------------------------------------------------- clips


class Clip:
    """One face that nobody has seen, one voice that nobody has heard, and the truth about them."""

    def __init__(self, index: int, seconds: float, speech_folder: Path, silence: bool = False):
        rng = np.random.default_rng([SEED, index])
        recordings = find_speech(speech_folder)
        kinds = ("espeak", "recorded")  # in turns, and of each kind the speakers in turns
        own = [path for path in recordings if path.name.startswith(kinds[index % 2])]
        speakers = sorted({path.stem.rpartition("-")[0] if index % 2 else path.stem for path in own})
        speaker = speakers[(index // 2 * 7) % len(speakers)]
        said = [load_audio(path) for path in own if path.stem.startswith(speaker)]
        self.speech, _ = choose_excerpt(_at_least(said, rng, seconds), round(seconds * SAMPLE_RATE), rng)
        if silence:
            begin, end = (round(second * SAMPLE_RATE) for second in SILENCE)
            self.speech = self.speech.copy()
            self.speech[begin:end] = 0
        self.speaker, self.kind = speaker, ("synthetic", "recorded")[index % 2]
        self.identity = Identity.random(rng)
        self.count = round(seconds * TICK_RATE)
        self.opening, self.width = speech_to_mouth(self.speech, self.count)
        self.portrait = draw(self.identity, Pose(), PORTRAIT_SIZE)
        self.motion_rng = rng

    def pictures(self, resolution: int, crop: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The truth's frames [T, R, R, 3], a portrait [R, R, 3] and where the background is, bool [R, R], all cut as the
        pipeline cuts the portrait."""
        lively = Liveliness.of(  # as what the model was trained on
            self.identity,
            HEAD_AMPLITUDES,
            EXPRESSION_AMPLITUDES,
            chance=self.motion_rng.uniform(),
            mood=moods(self.count, TICK_RATE, self.motion_rng, self.identity.expressiveness),
        )
        motion = lively.motion(self.speech, self.motion_rng)
        portrait = self._cut(self.portrait, resolution, crop)
        still = render_clip(self.identity, Motion(2, x=[-0.12, 0.12]), PORTRAIT_SIZE).astype(int)
        wall = (abs(still[0] - still[1]).max(-1) == 0) & (abs(still[0] - self.portrait).max(-1) == 0)
        wall[round(clip_truth(self.identity, Motion(1), PORTRAIT_SIZE)["face_box"][0][3]) :] = False  # shoulders
        wall = self._cut(np.repeat(wall[..., None], 3, -1).astype(np.uint8) * 255, resolution, crop)[..., 0] > 250
        truth = render_clip(self.identity, motion, PORTRAIT_SIZE)
        return np.stack([self._cut(frame, resolution, crop) for frame in truth]), portrait, wall

    @cached_property
    def _box(self) -> tuple:
        return prepare_portrait(Image.fromarray(self.portrait), 64).face_box

    def _cut(self, picture: np.ndarray, resolution: int, crop: float) -> np.ndarray:
        pixels = prepare_portrait(Image.fromarray(picture), resolution, self._box, crop).pixels
        return ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def _at_least(recordings: list[np.ndarray], rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Recordings of one speaker in a random order, joined until they are long enough."""
    joined = np.zeros(0, np.float32)
    for index in rng.permutation(len(recordings)):
        joined = np.concatenate([joined, recordings[index]])
        if len(joined) >= seconds * SAMPLE_RATE:
            return joined
    return np.tile(joined, int(np.ceil(seconds * SAMPLE_RATE / len(joined))))


# ------------------------------------------------------------------------------------------------ parts switched off


@contextmanager
def without_temporal_audio():
    """Temporal blocks hear nothing: their audio attention is multiplied by 0, the image's value stays."""
    stock = unet.Conditions.temporal

    def deaf(self) -> unet.Context:
        return replace(stock(self), gate=torch.zeros(1, 1, 1))

    unet.Conditions.temporal = deaf
    try:
        yield
    finally:
        unet.Conditions.temporal = stock


@contextmanager
def without_long_context():
    """The bucket predictor hears the 0.2 s that audio2token hears, instead of 1 s."""
    stock = pipeline.long_windows

    def short(features: torch.Tensor, ticks: torch.Tensor) -> torch.Tensor:
        windows = stock(features, ticks).clone()
        first = LONG_BEFORE - SHORT_BEFORE
        windows[:, :first] = 0
        windows[:, first + SHORT_LENGTH :] = 0
        return windows

    pipeline.long_windows = short
    try:
        yield
    finally:
        pipeline.long_windows = stock


WITHOUT: dict[str | None, Callable] = {
    None: nullcontext,
    "temporal audio attention": without_temporal_audio,
    "long context": without_long_context,
}


# ------------------------------------------------------------------------------------------------------ measuring


@lru_cache(maxsize=2)
def load_pipeline(checkpoint: str) -> SonicPipeline:
    torch.set_num_threads(1)  # the clips are shared out over processes
    return SonicPipeline(SonicConfig(checkpoint=checkpoint, device="cpu", dtype=DTYPE))


def animate(experiment: Experiment, index: int, checkpoint: str, speech_folder: Path) -> dict:
    """One clip of an experiment: what was measured, as JSON holds it."""
    animator = load_pipeline(experiment.checkpoint or checkpoint)
    settings = animator.settings
    clip = Clip(index, experiment.seconds, speech_folder, experiment.silence)
    truth, portrait, wall = clip.pictures(settings.resolution, settings.crop)
    begin = time.perf_counter()
    with WITHOUT[experiment.without]():
        features = animator.extract_audio_features(clip.speech)
        image = Image.fromarray(clip.portrait)
        made = animator.generate(image, features, seed=index, **{**NO_SCALE, **experiment.overrides})
    seconds = time.perf_counter() - begin
    face = portrait_face(portrait)
    common = {"portrait": face, "window": settings.num_frames}
    curves = {"opening": clip.opening, "width": clip.width}
    found = measure(made.frames, clip.speech, made.fps, truth_curves=curves, **common)
    wall_error = np.square(made.frames[:, wall].astype(float) - portrait[wall]).mean()
    numbers = {
        "clip": index,
        "kind": clip.kind,
        "speaker": clip.speaker,
        "seconds_to_make": seconds,
        **as_numbers(found),
        "background_psnr": 10 * np.log10(255**2 / max(wall_error, 1e-9)),
    }
    if experiment.curves:
        numbers |= {"opening": found.opening, "truth_opening": clip.opening}
    if experiment.name == "main" or experiment.silence:
        numbers["truth"] = as_numbers(measure(truth, clip.speech, made.fps, truth_curves=curves, **common))
    if experiment.name == "main":
        encoded = through_vae(animator, truth)
        numbers["truth_through_vae"] = as_numbers(
            measure(encoded, clip.speech, made.fps, truth_curves=curves, **common)
        )
    return plain(numbers)


@torch.no_grad()
def through_vae(animator: SonicPipeline, frames: np.ndarray) -> np.ndarray:
    """Frames uint8 [T, R, R, 3] encoded and decoded again: the most that a model in these latents can show."""
    base = animator.animator.base
    latents = encode_frames(base, pixels(frames)) * base.vae.config.scaling_factor
    return np.concatenate(list(animator.animator.decode(latents, animator.settings.decode_chunk_size)))


@torch.no_grad()
def predict_buckets(experiment: Experiment, index: int, checkpoint: str, speech_folder: Path) -> dict:
    """True and predicted motion buckets of the windows of a clip that is drawn as training clips are."""
    model = load_pipeline(checkpoint)
    base, frames_of_window = model.animator.base, model.settings.num_frames
    clip = Clip(index, experiment.seconds, speech_folder)
    recordings = find_speech(speech_folder)
    recording = recordings[index * 7 % len(recordings)]
    frames, speech, _, _ = make_clip(
        recording, experiment.seconds, clip.motion_rng, SIZE, TICK_RATE, HEAD_AMPLITUDES, EXPRESSION_AMPLITUDES
    )
    landmarks, _ = follow(frames)
    features = model.extract_audio_features(speech).features
    portrait = prepare_portrait(
        Image.fromarray(frames[0]),
        model.settings.resolution,
        crop=experiment.overrides.get("crop", model.settings.crop),
        clip_size=base.image_encoder.config.image_size,
    )
    seen = base.embeddings(portrait.clip_pixels[None])
    unscaled = replace(model.config, **NO_SCALE)
    true, predicted = [], []
    for first in range(0, len(frames) - frames_of_window + 1, frames_of_window):
        ticks = torch.arange(first, first + frames_of_window)
        predicted.append(model.motion_buckets(features, ticks, seen, unscaled)[1].mean(0).tolist())
        true.append(motion_buckets(landmarks[first : first + frames_of_window]))
    return plain({"clip": index, "true": np.array(true), "predicted": np.array(predicted)})


def as_numbers(found: Evaluation) -> dict:
    opening, width = found.opening_by_truth, found.width_by_truth
    return {
        "face_share": found.face_share,
        "opening_r": opening.r,
        "opening_offset": opening.offset,
        "opening_confidence": opening.confidence,
        "width_r": width.r,
        "silent_opening": found.silent_opening,
        "silent_frames": int(found.silent.sum()),
        "portrait_opening": found.portrait_opening,
        "wide_opening": found.wide_opening,
        "translation": found.motion.translation_spread,
        "expression": found.motion.expression_spread,
        "window_translation": found.window_motion and found.window_motion.translation_bucket,
        "window_expression": found.window_motion and found.window_motion.expression_bucket,
        "identity": found.identity.distance,
        "identity_first": found.identity.first,
        "identity_last": found.identity.last,
        "seam": found.seams and found.seams.ratio,
        "seam_largest": found.seams and found.seams.largest,
        "seam_near": found.seams and found.seams.near_ratio,
        "seam_near_largest": found.seams and found.seams.near_largest,
    }


def plain(value):
    """Arrays and NaN as JSON knows them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 5) if np.isfinite(value) else None
    return value


def experiments(settings: Settings, runs: list[Path], trials: list[Path]) -> list[Experiment]:
    """All of them for a model of these settings, the most telling first."""
    low, high = BUCKETS
    plan = [
        Experiment("main", {}, curves=True),
        Experiment("predicted buckets", {}, clips=2 * CLIPS, buckets_only=True),
        Experiment("predicted buckets with room", {"crop": ROOM}, clips=2 * CLIPS, buckets_only=True),
    ]
    plan += [Experiment("silence", {}, clips=SWEEP_CLIPS, silence=True)]
    for side, other in (("translation", "expression"), ("expression", "translation")):
        for bucket in (low, high):
            held = {f"{side}_bucket": bucket, f"{other}_bucket": USUAL[other]}
            plan.append(Experiment(f"{side} bucket {bucket}", held))
    plan += [
        Experiment(f"audio guidance {scale:g}", {"guidance_scale_audio": scale}, clips=SWEEP_CLIPS)
        for scale in sorted({*GUIDANCE, settings.guidance_scale_audio})
    ]
    plan += [Experiment(f"without {part}", {}, clips=SWEEP_CLIPS, without=part) for part in WITHOUT if part]
    plan.append(Experiment("without shift fusion", {"shift_offset": 0}, clips=SWEEP_CLIPS))
    if settings.expression_contrast:
        plan += [
            replace(one, name=f"uncontrasted {one.name}", overrides=one.overrides | NO_CONTRAST, clips=CURVE_CLIPS)
            for one in plan
            if one.name.startswith("expression bucket")
        ]
    long = {"clips": LONG_CLIPS, "seconds": LONG_SECONDS, "curves": True}
    plan += [Experiment("long", {}, **long), Experiment("long without shift fusion", {"shift_offset": 0}, **long)]
    plan.append(Experiment("long with overlap", {"overlap": OVERLAP}, **long))
    for folder in runs:
        plan += [
            Experiment(f"run {run_name(folder)} {path.name}", {}, clips=CURVE_CLIPS, checkpoint=str(path))
            for path in training_checkpoints(folder)
        ]
    for folder in trials:
        if folder.name.startswith("lips"):
            last = str(training_checkpoints(folder)[-1])
            plan.append(Experiment(f"trial {folder.name}", {}, clips=SWEEP_CLIPS, checkpoint=last))
    return plan


def is_main(experiment: Experiment, settings: Settings) -> bool:
    """Whether an experiment animates as the first one does, clip for clip: its overrides are what the model does anyway."""
    plain_one = Experiment(experiment.name, experiment.overrides, experiment.clips)
    usual = all(getattr(settings, name, None) == value for name, value in experiment.overrides.items())
    return experiment.name != "main" and usual and experiment == plain_one


def fingerprint(checkpoint: Path) -> str:
    """What tells two models apart: weights, and the settings that they are used with."""
    digest = hashlib.sha256()
    for path in sorted([*checkpoint.rglob("*.safetensors"), *checkpoint.rglob(INDEX)]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def run_name(folder: Path) -> str:
    """A trial's own name, or that of the build whose training it is."""
    return folder.parent.name if folder.name == "training" else folder.name


def validations(folder: Path) -> list[dict]:
    """The lines of a run's log that hold a validation."""
    return [plain(row) for row in read_log(folder / "log.jsonl") if "validation_loss" in row]


def numbers_file(work: Path, name: str) -> Path:
    return work / f"{name.replace(' ', '-')}.json"


def save_numbers(work: Path, name: str, rows: list[dict]) -> None:
    """One line per clip, so that a change of one shows as such."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    numbers_file(work, name).write_text(f'{{"name": {json.dumps(name)}, "rows": [\n{lines}\n]}}\n')


def read_numbers(work: Path) -> dict[str, list[dict]]:
    """Every experiment's rows, by its name."""
    found = [json.loads(path.read_text()) for path in work.glob("*.json")]
    return {one["name"]: one["rows"] for one in found}


def default_report(checkpoint: Path) -> Path:
    """docs/lab.md is about what is shipped, and nothing else."""
    return ROOT / ("docs/lab.md" if checkpoint == ROOT / SHIPPED else f"outputs/lab-{checkpoint.name}.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speech", type=Path, required=True, help="folder of unseen voices (scripts/make_speech.py)")
    parser.add_argument(
        "--checkpoint", type=Path, default=ROOT / SHIPPED, help="what is measured (default: sonic-mini)"
    )
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="training runs, for quality against steps")
    parser.add_argument("--trials", type=Path, nargs="*", default=[], help="run folders of benchmarks/trials.py")
    parser.add_argument(
        "--report",
        type=Path,
        help="document to write, with numbers and plots in a folder of its name beside it (default: docs/lab.md for "
        "sonic-mini, outputs/lab-NAME.md for another checkpoint)",
    )
    parser.add_argument("--processes", type=int, default=2, help="clips at once, each on one thread")
    parser.add_argument("--only", nargs="*", help="experiments whose name begins so; the report takes what is there")
    flags = parser.parse_args()
    report = flags.report or default_report(flags.checkpoint.resolve())
    work = report.with_suffix("") / fingerprint(flags.checkpoint)
    work.mkdir(parents=True, exist_ok=True)
    runs = [folder.resolve() for folder in flags.runs]
    trials = sorted(folder.resolve() for folder in flags.trials if training_checkpoints(folder))
    settings = open_checkpoint(flags.checkpoint).settings
    plan = experiments(settings, runs, trials)
    checkpoint, speech = str(flags.checkpoint.resolve()), flags.speech.resolve()
    with ProcessPoolExecutor(flags.processes) as pool:
        for experiment in plan:
            if flags.only and not any(experiment.name.startswith(name) for name in flags.only):
                continue
            if numbers_file(work, experiment.name).is_file():
                continue
            main_rows = read_numbers(work).get("main", [])
            if is_main(experiment, settings) and len(main_rows) >= experiment.clips:
                rows = [
                    {name: row[name] for name in row if name not in MAIN_ALONE} for row in main_rows[: experiment.clips]
                ]
            else:
                work_on = predict_buckets if experiment.buckets_only else animate
                jobs = [
                    pool.submit(work_on, experiment, index, checkpoint, speech) for index in range(experiment.clips)
                ]
                rows = [job.result() for job in tqdm(jobs, desc=experiment.name, disable=None)]
            save_numbers(work, experiment.name, rows)
            rs = [row["opening_r"] for row in rows if row.get("opening_r") is not None]
            print(
                f"{experiment.name}: {len(rows)} clips" + (f", median r {np.median(rs):.3f}" if rs else ""), flush=True
            )
    for folder in runs:
        save_numbers(work, f"log of run {run_name(folder)}", validations(folder))
    for folder in trials:
        save_numbers(work, f"log of trial {folder.name}", validations(folder))
    write_report(read_numbers(work), flags.checkpoint, DTYPE, report)


if __name__ == "__main__":
    run(main)
