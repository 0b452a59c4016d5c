"""The report in a browser: what only a browser can tell. Skipped where there is none."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image

from swifti2v.evaluation.report import EMBED_LIMIT_BYTES, write_report
from swifti2v.evaluation.results import Curve, Evaluation, Metric, VideoResult
from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter
from tests.browsers import BROWSER, needs_browser

FRAMES, FPS = 16, 8
LONG_LABEL = "a_file_name_without_any_space_that_is_much_longer_than_a_label_should_be"

pytestmark = [
    pytest.mark.slow,
    needs_browser,
]

# Loads the report as a phone shows it, uses the controls, and writes down what it sees.
HARNESS = """<!DOCTYPE html><meta charset="utf-8">
<iframe src="report.html" style="width:420px;height:900px;border:0"></iframe>
<script>
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const until = async (test) => { for (let i = 0; i < 6000 && !test(); i++) await pause(50); };
window.addEventListener("load", async () => {
  const page = document.querySelector("iframe").contentDocument;
  const find = (selector) => page.querySelector(selector);
  const videos = [...page.querySelectorAll("video")];
  const slider = find(".controls input");
  const seen = {};
  await until(() => videos.every((video) => video.readyState >= 2));
  const settled = async () => { await pause(20); await until(() => videos.every((video) => !video.seeking)); };
  seen.durations = videos.map((video) => video.duration);
  seen.texts = [...page.querySelectorAll(".duration")].map((each) => each.textContent);
  seen.widths = [page.documentElement.scrollWidth, page.documentElement.clientWidth];
  seen.wide = [...page.querySelectorAll("body *")].filter((each) => !each.closest(".scroll, .skip, .unseen"))
    .filter((each) => each.getBoundingClientRect().right > 421).map((each) => each.outerHTML.slice(0, 80));
  seen.broken = [...page.images].filter((image) => !image.naturalWidth).map((image) => image.alt);
  seen.last = slider.max;
  find("[data-action=forward]").click();
  await settled();
  seen.forward = [slider.value, ...videos.map((video) => video.currentTime)];
  slider.value = 9;
  slider.dispatchEvent(new Event("input"));
  await settled();
  seen.scrubbed = [slider.value, find("output").textContent, ...videos.map((video) => video.currentTime)];
  find("[data-action=back]").click();
  await settled();
  seen.back = slider.value;
  const begun = videos.map((video) => new Promise((done) => video.addEventListener("play", () => done(true))));
  find("[data-action=play]").click();
  seen.started = await Promise.all(begun);
  find("[data-action=play]").click();
  await until(() => find("[data-action=play]").textContent === "Play");
  seen.paused = videos.map((video) => video.paused);
  slider.value = 12;
  slider.dispatchEvent(new Event("input"));
  await settled();
  find("[data-action=play]").click();
  await until(() => videos.every((video) => video.currentTime > 1.9));
  await until(() => find("[data-action=play]").textContent === "Play");
  seen.ended = [slider.value, ...videos.map((video) => video.paused && video.currentTime > 1.9)];
  await fetch("seen", { method: "POST", body: JSON.stringify(seen) });
});
</script>
"""


def command(address: str, *options: str, profile: Path) -> list[str]:
    """Return the command that opens an address without a window, in a profile of its own."""
    return [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        "--v=0",
        f"--user-data-dir={profile}",
        *options,
        address,
    ]


def console(log: str) -> list[str]:
    """Return what pages wrote to the console."""
    return [line for line in log.splitlines() if "CONSOLE" in line]


def browse(page: Path, *options: str, profile: Path) -> list[str]:
    """Open a file and return what it writes to the console."""
    done = subprocess.run(  # noqa: S603 - a browser found by its name, and files of this test
        command(page.as_uri(), *options, profile=profile), capture_output=True, text=True, timeout=600, check=True
    )
    return console(done.stderr)


class Listener(ThreadingHTTPServer):
    """Serves a folder to this machine only, and keeps what a page sends to it.

    Time in a headless browser that prints or draws a page is not that of its videos; here a page takes its time.
    """

    def __init__(self, folder: Path) -> None:
        self.received: Queue[dict[str, Any]] = Queue()
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))


class Handler(SimpleHTTPRequestHandler):
    server: Listener

    def do_GET(self) -> None:
        """Give parts of files, as the file system does: a browser cannot seek in a video without."""
        path, asked = Path(self.translate_path(self.path)), self.headers.get("Range")
        if asked is None or not path.is_file():
            super().do_GET()
            return
        content = path.read_bytes()
        start, _, last = asked.removeprefix("bytes=").partition("-")
        part = content[int(start) : int(last) + 1 if last else None]
        self.send_response(206)
        self.send_header("Content-Type", self.guess_type(path))
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()
        self.server.received.put(json.loads(body))

    def log_message(self, *args: object) -> None:
        """Requests are of no interest."""


@pytest.fixture(scope="module", params=[EMBED_LIMIT_BYTES, 0], ids=["embedded", "linked"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report whose folder was moved and whose videos are gone: what it shows, it holds."""
    root = tmp_path_factory.mktemp("report")
    folder = root / "originals"
    folder.mkdir()
    Image.new("RGB", (160, 96), (90, 120, 200)).save(folder / "image.png")
    videos = []
    for index, label in enumerate(("first", LONG_LABEL)):
        path = folder / f"{label}.mp4"
        with VideoWriter(path, size=Size(160, 96), fps=FPS, preset="ultrafast", num_threads=1) as writer:
            for t in range(FRAMES):
                frame = np.full((1, 96, 160, 3), 60, np.uint8)
                frame[:, 20:60, 5 * t : 5 * t + 40, index] = 220
                writer.write(frame)
        curve = Curve("m", tuple(range(FRAMES)), tuple(index + math.sin(t) for t in range(FRAMES)))
        videos.append(VideoResult(label, str(path), 160, 96, FRAMES, FPS, {"m": float(index)}, (curve,), ("A note.",)))
    metric = Metric("m", "A number", "higher", "a sum / " * 20)
    evaluation = Evaluation(tuple(videos), (metric,), str(folder / "image.png"), settings={"prompt": "x" * 300})
    written = write_report(evaluation, root / "made", embed_limit_bytes=request.param)
    shutil.rmtree(folder)
    return written.parent.rename(root / "moved") / written.name


