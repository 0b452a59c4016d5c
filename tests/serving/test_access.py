"""Keys: who sees what, and how much of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from swifti2v.serving.keys import add_key, remove_key
from tests.serving.conftest import MOVIE, bearer, create, problem, work

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.testclient import TestClient


def test_keys_see_their_own_only(keyed: tuple[TestClient, str, str]) -> None:
    client, ann, bob = keyed
    video = create(client, key=ann).json()
    work(client)
    assert [found["id"] for found in client.get("/v1/videos", headers=bearer(ann)).json()["data"]] == [video["id"]]
    assert client.get("/v1/videos", headers=bearer(bob)).json()["data"] == []
    missing = "video_" + "0" * 32
    for method, path in (("GET", ""), ("GET", "/content"), ("GET", "/events"), ("DELETE", "")):
        theirs = client.request(method, f"/v1/videos/{video['id']}{path}", headers=bearer(bob))
        none = client.request(method, f"/v1/videos/{missing}{path}", headers=bearer(bob))
        assert (theirs.status_code, theirs.json()) == (none.status_code, none.json()) == (404, none.json())
    after = client.get("/v1/videos", params={"after": video["id"]}, headers=bearer(bob))
    problem(after, 404)
    assert client.get(f"/v1/videos/{video['id']}/content", headers=bearer(ann)).content == MOVIE


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic YTpi", "Bearer " + "x" * 5000, "Bearer k\xff"]
)
def test_wrong_keys(keyed: tuple[TestClient, str, str], header: str | None) -> None:
    client, _, _ = keyed
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    for method, path in (("GET", "/v1/videos"), ("POST", "/v1/videos"), ("GET", "/v1/models")):
        response = client.request(method, path, headers=headers)
        assert "API key" in problem(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"


def test_keys_are_kept_as_hashes_and_forgotten_at_once(keyed: tuple[TestClient, str, str], tmp_path: Path) -> None:
    client, ann, bob = keyed
    assert ann not in (tmp_path / "keys.json").read_text()
    assert (tmp_path / "keys.json").stat().st_mode & 0o077 == 0
    remove_key(tmp_path / "keys.json", "ann")
    problem(client.get("/v1/videos", headers=bearer(ann)), 401)
    assert client.get("/v1/videos", headers=bearer(bob)).status_code == 200


def test_limits_of_a_key(keyed: tuple[TestClient, str, str], tmp_path: Path) -> None:
    client, ann, bob = keyed
    assert [create(client, key=ann).status_code for _ in range(3)] == [200, 200, 429]
    assert create(client, key=bob).status_code == 200
    slow = add_key(tmp_path / "keys.json", "slow", requests_per_minute=1)
    answers = [client.get("/v1/models", headers=bearer(slow)) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
