"""One video by several processes, and a batch shared out by clip, started as a user would."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import EXAMPLES, ROOT, voice
from spread_worker import animate

from sonic.processes import Processes

PORTRAIT = EXAMPLES / "portrait.jpg"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """18 frames: 5 windows of 4, which do not divide by two."""
    return voice(tmp_path_factory, 18)


def start(command, cwd):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


def test_two_processes_make_the_same_latents(tiny, speech, tmp_path):
    worker = ROOT / "tests/spread_worker.py"
    animate(tiny, speech, tmp_path / "one", Processes())
    code, printed = start([*TORCHRUN, worker, tiny, speech, tmp_path / "two"], tmp_path)
    assert code == 0, printed
    one, *both = (torch.load(tmp_path / name) for name in ("one.0", "two.0", "two.1"))
    for found in both:
        assert (found["latents"] - one["latents"]).abs().max() <= 1e-4 * one["latents"].abs().max()
        assert (found["frames"].int() - one["frames"].int()).abs().max() <= 1
    assert one["calls"] == 10  # 5 windows, 2 steps
    assert [found["calls"] for found in both] == [6, 6]  # in the last round of each step one of them repeats a window


def test_a_batch_is_shared_out_by_clip(tiny, speech, tmp_path):
    (tmp_path / "broken.jpg").write_text("no picture")
    images = [PORTRAIT, PORTRAIT, tmp_path / "broken.jpg"]
    demo = [ROOT / "sonic_demo.py", "--checkpoint", tiny, "--device", "cpu", "--num_inference_steps", 1]
    command = [*TORCHRUN, *demo, "--image", *images, "--audio", speech, "--output", tmp_path / "out"]
    code, printed = start(command, tmp_path)
    assert code != 0 and "2 of 3 clips made" in printed and printed.count("clips made") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["portrait_voice.mp4", "portrait_voice_2.mp4"]


def test_shares():
    one, two = Processes(0, 2), Processes(1, 2)
    assert (one.share([1, 2, 3]), two.share([1, 2, 3])) == ([1, 3], [2])
    assert two.alone().share([1, 2, 3]) == [1, 2, 3] and two.alone().main and not two.main
    assert Processes().collect([1]) == [1]
    assert list(Processes().spread(lambda job: torch.tensor(job), [1, 2])) == [(1, 1), (2, 2)]


def test_what_a_page_does_not_do(tiny, monkeypatch):
    import sonic_demo
    from sonic.config import UserError

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="served by one process"):
        sonic_demo.main(["--gradio"])
