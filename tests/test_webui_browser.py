"""The page as a person uses it: a real browser, headless, that uploads, looks, waits, cancels, plays and switches languages.

Its screenshots go to docs/images/ when SONIC_SCREENSHOTS names that folder; without it they are only taken.
"""

import io
import os
import re
import shutil
import wave
from pathlib import Path

import pytest
from PIL import Image

from sonic import webui
from sonic.config import SonicConfig
from sonic.media import VideoReader
from sonic.page_text import say
from sonic.pipeline import SonicPipeline
from sonic.weights import ROOT

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("there is no Chromium here: apt-get install chromium", allow_module_level=True)

PORTRAIT, SPEECH = ROOT / "examples/portrait.jpg", ROOT / "examples/audio.wav"
SWITCHES = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
DESKTOP, PHONE = {"width": 1180, "height": 860}, {"width": 390, "height": 844}
SECONDS = 0.8  # of the speech that is spoken here
WAIT = 120_000  # milliseconds, on a machine that does other things too


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A short speech, and files that are none."""
    folder = tmp_path_factory.mktemp("browser")
    with wave.open(str(SPEECH)) as long, wave.open(str(folder / "speech.wav"), "wb") as short:
        short.setparams(long.getparams())
        short.writeframes(long.readframes(int(SECONDS * long.getframerate())))
    (folder / "broken.png").write_text("no picture")
    Image.effect_noise((200, 160), 90).convert("RGB").save(folder / "faceless.png")
    return folder


@pytest.fixture(scope="module")
def address(folder):
    """A page of sonic-mini."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        page = webui.build(SonicPipeline(SonicConfig(device="cpu", num_inference_steps=8)))
        page.workshop.measure_pace()
        local, _ = webui.open_page(page)
        yield local
        page.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page in a window of its own; fails on errors of its scripts."""
    contexts, errors = [], []

    def open_window(locale="en-US", viewport=None, **more):
        context = browser.new_context(locale=locale, viewport=viewport or DESKTOP, **more)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.locator("#animate").wait_for()
        return page

    yield open_window
    for context in contexts:
        context.close()
    assert [error for error in errors if "implemented" not in error] == []  # gradio's own, of browsers without a camera


def snap(page, name: str, whole: bool = True) -> None:
    """A screenshot, as a small JPEG."""
    page.wait_for_timeout(600)  # until what slides has slid
    shot = Image.open(io.BytesIO(page.screenshot(full_page=whole))).convert("RGB")
    assert shot.getextrema() != ((255, 255),) * 3
    folder = os.environ.get("SONIC_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        shot.save(Path(folder, f"{name}.jpg"), quality=74, optimize=True)


def give(page, where: str, file: Path) -> None:
    page.set_input_files(f"#{where} input[type=file]", str(file))


def card(page):
    return page.locator("#status .card")


def test_from_a_portrait_and_a_voice_to_a_video(visit, folder):
    page = visit()
    snap(page, "page-start")
    give(page, "portrait", PORTRAIT)
    page.get_by_text(say("face_found")).wait_for()
    give(page, "speech", folder / "speech.wav")
    page.get_by_text("0.8 s of speech: 20 frames at 25 per second. About").wait_for()
    page.locator("#more").get_by_role("button").first.click()
    seed = page.get_by_label("Seed", exact=True)
    page.locator("#dice").click()
    page.wait_for_function("document.querySelector('#seed input').value != '42'")
    seed.fill("7")
    snap(page, "page-more")
    page.locator("#more").get_by_role("button").first.click()

    page.locator("#animate").click()
    page.locator("#status img").wait_for()
    page.get_by_role("progressbar").wait_for()
    playwright.expect(card(page)).to_contain_text("step")
    playwright.expect(page.locator("#animate")).to_be_disabled()
    snap(page, "page-working")
    page.locator("#cancel").click()
    page.get_by_text(say("cancelled")).wait_for()
    playwright.expect(page.locator("#animate")).to_be_enabled()
    assert page.locator("#get_video").count() == 0
    page.wait_for_timeout(1500)  # a job that went on would show itself
    playwright.expect(card(page)).to_contain_text(say("cancelled"))
    page.wait_for_timeout(500)  # and stays
    assert say("cancelled") in card(page).inner_text()
    snap(page, "page-cancelled")

    page.locator("#animate").focus()
    page.keyboard.press("Enter")  # no mouse is needed
    page.locator("#get_video").wait_for()
    playwright.expect(card(page)).to_contain_text("20 frames at 25 fps: 0.80 s, 128 × 128, seed 7, made in")
    page.locator("#history img").wait_for()
    assert page.locator("#history img").count() == 1
    page.evaluate("document.querySelector('#video video').muted = true")
    page.evaluate("document.querySelector('#video video').play()")
    page.wait_for_function("document.querySelector('#video video').currentTime > 0.2")
    page.wait_for_function("document.querySelector('#video video').readyState >= 2")
    snap(page, "page-video")

    with page.expect_download() as wanted:
        page.locator("#get_video").click()
    wanted.value.save_as(folder / "got.mp4")
    with VideoReader(folder / "got.mp4") as video:
        assert video.info.has_audio and video.num_ticks == 20
    with page.expect_download() as wanted:
        page.locator("#get_settings").click()
    assert '"seed": 7' in Path(wanted.value.path()).read_text()
    page.locator("#compare").click()
    page.locator("#plot img").wait_for()
    snap(page, "page-compare")

    page.get_by_text("中文").click()
    page.get_by_role("button", name=say("animate", "zh-CN")).wait_for()
    page.get_by_text(say("face_found", "zh-CN")).wait_for()
    page.get_by_role("tab", name=say("tab_batch", "zh-CN")).wait_for()
    playwright.expect(card(page)).to_contain_text("20 帧，25 帧/秒")
    assert page.locator("#history img").count() == 1  # what was made stays
    page.reload()
    page.get_by_role("button", name=say("animate", "zh-CN")).wait_for()  # and the choice is remembered


def test_a_wrong_file_and_a_face_drawn_by_hand(visit, folder):
    page = visit()
    give(page, "portrait", folder / "broken.png")
    page.get_by_text(say("bad_picture")).wait_for()
    snap(page, "page-wrong-file")
    page.locator("#animate").click()
    page.locator("#status").get_by_text(say("missing_speech")).wait_for()
    page.reload()
    page.locator("#animate").wait_for()
    give(page, "portrait", folder / "faceless.png")
    page.get_by_text("No face was found. Click two opposite corners").wait_for()
    view = page.locator("#face img")
    box = view.bounding_box()
    for x, y in ((0.3, 0.4), (0.7, 0.6)):
        view.click(position={"x": box["width"] * x, "y": box["height"] * y})
        page.get_by_text(say("corner" if x < 0.5 else "box_set")).wait_for()
    left = page.get_by_role("spinbutton", name="Left")
    playwright.expect(left).to_have_value(
        re.compile(r"[23]\d(\.\d+)?")
    )  # in per cent; the sliders follow a moment later
    snap(page, "page-face-by-hand")


def test_a_browser_in_chinese_on_a_phone(visit):
    page = visit(locale="zh-CN", viewport=PHONE, has_touch=True, is_mobile=True)
    page.get_by_role("button", name=say("animate", "zh-CN")).wait_for()
    page.get_by_text(say("idle", "zh-CN")).wait_for()
    page.locator("#example").click()
    page.get_by_text(say("face_found", "zh-CN")).wait_for()
    page.get_by_text("语音 3.9 秒").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    snap(page, "page-phone")


def test_a_batch_in_the_browser(visit, folder):
    page = visit()
    page.get_by_role("tab", name="Batch").click()
    give(page, "portraits", PORTRAIT)
    give(page, "speeches", folder / "speech.wav")
    page.locator("#portraits").get_by_text("portrait").first.wait_for()
    page.locator("#speeches").get_by_text("speech").first.wait_for()
    page.locator("#make_all").click()
    page.get_by_text("1 of 1 videos made.").wait_for()
    snap(page, "page-batch")
    with page.expect_download() as wanted:
        page.locator("#zip").click()
    assert Path(wanted.value.path()).read_bytes()[:2] == b"PK"


def everything_open(page) -> None:
    """All that can be unfolded, a portrait and a speech."""
    page.locator("#example").click()
    page.get_by_text(say("face_found")).wait_for()
    page.get_by_text("3.9 s of speech").wait_for()
    page.get_by_role("button", name=say("face_mode")).click()
    page.locator("#more").get_by_role("button").first.click()
    page.get_by_label("Seed", exact=True).wait_for()
    page.wait_for_timeout(500)


def test_everything_has_a_name_and_can_be_reached_with_the_keyboard(visit):
    page = visit()
    everything_open(page)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('input:not([type=file]), textarea, select, button')]
            .filter((item) => item.offsetParent && !(item.innerText || item.ariaLabel || item.title || item.placeholder
                || item.labels?.length || item.closest('label') || item.getAttribute('aria-labelledby')))
            .map((item) => item.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
    count = page.evaluate(
        """() => {
            // Of the buttons of one choice, Tab reaches the chosen one; the arrows reach the others.
            window.wanted = [...document.querySelectorAll('input:not([type=file]), textarea, select, button, a[href]')]
                .filter((item) => item.checkVisibility({visibilityProperty: true}) && !item.disabled && item.tabIndex >= 0
                    && (item.type !== 'radio' || item.checked));
            return wanted.length;
        }"""
    )
    assert count > 30
    page.evaluate("document.activeElement.blur(); window.reached = new Set(); window.unseen = []")
    for _ in range(count + 30):
        page.keyboard.press("Tab")
        page.evaluate(
            """() => {
                const item = document.activeElement, style = getComputedStyle(item);
                reached.add(item);
                const shown = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2;
                if (item !== document.body && item.matches('input, button, a, textarea') && !shown)
                    unseen.push(item.outerHTML.slice(0, 200));
            }"""
        )
    assert (
        page.evaluate("wanted.filter((item) => !reached.has(item)).map((item) => item.outerHTML.slice(0, 200))") == []
    )
    assert page.evaluate("unseen") == []  # where the focus is can be seen


def test_the_face_is_moved_with_the_keyboard_alone(visit):
    page = visit()
    everything_open(page)
    before = page.locator("#face img").get_attribute("src")
    left = page.get_by_role("slider", name="Left")
    was = float(left.input_value())
    left.focus()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    page.get_by_text(say("box_set")).wait_for()
    assert float(left.input_value()) == was - 2
    page.wait_for_function("(before) => document.querySelector('#face img').src !== before", arg=before)
    assert page.get_by_role("radio", name=say("face_hand")).is_checked()


DIM_TEXTS = """() => {
    const numbers = (colour) => { const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
    const over = (top, below) => top.slice(0, 3).map((value, i) => value * top[3] + below[i] * (1 - top[3]));
    const light = (colour) => colour.map((value) => value / 255)
        .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (item) => {
        const own = item ? numbers(getComputedStyle(item).backgroundColor) : [255, 255, 255, 1];
        return own[3] === 1 ? own.slice(0, 3) : over(own, behind(item.parentElement));
    };
    const dim = [];
    for (const item of document.querySelectorAll('body *')) {
        const says = [...item.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) || item.value || item.placeholder;
        if (!says || item.matches('script, style, [type=range], [type=radio], :disabled') || !item.getClientRects().length
            || !item.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
        const empty = item.placeholder && !item.value;
        const style = getComputedStyle(item, empty ? '::placeholder' : null), size = parseFloat(style.fontSize);
        const back = behind(item), text = over(numbers(style.color), back);
        const [dark, bright] = [light(back), light(text)].sort((a, b) => a - b);
        const ratio = (bright + 0.05) / (dark + 0.05), bold = Number(style.fontWeight) >= 700;
        if (ratio < (size >= 24 || (bold && size >= 18.66) ? 3 : 4.5))
            dim.push(`${(item.innerText || item.value || item.placeholder).slice(0, 40)}: ${ratio.toFixed(2)}, `
                + `${style.color} on ${back.map(Math.round)}`);
    }
    return dim;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them(visit, scheme):
    """By the measure of WCAG 2: 4.5 to 1, for large texts 3 to 1."""
    page = visit(color_scheme=scheme)
    assert page.evaluate(DIM_TEXTS) == []
    everything_open(page)
    assert page.evaluate(DIM_TEXTS) == []
    page.get_by_role("tab", name="Batch").click()
    page.locator("#portraits").wait_for()
    assert page.evaluate(DIM_TEXTS) == []
