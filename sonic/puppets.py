"""Puppets: drawn talking portraits whose truth is known, for measuring on a laptop what no real video can tell.

    python -m sonic.puppets --output DIR --clips 16 --seconds 4 --seed 0 --speech FOLDER

An `Identity` says how a puppet looks, a `Motion` what it does, `speech_to_mouth` is the law by which its mouth follows
speech, and `render_clip` draws it. The command writes MP4s with sound, and beside each its truth (`clip_truth`) and its
identity; `sonic/puppet_drawing.py` is the pencil. Axes: T frames (one per tick), H W pixels, n samples at 16 kHz.
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from sonic import flags
from sonic.config import SAMPLE_RATE, SAMPLES_PER_TICK, TICK_RATE, UserError
from sonic.media import save_video
from sonic.puppet_drawing import Puppet
from sonic.sound import load_audio
from sonic.sync import at_ticks, band_energy, band_level, speech_power

SPEECH_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".mp4")
USUALLY = 3 / 4  # of all moods are what the looks tell
MIN_SIZE = 64  # pixels; below that, eyes and lips are too small to be drawn, let alone found

# ---------------------------------------------------------------------------------------------------------------------
# Who: the look of a puppet. Colours are positions on ramps, so that every number between two looks is a look as well.


@dataclass(frozen=True)
class Identity:
    """How a puppet looks. Ramp positions, tints and shape numbers lie in 0 … 1, hues are turns; 0.5 is ordinary."""

    skin: float  # light to deep
    warmth: float
    face_width: float
    face_height: float
    jaw: float  # narrow to square
    chin: float  # round to long
    eye_size: float
    eye_spacing: float
    eye_tilt: float
    eye_colour: float
    brow_thickness: float
    brow_arch: float
    nose_length: float
    nose_width: float
    mouth_width: float
    lip_thickness: float
    lip_tint: float
    hair: float  # black to blond to silver
    hair_volume: float
    hair_curl: float
    hair_length: float  # above the ears to the shoulders
    hair_fringe: float  # bare forehead to low fringe
    hair_parting: float  # left to right
    shoulders: float
    neckline: float  # round to deep V
    clothes_hue: float
    clothes_saturation: float
    clothes_lightness: float
    background_hue: float
    background_lightness: float
    background_slope: float  # how much the gradient changes lightness
    background_angle: float  # turns

    @classmethod
    def random(cls, rng: np.random.Generator) -> "Identity":
        """A harmonious draw from `rng` (numpy Generator): features near the ordinary, colours that go together."""
        look = {field.name: float(np.clip(rng.normal(0.5, 0.2), 0, 1)) for field in dataclasses.fields(cls)}
        for name in (
            "skin",
            "warmth",
            "eye_colour",
            "lip_tint",
            "hair_volume",
            "hair_curl",
            "hair_length",
            "hair_fringe",
            "hair_parting",
            "background_lightness",
        ):
            look[name] = float(rng.uniform())
        look["hair"] = float(rng.uniform() * (1 - 0.65 * look["skin"]))  # deep skin seldom goes with light hair
        look["eye_colour"] *= 1 - 0.8 * look["skin"]
        look["clothes_hue"], look["background_angle"] = float(rng.uniform()), float(rng.uniform())
        # The wall's hue is a neighbour of the clothes' hue or lies opposite to it: both look chosen.
        look["background_hue"] = float((look["clothes_hue"] + rng.choice([0.08, 0.5, -0.08]) + rng.normal(0, 0.03)) % 1)
        look["clothes_lightness"] = float(rng.uniform())
        return cls(**look)

    @property
    def temper(self) -> float:
        """How lively its head is, 0 … 1. In life, a look tells something of it; here, the lively stand before light walls."""
        return self.background_lightness

    @property
    def expressiveness(self) -> float:
        """How lively its face is, 0 … 1: the expressive wear light clothes."""
        return self.clothes_lightness


# ---------------------------------------------------------------------------------------------------------------------
# What it does: one pose per frame.


@dataclass
class Pose:
    """One frame's pose; the defaults are a neutral face with closed mouth that looks at the viewer."""

    opening: float = 0.0  # mouth, 0 closed … 1 wide open; a little more is drawn as well
    width: float = 0.0  # mouth, -1 rounded … 1 spread
    smile: float = 0.0  # corners of the mouth, -1 down … 1 up
    x: float = 0.0  # head translation, pictures
    y: float = 0.0
    rotation: float = 0.0  # in-plane, degrees, clockwise as seen
    scale: float = 1.0  # towards the camera
    brow: float = 0.0  # -1 lowered … 1 raised
    blink: float = 0.0  # 0 open … 1 closed
    gaze_x: float = 0.0  # -1 … 1
    gaze_y: float = 0.0


