"""Training as processes of the operating system: two at once, one that reports to wandb, and one that is killed again and again."""

import json
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from runs import finish, flags, losses, same, start, wait_for, weights

from sonic.run_setup import make_output_dir

STEPS = 9
BATCH = {"train_batch_size": 2, "save_steps": 1, "max_train_steps": STEPS}


def checkpoints(output):
    """The steps that checkpoints of a run are of; nothing unfinished counts."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in output.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def unbroken(tiny, clips, cache, tmp_path_factory):
    """All steps in one go, by one process."""
    output = tmp_path_factory.mktemp("unbroken")
    finish(start(flags(tiny, clips, cache, output, **BATCH), output), output)
    return output


def test_two_processes_train_as_one_does(unbroken, tiny, clips, cache, tmp_path):
    """Twice one clip per step is two clips per step: the same sample numbers, the same losses, and one set of files."""
    output = tmp_path / "output"
    arguments = flags(tiny, clips, cache, output, **BATCH | {"train_batch_size": 1, "max_train_steps": 2})
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    printed = finish(start(arguments, tmp_path, torchrun, ACCELERATE_USE_CPU="true"), tmp_path)
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for step, found in losses(output).items():
        assert found == pytest.approx(losses(unbroken)[step], rel=1e-4)
    assert checkpoints(output) == [1, 2] and not list(output.glob(".*"))
    files = {path.name for path in (output / "checkpoint-2/state").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= files
    assert weights(output / "checkpoint-2").keys() == weights(unbroken / "checkpoint-2").keys()
    assert printed.count("training clips") == printed.count("done: 2 steps") == 1


def test_processes_that_try_the_output_folder_at_once(tmp_path):
    """None takes another's try for its own failure, and nothing is left behind."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(make_output_dir, [tmp_path / "output"] * 400))
    assert list((tmp_path / "output").iterdir()) == []


def test_wandb_without_network(tiny, clips, cache, tmp_path):
    """An offline run finishes, and its files lie with the run's others, not where it was started."""
    here, output = tmp_path / "here", tmp_path / "output"
    here.mkdir()
    arguments = flags(tiny, clips, cache, output, max_train_steps=1, use_wandb=True)
    finish(start(arguments, here, WANDB_MODE="offline"), here)
    assert [path.name for path in here.iterdir()] == ["printed.txt"]
    assert list(output.glob("wandb/offline-run-*/run-*.wandb"))
    assert list(losses(output)) == [1]


def test_killed_at_random_moments(unbroken, tiny, clips, cache, tmp_path):
    """kill -9 three times in a run that saves after every step: each time the last checkpoint is whole and the run goes on."""
    output = tmp_path / "output"
    arguments = [*flags(tiny, clips, cache, output, **BATCH), "--resume_from_checkpoint", "latest"]
    first, last = ((unbroken / f"checkpoint-{step}/sonic.json").stat().st_mtime for step in (1, STEPS))
    cycle = (last - first) / (STEPS - 1)  # seconds of a step with its save
    for kill, where in enumerate(("anywhere", "save", "save"), 1):
        before = max(checkpoints(output), default=0)
        process = start(arguments, tmp_path)
        wait_for(output / f"checkpoint-{before + 1}", process)  # it goes on
        if where == "save":
            wait_for(output / f".checkpoint-{before + 2}.partial", process)
        pause = random.uniform(0, cycle if where == "anywhere" else cycle / 5)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        printed = (tmp_path / "printed.txt").read_text()
        assert process.returncode == -signal.SIGKILL, printed
        assert f"resumed at step {before} from" in printed or before == 0
        left = [path.name for path in output.glob(".*")]
        print(f"kill {kill} ({where}) after {pause:.3f} s: checkpoints {checkpoints(output)}, unfinished {left}")
        assert checkpoints(output) == list(range(1, len(checkpoints(output)) + 1)) and len(checkpoints(output)) > before

    assert len(checkpoints(output)) < STEPS
    printed = finish(start(arguments, tmp_path), tmp_path)
    assert printed.count("resumed at step") == 3
    assert checkpoints(output) == checkpoints(unbroken) and not list(output.glob(".*"))
    assert losses(output) == losses(unbroken)
    assert same(weights(output / f"checkpoint-{STEPS}"), weights(unbroken / f"checkpoint-{STEPS}"))
