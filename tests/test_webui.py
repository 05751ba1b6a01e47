"""The page as a program meets it: a video with sound, clear refusals, one job at a time, settings that come back, limits.

What a person sees is in test_webui_browser.py, what an enemy tries in test_webui_hostile.py.
"""

import os
import re
import signal
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import bad_decoders
import httpx
import numpy as np
import pytest
import soundfile
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import sonic_demo
from sonic import page_decoding, webui
from sonic.checkpoints import create_checkpoint
from sonic.config import SAMPLE_RATE, SonicConfig, UserError
from sonic.media import VideoReader, read_metadata, save_video
from sonic.page_actions import Actions
from sonic.page_jobs import CHOICES, Cancelled, Made, Workshop
from sonic.page_limits import Limits
from sonic.page_text import TEXTS, say
from sonic.pictures import load_image
from sonic.pipeline import SonicPipeline
from sonic.presets import PRESETS
from sonic.sound import load_audio
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
def page(pipeline, folder):
    """An open page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        page = webui.build(pipeline)
        yield page
        page.close()


@pytest.fixture(scope="module")
def address(page):
    """Its local address."""
    local, public = webui.open_page(page)
    assert public is None
    return local


@pytest.fixture(scope="module")
def actions(page) -> Actions:
    """What stands behind its buttons."""
    return Actions(page.workshop, page.store, page.limits)


@pytest.fixture
def uploaded(page, folder):
    """A file as gradio hands it over, after it was uploaded."""

    def upload(path) -> dict:
        place = page.store.new() / Path(path).name
        place.write_bytes((folder / path).read_bytes())
        return {"path": str(place), "orig_name": place.name, "meta": {"_type": "gradio.FileData"}}

    return upload


@pytest.fixture(scope="module")
def client(address, folder) -> Client:
    return Client(address, verbose=False, download_files=str(folder / "downloads"), analytics_enabled=False)


@pytest.fixture(scope="module")
def animate(client, folder):
    """Calls the page as a program does; the defaults are good inputs."""

    def call(portrait=PORTRAIT, speech="speech.wav", motion="moderate", seed=0, **more):
        files = handle_file(str(folder / portrait)), handle_file(str(folder / speech))
        return client.predict(*files, motion, seed, api_name="/animate", **more)

    return call


def test_a_portrait_and_a_speech_give_a_video_with_sound(animate):
    path, said = animate()
    with VideoReader(path) as reader:
        info = reader.info
        assert reader.num_ticks == 10
    assert info.has_audio and info.codec == "h264" and (info.width, info.height) == (64, 64)
    assert info.duration == pytest.approx(SECONDS, abs=0.001)
    assert said.startswith("10 frames at 25 fps: 0.40 s, 64 × 64, seed 0, made in ")


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
        ({"num_inference_steps": 201}, "The steps must be at most 200 here"),
        ({"resolution": 4096}, "The resolution must be at most 2048 here"),
        ({"guidance_scale_audio": -1}, "The audio guidance must be a number at least 0"),
        ({"translation_bucket": "much"}, "The head motion must be a number at least 0 and at most 127"),
        ({"face": "hand", "left": 40, "right": 40}, "The face box"),
        ({"face": "everywhere"}, "Face must be one of auto, hand, full"),
        ({"language": "zh-CN", "portrait": "faceless.png"}, "肖像中未检测到人脸"),
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
    answer = httpx.post(f"{address}gradio_api/call/animate", json=body)
    assert answer.status_code == 400 and str(folder) not in answer.text
    assert httpx.post(f"{address}gradio_api/run/animate", json=body).status_code == 404


def test_the_page_loads_nothing_from_elsewhere(address):
    page = httpx.get(address).text
    elsewhere = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//([^/"]+)', page)
    assert elsewhere == []
    assert not re.search(r"url\(.?https?:", httpx.get(f"{address}theme.css").text)


def test_a_face_can_be_drawn_where_none_is_found(animate):
    path, said = animate(portrait="faceless.png", face="hand", left=20, top=20, right=80, bottom=80)
    assert Path(path).is_file() and "10 frames" in said
    assert Path(animate(portrait="faceless.png", face="full")[0]).is_file()


def test_the_example_of_the_docs_runs(address, folder, monkeypatch):
    """docs/page.md, "From a program": what stands there, at this page's address."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/page.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(folder)
    code = code.replace("http://127.0.0.1:7860", address).replace("portrait.jpg", str(PORTRAIT))
    names = {}
    exec(code, names)
    assert Path(names["video"]).suffix == ".mp4" and names["said"].startswith("10 frames")


