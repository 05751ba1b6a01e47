"""--compile: a compiled UNet gives the same losses, and the same files."""

import pytest
from test_training import flags, fresh_accelerate, losses, weights  # noqa: F401
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

import sonic_training


def compiler() -> str | None:
    try:
        return cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


@pytest.mark.skipif(compiler() is None, reason="torch.compile needs a C++ compiler (apt-get install g++)")
def test_a_compiled_unet_learns_the_same(tiny, clips, cache, tmp_path):
    for name, more in (("eager", {}), ("compiled", {"compile": True})):
        sonic_training.main(flags(tiny, clips, cache, tmp_path / name, max_train_steps=2, **more))
    for step, expected in losses(tmp_path / "eager").items():
        assert losses(tmp_path / "compiled")[step] == pytest.approx(expected, rel=1e-3)
    eager, compiled = (weights(tmp_path / name / "checkpoint-2") for name in ("eager", "compiled"))
    assert {name: value.shape for name, value in eager.items()} == {
        name: value.shape for name, value in compiled.items()
    }
