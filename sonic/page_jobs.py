"""The jobs of the web page: what a visitor orders, checked; the thread that makes it; how far it is; how long it will take."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from sonic import sampling
from sonic.animator import Progress
from sonic.config import SAMPLE_RATE, TICK_RATE, Settings, SonicConfig, UserError
from sonic.interpolation import factor_for
from sonic.page_limits import Limits
from sonic.page_text import ENGLISH, say
from sonic.pipeline import SonicPipeline
from sonic.portrait import FULL, fitted_size

TOLD_EVERY, SHOWN_EVERY = 0.25, 1.0  # seconds between two looks at a running job, and between two previews
POSTER_SIDE, PORTRAIT_SIDE = 256, 1024  # pixels
MEASURED_PARAMETERS = 50e6  # of a model so small that a trial of it on a CPU takes a second
VIDEO, SETTINGS, PORTRAIT, POSTER = "sonic.mp4", "sonic.json", "portrait.jpg", "poster.jpg"  # in a result's folder

# What a visitor may set, under the names of SonicConfig: everything else, as checkpoints and paths, is not taken from a page.
CHOICES = {
    "motion": "motion",
    "seed": "seed",
    "translation_bucket": "translation",
    "expression_bucket": "expression",
    "guidance_scale_image": "guidance_image",
    "guidance_scale_audio": "guidance_audio",
    "num_inference_steps": "steps",
    "shift_offset": "shift",
    "resolution": "resolution",
    "fps": "frame_rate",
}
NEEDED, WORDS = ("motion", "seed"), ("motion", "fps")
BY_HAND = ("translation_bucket", "expression_bucket")  # predicted where empty


class Refusal(UserError):
    """What a visitor is told, by the key of a text."""

    def __init__(self, key: str, **values):
        super().__init__(say(key, ENGLISH, **values))
        self.key, self.values = key, values


class Cancelled(Exception):
    """Raised within the pipeline when nobody waits for its video any more."""


def checked(chosen: dict, limits: Limits) -> dict:
    """A visitor's choices as overrides of a pipeline's settings; None is left out. UserError: out of range, over the limits."""
    fields = {field.name: field for field in dataclasses.fields(SonicConfig)}
    most = {"num_inference_steps": limits.max_steps, "resolution": limits.max_resolution, "shift_offset": 10_000}
    most |= {"guidance_scale_image": 100, "guidance_scale_audio": 100}
    taken = {}
    for name, value in chosen.items():
        if (value is None and name not in NEEDED) or (value == "" and name in BY_HAND):
            continue
        label = "motion" if name == "motion" else f"the {say(CHOICES[name]).split(' (')[0].split(',')[0].lower()}"
        if isinstance(value, bool | list | dict) or (isinstance(value, str) and name not in (*BY_HAND, *WORDS)):
            raise UserError(f"{label} must be a number")
        try:
            taken[name] = fields[name].metadata["check"](value)
        except ValueError as error:
            raise UserError(f"{label} {error}") from None
        if name in most and taken[name] > most[name]:
            raise UserError(f"{label} must be at most {most[name]} here, not {taken[name]}")
    return taken


@dataclass
class Order:
    """A video that somebody wants: RGB portrait, speech [n] at 16 kHz, face box in its pixels or "full", checked choices."""

    portrait: Image.Image
    speech: np.ndarray
    face_box: str | tuple[float, float, float, float]
    choices: dict = field(default_factory=dict)


@dataclass
class Made:
    """A finished video, in a folder of its own: files VIDEO, SETTINGS, PORTRAIT, POSTER."""

    folder: Path
    frames: int
    fps: float
    width: int
    height: int
    seed: int
    took: float  # seconds

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


class Job:
    """One order on its way. Others read `stage`, `progress`, `made` and `error`, and may `cancel`."""

    def __init__(self, order: Order):
        self.order = order
        self.stage = "waiting"  # then listening, denoising, decoding, writing
        self.progress: Progress | None = None
        self.picture: np.ndarray | None = None  # uint8 [h, w, 3], how it looks by now
        self.made: Made | None = None
        self.error: Exception | None = None
        self.finished = threading.Event()
        self._cancelled = threading.Event()
        self._first = self._shown = 0.0

    def cancel(self) -> None:
        """The job ends at its next step."""
        self._cancelled.set()

    def check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled

    def on_progress(self, progress: Progress) -> None:
        """The pipeline tells here how far it is; what this raises ends it."""
        self.check()
        self.stage, self.progress = progress.stage, progress
        self._first = self._first or time.monotonic()
        if progress.preview is not None and time.monotonic() - self._shown > SHOWN_EVERY:
            picture = progress.preview()
            if picture is not None:
                self.picture = picture
            self._shown = time.monotonic()

    @property
    def seconds_left(self) -> float | None:
        """Until the video is there: what the pipeline says, else as the steps until now went."""
        progress = self.progress
        if progress is None or progress.seconds_left is not None:
            return progress and progress.seconds_left
        if progress.stage != "denoising" or progress.done < 2:
            return None
        return (time.monotonic() - self._first) / (progress.done - 1) * (progress.total - progress.done)

    @property
    def share(self) -> float:
        """How much is done, 0 to 1; denoising counts for nearly all of it."""
        if self.made:
            return 1.0
        before, of_all = {"denoising": (0.02, 0.86), "decoding": (0.88, 0.1), "writing": (0.98, 0.0)}.get(
            self.stage, (0, 0)
        )
        done = self.progress.done / max(1, self.progress.total) if self.progress else 0
        return before + of_all * min(1.0, done)


class Workshop:
    """The pipeline and who may use it when: one job at a time, each in a thread of its own, so that a page can look on."""

    def __init__(self, pipeline: SonicPipeline, new_folder: Callable[[], Path]):
        self.pipeline, self.pace = pipeline, Pace()
        self._new_folder, self._bench, self._closed = new_folder, threading.Lock(), False
        self._jobs: set[Job] = set()

    def start(self, order: Order) -> Job:
        """Begins an order as soon as the pipeline is free."""
        job = Job(order)
        self._jobs.add(job)
        threading.Thread(target=self._work, args=(job,), name="sonic-job", daemon=True).start()
        return job

    def close(self) -> None:
        """Ends all jobs and a trial, and returns when the pipeline is free: a thread within torch would abort the process."""
        self._closed = True
        for job in list(self._jobs):
            job.cancel()
        for job in list(self._jobs):
            job.finished.wait(60)
        if self._bench.acquire(timeout=60):
            self._bench.release()

    def _work(self, job: Job) -> None:
        try:
            with self._bench:
                job.check()
                job.made = self._make(job)
        except Exception as error:  # whatever it is, it is told to the visitor, or logged, by who follows the job
            job.error = error
        finally:
            job.order = None  # the pictures of a job that is history are in nobody's way
            self._jobs.discard(job)
            job.finished.set()

    def _make(self, job: Job) -> Made:
        order, started = job.order, time.monotonic()
        job.stage = "listening"
        features = self.pipeline.extract_audio_features(order.speech)
        job.check()
        clock = Clock(job.on_progress)
        video = self.pipeline.generate(
            order.portrait, features, face_box=order.face_box, on_progress=clock, **order.choices
        )
        job.stage, job.progress = "writing", None
        settings = video.record["settings"]  # what the video carries too; `sonic_demo.py --config` takes either
        height, width = video.frames.shape[1:3]
        self.pace.learn(clock, len(video), width * height)
        folder = self._new_folder()
        self.pipeline.save_video(video, folder / VIDEO)
        made = Made(folder, len(video), video.fps, width, height, settings["seed"], time.monotonic() - started)
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
        order.portrait.thumbnail((PORTRAIT_SIDE, PORTRAIT_SIDE))
        order.portrait.save(folder / PORTRAIT, quality=90)
        poster = Image.fromarray(video.frames[len(video) // 2])
        poster.thumbnail((POSTER_SIDE, POSTER_SIDE))
        poster.save(folder / POSTER, quality=90)
        return made

    def estimate(
        self, seconds: float, choices: dict, size: tuple[int, int] | None = None
    ) -> tuple[int, float, float | None]:
        """Of so much speech: frames, their rate, and the seconds that a video of them takes here, None if not known yet."""
        settings = dataclasses.replace(
            self.pipeline.settings,
            **{k: v for k, v in choices.items() if k in {f.name for f in dataclasses.fields(Settings)}},
        )
        frames, fps = int(seconds * TICK_RATE) // settings.frame_step, TICK_RATE / settings.frame_step
        width, height = fitted_size(*(size or (1, 1)), settings.resolution)
        windows = len(sampling.windows(max(1, frames), settings.num_frames, settings.overlap, 0))
        factor = factor_for(choices.get("fps", self.pipeline.config.fps), fps)
        took = self.pace.seconds(windows * settings.num_inference_steps, frames * factor, width * height)
        return frames * factor, fps * factor, took

    def measure_pace(self) -> None:
        """A short trial, so that the first visitor is told a time; models that would take long at it learn from that visitor."""
        model = self.pipeline.animator.denoiser
        small = sum(parameter.numel() for parameter in model.parameters()) < MEASURED_PARAMETERS
        if self.pipeline.device.type == "cpu" and not small:
            return
        settings = self.pipeline.settings
        silence = np.zeros(int(settings.num_frames * settings.frame_step / TICK_RATE * SAMPLE_RATE), np.float32)
        with self._bench, contextlib.suppress(Cancelled):
            features, clock = self.pipeline.extract_audio_features(silence), Clock(lambda progress: self._check_open())
            picture, steps = Image.new("RGB", (256, 256), "gray"), 3  # the first one warms up
            video = self.pipeline.generate(
                picture, features, face_box=FULL, on_progress=clock, num_inference_steps=steps
            )
            self.pace.learn(clock, len(video), video.frames.shape[1] * video.frames.shape[2])

    def _check_open(self) -> None:
        if self._closed:
            raise Cancelled


class Clock:
    """Passes progress on, and notes when the UNet's calls came back."""

    def __init__(self, then: Callable[[Progress], None] = lambda progress: None):
        self._then, self.calls = then, []

    def __call__(self, progress: Progress) -> None:
        if progress.stage == "denoising":
            self.calls.append(time.monotonic())
        self._then(progress)


