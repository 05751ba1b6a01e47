"""What the web page shows beyond gradio's components: the card of a job, the table of a batch, the box on the portrait."""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
from PIL import Image, ImageDraw

from sonic.page_jobs import Job, Made
from sonic.page_text import duration, say

FACE_VIEW = 480  # pixels of the longer side of the portrait with its box
PREVIEW = 192  # pixels of the longer side of a preview
BOX, CORNER = "#22c55e", "#f97316"

# Fonts that every system has: the page must look the same without a network.
FONT, MONO = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")

# Texts of gradio's theme that stand out too little from what is behind them: WCAG asks for 4.5 to 1.
CONTRAST = {
    "background_fill_primary": "*neutral_50",  # the theme's own, which `set` forgets
    "body_text_color_subdued": "*neutral_500",
    "input_placeholder_color": "*neutral_500",
    "input_placeholder_color_dark": "*neutral_300",
    "block_label_text_color": "*primary_700",
    "block_title_text_color": "*primary_700",
    "color_accent": "*primary_600",
    "button_primary_background_fill": "*primary_600",
    "button_primary_background_fill_hover": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_700",
    "button_secondary_background_fill_hover_dark": "*neutral_700",
    "checkbox_label_background_fill_selected": "*primary_600",
}

CSS = """
.gradio-container, .gradio-container > main, main.app { max-width: 1180px !important; width: 100%; margin: 0 auto !important; }
.dark .gradio-container { --color-accent: var(--primary-400); }
footer .divider { display: none; }
#head { align-items: center; gap: 12px; }
#head h1 { margin: 0; font-size: 1.7rem; line-height: 1.2; }
#head p { margin: 2px 0 0; color: var(--body-text-color-subdued); }
#language { min-width: 0 !important; flex: 0 0 auto !important; width: auto; border: none; background: none; padding: 0;
            box-shadow: none; overflow: visible; }
#language .wrap { flex-wrap: nowrap; justify-content: flex-end; gap: 6px; }
#language label { padding: 6px 12px; }
#language > div, #language fieldset { background: none; }
.html-container { padding: 0 !important; }
#dice { align-self: end; }
#history .grid-container { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)) !important; padding-top: 28px; }
#history .thumbnail-item, #history .thumbnail-lg { aspect-ratio: 1; }
.card { border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 14px 16px;
        background: var(--block-background-fill); display: flex; gap: 16px; align-items: center; min-height: 64px; }
.card img { width: 112px; height: 112px; object-fit: cover; border-radius: 8px; flex: none; }
.card .what { flex: 1; min-width: 0; }
.card .stage { font-weight: 600; overflow-wrap: anywhere; }
.card .detail { color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; margin-top: 2px; }
.card .bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); margin-top: 10px; overflow: hidden; }
.card .bar div { height: 100%; border-radius: 4px; background: var(--color-accent); transition: width .3s linear; }
.card.quiet { color: var(--body-text-color-subdued); justify-content: center; text-align: center;
              text-wrap: balance; }
.card.bad { border-color: var(--error-border-color, #ef4444); }
.jobs { overflow-x: auto; }
.jobs table { width: 100%; border-collapse: collapse; }
.jobs table, .jobs tr { border: none !important; }
.jobs th, .jobs td { text-align: left; padding: 6px 10px; border: none !important; overflow-wrap: anywhere;
                     border-bottom: 1px solid var(--border-color-primary) !important; }
.jobs td.number { font-variant-numeric: tabular-nums; width: 3em; }
.jobs + .note { margin-top: 10px; }
.note { color: var(--body-text-color-subdued); padding: 0 2px; }
#animate, #make_all, #cancel, #cancel_batch { min-height: 48px; }
#speech time, #speech .playback, #speech .playback * { color: var(--body-text-color-subdued) !important; }
#face .image-container { height: calc(100% - 41px); }
#plot img { padding-top: 44px; }
#beside video { padding-top: 40px; }
:focus-visible { outline: 3px solid var(--color-accent) !important; outline-offset: 2px; }
@media (max-width: 640px) {
  .gradio-container { padding: 10px !important; }
  #head h1 { font-size: 1.35rem; }
  .card img { width: 84px; height: 84px; }
}
"""

# gradio has a function that changes the language of a page that is open, in a file whose name ends in a hash.
_SPEAK = """const speak = async (language) => {
    const files = performance.getEntriesByType("resource").map((entry) => entry.name);
    const core = files.find((name) => /\\/core-[^/]*\\.js$/.test(name));
    if (core) (await import(core)).changeLocale(language);
    document.documentElement.lang = language;
  };"""
