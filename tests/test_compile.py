"""--compile: a compiled UNet gives the same losses, the same files, and the same pictures."""

import pytest
import torch
from runs import flags, losses, weights
from test_guided import SIDE, WINDOW, denoiser_of, inputs
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

import sonic_training
from sonic.blocks import compile_unet, lay_out
from sonic.guided import Branches

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


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


@pytest.mark.skipif(compiler() is None, reason="torch.compile needs a C++ compiler (apt-get install g++)")
def test_a_compiled_unet_animates_the_same():
    """--compile, with moving windows and the branches that count."""
    eager, compiled, (still, speech) = denoiser_of(), denoiser_of(), inputs()
    lay_out(compiled.unet)
    compile_unet(compiled.unet, torch.device("cpu"))
    x = torch.randn(WINDOW, 4, SIDE, SIDE)
    with torch.inference_mode():
        calls = [Branches(denoiser, still, speech, key_memory=1.0) for denoiser in (eager, compiled)]
        for indices in ([0, 1, 2, 3], [3, 4, 5, 6]):
            expected, found = (call(x, torch.tensor(1.5), indices, [0, 1, 2]) for call in calls)
            assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max())