class Pace:
    """How fast this machine makes videos, learnt from those it made: seconds per pixel of a UNet call and of a frame."""

    def __init__(self):
        self._call: float | None = None
        self._frame = 0.0

    def learn(self, clock: Clock, frames: int, pixels: int) -> None:
        """Takes over what a finished video took; the last one counts, for machines warm up."""
        now, calls = time.monotonic(), clock.calls
        if len(calls) > 1:
            self._call = (calls[-1] - calls[0]) / (len(calls) - 1) / pixels
            self._frame = (now - calls[-1]) / frames / pixels

    def seconds(self, calls: int, frames: int, pixels: int) -> float | None:
        """What a video of so many UNet calls and frames of so many pixels will take; None before the first one."""
        return None if self._call is None else (calls * self._call + frames * self._frame) * pixels


def follow(job: Job) -> Iterator[Job]:
    """Looks at a job every quarter of a second until it ends. Who stops looking, as a closed browser does, cancels it."""
    try:
        while not job.finished.wait(TOLD_EVERY):
            yield job
    finally:
        job.cancel()


def log_incident(error: Exception) -> str:
    """Writes the traceback of what nobody expected to the terminal, and gives the number it stands under there."""
    number = secrets.token_hex(3)
    print(f"incident {number} on the page:", file=sys.stderr)
    traceback.print_exception(error)
    return number
