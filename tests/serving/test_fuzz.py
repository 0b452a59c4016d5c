"""Schemathesis makes requests from the OpenAPI document, valid and damaged; none may end in an error of the service."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from schemathesis.checks import not_a_server_error

from swifti2v.serving.application import create_app
from swifti2v.serving.keys import add_key
from tests.serving.conftest import bearer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from swifti2v.serving.settings import ServiceSettings

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # schemathesis warns of its own future

MAX_EXAMPLES = 40  # for each of the operations


@pytest.mark.parametrize("keyed", [False, True])
def test_no_request_is_an_error_of_the_service(
    settings: ServiceSettings, tmp_path: Path, *, keyed: bool, record_property: Callable[[str, object], None]
) -> None:
    secret = add_key(tmp_path / "keys.json", "ann", requests_per_minute=100_000)
    app = create_app(replace(settings, keys=tmp_path / "keys.json" if keyed else None))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    statuses: dict[str, set[int]] = {}

    @hypothesis_settings(
        max_examples=MAX_EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    def check(case: Any) -> None:
        streams = case.path.endswith("/events")  # an event stream of a job that nobody works on has no end
        response = case.call(headers=bearer(secret) if keyed else {}) if not streams else None
        if response is not None:
            case.validate_response(response, checks=[not_a_server_error])
            statuses.setdefault(f"{case.method} {case.path}", set()).add(response.status_code)

    for operation in schema.get_all_operations():
        strategy = operation.ok().as_strategy()
        from hypothesis import given

        given(strategy)(check)()
    app.state.service.decoder.close()
    app.state.service.queue.store.database.close()
    record_property("statuses", {name: sorted(found) for name, found in statuses.items()})
    assert len(statuses) >= 8, "every operation was reached"
    assert all(status < 500 for found in statuses.values() for status in found)
    assert any(status >= 400 for status in statuses["POST /v1/videos"])