class Motion:
    """A pose per frame: one float32 array [T] per field of `Pose`, under the same name; `motion[i]` is a `Pose`."""

    def __init__(self, num_frames, **curves):
        for field in dataclasses.fields(Pose):
            curve = curves.pop(field.name, field.default)
            setattr(self, field.name, np.broadcast_to(np.float32(curve), (num_frames,)).copy())
        if curves:
            raise ValueError(f"a pose has no {', '.join(curves)}")
        self.num_frames = num_frames

    def __len__(self):
        return self.num_frames

    def __getitem__(self, index):
        return Pose(**{name: float(curve[index]) for name, curve in self.curves().items()})

    def curves(self):
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Pose)}


def speech_to_mouth(speech: np.ndarray, num_ticks: int, fps: float = TICK_RATE) -> tuple[np.ndarray, np.ndarray]:
    """The law of the mouth: speech (float32 mono [n], 16 kHz) to (opening [T] in 0 … 1, width [T] in -1 … 1).

    Opening: mean level of the octaves from 125 to 4000 Hz on a decibel scale, 0 at 27 dB under the clip's speech level
    (the 95th percentile) and 1 three dB above it (`sync.speech_energy`). Width: tilt, that is the level of 1200-4000 Hz
    over that of 100-1000 Hz, from rounded (10 dB under the clip's usual tilt, /u/) to spread (10 dB above it, /i/); it
    fades to 0 as the mouth closes.
    Tick i is centred on sample (i + 0.5) 16000 / fps; all smoothing is symmetric, so there is no delay.
    """
    power = speech_power(speech, num_ticks, fps)
    opening = band_energy(power)
    tilt = band_level(power, 1200, 4000) - band_level(power, 100, 1000)
    # Microphones differ in tilt, so it is measured from the clip's own middle, as far as that is a voice's: a clip that
    # is all /u/ stays rounded.
    voiced = opening > 0.3
    usual = np.clip(np.median(tilt[voiced]), -22, -4) if voiced.any() else -13
    width = np.clip((tilt - usual) / 10, -1, 1) * np.minimum(opening * 4, 1)
    return at_ticks(opening, num_ticks, fps), at_ticks(width, num_ticks, fps)


def articulation(expression_amplitude: float | np.ndarray) -> float | np.ndarray:
    """How far a mouth goes along the law: 0.55 of it for a puppet without expression, all of it at amplitude 1, 1.2 at 2,
    1.7 at most."""
    return np.minimum(0.55 + 0.45 * np.sqrt(expression_amplitude), 1.7)