def test_settings_come_back_from_the_file_and_from_the_video(actions, uploaded, folder):
    chosen = dict(zip(CHOICES, ("mild", 7, 20, "", 1.5, 2.5, 2, 1, 64, "native"), strict=True))
    face = ("full", 0, 0, 0, 0)
    *_, last = actions.animate(uploaded(PORTRAIT), uploaded("speech.wav"), face, chosen, "en", [])
    card, video, _, stored, settings, group, history, gallery, made = last
    assert "seed 7" in card and group["visible"] and history == [made] and len(gallery["value"]) == 1
    assert settings["seed"] == 7 and settings["translation_bucket"] == 20 and settings["face_box"] == "full"
    assert '"seed":7' in read_metadata(video)["comment"] and str(folder) not in read_metadata(video)["comment"]
    for file in (stored, video):
        *values, note = actions.load_settings({"path": file}, "en")
        assert values == ["mild", 7, 20, "", 1.5, 2.5, 2, 1, 64, "native"], file
        assert say("loaded") in note
    for name in ("broken.wav", "speech.wav", "faceless.png"):
        *values, note = actions.load_settings(uploaded(name), "en")
        assert 'role="alert"' in note and "settings" in note


def test_the_portrait_is_shown_with_its_face(actions, uploaded):
    portrait = uploaded(PORTRAIT)
    view, note, mode, *sliders, _ = actions.look(portrait, "auto", 0, 0, 0, 0, "en")
    assert view["visible"] and mode == "auto" and say("face_found") in note
    left, top, right, bottom = sliders
    assert 20 < left < right < 80 and 10 < top < bottom < 90
    view, note, mode, *_, opened = actions.look(uploaded("faceless.png"), "auto", 0, 0, 0, 0, "en")
    assert mode == "hand" and opened["open"] and "No face was found" in note


def test_two_clicks_draw_a_box(actions, uploaded):
    class Click:
        def __init__(self, *index):
            self.index = index

    faceless = uploaded("faceless.png")
    *first, corner = actions.click(faceless, None, "en", Click(360, 120))
    assert say("corner") in first[1] and first[2] == "hand" and corner == pytest.approx((96, 32))
    _, _, mode, *sliders, _, corner = actions.click(faceless, corner, "en", Click(120, 480))
    assert (mode, sliders, corner) == ("hand", [25.0, 25.0, 75.0, 100.0], None)
    assert "alert" in actions.click(faceless, None, "en", Click("a", None))[1]


def test_a_speech_is_told_its_length_and_time(actions, page, uploaded):
    told = actions.listen(uploaded("speech.wav"), 2, 3, 64, "native", "en")
    assert "0.4 s of speech: 10 frames at 25 per second." in told
    page.workshop.measure_pace()
    told = actions.listen(uploaded("speech.wav"), 2, 3, 64, "native", "en")
    assert re.search(r"About \d+ s on this machine", told)
    assert "语音" in actions.listen(uploaded("speech.wav"), 2, 3, 64, "native", "zh-CN")


def test_closing_ends_the_trial(page):
    workshop = Workshop(page.workshop.pipeline, page.store.new)
    trial = threading.Thread(target=workshop.measure_pace, daemon=True)
    trial.start()
    workshop.close()
    trial.join(20)
    assert not trial.is_alive() and workshop.pace.seconds(1, 1, 1) is None


def test_what_is_asked_for_more_takes_longer(page):
    page.workshop.measure_pace()
    seconds = [page.workshop.estimate(4, {"num_inference_steps": steps})[2] for steps in (2, 20)]
    assert 5 * seconds[0] < seconds[1] or seconds[1] > seconds[0] > 0
    frames, fps, _ = page.workshop.estimate(4, {})
    assert page.workshop.estimate(4, {"fps": "50"})[:2] == (frames * 50 / fps, 50)


