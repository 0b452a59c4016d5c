"""Prometheus metrics of the service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from swifti2v.jobs.state import JobStage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swifti2v.jobs.store import JobStore

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_METHODS = ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH")


class Metrics:
    """Counters of requests, and gauges of jobs read from the store at each scrape."""

    def __init__(self, store: JobStore) -> None:
        self._registry = CollectorRegistry()
        labels = ("route", "method")
        self._requests = Counter(
            "swifti2v_http_requests", "Requests answered.", (*labels, "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "swifti2v_http_request_seconds", "Time to the end of the response.", labels, registry=self._registry
        )
        self._registry.register(_Jobs(store))

    def observe(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one request; `route` is its pattern, so that the number of series is bounded."""
        known = method if method in _METHODS else "other"
        self._requests.labels(route, known, str(status)).inc()
        self._seconds.labels(route, known).observe(seconds)

    def text(self) -> bytes:
        """Return the exposition format."""
        return generate_latest(self._registry)


class _Jobs(Collector):
    """Jobs by state and by stage."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    def collect(self) -> Iterator[GaugeMetricFamily]:
        jobs = GaugeMetricFamily("swifti2v_jobs", "Jobs by state.", labels=("state",))
        for state, count in self._store.counts().items():
            jobs.add_metric((state.value,), count)
        yield jobs
        stages = GaugeMetricFamily("swifti2v_active_jobs", "Jobs that wait or run, by next stage.", labels=("stage",))
        for stage in JobStage:
            stages.add_metric((stage.value,), self._store.num_active((stage,)))
        yield stages
        yield GaugeMetricFamily("swifti2v_jobs_limit", "Jobs that may wait or run.", self._store.max_active)

    def describe(self) -> list[GaugeMetricFamily]:
        """Describe nothing in advance, so that the registry can be made while the database is down."""
        return []
