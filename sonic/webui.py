"""The web page: portrait, speech, motion and seed in, video out (`python sonic_demo.py --gradio [--share]`).

`build` makes the page of a loaded pipeline, `serve` loads, opens and closes it. Programs call it with gradio_client:

    Client("http://127.0.0.1:7860").predict(
        handle_file("portrait.jpg"), handle_file("speech.wav"), "moderate", 42, api_name="/animate"
    )
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
import uuid
from pathlib import Path

import gradio as gr
from PIL import Image

from sonic.config import MOTION_SCALES, SEED, SonicConfig, UserError
from sonic.pipeline import Progress, SonicPipeline, as_image
from sonic.portrait import find_face
from sonic.weights import ROOT

MAX_WAITING = 20  # jobs in the queue; who comes later is told so at once
MAX_UPLOAD = "200mb"  # per file
CLEAN_EVERY, KEEP_FOR = 600, 6 * 3600  # seconds; uploads and results older than that are deleted
EXAMPLE = (ROOT / "examples/portrait.jpg", ROOT / "examples/audio.wav")

INTRO = "# Sonic\nA portrait and a voice become a video in which the portrait speaks."


def build(pipeline: SonicPipeline) -> gr.Blocks:
    """The page of a pipeline, its queue of one job at a time included; ready to `launch`."""
    config = pipeline.config

    def animate(
        portrait: dict | None,
        speech: dict | None,
        motion: str,
        seed: float | None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (gradio finds the bar by this default)
    ) -> tuple[str, str]:
        """Makes the portrait speak: the video, and a line that says what was made."""

        def on_progress(made: Progress) -> None:
            if not page.is_running:  # else Ctrl-C would wait for the whole video
                raise _refusal("the page was closed")
            progress((made.done, made.total), desc=made.stage.capitalize(), unit="steps")

        portrait_path, speech_path = _uploaded(portrait, "portrait"), _uploaded(speech, "speech")
        # A folder that nobody can guess, in the one place that gradio serves files from and cleans up.
        result = Path(video.GRADIO_CACHE, uuid.uuid4().hex, "sonic.mp4")
        progress(0, desc="Reading the portrait and the speech")
        try:
            seed = _checked_seed(seed)
            image = as_image(portrait_path)
            features = pipeline.extract_audio_features(speech_path)
            face_box = _face_box(image)
            made = pipeline.generate(
                image, features, face_box=face_box, on_progress=on_progress, motion=motion, seed=seed
            )
            progress(1.0, desc="Writing the video")
            pipeline.save_video(made, result)
        except UserError as error:
            names = {portrait_path: "the portrait", speech_path: "the speech", result: "the video"}
            raise _refusal(_without_paths(str(error), names)) from None
        height, width = made.frames.shape[1:3]
        seconds = len(made) / made.fps
        return str(result), f"{len(made)} frames at {made.fps:g} fps: {seconds:.2f} s, {width} × {height}, seed {seed}"

    with gr.Blocks(title="Sonic", analytics_enabled=False, delete_cache=(CLEAN_EVERY, KEEP_FOR)) as page:
        gr.Markdown(INTRO)
        with gr.Row():
            with gr.Column():
                # The buttons are named because gradio's own choice has one that uploads to another site.
                portrait = gr.Image(
                    label="Portrait",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    buttons=["fullscreen"],
                    height=300,
                )
                speech = gr.Audio(
                    label="Speech", type="filepath", sources=["upload", "microphone"], buttons=["download"]
                )
                if all(path.is_file() for path in EXAMPLE):
                    gr.Examples([[str(path) for path in EXAMPLE]], [portrait, speech], cache_examples=False)
            with gr.Column():
                with gr.Row():
                    # A dynamic scale on the command line stands in the motion's place.
                    motion = gr.Radio(
                        list(MOTION_SCALES),
                        value=config.motion,
                        label="Motion",
                        visible=config.dynamic_scale is None,
                        scale=4,
                        min_width=370,  # the three on one line
                    )
                    seed = gr.Number(config.seed, label="Seed", precision=0, minimum=0, min_width=90)
                button = gr.Button("Animate", variant="primary")
                video = gr.Video(
                    label="Video", format="mp4", interactive=False, autoplay=True, buttons=["download"], height=400
                )
                status = gr.Textbox(label="What was made", interactive=False, lines=1)
        button.click(
            animate,
            [portrait, speech, motion, seed],
            [video, status],
            api_name="animate",
            show_progress_on=video,
            # gradio would open the picture itself and answer a broken one with a bare "Error". What it hands over is
            # checked all the same: only files that were uploaded.
            preprocess=False,
        )
    # api_open: a plain POST would go past the queue.
    return page.queue(default_concurrency_limit=1, max_size=MAX_WAITING, api_open=False)


def open_page(page: gr.Blocks, share: bool = False) -> tuple[str, str | None]:
    """Starts serving in the background: the local address, and the public one or None. Raises UserError if no port is free."""
    # Fonts that every system has: the page must look the same without a network.
    theme = gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
    try:
        _, local, public = page.launch(
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            theme=theme,
            max_file_size=MAX_UPLOAD,
            footer_links=["api"],
            show_error=False,  # what is no gr.Error goes to the terminal, not to the visitor
            enable_monitoring=False,
            run_history=False,
            ssr_mode=False,
        )
    except OSError as error:
        raise UserError(f"the page cannot be opened: {error}") from None
    return local, public


def serve(config: SonicConfig, share: bool) -> int:
    """Loads the pipeline and serves its page until Ctrl-C (or SIGTERM). Returns the exit code."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # this project contacts nobody it was not told to
    pipeline = SonicPipeline(config)
    with tempfile.TemporaryDirectory(prefix="sonic-page-") as folder:
        # gradio serves what lies in these folders: ours, which holds no other program's files and goes with the page.
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_EXAMPLES_CACHE"] = str(Path(folder, "examples"))
        page = build(pipeline)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `kill` leaves no uploads behind either
        try:
            local, public = open_page(page, share)
            print(f"Sonic's page is open at {local} (Ctrl-C closes it)", flush=True)
            if public:
                print(f"for everybody who knows the address, for up to a week: {public}", flush=True)
            elif share:
                print(
                    "no public address could be had (why stands above): the page is open on this computer only",
                    flush=True,
                )
            while page.is_running:
                time.sleep(0.2)
        except KeyboardInterrupt:
            print("\nclosing the page", flush=True)
        finally:
            page.close(verbose=False)
    return 0


def _uploaded(file: dict | None, what: str) -> Path:
    """The path of an uploaded file, as gradio hands it over. Raises gr.Error if there is none."""
    if not file or not file.get("path"):
        raise _refusal(f"the {what} is missing: choose a file")
    return Path(file["path"]).absolute()


def _checked_seed(seed: float | None) -> int:
    try:
        return SEED(seed)
    except ValueError as error:
        raise UserError(f"the seed {error}") from None


def _face_box(image: Image.Image) -> tuple[float, float, float, float]:
    """The largest face's box. Raises UserError with advice that fits a page, which has no --face_box."""
    try:
        return find_face(image)
    except UserError:
        raise UserError(
            "no face was found in the portrait: choose a picture that shows one face from the front, large and well lit"
        ) from None


def _without_paths(sentence: str, names: dict[Path, str]) -> str:
    """The sentence with each path of the server replaced by what the visitor calls that file."""
    for path, name in names.items():
        sentence = sentence.replace(str(path), name)
    return sentence


def _refusal(sentence: str) -> gr.Error:
    """What the visitor reads; no traceback in the terminal, since nothing is wrong with the server."""
    return gr.Error(f"{sentence[0].upper()}{sentence[1:].rstrip('.')}.", print_exception=False)
