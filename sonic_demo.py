"""Animate portraits from speech.

    python sonic_demo.py --image examples/portrait.jpg --audio examples/audio.wav --output output.mp4     # the small model
    python sonic_demo.py --checkpoint checkpoints/Sonic --image portrait.jpg --audio speech.wav --output output.mp4
    python sonic_demo.py --image faces/ --audio voice.wav --output videos/        # a folder; several files or a CSV work too
    python sonic_demo.py --gradio --share                                         # the web page
    accelerate launch --num_processes 4 sonic_demo.py --image ... --audio ... --output ...       # several GPUs make one video
    python sonic_demo.py --config output.mp4 --image other.jpg --audio speech.wav --output again.mp4   # its settings
    python sonic_demo.py --doctor                                                 # is all there that this needs?

Several images and several sounds go together one by one; a single one of either goes with all of the other. A CSV file has
the columns `image` and `audio` and, if wanted, `output`, its paths seen from the CSV's folder. Several processes share the
windows of a single video, and the videos of a batch.

--json prints one JSON object: of a clip `output`, `frames`, `fps`, `seconds`, `seed`, `settings`, `timings` (seconds), of a
batch `clips` and `failures`, of --doctor `ok` and `checks`; where it ends early, `error`.

Exit codes: 0 all made; 1 some clips of a batch failed, or --doctor found what is broken; 2 wrong flags or input; 130 Ctrl-C;
143 SIGTERM.
"""

from __future__ import annotations

if __name__ == "__main__":
    from sonic.stopping import leave_quietly

    leave_quietly()  # the imports below take seconds

