"""Where the time of a preparation goes, what memory it takes, and how large its cache is.

    python benchmarks/preparation.py --video VIDEO --seconds 60           # that video looped to a minute
    python benchmarks/preparation.py --video VIDEO --seconds 3600         # an hour of it: what grows with a file's length
    python benchmarks/preparation.py --video VIDEO --seconds 15 --files 12 --num_workers 1 2      # the whole command

Measures one file as a worker does (all steps, without Whisper and latents), in CPU seconds of this process, so that another
program on the machine changes them little. With --files it is the command over so many such files, by the clock.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere, without an install

import av

import sonic.faces
import sonic.measuring
from sonic.config import TICK_RATE
from sonic.flags import Parser, run
from sonic.judging import judge
from sonic.media import VideoReader
from sonic.pieces import Screening
from sonic.track_cache import save_measured
from sonic.workers import be_a_worker

ROOT = Path(__file__).resolve().parent.parent

# What is timed: the part's name, where the function lies, and its name. Inner parts are taken from outer ones.
PARTS = (
    ("decode and shrink", VideoReader, "_show"),
    ("look for faces", sonic.faces, "detect_faces"),
    ("verify the face", sonic.faces, "_find_near"),
    ("landmarks", sonic.faces, "_predict"),
    ("other faces", sonic.measuring, "second_face"),
    ("shots", sonic.measuring.PictureWatcher, "_content_value"),
    ("brightness, sharpness", sonic.measuring, "face_look"),
    ("borders", sonic.measuring, "find_borders"),
    ("sound", sonic.measuring, "measure_sound"),
    ("smoothing", sonic.faces, "_finish"),
)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--video", required=True, help="a video with a face and sound")
    parser.add_argument(
        "--seconds", type=float, default=60, help="how long it is made at least, in whole laps (default: %(default)s)"
    )
    parser.add_argument(
        "--files", type=int, default=0, help="copies of it to prepare by the command (default: look into one alone)"
    )
    parser.add_argument(
        "--num_workers", type=int, nargs="+", default=[1, 2], help="of the command, each in turn (default: %(default)s)"
    )
    flags = parser.parse_args(arguments)
    if flags.files:
        return time_command(Path(flags.video), flags.seconds, flags.files, flags.num_workers)
    be_a_worker()
    with tempfile.TemporaryDirectory() as folder:
        path = loop(Path(flags.video), Path(folder) / "long.mkv", flags.seconds)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        spent = watch_parts()
        begin = time.process_time()
        measured = sonic.measuring.measure(path)
        whole = time.process_time() - begin
        if measured.reason:
            raise SystemExit(f"{flags.video}: {measured.reason}")
        begin = time.process_time()
        pieces = judge("long.mkv", measured, Screening(keep_all=True), 51)
        judging = time.process_time() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        save_measured(measured, Path(folder) / "entry.safetensors")
        size = (Path(folder) / "entry.safetensors").stat().st_size
    seconds = measured.num_ticks / TICK_RATE
    print(
        f"{seconds:.0f} s of {measured.width} x {measured.height} {measured.facts['codec']}, {measured.facts['fps']:.4g} fps"
    )
    print(f"{'part':<24}{'CPU s':>8}{'ms per tick':>13}{'share':>8}")
    spent["everything else"] = whole - sum(spent.values())
    for part, cost in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"{part:<24}{cost:>8.1f}{1000 * cost / measured.num_ticks:>13.2f}{cost / whole:>8.0%}")
    print(
        f"measured at {seconds / whole:.1f} s of video per CPU second; judging took {judging:.2f} s for {len(pieces)} pieces"
    )
    print(f"memory: {peak:.0f} MB at most, {before:.0f} MB before the file was opened")
    features, latents = stored(50 * 5 * 384), stored(TICK_RATE * (4 * 64 * 64 + 1024))
    print(
        f"cache per hour of footage: {size * 3600 / seconds / 1e6:.0f} MB of tracks and curves, {features:.0f} MB of Whisper's"
    )
    print(
        f"features, and with --cache_latents {latents:.0f} MB more (SVD's latents of 512 x 512 and CLIP's embeddings)"
    )


def time_command(video: Path, seconds: float, files: int, workers: list[int]) -> None:
    """Prints what `python -m sonic.prepare` takes over copies of a video, and what a second call takes."""
    with tempfile.TemporaryDirectory() as folder:
        videos = Path(folder) / "videos"
        videos.mkdir()
        first = loop(video, videos / "0.mkv", seconds)
        with VideoReader(first) as reader:
            length = reader.info.duration
        for number in range(1, files):
            shutil.copy(first, videos / f"{number}.mkv")
        for count in workers:
            command = [sys.executable, "-m", "sonic.prepare", "--data_root", videos, "--num_workers", str(count)]
            times = []
            for _ in range(2):
                begin = time.perf_counter()
                subprocess.run(
                    [*command, "--cache_dir", f"{folder}/{count}"], cwd=ROOT, check=True, capture_output=True
                )
                times.append(time.perf_counter() - begin)
            print(
                f"--num_workers {count}: {times[0]:.1f} s for {files} x {length:.0f} s; a second call {times[1]:.1f} s"
            )


def loop(video: Path, target: Path, seconds: float) -> Path:
    """The video's packets again and again, not encoded anew."""
    with av.open(str(target), "w") as container:
        streams, moved, newest = {}, Fraction(0), {"video": -(10**9), "audio": -(10**9)}
        while moved < seconds:
            with av.open(str(video)) as source:
                kinds = [source.streams.video[0], source.streams.audio[0]]
                streams = streams or {one.type: container.add_stream_from_template(one) for one in kinds}
                length = min(one.duration * one.time_base for one in kinds)
                for packet in source.demux(kinds):
                    if packet.pts is None or packet.pts * packet.time_base >= length:
                        continue
                    ahead = int(moved / packet.time_base)
                    kind = packet.stream.type
                    # Decoding begins before the first picture is shown, and so before the last of the lap before.
                    newest[kind] = max(newest[kind] + 1, packet.dts + ahead)
                    packet.pts, packet.dts = max(packet.pts + ahead, newest[kind]), newest[kind]
                    packet.stream = streams[kind]
                    container.mux(packet)
                moved += length
    return target


def watch_parts() -> dict[str, float]:
    """CPU seconds by part, filled while they work; a part's own, without those of the parts that it calls."""
    spent, inner = defaultdict(float), [0.0]

    def timed(part: str, function: Callable) -> Callable:
        def call(*values, **named):
            begin = time.process_time()
            inner.append(0.0)
            try:
                return function(*values, **named)
            finally:
                cost = time.process_time() - begin
                spent[part] += cost - inner.pop()
                inner[-1] += cost

        return call

    for part, place, name in PARTS:
        setattr(place, name, timed(part, getattr(place, name)))
    return spent


def stored(values_per_second: int) -> float:
    """MB that an hour of so many 16-bit numbers per second takes."""
    return 3600 * values_per_second * 2 / 1e6


if __name__ == "__main__":
    run(main)