def random_motion(
    num_ticks: int,
    rng: np.random.Generator,
    head_amplitude: float = 1.0,
    expression_amplitude: float | np.ndarray = 1.0,
    fps: float = TICK_RATE,
) -> Motion:
    """A `Motion` of smooth random head movement, brows, smile, gaze and blinks, with the mouth closed.

    `head_amplitude` scales translation, rotation and distance; `expression_amplitude` (one, or [T]) scales brows, smile and
    gaze, which level off at -1 and 1, and how often the eyes blink (and, by `articulation`, the mouth that is drawn later).
    Each has its own stream of `rng`: changing one leaves the other's path as it is.
    """
    seconds = np.arange(num_ticks) / fps
    expression_amplitude = np.broadcast_to(expression_amplitude, (num_ticks,))
    head_rng, face_rng, blink_rng = rng.spawn(3)

    def wander(rng, low, high):  # a sum of slow waves, about 1 at its largest
        hertz, phase, weight = rng.uniform(low, high, 4), rng.uniform(0, 2 * np.pi, 4), rng.uniform(0.5, 1, 4)
        return (weight[:, None] * np.sin(2 * np.pi * hertz[:, None] * seconds + phase[:, None])).sum(0) / weight.sum()

    head = {
        "x": 0.03 * wander(head_rng, 0.4, 2.4),
        "y": 0.022 * wander(head_rng, 0.4, 2.6),
        "rotation": 5.0 * wander(head_rng, 0.3, 1.8),
        "scale": 0.03 * wander(head_rng, 0.1, 0.6),
    }
    head = {name: head_amplitude * curve for name, curve in head.items()}
    head["scale"] = 1 + head["scale"]
    face = {
        "brow": 1.3 * wander(face_rng, 0.5, 3.0),
        "smile": 0.8 * wander(face_rng, 0.5, 2.5),
        "gaze_x": 0.7 * wander(face_rng, 0.1, 0.8),
        "gaze_y": 0.4 * wander(face_rng, 0.1, 0.8),
    }
    face = {name: np.tanh(expression_amplitude * curve) for name, curve in face.items()}

    blink = np.zeros(num_ticks)
    start = blink_rng.uniform(0.3, 2.5)
    while start < num_ticks / fps:
        if blink_rng.uniform() < expression_amplitude[int(start * fps)]:
            blink = np.maximum(blink, np.clip(1.6 - np.abs(seconds - start) / 0.08, 0, 1))  # shut for 0.1 s
        start += blink_rng.uniform(1.2, 4.0)
    return Motion(num_ticks, **head, **face, blink=blink)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, and the truth about them.


@lru_cache(maxsize=8)
def _puppet(identity: Identity, size: int) -> Puppet:
    if size < MIN_SIZE:
        raise UserError(f"A puppet needs a size of at least {MIN_SIZE} pixels, not {size}.")
    return Puppet(identity, size)


def draw(identity: Identity, pose: Pose, size: int) -> np.ndarray:
    """One frame: uint8 RGB [size, size, 3]. Fast from the second frame on: the last few puppets are remembered."""
    return _puppet(identity, size).draw(pose)


def render_clip(identity: Identity, motion: Motion, size: int) -> np.ndarray:
    """All frames of a motion: uint8 RGB [T, size, size, 3]."""
    puppet = _puppet(identity, size)
    return np.stack([puppet.draw(motion[i]) for i in range(len(motion))])


