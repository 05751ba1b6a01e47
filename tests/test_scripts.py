"""The shell scripts and requirements.txt: nothing is installed here, a fake Python writes down what it is asked."""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted(ROOT.glob("scripts/*.sh"))
SOURCES = [*sorted(ROOT.glob("sonic/*.py")), *sorted(ROOT.glob("scripts/*.py"))]
SOURCES += [ROOT / name for name in ("sonic_training.py", "sonic_demo.py", "sonic_implementation.py")]
# Where they differ from the import.
PACKAGES = {"cv2": "opencv-python-headless", "PIL": "pillow", "dlib": "dlib-bin", "yaml": "PyYAML"}
# Named as text and not imported: faces.py looks up where the first lies, accelerate's tracker imports the second.
BY_NAME = {"face_recognition_models", "tensorboard"}
OPTIONAL = {"bitsandbytes", "torchao"}  # a flag that needs one says how to get it
WITH_GRADIO = {"anyio", "starlette"}  # what gradio itself is made of
TOOLS = {
    "playwright",
    "pytest",
    "ruff",
    "librosa",
}  # the last for tests, and for features of one's own as in docs/api.md

# A Python of version 3.{minor} in the folder $FAKES: it answers `-c` truly, and makes environments whose Python is a fake too.
PYTHON = """#!/bin/sh
case "$1 $2" in
    "-c "*) exec "$REAL" -c 'import sys; sys.version_info = (3, {minor}, 0); exec(sys.argv[1])' "$2" ;;
    "--version "*) echo "Python 3.{minor}.0" ;;
    "-m venv")
        echo "3.{minor} makes $3" >> "$RECORD"
        mkdir -p "$3/bin"
        cp "$FAKES/inside" "$3/bin/python"
        [ -z "$CUT" ] || exit 1
        touch "$3/has-pip" ;;
esac
"""
# The Python inside an environment.
INSIDE = """#!/bin/sh
echo "$@" >> "$RECORD"
[ "$3" != show ] || exec test -e .venv/has-pip
[ -z "$FAIL" ]
"""
SHOW = "-m pip show --quiet pip"
INSTALL = "-m pip install --quiet --disable-pip-version-check -r requirements.txt"


class Project:
    """A copy of the scripts in a path with spaces, among fake Pythons."""

    def __init__(self, folder, minors):
        self.folder, self.fakes, self.record = folder / "my project", folder / "fakes", folder / "record.txt"
        shutil.copytree(ROOT / "scripts", self.folder / "scripts")
        (self.folder / "requirements.txt").write_text("torch==1\n")
        self.fakes.mkdir()
        self.executable(self.fakes / "inside", INSIDE)
        for name, minor in minors.items():
            self.executable(self.fakes / name, PYTHON.replace("{minor}", str(minor)))

    @staticmethod
    def executable(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def environment(self, cwd="/", script="scripts/environment.sh", **variables):
        """Runs what every script begins with; gives the end of it and what the fakes were asked."""
        self.record.write_text("")
        variables = {
            "REAL": sys.executable,
            "FAKES": self.fakes,
            "RECORD": self.record,
            "CUT": "",
            "FAIL": "",
        } | variables
        path = {"PATH": f"{self.fakes}:{os.environ['PATH']}"}
        command = [
            "bash",
            "-c",
            'set -euo pipefail; source "$0"; pwd',
            script if cwd == self.folder else self.folder / script,
        ]
        done = subprocess.run(command, cwd=cwd, env=os.environ | path | variables, capture_output=True, text=True)
        return done, self.record.read_text().splitlines()


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path, {"python3.11": 11, "python3.12": 12, "python3.10": 10, "python3": 13})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_the_environment_is_made_once(project, tmp_path):
    done, asked = project.environment()
    assert done.stdout.splitlines()[-1] == str(project.folder)
    assert asked == ["3.11 makes .venv", INSTALL]
    assert {path.name for path in (project.folder / ".venv").iterdir()} == {
        "bin",
        "has-pip",
        "installed-requirements.txt",
    }
    # From the project itself with a CDPATH that knows another `scripts`, too.
    (tmp_path / "elsewhere/scripts").mkdir(parents=True)
    for more in ({}, {"cwd": tmp_path}, {"cwd": project.folder, "CDPATH": str(tmp_path / "elsewhere")}):
        done, asked = project.environment(**more)
        assert (done.returncode, done.stdout, asked) == (0, f"{project.folder}\n", [])


