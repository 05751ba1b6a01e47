"""The page as a visitor and a program meet it: a video with sound, clear refusals, one job at a time, nothing else served."""

import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from sonic import webui
from sonic.checkpoints import create_checkpoint
from sonic.config import PRESETS, SAMPLE_RATE, SonicConfig
from sonic.media import VideoReader
from sonic.pipeline import SonicPipeline
from sonic.weights import ROOT

PORTRAIT = ROOT / "examples/portrait.jpg"
SECONDS = 0.4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Small inputs, and under uploads/ what the page receives and makes."""
    folder = tmp_path_factory.mktemp("page")
    times = np.arange(round(SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    soundfile.write(folder / "speech.wav", 0.3 * np.sin(2 * np.pi * 220 * times), SAMPLE_RATE)
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "faceless.png")
    (folder / "broken.jpg").write_text("no picture")
    (folder / "broken.wav").write_text("no sound")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    settings = replace(PRESETS["mini"].settings, num_inference_steps=2, resolution=64)
    create_checkpoint(folder, replace(PRESETS["mini"], settings=settings))
    return folder


@pytest.fixture(scope="module")
def pipeline(checkpoint) -> SonicPipeline:
    return SonicPipeline(SonicConfig(checkpoint=str(checkpoint), device="cpu"))


@pytest.fixture(scope="module")
def address(pipeline, folder):
    """The local address of an open page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        page = webui.build(pipeline)
        local, public = webui.open_page(page)
        assert public is None
        yield local
        page.close(verbose=False)


@pytest.fixture(scope="module")
def client(address, folder) -> Client:
    return Client(address, verbose=False, download_files=str(folder / "downloads"), analytics_enabled=False)


@pytest.fixture(scope="module")
def animate(client, folder):
    """Calls the page as a program does; the defaults are good inputs."""

    def call(portrait=PORTRAIT, speech="speech.wav", motion="moderate", seed=0):
        files = handle_file(str(folder / portrait)), handle_file(str(folder / speech))
        return client.predict(*files, motion, seed, api_name="/animate")

    return call


def test_a_portrait_and_a_speech_give_a_video_with_sound(animate):
    path, said = animate()
    with VideoReader(path) as reader:
        info = reader.info
        assert reader.num_ticks == 10
    assert info.has_audio and info.codec == "h264" and (info.width, info.height) == (64, 64)
    assert info.duration == pytest.approx(SECONDS, abs=0.001)
    assert said == "10 frames at 25 fps: 0.40 s, 64 × 64, seed 0"


def test_the_seed_decides(animate, folder):
    before = set((folder / "uploads").glob("*/sonic.mp4"))
    zero, again, other = (Path(animate(seed=seed)[0]).read_bytes() for seed in (0, 0, 1))
    assert zero == again != other
    assert len(set((folder / "uploads").glob("*/sonic.mp4")) - before) == 3  # made anew, each in a folder of its own


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"portrait": "faceless.png"}, "No face was found in the portrait: choose a picture"),
        ({"portrait": "broken.jpg"}, "The portrait cannot be read as an image: give a whole PNG"),
        ({"speech": "broken.wav"}, "The speech holds no readable audio"),
        ({"seed": -1}, "The seed must be a whole number at least 0"),
        ({"seed": 2.5}, "The seed must be a whole number"),
        ({"seed": 1e300}, "The seed must be a whole number"),
        ({"seed": None}, "The seed must be a whole number"),
        ({"motion": "wild"}, "Motion must be one of mild, moderate, intense"),
    ],
)
def test_a_refusal_is_one_sentence_without_paths(animate, folder, inputs, sentence):
    with pytest.raises(AppError) as refusal:
        animate(**inputs)
    message = str(refusal.value)
    assert message.startswith(sentence), message
    assert "/" not in message and "Traceback" not in message and "--" not in message, message


def test_missing_files_are_named(client, folder):
    portrait, speech = handle_file(str(PORTRAIT)), handle_file(str(folder / "speech.wav"))
    with pytest.raises(AppError, match="The portrait is missing: choose a file"):
        client.predict(None, speech, "mild", 0, api_name="/animate")
    with pytest.raises(AppError, match="The speech is missing: choose a file"):
        client.predict(portrait, None, "mild", 0, api_name="/animate")


def test_jobs_run_one_at_a_time(client, pipeline, folder, monkeypatch):
    running, most, generate = [], [], pipeline.generate

    def watched(*arguments, **keywords):
        running.append(1)
        most.append(len(running))
        time.sleep(0.1)
        try:
            return generate(*arguments, **keywords)
        finally:
            running.pop()

    monkeypatch.setattr(pipeline, "generate", watched)
    files = handle_file(str(PORTRAIT)), handle_file(str(folder / "speech.wav"))
    jobs = [client.submit(*files, "mild", seed, api_name="/animate") for seed in range(3)]
    assert all(job.result(timeout=30) for job in jobs)
    assert most == [1, 1, 1]


def test_only_uploads_and_results_can_be_had(address, folder):
    for path in (ROOT / "pyproject.toml", folder / "speech.wav", Path("/etc/hostname")):
        assert httpx.get(f"{address}gradio_api/file={path}").status_code == 403

    # Neither can a server's file be read by calling it an upload, nor can the queue be passed by.
    stranger = {"path": str(folder / "speech.wav"), "meta": {"_type": "gradio.FileData"}}
    body = {"data": [stranger, stranger, "mild", 0]}
    event = httpx.post(f"{address}gradio_api/call/animate", json=body).json()["event_id"]
    answer = httpx.get(f"{address}gradio_api/call/animate/{event}", timeout=20).text
    assert answer.startswith("event: error") and str(folder) not in answer
    assert httpx.post(f"{address}gradio_api/run/animate", json=body).status_code == 404


def test_the_page_loads_nothing_from_elsewhere(address):
    page = httpx.get(address).text
    elsewhere = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//([^/"]+)', page)
    assert elsewhere == []
    assert not re.search(r"url\(.?https?:", httpx.get(f"{address}theme.css").text)


def test_serve_says_where_it_is_and_leaves_nothing_behind(checkpoint, monkeypatch, capsys):
    def unreachable(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.setattr("gradio.networking.setup_tunnel", unreachable)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")  # so that what serve sets is undone
    opened = []
    open_page = webui.open_page

    def then_interrupted(page, share):
        opened.append((open_page(page, share), os.environ["GRADIO_TEMP_DIR"]))
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return opened[0][0]

    monkeypatch.setattr(webui, "open_page", then_interrupted)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert webui.serve(SonicConfig(checkpoint=str(checkpoint), device="cpu"), share=True) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    (local, public), folder = opened[0]
    said = capsys.readouterr().out
    assert public is None and f"open at {local}" in said and "no public address could be had" in said
    assert not Path(folder).exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(local)