def clip_truth(identity: Identity, motion: Motion, size: int) -> dict[str, np.ndarray]:
    """What was drawn, float32: every curve of the motion [T], and in pixels `face_box` [T, 4] and `mouth` [T, 4, 2].

    Face box: left, top, right, bottom of the face from the brows to the chin (of the closed mouth, so that it moves with
    the head alone). Mouth: left corner, right corner, middle of the upper and of the lower lip's inner edge.
    """
    puppet = _puppet(identity, size)
    places = [puppet.truth(motion[i]) for i in range(len(motion))]
    return motion.curves() | {name: np.stack([place[name] for place in places]) for name in places[0]}


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def find_speech(folder: Path) -> list[Path]:
    """The recordings in a folder and below, sorted; UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: --speech needs a folder of recordings.")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SPEECH_SUFFIXES)
    if not found:
        raise UserError(
            f"There is no recording ({', '.join(SPEECH_SUFFIXES)}) in {folder}: --speech needs at least one."
        )
    return found


def choose_excerpt(speech: np.ndarray, num_samples: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """A stretch [num_samples] of a recording and its first sample, with speech in it; a short recording is padded."""
    if len(speech) < num_samples:
        before = int(rng.integers(num_samples - len(speech) + 1))
        return np.pad(speech, (before, num_samples - len(speech) - before)), -before
    ticks = speech[: len(speech) // SAMPLES_PER_TICK * SAMPLES_PER_TICK].reshape(-1, SAMPLES_PER_TICK)
    power = np.square(ticks).mean(axis=1)
    loud = power > 0.03 * np.percentile(power, 95)  # within 15 dB of its speech level
    best, best_share = 0, -1.0
    for start in rng.integers(len(speech) - num_samples + 1, size=8):
        share = loud[start // SAMPLES_PER_TICK : (start + num_samples) // SAMPLES_PER_TICK].mean()
        if share > best_share:
            best, best_share = int(start), share
        if share >= 0.6:
            break
    return speech[best : best + num_samples], best


def between(amplitudes: tuple[float, ...], position: float | np.ndarray) -> float | np.ndarray:
    """The amplitude at a position 0 … 1 of a range (or a single one), even in its square root: calm ones are more frequent."""
    low, high = np.sqrt(min(amplitudes)), np.sqrt(max(amplitudes))
    return (low + position * (high - low)) ** 2


def moods(num_frames: int, fps: float, rng: np.random.Generator, usual: float) -> np.ndarray:
    """How lively a face is, 0 … 1, [T]: for 0.8 to 2.4 s as it usually is, three times of four, or as any other's; 0.3 s lie
    between two moods. Numbers like `usual`, even in 0 … 1, become rather the ends of the range than its middle."""
    curve, at = np.zeros(num_frames), 0.0
    seconds = np.arange(num_frames) / fps
    while at < num_frames / fps:
        mood = usual if rng.uniform() < USUALLY else rng.uniform()
        curve[seconds >= at] = np.clip(2 * mood - 0.5, 0, 1)
        at += rng.uniform(0.8, 2.4)
    width = max(1, round(0.3 * fps))
    padded = np.pad(curve, width, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="same")[width:-width]


@dataclass
class Liveliness:
    """How much a puppet's head moves (one number) and its face ([T], it changes with the mood)."""

    head: float
    expression: np.ndarray

    @classmethod
    def of(cls, identity: Identity, head_amplitudes, expression_amplitudes, chance: float, mood: np.ndarray):
        """Out of ranges of one number or two. Between two, the head is 85 % temper and 15 % chance (0 … 1), so that there is
        something for `audio2bucket` to see in a portrait, and the face what the mood (`moods`, [T]) makes of its
        expressiveness: every face is calm or lively at some time, or a motion bucket would teach nothing.
        """
        head = between(head_amplitudes, 0.85 * identity.temper + 0.15 * chance)
        return cls(head, between(expression_amplitudes, mood))

    def motion(self, speech: np.ndarray, rng: np.random.Generator, fps: float = TICK_RATE) -> Motion:
        """Random motion with these amplitudes, and a mouth that follows speech [n] as far as they let it."""
        num_ticks = len(self.expression)
        motion = random_motion(num_ticks, rng, self.head, self.expression, fps)
        loudness = articulation(self.expression)
        motion.opening, motion.width = (loudness * curve for curve in speech_to_mouth(speech, num_ticks, fps))
        return motion


