"""What several tests share: a model of the smallest size that has every part, and puppet clips to train it on."""

import shutil
import signal
from pathlib import Path

import pytest
import soundfile
import torch

from sonic.checkpoints import create_checkpoint
from sonic.config import Settings, UserError
from sonic.presets import SCHEDULER, Preset

# As in a terminal. A shell's background ignores Ctrl-C from the start, and so would these tests and what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the tiny model has nothing to share out; more threads only wait for each other

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

TINY = Preset(
    settings=Settings(
        num_frames=4,
        frame_step=1,
        resolution=64,
        shift_offset=1,
        num_inference_steps=2,
        guidance_scale_audio=3.0,
        decode_chunk_size=4,
        crop=0.5,
    ),
    scheduler=SCHEDULER,
    unet={
        "sample_size": 8,
        "in_channels": 8,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"],
        "up_block_types": ["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"],
        "block_out_channels": [64, 64],  # with 32, one channel per norm group, the time embedding would be normed away
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24,
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "num_attention_heads": [1, 2],
        "num_frames": 4,
    },
    vae={
        "block_out_channels": [32, 32, 32, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "layers_per_block": 1,
        "latent_channels": 4,
        "sample_size": 64,
        "scaling_factor": 0.18215,
        "force_upcast": True,
    },
    image_encoder={
        "hidden_size": 16,
        "intermediate_size": 16,
        "projection_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    whisper={"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16},
    adapter_hidden=32,
    audio_tokens=4,
)


# A user's own audio features, as a file of theirs would hold them.
OWN_FEATURES = """
import numpy as np, torch

class Energy:
    name, layers, width = "energy", 1, 2

    def __call__(self, speech):
        ticks = len(speech) // 640
        steps = torch.from_numpy(speech[: ticks * 640]).reshape(2 * ticks, 320)
        return torch.stack([steps.square().mean(1), steps.abs().mean(1)], 1)[:, None]
"""


def voice(tmp_path_factory, ticks: int, first: int = 0) -> Path:
    """A WAV of so many ticks (1/25 s) of the example speech, from its sample `first` on."""
    path = tmp_path_factory.mktemp("speech") / "voice.wav"
    samples, rate = soundfile.read(EXAMPLES / "audio.wav")
    soundfile.write(path, samples[first : first + ticks * 640], rate)
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A checkpoint folder of ours with random weights. Tests must not change it."""
    folder = tmp_path_factory.mktemp("tiny") / "sonic-tiny"
    create_checkpoint(folder, TINY)
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A data folder with three puppet clips, one of them nested."""
    folder = tmp_path_factory.mktemp("clips")
    for index, name in enumerate(("one.mp4", "two.mp4", "nested/three.mp4")):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(EXAMPLES / f"clips/puppet_{index:04d}.mp4", folder / name)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A preparation cache that the training tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def fresh_accelerate():
    """Every run of a test is the first of its process."""
    from runs import fresh  # late, as below: few tests need what it imports

    yield
    fresh()


@pytest.fixture(scope="module")
def parts(tiny, clips, cache):
    """Start, configuration, data and encoders of a run, without the run."""
    from runs import make_parts

    return make_parts(tiny, clips, cache)


@pytest.fixture
def compiler():
    """Skips what torch.compile cannot do here."""
    from sonic.blocks import require_compiler  # late: few tests need it

    try:
        require_compiler(torch.device("cpu"))
    except UserError as error:
        pytest.skip(str(error))
