"""The UNet's own promises; its equality with the published implementation is in test_reference.py."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from diffusers import UNetSpatioTemporalConditionModel

from sonic.unet import AudioCrossAttention, Conditions, Context, SonicUNet

CLIPS, FRAMES, TOKENS, WIDTH = 2, 3, 4, TINY.unet["cross_attention_dim"]


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return SonicUNet(**TINY.unet).eval()


@pytest.fixture
def conditions():
    generator = torch.Generator().manual_seed(1)
    return Conditions(
        torch.randn(CLIPS, FRAMES, 1, WIDTH, generator=generator),
        torch.randn(CLIPS, FRAMES, TOKENS, WIDTH, generator=generator),
        torch.rand(1, 1, 64, 64, generator=generator),
    )


def call(unet, conditions, sample=None):
    if sample is None:
        sample = torch.randn(CLIPS, FRAMES, 8, 8, 8, generator=torch.Generator().manual_seed(2))
    return unet(sample, torch.tensor([0.3, -0.2]), conditions, torch.tensor([[25.0, 40, 60]] * 2), return_dict=False)[0]


def test_audio_attention_starts_as_a_copy(unet):
    attentions = unet.cross_attentions()
    assert len(attentions) == 8  # 1 layer down, 1 mid, 2 up; spatial and temporal
    for attn in attentions:
        assert isinstance(attn.processor, AudioCrossAttention)
        assert torch.equal(attn.processor.to_k_ip[0].weight, attn.to_k.weight)
        assert torch.equal(attn.processor.to_v_ip[0].weight, attn.to_v.weight)


def test_without_audio_attention_it_is_the_stock_unet(unet, conditions):
    """With silent audio projections and one image token for all frames, nothing of Sonic is left."""
    stock = UNetSpatioTemporalConditionModel(**TINY.unet).eval()
    stock.load_state_dict({name: value for name, value in unet.state_dict().items() if ".processor." not in name})
    for attn in unet.cross_attentions():
        torch.nn.init.zeros_(attn.processor.to_v_ip[0].weight)
    token = conditions.image[:, 0]  # [B, 1, D]
    same = Conditions(token[:, None].expand(-1, FRAMES, -1, -1), conditions.audio, conditions.mask)
    with torch.no_grad():
        found = call(unet, same)
        expected = call(stock, token)
    assert torch.allclose(found, expected, atol=1e-5)


def test_one_image_token_needs_no_softmax(unet, conditions):
    attn = unet.cross_attentions()[0]
    context = Context(torch.randn(2, 1, WIDTH), torch.randn(2, TOKENS, WIDTH), torch.rand(2, 9, 1))
    hidden = torch.randn(2, 9, attn.to_q.in_features)
    query = attn.head_to_batch_dim(attn.to_q(hidden), out_dim=4)

    def attend(key, value):
        key, value = (attn.head_to_batch_dim(part, out_dim=4) for part in (key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    seen = attend(attn.to_k(context.image), attn.to_v(context.image))
    heard = attend(attn.processor.to_k_ip[0](context.audio), attn.processor.to_v_ip[0](context.audio))
    expected = attn.to_out[0](seen + context.gate * heard)
    assert torch.allclose(attn.processor(attn, hidden, context), expected, atol=1e-6)


def test_temporal_context_is_the_mean_of_the_window(unet, conditions):
    temporal = conditions.temporal()
    assert torch.allclose(temporal.audio, conditions.audio.mean(1))
    assert torch.allclose(temporal.image, conditions.image.mean(1))
    assert temporal.gate is None


def test_mask_gates_the_audio_and_only_the_audio(unet, conditions):
    ones = torch.ones(1, 1, 64, 64)
    with torch.no_grad():
        open_gate = call(unet, Conditions(conditions.image, conditions.audio, ones))
        no_gate = call(unet, Conditions(conditions.image, conditions.audio, None))
        half_gate = call(unet, conditions)
    assert torch.allclose(open_gate, no_gate, atol=1e-5)
    assert not torch.allclose(half_gate, no_gate, atol=1e-4)


def test_every_trained_parameter_gets_a_gradient(unet, conditions):
    unet.train().freeze_unused()
    call(unet, conditions).square().mean().backward()
    without = [name for name, value in unet.named_parameters() if value.requires_grad and value.grad is None]
    assert without == []
    frozen = [name for name, value in unet.named_parameters() if not value.requires_grad]
    assert len(frozen) == 8 and all(name.endswith("attn2.to_k.weight") for name in frozen)


def gradients(unet, conditions):
    unet.zero_grad()
    call(unet, conditions).square().mean().backward()
    return {name: value.grad.clone() for name, value in unet.named_parameters() if value.grad is not None}


def test_attention_by_products_is_what_the_fused_kernel_gives(unet, conditions, monkeypatch):
    kernel, calls = F.scaled_dot_product_attention, []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *args, **more: calls.append(1) or kernel(*args, **more)
    )
    fused = gradients(unet, conditions)
    assert calls
    calls.clear()
    unet.fuse_attention(False)
    products = gradients(unet, conditions)
    assert not calls
    torch.testing.assert_close(products, fused, rtol=1e-4, atol=1e-6)
    unet.fuse_attention(True)
    assert gradients(unet, conditions).keys() == fused.keys() and calls


def test_gradient_checkpointing_changes_nothing(unet, conditions):
    unet.train()
    plain = gradients(unet, conditions)
    unet.enable_gradient_checkpointing()
    assert any(getattr(module, "gradient_checkpointing", False) for module in unet.modules())
    checkpointed = gradients(unet, conditions)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-6) for name in plain)
