"""Equality with tensors that the published inference implementation produced from random weights (SPEC.md section 8).

Every case folder of `tests/reference/`, or of the folder that SONIC_REFERENCE_DIR names, is run in fp32.
"""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from sonic import pictures, sound
from sonic.adapters import AudioBucket, AudioToken
from sonic.animator import Animator
from sonic.audio import WhisperFeatures, frame_ticks, long_windows, short_windows
from sonic.blocks import compile_unet, lay_out
from sonic.checkpoints import PARTS, Architecture, BaseModels
from sonic.config import KEY_MEMORY, Settings
from sonic.denoiser import Denoiser, Portrait
from sonic.faces import square_crop
from sonic.guided import Speech
from sonic.offload import place
from sonic.portrait import prepare_portrait
from sonic.presets import PRESETS
from sonic.processes import Processes
from sonic.sampling import noise_levels, windows
from sonic.unet import Conditions, SonicUNet
from sonic.weights import load_strict

ROOT = Path(os.environ.get("SONIC_REFERENCE_DIR") or Path(__file__).parent / "reference")
SAMPLER = sorted(path.parent for path in ROOT.glob("*/sampler_call.safetensors"))
PREPROCESS = sorted(path.parent for path in ROOT.glob("*/expected.safetensors"))
assert SAMPLER or PREPROCESS, f"{ROOT} holds no reference case"


def cases(folders):
    return pytest.mark.parametrize("folder", folders, ids=[folder.name for folder in folders])


def error(found, expected):
    """Largest difference over the largest reference magnitude."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


class Case:
    """A case folder's configuration and its models, loaded as the project loads them."""

    def __init__(self, folder):
        self.folder, self.config = folder, json.loads((folder / "config.json").read_text())

    def call(self, name):
        return load_file(self.folder / f"{name}.safetensors")

    def model(self, name, module):
        load_strict(module, self.call(name), self.folder / name)
        return module.eval().requires_grad_(False)

    @property
    def unet(self):
        return self.model("unet", SonicUNet(**self.config["unet"]))

    @property
    def audio2token(self):
        sizes = self.config["audio2token"]
        shape = (sizes["blocks"], sizes["channels"], sizes["intermediate_dim"], sizes["output_dim"])
        return self.model("audio2token", AudioToken(*shape, sizes["context_tokens"]))

    @property
    def audio2bucket(self):
        sizes = self.config["audio2bucket"]
        outputs = sizes["output_dim"] * sizes["context_tokens"]
        bucket = AudioBucket(sizes["channels"], sizes["clip_channels"], sizes["intermediate_dim"], outputs)
        return self.model("audio2bucket", bucket)

    @property
    def image_encoder(self):
        config = CLIPVisionConfig.from_dict(self.config["image_encoder"])
        return self.model("image_encoder", CLIPVisionModelWithProjection(config))

    @property
    def base(self):
        vae = self.model("vae", AutoencoderKLTemporalDecoder(**self.config["vae"]))
        return BaseModels(vae, self.image_encoder, EulerDiscreteScheduler(**self.config["scheduler"]))


@cases(SAMPLER)
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
def test_unet_call(folder, masked):
    case = Case(folder)
    call = case.call("unet_call")
    clips, frames = call["sample"].shape[:2]
    conditions = Conditions(
        call["image_embeds"].unflatten(0, (clips, frames)),
        call["audio_tokens"].unflatten(0, (clips, frames)),
        call["face_mask"] if masked else None,
    )
    with torch.no_grad():
        found = case.unet(call["sample"], call["timestep"], conditions, call["added_time_ids"], return_dict=False)[0]
    assert error(found, call["output" if masked else "output_without_mask"]) <= 2e-5


@cases(SAMPLER)
def test_adapters(folder):
    case = Case(folder)
    call = case.call("adapters_call")
    assert error(case.audio2token(call["whisper_windows"]), call["tokens"]) <= 2e-5
    clip = call["clip_embeds"][:, None]
    audio2bucket = case.audio2bucket
    assert error(audio2bucket(call["last_hidden_windows"], clip), call["raw_output"].flatten(2)) <= 2e-5
    assert error(audio2bucket.buckets(call["last_hidden_windows"], clip), call["buckets"].flatten(2)) <= 2e-5


