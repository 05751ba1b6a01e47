"""FSDP2 and DeepSpeed through accelerate, on two CPU processes: the same losses as one process, and checkpoints that go on."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT
from runs import flags, losses, weights

import sonic_training
from sonic import adapters
from sonic.checkpoints import open_checkpoint

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

CONFIGS = sorted((ROOT / "configs/accelerate").glob("*.yaml"))


def sharded(kind, arguments, cwd):
    """Two processes of `sharded_worker.py`; gives what they printed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(
        [*torchrun, ROOT / "tests/sharded_worker.py", kind, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return finished.returncode, finished.stdout + finished.stderr


def checks(output):
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [row["validation_loss"] for row in rows if "validation_loss" in row]


@pytest.fixture(scope="module")
def alone(tiny, clips, cache, tmp_path_factory):
    """Two clips per step, by one process."""
    output = tmp_path_factory.mktemp("alone")
    sonic_training.main(flags(tiny, clips, cache, output, train_batch_size=2, validation_steps=4))
    return output


@pytest.mark.parametrize("kind", ["fsdp2", "zero2"])
def test_two_sharded_processes_train_as_one_does(kind, alone, tiny, clips, cache, tmp_path):
    if kind == "zero2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed (pip install deepspeed)")
    output = tmp_path / "output"
    arguments = flags(tiny, clips, cache, output, validation_steps=4)
    code, printed = sharded(kind, arguments, tmp_path)
    assert code == 0, printed
    assert losses(output).keys() == losses(alone).keys()
    for step, expected in losses(alone).items():
        assert losses(output)[step] == pytest.approx(expected, rel=1e-3 if step > 1 else 1e-5)
    own, single = weights(output / "checkpoint-4"), weights(alone / "checkpoint-4")
    assert {name: value.shape for name, value in own.items()} == {name: value.shape for name, value in single.items()}
    open_checkpoint(output / "checkpoint-4").load()
    for found, expected in zip(checks(output), checks(alone), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
    assert (output / "validation/step-000004.mp4").is_file()

    # Cut after step 2, it goes on to the same end.
    again = tmp_path / "again"
    again.mkdir()
    shutil.copytree(output / "checkpoint-2", again / "checkpoint-2")
    arguments = flags(tiny, clips, cache, again, validation_steps=0, resume_from_checkpoint="latest")
    code, printed = sharded(kind, arguments, tmp_path)
    assert code == 0, printed
    assert "resumed at step 2" in printed
    for step, found in losses(again).items():
        assert found == pytest.approx(losses(output)[step], rel=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer": "muon"}, "--optimizer muon needs whole matrices"),
        ({"ema_decay": 0.99}, "--ema_decay and --use_8bit_adam need whole weights"),
    ],
)
def test_what_a_sharded_model_cannot_do(change, words, tiny, clips, cache, tmp_path):
    code, printed = sharded("fsdp2", flags(tiny, clips, cache, tmp_path / "output", **change), tmp_path)
    assert code != 0 and words in printed


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_configuration(path):
    config = load_config_from_file(str(path))
    content = yaml.safe_load(path.read_text())
    assert config.num_processes == content["num_processes"] and config.num_machines == content["num_machines"]
    assert config.mixed_precision == "no"  # the script's own flag decides


def test_fsdp2_wraps_layers_that_exist(tiny):
    """A name that no layer bears would leave everything in one piece."""
    content = yaml.safe_load((ROOT / "configs/accelerate/8x24gb_fsdp2.yaml").read_text())
    names = content["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"].split(",")
    model = open_checkpoint(tiny).load()
    kinds = {type(module).__name__ for module in model.modules()}
    assert set(names) <= kinds
    assert {adapters.AudioToken.__name__, adapters.AudioBucket.__name__} <= set(names)
    wrapped = sum(
        value.numel() for module in model.modules() if type(module).__name__ in names for value in module.parameters()
    )
    whole = sum(value.numel() for value in model.parameters())
    assert wrapped > 0.7 * whole


def test_frozen_weights_in_half_precision_are_sharded_as_well(tiny, clips, cache, tmp_path):
    """FSDP2 shards a module's weights together; those of one attention are frozen in bf16 and trained in fp32."""
    output = tmp_path / "output"
    arguments = flags(
        tiny, clips, cache, output, train_modules="audio", mixed_precision="bf16", max_train_steps=2, save_steps=2
    )
    code, printed = sharded("fsdp2", arguments, tmp_path)
    assert code == 0, printed
    before, after = weights(tiny), weights(output / "checkpoint-2")
    changed = {name for name in after if not torch.equal(after[name].float(), before[name].float())}
    assert changed and all("_ip." in name or "audio2" in name for name in changed)
