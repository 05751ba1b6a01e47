"""What happens on the web page when somebody does something: uploads looked at, videos made, batches, comparisons.

Files come as gradio hands them over (a dict with `path`), numbers as the visitor's program sent them: nothing of it is trusted.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import numpy as np
from PIL import Image

from sonic import evaluation
from sonic.config import SAMPLE_RATE, UserError
from sonic.page_decoding import TooHeavy, Undecodable, read_portrait, read_speech, read_video_settings
from sonic.page_jobs import (
    BY_HAND,
    CHOICES,
    PORTRAIT,
    POSTER,
    SETTINGS,
    VIDEO,
    Cancelled,
    Job,
    Made,
    Order,
    Refusal,
    Workshop,
    checked,
    follow,
    log_incident,
)
from sonic.page_limits import SETTINGS_BYTES, Limits, Store
from sonic.page_text import duration, say
from sonic.page_views import (
    bad_card,
    batch_table,
    face_view,
    from_percent,
    job_card,
    made_sentence,
    note,
    quiet_card,
    to_percent,
)
from sonic.portrait import FULL, checked_box, find_face

AUTO, HAND = "auto", "hand"  # where the face is; FULL is the third
MODES = (AUTO, HAND, FULL)
REMEMBERED = 24  # videos of a session
NAME_LENGTH = 60  # characters of a visitor's file name that a table shows
A_PATH = re.compile(r"(/[\w.-]+){2,}")
NOTHING = gr.skip()


class Actions:
    """The page's answers. One object serves all visitors: what belongs to one of them comes in and goes out."""

    def __init__(self, workshop: Workshop, store: Store, limits: Limits):
        self.workshop, self.store, self.limits = workshop, store, limits

    # ------------------------------------------------------------------------------------------------- uploads, looked at

    def look(self, portrait, mode, left, top, right, bottom, language):
        """-> view of the portrait with its face box, a sentence on it, mode, four sliders, whether the box is open."""
        same = [NOTHING] * 6
        if not portrait:
            return [gr.update(value=None, visible=False), "", gr.update(value=AUTO), *same[:4], gr.update(open=False)]
        try:
            image = self._portrait(portrait)
        except Exception as error:
            sentence = self._told(error, language)
            return [gr.update(value=None, visible=False), bad_card(sentence), *same]
        if mode == FULL:
            box, sentence = (0, 0, *image.size), say("box_full", language)
        elif mode == HAND:
            box, sentence = _box_by_hand((left, top, right, bottom), image.size), say("box_set", language)
        else:
            box, sentence = _found(image), say("face_found", language)
            if box is None:
                view = gr.update(value=face_view(image, None), visible=True)
                return [view, bad_card(say("face_none", language)), HAND, *same[:4], gr.update(open=True)]
        sliders = [NOTHING] * 4 if mode == HAND else to_percent(box, image.size)
        view = gr.update(value=face_view(image, box), visible=True)
        return [view, note(sentence), mode, *sliders, gr.update(open=True) if mode == HAND else NOTHING]

    def click(self, portrait, corner, language, event: gr.SelectData):
        """A click on the view: the first corner of a box by hand, or the opposite one. -> as `look`, then the corner."""
        same = [NOTHING] * 8
        try:
            image = self._portrait(portrait)
            x, y = (float(value) for value in event.index[:2])
        except Exception as error:
            return [NOTHING, bad_card(self._told(error, language)), *same[:6], None]
        scale = max(image.size) / max(face_view(image, None).size)
        x, y = (min(max(value * scale, 0), side) for value, side in zip((x, y), image.size, strict=True))
        if corner is None:
            view = gr.update(value=face_view(image, None, (x, y)), visible=True)
            return [view, note(say("corner", language)), HAND, *same[:4], gr.update(open=True), (x, y)]
        box = (min(x, corner[0]), min(y, corner[1]), max(x, corner[0]), max(y, corner[1]))
        view = gr.update(value=face_view(image, box), visible=True)
        return [view, note(say("box_set", language)), HAND, *to_percent(box, image.size), gr.update(open=True), None]

    def listen(self, speech, steps, shift, resolution, fps, language) -> str:
        """How long a speech is, and how long its video will take here."""
        if not speech:
            return ""
        try:
            choices = checked(
                {"num_inference_steps": steps, "shift_offset": shift, "resolution": resolution, "fps": fps}, self.limits
            )
            seconds = len(self._speech(speech)) / SAMPLE_RATE
            frames, fps, needed = self.workshop.estimate(seconds, choices)
        except Exception as error:
            return bad_card(self._told(error, language))
        said = say("speech_length", language, seconds=seconds, frames=frames, fps=fps)
        if needed is None:
            return note(f"{said} {say('no_estimate', language)}")
        return note(f"{said} {say('estimate', language, time=duration(needed, language))}")

    def load_settings(self, file, language):
        """A settings file, or a video that carries them, as values of the controls in the order of CHOICES; and a sentence."""
        try:
            stored = self._settings(file)
            taken = checked(
                {name: _one_number(stored[name]) for name in CHOICES if stored.get(name) is not None}, self.limits
            )
        except Exception as error:
            return [*[NOTHING] * len(CHOICES), bad_card(self._told(error, language))]
        values = [taken.get(name, "" if name in BY_HAND else NOTHING) for name in CHOICES]
        return [*values, note(say("loaded", language))]

    def _settings(self, file) -> dict:
        path = self._path(file, "missing_video")
        try:
            with path.open("rb") as stream:
                start = stream.read(SETTINGS_BYTES)
            is_mp4 = start[4:8] == b"ftyp"  # nothing else is shown to FFmpeg
            stored = read_video_settings(path) if is_mp4 else json.loads(start)
        except (ValueError, RecursionError, Undecodable, TooHeavy):
            raise Refusal("bad_settings") from None
        if not isinstance(stored, dict) or not set(stored) & set(CHOICES):
            raise Refusal("bad_settings")
        return stored

    # --------------------------------------------------------------------------------------------------------- one video

    def animate(self, portrait, speech, face, choices: dict, language, history) -> Iterator[list]:
        """-> card; video, both downloads, settings, the results' group; the session's videos, their gallery, the last one.

        `face` is a mode and four per cent. Ends with the video, or with a card that says why there is none.
        """
        same = [NOTHING] * 8
        yield [quiet_card(say("reading", language)), *same]
        try:
            job = self.workshop.start(self._order(portrait, speech, face, choices))
            for _ in self._followed(job):
                yield [job_card(job, language), *same]
        except Exception as error:
            yield [bad_card(self._told(error, language)), *same]
            return
        made = job.made
        history = [made, *(history or [])][:REMEMBERED]
        yield [quiet_card(made_sentence(made, language)), *shown(made), history, gallery(history), made]

    def animate_for_program(self, portrait, speech, face, choices: dict, language) -> Iterator[tuple]:
        """The same for a program: the video's path or None, and a sentence. Raises gr.Error with what was wrong."""
        try:
            job = self.workshop.start(self._order(portrait, speech, face, choices))
            for _ in self._followed(job):
                yield None, f"{say(job.stage, language)}, {100 * job.share:.0f} %"
        except Exception as error:
            raise gr.Error(self._told(error, language), print_exception=False) from None
        yield str(job.made.folder / VIDEO), made_sentence(job.made, language)

    def show_again(self, history, event: gr.SelectData):
        """A video of the session's gallery, shown as when it was made, and remembered as the last one."""
        made = (history or [])[int(event.index)]
        return [*shown(made), made]

    def told_again(self, made: Made | None, language) -> str:
        """The card of the last video, in another language."""
        return quiet_card(made_sentence(made, language) if made else say("idle", language))

    def compare(self, made: Made | None, language):
        """-> plot, video beside the portrait, a sentence."""
        try:
            if made is None:
                raise Refusal("missing_video")
            if made.seconds > self.limits.max_compared_seconds:
                raise Refusal("too_long_to_compare", most=self.limits.max_compared_seconds)
            if not (made.folder / VIDEO).is_file():
                raise Refusal("gone")
            report = evaluation.evaluate(made.folder / VIDEO, made.folder / PORTRAIT)
            _, plot, beside = evaluation.write_report(report, self.store.new())
        except Exception as error:
            return gr.update(visible=False), gr.update(visible=False), bad_card(self._told(error, language))
        return gr.update(value=str(plot), visible=True), gr.update(value=str(beside), visible=True), ""

    # ------------------------------------------------------------------------------------------------------------- batch

    def make_all(self, portraits, speeches, choices: dict, language) -> Iterator[list]:
        """Every portrait with every speech. -> the table of their states, the zip of what was made until now."""
        try:
            pairs = self._pairs(portraits, speeches)
        except Exception as error:
            yield [bad_card(self._told(error, language)), NOTHING]
            return
        rows = [[_name(a), _name(b), say("state_waiting", language)] for a, b in pairs]
        made: dict[int, Made] = {}
        folder = self.store.new()
        yield [batch_table(rows, language), gr.update(value=None, visible=False)]
        for number, (portrait, speech) in enumerate(pairs):
            try:
                job = self.workshop.start(self._order(portrait, speech, (AUTO, 0, 0, 0, 0), choices))
                for _ in self._followed(job):
                    rows[number][2] = say("state_working", language, percent=100 * job.share)
                    yield [batch_table(rows, language), NOTHING]
                made[number] = job.made
                rows[number][2] = say("state_done", language, time=duration(job.made.took, language))
            except Exception as error:  # whatever one of them runs into, the others go on
                rows[number][2] = say("state_failed", language, why=self._told(error, language))
            yield [batch_table(rows, language), gr.update(value=self._zip(folder, made, rows), visible=bool(made))]
        done = note(say("batch_done", language, made=len(made), total=len(pairs)))
        yield [batch_table(rows, language) + done, NOTHING]

    def _pairs(self, portraits, speeches) -> list[tuple]:
        for files, missing in ((portraits, "missing_portrait"), (speeches, "missing_speech")):
            if not files or not isinstance(files, list):
                raise Refusal(missing)
        count = len(portraits) * len(speeches)
        if count > self.limits.max_batch:
            raise Refusal("too_many", count=count, most=self.limits.max_batch)
        return [(portrait, speech) for portrait in portraits for speech in speeches]

    def _zip(self, folder: Path, made: dict[int, Made], rows) -> str | None:
        """The videos under their numbers, and a table that says which is which: no name of a visitor becomes a path."""
        if not made:
            return None
        path, partial = folder / "sonic.zip", folder / "partial.zip"
        with zipfile.ZipFile(partial, "w") as archive:
            for number, one in made.items():
                archive.write(one.folder / VIDEO, f"{number + 1:02d}.mp4")
                archive.write(one.folder / SETTINGS, f"{number + 1:02d}.json")
            table = io.StringIO()
            csv.writer(table).writerows([("number", "portrait", "speech"), *((n + 1, *rows[n][:2]) for n in made)])
            archive.writestr("videos.csv", table.getvalue())
        return str(partial.replace(path))

    # ---------------------------------------------------------------------------------------------------------- together

    def _order(self, portrait, speech, face, choices: dict) -> Order:
        """A visitor's wishes, all checked. UserError: what is wrong with them."""
        for file, missing in ((portrait, "missing_portrait"), (speech, "missing_speech")):
            self._path(file, missing)
        choices = checked(choices, self.limits)
        image, (mode, *percent) = self._portrait(portrait), face
        if mode not in MODES:
            raise UserError(f"Face must be one of {', '.join(MODES)}")
        sound = self._speech(speech)
        if mode == FULL:
            box = FULL
        elif mode == HAND:
            box = checked_box(_box_by_hand(percent, image.size), *image.size, "the portrait")
        else:
            box = _found(image)
            if box is None:
                raise Refusal("no_face")
        return Order(image, sound, box, choices)

    def _followed(self, job: Job) -> Iterator[None]:
        """Wakes up now and then until a job ends. Raises what ended it."""
        for _ in follow(job):
            yield
        if job.error:
            raise job.error

    def _portrait(self, file) -> Image.Image:
        path = self._path(file, "missing_portrait")
        return self._read(read_portrait, path, "bad_picture", "portrait")

    def _speech(self, file) -> np.ndarray:
        path = self._path(file, "missing_speech")
        return self._read(read_speech, path, "bad_sound", "speech")

    def _read(self, read, path: Path, bad: str, what: str):
        try:
            return read(path, self.limits)
        except UserError as error:
            sentence = str(error).replace(str(path), f"the {what}")
            if "cannot be read as" in sentence or "no readable" in sentence:
                raise Refusal(bad) from None
            raise UserError(sentence) from None
        except Undecodable:
            raise Refusal(bad) from None
        except TooHeavy:
            raise Refusal(f"heavy_{what}") from None

    def _path(self, file, missing: str) -> Path:
        """An upload's path. Refusal: none was given, it lies elsewhere, it is gone."""
        if not isinstance(file, dict) or not isinstance(file.get("path"), str):
            raise Refusal(missing)
        path = Path(file["path"])
        if not self.store.covers(path):
            raise Refusal(missing)
        if not self.store.holds(path):
            raise Refusal("gone")
        self.store.touch(path)
        return path

    def _told(self, error: Exception, language) -> str:
        """What a visitor is told of an error: no paths, no traceback. What nobody expected goes to the log."""
        if isinstance(error, Refusal):
            return say(error.key, language, **error.values)
        if isinstance(error, Cancelled):
            return say("cancelled", language)
        sentence = str(error)
        if isinstance(error, UserError) and not A_PATH.search(sentence):
            sentence = sentence.split(": give its box with --face_box")[0].rstrip(".")
            return f"{sentence[0].upper()}{sentence[1:]}."
        return say("incident", language, number=log_incident(error))


