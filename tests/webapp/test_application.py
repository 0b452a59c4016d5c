"""The page and its addresses over HTTP: the files of jobs, and that nothing of the page lies elsewhere."""

from __future__ import annotations

import gc
import re
from dataclasses import astuple, fields
from typing import TYPE_CHECKING, Any

import PIL.Image
import pytest

gradio = pytest.importorskip("gradio", reason="the app is an extra: pip install 'swifti2v[app]'")

from starlette.testclient import TestClient  # noqa: E402 - after the question whether there is a Gradio

from swifti2v.webapp.application import _path_of, _Wires, build_application  # noqa: E402 - as above
from swifti2v.webapp.media_routes import POLICY  # noqa: E402 - as above
from swifti2v.webapp.studio import Form  # noqa: E402 - as above

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from swifti2v.jobs.worker import Worker
    from swifti2v.webapp.studio import Studio

# Gradio makes event loops that it never closes; `loops_collected` ends them where that may warn.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

# Words of a page's description for other sites; a browser does not load them.
NOT_LOADED = re.compile(r"<meta[^>]*>|xmlns=\S+", re.IGNORECASE)


@pytest.fixture(autouse=True, scope="module")
def loops_collected() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture
def wires(studio: Studio) -> _Wires:
    """What the components call, without the components."""
    return _Wires(studio, None, None, None, None, None, dict.fromkeys(field.name for field in fields(Form)))


def test_the_page_loads_nothing_from_elsewhere_and_has_one_name(studio: Studio) -> None:
    client = TestClient(build_application(studio, hosts=("localhost",)), base_url="http://localhost")
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"] == POLICY
    loaded = re.findall(r"""(?:src|href)=["']?(https?:)?//[^"' >]+""", NOT_LOADED.sub("", answer.text))
    assert loaded == []
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False
    assert not any(sheet.startswith("http") for sheet in config.get("stylesheets") or [])
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/", headers={"Host": "localhost:7860"}).status_code == 200


def test_buttons_queue_and_show(wires: _Wires, studio: Studio, form: Form) -> None:
    values = astuple(form)
    for begin, kind in ((studio.preview, "preview"), (studio.video, "video")):
        current, shown, notice, stage, library = wires.start(begin)("", *values)
        assert (notice, stage["id"], library[0]["id"]) == ("", current, current)
        assert stage["kind"] == kind
        assert shown == [stage, library]
    current, _shown, notice, *_rest = wires.start(studio.preview)("before", None, *values[1:])
    assert current == "before"
    assert 'role="alert"' in notice


def test_what_the_page_says_is_escaped(wires: _Wires, studio: Studio, form: Form) -> None:
    click = wires.start(studio.preview)
    _current, _shown, notice, *_rest = click("", form.image, "", "<img onerror=x>", None, None, None)
    assert "<img" not in notice
    assert "&lt;img" in notice


def event(action: str, job_id: str) -> Any:
    return gradio.EventData(None, {"action": action, "id": job_id})


def test_actions_of_stage_and_library(wires: _Wires, studio: Studio, form: Form, worker: Worker, photo: Path) -> None:
    act = wires.act
    preview = studio.preview(form)
    worker.run(until_idle=True)
    video_id, _shown, notice, stage, _library, *_form = act(preview.id, event("go_on", preview.id))
    assert (notice, stage["kind"], stage["state"]) == ("", "video", "queued")
    assert act(video_id, event("cancel", video_id))[3]["state"] == "cancelled"
    assert act(video_id, event("open", preview.id))[0] == preview.id
    assert act(video_id, event("another", preview.id))[3]["kind"] == "preview"
    reused = act(video_id, event("reuse", preview.id))
    with PIL.Image.open(photo) as given:
        assert reused[5].tobytes() == given.tobytes()
    assert reused[6:] == (form.prompt, form.size, form.num_frames, form.num_inference_steps, form.seed)
    assert act(video_id, event("remove", video_id))[0] != video_id
    refused = act("kept", event("destroy", preview.id))
    assert refused[0] == act("kept", event("go_on", "video_0"))[0] == "kept"
    assert 'role="alert"' in refused[2]


def is_skipped(value: Any) -> bool:
    return isinstance(value, dict) and value.get("__type__") == "update"


def test_nothing_is_sent_while_nothing_changes(wires: _Wires, studio: Studio, form: Form) -> None:
    job = studio.preview(form)
    shown, stage, library = wires.look(job.id, None)
    assert stage["id"] == job.id
    assert len(library) == 1
    assert all(map(is_skipped, wires.look(job.id, shown)))
    studio.cancel(job.id)
    assert wires.look(job.id, shown)[1]["state"] == "cancelled"


def test_a_tick_from_before_the_first_look_clears_nothing(wires: _Wires, studio: Studio, form: Form) -> None:
    assert wires.look("", None)[1] == {}
    job = studio.preview(form)
    assert is_skipped(wires.look("", None)[1])
    assert wires.first_look()[0] == job.id


def test_an_upload_is_read_by_its_path() -> None:
    assert _path_of(None) is None
    assert _path_of(gradio.FileData(path="photo.jpg")) == "photo.jpg"
