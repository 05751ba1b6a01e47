"""Animate portraits from speech.

    python sonic_demo.py --image examples/portrait.jpg --audio examples/audio.wav --output output.mp4     # the small model
    python sonic_demo.py --checkpoint checkpoints/Sonic --image portrait.jpg --audio speech.wav --output output.mp4
    python sonic_demo.py --image faces/ --audio voice.wav --output videos/        # a folder; several files or a CSV work too
    python sonic_demo.py --gradio --share                                         # the web page

Several images and several sounds go together one by one; a single one of either goes with all of the other. A CSV file has
the columns `image` and `audio` and, if wanted, `output`, its paths seen from the CSV's folder.
Exit codes: 0 all made; 1 some clips of a batch failed; 2 wrong flags or input; 130 interrupted.
"""

from __future__ import annotations

import csv
import dataclasses
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from sonic.config import PageConfig, SonicConfig, UserError
from sonic.flags import Parser, config_from, run

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
    parser = Parser(__doc__)
    parser.add_argument("--image", nargs="+", help="portrait: a file, several files, a folder, or a CSV")
    parser.add_argument("--audio", nargs="+", help="speech: a file, several files, or a folder")
    parser.add_argument("--output", help="the .mp4 to write; for several clips a folder")
    parser.add_argument(
        "--face_box", help="X0,Y0,X1,Y1 in pixels of the portrait, or 'full' (default: the largest face is found)"
    )
    parser.add_argument("--gradio", action="store_true", help="open the web page instead")
    parser.add_argument("--share", action="store_true", help="with --gradio: a public address")
    parser.add_config(SonicConfig)
    parser.add_config(PageConfig)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    flags = parse(arguments)
    config = config_from(SonicConfig, flags)
    if flags.gradio:
        from sonic.webui import serve  # a machine that only animates needs no gradio

        return serve(config, flags.share, config_from(PageConfig, flags))
    if flags.share:
        raise UserError("--share opens the web page to others: use it with --gradio")
    for field in dataclasses.fields(PageConfig):
        if getattr(flags, field.name) is not None:
            raise UserError(f"--{field.name} is for the web page: use it with --gradio")
    jobs, batch = plan(flags)

    # Late, so that wrong flags are answered at once.
    from sonic import media
    from sonic.pipeline import SonicPipeline
    from sonic.portrait import find_face, parse_face_box

    face_box = parse_face_box(flags.face_box)
    if not batch:  # a batch names what is wrong clip by clip; a single clip before the models are loaded
        image = media.load_image(jobs[0].image)
        media.load_audio(jobs[0].audio)
        face_box = face_box or find_face(image, str(jobs[0].image))
    pipeline = SonicPipeline(config)
    if not batch:
        print(pipeline.generate_video(jobs[0].image, jobs[0].audio, jobs[0].output, face_box=face_box))
        return 0

    failures = []
    for number, job in enumerate(jobs, start=1):
        print(f"[{number}/{len(jobs)}] {job.image} + {job.audio} -> {job.output}")
        try:
            pipeline.generate_video(job.image, job.audio, job.output, face_box=face_box)
        except Exception as error:  # whatever one clip runs into, the others go on; it is told and sets the exit code
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            failures.append(f"{job.image} + {job.audio}: {reason}")
            print(f"failed: {reason}", file=sys.stderr)
    print(f"{len(jobs) - len(failures)} of {len(jobs)} clips made in {flags.output}")
    for failure in failures:
        print(f"  failed: {failure}")
    return 1 if failures else 0


def plan(flags: Namespace) -> tuple[list[Job], bool]:
    """What is to be made, and whether it is a batch. Raises UserError for missing files and flags that do not fit together."""
    if not flags.image or not flags.output:
        raise UserError("give --image, --audio and --output (or --gradio for the web page)")
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
