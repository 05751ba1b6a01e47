"""The data report: its numbers are those of the pieces, its page is one harmless file, and examples show what was seen."""

import html.parser
import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

import sonic.data_report
from sonic.config import UserError
from sonic.data_report import PICTURE_SIDE, choose, example, histogram, summary, write_report
from sonic.faces import landmark_box
from sonic.measuring import Measured
from sonic.media import VideoReader
from sonic.pieces import Piece, Screening
from sonic.report_page import CURVE_HEIGHT, LISTED, _points, text
from sonic.sound import load_audio
from sonic.sync import speech_levels, speech_power

DATA = Path(__file__).parent / "data"
CLIP = "talking_head_2.mp4"
WILD = "<script>alert('1')</script> \" & \n 😀 \u202e\udcff.mp4"


def kept(video="a.mp4", start=0, ticks=100, **numbers) -> Piece:
    return Piece(video, start, ticks, True, numbers=numbers)


def dropped(
    video="b.mp4", step="faces", measure="face_size", measured=40.0, threshold=80.0, ticks=50, **numbers
) -> Piece:
    numbers = {measure: measured, **numbers} if measure else numbers
    reason = "the face is too small"
    return Piece(video, 0, ticks, False, step, reason, measure, measured, threshold, numbers)


def broken(video="c.mp4") -> Piece:
    return Piece(video, 0, 0, False, "probe", "truncated")


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: its elements, what they refer to, and its text."""

    def __init__(self, content: str):
        super().__init__()
        self.tags, self.links, self.texts, self.open = [], [], [], []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in ("meta", "img", "br", "rect", "line", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_kept_and_dropped_are_counted_by_step():
    pieces = [kept(), kept(start=200, ticks=50), dropped(), dropped("d.mp4", "sync", "sync_r", 0.1, 0.2), broken()]
    numbers = summary(pieces, Screening())
    assert numbers["videos"] == 4 and numbers["videos_used"] == 1 and numbers["annotated"] == 0
    assert numbers["kept"] == {"pieces": 2, "seconds": 6.0} and numbers["dropped"] == {"pieces": 3, "seconds": 4.0}
    counts = {step: facts["pieces"] for step, facts in numbers["steps"].items() if facts["pieces"]}
    assert counts == {"probe": 1, "faces": 1, "sync": 1}
    assert numbers["thresholds"]["min_face"] == Screening().min_face


def test_annotated_pieces_are_kept_and_still_listed(tmp_path):
    piece = Piece("a.mp4", 0, 50, True, "sync", "no correlation", "sync_r", 0.05, 0.2, {"sync_r": 0.05})
    page = write_report([piece], Screening(keep_all=True), tmp_path, tmp_path, progress=False).read_text()
    assert "sync (kept)" in page and "in spite of a step" in page
    assert json.loads((tmp_path / "report.json").read_text())["dropped_pieces"][0]["kept"] is True


def test_histograms_count_every_measured_piece_once():
    pieces = [kept(face_size=size) for size in (90.0, 120.0, 200.0)] + [
        dropped(measured=40.0),
        kept(face_size=float("nan")),
    ]
    bins = histogram("face_size", pieces)
    assert (sum(bins["kept"]), sum(bins["dropped"]), bins["unmeasured"]) == (3, 1, 1)
    assert bins["dropped"][0] == 1 and bins["kept"][-1] == 1
    assert bins["thresholds"] == [80.0] and bins["range"] == [40, 200]


def test_whole_numbers_have_one_bar_each():
    bins = histogram("sync_offset", [kept(sync_offset=offset) for offset in (-2.0, 0.0, 0.0, 1.0)])
    assert bins["kept"] == [1, 0, 2, 1] and bins["edges"] == [-2.5, -1.5, -0.5, 0.5, 1.5]


def test_what_was_never_measured_has_no_histogram_and_no_failure(tmp_path):
    assert histogram("face_size", [broken()])["edges"] == []
    page = write_report([broken()], Screening(), tmp_path, tmp_path, progress=False).read_text()
    assert "nothing was measured" in page and "There are none." in page


def test_examples_are_random_but_the_same_every_time():
    pieces = [kept(f"{number}.mp4") for number in range(200)]
    chosen = choose(pieces)
    assert len(set(chosen_names := [piece.video for piece in chosen])) == 50
    assert chosen_names == [piece.video for piece in choose(pieces)] != [piece.video for piece in pieces[:50]]
    assert choose(pieces[:3]) == pieces[:3]


def test_an_example_shows_six_pictures_with_the_face_and_both_curves():
    points = np.tile(np.random.default_rng(0).uniform(100, 200, (68, 2)), (80, 1, 1)).astype(np.float32)
    points[:, 65:68, 1] += np.linspace(0, 50, 80)[:, None]  # a mouth that opens
    levels = speech_levels(speech_power(load_audio(DATA / CLIP)[: 80 * 640], 80))
    measured = Measured(tracks=[(0, landmark_box(points), points)], curves={"speech": levels})
    seen = example(kept(CLIP, start=5, ticks=60), DATA, measured)
    strip = cv2.imdecode(np.frombuffer(seen.strip, np.uint8), cv2.IMREAD_COLOR)
    with VideoReader(DATA / CLIP) as reader:
        sides = (
            PICTURE_SIDE
            * np.array([reader.info.height, reader.info.width])
            / max(reader.info.height, reader.info.width)
        )
        first = next(reader.frames([5], max_side=PICTURE_SIDE))[1]
    assert strip.shape[:2] == (round(sides[0]), 6 * round(sides[1])) and seen.width == strip.shape[1]
    assert np.abs(strip[:, : first.shape[1], ::-1].astype(float) - first).mean() < 8  # the box is drawn in one of them
    assert len(seen.mouth) == len(seen.speech) == 60
    assert seen.mouth[-1] > seen.mouth[0] and 0.5 < max(seen.speech) <= 1
    assert len(seen.strip) < 60_000 and seen.trouble is None


def test_a_piece_of_one_tick_is_shown_without_curves_of_speech():
    points = np.random.default_rng(0).uniform(100, 200, (1, 68, 2)).astype(np.float32)
    measured = Measured(tracks=[(0, landmark_box(points), points)], curves={"speech": np.zeros((8, 2))})
    seen = example(kept(CLIP, ticks=1), DATA, measured)
    assert seen.strip and seen.speech is None and len(seen.mouth) == 1


def test_a_file_that_is_gone_or_broken_is_told_in_its_example(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    assert "does not exist" in example(kept("gone.mp4"), tmp_path, None).trouble
    assert "cannot be opened" in example(kept("text.mp4"), tmp_path, None).trouble
    assert example(broken(), tmp_path, None).trouble == "truncated"
    shutil.copy(DATA / CLIP, tmp_path)
    assert "has ticks 0 to" in example(kept(CLIP, start=10**6), tmp_path, None).trouble


def test_the_page_is_one_file_that_no_name_can_harm(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "out").mkdir()
    name = WILD.replace("/", "_")
    shutil.copy(DATA / CLIP, data / name)
    pieces = [
        kept(name, ticks=60, **{"<b>odd</b>": 1.0}, sync_offset=1.0, sync_confidence=None),
        dropped(name),
        dropped(WILD, step="<i>", measure="<u>"),
    ]
    path = write_report(pieces, Screening(), data, tmp_path / "out", progress=False)
    content = path.read_text(encoding="utf-8")
    page = Page(content)
    assert page.open == [] and not {"script", "b>odd", "u", "link", "iframe"} & set(page.tags)
    assert page.links and all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert not re.search(r"https?:|@import|url\(", content)
    assert "\u202e" not in content and "\\n 😀 \\u202e\\udcff.mp4" in "".join(page.texts)
    listed = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {row["video"] for row in listed["dropped_pieces"]} == {name, WILD}


def test_workers_draw_the_same_page_and_one_that_dies_is_told(tmp_path, monkeypatch):
    shutil.copy(DATA / CLIP, tmp_path)
    pieces = [kept(CLIP, start=start, ticks=20) for start in (0, 20, 40)] + [dropped(CLIP, ticks=30), broken()]
    pages = []
    monkeypatch.setattr(sonic.data_report, "MANY", 4)
    for num_workers in (0, 2):
        pages.append(write_report(pieces, Screening(), tmp_path, tmp_path, num_workers, progress=False).read_text())
    assert pages[0] == pages[1] and pages[0].count("data:image/jpeg") == 4
    monkeypatch.setattr(sonic.data_report, "in_workers", lambda *_: iter([(3, None, True)]))
    page = write_report(pieces, Screening(), tmp_path, tmp_path, 2, progress=False).read_text()
    assert page.partition("Dropped pieces")[2].count("killed the process that drew it") == 2


def test_text_spells_out_what_cannot_be_printed():
    assert text("a\nb") == "a\\nb" and text("<é 😀>") == "&lt;é 😀&gt;" and text("\"'") == "&quot;&#x27;"


def test_the_list_has_step_measure_and_threshold_and_an_end(tmp_path):
    pieces = [dropped(f"{number}.mp4", ticks=0) for number in range(LISTED + 2)]
    content = write_report(pieces, Screening(), tmp_path, tmp_path, progress=False).read_text()
    rows = [line for line in content.split("<tr>") if "the face is too small" in line and 'class="name"' in line]
    assert len(rows) == LISTED and f"of {LISTED + 2}; report.json lists all" in content
    cells = re.findall(r"<td[^>]*>([^<]*)", rows[0])
    assert cells == ["0.mp4", "", "", "faces", "the face is too small", "face_size", "40", "80"]
    assert len(json.loads((tmp_path / "report.json").read_text())["dropped_pieces"]) == LISTED + 2


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--cache_dir"):
        write_report([kept(ticks=0)], Screening(), tmp_path, tmp_path / "file", progress=False)


def test_a_mouth_that_hardly_opens_is_drawn_low():
    def heights(curve):
        return [float(point.split(",")[1]) for point in _points(curve, 0.15).split()]

    assert min(heights([0.01, 0.015])) > 0.8 * CURVE_HEIGHT  # from above: near the bottom
    assert min(heights([0.01, 0.4])) < 0.1 * CURVE_HEIGHT
    assert len(heights([0.3])) == 1


def test_measures_that_are_no_number_are_left_out_of_a_caption(tmp_path):
    piece = kept(ticks=0, face_size=100.0, sync_offset=float("nan"), sync_confidence=None)
    page = write_report([piece], Screening(), tmp_path, tmp_path, progress=False).read_text()
    assert "face 100 px" in page and "nan" not in page.partition("Kept pieces")[2].lower()
