"""What stands on the web page, and which answer of `page_actions.py` belongs to it."""

from __future__ import annotations

import contextlib
import itertools
import time
from typing import NamedTuple

import gradio as gr

from sonic.config import MOTION_SCALES, SonicConfig
from sonic.page_actions import AUTO, HAND, Actions
from sonic.page_jobs import BY_HAND, CHOICES
from sonic.page_text import label, say
from sonic.page_views import ROLL, note, quiet_card
from sonic.portrait import FULL
from sonic.weights import ROOT

JOBS, LOOKS, MEASURES = (
    "jobs",
    "looks",
    "measures",
)  # gradio's queues: the pipeline's, that for quick answers, for comparisons
LOOKS_AT_ONCE, LOOKS_WAITING = 4, 60
# gradio would open pictures and sounds itself and answer a broken one with a bare "Error": hence no preprocess.
QUICK = {
    "preprocess": False,
    "api_visibility": "private",
    "show_progress": "hidden",
    "concurrency_id": LOOKS,
    "concurrency_limit": LOOKS_AT_ONCE,
}
LATEST = QUICK | {"trigger_mode": "always_last"}  # of a slider's many places, the last one counts
JOB = {"preprocess": False, "concurrency_id": JOBS, "concurrency_limit": 1}
LAST_STEP = 10  # seconds that a cancelled job's step may take
EXAMPLE = (ROOT / "examples/portrait.jpg", ROOT / "examples/audio.wav")


class Tab(NamedTuple):
    """The first tab: its jobs' numbers among gradio's functions, the controls of a video's settings, the card."""

    jobs: list[int]
    chosen: list
    status: gr.HTML


