"""The web page: portrait and speech in, video out (`python sonic_demo.py --gradio [--share]`).

`build` makes the page of a loaded pipeline, `serve` loads, opens and closes it. What happens on it stands in `page_actions.py`,
what guards it in `page_guard.py`. Programs call it with gradio_client (docs/page.md):

    Client("http://127.0.0.1:7860").predict(
        handle_file("portrait.jpg"), handle_file("speech.wav"), "moderate", 42, api_name="/animate"
    )
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from sonic import page_decoding
from sonic.config import PageConfig, SonicConfig, UserError
from sonic.page_actions import Actions
from sonic.page_guard import Guard
from sonic.page_jobs import Workshop
from sonic.page_layout import JOBS, LOOKS_WAITING, QUICK, batch_tab, one_video
from sonic.page_limits import Limits, Store, accounts, is_open_to_strangers, resolve
from sonic.page_text import ENGLISH, LANGUAGES, label, say, translations
from sonic.page_views import CONTRAST, CSS, FIRST_LANGUAGE, FONT, MONO, PICTURES, SWITCH_LANGUAGE, quiet_card
from sonic.pipeline import SonicPipeline
from sonic.stopping import signals_raise

SESSIONS = 500  # visitors whose history is remembered; the one who was away longest is forgotten first
CLEAN_EVERY = 60  # seconds


@dataclass
class Page:
    """A built page, and what must be closed with it."""

    blocks: gr.Blocks
    workshop: Workshop
    store: Store
    limits: Limits
    jobs: tuple[set[int], set[str]]  # the jobs among gradio's functions, by number and by name

    def refuse(self, body: dict, path: str) -> tuple[int, str] | None:
        """The answer to a request for a function that there is none of, or for a job that no more may wait for."""
        numbers, names = self.jobs
        if path.endswith("/queue/join"):
            number = body.get("fn_index")
            if type(number) is not int or number not in self.blocks.fns:
                return 400, "There is no such function."
            is_job = number in numbers
        elif "/call/" in path:
            is_job = path.rstrip("/").rsplit("/", 1)[-1] in names
            if not is_job:
                return 404, "There is no such function."
        else:
            return None
        queue = self.blocks._queue.event_queue_per_concurrency_id.get(JOBS)
        if is_job and queue is not None and len(queue.queue) >= self.limits.max_waiting:
            return 503, "Too many jobs are waiting: try again later."
        return None

    def close(self) -> None:
        self.workshop.close()
        self.blocks.close(verbose=False)


def build(pipeline: SonicPipeline, limits: Limits | None = None, folder: Path | None = None) -> Page:
    """The page of a pipeline, ready to be opened. `folder` takes uploads and results; gradio must be told the same one."""
    limits = limits or Limits()
    store = Store(folder or Path(os.environ["GRADIO_TEMP_DIR"]), limits)
    store.folder.mkdir(parents=True, exist_ok=True)
    page_decoding.prepare()
    workshop = Workshop(pipeline, store.new)
    actions = Actions(workshop, store, limits)
    with gr.Blocks(title="Sonic", analytics_enabled=False) as blocks:
        with gr.Row(elem_id="head"):
            gr.Markdown(label("intro"))
            language = gr.Radio(
                LANGUAGES,
                value=ENGLISH,
                label=label("language"),
                show_label=False,
                elem_id="language",
                scale=0,
                min_width=180,
            )
        with gr.Tabs():
            with gr.Tab(label("tab_one")) as one:
                first = one_video(actions, language)
            with gr.Tab(label("tab_batch")) as batch:
                jobs = [*first.jobs, *batch_tab(actions, language, first.chosen)]
        found = blocks.load(None, None, language, js=FIRST_LANGUAGE)
        # What the browser cannot translate by itself: the names of tabs, which it knows by the names they had.
        found.then(
            lambda chosen: [quiet_card(say("idle", chosen)), *_tab_names(chosen)],
            language,
            [first.status, one, batch],
            **QUICK,
        )
        blocks.load(None, None, None, js=PICTURES)
        language.input(_tab_names, language, [one, batch], js=SWITCH_LANGUAGE, **QUICK)
    # api_open: a plain POST would go past the queue.
    blocks.queue(max_size=limits.max_waiting + LOOKS_WAITING, api_open=False)
    names = {blocks.fns[number].api_name for number in jobs if blocks.fns[number].api_visibility == "public"}
    return Page(blocks, workshop, store, limits, (set(jobs), names))


def _tab_names(language: str) -> list:
    return [gr.update(label=say(key, language)) for key in ("tab_one", "tab_batch")]


def open_page(page: Page, share: bool = False, auth: list[tuple[str, str]] | None = None) -> tuple[str, str | None]:
    """Starts serving in the background: the local address, and the public one or None. Raises UserError if no port is free."""
    theme = gr.themes.Soft(
        primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", radius_size="lg", font=FONT, font_mono=MONO
    ).set(**CONTRAST)
    try:
        _, local, public = page.blocks.launch(
            share=share,
            auth=auth,
            prevent_thread_lock=True,
            quiet=True,
            theme=theme,
            css=CSS,
            i18n=translations(),
            max_file_size=int(page.limits.max_upload_mb * 1e6),
            state_session_capacity=SESSIONS,
            app_kwargs={"middleware": [Middleware(Guard, store=page.store, refuse=page.refuse)]},
            footer_links=["api"],
            show_error=False,  # what is no gr.Error goes to the terminal, not to the visitor
            enable_monitoring=False,
            run_history=False,
            ssr_mode=False,
        )
    except OSError as error:
        raise UserError(f"the page cannot be opened: {error}") from None
    return local, public


def serve(config: SonicConfig, share: bool, page_config: PageConfig | None = None) -> int:
    """Loads the pipeline and serves its page until Ctrl-C (or SIGTERM). Returns the exit code."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # this project contacts nobody it was not told to
    page_config = page_config or PageConfig()
    auth = accounts(page_config.auth)
    pipeline = SonicPipeline(config)
    limits = resolve(page_config, share, pipeline.settings)
    # `kill` leaves no uploads behind either.
    with signals_raise(), tempfile.TemporaryDirectory(prefix="sonic-page-") as folder:
        # gradio serves what lies in these folders: ours, which holds no other program's files and goes with the page.
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_EXAMPLES_CACHE"] = str(Path(folder, "examples"))
        page = build(pipeline, limits, Path(folder))
        try:
            threading.Thread(target=page.workshop.measure_pace, name="sonic-pace", daemon=True).start()
            local, public = open_page(page, share, auth)
            print(f"Sonic's page is open at {local} (Ctrl-C closes it)", flush=True)
            if public:
                print(f"for everybody who knows the address, for up to a week: {public}", flush=True)
            elif share:
                print(
                    "no public address could be had (why stands above): the page is open on this computer only",
                    flush=True,
                )
            if is_open_to_strangers(page_config, share):
                print(
                    f"nobody is asked for a password, so limits are strict: {limits.max_audio_seconds:g} s of speech, "
                    f"{limits.max_upload_mb:g} MB a file, {limits.max_waiting} jobs waiting, files kept for "
                    f"{limits.keep_hours:g} h; --auth USER:PASSWORD widens them, and each has a flag",
                    flush=True,
                )
            cleaned = time.monotonic()
            while page.blocks.is_running:
                time.sleep(0.2)
                if time.monotonic() - cleaned > CLEAN_EVERY:
                    page.store.clean()
                    cleaned = time.monotonic()
        except KeyboardInterrupt:
            print("\nclosing the page", flush=True)
        finally:
            page.close()
    return 0
