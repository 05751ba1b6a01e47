"""--compile: a compiled UNet gives the same losses and the same files; the same pictures are in test_reference.py."""

import pytest
import torch
from runs import flags, losses, weights
from torch._inductor import cpp_builder, exc

import sonic_training
from sonic.blocks import require_compiler
from sonic.config import UserError

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_a_compiled_unet_learns_the_same(tiny, clips, cache, tmp_path, compiler):
    for name, more in (("eager", {}), ("compiled", {"compile": True})):
        sonic_training.main(flags(tiny, clips, cache, tmp_path / name, max_train_steps=2, **more))
    for step, expected in losses(tmp_path / "eager").items():
        assert losses(tmp_path / "compiled")[step] == pytest.approx(expected, rel=1e-3)
    eager, compiled = (weights(tmp_path / name / "checkpoint-2") for name in ("eager", "compiled"))
    assert {name: value.shape for name, value in eager.items()} == {
        name: value.shape for name, value in compiled.items()
    }


def test_where_it_cannot_work_it_is_said_at_once(monkeypatch):
    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    monkeypatch.setattr(torch, "__path__", ["/opt/torch"])
    with pytest.raises(UserError, match="apt-get install g"):
        require_compiler(torch.device("cpu"))
    monkeypatch.setattr(torch, "__path__", ["/opt/my programs/torch"])
    with pytest.raises(UserError, match="a path with a space"):
        require_compiler(torch.device("cpu"))
    require_compiler(torch.device("cuda"))
