"""Preparation by several processes, started as a user would: launched together, and knowing nothing of each other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from corpus import puppet, write

from sonic.prepare import main

NAMES = ("a.mp4", "deep/b.mp4")
FLAGS = ("--num_frames", "10", "--frame_step", "1", "--num_workers", "0")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Two puppets of half a second, and a file that is no video."""
    folder = tmp_path_factory.mktemp("videos")
    for number, name in enumerate(NAMES):
        (folder / name).parent.mkdir(exist_ok=True)
        write(folder / name, *puppet(14, number))
    (folder / "text.mp4").write_text("not a video")
    return folder


@pytest.fixture(scope="module")
def alone(videos, tmp_path_factory) -> dict[str, bytes]:
    """What one process leaves."""
    cache = tmp_path_factory.mktemp("alone")
    main(["--data_root", str(videos), "--cache_dir", str(cache), *FLAGS])
    return left_in(cache)


def left_in(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


def start(launcher: list[str], videos: Path, cache: Path) -> subprocess.Popen:
    command = [sys.executable, *launcher, "-m", "sonic.prepare", "--data_root", videos, "--cache_dir", cache, *FLAGS]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def test_launched_processes_share_the_files(videos, alone, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    run = start(launcher, videos, tmp_path)
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert "2 processes share the videos" in said and said.count("2 videos used: 2 clips") == 1
    assert left_in(tmp_path) == alone


def test_two_runs_at_once_leave_what_one_leaves(videos, alone, tmp_path):
    runs = [start([], videos, tmp_path) for _ in range(2)]
    for run in runs:
        said, _ = run.communicate(timeout=300)
        assert run.returncode == 0 and "2 videos used: 2 clips" in said, said
    assert left_in(tmp_path) == alone