@pytest.fixture(scope="module")
def seen(report: Path) -> dict[str, Any]:
    """What the harness saw in the page."""
    report.with_name("harness.html").write_text(HARNESS, encoding="utf-8")
    log = report.with_name("log")
    with Listener(report.parent) as server, log.open("w", encoding="utf-8") as stderr:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/harness.html"
        browser = subprocess.Popen(  # noqa: S603 - a browser found by its name, and a page of this test
            command(address, profile=report.with_name("profile")), stdout=subprocess.DEVNULL, stderr=stderr
        )
        try:
            content = server.received.get(timeout=600)
        finally:
            browser.terminate()
            browser.wait(timeout=600)
            server.shutdown()
    # The browser asks for an icon on its own.
    assert not [line for line in console(log.read_text(encoding="utf-8")) if "favicon" not in line]
    return content


def test_videos_have_their_length(seen: dict[str, Any]) -> None:
    assert seen["durations"] == pytest.approx([FRAMES / FPS] * 2, abs=0.01)
    assert seen["texts"] == ["2.00 s", "2.00 s"]
    assert seen["last"] == str(FRAMES - 1)


def test_nothing_is_wider_than_a_phone_and_no_picture_is_broken(seen: dict[str, Any]) -> None:
    assert seen["widths"] == [420, 420]
    assert seen["wide"] == []
    assert seen["broken"] == []


def test_one_control_moves_all_videos(seen: dict[str, Any]) -> None:
    """Frame n is shown at its middle, ``(n + 1/2) / fps``."""
    assert seen["forward"] == ["1", pytest.approx(1.5 / FPS), pytest.approx(1.5 / FPS)]
    frame, text, *times = seen["scrubbed"]
    assert frame == "9"
    assert text == "frame 9 of 15, 1.13 s"
    assert times == pytest.approx([9.5 / FPS] * 2)
    assert seen["back"] == "8"
    assert seen["started"] == [True, True]
    assert seen["paused"] == [True, True]
    assert seen["ended"] == ["15", True, True]


@pytest.mark.parametrize("scheme", [0, 1])
def test_the_page_is_drawn_in_both_schemes_without_complaints(report: Path, tmp_path: Path, scheme: int) -> None:
    """Dark (0) and light (1): the ground has the scheme's color, and much stands on it."""
    shot = tmp_path / "shot.png"
    options = (
        f"--screenshot={shot}",
        "--window-size=1400,1600",
        f"--blink-settings=preferredColorScheme={scheme}",
        "--virtual-time-budget=4000",
    )
    complaints = browse(report, *options, profile=tmp_path / "profile")
    assert not complaints
    levels = np.asarray(Image.open(shot).convert("L")).astype(float)
    assert levels[:20].mean() == pytest.approx([22, 255][scheme], abs=3)
    assert (np.abs(levels - levels[0, 0]) > 60).mean() > 0.02
    assert levels.std() > 15


@pytest.mark.parametrize("defect", ["throw new Error('planted')", "fetch('https://example.invalid/')"])
def test_complaints_would_be_seen(report: Path, tmp_path: Path, defect: str) -> None:
    """The check itself: an error of the script is seen, and the page's policy stops what would use a network."""
    page = tmp_path / "broken.html"
    text = report.read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", f"<script>{defect}</script></body>"), encoding="utf-8")
    complaints = browse(page, "--dump-dom", "--virtual-time-budget=2000", profile=tmp_path / "profile")
    assert any("planted" in line or "Content Security Policy" in line for line in complaints)
