"""The sizes of a model: "svd-xt", the real one, and "mini", which a laptop trains."""

from __future__ import annotations

from dataclasses import dataclass

from sonic.config import Settings


@dataclass(frozen=True)
class Preset:
    """A model at one size: its settings and the configurations of its parts, in the libraries' own terms."""

    settings: Settings
    scheduler: dict
    unet: dict
    vae: dict
    image_encoder: dict
    whisper: dict
    adapter_hidden: int  # width of the adapters' hidden layers
    audio_tokens: int  # audio tokens per frame


# SVD's sampler; the same file lies in its scheduler/ folder.
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "sigma_max": 700.0,
    "sigma_min": 0.002,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
}

PRESETS = {
    # The released sizes (SPEC.md section 1; unet_config of the released checkpoint's manifest).
    "svd-xt": Preset(
        settings=Settings(),
        scheduler=SCHEDULER,
        unet={
            "sample_size": 96,
            "in_channels": 8,
            "out_channels": 4,
            "down_block_types": ["CrossAttnDownBlockSpatioTemporal"] * 3 + ["DownBlockSpatioTemporal"],
            "up_block_types": ["UpBlockSpatioTemporal"] + ["CrossAttnUpBlockSpatioTemporal"] * 3,
            "block_out_channels": [320, 640, 1280, 1280],
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 768,
            "layers_per_block": 2,
            "cross_attention_dim": 1024,
            "transformer_layers_per_block": 1,
            "num_attention_heads": [5, 10, 20, 20],
            "num_frames": 25,
        },
        vae={
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "layers_per_block": 2,
            "latent_channels": 4,
            "sample_size": 768,
            "scaling_factor": 0.18215,
            "force_upcast": True,
        },
        image_encoder={  # CLIP ViT-H/14
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "projection_dim": 1024,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "hidden_act": "gelu",
        },
        whisper={"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536},
        adapter_hidden=1024,
        audio_tokens=32,
    ),
    # The same classes at a few million parameters: trains and animates on two CPU cores.
    "mini": Preset(
        settings=Settings(
            num_frames=10,
            frame_step=1,
            resolution=128,
            shift_offset=3,
            num_inference_steps=8,
            guidance_scale_audio=1.8,
            translation_contrast=0.1,
            expression_contrast=3.5,
            expression_floor=28.0,
            decode_chunk_size=10,
            crop=0.5,
        ),
        # Where pictures of this size are decided: over SVD's range, half of the steps change nothing and the others are too long.
        scheduler=SCHEDULER | {"sigma_max": 40.0, "sigma_min": 0.05},
        unet={
            "sample_size": 16,
            "in_channels": 16,
            "out_channels": 8,
            # Attention at 8 x 8 and below: at 16 x 16 it would take two thirds of the time.
            "down_block_types": ["DownBlockSpatioTemporal"] + ["CrossAttnDownBlockSpatioTemporal"] * 2,
            "up_block_types": ["CrossAttnUpBlockSpatioTemporal"] * 2 + ["UpBlockSpatioTemporal"],
            # 64 at least: GroupNorm has 32 groups, and with one channel each it would norm the noise level away.
            "block_out_channels": [64, 64, 64],
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 96,
            "layers_per_block": 1,
            "cross_attention_dim": 64,
            "transformer_layers_per_block": 1,
            "num_attention_heads": [2, 2, 2],
            "num_frames": 10,
        },
        vae={
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": [64, 32, 32, 64],  # 64 at full size: one channel per group would lose colours
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "layers_per_block": 1,
            "latent_channels": 8,  # SVD has 4; 8 leave so small a VAE more room for what makes a face known
            "sample_size": 128,
            "scaling_factor": 0.18215,
            "force_upcast": True,
        },
        image_encoder={
            "hidden_size": 64,
            "intermediate_size": 128,
            "projection_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "hidden_act": "gelu",
        },
        whisper={"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 128},
        adapter_hidden=192,
        audio_tokens=8,
    ),
}
