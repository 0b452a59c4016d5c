"""The app itself: Gradio's components, which button calls what, and the ASGI application around them.

The two parts that Gradio has no component for are small HTML components with a script of their own: the stage
(`assets/stage.js`: progress, the growing video, the comparison with its loupe) and the library (`assets/library.js`:
queue and history). Python sends them plain data; they send back ``{action, id}``.
"""

from __future__ import annotations

import html
import logging
from dataclasses import fields, replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import gradio as gr
import PIL.Image
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from swifti2v.errors import InvalidInputError, SwiftI2VError
from swifti2v.webapp.media_routes import ContentPolicy, media_route
from swifti2v.webapp.presets import CARDS, DEFAULT_CARD
from swifti2v.webapp.studio import Form, Studio
from swifti2v.webapp.views import one_line

if TYPE_CHECKING:
    from collections.abc import Callable

LOGGER = logging.getLogger(__name__)

POLL_SECONDS = 0.7
MAX_UPLOAD = "64mb"
_CLEAN_SECONDS, _KEEP_SECONDS = 3600, 24 * 3600  # of uploads: a job keeps its own copy
_TITLE = "SwiftI2V"
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
_SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
_FIXED_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def build_application(studio: Studio, *, hosts: tuple[str, ...] = ()) -> FastAPI:
    """Return the ASGI application of the app.

    Args:
        studio: what the buttons do.
        hosts: names by which it may be addressed; none for any. On the loopback this keeps other pages of the browser
            from reaching it under a name of their own.
    """
    application = FastAPI(title=_TITLE, docs_url=None, redoc_url=None, openapi_url=None)
    application.router.routes.append(media_route(studio.queue))
    application.add_middleware(ContentPolicy)
    if hosts:
        application.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    with_page: FastAPI = gr.mount_gradio_app(
        application,
        build_page(studio),
        path="/",
        theme=_theme(),
        css=_asset("app.css"),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        show_error=True,
        max_file_size=MAX_UPLOAD,
    )
    return with_page


def build_page(studio: Studio) -> gr.Blocks:
    """Return the page; nothing of it is sent anywhere but to this server."""
    page: gr.Blocks = gr.Blocks(
        title=_TITLE, analytics_enabled=False, fill_width=True, delete_cache=(_CLEAN_SECONDS, _KEEP_SECONDS)
    )
    with page:
        current = gr.State("")
        shown = gr.State(None)
        gr.HTML(_header(studio), elem_classes="top")
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=4, min_width=300, elem_classes="entry"):
                form, buttons, plan, notice = _form(studio)
            with gr.Column(scale=7, min_width=300, elem_classes="work"):
                stage = _custom("stage", "stage.js")
                library = _custom("library", "library.js")
        _connect(page, _Wires(studio, current, shown, notice, stage, library, form), buttons)
        _connect_plan(studio, form, plan)
    return page


class _Wires:
    """The components that every action writes to, and the functions that Gradio calls."""

    def __init__(
        self, studio: Studio, current: Any, shown: Any, notice: Any, stage: Any, library: Any, form: dict[str, Any]
    ) -> None:
        self.studio = studio
        self.current, self.shown = current, shown
        self.form = [form[field.name] for field in fields(Form)]
        self.outputs = [current, shown, notice, stage, library]

    def start(self, begin: Callable[[Form], Any]) -> Callable[..., Any]:
        """Return what a button of the form does: queue a job, and show it."""

        def clicked(current: str, *values: Any) -> tuple[Any, ...]:
            try:
                current = begin(Form(*values)).id
            except Exception as error:  # noqa: BLE001 - shown to the user, whatever it is
                return self._refused(current, error)
            return self._seen(current)

        return clicked

    def act(self, current: str, event: gr.EventData) -> tuple[Any, ...]:
        """Do what a button of the stage or the library asks for; the form changes only for `reuse`."""
        action, job_id = str(event._data.get("action")), str(event._data.get("id"))
        kept = (gr.skip(),) * len(self.form)
        try:
            if action == "reuse":
                form = self.studio.reuse(job_id)
                form = replace(form, image=_picture_of(form))
                return (*self._seen(job_id), *(getattr(form, field.name) for field in fields(form)))
            return (*self._seen(self._acted(action, job_id, current)), *kept)
        except Exception as error:  # noqa: BLE001 - shown to the user, whatever it is
            return (*self._refused(current, error), *kept)

    def look(self, current: str, shown: Any) -> tuple[Any, ...]:
        """Bring stage and library up to date; nothing is sent while nothing has changed."""
        stage, library = self.studio.look(current)
        if shown == [stage, library]:
            return gr.skip(), gr.skip(), gr.skip()
        # A tick that left before the page knew what to show must not clear what it shows by now.
        return [stage, library], stage or ({} if current or not library else gr.skip()), library

    def first_look(self) -> tuple[Any, ...]:
        """Show the newest job to who opens the page."""
        return self._seen(self.studio.newest())

    def _acted(self, action: str, job_id: str, current: str) -> str:
        """Do an action and return the job to show then."""
        studio = self.studio
        if action == "open":
            return job_id
        if action == "cancel":
            studio.cancel(job_id)
            return current
        if action == "remove":
            studio.remove(job_id)
            return studio.newest() if current == job_id else current
        if action == "go_on":
            return studio.go_on(job_id).id
        if action == "another":
            return studio.another_motion(job_id).id
        msg = f"the page asked for {action[:40]!r}, which this app does not know; reload the page"
        raise InvalidInputError(msg)

    def _seen(self, current: str) -> tuple[Any, ...]:
        stage, library = self.studio.look(current)
        return current, [stage, library], "", stage or {}, library

    def _refused(self, current: str, error: Exception) -> tuple[Any, ...]:
        if not isinstance(error, SwiftI2VError):
            LOGGER.error("the app failed", exc_info=error)
        return current, gr.skip(), _alert(one_line(error)), gr.skip(), gr.skip()