def make_clip(recording: Path, seconds, rng, size, fps, head_amplitudes, expression_amplitudes):
    """Frames, sound, truth and a description of one clip: a random identity that says a random part of a recording.

    Amplitudes are given as one number or two, see `Liveliness`.
    """
    chance = rng.uniform()
    identity_rng, speech_rng, motion_rng, mood_rng = rng.spawn(4)
    num_frames = max(1, round(seconds * fps))
    speech, start = choose_excerpt(load_audio(recording), round(num_frames / fps * SAMPLE_RATE), speech_rng)
    identity = Identity.random(identity_rng)
    mood = moods(num_frames, fps, mood_rng, identity.expressiveness)
    lively = Liveliness.of(identity, head_amplitudes, expression_amplitudes, chance, mood)
    motion = lively.motion(speech, motion_rng, fps)
    description = {
        "identity": dataclasses.asdict(identity),
        "speech": recording.name,
        "speech_start": round(start / SAMPLE_RATE, 4),
        "size": size,
        "fps": fps,
        "head_amplitude": lively.head,
        "expression_amplitude": float(np.mean(lively.expression)),
    }
    return render_clip(identity, motion, size), speech, clip_truth(identity, motion, size), description


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = flags.Parser("Draw talking puppets: MP4s with sound, and beside each its truth and its identity.")
    files, clips = parser.group("input and output"), parser.group("the clips")
    files.add_argument("--output", type=Path, required=True, help="folder for name.mp4, name.truth.npz and name.json")
    files.add_argument("--speech", type=Path, required=True, help="folder of recordings to be spoken")
    clips.add_argument("--clips", type=int, default=16, help="how many (default: %(default)s)")
    clips.add_argument("--seconds", type=float, default=4.0, help="length of each (default: %(default)s)")
    clips.add_argument("--seed", type=int, default=0, help="same seed, same files (default: %(default)s)")
    clips.add_argument("--size", type=int, default=256, help="side of the picture in pixels (default: %(default)s)")
    clips.add_argument("--fps", type=float, default=float(TICK_RATE), help="frames per second (default: %(default)s)")
    amplitude = {"type": float, "nargs": "+", "default": [1.0], "metavar": "A"}
    clips.add_argument(
        "--head_amplitude",
        help="head movement; two numbers: between them, by temper (light walls) and chance",
        **amplitude,
    )
    clips.add_argument(
        "--expression_amplitude",
        help="brows, smile, gaze, blinks, the mouth along the law; two numbers: by mood and expressiveness (light clothes)",
        **amplitude,
    )
    args = parser.parse_args(arguments)
    for name in ("clips", "seconds", "fps"):
        if not 0 < getattr(args, name) < np.inf:
            raise UserError(f"--{name} must be a number above 0, not {getattr(args, name)}.")
    if args.seed < 0:
        raise UserError(f"--seed must be 0 or more, not {args.seed}.")
    if args.size < MIN_SIZE:
        raise UserError(f"--size must be at least {MIN_SIZE} pixels, not {args.size}.")
    for name in ("head_amplitude", "expression_amplitude"):
        values = getattr(args, name)
        if len(values) > 2 or not all(0 <= value < np.inf for value in values):
            raise UserError(f"--{name} must be one or two numbers of 0 or more, not {' '.join(map(str, values))}.")
    return args


def write_clips(args: argparse.Namespace) -> None:
    """Writes puppet_0000.mp4, .truth.npz and .json, and so on; UserError before the first of them."""
    recordings = find_speech(args.speech)
    unreadable = []
    for recording in recordings:  # all of them before the first picture: a broken file stops nothing half way
        try:
            load_audio(recording)
        except UserError:
            unreadable.append(str(recording))
    if unreadable:
        raise UserError(f"These recordings cannot be read, repair them or take them away: {', '.join(unreadable)}.")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{args.output} cannot be made a folder ({error.strerror}): choose another --output."
        ) from error
    order = np.random.default_rng(args.seed).permutation(len(recordings))  # each has its turn before one comes again
    for index in range(args.clips):
        rng = np.random.default_rng([args.seed, index])  # clip 7 is the same, however many are made
        recording = recordings[order[index % len(order)]]
        frames, speech, truth, about = make_clip(
            recording, args.seconds, rng, args.size, args.fps, args.head_amplitude, args.expression_amplitude
        )
        name = f"puppet_{index:04d}"
        save_video(frames, args.output / f"{name}.mp4", args.fps, audio=speech)
        np.savez_compressed(args.output / f"{name}.truth.npz", **truth)
        (args.output / f"{name}.json").write_text(json.dumps(about | {"seed": args.seed}, indent=1) + "\n")
        print(f"{args.output / name}.mp4  {recording.name} at {about['speech_start']:.2f} s")


def main(arguments: list[str] | None = None) -> None:
    write_clips(parse_arguments(arguments))


if __name__ == "__main__":
    flags.run(main)
