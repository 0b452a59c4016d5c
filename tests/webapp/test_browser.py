"""The app in a real browser, from the picture to the download, on the embedded model. Skipped where there is none."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pytest

from swifti2v.jobs.queue import JobQueue
from swifti2v.jobs.state import JobState
from swifti2v.media.video_reader import VideoReader
from tests.browsers import BROWSER, needs_browser

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("gradio", reason="the app is an extra: pip install 'swifti2v[app]'")
playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")

START_SECONDS = 600  # on a machine that does a hundred other things
PATIENCE_MILLISECONDS = 240_000
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
PROGRAM = "import typer; from swifti2v.cli.app import app; typer.run(app)"

pytestmark = [
    pytest.mark.slow,
    needs_browser,
    # asyncio of Playwright's own thread; the sockets are closed with its process.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("app") / "data"


@pytest.fixture(scope="module")
def address(data: Path) -> Iterator[str]:
    """The address of a running app."""
    port = free_port()
    command = [sys.executable, "-c", PROGRAM, "--model", "mini", "--port", str(port), "--data-dir", str(data)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = data.parent / "app.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)  # noqa: S603 - our own command
    url = f"http://127.0.0.1:{port}/"
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                with urllib.request.urlopen(url, timeout=20):
                    break
            except OSError:
                time.sleep(0.5)
        yield url
        said = log.read_text()
    finally:
        process.terminate()
        assert process.wait(120) in (0, -15), log.read_text()
    assert "Traceback" not in said, said


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


class Page:
    """A page that remembers what went wrong in it, and what it asked of other machines."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.context = browser.new_context(accept_downloads=True, reduced_motion="no-preference", **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MILLISECONDS)
        self.problems: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._on_console)
        self.page.on("request", lambda request: self._on_request(request.url, address))
        self.page.goto(address)
        self.page.wait_for_selector(".stage-root .welcome:visible, .stage-root .card:visible")

    def _on_console(self, message: Any) -> None:
        if message.type == "error":
            self.problems.append(message.text)

    def _on_request(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.elsewhere.append(url)

    def wait_for_card(self, kind: str, state: str) -> str:
        card = self.page.wait_for_selector(f'.card[data-kind="{kind}"][data-state="{state}"]')
        return str(card.get_attribute("data-job"))

    def wait_for(self, condition: str) -> None:
        self.page.wait_for_function(condition)


@pytest.fixture
def desktop(browser: Any, address: str) -> Iterator[Page]:
    page = Page(browser, address, viewport=DESKTOP)
    yield page
    page.context.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A gradient with fine stripes, so that a loupe has something to enlarge."""
    path = tmp_path / "picture.png"
    rows, columns = np.mgrid[0:192, 0:320]
    stripes = 40 * ((columns // 2) % 2)
    pixels = np.stack([rows, columns * 0.6 + stripes, 200 - rows], axis=-1).clip(0, 255).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return path


def fill(page: Any, picture: Path, *, frames: int, seed: int = 5) -> None:
    page.set_input_files("#picture input[type=file]", str(picture))
    page.wait_for_selector("#picture img")
    page.fill("#prompt textarea", "the camera moves to the left")
    if not page.is_visible("#size input"):
        page.click("#details button")
    page.fill("#size input", "320x192")
    page.keyboard.press("Enter")
    page.fill("#frames input", str(frames))
    page.fill("#seed input", str(seed))
    page.keyboard.press("Tab")
    page.wait_for_function(f"document.querySelector('#plan .plan')?.textContent.startsWith('320x192, {frames} frames')")


def test_from_the_picture_to_the_download(desktop: Page, data: Path, picture: Path, tmp_path: Path) -> None:
    page = desktop.page
    fill(page, picture, frames=9)
    page.click("#preview")
    preview_id = desktop.wait_for_card("preview", "completed")
    desktop.wait_for("document.querySelector('.pane[data-kind=motion] video').readyState >= 2")
    motion = page.evaluate(
        "(v => [v.videoWidth, v.videoHeight])(document.querySelector('.pane[data-kind=motion] video'))"
    )
    assert motion == [80, 48]

    page.click('[data-action="go_on"]')
    job_id = desktop.wait_for_card("video", "completed")
    assert job_id != preview_id
    desktop.wait_for("document.querySelector('.pane[data-kind=video] video').readyState >= 2")

    page.click("role=tab[name='Compare']")
    assert page.locator(".pane:visible").count() == 3
    page.focus(".panes")
    before = page.evaluate("document.querySelector('.mark').style.left")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    desktop.wait_for(f"document.querySelector('.mark').style.left !== '{before}'")
    page.keyboard.press("+")
    desktop.wait_for("document.querySelector('.mark').style.width === '12.5%'")
    # The loupe shows pixels of all three, not an empty glass.
    spreads = page.evaluate(
        """[...document.querySelectorAll('.glass')].map((glass) => {
          const all = glass.getContext('2d').getImageData(0, 0, glass.width, glass.height).data;
          const green = all.filter((_, place) => place % 4 === 1);
          return Math.max(...green) - Math.min(...green);
        })"""
    )
    assert len(spreads) == 3
    assert all(spread > 5 for spread in spreads)
    page.screenshot(path=data.parent / "compare.png")
    page.fill(".controls input[type=range]", "4")
    desktop.wait_for("document.querySelector('.count').textContent === '5 / 9'")

    with page.expect_download() as begun:
        page.click("role=link[name='Download']")
    saved = tmp_path / "saved.mp4"
    begun.value.save_as(saved)
    frames = np.concatenate(list(VideoReader(saved)))
    assert frames.shape == (9, 192, 320, 3)
    files = JobQueue.open(data).files
    assert saved.read_bytes() == files.attempt(job_id, 1).video.read_bytes()
    assert desktop.elsewhere == []
    assert desktop.problems == []


def test_a_second_one_is_watched_growing_and_cancelled(desktop: Page, data: Path, picture: Path) -> None:
    page = desktop.page
    fill(page, picture, frames=801)
    page.click("#generate")
    job_id = desktop.wait_for_card("video", "in_progress")
    page.click("#generate")  # a third one waits behind it
    waiting_id = desktop.wait_for_card("video", "queued")
    line = page.locator(f'.job[data-job="{waiting_id}"]')
    line.get_by_text("1 ahead of it").wait_for()
    line.get_by_text("Cancel").click()
    desktop.wait_for_card("video", "cancelled")
    page.click(f'.job[data-job="{job_id}"] .open')
    desktop.wait_for("/segment ([2-9]|\\d\\d) of 67/.test(document.querySelector('.card h2').textContent)")
    desktop.wait_for("document.querySelector('.pane[data-kind=video] video').duration > 0.4")
    page.screenshot(path=data.parent / "growing.png")
    page.click('.actions [data-action="cancel"]')
    desktop.wait_for_card("video", "cancelled")
    store = JobQueue.open(data).store
    assert store.get(job_id).state is JobState.CANCELLED
    deadline = time.monotonic() + 60
    while store.get(job_id).lease_token is not None:  # until its worker has stopped
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert store.get(waiting_id).claims == 0
    assert desktop.problems == []


def test_errors_are_one_line_with_the_fix(desktop: Page, tmp_path: Path) -> None:
    page = desktop.page
    page.click("#preview")
    alert = page.wait_for_selector("#notice [role=alert]")
    assert "drop one into the field" in alert.inner_text()
    text = tmp_path / "picture.png"
    text.write_text("this is no picture")
    page.set_input_files("#picture input[type=file]", str(text))
    page.wait_for_selector("#picture img", state="attached")
    page.click("#preview")
    desktop.wait_for("document.querySelector('#notice').textContent.includes('is not a readable picture')")


def test_by_keyboard_alone(desktop: Page, picture: Path) -> None:
    page = desktop.page
    fill(page, picture, frames=9, seed=6)
    page.focus("#prompt textarea")
    page.keyboard.press("Shift+Enter")
    job_id = desktop.wait_for_card("preview", "completed")
    page.focus('[data-action="reuse"]')
    page.fill("#seed input", "")
    page.focus('[data-action="reuse"]')
    page.keyboard.press("Enter")
    desktop.wait_for("document.querySelector('#seed input').value === '6'")
    end = page.locator(f'.job[data-job="{job_id}"] .end')
    end.focus()
    page.keyboard.press("Enter")
    desktop.wait_for(f"!document.querySelector('.job[data-job=\"{job_id}\"]')")


def test_on_a_phone(browser: Any, address: str, data: Path, picture: Path) -> None:
    phone = Page(browser, address, viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2)
    page = phone.page
    fill(page, picture, frames=9)
    page.tap("#preview")
    phone.wait_for_card("preview", "completed")
    page.tap("role=tab[name='Compare']")
    # Nothing is wider than the screen, and what a finger must hit is large enough.
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    heights = page.evaluate("[...document.querySelectorAll('.actions > *, #preview')].map((b) => b.offsetHeight)")
    assert min(heights) >= 44
    box = page.locator(".pane[data-kind=input] .frame").bounding_box()
    page.touchscreen.tap(box["x"] + 0.9 * box["width"], box["y"] + 0.5 * box["height"])
    phone.wait_for("parseFloat(document.querySelector('.mark').style.left) > 60")
    page.screenshot(path=data.parent / "phone.png")
    assert phone.elsewhere == []
    phone.context.close()
