"""The public Python API of Sonic.

from sonic_implementation import SonicConfig, SonicPipeline, extract_audio_features, save_video

config = SonicConfig()                             # the shipped sonic-mini; SonicConfig(checkpoint="checkpoints/Sonic") for more
pipeline = SonicPipeline(config)
video = pipeline.generate(
    reference_image=cv2.imread("portrait.jpg"),    # BGR as cv2 reads it; paths and PIL images work too
    audio_features=extract_audio_features("audio.wav", config),
    num_frames=25,
    motion_buckets={"translation": 64, "expression": 96},
)
save_video(video, "output.mp4")
"""

from sonic.audio import AudioExtractor
from sonic.config import SonicConfig, UserError
from sonic.in_and_out import AudioFeatures, SonicVideo, extract_audio_features, save_video
from sonic.pipeline import SonicPipeline

__all__ = [
    "AudioExtractor",
    "AudioFeatures",
    "SonicConfig",
    "SonicPipeline",
    "SonicVideo",
    "UserError",
    "extract_audio_features",
    "save_video",
]
