"""--compile: a compiled UNet gives the same losses and the same files; the same pictures are in test_reference.py."""

import pytest
from runs import flags, losses, weights

import sonic_training

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
