"""Cached latents: the same numbers as without, made once, shared by processes, and nothing loaded or decoded after that."""

import json
import shutil
import threading
import time
from dataclasses import replace

import psutil
import pytest
import torch
from conftest import EXAMPLES
from runs import finish, flags, losses, start
from safetensors.torch import load_file, save_file
from torch.utils.data import default_collate

import sonic.latents
import sonic.prepare
import sonic_training
from sonic.checkpoints import BaseSizes, load_base, load_whisper, open_checkpoint
from sonic.config import Settings, UserError
from sonic.dataset import clip_square
from sonic.latents import LatentFiles, cache_latents, gb_per_hour
from sonic.media import VideoReader, save_video
from sonic.prepare import prepare
from sonic.sound import load_audio
from sonic.training import Encoders, with_model_defaults
from sonic.training_config import TrainingConfig
from sonic.validation import Validation
from sonic.workers import Share

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

CPU = torch.device("cpu")
TICKS = 26
STEPS = {"max_train_steps": 4, "save_steps": 4, "flip": 0.5}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three pieces of a second: what is slow here is pictures."""
    folder = tmp_path_factory.mktemp("videos")
    for name in ("a", "b", "c"):
        with VideoReader(EXAMPLES / f"clips/puppet_000{'abc'.index(name)}.mp4") as reader:
            frames = reader.read(range(TICKS))
        sound = load_audio(reader.path)[: TICKS * 640]
        save_video(frames, folder / f"{name}.mp4", 25, sound)
    return folder


@pytest.fixture(scope="module")
def prepared(tiny, videos, tmp_path_factory):
    """A cache with tracks and features, and no latents."""
    cache = tmp_path_factory.mktemp("prepared")
    prepare(videos, cache, load_whisper(tiny / "whisper"), num_frames=4, frame_step=1, progress=False)
    return cache


@pytest.fixture
def fresh(prepared, tmp_path):
    """The same, for one test alone."""
    return shutil.copytree(prepared, tmp_path / "cache")


@pytest.fixture
def clips(tiny, videos, fresh):
    """The prepared clips, whose features lie in `fresh`."""
    return prepare(videos, fresh, load_whisper(tiny / "whisper"), num_frames=4, frame_step=1, progress=False).clips


def settings(**more):
    given = {"data_root": "x", "num_frames": 4, "frame_step": 1, "resolution": 64, "num_workers": 0, **more}
    return with_model_defaults(TrainingConfig(**given), Settings())


def cached(clips, fresh, tiny, dtype=torch.float32, share=None, **more):
    config = settings(cache_latents=True, **more)
    return config, cache_latents(clips, config, tiny / "base", fresh, dtype, CPU, share or Share())


def files_in(cache):
    return sorted(path for path in (cache / "latents").rglob("*.safetensors"))


@pytest.fixture(scope="module")
def plain(tiny, videos, prepared, tmp_path_factory):
    """A run without cached latents, on the pictures that they are of."""
    output = tmp_path_factory.mktemp("plain")
    more = {**STEPS, "crop_per": "clip", "validation_steps": 4}
    sonic_training.main(flags(tiny, videos, prepared, output, **more))
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_from_the_cache_are_those_that_are_encoded(clips, fresh, tiny, monkeypatch, dtype):
    """Bit for bit; the embeddings, which the cache makes many at a time, to the last digits. Windows cross files' borders."""
    monkeypatch.setattr(sonic.latents, "PART_TICKS", 7)
    for step in (1, 2):
        config, stored = cached(clips, fresh, tiny, dtype, flip=0.5, frame_step=step)
        encoders = Encoders(load_base(tiny / "base", dtype, dtype), CPU)
        samples, expected = stored.dataset(clips, config), encoders.dataset(clips, config)
        assert {samples._mirrored(number) for number in range(6)} == {False, True}
        for numbers in ((0, 1, 2), (3,), (4, 5)):
            batch = default_collate([samples[number] for number in numbers])
            other = default_collate([expected[number] for number in numbers])
            found, wanted = stored(batch), encoders(other)
            assert torch.equal(found.latents, wanted.latents) and found.latents.dtype == torch.float32
            assert torch.equal(found.portrait.latent, wanted.portrait.latent)
            assert torch.allclose(found.portrait.clip, wanted.portrait.clip, rtol=1e-5, atol=1e-5)
            for name in ("short_windows", "long_windows", "buckets", "fps"):
                assert torch.equal(getattr(found, name), getattr(wanted, name))
            assert torch.equal(found.portrait.mask, wanted.portrait.mask)
            assert torch.equal(batch["lips"], other["lips"]) and batch["name"] == other["name"]
            assert not {"frames", "clip_pixels"} & set(batch)
            assert torch.equal(samples.frames(numbers[0]), other["frames"][0])  # for the validation's video
    names = [path.name for path in files_in(fresh)]
    assert len(names) == 2 * sum(-(-clip.num_ticks // 7) for clip in clips)
    assert {tensor.dtype for tensor in load_file(files_in(fresh)[0]).values()} == {dtype}


def test_a_part_of_a_clip_reads_the_whole_clips_latents(clips, fresh, tiny):
    config, stored = cached(clips, fresh, tiny)
    part = clips[0].part(5, 24).part(2, 18)
    assert clip_square(part) == clip_square(clips[0]) and part.whole is clips[0]
    read = stored.files.read
    assert torch.equal(read(part, "latents", 3, 9, False), read(clips[0], "latents", 10, 16, False))
    assert stored.dataset([part], config)[3]["latents"].shape == (4, 4, 8, 8)


def test_training_gives_the_losses_of_a_run_without(plain, fresh, tiny, videos, tmp_path):
    output = tmp_path / "output"
    sonic_training.main(flags(tiny, videos, fresh, output, cache_latents=True, validation_steps=4, **STEPS))
    for step, expected in losses(plain).items():
        assert losses(output)[step] == pytest.approx(expected, rel=1e-5 if step == 1 else 1e-4)
    one, other = (
        [row for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "validation_loss" in row]
        for run in (plain, output)
    )
    assert [row["step"] for row in other] == [0, 4]
    for found, expected in zip(other, one, strict=True):
        assert found == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in expected.items()}
    shown = []
    for run in (plain, output):
        with VideoReader(run / "validation/step-000004.mp4") as video:
            shown.append(video.read([0, video.num_ticks - 1])[:, :, :64].astype(int))
    assert abs(shown[0] - shown[1]).mean() < 0.5  # the truth's half; the coder sees the other half too
    assert json.loads((output / "config.json").read_text())["crop_per"] == "clip"


def test_nothing_is_loaded_and_no_video_read_once_all_is_cached(plain, fresh, tiny, videos, tmp_path, monkeypatch):
    """The encoders' weights may be gone even, and the pictures unreadable."""
    model = shutil.copytree(tiny, tmp_path / "model")
    sonic_training.main(flags(model, videos, fresh, tmp_path / "one", cache_latents=True, **STEPS))
    made = [(path, path.stat().st_mtime_ns) for path in files_in(fresh)]
    assert len(made) == 6
    for weights in ("base/vae", "base/image_encoder", "whisper"):
        for path in (model / weights).glob("*.safetensors"):
            path.unlink()

    def forbidden(*arguments, **named):
        raise AssertionError("not needed any more")

    for where in ("sonic.latents.load_base", "sonic_training.load_base", "sonic.checkpoints.load_whisper"):
        monkeypatch.setattr(where, forbidden)
    monkeypatch.setattr(VideoReader, "__init__", forbidden)
    sonic_training.main(flags(model, videos, fresh, tmp_path / "two", cache_latents=True, **STEPS))
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    assert made == [(path, path.stat().st_mtime_ns) for path in files_in(fresh)]
    monkeypatch.undo()
    with pytest.raises(UserError, match="no weights in"):  # another size must be encoded, which needs them
        sonic_training.main(
            flags(model, videos, fresh, tmp_path / "three", cache_latents=True, resolution=128, **STEPS)
        )


def test_validation_loads_models_for_its_video_alone(clips, fresh, tiny, monkeypatch):
    config, stored = cached(clips, fresh, tiny)
    monkeypatch.setattr(sonic.latents, "load_base", lambda *arguments: pytest.fail("loaded"))
    start = open_checkpoint(tiny)
    model = start.load().eval()
    assert Validation(clips, config, start.settings, stored).measure(model)["validation_loss"] > 0
    monkeypatch.undo()
    assert stored.models().vae.config.scaling_factor == stored.files.sizes.scaling_factor


class Threads:
    """Two shares of one work, each in a thread of its own, which wait for each other as processes do."""

    def __init__(self, monkeypatch, count=2):
        # accelerate's empty weights are one switch for a whole process, so two threads must not throw it at once.
        lock, load, sizes = threading.Lock(), sonic.latents.load_base, BaseSizes.of

        def alone(function):
            def locked(*arguments):
                with lock:
                    return function(*arguments)

            return locked

        monkeypatch.setattr(sonic.latents, "load_base", alone(load))
        monkeypatch.setattr(BaseSizes, "of", alone(sizes))
        self.barrier, self.items, self.count = threading.Barrier(count, timeout=60), {}, count

    def share(self, index):
        def gather(items):
            self.items[index] = list(items)
            self.barrier.wait()
            together = [item for number in range(self.count) for item in self.items[number]]
            self.barrier.wait()
            return together

        return Share(index, self.count, gather)

    def run(self, work):
        """What `work(share)` gives for each share."""
        results = {}

        def one(index):
            threading.current_thread().index = index
            results[index] = work(self.share(index))

        threads = [threading.Thread(target=one, args=(index,)) for index in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[index] for index in range(self.count)]


def test_shares_are_disjoint_and_complete(clips, fresh, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sonic.latents, "PART_TICKS", 16)
    written, write = [], LatentFiles.write

    def noted(self, path, *tensors):
        written.append((threading.current_thread().index, path.name))
        write(self, path, *tensors)

    monkeypatch.setattr(LatentFiles, "write", noted)
    both = Threads(monkeypatch).run(lambda share: cached(clips, fresh, tiny, share=share, flip=0.5)[1])
    names = [name for _, name in written]
    assert len(names) == len(set(names)) == 12 and {index for index, _ in written} == {0, 1}
    assert sorted(names) == [path.name for path in files_in(fresh)]
    assert both[0].clips == both[1].clips == clips and both[0].files == both[1].files

    monkeypatch.setattr(LatentFiles, "write", write)
    alone = shutil.copytree(fresh, tmp_path / "alone", ignore=shutil.ignore_patterns("latents"))
    cached(clips, alone, tiny, flip=0.5)
    for one, other in zip(files_in(fresh), files_in(alone), strict=True):
        assert one.name == other.name and one.read_bytes() == other.read_bytes()


def test_preparation_is_shared_too(tiny, videos, tmp_path, monkeypatch):
    looked, look = [], sonic.prepare.measure

    def noted(path):
        looked.append((threading.current_thread().index, path.name))
        return look(path)

    monkeypatch.setattr(sonic.prepare, "measure", noted)
    folder = shutil.copytree(videos, tmp_path / "videos")
    (folder / "bad.mp4").write_text("no video")

    whisper = load_whisper(tiny / "whisper")

    def work(share):
        sizes = {"num_frames": 4, "frame_step": 1, "progress": False}
        return prepare(folder, tmp_path / "cache", whisper, share=share, **sizes)

    one, other = Threads(monkeypatch).run(work)
    assert sorted(looked) == [(0, "a.mp4"), (0, "bad.mp4"), (1, "b.mp4"), (1, "c.mp4")]
    assert [clip.name for clip in one.clips] == [clip.name for clip in other.clips] == ["a.mp4@0", "b.mp4@0", "c.mp4@0"]
    assert one.left_out == other.left_out and [name for name, _ in one.left_out] == ["bad.mp4"]
    assert one.report == other.report and (one.report.tracks_made, one.report.features_made) == (4, 3)

    for path in (tmp_path / "cache/tracks").glob("b-*"):  # one process's disk is not the other's
        path.unlink()
    keys = {"a.mp4": "a", "b.mp4": "b", "c.mp4": "c"}
    pieces = {name: [piece for piece in one.pieces if piece.video == name] for name in keys}
    outcome = [(name, (key, 100, pieces[name])) for name, key in keys.items()]
    elsewhere = Share(0, 2, lambda items: outcome if isinstance(items[0], tuple) else items)
    with pytest.raises(UserError, match="give one that all machines see"):
        work(elsewhere)


def torchrun(arguments, tmp_path):
    """Two CPU processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return start(arguments, tmp_path, launcher, CUDA_VISIBLE_DEVICES="")


def test_two_processes_killed_while_caching(tiny, videos, fresh, tmp_path):
    """What was written stays, and a restart with two makes the rest: the losses are those of one process."""
    more = {**STEPS, "max_train_steps": 2, "cache_latents": True, "resolution": 128}
    process = torchrun(flags(tiny, videos, fresh, tmp_path / "two", **more), tmp_path)
    until = time.monotonic() + 120
    while not files_in(fresh) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in files_in(fresh)}
    assert 0 < len(kept) < 6, (tmp_path / "printed.txt").read_text()
    assert all(load_file(path)["latents"].shape[0] == TICKS for path in kept)

    printed = finish(torchrun(flags(tiny, videos, fresh, tmp_path / "two", **more), tmp_path), tmp_path)
    assert len(files_in(fresh)) == 6 and printed.count("GB are to be made") == 2
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    sonic_training.main(flags(tiny, videos, fresh, tmp_path / "one", **more | {"train_batch_size": 2}))
    for step, expected in losses(tmp_path / "one").items():
        assert losses(tmp_path / "two")[step] == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_damaged_files_are_made_again(clips, fresh, tiny):
    config, stored = cached(clips, fresh, tiny)
    path = files_in(fresh)[0]
    whole, right = path.read_bytes(), load_file(path)
    right = {name: tensor.clone() for name, tensor in right.items()}
    for damage in (
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(whole[:-9]),
        lambda: save_file({"latents": right["latents"]}, path),
        lambda: save_file(right | {"latents": right["latents"][:-1].clone()}, path),
        lambda: save_file({name: tensor.half() for name, tensor in right.items()}, path),
    ):
        damage()
        cached(clips, fresh, tiny)
        assert path.read_bytes() == whole
    path.unlink()
    with pytest.raises(UserError, match="start again, and it is made anew"):
        for number in range(3):
            stored.dataset(clips, config)[number]


def test_a_clip_that_cannot_be_read_is_left_out_and_named(clips, fresh, tiny, videos, monkeypatch, capsys):
    readable = shutil.copytree(videos, fresh / "videos")
    moved = [replace(clip, path=readable / clip.path.name) for clip in clips]
    (readable / "b.mp4").write_bytes((readable / "b.mp4").read_bytes()[:5000])
    _, stored = cached(moved, fresh, tiny)
    assert [clip.name for clip in stored.clips] == ["a.mp4@0", "c.mp4@0"]
    printed = capsys.readouterr().out
    assert "1 clips left out" in printed and "'b.mp4@0'" in printed
    both = Threads(monkeypatch).run(lambda share: cached(moved, fresh, tiny, share=share)[1])
    assert [clip.name for clip in both[0].clips] == [clip.name for clip in both[1].clips] == ["a.mp4@0", "c.mp4@0"]
    with pytest.raises(UserError, match=r"no clip can be encoded, 'b.mp4@0' for one"):
        cached(moved[1:2], fresh, tiny)


def test_no_room_on_the_disk(clips, fresh, tiny, monkeypatch, capsys):
    usage = shutil.disk_usage(fresh)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        UserError, match=r"latents need 0\.0 GB more, .* 0\.0 GB left: give a --cache_dir with more room"
    ):
        cached(clips, fresh, tiny)
    assert not files_in(fresh) and "0.000 GB for 0.1 minutes" in capsys.readouterr().out
    monkeypatch.undo()
    cached(clips, fresh, tiny)
    size = sum(path.stat().st_size for path in files_in(fresh))
    hours = sum(clip.num_ticks for clip in clips) / 25 / 3600
    assert size / 1e9 == pytest.approx(gb_per_hour(settings(), tiny / "base", torch.float32) * hours, rel=0.02)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    cached(clips, fresh, tiny)  # all is there


def test_what_the_key_depends_on(clips, fresh, tiny, tmp_path):
    def folder(base=tiny / "base", dtype=torch.float32, **more):
        config = settings(cache_latents=True, **more)
        return sonic.latents._folder(fresh, config, base, dtype, Share()).name

    moved = shutil.copytree(tiny / "base", tmp_path / "moved", copy_function=shutil.copyfile)
    written = json.loads((moved / "vae/config.json").read_text())
    (moved / "vae/config.json").write_text(json.dumps(written | {"_name_or_path": "elsewhere"}))
    assert folder() == folder(moved)  # what the files hold counts, not where they lie, nor who wrote them
    others = {folder(), folder(dtype=torch.bfloat16)}
    tensors = load_file(moved / "vae/diffusion_pytorch_model.safetensors")
    tensors["encoder.conv_in.bias"] = tensors["encoder.conv_in.bias"] + 1
    save_file(tensors, moved / "vae/diffusion_pytorch_model.safetensors")
    others |= {folder(moved), folder(resolution=128)}
    (moved / "vae/config.json").write_text(json.dumps(written | {"scaling_factor": 2}))
    others.add(folder(moved))
    assert len(others) == 5

    files = LatentFiles(fresh, 64, BaseSizes.of(tiny / "base"), torch.float32)
    names = {files.path(clips[0], 0, False), files.path(clips[0], 0, True), files.path(clips[0], 7, False)}
    names |= {files.path(replace(clips[0], boxes=clips[0].boxes - 9), 0, False), files.path(clips[1], 0, False)}
    names |= {files.path(replace(clips[0], start=3), 0, False)}
    assert len(names) == 6 and files.path(clips[0].part(3, 9), 0, False) in names


def test_the_switches_that_exclude_each_other(tiny, videos, fresh, tmp_path):
    with pytest.raises(UserError, match="use --crop_per clip"):
        sonic_training.main(flags(tiny, videos, fresh, tmp_path / "out", cache_latents=True, crop_per="window"))
    assert settings().crop_per == "window" and settings(cache_latents=True).crop_per == "clip"


def test_dry_run_says_how_much_disk_an_hour_takes(tiny, videos, fresh, tmp_path, capsys):
    sonic_training.main(flags(tiny, videos, fresh, tmp_path / "out", cache_latents=True, dry_run=True, resolution=512))
    printed = capsys.readouterr().out
    expected = 3600 * 25 * 4 * (4 * 64 * 64 + 16) / 1e9
    assert f"latents: {expected:.2f} GB per hour of video" in printed
    assert "frozen encoders 0.0 M" in printed and "\n  encoders " not in printed
    assert not files_in(fresh)
