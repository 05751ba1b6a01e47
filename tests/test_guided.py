"""Branches: what is shared or kept gives what separate calls give."""

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from conftest import TINY

from sonic import pipeline
from sonic.checkpoints import Architecture, load_base, open_checkpoint
from sonic.config import KEY_MEMORY, SonicConfig, UserError
from sonic.denoiser import Denoiser, Portrait
from sonic.guided import Branches, Speech, VideoKeys
from sonic.presets import PRESETS
from sonic.unet import SonicUNet

FRAMES, WINDOW, SIDE = 7, 4, 8
ALL = [[0, 1, 2], [1, 2], [0, 2], [0, 1], [2], [0]]


def denoiser_of(preset=TINY) -> Denoiser:
    torch.manual_seed(0)
    whisper, clip = preset.whisper, preset.image_encoder["projection_dim"]
    sizes = whisper["encoder_layers"] + 1, whisper["d_model"], clip, preset.adapter_hidden, preset.audio_tokens
    denoiser = Architecture(preset.unet, "whisper", *sizes).build().eval().requires_grad_(False)
    for attn in denoiser.unet.cross_attentions():  # else audio and image are heard alike
        torch.nn.init.normal_(attn.processor.to_v_ip[0].weight, std=0.3)
        torch.nn.init.normal_(attn.processor.to_k_ip[0].weight, std=0.3)
    return denoiser


def inputs(preset=TINY, masked=True) -> tuple[Portrait, Speech]:
    generator = torch.Generator().manual_seed(1)
    width, channels = preset.unet["cross_attention_dim"], preset.unet["out_channels"]

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    mask = torch.rand(1, 1, 8 * SIDE, 8 * SIDE, generator=generator) if masked else None
    still = Portrait(random(1, channels, SIDE, SIDE), random(1, width), mask)
    buckets = 60 * torch.rand(FRAMES, 2, generator=generator)
    tokens = random(FRAMES, preset.audio_tokens, width)
    return still, Speech(tokens, random(preset.audio_tokens, width), buckets, fps=12.5)


def one_by_one(denoiser, still, speech, x, sigma, indices, wanted, opposite=(None, None)) -> torch.Tensor:
    """Each branch as a call of its own, through `Denoiser.velocity`, as training computes it."""
    made = []
    for branch in wanted:
        seen = still.kept(torch.tensor([float(branch >= 1)]))
        tokens = speech.tokens[indices] if branch == 2 else speech.silence.expand(len(indices), -1, -1)
        buckets, fps = speech.buckets[indices].mean(0)[None], torch.tensor([speech.fps])
        for column, bucket in enumerate(opposite):
            if branch == 0 and bucket is not None:
                buckets[0, column] = bucket
        made.append(denoiser.velocity(x[None], sigma[None], seen, tokens[None], buckets, fps)[0])
    return torch.stack(made)


@pytest.mark.parametrize("preset", [TINY, PRESETS["mini"]], ids=["attention at once", "attention later"])
@pytest.mark.parametrize("key_memory", [1.0, 0.0], ids=["kept keys", "no keys"])
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
def test_branches_are_what_separate_calls_give(preset, key_memory, masked):
    denoiser, (still, speech) = denoiser_of(preset), inputs(preset, masked)
    x, sigma, indices = torch.randn(WINDOW, *still.latent.shape[1:]), torch.tensor(1.7), [5, 6, 0, 1]
    with torch.inference_mode():
        branches = Branches(denoiser, still, speech, key_memory)
        assert (branches.keys is None) == (key_memory == 0)
        for wanted in ALL:
            expected = one_by_one(denoiser, still, speech, x, sigma, indices, wanted)
            found = branches(x, sigma, indices, wanted)
            assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max()), wanted
        assert not torch.allclose(*one_by_one(denoiser, still, speech, x, sigma, indices, [1, 2]), atol=1e-3)