def shown(made: Made) -> list:
    """Video, both downloads, the settings, the group that holds them."""
    folder = made.folder
    if not (folder / VIDEO).is_file():
        return [gr.update(value=None), gr.update(value=None), gr.update(value=None), None, gr.update(visible=True)]
    settings = json.loads((folder / SETTINGS).read_text())
    return [str(folder / VIDEO), str(folder / VIDEO), str(folder / SETTINGS), settings, gr.update(visible=True)]


def gallery(history: list[Made]):
    """The session's videos that are still there."""
    posters = [(str(made.folder / POSTER), f"{made.seconds:.1f} s, {made.seed}") for made in history]
    return gr.update(value=[entry for entry in posters if Path(entry[0]).is_file()], visible=True)


def _found(image: Image.Image) -> tuple[float, ...] | None:
    try:
        return find_face(image)
    except UserError:
        return None


def _box_by_hand(percent, size: tuple[int, int]) -> tuple[float, ...]:
    """The sliders' box in pixels, its sides in order. UserError: no numbers."""
    if not all(isinstance(side, int | float) and not isinstance(side, bool) and abs(side) <= 1000 for side in percent):
        raise UserError("Face must be four numbers from 0 to 100")
    left, top, right, bottom = percent
    return from_percent((min(left, right), min(top, bottom), max(left, right), max(top, bottom)), size)


def _one_number(value):
    """Of a number that goes from one to another over the steps, the first: the page's controls hold one."""
    return value[0] if isinstance(value, list) and value else value


def _name(file) -> str:
    """What a visitor calls a file, for showing only."""
    name = file.get("orig_name") if isinstance(file, dict) else None
    return str(name or "?").replace("\\", "/").rsplit("/", 1)[-1][:NAME_LENGTH]
