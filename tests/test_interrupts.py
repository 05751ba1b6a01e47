"""Ctrl-C and SIGTERM: no traceback, no half file, exit codes 130 and 143, in the demo, in training and in preparing."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import EXAMPLES, ROOT, voice

import sonic_demo
import sonic_training
from sonic import media, workers
from sonic.flags import run
from sonic.stopping import Terminated

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    return voice(tmp_path_factory, 8, 8000)


def ended(main, arguments):
    with pytest.raises(SystemExit) as stopped:
        run(lambda: main([str(word) for word in arguments]))
    return stopped.value.code


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_the_demo_while_it_writes(tiny, speech, tmp_path, monkeypatch, capsys, number):
    """The batch's second clip is stopped in the middle of its file: the first stays, nothing of the second is left."""
    write, stopped = media.VideoWriter.write, []

    def interrupted(self, frames):
        write(self, frames[:1])
        if self.path.name == "portrait_voice_2.mp4" and not stopped:
            stopped.append(True)
            signal.raise_signal(number)
        write(self, frames[1:])

    monkeypatch.setattr(media.VideoWriter, "write", interrupted)
    portrait = EXAMPLES / "portrait.jpg"
    arguments = [
        "--checkpoint",
        tiny,
        "--image",
        portrait,
        portrait,
        "--audio",
        speech,
        "--output",
        tmp_path / "videos",
    ]
    assert ended(sonic_demo.main, [*arguments, "--num_inference_steps", 1, "--json"]) == CODES[number]
    printed = capsys.readouterr()
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["portrait_voice.mp4"]
    result = json.loads(printed.out)
    assert len(result["clips"]) == 1 and result["failures"] == [] and result["error"]
    assert "Traceback" not in printed.err and printed.err.strip().endswith(("interrupted", "terminated"))


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_training_before_its_loop(tiny, clips, tmp_path, monkeypatch, capsys, number):
    """Inside the loop both signals save a checkpoint first; tests/test_nothing_lost.py has that."""
    monkeypatch.setattr(sonic_training, "prepare_data", lambda *_: signal.raise_signal(number))
    arguments = ["--model_path", tiny, "--data_root", clips, "--output_dir", tmp_path / "run", "--num_workers", 0]
    assert ended(sonic_training.main, arguments) == CODES[number]
    assert "Traceback" not in capsys.readouterr().err


def test_workers_of_a_stopped_preparation_end_at_once():
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), workers._Pool(1) as pool:
        job = pool.submit(time.sleep, 300)
        while not job.running():
            time.sleep(0.05)
        raise KeyboardInterrupt
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_real_signal(number, tmp_path):
    """While the models are imported and loaded, which takes seconds."""
    command = [sys.executable, ROOT / "sonic_demo.py", "--image", EXAMPLES / "portrait.jpg"]
    command += [
        "--audio",
        EXAMPLES / "audio.wav",
        "--output",
        tmp_path / "o.mp4",
        "--save_config",
        tmp_path / "begun.yaml",
    ]
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun.yaml").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == CODES[number], err
    assert out == "" and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["begun.yaml"]


@pytest.mark.parametrize("script", ["sonic_demo.py", "sonic_training.py"])
def test_ctrl_c_while_it_starts(script, tmp_path):
    """0.3 s after it has come to its own lines, which is in the midst of torch for training."""
    command = [sys.executable, "-X", "importtime", str(ROOT / script), "--output_dir", str(tmp_path / "run")]
    if script == "sonic_demo.py":
        command = [*command[:4], "--doctor"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        for line in process.stderr:  # a busy machine takes its time to start Python
            if line.rstrip().endswith(" sonic.stopping"):
                break
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    words = [line for line in said.splitlines() if not line.startswith("import time:")]
    assert process.returncode == 130 and words == ["interrupted"], words
    assert list(tmp_path.iterdir()) == []


def test_sigterm_is_no_failure_of_one_clip():
    with pytest.raises(BaseException) as error:
        raise Terminated
    assert not isinstance(error.value, Exception)


def interrupted_import(folder, module):
    """What a script says and its exit code, whose `main` imports that module and goes on for half a minute."""
    (folder / "heavy.py").write_text(module)
    (folder / "script.py").write_text(
        "import time\n"
        "from sonic.flags import run\n"
        "def main():\n"
        "    try:\n"
        "        import heavy\n"
        "    except ImportError:\n"  # as --doctor reports a missing package
        "        return 1\n"
        "    time.sleep(30)\n"
        "run(main)\n"
    )
    return subprocess.run(
        [sys.executable, str(folder / "script.py")],
        capture_output=True,
        text=True,
        timeout=25,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_waits_for_an_import(number, word, tmp_path):
    """Libraries in C take the exception for a failure of theirs, and pybind11 aborts the process with it."""
    swallowing = (
        "import os, time\n"
        "try:\n"
        f"    os.kill(os.getpid(), {number:d})\n"
        "    time.sleep(0.3)\n"
        "except BaseException as error:\n"
        "    raise ImportError from error\n"
        "print('imported', flush=True)\n"
    )
    ended = interrupted_import(tmp_path, swallowing)
    assert (ended.returncode, ended.stdout, ended.stderr) == (CODES[number], "imported\n", f"{word}\n")


def test_a_second_signal_does_not_wait_for_an_import(tmp_path):
    ended = interrupted_import(
        tmp_path, "import os, time\nfor _ in range(2):\n    os.kill(os.getpid(), 2)\ntime.sleep(30)\n"
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


def test_a_closed_pipe_is_no_error():
    command = f"{shlex.join([sys.executable, str(ROOT / 'sonic_demo.py')])} --help | true"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert ended.stderr == ""