@pytest.mark.parametrize("key_memory", [1.0, 0.0], ids=["kept keys", "no keys"])
@pytest.mark.parametrize(
    "buckets, contrast, opposite",
    [
        ((30, 20), (0, 1), (None, 48)),
        ((30, 20), (0.5, 1.5), (35, 62)),
        ((100, 100), (2, 0), (0, None)),
        ((5, 5), (0, 4), (None, 128)),
    ],
)
def test_the_branch_without_image_and_audio_has_the_opposite_buckets(buckets, contrast, opposite, key_memory):
    """Opposite as seen from the buckets that the face has by itself."""
    denoiser, (still, speech) = denoiser_of(), inputs()
    speech.buckets[:] = torch.tensor(buckets)
    speech.own_buckets = torch.tensor([40.0, 48.0]).expand(FRAMES, -1)
    x, sigma, indices = torch.randn(WINDOW, *still.latent.shape[1:]), torch.tensor(1.7), [5, 6, 0, 1]
    with torch.inference_mode():
        branches = Branches(denoiser, still, speech, key_memory, contrast)
        for wanted in ALL:
            expected = one_by_one(denoiser, still, speech, x, sigma, indices, wanted, opposite)
            found = branches(x, sigma, indices, wanted)
            assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max()), wanted
        usual = one_by_one(denoiser, still, speech, x, sigma, indices, [0])
        assert not torch.allclose(branches(x, sigma, indices, [0]), usual, atol=1e-3 * usual.abs().max())


def test_buckets_that_nobody_set_are_those_of_all_branches():
    """Contrast and floor are for what is set by hand: without it, sampling is as published."""
    denoiser, (still, speech) = denoiser_of(), inputs()
    speech.buckets[:, 1] = 10
    x, sigma, indices = torch.randn(WINDOW, *still.latent.shape[1:]), torch.tensor(1.7), [5, 6, 0, 1]
    with torch.inference_mode():
        expected = one_by_one(denoiser, still, speech, x, sigma, indices, [0, 1, 2])
        found = Branches(denoiser, still, speech, 1.0, (1.0, 2.0), 24.0)(x, sigma, indices, [0, 1, 2])
    assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize(
    "bucket, own, asked, opposite",
    [(10, 48, 24, 29), (24, 48, 24, 36), (90, 48, 90, 69), (10, 20, 20, 15), (22, 20, 22, 21)],
)
def test_a_bucket_below_the_floor_is_asked_for_as_the_floor(bucket, own, asked, opposite):
    """Or as the face's own, where that is lower. Its opposite stays what it was, and the bucket of the other kind too."""
    denoiser, (still, speech) = denoiser_of(), inputs()
    x, sigma, indices = torch.randn(WINDOW, *still.latent.shape[1:]), torch.tensor(1.7), [5, 6, 0, 1]
    with torch.inference_mode():
        speech.buckets[:] = torch.tensor([5.0, asked])
        expected = one_by_one(denoiser, still, speech, x, sigma, indices, [0, 1, 2], (None, opposite))
        speech.buckets[:] = torch.tensor([5.0, bucket])
        speech.own_buckets = torch.tensor([5.0, own]).expand(FRAMES, -1)
        found = Branches(denoiser, still, speech, 1.0, (0.0, 0.5), 24.0)(x, sigma, indices, [0, 1, 2])
        assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max())


def test_nothing_is_computed_twice(monkeypatch):
    """Before the first cross-attention two of three branches are one; keys are projected once per video."""
    denoiser, (still, speech) = denoiser_of(), inputs()
    batches, projected = [], []
    first = denoiser.unet.down_blocks[0].resnets[0]
    first.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    denoiser.unet.cross_attentions()[0].processor.to_k_ip[0].register_forward_pre_hook(
        lambda _, args: projected.append(args[0].shape)
    )
    with torch.inference_mode():
        branches = Branches(denoiser, still, speech, key_memory=1.0)
        kept = len(projected)
        for indices in ([0, 1, 2, 3], [3, 4, 5, 6]):
            branches(torch.randn(WINDOW, 4, SIDE, SIDE), torch.tensor(1.0), indices, [0, 1, 2])
    assert batches == [2 * WINDOW] * 2
    assert len(projected) == kept == 2  # silence, and the speech