def _connect(page: gr.Blocks, wires: _Wires, buttons: dict[str, Any]) -> None:
    inputs = [wires.current, *wires.form]
    preview, video = wires.start(wires.studio.preview), wires.start(wires.studio.video)
    prompt = wires.form[1]
    gr.on([buttons["preview"].click, prompt.submit], preview, inputs, wires.outputs, **_QUIET)
    buttons["video"].click(video, inputs, wires.outputs, **_QUIET)
    stage, library = wires.outputs[3:]
    gr.on([stage.click, library.click], wires.act, [wires.current], [*wires.outputs, *wires.form], **_QUIET)
    looked = [wires.shown, stage, library]
    gr.Timer(POLL_SECONDS).tick(wires.look, [wires.current, wires.shown], looked, **_QUIET)
    page.load(wires.first_look, None, wires.outputs, **_QUIET)


def _connect_plan(studio: Studio, form: dict[str, Any], plan: Any) -> None:
    def chosen(label: str) -> tuple[Any, ...]:
        preset = studio.preset(label)
        return str(preset.size), preset.num_frames, _quoted(preset.summary)

    def changed(label: str, size: str, frames: float | None, steps: float | None) -> str:
        try:
            return _quoted(studio.plan(label, Form(size=size, num_frames=frames, num_inference_steps=steps)))
        except SwiftI2VError as error:
            return _alert(one_line(error))

    form["card"].input(chosen, form["card"], [form["size"], form["num_frames"], plan], **_QUIET)
    watched = [form[name] for name in ("card", "size", "num_frames", "num_inference_steps")]
    gr.on([field.change for field in watched[1:]], changed, watched, plan, **_QUIET)


def _form(studio: Studio) -> tuple[dict[str, Any], dict[str, Any], Any, Any]:
    """Lay out the form; return its fields, the buttons, the line of the plan and that of what went wrong."""
    preset = studio.preset(DEFAULT_CARD)
    parts: dict[str, Any] = {}
    parts["image"] = gr.Image(
        label="Picture",
        type="filepath",
        image_mode=None,
        format="png",
        sources=["upload"],
        height=200,
        elem_id="picture",
    )
    # The file as it was dropped: `load_image` reads it, with its profile, its rotation and its error messages. (A class
    # of our own would make Gradio write a stub beside this file.)
    parts["image"].preprocess = _path_of
    parts["prompt"] = gr.Textbox(
        label="What should move, and how",
        lines=2,
        max_lines=6,
        placeholder="The camera moves in slowly, waves roll to the shore",
        elem_id="prompt",
    )
    with gr.Row(elem_classes="buttons"):
        buttons = {
            "preview": gr.Button("Preview motion", variant="primary", elem_id="preview", min_width=120),
            "video": gr.Button("Make video", variant="secondary", elem_id="generate", min_width=120),
        }
    notice = gr.HTML("", elem_id="notice")
    cards = [card.label for card in CARDS]
    parts["card"] = gr.Radio(cards, value=DEFAULT_CARD, label="Graphics memory", elem_id="card")
    plan = gr.HTML(_quoted(preset.summary), elem_id="plan")
    with gr.Accordion("Size, length, seed", open=False, elem_id="details"):
        with gr.Row():
            size = {"value": str(preset.size), "allow_custom_value": True, "min_width": 120}
            parts["size"] = gr.Dropdown(list(studio.sizes), label="Size", elem_id="size", **size)
            parts["num_frames"] = _number("Frames (4k+1)", "frames", preset.num_frames)
        with gr.Row():
            parts["num_inference_steps"] = _number("Stage II steps", "steps", studio.defaults.num_inference_steps)
            parts["seed"] = _number("Seed (empty: random)", "seed", None)
    return parts, buttons, plan, notice


def _number(label: str, name: str, value: int | None) -> Any:
    return gr.Number(value, label=label, precision=None, min_width=120, elem_id=name)


def _custom(name: str, script: str) -> Any:
    """Return an HTML component whose script draws what Python sends as its value."""
    return gr.HTML(
        {} if name == "stage" else [],
        html_template=f'<div class="{name}-root"></div>',
        js_on_load=_asset(script),
        apply_default_css=False,
        elem_id=name,
    )


def _path_of(upload: Any) -> str | None:
    """Return the path of an upload, which Gradio has checked to be one."""
    return None if upload is None else str(upload.path)


def _picture_of(form: Form) -> PIL.Image.Image | None:
    """Return the picture itself, which Gradio copies: it must not serve files of the data folder by their path."""
    if form.image is None:
        return None
    with PIL.Image.open(form.image) as picture:
        return picture.convert("RGB")


def _header(studio: Studio) -> str:
    model = html.escape(studio.model)
    return f"<h1>{_TITLE}</h1><p>One picture and a prompt in, a high-resolution video out. <span>{model}</span></p>"


def _alert(text: str) -> str:
    return f'<p role="alert" class="alert">{html.escape(text)}</p>'


def _quoted(text: str) -> str:
    return f'<p class="plan">{html.escape(text)}</p>'


def _asset(name: str) -> str:
    return (files("swifti2v.webapp") / "assets" / name).read_text(encoding="utf-8")


def _theme() -> gr.themes.Base:
    """Return the theme; its fonts are those of the system, since others would be fetched."""
    return gr.themes.Base(
        primary_hue="indigo", neutral_hue="slate", radius_size="lg", font=_SYSTEM_FONTS, font_mono=_FIXED_FONTS
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
        block_shadow="none",
        block_label_text_weight="500",
    )
