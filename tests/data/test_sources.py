from __future__ import annotations

import pytest

from swifti2v.data.sources import read_index
from swifti2v.errors import ConfigurationError

HEADER = "file,kind,width,caption,licence_tier\n"


def write_index(folder, lines: str, header: str = HEADER):
    path = folder / "INDEX.csv"
    path.write_text(header + lines, encoding="utf-8")
    return path


def test_rows_become_items(tmp_path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (item,) = read_index(write_index(tmp_path, 'a.jpg,photo,2880,"A lake, calm.",A\n'))
    assert (item.path, item.kind, item.width, item.tier) == (tmp_path / "a.jpg", "photo", 2880, "A")
    assert item.caption == "A lake, calm."


@pytest.mark.parametrize(
    ("lines", "header", "message"),
    [
        ("missing.mp4,clip,10,x,A\n", HEADER, "missing.mp4"),
        ("a.jpg,sound,10,x,A\n", HEADER, "clip or photo"),
        ("a.jpg,photo\n", "file,kind\n", "caption"),
    ],
)
def test_a_bad_index_is_named(tmp_path, lines: str, header: str, message: str) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(ConfigurationError, match=message):
        read_index(write_index(tmp_path, lines, header))


def test_no_index(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="no index"):
        read_index(tmp_path / "INDEX.csv")