@pytest.mark.parametrize(
    ("minors", "chosen"),
    [
        ({"python3.11": 11, "python3.12": 12, "python3.10": 10, "python3": 12}, 11),
        ({"python3.11": 9, "python3.12": 12, "python3.10": 10, "python3": 13}, 12),  # a broken name does not count
        ({"python3.11": 13, "python3.12": 13, "python3.10": 10, "python3": 13}, 10),
        ({"python3.11": 13, "python3.12": 13, "python3.10": 13, "python3": 12}, 12),
        ({"python3.11": 13, "python3.12": 9, "python3.10": 14, "python3": 13}, None),
    ],
)
def test_python_is_chosen_by_its_version(tmp_path, minors, chosen):
    project = Project(tmp_path, minors)
    done, asked = project.environment(python="python3.11")  # a variable of that name is none of our business
    if chosen:
        assert asked == [f"3.{chosen} makes .venv", INSTALL]
    else:
        assert (done.returncode, done.stderr) == (2, "error: Python 3.10, 3.11 or 3.12 with venv is needed\n")
        assert asked == [] and not (project.folder / ".venv").exists()


def test_changed_requirements_are_installed_into_what_is_there(project):
    project.environment()
    (project.folder / "requirements.txt").write_text("torch==2\n")
    done, asked = project.environment(FAIL="yes")
    assert done.returncode == 1 and asked == [SHOW, INSTALL]
    assert project.environment()[1] == [SHOW, INSTALL]  # the failed one left no stamp
    assert project.environment()[1] == []


def test_an_environment_made_by_hand_is_kept(project):
    """As README.md describes it."""
    project.executable(project.folder / ".venv/bin/python", INSIDE)
    (project.folder / ".venv/has-pip").touch()
    (project.folder / ".venv/mine").touch()
    assert project.environment()[1] == [SHOW, INSTALL]
    assert (project.folder / ".venv/mine").exists()


def test_an_interruption_heals_itself(project):
    making = ["3.11 makes .venv", INSTALL]
    done, _ = project.environment(CUT="yes")  # before pip is there
    assert done.returncode == 1
    assert project.environment()[1] == making

    shutil.rmtree(project.folder / ".venv")
    done, _ = project.environment(FAIL="yes")  # while packages are installed for the first time
    assert done.returncode == 1
    assert project.environment()[1] == making

    (project.folder / ".venv/has-pip").unlink()  # made by hand, or by a version of the script that left no mark
    (project.folder / ".venv/installed-requirements.txt").unlink()
    assert project.environment()[1] == [SHOW, *making]

    (
        project.folder / ".venv/bin/python"
    ).unlink()  # the Python that it was made with has gone; the stamp says all is well
    assert project.environment()[1] == making
    assert project.environment()[1] == []


def imported(path):
    """Top-level names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_requirements_name_what_is_imported_and_nothing_else():
    own = {"sonic"} | {path.stem for path in SOURCES}
    modules = {name for path in SOURCES for name in imported(path)} - sys.stdlib_module_names - own
    assert {"torch", "cv2", "PIL", "av"} <= modules  # the search finds something
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.split("[=<>; ]", line)[0] for line in lines if line and not line.startswith("#")}
    assert required == {PACKAGES.get(name, name) for name in modules} - OPTIONAL - WITH_GRADIO | BY_NAME | TOOLS


def test_torchvision_and_torchaudio_are_not_needed():
    """SVD and Whisper work without them, and each must fit the torch release exactly."""
    files = [*SOURCES, *sorted(ROOT.glob("tests/*.py")), *sorted(ROOT.glob("benchmarks/*.py"))]
    assert not {"torchvision", "torchaudio"} & {name for path in files for name in imported(path)}
