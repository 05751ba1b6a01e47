"""The build of sonic-mini's VAE: its decoder goes on alone, on faces that are cut out together with their latents."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder

from sonic.presets import PRESETS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import mini_vae


def mini_sized() -> AutoencoderKLTemporalDecoder:
    torch.manual_seed(0)
    return AutoencoderKLTemporalDecoder(**PRESETS["mini"].vae)


@pytest.mark.parametrize("lively", [False, True])
def test_a_puppet_and_its_face(lively):
    pictures, faces = mini_vae.puppet_clip(np.random.default_rng(0), 3, 128, lively)
    assert pictures.shape == (3, 128, 128, 3) and pictures.dtype == np.uint8 and faces.shape == (3, 4)
    assert (faces > 0).all() and (faces < 128).all() and (faces[:, 2:] - faces[:, :2] > 30).all()
    weights = mini_vae.face_weights(faces, 128)
    shares = weights.mean((1, 2, 3)).sub(1).div(mini_vae.FACE_WEIGHT - 1).numpy()
    areas = (faces[:, 2:] - faces[:, :2]).prod(1) / 128**2
    assert shares == pytest.approx(areas, rel=0.1)


@pytest.fixture(scope="module")
def lively_faces():
    return mini_vae.LivelyFaces(mini_sized(), seed=0, clips=2)


@pytest.mark.parametrize("frames", [1, 5, 10])
def test_latents_and_pixels_are_cut_out_at_the_same_place(lively_faces, frames):
    grid = torch.arange(128)
    places = torch.stack([grid[:, None].expand(128, 128), grid.expand(128, 128), torch.zeros(128, 128)]).to(torch.uint8)
    lively_faces.pictures = places.expand(2, 10, -1, -1, -1)
    lively_faces.latents = mini_vae.to_pixels(places[:2, ::8, ::8]).expand(2, 10, -1, -1, -1)
    for _ in range(5):
        latents, pixels, weights = lively_faces.around_face(frames)
        assert pixels.shape == (frames, 3, 72, 72) and weights.shape == (frames, 1, 72, 72)
        assert torch.equal(pixels[:, :2, ::8, ::8], latents)
        assert set(weights.unique().tolist()) <= {0, 1, mini_vae.FACE_WEIGHT}
        edge = torch.ones(72, 72, dtype=torch.bool)
        edge[8:-8, 8:-8] = False
        assert (weights[:, 0, edge] == 0).all() and (weights[:, 0, ~edge] == mini_vae.FACE_WEIGHT).float().mean() > 0.5


def test_all_of_it_learns(capsys):
    """As short as this is, unseen pictures are nearer than the best of plain ones."""
    vae = mini_sized()
    mini_vae.train(vae, steps=20, seed=0, clips=2)
    assert not vae.training and "vae step 20 of 20" in capsys.readouterr().out
    pictures = mini_vae.to_pixels(mini_vae.draw(np.random.default_rng(1), 1, 128)[0][0])
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mode()
        made = vae.decode(latents, num_frames=len(pictures)).sample
    assert vae.config.scaling_factor == pytest.approx(1 / latents.std().item(), rel=0.5)
    assert (made - pictures).square().mean() < 0.75 * pictures.var()  # 0.48 and 0.28 with two seeds


def test_the_decoder_alone_learns(capsys):
    """Latents stay what they were, so that nothing trained on them is lost."""
    vae = mini_sized()
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    mini_vae.train_decoder(vae, steps=6, seed=0, clips=1)
    changed = {
        name.partition(".")[0] for name, tensor in vae.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"decoder"} and not vae.training
    assert "decoder step 6 of 6" in capsys.readouterr().out
