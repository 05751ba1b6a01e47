"""Training on shards: the command exports them, a run streams them, goes on from a checkpoint, and validates on a folder."""

import json
import re
from pathlib import Path

import pytest
import torch
from runs import fresh

import sonic.prepare
import sonic_training
from sonic.config import UserError
from sonic.shard_stream import shard_list
from sonic.training_config import TrainingConfig

pytest.importorskip("webdataset", reason="pip install webdataset")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def shards(tiny, clips, cache, tmp_path_factory) -> str:
    """The puppet clips as shards with the tiny model's features."""
    folder = tmp_path_factory.mktemp("shards")
    command = {"data_root": clips, "cache_dir": cache, "num_frames": 4, "frame_step": 1, "num_workers": 0}
    command |= {"whisper_path": tiny / "whisper", "export_shards": folder, "shard_size": 2}
    sonic.prepare.main([text for name, value in command.items() for text in (f"--{name}", str(value))])
    return str(folder / "shard-{000000..000001}.tar")


def flags(tiny, shards, output, **more) -> list[str]:
    given = {
        "model_path": tiny,
        "data_shards": shards,
        "cache_dir": output / "cache",
        "output_dir": output,
        "learning_rate": 1e-3,
        "max_train_steps": 3,
        "logging_steps": 1,
        "save_steps": 3,
        "validation_steps": 0,
        "num_workers": 0,
        "shard_buffer": 2,
    } | more
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def losses(output) -> dict[int, float]:
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_a_run_on_shards_trains_and_goes_on(tiny, shards, tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    sonic_training.main(flags(tiny, shards, one))
    assert "clips out of 2 shards, 0 held-out clips" in capsys.readouterr().out
    assert (one / "checkpoint-3" / "unet.safetensors").exists() and (one / "config.json").exists()
    fresh()
    sonic_training.main(flags(tiny, shards, two))
    assert losses(one) == losses(two) and all(torch.tensor(list(losses(one).values())).isfinite())
    fresh()
    sonic_training.main(flags(tiny, shards, one, max_train_steps=4, resume_from_checkpoint="latest"))
    assert list(losses(one)) == [1, 2, 3, 4]


def test_a_run_on_cached_latents_out_of_shards(tiny, clips, cache, shards, tmp_path, monkeypatch, capsys):
    """The losses are those of the pictures in the same shards, though neither VAE nor CLIP is loaded."""
    run = {"save_steps": 9, "max_train_steps": 2, "cache_dir": cache}
    fill = flags(tiny, shards, tmp_path / "fill", **run | {"max_train_steps": 1, "data_root": clips})
    del fill[2:4]  # --data_shards: a run on the folder fills the cache
    sonic_training.main([*fill, "--cache_latents"])
    fresh()
    kind = Path(re.search(r"of video in (\S+),", capsys.readouterr().out)[1])
    command = f"--data_root {clips} --cache_dir {cache} --num_frames 4 --frame_step 1 --num_workers 0 --shard_size 2"
    command += f" --whisper_path {tiny}/whisper --export_shards {tmp_path}/shards --shard_latents {kind}"
    sonic.prepare.main(command.split())
    both = f"{tmp_path}/shards/shard-*.tar"
    sonic_training.main(flags(tiny, both, tmp_path / "pictures", crop_per="clip", **run))
    fresh()
    monkeypatch.setattr(sonic_training, "load_base", None)
    sonic_training.main([*flags(tiny, both, tmp_path / "latents", **run), "--cache_latents"])
    fresh()
    pictures, latents = losses(tmp_path / "pictures"), losses(tmp_path / "latents")
    assert list(latents) == [1, 2] and latents == pytest.approx(pictures, rel=1e-4)
    with pytest.raises(UserError, match=f"no latents, and this run needs {kind.name}"):
        sonic_training.main([*flags(tiny, shards, tmp_path / "none", **run), "--cache_latents"])
    fresh()
    with pytest.raises(UserError, match="no latents of mirror images"):
        sonic_training.main([*flags(tiny, both, tmp_path / "flipped", flip=0.5, **run), "--cache_latents"])


def test_a_folder_beside_shards_is_for_validation(tiny, shards, clips, cache, tmp_path, capsys):
    more = {"data_root": clips, "cache_dir": cache, "validation_steps": 2, "max_train_steps": 2}
    sonic_training.main(flags(tiny, shards, tmp_path, **more))
    said = capsys.readouterr().out
    assert "clips out of 2 shards, 3 held-out clips" in said and "validation_loss" in said


def test_a_dry_run_counts_the_shards(tiny, shards, tmp_path, capsys):
    sonic_training.main([*flags(tiny, shards, tmp_path / "out"), "--dry_run"])
    assert f"data: {len(shard_list(shards))} shards" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_train_steps": None}, "give --max_train_steps"),
        ({"init_audio2token": True}, "leave it away with --data_shards"),
        ({"shard_buffer": 0}, "shard_buffer"),
    ],
)
def test_what_does_not_go_with_shards_is_one_sentence(change, words):
    with pytest.raises(UserError, match=words):
        TrainingConfig(**{"data_shards": "x.tar", "max_train_steps": 3} | change)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--export_shards", "x"], "give --whisper_path"),
        (["--whisper_path", "x", "--audio_extractor", "y.py:Z"], "give one of them"),
        (["--shard_latents", "x"], "give --export_shards too"),
    ],
)
def test_what_an_export_needs_is_one_sentence(clips, tmp_path, more, words):
    with pytest.raises(UserError, match=words):
        sonic.prepare.main(["--data_root", str(clips), "--cache_dir", str(tmp_path), *more])
