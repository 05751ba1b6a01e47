"""What a run does when something goes wrong, and what it says of itself afterwards."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from runs import flags, losses, same, weights

import sonic_training
from sonic.checkpoints import training_checkpoints
from sonic.config import UserError
from sonic.run_log import FIXED, PRACTICAL, RunState, by_noise_level, differences, fingerprint, only_run_in, read_log
from sonic.stopping import StopSignals
from sonic.training import keep_checkpoints
from sonic.training_config import TrainingConfig

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

stock_loss = sonic_training.total_loss


def disturb(monkeypatch, **by_call):
    """Lets a function of the loss loose on the calls of `total_loss` that are named, "call_2" and so on."""
    calls = []

    def disturbed(*args):
        calls.append(1)
        loss = stock_loss(*args)
        return by_call.get(f"call_{len(calls)}", lambda loss: loss)(loss)

    monkeypatch.setattr(sonic_training, "total_loss", disturbed)


def no_number(loss):
    return loss * math.nan


def no_gradient(loss):
    """A finite loss whose gradient is infinite."""
    loss = loss * 1
    loss.register_hook(lambda gradient: gradient * math.inf)
    return loss


@pytest.fixture(scope="module")
def unbroken(tiny, clips, cache, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken")
    sonic_training.main(flags(tiny, clips, cache, output))
    return output


# ------------------------------------------------------------------------------------------------ numbers that are none


@pytest.mark.parametrize("fault", [no_number, no_gradient])
def test_a_step_without_a_number_is_skipped_and_counted(fault, tiny, clips, cache, tmp_path, monkeypatch, capsys):
    disturb(monkeypatch, call_2=fault)
    sonic_training.main(flags(tiny, clips, cache, tmp_path, save_steps=1))
    rows = read_log(tmp_path / "log.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 1]
    assert rows[1]["grad_norm"] is None or fault is no_number
    assert [row["step"] for row in rows if "loss" in row] == [1, 3, 4] if fault is no_number else [1, 2, 3, 4]
    assert all(math.isfinite(row.get("loss", 0)) for row in rows)
    # What comes behind a skipped step is not yet trusted; it is saved with the next good one.
    assert [path.name for path in training_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    assert not same(weights(tmp_path / "checkpoint-1"), weights(tmp_path / "checkpoint-3"))
    printed = capsys.readouterr().out
    assert "step 2 skipped: its loss or gradient is no number (" in printed and ".mp4" in printed
    assert "1 steps skipped" in (tmp_path / "report.md").read_text()


def test_a_skipped_step_changes_nothing(tiny, clips, cache, tmp_path, monkeypatch, unbroken):
    disturb(monkeypatch, call_3=no_gradient, call_4=no_gradient)
    with pytest.raises(UserError, match=r"the last 2 steps had losses or gradients that are no number .*checkpoint-2"):
        sonic_training.main(flags(tiny, clips, cache, tmp_path))
    assert same(weights(tmp_path / "checkpoint-2"), weights(unbroken / "checkpoint-2"))
    assert losses(tmp_path)[3][:2] == losses(unbroken)[3][:2]


def test_one_bad_part_spoils_an_accumulated_step(tiny, clips, cache, tmp_path, monkeypatch):
    """Of two batches that make one step, the first is bad: the good second one alone is no step."""
    disturb(monkeypatch, call_1=no_number)
    sonic_training.main(
        flags(tiny, clips, cache, tmp_path, gradient_accumulation_steps=2, max_train_steps=2, save_steps=1)
    )
    assert [row["skipped_steps"] for row in read_log(tmp_path / "log.jsonl")] == [1, 1]
    assert [path.name for path in training_checkpoints(tmp_path)] == ["checkpoint-2"]


def test_ten_in_a_row_are_enough(tiny, clips, cache, tmp_path, monkeypatch):
    disturb(monkeypatch, **{f"call_{call}": no_number for call in range(3, 99)})
    with pytest.raises(UserError, match=r"the last 10 steps had .*the last good checkpoint is .*checkpoint-2; lower"):
        sonic_training.main(flags(tiny, clips, cache, tmp_path, max_train_steps=99))
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] <= 12
    assert [path.name for path in training_checkpoints(tmp_path)] == ["checkpoint-2"]


# ------------------------------------------------------------------------------------------------------------- signals


def test_sigterm_finishes_the_step_and_saves(tiny, clips, cache, tmp_path, monkeypatch, unbroken, capsys):
    def terminate(loss):
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    before = signal.getsignal(signal.SIGTERM)
    disturb(monkeypatch, call_3=terminate)
    assert sonic_training.main(flags(tiny, clips, cache, tmp_path)) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in training_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    assert "checkpoint-3; go on with --resume_from_checkpoint latest" in capsys.readouterr().out
    monkeypatch.setattr(sonic_training, "total_loss", stock_loss)
    sonic_training.main(flags(tiny, clips, cache, tmp_path, resume_from_checkpoint="latest"))
    assert losses(tmp_path) == losses(unbroken)
    assert same(weights(tmp_path / "checkpoint-4"), weights(unbroken / "checkpoint-4"))


def test_a_second_signal_ends_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_in_a_terminal_reaches_the_workers_too(tiny, clips, cache, tmp_path):
    """A terminal sends SIGINT to the whole group: loader workers must not die of it, nor print their own ends."""
    arguments = flags(tiny, clips, cache, tmp_path / "output", num_workers=1, max_train_steps=400, save_steps=400)
    process = subprocess.Popen(
        [sys.executable, ROOT / "sonic_training.py", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while not (tmp_path / "output/log.jsonl").is_file() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    while not read_log(tmp_path / "output/log.jsonl") and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT, printed
    (saved,) = training_checkpoints(tmp_path / "output")
    assert f"SIGINT: saved {saved}; go on with" in printed and "Traceback" not in printed


# ------------------------------------------------------------------------------------------------------------ checkpoints


def test_a_full_disk_leaves_the_old_checkpoint(tiny, clips, cache, tmp_path, monkeypatch):
    """A file size that the system refuses stands for a disk that is full."""
    arguments = flags(tiny, clips, cache, tmp_path, save_steps=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(loss):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        return loss

    disturb(monkeypatch, call_3=fill)
    try:
        with pytest.raises(
            UserError, match=r"cannot write .*checkpoint-4 .*the last complete checkpoint is .*-2; make"
        ):
            sonic_training.main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in training_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert not list(tmp_path.glob(".*"))


def test_only_the_newest_checkpoints_are_kept(tiny, clips, cache, tmp_path):
    sonic_training.main(flags(tiny, clips, cache, tmp_path, save_steps=1, checkpoints_total_limit=2))
    assert [path.name for path in training_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    keep_checkpoints(tmp_path, 1)
    assert [path.name for path in training_checkpoints(tmp_path)] == ["checkpoint-4"]
    keep_checkpoints(tmp_path, 1)
    keep_checkpoints(tmp_path, None)
    assert [path.name for path in training_checkpoints(tmp_path)] == ["checkpoint-4"]


def test_a_half_deleted_checkpoint_is_none(tmp_path):
    for name in ("checkpoint-1", ".checkpoint-2.deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    assert training_checkpoints(tmp_path) == [tmp_path / "checkpoint-1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]


def test_two_runs_do_not_write_to_one_folder(tiny, clips, cache, tmp_path):
    arguments = flags(tiny, clips, cache, tmp_path, max_train_steps=1, save_steps=1)
    with only_run_in(tmp_path, main=True), only_run_in(tmp_path, main=False):
        with pytest.raises(UserError, match=r"another run is writing to .*wait for its end"):
            sonic_training.main(arguments)
        assert list(tmp_path.iterdir()) == []
    sonic_training.main(arguments)
    assert (tmp_path / "checkpoint-1").is_dir()


# ------------------------------------------------------------------------------------------------------------- provenance


def test_a_checkpoint_says_what_it_is_made_of(unbroken):
    made_of = json.loads((unbroken / "checkpoint-4/run.json").read_text())
    assert made_of["config"]["learning_rate"] == 1e-3 and made_of["config"]["num_frames"] == 4  # resolved
    assert made_of["packages"]["torch"] == torch.__version__
    assert len(made_of["data"]) == 16 and int(made_of["data"], 16) > 0
    assert made_of["git_commit"] is None or len(made_of["git_commit"].rstrip("+")) == 40


def test_resuming_with_other_flags_says_which(unbroken, tiny, clips, cache, tmp_path, capsys):
    shutil.copytree(unbroken / "checkpoint-2", tmp_path / "checkpoint-2")
    changed = {"learning_rate": 2e-3, "logging_steps": 2, "resume_from_checkpoint": "latest"}
    sonic_training.main(flags(tiny, clips, cache, tmp_path, **changed))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resuming with a difference")]
    assert said == ["resuming with a difference: --learning_rate 0.002 instead of 0.001"]
    with pytest.raises(
        UserError, match=r"cannot resume .*checkpoint-4 with --seed 1 instead of 42: give the old value"
    ):
        sonic_training.main(flags(tiny, clips, cache, tmp_path, seed=1, resume_from_checkpoint="latest"))


def test_resuming_with_other_data_says_so(unbroken, tiny, clips, cache, tmp_path, capsys):
    shutil.copytree(unbroken / "checkpoint-2", tmp_path / "output/checkpoint-2")
    fewer = tmp_path / "clips"
    fewer.mkdir()
    for name in ("one.mp4", "two.mp4"):
        shutil.copy(clips / name, fewer / name)
    sonic_training.main(flags(tiny, fewer, cache, tmp_path / "output", resume_from_checkpoint="latest"))
    assert "resuming with a difference: other data" in capsys.readouterr().out


def test_the_same_flags_are_no_change(unbroken):
    known = json.loads((unbroken / "checkpoint-2/run.json").read_text())
    config = TrainingConfig(**known["config"])
    assert differences(config, known, unbroken / "checkpoint-2") == []
    (said,) = differences(config, {"data": "0123"}, unbroken / "checkpoint-2")
    assert said.startswith("other data")


def test_every_flag_that_resuming_treats_apart_exists():
    names = set(TrainingConfig.__dataclass_fields__)
    assert names >= PRACTICAL | FIXED and not PRACTICAL & FIXED


def test_data_is_known_by_its_windows(tiny, clips, cache):
    from sonic.checkpoints import load_whisper
    from sonic.prepare import prepare

    data = prepare(
        clips, cache, load_whisper(tiny / "whisper"), num_frames=4, frame_step=1, num_workers=0, progress=False
    )
    whole = fingerprint(data.clips)
    assert fingerprint(data.clips) == whole != fingerprint(data.clips[1:])


# ----------------------------------------------------------------------------------------------------------- what is seen


def test_losses_are_sorted_by_noise_level():
    errors = torch.arange(1.0, 6.0)[:, None, None, None].expand(5, 2, 3, 3)
    bands = by_noise_level(errors, torch.tensor([0.1, 0.75, 5.0, 6.0, 600.0]))
    assert bands == {
        "loss_sigma_0_to_0.7": [1.0],
        "loss_sigma_0.7_to_2": [2.0],
        "loss_sigma_2_to_6": [3.0],
        "loss_sigma_6_up": [4.0, 5.0],
    }
    state = RunState()
    for _ in range(2):
        state.add(**bands)
    state.add(empty=[])
    assert state.means()["loss_sigma_6_up"] == 4.5


def test_the_log_names_every_noise_level(unbroken):
    rows = read_log(unbroken / "log.jsonl")
    names = [name for name in rows[0] if name.startswith("loss_sigma")]
    assert len(names) == 4
    for row in rows:
        assert [row[name] for name in names if row[name] is not None] == [row["loss"]]  # one clip per step


def test_the_report_at_the_end(unbroken, capsys, tiny, clips, cache, tmp_path):
    text = (unbroken / "report.md").read_text()
    last = read_log(unbroken / "log.jsonl")[-1]
    assert "- 4 steps, 4 samples in 0 h" in text and f"loss {last['loss']:.4g}" in text
    assert f"- model: {unbroken / 'checkpoint-4'}" in text and "validation" not in text
    assert (unbroken / "loss.png").read_bytes()[:4] == b"\x89PNG"
    sonic_training.main(flags(tiny, clips, cache, tmp_path, max_train_steps=2, validation_steps=1))
    checks = [row for row in read_log(tmp_path / "log.jsonl") if "validation_loss" in row]
    best = min(checks, key=lambda row: row["validation_loss"])
    assert f"best {best['validation_loss']:.4g} at step {best['step']}" in capsys.readouterr().out
