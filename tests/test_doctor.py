"""`sonic_demo.py --doctor`: what it finds, and that it works where something is missing."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from sonic import doctor
from sonic.config import BASE_MODEL, SHIPPED, SonicConfig
from sonic.doctor import BROKEN, MISSING, OK, Check

# Hides packages from the demo as if they had never been installed.
HIDING = """
import importlib.metadata as metadata, sys
hidden = {hidden!r}
class Hider:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden.values():
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hider())
version = metadata.version
def without(name):
    if name in hidden:
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = without
import sonic_demo
from sonic.flags import run
run(lambda: sonic_demo.main(["--doctor", *sys.argv[1:]]))
"""


def examined(hidden, *arguments):
    """What a process without some packages says: its exit code, stdout and stderr."""
    command = [sys.executable, "-c", HIDING.format(hidden=hidden), *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return ended.returncode, ended.stdout, ended.stderr


def test_where_all_is_there_the_demo_can_run(capsys):
    result = {}
    code = doctor.examine(SonicConfig(), result)
    lines = capsys.readouterr().out.splitlines()
    assert code == 0 and lines[-1] == "the demo can run" and len(lines) == len(result["checks"]) + 1
    states = {check["name"]: check["state"] for check in result["checks"]}
    for name in ("Python", "packages", "faces", "H.264", "AAC", "device", "sonic-mini", "self-test"):
        assert states[name] == OK, name
    assert result["ok"] and not any("\033" in line for line in lines)
    test = next(check for check in result["checks"] if check["name"] == "self-test")
    assert "5 frames by sonic-mini at 2 steps: loaded in" in test["detail"]


@pytest.mark.parametrize(
    ("hidden", "bad"),
    [
        ({"einops": "einops", "PyYAML": "yaml"}, {"einops": MISSING, "PyYAML": MISSING, "self-test": MISSING}),
        ({"torch": "torch"}, {"torch": MISSING, "device": MISSING, "self-test": MISSING, "H.264": OK, "AAC": OK}),
    ],
    ids=["einops", "torch"],
)
def test_without_a_package_it_says_how_to_get_it(hidden, bad):
    code, out, err = examined(hidden, "--json")
    result = json.loads(out)
    checks = {check["name"]: check for check in result["checks"]}
    assert code == 1 and not result["ok"] and "Traceback" not in err and "the demo cannot run" in err
    assert {name: checks[name]["state"] for name in bad} == bad
    for name in hidden:
        assert checks[name]["help"].startswith(f"pip install {name}==")


def test_a_package_that_does_not_import_is_broken(monkeypatch):
    monkeypatch.setattr(doctor, "requirements", lambda text: {"einops": "0.8.2"})
    monkeypatch.setitem(sys.modules, "einops", None)
    broken, summary = doctor.packages()
    assert broken.state == BROKEN and "--force-reinstall" in broken.help and "0 of 1" in summary.detail


def test_what_only_training_needs_does_not_stop_the_demo(monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requirements", lambda text: {"wandb": "1.0", "einops": "0.8.2"})
    monkeypatch.setattr(doctor, "version", version)
    wandb, einops, _ = doctor.packages()
    assert not wandb.needed and "--report_to wandb" in wandb.detail and einops.needed


def test_requirements_of_this_python(monkeypatch):
    text = 'a==1.0\nb-c==2.0; python_version >= "3.11"\nb-c==1.9; python_version < "3.11"\n# d==3\n'
    for minor, pinned in ((10, "1.9"), (11, "2.0"), (12, "2.0")):
        monkeypatch.setattr(doctor.sys, "version_info", (3, minor, 0))
        assert doctor.requirements(text) == {"a": "1.0", "b-c": pinned}
    assert set(doctor.OPTIONAL) <= set(doctor.requirements((ROOT / "requirements.txt").read_text()))


def test_weights_missing_cut_and_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    found = {check.name: check for check in doctor.weights()}
    assert {check.state for check in found.values()} == {MISSING} and not any(c.needed for c in found.values())
    base = found["stable-video-diffusion-img2vid-xt"]
    readme = (ROOT / "checkpoints/README.md").read_text().splitlines()
    assert all(check.help in readme for check in found.values() if check.name != "sonic-mini")
    assert base.help.endswith(BASE_MODEL)

    shutil.copytree(ROOT / SHIPPED, tmp_path / SHIPPED)
    assert next(doctor.weights()).state == OK
    unet = tmp_path / SHIPPED / "unet.safetensors"
    whole = unet.read_bytes()
    for damage in (whole[:-1], whole[:100], b"version https://git-lfs.github.com/spec/v1\n"):
        unet.write_bytes(damage)
        assert (broken := next(doctor.weights())).state == BROKEN and "unet.safetensors" in broken.detail
    unet.unlink()
    assert (gone := next(doctor.weights())).state == MISSING and gone.detail == "unet.safetensors"


def test_damaged_files(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pth")
    save_file({"a": torch.zeros(3), "b": torch.zeros(0)}, tmp_path / "a.safetensors")
    (tmp_path / "b.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:-30])
    (tmp_path / "b.safetensors").write_bytes(b"")
    (tmp_path / "notes.txt").touch()
    damaged = {path.name for path in tmp_path.iterdir() if doctor.is_damaged(path)}
    assert damaged == {"b.pth", "b.safetensors"}


def test_the_model_that_the_flags_name(tiny, tmp_path):
    assert doctor.model(SonicConfig(checkpoint=str(tiny))).state == OK
    gone = doctor.guarded("model", lambda: doctor.model(SonicConfig(checkpoint="gone")), "")
    assert gone.state == BROKEN and "does not exist" in gone.detail


def test_colour_only_on_a_terminal(monkeypatch):
    check = Check("x", OK, "fine")
    assert doctor.line(check) == "ok      x: fine"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[32m" in doctor.line(check)
    monkeypatch.setenv("NO_COLOR", "1")
    assert doctor.line(check) == "ok      x: fine"