def test_the_memory_that_keys_take_is_told_before(tiny):
    denoiser, (still, speech) = denoiser_of(), inputs()
    told = VideoKeys.gigabytes(denoiser.unet, FRAMES, TINY.audio_tokens, 4)
    branches = Branches(denoiser, still, speech, key_memory=told)
    taken = sum(tensor.nbytes for layer in branches.keys.heard for tensor in layer)
    assert taken / 1e9 == pytest.approx(told)
    assert Branches(denoiser, still, speech, key_memory=0.99 * told).keys is None


def test_the_default_keeps_the_keys_of_short_videos_only():
    """A minute of sonic-mini takes about 1 GB (docs/inference.md), and any length may take a fifth more."""
    mini = PRESETS["mini"]
    one, ten = (
        VideoKeys.gigabytes(SonicUNet(**mini.unet), 1500 * minutes, mini.audio_tokens, 4) for minutes in (1, 10)
    )
    assert one < KEY_MEMORY <= 0.2 < ten


@pytest.mark.parametrize("hooks", [cpu_offload, cpu_offload_with_hook])
def test_weights_may_wait_elsewhere(hooks):
    """accelerate's hooks fetch them when a module is called; what is read otherwise would be found empty."""
    denoiser, waiting, (still, speech) = denoiser_of(), denoiser_of(), inputs()
    hooks(waiting.unet, torch.device("cpu"))
    x, sigma, indices = torch.randn(WINDOW, 4, SIDE, SIDE), torch.tensor(2.0), [2, 3, 4, 5]
    with torch.inference_mode():
        expected, found = (
            Branches(one, still, speech, key_memory=1.0)(x, sigma, indices, [0, 1, 2]) for one in (denoiser, waiting)
        )
    assert torch.equal(found, expected)


def test_level_sizes_are_those_of_the_unet():
    unet = SonicUNet(**PRESETS["mini"].unet)
    assert unet.level_sizes(16, 9) == [(16, 9), (8, 5), (4, 3)]


def test_a_pipeline_without_kept_keys_makes_the_same(tiny):
    """The flag's way through SonicPipeline, and the solver's and the interval's."""
    checkpoint = open_checkpoint(tiny)
    base, (still, speech) = load_base(checkpoint.base_model, torch.float32, torch.float32), inputs()
    still.latent = torch.randn(1, 4, SIDE, SIDE)
    made = {}
    with torch.inference_mode():
        for key_memory in (1.0, 0.0):
            animator = pipeline.Animator(checkpoint.load(), base, torch.device("cpu"), key_memory=key_memory)
            made[key_memory] = animator.latents(still, speech, torch.ones(FRAMES, 4, SIDE, SIDE), TINY.settings)
    assert torch.allclose(made[1.0], made[0.0], atol=1e-4 * made[0.0].abs().max())
    assert pipeline.SonicPipeline(SonicConfig(checkpoint=str(tiny), key_memory=0.5)).animator.key_memory == 0.5


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"solver": "heun"}, "solver must be one of euler, dpmpp_2m"),
        ({"guidance_interval": "5"}, "two noise levels, LOW,HIGH"),
        ({"guidance_interval": "5,2"}, "begin with the lower"),
        ({"guidance_interval": (-1, 2)}, "at least 0"),
        ({"expression_contrast": "all"}, "expression_contrast must be a number at least 0"),
        ({"key_memory": -1}, "key_memory must be a number at least 0"),
        ({"compile": "yes"}, "compile must be True or False"),
    ],
)
def test_wrong_settings_are_named(wrong, said):
    with pytest.raises(UserError, match=said):
        SonicConfig(**wrong)