def test_a_video_is_compared(actions, uploaded, monkeypatch):
    assert say("missing_video") in actions.compare(None, "en")[2]
    frames = VideoReader(ROOT / "examples/clips/puppet_0000.mp4")
    made = Made(actions.store.new(), 25, 25.0, 256, 256, 0, 1.0)
    assert say("gone") in actions.compare(made, "en")[2]
    assert "Only videos of up to" in actions.compare(replace(made, frames=10_000), "en")[2]
    pictures = frames.read(range(25))
    frames.close()
    save_video(
        pictures, made.folder / "sonic.mp4", 25, load_audio(ROOT / "examples/clips/puppet_0000.mp4")[:SAMPLE_RATE]
    )
    Image.fromarray(pictures[0]).save(made.folder / "portrait.jpg")
    plot, beside, note = actions.compare(made, "en")
    assert note == "" and Path(plot["value"]).suffix == ".png" and Path(beside["value"]).is_file()


def test_a_batch_makes_what_can_be_made(actions, uploaded):
    portraits = [uploaded(PORTRAIT), uploaded("faceless.png") | {"orig_name": "../<b>evil</b>.png"}]
    chosen = dict(zip(CHOICES, ("mild", 0, "", "", 2, 3, 2, 1, 64, "native"), strict=True))
    seen = list(actions.make_all(portraits, [uploaded("speech.wav")], chosen, "en"))
    assert "waiting" in seen[0][0]
    table, archives = seen[-1][0], [archive.get("value") for _, archive in seen if archive.get("value")]
    assert len(archives) == 2  # the first was there to be had before the second one ended, and after a Cancel
    assert "failed: No face was found" in table and "1 of 2 videos made" in table
    assert "<b>" not in table and "../" not in table
    with zipfile.ZipFile(archives[-1]) as file:
        assert file.namelist() == ["01.mp4", "01.json", "videos.csv"]
        assert "01" not in file.read("videos.csv").decode() and "portrait.jpg" in file.read("videos.csv").decode()
    too_many = list(actions.make_all(portraits * 26, [uploaded("speech.wav")], chosen, "en"))
    assert "52 videos are too many" in too_many[-1][0]
    assert say("missing_speech") in next(actions.make_all(portraits, None, chosen, "en"))[0]


# What is told of a decoder that fails, dies, and takes too much.
UNREADABLE, TOO_MUCH = say("bad_picture"), say("heavy_portrait")


@pytest.mark.parametrize(
    ("decoder", "sentence"),
    [
        (bad_decoders.breaks, UNREADABLE),
        (bad_decoders.dies, UNREADABLE),
        (bad_decoders.lies, UNREADABLE),
        (bad_decoders.hangs, TOO_MUCH),
        (bad_decoders.spins, TOO_MUCH),
        (bad_decoders.swells, TOO_MUCH),
    ],
)
def test_a_decoder_that_dies_takes_nothing_with_it(actions, uploaded, monkeypatch, decoder, sentence):
    """It runs in a process of its own; the visitor reads a sentence, and the next picture is read."""
    portrait = uploaded(PORTRAIT)
    page_decoding.read_portrait(Path(portrait["path"]), Limits())  # from here on the decoders are imported
    with monkeypatch.context() as patch:
        patch.setattr(page_decoding, "_portrait", decoder)
        patch.setattr(page_decoding, "SECONDS", 0.5 if decoder is bad_decoders.hangs else 60)
        said = actions.look(portrait, "auto", 0, 0, 0, 0, "en")[1]
    assert sentence in said and "alert" in said
    assert say("face_found") in actions.look(portrait, "auto", 0, 0, 0, 0, "en")[1]


def test_what_is_read_apart_is_what_is_read_here(folder):
    read = page_decoding.read_portrait(PORTRAIT, Limits())
    assert np.array_equal(np.asarray(read), np.asarray(load_image(PORTRAIT)))
    speech = page_decoding.read_speech(folder / "speech.wav", Limits())
    assert np.array_equal(speech, load_audio(folder / "speech.wav")) and speech.dtype == np.float32
    with pytest.raises(UserError, match=r"lasts 0\.4 s, more than the 0\.1 s"):
        page_decoding.read_speech(folder / "speech.wav", Limits(max_audio_seconds=0.1))


