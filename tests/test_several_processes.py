"""One video by several processes, and a batch shared out by clip, started as a user would."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
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
    return done.returncode, done.stdout, done.stderr


def test_two_processes_make_the_same_latents(tiny, speech, tmp_path):
    worker = ROOT / "tests/spread_worker.py"
    animate(tiny, speech, tmp_path / "one", Processes())
    code, _, printed = start([*TORCHRUN, worker, tiny, speech, tmp_path / "two"], tmp_path)
    assert code == 0, printed
    one, *both = (torch.load(tmp_path / name) for name in ("one.0", "two.0", "two.1"))
    for found in both:
        assert (found["latents"] - one["latents"]).abs().max() <= 1e-4 * one["latents"].abs().max()
        assert (found["frames"].int() - one["frames"].int()).abs().max() <= 1
    assert one["calls"] == 10  # 5 windows, 2 steps
    assert [found["calls"] for found in both] == [6, 6]  # in the last round of each step one of them repeats a window


def test_two_processes_make_the_published_video():
    """The reference test itself, which also counts each process' calls of the UNet."""
    tests = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        ROOT / "tests/test_reference.py",
        "-k",
        "sampler and eager",
    ]
    code, printed, errors = start([*TORCHRUN, *tests], ROOT)
    assert code == 0, printed + errors  # it would not be 0 either if no test had been found


def test_a_batch_is_shared_out_by_clip(tiny, speech, tmp_path):
    (tmp_path / "broken.jpg").write_text("no picture")
    images = [PORTRAIT, PORTRAIT, tmp_path / "broken.jpg"]
    demo = [ROOT / "sonic_demo.py", "--checkpoint", tiny, "--device", "cpu", "--num_inference_steps", 1, "--json"]
    command = [*TORCHRUN, *demo, "--image", *images, "--audio", speech, "--output", tmp_path / "out"]
    code, printed, told = start(command, tmp_path)
    assert code != 0 and "2 of 3 clips made" in told and told.count("clips made") == 1
    result = json.loads(printed)  # nothing else, and from one process
    assert [len(result[name]) for name in ("clips", "failures")] == [2, 1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["portrait_voice.mp4", "portrait_voice_2.mp4"]


@pytest.mark.parametrize("count", [2, 4])
def test_eight_windows_take_a_share_of_the_time_each(count, monkeypatch):
    """Of the UNet part at release size: the work and the bytes of one process, against a fast card and a slow connection."""
    made, received = [], []

    def gather(parts, sent):
        received.append(sum(part.nbytes for part in parts) - sent.nbytes)

    monkeypatch.setattr(dist, "all_gather", gather)
    window = torch.empty(25, 4, 64, 64)
    list(Processes(1, count).spread(lambda job: made.append(job) or window, list(range(8))))
    assert len(made) == 8 / count and sum(received) == 8 / count * (count - 1) * window.nbytes
    call, exchange = 100e12 / 1e15, sum(received) / 10e9  # seconds: SPEC.md section 7 at a PFLOP/s, 10 GB/s
    assert 8 * call / (count * (len(made) * call + exchange)) > 0.99


def test_processes_leave_their_group_before_python_ends(tmp_path):
    """A thread of gloo's that holds a tensor while the interpreter goes down aborts the process: now and then, so what is
    looked at is the group."""
    script = tmp_path / "ends.py"
    script.write_text(f"""
import atexit, sys
import torch.distributed as dist
atexit.register(lambda: print("still in it" if dist.is_initialized() else "has left it"))  # comes after those registered later
sys.path.insert(0, {str(ROOT)!r})
from sonic.processes import Processes
assert Processes.started("cpu").collect([1]) == [1, 1]
""")
    code, printed, errors = start([*TORCHRUN, script], tmp_path)
    assert code == 0, errors
    assert printed.count("has left it") == 2 and "still in it" not in printed


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