def one_video(actions: Actions, language: gr.Radio) -> Tab:
    """The first tab."""
    config, own = actions.workshop.pipeline.config, actions.workshop.pipeline.settings
    with gr.Row():
        with gr.Column():
            example = gr.Button(
                label("example"), size="sm", visible=all(path.is_file() for path in EXAMPLE), elem_id="example"
            )
            # The buttons are named because gradio's own choice has one that uploads to another site.
            with gr.Row():
                portrait = gr.Image(
                    label=label("portrait"),
                    type="filepath",
                    sources=["upload", "webcam", "clipboard"],
                    buttons=["fullscreen"],
                    height=300,
                    min_width=150,
                    elem_id="portrait",
                )
                view = gr.Image(
                    label=label("face"),
                    interactive=False,
                    visible=False,
                    buttons=[],
                    height=300,
                    min_width=150,
                    format="jpeg",
                    elem_id="face",
                )
            face_note = gr.HTML()
            with gr.Accordion(label("face_mode"), open=False) as face_box:
                mode = gr.Radio(
                    [(label("face_auto"), AUTO), (label("face_hand"), HAND), (label("face_full"), FULL)],
                    value=AUTO,
                    label=label("face_mode"),
                    show_label=False,
                )
                gr.Markdown(label("face_help"))
                sliders = []
                for pair in ((("left", 25), ("right", 75)), (("top", 25), ("bottom", 75))):
                    with gr.Row():
                        sliders += [
                            gr.Slider(0, 100, value, step=0.5, label=label(key), min_width=120) for key, value in pair
                        ]
                left, right, top, bottom = sliders
            speech = gr.Audio(
                label=label("speech"),
                type="filepath",
                sources=["upload", "microphone"],
                buttons=[],
                elem_id="speech",
            )
            speech_note = gr.HTML()
            # A dynamic scale on the command line stands in the motion's place.
            motion = gr.Radio(
                [(label(name), name) for name in MOTION_SCALES],
                value=config.motion,
                label=label("motion"),
                visible=config.dynamic_scale is None,
                elem_id="motion",
            )
            with gr.Accordion(label("more"), open=False, elem_id="more"):
                with gr.Row():
                    seed = gr.Number(
                        config.seed, label=label("seed"), precision=0, minimum=0, min_width=140, elem_id="seed"
                    )
                    dice = gr.Button(label("dice"), min_width=140, elem_id="dice")
                with gr.Row():
                    buckets = [
                        gr.Textbox(
                            _as_text(getattr(config, name)),
                            label=label(CHOICES[name]),
                            placeholder=label("automatic"),
                            max_length=8,
                            min_width=140,
                        )
                        for name in BY_HAND
                    ]
                with gr.Row():
                    scales = [
                        gr.Slider(
                            0,
                            15,
                            _first(config, own, f"guidance_scale_{key}"),
                            step=0.1,
                            label=label(f"guidance_{key}"),
                            min_width=140,
                        )
                        for key in ("image", "audio")
                    ]
                with gr.Row():
                    steps_now = min(_first(config, own, "num_inference_steps"), actions.limits.max_steps)
                    steps = gr.Slider(
                        1,
                        min(100, actions.limits.max_steps),
                        steps_now,
                        step=1,
                        label=label("steps"),
                        min_width=140,
                        elem_id="steps",
                    )
                    shift = gr.Slider(
                        0, 25, _first(config, own, "shift_offset"), step=1, label=label("shift"), min_width=140
                    )
                resolution = gr.Slider(
                    64,
                    max(128, min(1024, actions.limits.max_resolution)),
                    min(_first(config, own, "resolution"), actions.limits.max_resolution),
                    step=64,
                    label=label("resolution"),
                )
                rate = gr.Radio(
                    [(label("native"), "native"), "25", "50"],
                    value=config.fps,
                    label=label("frame_rate"),
                    elem_id="rate",
                )
                load = gr.UploadButton(label("load_settings"), file_types=[".json", ".mp4"], size="sm")
        with gr.Column():
            button = gr.Button(label("animate"), variant="primary", elem_id="animate")
            status = gr.HTML(quiet_card(say("idle")), elem_id="status")
            cancel = gr.Button(label("cancel"), variant="stop", visible=False, elem_id="cancel")
            with gr.Column(visible=False) as result:
                video = gr.Video(
                    label=label("video"),
                    format="mp4",
                    interactive=False,
                    autoplay=True,
                    buttons=[],
                    height=400,
                    elem_id="video",
                )
                with gr.Row():
                    get_video = gr.DownloadButton(label("download_video"), min_width=140, elem_id="get_video")
                    get_settings = gr.DownloadButton(label("download_settings"), min_width=140, elem_id="get_settings")
                with gr.Accordion(label("settings"), open=False):
                    settings = gr.JSON(show_label=False)
                compare = gr.Button(label("compare"), elem_id="compare")
                compared = gr.HTML()
                plot = gr.Image(
                    label=label("plot"), interactive=False, visible=False, buttons=["fullscreen"], elem_id="plot"
                )
                beside = gr.Video(
                    label=label("side_by_side"),
                    interactive=False,
                    visible=False,
                    buttons=[],
                    height=400,
                    elem_id="beside",
                )
            gallery = gr.Gallery(
                label=label("history"),
                columns=4,
                fit_columns=False,
                object_fit="cover",
                height=190,
                allow_preview=False,
                visible=False,
                buttons=[],
                elem_id="history",
            )
    corner, history, last = gr.State(None), gr.State([]), gr.State(None)
    chosen = [motion, seed, *buckets, *scales, steps, shift, resolution, rate]  # in the order of CHOICES
    face = [mode, left, top, right, bottom]

    seen = [view, face_note, *face, face_box]
    portrait.change(_starting_anew(actions.look), [portrait, *face, language], [*seen, corner], **QUICK)
    language.input(_as_drawn(actions.look, False), [portrait, *face, language], seen, **QUICK)
    # `input`, not `release`: a slider that is moved with the keyboard is never let go.
    for changed in (mode.input, *(slider.input for slider in sliders)):
        changed(_as_drawn(actions.look, changed is not mode.input), [portrait, *face, language], seen, **LATEST)
    view.select(actions.click, [portrait, corner, language], [*seen, corner], **QUICK)
    heard = [speech, steps, shift, resolution, rate, language]
    for changed in (speech.change, steps.input, resolution.input, rate.input, language.input):
        changed(actions.listen, heard, speech_note, **LATEST)
    load.upload(actions.load_settings, [load, language], [*chosen, speech_note], **QUICK)
    dice.click(None, None, seed, js=ROLL)
    example.click(lambda: [str(path) for path in EXAMPLE], None, [portrait, speech], **QUICK)

    # The video.
    stopped = set()  # sessions whose last word was Cancel: what a job still tells must not stand over that
    telling = set()  # sessions whose job has not ended

    def wait(language, request: gr.Request):
        stopped.discard(request.session_hash)
        return quiet_card(say("waiting", language)), gr.update(visible=True), gr.update(interactive=False)

    def stop(language, request: gr.Request):
        stopped.add(request.session_hash)
        return quiet_card(say("cancelled", language)), *_at_rest()

    def stay_stopped(language, request: gr.Request):
        """Says it again behind a step that was on its way to the page when Cancel came."""
        late = time.monotonic() + LAST_STEP
        while request.session_hash in telling and time.monotonic() < late:
            time.sleep(0.05)
        time.sleep(0.3)
        return quiet_card(say("cancelled", language)) if request.session_hash in stopped else gr.skip()

    def make_one(portrait, speech, mode, left, top, right, bottom, language, history, request: gr.Request, *chosen):
        """Makes the portrait speak, and tells how far it is."""
        told = actions.animate(
            portrait,
            speech,
            (mode, left, top, right, bottom),
            dict(zip(CHOICES, chosen, strict=True)),
            language,
            history,
        )
        telling.add(request.session_hash)
        try:
            with contextlib.closing(told):  # a job that nobody follows ends
                yield from itertools.takewhile(lambda _: request.session_hash not in stopped, told)
        finally:
            telling.discard(request.session_hash)

    made = [video, get_video, get_settings, settings, result]
    begun = button.click(wait, language, [status, cancel, button], **QUICK)
    run = begun.then(
        make_one,
        [portrait, speech, *face, language, history, *chosen],
        [status, *made, history, gallery, last],
        api_visibility="private",
        show_progress="minimal",
        show_progress_on=status,
        **JOB,
    )
    run.then(_at_rest, None, [cancel, button], **QUICK)
    halt = cancel.click(stop, language, [status, cancel, button], cancels=[run], **QUICK)
    halt.then(stay_stopped, language, status, **QUICK)
    gallery.select(actions.show_again, history, [*made, last], **QUICK)
    language.input(actions.told_again, [last, language], status, **QUICK)
    compare.click(
        actions.compare,
        [last, language],
        [plot, beside, compared],
        preprocess=False,
        api_visibility="private",
        show_progress_on=compared,
        concurrency_id=MEASURES,
        concurrency_limit=1,
    )

    # The same for programs.
    def animate_for_program(
        portrait,
        speech,
        motion="moderate",
        seed=None,
        translation_bucket=None,
        expression_bucket=None,
        guidance_scale_image=None,
        guidance_scale_audio=None,
        num_inference_steps=None,
        shift_offset=None,
        resolution=None,
        fps=None,
        face=None,
        left=None,
        top=None,
        right=None,
        bottom=None,
        language=None,
    ):
        """Makes the portrait speak: the video, and a line that says what was made."""
        chosen = (motion, seed, translation_bucket, expression_bucket, guidance_scale_image, guidance_scale_audio)
        chosen += (num_inference_steps, shift_offset, resolution, fps)
        yield from actions.animate_for_program(
            portrait, speech, (face, left, top, right, bottom), dict(zip(CHOICES, chosen, strict=True)), language
        )

    for_program = gr.Button(visible=False)
    said = gr.Textbox(visible=False, label="what was made")
    called = for_program.click(
        animate_for_program,
        [portrait, speech, *chosen, *face, language],
        [gr.Video(visible=False, label="video", format="mp4"), said],
        api_name="animate",
        **JOB,
    )
    return Tab([run["id"], called["id"]], chosen, status)