import csv
import dataclasses
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sonic.config import MODEL, MOTION, PICTURE, SAMPLING, SPEED, PageConfig, SonicConfig, UserError
from sonic.flags import Parser, config_from, json_result, run

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
SOUNDS = (".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".mp4", ".mov", ".mkv", ".webm")


@dataclass(frozen=True)
class Job:
    """One clip to make."""

    image: Path
    audio: Path
    output: Path


def parse(arguments: list[str] | None = None) -> Namespace:
    """The command line; the fields of SonicConfig are checked again when it is made of them."""
    parser = Parser(__doc__, read_other=settings_of_video)
    files = parser.group("input and output")
    files.add_argument("--image", nargs="+", metavar="PATH", help="portrait: a file, several files, a folder, or a CSV")
    files.add_argument("--audio", nargs="+", metavar="PATH", help="speech: a file, several files, or a folder")
    files.add_argument("--output", metavar="PATH", help="the .mp4 to write; for several clips a folder")
    files.add_argument(
        "--face_box",
        metavar="BOX",
        help="X0,Y0,X1,Y1 in pixels of the portrait, or 'full' (default: the largest face is found)",
    )
    files.add_argument(
        "--resume", action="store_true", help="go on with a long video whose making was interrupted (OUTPUT.partial/)"
    )
    files.add_argument("--json", action="store_true", help="print one JSON object as the result, all else to stderr")
    for title in (MODEL, MOTION, SAMPLING, PICTURE, SPEED):
        parser.group(title)
    page = parser.group("instead of animating")
    page.add_argument("--gradio", action="store_true", help="open the web page")
    page.add_argument("--share", action="store_true", help="with --gradio: a public address")
    page.add_argument(
        "--doctor", action="store_true", help="check packages, weights, device, codecs, and animate five frames"
    )
    parser.add_config(SonicConfig)
    parser.add_config(PageConfig)
    return parser.parse_args(arguments)


def settings_of_video(path: Path) -> str | None:
    """For --config: the settings that an MP4 holds, as JSON; None for what is no MP4."""
    if path.suffix.lower() != ".mp4":
        return None
    from sonic.record import read_record

    return json.dumps(read_record(path)["settings"])


def main(arguments: list[str] | None = None) -> int:
    flags = parse(arguments)
    config = config_from(SonicConfig, flags)
    if flags.share and not flags.gradio:
        raise UserError("--share opens the web page to others: use it with --gradio")
    if flags.gradio:
        if flags.json:
            raise UserError("--json is the result of a clip: leave it away with --gradio, whose page has an API")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("--gradio is served by one process: start it without accelerate launch")
        from sonic.webui import serve  # a machine that only animates needs no gradio

        return serve(config, flags.share, config_from(PageConfig, flags))
    for field in dataclasses.fields(PageConfig):
        if getattr(flags, field.name) is not None:
            raise UserError(f"--{field.name} is for the web page: use it with --gradio")
    main_process = int(os.environ.get("RANK", 0)) == 0  # of those that accelerate started
    with json_result(flags.json, prints=main_process) as result:
        if flags.doctor:
            from sonic.doctor import examine

            return examine(config, result)
        return animate(config, flags, result)


def animate(config: SonicConfig, flags: Namespace, result: dict) -> int:
    """Makes what the flags ask for, and fills the result that --json prints. Gives the exit code."""
    jobs, batch = plan(flags)

    # Late, so that wrong flags are answered at once.
    from sonic import pictures, sound
    from sonic.pipeline import SonicPipeline
    from sonic.portrait import find_face, parse_face_box
    from sonic.processes import Processes

    face_box = parse_face_box(flags.face_box)
    if not batch:  # a batch names what is wrong clip by clip; a single clip before the models are loaded
        image = pictures.load_image(jobs[0].image)
        sound.load_audio(jobs[0].audio)
        if not face_box:
            find_face(image, str(jobs[0].image))
    processes = Processes.started(config.device)
    started = time.perf_counter()
    pipeline = SonicPipeline(config, processes=processes.alone() if batch else processes)
    load = time.perf_counter() - started
    if processes.main:
        warn_of_another_model(flags.config, pipeline.model)

    def make(job: Job, say: Callable[[str], None]) -> dict:
        started = time.perf_counter()
        pipeline.generate_video(job.image, job.audio, job.output, face_box=face_box, resume=flags.resume, say=say)
        return {"load": load, "animate": time.perf_counter() - started}

    if not batch:
        timings = make(jobs[0], print if processes.main else lambda sentence: None)
        if processes.main:
            result.update(describe(jobs[0].output) | {"timings": timings})
            print(result["output"])
        return 0

    clips, failures = result["clips"], result["failures"] = [], []  # what is there if it is interrupted
    for number, job in processes.share(list(enumerate(jobs, start=1))):
        print(f"[{number}/{len(jobs)}] {job.image} + {job.audio} -> {job.output}")
        try:
            timings = make(job, print)
            clips.append(describe(job.output) | {"timings": timings})
        except Exception as error:  # whatever one clip runs into, the others go on; it is told and sets the exit code
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            failures.append({"image": job.image, "audio": job.audio, "error": reason})
            print(f"failed: {reason}", file=sys.stderr)
    result["clips"], result["failures"] = processes.collect(clips), processes.collect(failures)
    if processes.main:
        print(f"{len(result['clips'])} of {len(jobs)} clips made in {flags.output}")
        for failure in result["failures"]:
            print(f"  failed: {failure['image']} + {failure['audio']}: {failure['error']}")
    return 1 if result["failures"] else 0


def describe(path: Path) -> dict:
    """What --json says of a finished video: its own record, and what is in the file."""
    from sonic.media import VideoReader
    from sonic.record import read_record

    record = read_record(path)
    with VideoReader(path) as reader:
        fps, seconds = reader.info.fps, reader.info.duration
    return {
        "output": str(path),
        "frames": round(seconds * fps),
        "fps": fps,
        "seconds": seconds,
        "seed": record["settings"]["seed"],
        "settings": record["settings"],
        "model": record["model"],
    }


def warn_of_another_model(config: str | None, model: dict) -> None:
    """A video's settings are not its model, which --checkpoint names: whoever expects the same video is told."""
    if config is None or Path(config).suffix.lower() != ".mp4":
        return
    from sonic.record import read_record

    before = read_record(config)["model"]
    if before != model:
        print(
            f"note: '{config}' was made with {before['name']} ({before['hash']}), this is {model['name']} "
            f"({model['hash']}): the same settings give another video; choose the model with --checkpoint",
            file=sys.stderr,
        )


def plan(flags: Namespace) -> tuple[list[Job], bool]:
    """What is to be made, and whether it is a batch. Raises UserError for missing files and flags that do not fit together."""
    if not flags.image or not flags.output:
        raise UserError("give --image, --audio and --output (or --gradio for the web page, --doctor for a check)")
    if len(flags.image) == 1 and Path(flags.image[0]).suffix.lower() == ".csv":
        return _from_csv(Path(flags.image[0]), flags), True
    if not flags.audio:
        raise UserError("--audio is missing: give the speech")
    images, audios = _files(flags.image, IMAGES, "image"), _files(flags.audio, SOUNDS, "audio")
    output = Path(flags.output)
    batch = (
        len(flags.image) > 1 or len(flags.audio) > 1 or any(Path(given).is_dir() for given in flags.image + flags.audio)
    )
    if not batch:
        if output.is_dir():
            output = output / f"{images[0].stem}_{audios[0].stem}.mp4"
        elif output.suffix.lower() != ".mp4":
            raise UserError(f"--output '{output}' must end in .mp4")
        return [Job(images[0], audios[0], output)], False
    if 1 not in (len(images), len(audios)) and len(images) != len(audios):
        raise UserError(
            f"{len(images)} images and {len(audios)} sounds do not pair: give equal numbers, or one of either"
        )
    count = max(len(images), len(audios))
    pairs = zip(images * (count // len(images)), audios * (count // len(audios)), strict=True)
    return _named([(image, audio, None) for image, audio in pairs], output), True


def _files(given: list[str], suffixes: tuple[str, ...], what: str) -> list[Path]:
    """The files meant: each one named, whether it exists or not, and those of a folder with such an ending."""
    files = []
    for path in map(Path, given):
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes)
            if not inside:
                raise UserError(f"folder '{path}' holds no {what} files ({', '.join(suffixes)})")
            files += inside
        else:
            files.append(path)
    return files


def _from_csv(path: Path, flags: Namespace) -> list[Job]:
    if flags.audio:
        raise UserError(f"'{path}' names the sounds itself, leave --audio away")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read '{path}' as CSV: {error}") from None
    if not rows or not {"image", "audio"} <= set(rows[0]):
        raise UserError(f"'{path}' needs a first line with the columns image and audio, and lines below it")
    for line, row in enumerate(rows, start=2):
        if not row["image"] or not row["audio"]:
            raise UserError(f"'{path}' line {line} has no image or no audio")
    folder = path.parent
    triples = [(folder / row["image"], folder / row["audio"], row.get("output")) for row in rows]
    return _named(triples, Path(flags.output))


def _named(triples: list[tuple[Path, Path, str | None]], folder: Path) -> list[Job]:
    """Jobs whose outputs lie in a folder, each under a name of its own."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output '{folder}' is a file, a batch needs a folder")
    jobs, taken = [], set()
    for image, audio, name in triples:
        stem = name.removesuffix(".mp4") if name else f"{image.stem}_{audio.stem}"
        if Path(stem).name != stem:
            raise UserError(f"output '{name}' must be a name, not a path: the folder is --output")
        unique, number = stem, 1
        while unique in taken:
            number += 1
            unique = f"{stem}_{number}"
        taken.add(unique)
        jobs.append(Job(image, audio, folder / f"{unique}.mp4"))
    return jobs


if __name__ == "__main__":
    run(main)
