"""The application: routes, middleware, health, metrics, and the housekeeping beside them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import threading
from typing import TYPE_CHECKING, Any

from anyio import to_thread
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from swifti2v import __version__
from swifti2v.errors import InvalidInputError, OutputError, SwiftI2VError
from swifti2v.jobs.queue import JobQueue
from swifti2v.jobs.retention import prune
from swifti2v.serving.decoding import PictureDecoder
from swifti2v.serving.frame import REQUEST_ID_HEADER, RequestFrame
from swifti2v.serving.keys import Access
from swifti2v.serving.metrics import CONTENT_TYPE, Metrics
from swifti2v.serving.problems import add_handlers
from swifti2v.serving.routes import Service, video_routes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from swifti2v.serving.settings import ServiceSettings

LOGGER = logging.getLogger(__name__)

DESCRIPTION = "One image and a prompt in, a high-resolution video out. The schema is that of OpenAI's /v1/videos."


def create_app(
    settings: ServiceSettings, *, draining: threading.Event | None = None, decoder: PictureDecoder | None = None
) -> FastAPI:
    """Return the service.

    Args:
        settings: see `ServiceSettings`.
        draining: when it is set, no video is taken any more, streams end, and the service is not ready.
        decoder: of pictures; default: one of its own, by the limits of `settings`. It is closed with the service.

    Raises:
        InvalidInputError: there is no model to serve.
        ConfigurationError: keys or database cannot be used.
        OutputError: the data folder cannot be made or written.
    """
    if not settings.models:
        raise InvalidInputError("there is no model to serve; name one")
    queue = JobQueue.open(settings.data, url=settings.database_url, max_active=settings.limits.max_active_jobs)
    limits = settings.limits
    decoder = decoder or PictureDecoder(
        max_pixels=limits.max_image_pixels, seconds=limits.decode_seconds, num_children=limits.concurrent_decodes
    )
    service = Service(settings, queue, Access(settings.keys), draining or threading.Event(), decoder)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        pruning = asyncio.create_task(_prune_for_ever(service))
        try:
            yield
        finally:
            pruning.cancel()
            decoder.close()
            queue.store.database.close()

    servers = [{"url": settings.root_path}] if settings.root_path else None
    app = FastAPI(title="SwiftI2V", version=__version__, description=DESCRIPTION, lifespan=lifespan, servers=servers)
    app.state.service = service
    metrics = Metrics(queue.store)
    app.include_router(video_routes(service))
    _add_operation(app, service, metrics)
    add_handlers(app)
    app.add_middleware(RequestFrame, limits=limits, metrics=metrics, root_path=settings.root_path)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("authorization", "content-type", "range", REQUEST_ID_HEADER),
            expose_headers=(REQUEST_ID_HEADER, "x-video-status", "retry-after", "content-range"),
        )
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # as FastAPI documents it
    return app


def _add_operation(app: FastAPI, service: Service, metrics: Metrics) -> None:
    """Add the routes for operators: health, readiness, metrics."""

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        """Answer while the process is alive."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"description": "Not ready."}})
    def readyz() -> Response:
        """Tell whether videos can be taken: database and disk answer, and the service is not stopping."""
        problem = _unready(service)
        if problem is None:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "reason": problem}, 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def prometheus() -> Response:
        """Return the metrics in Prometheus' format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)


def _unready(service: Service) -> str | None:
    if service.draining.is_set():
        return "stopping"
    try:
        service.queue.store.counts()
    except OutputError:
        return "database"
    try:
        with tempfile.TemporaryFile(dir=service.queue.files.root):
            return None
    except OSError:
        return "disk"


async def _prune_for_ever(service: Service) -> None:
    while True:
        await asyncio.sleep(service.settings.prune_seconds)
        try:
            await to_thread.run_sync(prune, service.queue, service.settings.retention)
        except (SwiftI2VError, OSError) as error:
            LOGGER.warning("old videos could not be removed: %s", error)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return FastAPI's document without its own form of errors, which this service does not send."""
    if not app.openapi_schema:
        told: dict[str, Any] = {
            "title": app.title,
            "version": app.version,
            "description": app.description,
            "servers": app.servers,
        }
        document = get_openapi(routes=app.routes, **told)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        app.openapi_schema = document
    return app.openapi_schema