def check_sampler(case, offload="none", key_memory=KEY_MEMORY, compiled=False):
    """The denoised latents and the video are the published ones, made as a pipeline with these flags makes them.

    Under a launcher several processes make them together (`tests/test_several_processes.py`).
    """
    call, sampler = case.call("sampler_call"), case.config["sampler"]
    assert (sampler["strength"], sampler["noise_aug_strength"]) == (1, 0)  # all that the method does
    denoiser, base, cpu = Denoiser(case.unet, case.audio2token, case.audio2bucket), case.base, torch.device("cpu")
    steps, window, overlap = (sampler[name] for name in ("num_inference_steps", "frames_per_window", "overlap"))
    sigmas = noise_levels(base.scheduler, steps)
    assert error(sigmas, call["sigmas"]) <= 1e-6
    assert error(base.scheduler.timesteps, call["timesteps"]) <= 1e-6
    lay_out(denoiser.unet)
    place(denoiser, base, cpu, offload)
    if compiled:
        compile_unet(denoiser.unet, cpu)
    processes = Processes.started("cpu")
    animator = Animator(denoiser, base, cpu, processes=processes, previews=offload == "none", key_memory=key_memory)
    calls, predict = [], denoiser.predict
    denoiser.predict = lambda *arguments: calls.append(arguments[3]) or predict(*arguments)
    settings = Settings(
        num_frames=window,
        shift_offset=sampler["shift_offset"],
        overlap=overlap,
        num_inference_steps=steps,
        guidance_scale_image=sampler["image_guidance_scale"],
        guidance_scale_audio=sampler["audio_guidance_scale"],
        decode_chunk_size=sampler["decode_chunk_size"],
    )
    with torch.no_grad():
        still = Portrait(
            latent=base.vae.encode(call["reference_image"]).latent_dist.mode(),
            clip=base.image_encoder(call["clip_image"]).image_embeds,
            mask=call["face_mask"],
        )
        buckets = call["motion_buckets"] * sampler["motion_bucket_scale"]
        speech = Speech(call["audio_tokens"], call["uncond_audio_tokens"], buckets, sampler["fps"])
        latents = animator.latents(still, speech, call["noise"][0], settings)
        video = torch.cat(list(animator.decode_pixels(latents, settings.decode_chunk_size)))
    assert error(latents, call["output_latents"][0]) <= 1e-4
    assert error(video, call["output_video"][0].transpose(0, 1)) <= 1e-3
    planned = len(windows(len(speech), window, overlap, 0))
    assert len(calls) == steps * math.ceil(planned / processes.count)
    assert all((conditions.projections is None) == (key_memory == 0) for conditions in calls)


@cases(SAMPLER)
@pytest.mark.parametrize(
    "flags",
    [{}, {"key_memory": 0}, {"offload": "model"}, {"offload": "sequential"}],
    ids=["eager", "no_kept_keys", "model_offload", "sequential_offload"],
)
def test_sampler(folder, flags):
    check_sampler(Case(folder), **flags)


@cases(sorted(SAMPLER, key=lambda folder: (folder / "unet.safetensors").stat().st_size)[:1])
def test_sampler_compiled(folder, compiler):
    """--compile, of the smallest case: on a CPU compiling takes a minute."""
    check_sampler(Case(folder), compiled=True)


@cases(PREPROCESS)
def test_portrait(folder):
    case = Case(folder)
    expected, config = case.call("expected"), case.config
    x, y, width, height = config["face_box_xywh"]
    box = (x, y, x + width, y + height)
    image = pictures.load_image(folder / "portrait.png")
    clip_size = config["image_encoder"]["image_size"]
    portrait = prepare_portrait(image, config["image_size"], box, clip_size=clip_size)
    for found, name in (
        (portrait.pixels, "reference_image"),
        (portrait.clip_pixels, "clip_image"),
        (portrait.mask, "face_mask"),
    ):
        assert found.shape == expected[name].shape
        assert (found - expected[name]).abs().max() <= 1e-5, name
    assert list(square_crop(box, 0.5, image.width, image.height)) == config["crop_box_expand_0_5"]


@cases(PREPROCESS)
def test_speech(folder):
    case = Case(folder)
    expected, config = case.call("expected"), case.config
    with init_empty_weights():
        encoder = WhisperEncoder(WhisperConfig.from_dict(config["whisper"]))
    extractor = WhisperFeatures(case.model("whisper_encoder", encoder))
    speech = sound.load_audio(folder / "speech.wav")
    features = extractor(speech)
    assert len(features) == 2 * config["audio_len_25fps"] == 2 * (len(speech) // 640)
    ticks = frame_ticks(features, config["frame_step"])
    assert len(ticks) == config["frames"]

    audio2token = case.audio2token
    tokens = audio2token(short_windows(features, ticks))
    assert (tokens - expected["audio_tokens"]).abs().max() <= 1e-4
    silence = audio2token.silence().expand_as(tokens)
    assert (silence - expected["uncond_audio_tokens"]).abs().max() <= 1e-4
    with torch.no_grad():
        clip = case.image_encoder(expected["clip_image"][None]).image_embeds.expand(len(ticks), -1)
        buckets = case.audio2bucket.buckets(long_windows(features, ticks), clip)
    assert (buckets - expected["motion_buckets"]).abs().max() <= 1e-3


MANIFEST = json.loads((Path(__file__).parent / "reference/official_checkpoint_manifest.json").read_text())


def test_released_names_and_shapes():
    """Our models at release size have exactly the released files' tensors, by name and shape."""
    preset = PRESETS["svd-xt"]
    layers = preset.whisper["encoder_layers"] + 1
    sizes = (layers, preset.whisper["d_model"], preset.image_encoder["projection_dim"])
    with torch.device("meta"):
        denoiser = Architecture(MANIFEST["unet_config"], "whisper", *sizes).build()
    for part in PARTS:
        found = {name: list(tensor.shape) for name, tensor in getattr(denoiser, part).state_dict().items()}
        assert found == MANIFEST["tensors"][f"{part}.pth"]
    assert {key: preset.unet[key] for key in MANIFEST["unet_config"]} == MANIFEST["unet_config"]