def test_who_stops_looking_ends_the_job(actions, page, pipeline, uploaded, monkeypatch):
    steps, generate = [], pipeline.generate

    def slow(*arguments, on_progress, **keywords):
        def slowly(progress):
            steps.append(progress)
            time.sleep(0.3)
            on_progress(progress)

        return generate(*arguments, on_progress=slowly, **keywords)

    monkeypatch.setattr(pipeline, "generate", slow)
    chosen = dict(zip(CHOICES, ("mild", 0, "", "", 2, 3, 50, 1, 64, "native"), strict=True))
    watching = actions.animate(uploaded(PORTRAIT), uploaded("speech.wav"), ("full", 0, 0, 0, 0), chosen, "en", [])
    for card, *_ in watching:
        if "step 2 of 50" in card:
            break
    (job,) = page.workshop._jobs
    watching.close()
    assert job.finished.wait(5) and isinstance(job.error, Cancelled) and len(steps) <= 5


def test_a_job_shows_how_it_gets_sharper(actions, uploaded):
    chosen = dict(zip(CHOICES, ("mild", 0, "", "", 2, 3, 60, 1, 64, "native"), strict=True))
    watching = actions.animate(uploaded(PORTRAIT), uploaded("speech.wav"), ("full", 0, 0, 0, 0), chosen, "en", [])
    cards = [card for card, *_ in watching]
    assert any("data:image/jpeg" in card and "Denoising" in card and " left" in card for card in cards), cards[-3:]


def test_what_nobody_expected_is_a_number_for_the_visitor_and_a_traceback_for_the_log(
    animate, pipeline, monkeypatch, capfd
):
    monkeypatch.setattr(pipeline, "generate", lambda *_, **__: Path("/no/such/secret").read_text())
    with pytest.raises(AppError, match=r"tell who runs this page the number \w{6}") as refusal:
        animate()
    assert "secret" not in str(refusal.value)
    log = capfd.readouterr().err
    assert "/no/such/secret" in log and re.search(r"number (\w{6})", str(refusal.value))[1] in log


def test_every_text_is_there_in_both_languages_with_the_same_gaps():
    for key, (english, chinese) in TEXTS.items():
        assert english and chinese, key
        gaps = [sorted(re.findall(r"\{(\w+)", text)) for text in (english, chinese)]
        assert gaps[0] == gaps[1], key


def test_flags_of_the_page_need_the_page():
    with pytest.raises(UserError, match="--max_waiting is for the web page"):
        sonic_demo.main(["--max_waiting", "3", "--image", "a.png", "--audio", "b.wav", "--output", "c.mp4"])


def test_who_has_no_password_stays_outside(pipeline, folder, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder / "private"))
    page = webui.build(pipeline)
    local, _ = webui.open_page(page, auth=[("me", "secret")])
    try:
        for path in ("config", "gradio_api/info", "gradio_api/queue/data?session_hash=a"):
            assert httpx.get(local + path).status_code == 401, path
        assert httpx.post(f"{local}gradio_api/upload", files={"files": b"x"}).status_code == 401
        assert httpx.post(f"{local}gradio_api/call/animate", json={"data": []}).status_code == 401
        assert Client(local, auth=("me", "secret"), verbose=False, analytics_enabled=False).view_api(
            return_format="dict"
        )
        tries = [
            httpx.post(f"{local}login", data={"username": "me", "password": str(n)}).status_code for n in range(30)
        ]
        assert set(tries) == {400, 429} and tries[-1] == 429
    finally:
        page.close()


def test_serve_says_where_it_is_and_leaves_nothing_behind(checkpoint, monkeypatch, capsys):
    def unreachable(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.setattr("gradio.networking.setup_tunnel", unreachable)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")  # so that what serve sets is undone
    opened = []
    open_page = webui.open_page

    def then_interrupted(page, share, auth):
        opened.append((open_page(page, share, auth), os.environ["GRADIO_TEMP_DIR"]))
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
    assert "nobody is asked for a password, so limits are strict: 30 s of speech, 20 MB a file" in said
    assert public is None and f"open at {local}" in said and "no public address could be had" in said
    assert not Path(folder).exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(local)