def batch_tab(actions: Actions, language: gr.Radio, chosen: list) -> list[int]:
    """The second tab. Gives the number of its job."""
    gr.Markdown(label("batch_help"))
    with gr.Row():
        portraits = gr.File(
            label=label("portraits"), file_count="multiple", file_types=["image"], elem_id="portraits", height=200
        )
        speeches = gr.File(
            label=label("speeches"),
            file_count="multiple",
            file_types=["audio", "video"],
            elem_id="speeches",
            height=200,
        )
    with gr.Row():
        button = gr.Button(label("make_all"), variant="primary", elem_id="make_all")
        cancel = gr.Button(label("cancel"), variant="stop", visible=False, elem_id="cancel_batch")
    told = gr.HTML()
    table = gr.HTML(elem_id="table")
    archive = gr.DownloadButton(label("zip"), visible=False, elem_id="zip")

    def make_all(portraits, speeches, language, *chosen):
        """Every portrait with every voice."""
        yield from actions.make_all(portraits, speeches, dict(zip(CHOICES, chosen, strict=True)), language)

    def begin():
        return "", gr.update(visible=True), gr.update(interactive=False)

    def stop(language):
        return note(say("batch_cancelled", language)), *_at_rest()

    run = button.click(begin, None, [told, cancel, button], **QUICK).then(
        make_all,
        [portraits, speeches, language, *chosen],
        [table, archive],
        api_visibility="private",
        show_progress="minimal",
        show_progress_on=table,
        **JOB,
    )
    run.then(_at_rest, None, [cancel, button], **QUICK)
    cancel.click(stop, language, [told, cancel, button], cancels=[run], **QUICK)
    return [run["id"]]


def _at_rest():
    """Cancel goes, and what begins a job can be pressed again."""
    return gr.update(visible=False), gr.update(interactive=True)


def _as_text(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _first(config: SonicConfig, own, name: str):
    """A setting's value for a control that holds one number: what the command line says, else the model's own."""
    value = getattr(config, name)
    value = getattr(own, name) if value is None else value
    return value[0] if isinstance(value, tuple) else value


def _starting_anew(look):
    """A new portrait: its face is looked for, whatever was drawn on the one before."""

    def answer(portrait, mode, left, top, right, bottom, language):
        mode = AUTO if mode == HAND else mode
        return [*look(portrait, mode, left, top, right, bottom, language), None]

    return answer


def _as_drawn(look, by_hand: bool):
    """A slider that was moved means: by hand."""

    def answer(portrait, mode, left, top, right, bottom, language):
        return look(portrait, HAND if by_hand else mode, left, top, right, bottom, language)

    return answer