# A choice is kept in the browser; without one, the browser's own language holds, as gradio does it by itself.
FIRST_LANGUAGE = f"""async () => {{
  {_SPEAK}
  let chosen = null;
  try {{ chosen = localStorage.getItem("sonic-language"); }} catch (error) {{}}
  if (chosen) await speak(chosen);
  return chosen || ((navigator.language || "en").toLowerCase().startsWith("zh") ? "zh-CN" : "en");
}}"""
SWITCH_LANGUAGE = f"""async (language) => {{
  {_SPEAK}
  try {{ localStorage.setItem("sonic-language", language); }} catch (error) {{}}
  await speak(language);
  return [language];
}}"""
# A browser's sign for a picture that it cannot show is none of ours: TIFF is read here all the same, and a broken file is told.
# And the button around the view of the face gets a name, which gradio has none for.
PICTURES = """() => {
  const mark = (visibility) => (event) => {
    if (event.target.tagName !== "IMG") return;
    event.target.style.visibility = visibility;
    const name = document.querySelector("#face label")?.innerText.trim();
    event.target.closest("#face button")?.setAttribute("aria-label", name);
  };
  document.addEventListener("error", mark("hidden"), true);
  document.addEventListener("load", mark("visible"), true);
}"""
ROLL = "() => Math.floor(Math.random() * 1000000)"


def data_uri(picture: np.ndarray | Image.Image) -> str:
    """A small picture inside the page itself, without a file."""
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.thumbnail((PREVIEW, PREVIEW))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def quiet_card(sentence: str) -> str:
    return f'<div class="card quiet" role="status">{escape(sentence)}</div>'


def bad_card(sentence: str) -> str:
    return f'<div class="card bad" role="alert">{escape(sentence)}</div>'


def note(sentence: str) -> str:
    return f'<div class="note" role="status">{escape(sentence)}</div>'


def job_card(job: Job, language: str) -> str:
    """Stage, step, time left, a bar and a preview."""
    stage, percent = say(job.stage, language), 100 * job.share
    details = [f"{percent:.0f} %"]
    if job.progress:
        details.append(say("step_of", language, done=job.progress.done, total=job.progress.total))
        if job.seconds_left is not None:
            details.append(say("left_over", language, time=duration(job.seconds_left, language)))
    preview = ""
    if job.picture is not None:
        preview = f'<img src="{data_uri(job.picture)}" alt="{escape(say("preview", language))}">'
    return (
        f'<div class="card">{preview}<div class="what"><div class="stage" role="status">{escape(stage)}</div>'
        f'<div class="detail">{escape(" · ".join(details))}</div>'
        f'<div class="bar" role="progressbar" aria-label="{escape(stage)}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{percent:.0f}"><div style="width:{percent:.1f}%"></div></div></div></div>'
    )


def made_sentence(made: Made, language: str) -> str:
    return say(
        "made",
        language,
        frames=made.frames,
        fps=made.fps,
        seconds=made.seconds,
        width=made.width,
        height=made.height,
        seed=made.seed,
        time=duration(made.took, language),
    )


def batch_table(rows: list[tuple[str, str, str]], language: str) -> str:
    """Names as their visitor gave them, and the state of each; nothing in them is markup."""
    head = "".join(
        f"<th scope='col'>{escape(text)}</th>"
        for text in ("#", *(say(k, language) for k in ("portrait", "speech", "state")))
    )
    lines = (
        f"<tr><td class='number'>{number}</td>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for number, row in enumerate(rows, start=1)
    )
    return f"<div class='jobs'><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def face_view(portrait: Image.Image, box: tuple[float, float, float, float] | None, corner=None) -> Image.Image:
    """The portrait, made small, with the face box (its pixels) or the first corner of one that is being drawn."""
    scale = FACE_VIEW / max(portrait.size)
    view = portrait.resize([max(1, round(side * scale)) for side in portrait.size])
    draw = ImageDraw.Draw(view)
    if box:
        draw.rectangle([side * scale for side in box], outline=BOX, width=4)
    if corner:
        x, y = (side * scale for side in corner)
        draw.line([x - 12, y, x + 12, y], fill=CORNER, width=4)
        draw.line([x, y - 12, x, y + 12], fill=CORNER, width=4)
    return view


def to_percent(box, size: tuple[int, int]) -> tuple[float, ...]:
    """Left, top, right, bottom in per cent of a picture of this size, within it."""
    return tuple(round(min(100.0, max(0.0, 100 * side / size[index % 2])), 1) for index, side in enumerate(box))


def from_percent(percent, size: tuple[int, int]) -> tuple[float, ...]:
    return tuple(side / 100 * size[index % 2] for index, side in enumerate(percent))
