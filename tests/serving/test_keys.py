"""Keys: who sees what and how much of it, the file, and the bucket of requests."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from swifti2v.errors import ConfigurationError, InvalidInputError
from swifti2v.serving.keys import KEY_PREFIX, KeyFile, RateLimiter, add_key, read_keys, remove_key
from tests.serving.conftest import MOVIE, bearer, create, problem, work

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from starlette.testclient import TestClient

    from swifti2v.serving.settings import ServiceSettings


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_keys_see_their_own_only(keyed: tuple[TestClient, str, str]) -> None:
    client, ann, bob = keyed
    video = create(client, key=ann).json()
    work(client)
    assert [found["id"] for found in client.get("/v1/videos", headers=bearer(ann)).json()["data"]] == [video["id"]]
    assert client.get("/v1/videos", headers=bearer(bob)).json()["data"] == []
    missing = "video_" + "0" * 32
    for method, tail in (("GET", ""), ("GET", "/content"), ("GET", "/events"), ("DELETE", "")):
        theirs = client.request(method, f"/v1/videos/{video['id']}{tail}", headers=bearer(bob))
        none = client.request(method, f"/v1/videos/{missing}{tail}", headers=bearer(bob))
        assert (theirs.status_code, theirs.json()) == (none.status_code, none.json()) == (404, none.json())
    problem(client.get("/v1/videos", params={"after": video["id"]}, headers=bearer(bob)), 404)
    assert client.get(f"/v1/videos/{video['id']}/content", headers=bearer(ann)).content == MOVIE


def test_wrong_keys(keyed: tuple[TestClient, str, str]) -> None:
    client, _, _ = keyed
    for header in (None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic YTpi", "Bearer " + "x" * 5000, "Bearer k\xff"):
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        for method, place in (("GET", "/v1/videos"), ("POST", "/v1/videos"), ("GET", "/v1/models")):
            response = client.request(method, place, headers=headers)
            problem(response, 401, code="invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"


def test_keys_are_in_force_from_the_first_to_beyond_the_last(
    serve: Callable[..., TestClient], settings: ServiceSettings, path: Path
) -> None:
    """A service that began without a file of keys asks for one as soon as there is one, and is never open again."""
    client = serve(replace(settings, keys=path))

    def status(key: str | None) -> int:
        return int(client.get("/v1/videos", headers={} if key is None else bearer(key)).status_code)

    assert (status(None), status("wrong")) == (200, 200)
    ann = add_key(path, "ann")
    assert (status(None), status("wrong"), status(ann)) == (401, 401, 200)
    bob = add_key(path, "bob")
    remove_key(path, "ann")
    assert (status(None), status(ann), status(bob)) == (401, 401, 200)
    remove_key(path, "bob")
    assert (status(None), status(bob)) == (401, 401)
    path.unlink()
    assert (status(None), status(bob)) == (401, 401)
    assert status(add_key(path, "eve")) == 200


def test_limits_of_a_key(keyed: tuple[TestClient, str, str], path: Path) -> None:
    client, ann, bob = keyed
    assert [create(client, key=ann).status_code for _ in range(3)] == [200, 200, 429]
    assert create(client, key=bob).status_code == 200
    slow = add_key(path, "slow", requests_per_minute=1)
    answers = [client.get("/v1/models", headers=bearer(slow)) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60


def test_a_key_is_kept_as_its_hash(path: Path) -> None:
    key = add_key(path, "ann", max_active_jobs=3)
    assert key.startswith(KEY_PREFIX)
    assert len(key) > len(KEY_PREFIX) + 40
    assert path.stat().st_mode & 0o077 == 0
    (kept,) = json.loads(path.read_text())["keys"]
    assert kept["sha256"] == hashlib.sha256(key.encode()).hexdigest()
    assert key not in path.read_text()
    found = KeyFile(path).find(key)
    assert found is not None
    assert (found.name, found.max_active_jobs) == ("ann", 3)
    assert KeyFile(path).find(key + "x") is None
    assert KeyFile(path).find("\ud800") is None


@pytest.mark.parametrize("name", ["", "../x", "a b", "\n", "x" * 65, "-a", "ann"])
def test_names_that_cannot_be_used(path: Path, name: str) -> None:
    add_key(path, "ann")
    with pytest.raises(InvalidInputError):
        add_key(path, name)
    with pytest.raises(InvalidInputError):
        remove_key(path, name + "?")
    assert [key.name for key in read_keys(path)] == ["ann"]


@pytest.mark.parametrize("content", ['{"keys": 3', '{"keys": [{"name": "ann"}]}', "[]"])
def test_a_damaged_file_is_an_error(path: Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(ConfigurationError):
        KeyFile(path)


def test_the_bucket_fills_evenly() -> None:
    now = 0.0
    limiter = RateLimiter(lambda: now)
    assert [limiter.take("ann", 6) for _ in range(6)] == [0.0] * 6
    assert limiter.take("ann", 6) == pytest.approx(10.0)
    assert limiter.take("bob", 6) == 0.0
    now = 9.0
    assert limiter.take("ann", 6) == pytest.approx(1.0)
    now = 10.0
    assert limiter.take("ann", 6) == 0.0
    assert limiter.take("ann", 6) > 0
    now = 1000.0
    assert [limiter.take("ann", 6) > 0 for _ in range(7)] == [False] * 6 + [True]
