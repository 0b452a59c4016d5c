from __future__ import annotations

import base64
import math
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from swifti2v.errors import OutputError, VideoInputError
from swifti2v.evaluation import report
from swifti2v.evaluation.report import write_report
from swifti2v.evaluation.report_figures import SERIES_COLORS
from swifti2v.evaluation.results import Better, Curve, Evaluation, Metric, VideoResult
from swifti2v.evaluation.tables import DASH, number_texts, setting_text, table_row
from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter

HEIGHT, WIDTH, FRAMES = 64, 96, 5
NAN = math.nan
EMPTY_ELEMENTS = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """Elements of a page with their attributes and their own text, and whether every element is closed in its turn."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[int] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self._open, "unclosed elements"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.texts.append("")
        if tag not in EMPTY_ELEMENTS:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open.pop()][0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self.texts[index] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str) -> list[str]:
        found = [text for (name, _), text in zip(self.elements, self.texts, strict=True) if name == tag]
        return [" ".join(text.split()) for text in found]


def write_video(path: Path, shade: int = 0) -> str:
    with VideoWriter(path, size=Size(WIDTH, HEIGHT), fps=8, preset="ultrafast", num_threads=1) as writer:
        for t in range(FRAMES):
            frame = np.full((1, HEIGHT, WIDTH, 3), 60 + shade, np.uint8)
            frame[:, 10:40, 4 * t : 4 * t + 20] = 200
            writer.write(frame)
    return str(path)


def video(label: str, path: str | None, **values: float) -> VideoResult:
    curve = Curve("m", tuple(range(FRAMES)), tuple(math.sin(t) for t in range(FRAMES)))
    return VideoResult(label, path, WIDTH, HEIGHT, FRAMES, 8.0, values, (curve,), (f"Note of {label}.",))


def metric(better: Better = "higher", name: str = "m") -> Metric:
    return Metric(name, f"Label of {name}", better, f"formula of {name}")


def evaluation(folder: Path) -> Evaluation:
    Image.new("RGB", (WIDTH, HEIGHT), (60, 60, 60)).save(folder / "image.png")
    videos = (
        video("a", write_video(folder / "a.mp4"), m=1.5, n=2.0),
        video("b", write_video(folder / "b.mp4", 30), m=2.5, n=NAN),
        video("still image", None, m=9.0, n=1.0),
    )
    truth = write_video(folder / "truth.mp4", 10)
    settings = {"segment_size": 4, "packages": {"torch": "2.9"}, "fast": True}
    return Evaluation(videos, (metric(), metric("lower", "n")), str(folder / "image.png"), truth, settings)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("evaluated")
    return Page(write_report(evaluation(folder), folder / "out" / "deep"))


def test_the_page_asks_for_nothing_outside_of_itself(page: Page) -> None:
    addresses = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action")
    ]
    assert len(addresses) > 10
    assert all(address.startswith(("data:", "#")) for address in addresses)
    policy = next(each["content"] for each in page.all("meta") if "http-equiv" in each)
    assert policy.startswith("default-src 'none'")
    everything = " ".join(value for _, attributes in page.elements for value in attributes.values())
    assert not re.search(r"https?:", everything)
    assert not re.search(r"url\((?!#)|@import|https?:", " ".join(page.text("style") + page.text("script")))


def test_videos_are_held_in_the_page_byte_by_byte(tmp_path: Path) -> None:
    made = evaluation(tmp_path)
    players = Page(write_report(made, tmp_path)).all("video")
    assert [each["aria-label"] for each in players] == ["Video a", "Video b", "Video truth"]
    kind, _, data = players[1]["src"].partition(",")
    assert kind == "data:video/mp4;base64"
    assert base64.b64decode(data) == (tmp_path / "b.mp4").read_bytes()


def test_large_videos_are_copied_beside_the_page_which_can_then_be_moved(tmp_path: Path) -> None:
    folder = tmp_path / "reports"
    (folder / "media").mkdir(parents=True)
    videos = (
        video("a", write_video(tmp_path / "a #1.mp4")),
        video("old", write_video(folder / "media" / "a #1.mp4", 30)),  # of an older report: not overwritten
    )
    originals = [Path(each.path or "").read_bytes() for each in videos]
    for _ in range(2):
        written = write_report(Evaluation(videos, ()), folder, embed_limit_bytes=100)
    moved = folder.rename(tmp_path / "moved")
    addresses = [player["src"] for player in Page(moved / written.name).all("video")]
    assert [(moved / unquote(address)).read_bytes() for address in addresses] == originals
    assert all(address.startswith("media/") for address in addresses)
    assert len(list((moved / "media").iterdir())) == 3


def test_a_copy_that_cannot_be_written_leaves_no_page(tmp_path: Path) -> None:
    one = video("a", write_video(tmp_path / "a.mp4"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "media").write_text("a file in the way")
    with pytest.raises(OutputError):
        write_report(Evaluation((one,), ()), tmp_path / "out", embed_limit_bytes=100)
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_format_that_browsers_do_not_play_is_said_so(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    strange = (tmp_path / "a.mp4").rename(tmp_path / "a.m2ts")
    written = Page(write_report(Evaluation((video("a", str(strange)),), ()), tmp_path))
    assert not written.all("video")
    assert any("convert the file to MP4" in text for text in written.text("p"))


def test_the_page_tells_what_was_judged(page: Page) -> None:
    rows = page.text("tr")
    assert "a a.mp4 96 \N{MULTIPLICATION SIGN} 64 5 8 fps 0.62 s" in rows
    assert "still image control, made in memory 96 \N{MULTIPLICATION SIGN} 64 5 8 fps 0.62 s" in rows
    assert [text for text in page.text("li") if "Note" in text] == [
        "a: Note of a.",
        "b: Note of b.",
        "still image: Note of still image.",
    ]
    lead = page.text("p")[0]
    assert (
        lead == "2 videos and 1 control, made from the image image.png, with the true video truth.mp4 to compare with."
    )


def test_the_table_marks_the_best_and_shows_a_dash(page: Page) -> None:
    rows = page.text("tr")
    assert "Label of m ↑ 1.500 best 2.500 9.000" in rows
    assert f"Label of n ↓ 2.000 {DASH}not defined 1.000" in rows


def test_every_metric_is_defined(page: Page) -> None:
    definitions = page.text("dl")[0]
    for name, better in (("m", "higher is better"), ("n", "lower is better")):
        assert f"Label of {name} formula of {name}; {better}." in definitions
    targets = {each["id"] for _, each in page.elements if "id" in each}
    assert {each["href"][1:] for each in page.all("a")} <= targets


def test_settings_are_told(page: Page) -> None:
    assert page.text("dl")[1] == 'segment_size4 packages{"torch": "2.9"} fastyes'


def test_who_does_not_see_the_page_can_read_it(page: Page) -> None:
    """Alternative texts, headings without gaps, one h1, tables with scopes, names once, labeled controls."""
    images = page.all("img")
    assert len(images) > 5
    assert all(each["alt"] for each in images)
    assert ["a: mean" in each["alt"] for each in images].count(True) == 1
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch(r"h[1-6]", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(each.get("scope") in ("row", "col") for each in page.all("th"))
    names = [each["id"] for _, each in page.elements if "id" in each]
    assert len(names) == len(set(names))
    assert all(each.get("aria-label") for each in page.all("input"))
    assert page.all("html")[0]["lang"] == "en"
    assert all(text for text in page.text("figcaption"))


def test_labels_and_notes_are_text_not_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&\"'"
    one = VideoResult(evil, write_video(tmp_path / "a.mp4"), WIDTH, HEIGHT, FRAMES, 8.0, {"m": 1}, (), (evil,))
    made = Evaluation((one,), (Metric("m", evil, "neither", evil),), settings={evil: evil})
    written = Page(write_report(made, tmp_path))
    assert len(written.all("script")) == 1
    assert written.text("dt") == [evil, evil]
    assert any(evil in text for text in written.text("li"))


def test_an_evaluation_without_files_is_numbers_only(tmp_path: Path) -> None:
    made = Evaluation((video("still image", None, m=1.0),), (metric(),))
    written = Page(write_report(made, tmp_path))
    assert not written.all("video")
    assert len(written.all("img")) == 1, "the plot"
    assert written.text("h2") == ["What was judged", "Numbers", "Over time", "Definitions"]


def test_an_older_report_stays_if_the_new_one_fails(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old", encoding="utf-8")
    with pytest.raises(VideoInputError):
        write_report(Evaluation((video("a", str(tmp_path / "gone.mp4")),), ()), tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "old"


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(OutputError):
        write_report(Evaluation((), ()), tmp_path / "file")


@pytest.mark.parametrize("package", ["jinja2", "matplotlib.figure"])
def test_without_a_package_the_error_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OutputError, match=r"pip install 'swifti2v\[evaluate\]'"):
        write_report(Evaluation((video("a", None),), (metric(),)), tmp_path)


@pytest.mark.parametrize(("better", "values", "best"), [
    ("higher", [1.0, 3.0, 2.0], [1]),
    ("lower", [1.0, 3.0, 2.0], [0]),
    ("one", [0.8, 1.1, 3.0], [1]),
    ("zero", [-0.1, 0.2, 3.0], [0]),
    ("neither", [1.0, 2.0, 3.0], []),
    ("higher", [NAN, 3.0, 2.0], [1]),
    ("higher", [NAN, 3.0, NAN], []),
    ("higher", [3.0, 3.0, 2.0], [0, 1]),
    ("higher", [3.00001, 3.00002, 2.0], [0, 1]),
])  # fmt: skip
def test_best_is_what_the_metric_says(better: Better, values: list[float], best: list[int]) -> None:
    """Numbers that look equal are equally good; one number alone is not the best."""
    videos = [video(f"v{index}", "file.mp4", m=value) for index, value in enumerate(values)]
    row = table_row(metric(better), videos)
    assert [index for index, cell in enumerate(row) if cell.best] == best


def test_a_control_is_not_ranked_and_a_missing_number_is_a_dash() -> None:
    videos = [video("a", "a.mp4", m=2.0), video("b", "b.mp4", m=1.0), video("still", None, m=9.0), video("c", "c.mp4")]
    row = table_row(metric(), videos)
    assert [cell.best for cell in row] == [True, False, False, False]
    assert row[3].text == DASH


@pytest.mark.parametrize(("values", "expected"), [
    ([31.2345, 0.98765], ["31.23", "0.99"]),
    ([0.98765, 1.0], ["0.988", "1.000"]),
    ([12345.6, -3.2], ["12346", "-3"]),
    ([0.0, 0.0], ["0", "0"]),
    ([0.00123, NAN], ["0.001230", DASH]),
    ([0.0000123, 0.0], ["1.23e-05", "0.00e+00"]),
    ([math.inf, -math.inf], ["∞", "-∞"]),
])  # fmt: skip
def test_numbers_of_a_row_have_the_same_decimals(values: list[float], expected: list[str]) -> None:
    assert [text.replace("\N{MINUS SIGN}", "-") for text in number_texts(values)] == expected


@pytest.mark.parametrize(("value", "expected"), [
    ("text", "text"), (None, "none"), (False, "no"), (1, "1"), (0.5, "0.5"), ([1, "é"], '[1, "é"]'),
])  # fmt: skip
def test_settings_are_read_by_people(value: object, expected: str) -> None:
    assert setting_text(value) == expected


def test_plots_and_page_have_the_same_colors() -> None:
    light = schemes()[0]
    assert [light[f"series-{number}"] for number in range(1, len(SERIES_COLORS) + 1)] == list(SERIES_COLORS)


def luminance(color: str) -> float:
    levels = np.array([int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)])
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def schemes() -> list[dict[str, str]]:
    style = (report.resources.files("swifti2v.evaluation") / "assets" / "report.css").read_text(encoding="utf-8")
    return [dict(re.findall(r"--([\w-]+): (#\w{6});", part)) for part in style.split("prefers-color-scheme: dark")[:2]]


@pytest.mark.parametrize("scheme", schemes(), ids=["light", "dark"])
def test_every_text_can_be_told_from_its_ground(scheme: dict[str, str]) -> None:
    """Contrast of WCAG 2.1, level AA: at least 4.5."""
    texts = ["ink", "soft", "accent", *(f"series-{number}" for number in range(1, len(SERIES_COLORS) + 1))]
    pairs = [(text, "paper") for text in texts] + [("good-ink", "good"), ("ink", "panel"), ("soft", "panel")]
    for text, ground in pairs:
        low, high = sorted(luminance(scheme[name]) for name in (text, ground))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)
