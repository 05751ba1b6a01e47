"""Is all there that animating needs? One line per check: `python sonic_demo.py --doctor`.

It must work where something is missing, so it imports nothing above the standard library before the check that is about it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from sonic.config import BASE_MODEL, DOWNLOADS, RELEASED, SAMPLES_PER_TICK, SHIPPED, WHISPER, SonicConfig, UserError

ROOT = Path(__file__).resolve().parent.parent
INSTALL = "pip install -r requirements.txt"
# What is imported under another name than it is installed under.
MODULES = {"opencv-python-headless": "cv2", "pillow": "PIL", "dlib-bin": "dlib", "PyYAML": "yaml"}
NOT_IMPORTED = ("face_recognition_models",)  # only its files are used
# Animating does without these; each with what needs it.
OPTIONAL = {
    "accelerate": "training",
    "librosa": "tests, and audio features such as those in docs/api.md",
    "peft": "--train_modules lora",
    "psutil": "the memory estimate of training",
    "wandb": "--report_to wandb",
    "tensorboard": "--report_to tensorboard",
    "gradio": "the web page",
    "matplotlib": "the plots of python -m sonic.evaluation",
    "PyYAML": "--config",
    "pytest": "tests",
    "ruff": "tests",
}
LANDMARKS = "shape_predictor_68_face_landmarks.dat"
LEAST_MEMORY, LEAST_DISK = 1.5, 0.5  # GB: sonic-mini with all libraries takes 1.3 at most; a few videos
# Of the self-test: denoising steps and frames. A laptop is to have it done in five seconds.
TEST_STEPS, TEST_TICKS = 2, 5
OK, MISSING, BROKEN = "ok", "missing", "broken"
COLOURS = {OK: "32", MISSING: "33", BROKEN: "31"}


@dataclass(frozen=True)
class Check:
    """What was found: `state` is ok, missing or broken; `needed` says whether animating fails without it."""

    name: str
    state: str
    detail: str
    help: str = ""
    needed: bool = True


def examine(config: SonicConfig, result: dict) -> int:
    """Prints each check as it is made and fills the result of --json. The exit code: 0 if the demo can run, else 1."""
    checks = []
    for check in every_check(config):
        print(line(check), flush=True)
        checks.append(check)
    bad = [check.name for check in checks if check.needed and check.state != OK]
    print(f"the demo cannot run: {', '.join(bad)}" if bad else "the demo can run")
    result.update({"ok": not bad, "checks": [asdict(check) for check in checks]})
    return 1 if bad else 0


def line(check: Check) -> str:
    """A check as a line of the report; in colour on a terminal that has not said NO_COLOR."""
    state = f"{check.state:8}"
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        state = f"\033[{COLOURS[check.state]}m{state}\033[0m"
    return f"{state}{check.name}: {check.detail}" + (f" -> {check.help}" if check.help else "")


def every_check(config: SonicConfig) -> Iterator[Check]:
    """All checks, each made when it is asked for; none raises."""
    yield python()
    yield from packages()
    yield guarded("faces", dlib_models, INSTALL)
    yield from codecs()
    yield guarded("device", lambda: device(config), INSTALL)
    yield memory()
    yield disk()
    yield from weights()
    yield guarded(f"model {config.checkpoint}", lambda: model(config), "see the lines above")
    yield guarded("self-test", self_test, "see the lines above")


def guarded(name: str, check: Callable[[], Check], advice: str) -> Check:
    """A check that may meet anything: what is missing or broken inside it is its answer."""
    try:
        return check()
    except ImportError as error:
        return Check(name, MISSING, first_line(error), advice)
    except UserError as error:
        return Check(name, BROKEN, first_line(error))
    except Exception as error:  # a doctor reports what it finds, whatever kind of failure that is
        return Check(name, BROKEN, f"{type(error).__name__}: {first_line(error)}", advice)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# ------------------------------------------------------------------------------------------------------ what is installed


def python() -> Check:
    """The interpreter."""
    found = platform.python_version()
    known = (3, 10) <= sys.version_info[:2] <= (3, 12)
    return Check("Python", OK if known else BROKEN, found, "" if known else "use Python 3.10, 3.11 or 3.12")


def requirements(text: str) -> dict[str, str]:
    """Package and version of each line `name==version; python_version >= "3.11"` that is for this Python."""
    wanted = {}
    for name, pinned, sign, limit in re.findall(
        r'^([\w-]+)==([\w.]+)(?:; python_version (>=|<) "3\.(\d+)")?', text, re.MULTILINE
    ):
        newer = not sign or sys.version_info[1] >= int(limit)
        if newer == (sign != "<"):
            wanted[name] = pinned
    return wanted


def packages() -> Iterator[Check]:
    """What is missing or does not import, one line each, and one line for all that is as it should be."""
    file = ROOT / "requirements.txt"
    if not file.is_file():
        yield Check("packages", MISSING, "requirements.txt", "get the whole repository again")
        return
    wanted, fine, other = requirements(file.read_text()), [], []
    for name, pinned in wanted.items():
        needed, use = name not in OPTIONAL, f" (for {OPTIONAL[name]})" if name in OPTIONAL else ""
        module = MODULES.get(name, name)
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Check(name, MISSING, f"{pinned} is not installed{use}", f"pip install {name}=={pinned}", needed)
            continue
        try:
            if needed and name not in NOT_IMPORTED:
                importlib.import_module(module)
            elif find_spec(module) is None:
                raise ModuleNotFoundError(f"No module named '{module}'")
        except Exception as error:  # a broken wheel raises what it likes: OSError, AttributeError, SystemError
            again = f"pip install --force-reinstall --no-deps {name}=={pinned}"
            yield Check(name, BROKEN, f"{found} does not import: {first_line(error)}{use}", again, needed)
            continue
        fine.append(name)
        if found.partition("+")[0] != pinned:  # 2.13.0+cpu is 2.13.0
            other.append(f"{name} {found} instead of {pinned}")
    detail = f"{len(fine)} of {len(wanted)} are there"
    yield Check("packages", OK, detail + (f"; not the tested version: {', '.join(other)}" if other else ""))


def dlib_models() -> Check:
    """The files that find landmarks and know faces."""
    import numpy as np

    from sonic.faces import detect_faces

    spec = find_spec("face_recognition_models")
    if spec is None:
        raise ModuleNotFoundError("face_recognition_models is not installed")
    files = sorted(Path(spec.submodule_search_locations[0], "models").glob("*.dat"))
    if LANDMARKS not in [file.name for file in files]:
        return Check("faces", MISSING, LANDMARKS, "pip install --force-reinstall face_recognition_models")
    from PIL import Image

    found = detect_faces(np.array(Image.open(ROOT / "examples/portrait.jpg").convert("RGB")))
    if not found:
        return Check("faces", BROKEN, "dlib finds no face in examples/portrait.jpg", "get the examples again")
    return Check("faces", OK, f"dlib with {len(files)} models finds the face in examples/portrait.jpg")


def codecs() -> Iterator[Check]:
    """The encoders that an MP4 needs. PyAV brings them; an FFmpeg of the system is not used."""
    for name, what in (("libx264", "H.264"), ("aac", "AAC")):

        def check(name: str = name, what: str = what) -> Check:
            import av

            av.codec.Codec(name, "w")
            return Check(what, OK, f"PyAV's {name} encoder (no FFmpeg of the system is needed)")

        yield guarded(what, check, "pip install --force-reinstall av")


# --------------------------------------------------------------------------------------------------------- the machine


def device(config: SonicConfig) -> Check:
    """What --device means here."""
    import torch

    from sonic.pipeline import pick_device, pick_dtype

    chosen = pick_device(config.device)
    dtype = str(pick_dtype(config.dtype, chosen)).removeprefix("torch.")
    if chosen.type != "cuda":
        return Check("device", OK, f"{chosen.type}, {dtype}, {os.cpu_count()} cores")
    free, total = (size / 1e9 for size in torch.cuda.mem_get_info())
    return Check("device", OK, f"{torch.cuda.get_device_name()}, {dtype}, {free:.1f} of {total:.1f} GB free")


def memory() -> Check:
    """Of the machine, not of its GPU."""
    try:
        page = os.sysconf("SC_PAGE_SIZE") / 1e9
        total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
        with contextlib.suppress(OSError):  # Linux: what caches hold can be had as well
            kilobytes = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
            free = int(kilobytes[1]) * 1024 / 1e9 if kilobytes else free
    except (ValueError, OSError, AttributeError):
        return Check("memory", OK, "this system does not tell", needed=False)
    enough = free >= LEAST_MEMORY
    detail = f"{free:.1f} of {total:.1f} GB free"
    return Check("memory", OK if enough else BROKEN, detail, "" if enough else "close other programs", needed=False)


def disk() -> Check:
    """Where you are, and where temporary files go."""
    places = {str(Path.cwd()): "here", tempfile.gettempdir(): tempfile.gettempdir()}
    free = {name: shutil.disk_usage(place).free / 1e9 for place, name in places.items()}
    enough = min(free.values()) >= LEAST_DISK
    detail = ", ".join(f"{size:.1f} GB free {name}" for name, size in free.items())
    return Check("disk", OK if enough else BROKEN, detail, "" if enough else "delete something", needed=False)


# ----------------------------------------------------------------------------------------------------------- the weights


def weights() -> Iterator[Check]:
    """The four folders of checkpoints/README.md. Animating needs those that --checkpoint names; that is a check of its own."""
    parts = ("unet", "audio2token", "audio2bucket")
    mini = ["sonic.json", *(f"{part}.safetensors" for part in parts)]
    mini += ["base/vae/config.json", "base/image_encoder/config.json", "whisper/config.json"]
    base = ["scheduler/scheduler_config.json"]
    base += [f"{part}/config.json" for part in ("unet", "vae", "image_encoder")]
    wanted = {
        SHIPPED: mini,
        BASE_MODEL: base,
        WHISPER: ["config.json"],
        RELEASED: [f"{part}.pth" for part in parts],
    }
    for folder, files in wanted.items():
        place = next((path for path in (Path(folder), ROOT / folder) if path.is_dir()), None)
        gone = [name for name in files if place is None or not (place / name).is_file()]
        command = "git checkout checkpoints/sonic-mini" if folder == SHIPPED else DOWNLOADS[folder]
        name = Path(folder).name
        if gone:
            yield Check(name, MISSING, folder if place is None else ", ".join(gone), command, needed=False)
        elif damaged := [str(file.relative_to(place)) for file in sorted(place.rglob("*")) if is_damaged(file)]:
            yield Check(name, BROKEN, f"{', '.join(damaged)} cut off or no weights", command, needed=False)
        else:
            size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
            yield Check(name, OK, f"{folder}, {size / 1e6:.0f} MB", needed=False)


def is_damaged(file: Path) -> bool:
    """Whether a file of weights is shorter than its head promises, or no such file (a pointer of Git LFS). Reads no tensor."""
    if file.suffix in (".pth", ".bin"):
        return not zipfile.is_zipfile(file)
    if file.suffix != ".safetensors":
        return False
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        head = opened.read(length) if length < file.stat().st_size else b""
    ends = re.findall(rb'"data_offsets":\s*\[\d+,\s*(\d+)\]', head)
    return not ends or 8 + length + max(map(int, ends)) != file.stat().st_size


def model(config: SonicConfig) -> Check:
    """Whether the model that the flags name can be opened. Nothing is loaded."""
    from sonic.checkpoints import open_checkpoint, whisper_folder

    start = open_checkpoint(config.checkpoint, config.base_model, config.whisper_path)
    lacking = [part for part in ("unet", "audio2token", "audio2bucket") if part not in start.tensors]
    name = f"model {config.checkpoint}"
    if lacking:
        return Check(
            name, MISSING, f"no {', '.join(lacking)}: no trained model", "name a trained one with --checkpoint"
        )
    if not config.audio_extractor:
        whisper_folder(config.checkpoint, config.whisper_path)
    return Check(name, OK, f"with {start.base_model.name} and {start.whisper_path.name if start.whisper_path else '-'}")


def self_test() -> Check:
    """The beginning of the example speech by sonic-mini at few steps, from portrait to MP4 and back."""
    started = time.perf_counter()
    from sonic.media import VideoReader, save_video
    from sonic.pipeline import SonicPipeline
    from sonic.sound import load_audio

    pipeline = SonicPipeline(SonicConfig(num_inference_steps=TEST_STEPS))
    loaded = time.perf_counter()
    speech = load_audio(ROOT / "examples/audio.wav")[: TEST_TICKS * SAMPLES_PER_TICK]
    video = pipeline.generate(ROOT / "examples/portrait.jpg", pipeline.extract_audio_features(speech))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "test.mp4")
        save_video(video.frames, path, video.fps, video.speech)
        with VideoReader(path) as reader:
            shown = reader.num_ticks
    load, animate = loaded - started, time.perf_counter() - loaded
    detail = f"{shown} frames by sonic-mini at {TEST_STEPS} steps: loaded in {load:.1f} s, animated in {animate:.1f} s"
    moves = video.frames.std(axis=0).max() > 0
    if shown != TEST_TICKS or not moves:
        return Check("self-test", BROKEN, f"{detail}, but the video is not as it should be", INSTALL)
    return Check("self-test", OK, detail)
