"""Manifests as DiffSynth-Studio, `datasets` and musubi-tuner write them, and what is wrong with some."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swifti2v.data.manifest import ManifestOptions, read_manifest
from swifti2v.errors import ConfigurationError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files that pass for videos, one of them in a folder below; no manifest opens them."""
    (tmp_path / "set" / "sub").mkdir(parents=True)
    for name in ("a.mp4", "b.mov", "sub/c.mkv"):
        (tmp_path / "set" / name).write_bytes(b"-")
    return tmp_path / "set"


def prompts(folder: Path, **options: object) -> dict[str, str]:
    return {entry.name: entry.prompt for entry in read_manifest(folder, ManifestOptions(**options)).entries}


def reasons(folder: Path) -> dict[str, str]:
    return {item.name: item.reason for item in read_manifest(folder).skipped}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", 'video,prompt\na.mp4,a cat\nsub/c.mkv,"a dog, running"\n'),
        ("metadata.csv", '\ufefffile_name,text\r\na.mp4,a cat\r\n./sub/../sub/c.mkv,"a dog, running"\r\n'),
        ("metadata.csv", 'id,caption,file_name\n1,a cat,a.mp4\n2,"a dog, running",sub/c.mkv\n'),
        ("metadata.jsonl", '{"video_path": "a.mp4", "caption": "a cat"}\n\n'
                           '{"video_path": "sub\\\\c.mkv", "caption": " a dog, running\\n"}\n'),
        ("metadata.json", '[{"video": "a.mp4", "prompt": "a cat"},\n'
                          ' {"video": "sub/c.mkv", "prompt": "a dog, running"}]'),
    ],
)  # fmt: skip
def test_known_forms(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content, encoding="utf-8", newline="")
    manifest = read_manifest(folder)
    assert [(entry.name, entry.prompt) for entry in manifest.entries] == [
        ("a.mp4", "a cat"),
        ("sub/c.mkv", "a dog, running"),
    ]
    assert [entry.path for entry in manifest.entries] == [folder / "a.mp4", folder / "sub" / "c.mkv"]
    assert (manifest.source, manifest.skipped) == (name, ())


def test_what_datasets_writes_is_read(folder: Path) -> None:
    """A record as `json` writes it, with what a CSV would have to quote."""
    records = [{"file_name": "b.mov", "text": 'quoted "word", comma\nand line'}]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    assert prompts(folder) == {"b.mov": 'quoted "word", comma\nand line'}


def test_absolute_paths_inside_the_folder(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text(json.dumps({"video_path": str(folder / "a.mp4"), "caption": "a cat"}))
    assert prompts(folder) == {"a.mp4": "a cat"}


def test_caption_files(folder: Path) -> None:
    (folder / "a.txt").write_text("a cat\n")
    (folder / "sub" / "c.txt").write_text("a dog")
    (folder / ".hidden.mp4").write_bytes(b"-")
    assert prompts(folder) == {"a.mp4": "a cat", "sub/c.mkv": "a dog"}
    assert reasons(folder) == {"b.mov": "empty caption"}
    (folder / "b.caption").write_text("a bird")
    assert prompts(folder, caption_extension=".caption") == {"b.mov": "a bird"}


def test_another_manifest_by_name(folder: Path) -> None:
    (folder / "INDEX.csv").write_text("file,kind,caption\na.mp4,clip,a cat\n")
    assert prompts(folder, manifest=Path("INDEX.csv")) == {"a.mp4": "a cat"}


@pytest.mark.parametrize("caption", ["", "   ", '""'])
def test_empty_captions_are_counted_or_kept(folder: Path, caption: str) -> None:
    (folder / "metadata.csv").write_text(f"video,prompt\na.mp4,{caption}\nb.mov\n")
    assert reasons(folder) == {"a.mp4": "empty caption", "b.mov": "empty caption"}
    assert prompts(folder, empty_captions="keep") == {"a.mp4": "", "b.mov": ""}


def test_null_is_an_empty_caption(folder: Path) -> None:
    (folder / "metadata.json").write_text('[{"video": "a.mp4", "prompt": null}]')
    assert reasons(folder) == {"a.mp4": "empty caption"}


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        ("../outside.mp4", "outside the folder"),
        ("sub/../../outside.mp4", "outside the folder"),
        ("..\\outside.mp4", "outside the folder"),
        ("/etc/passwd", "outside the folder"),
        (".", "outside the folder"),
        ("gone.mp4", "missing file"),
        ("sub", "missing file"),
        ("notes.txt", "unknown format"),
    ],
)
def test_videos_that_cannot_be_used_are_counted(folder: Path, video: str, reason: str) -> None:
    (folder.parent / "outside.mp4").write_bytes(b"-")
    (folder / "notes.txt").write_text("not a video")
    (folder / "metadata.csv").write_text(f"video,prompt\n{video},x\na.mp4,a cat\n")
    assert reasons(folder) == {video: reason}
    assert prompts(folder) == {"a.mp4": "a cat"}


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("metadata.csv", "video,prompt\na.mp4,a cat, running\nb.mov,x\n", "metadata.csv line 2"),
        ("metadata.jsonl", '{"video": "b.mov", "prompt": "x"}\n{"video": \n', "metadata.jsonl line 2"),
        ("metadata.jsonl", '[1]\n{"video": "b.mov", "prompt": "x"}\n', "metadata.jsonl line 1"),
        ("metadata.json", '[3, {"video": "b.mov", "prompt": "x"}]', "metadata.json entry 1"),
        ("metadata.json", '[{"video": "b.mov", "prompt": "x"}, {"prompt": "y"}]', "metadata.json entry 2"),
        ("metadata.json", '[{"video": "b.mov", "prompt": "x"}, {"video": "a.mp4", "prompt": 1}]',
         "metadata.json entry 2"),
    ],
)  # fmt: skip
def test_malformed_entries_are_counted_with_their_place(folder: Path, name: str, content: str, place: str) -> None:
    (folder / name).write_text(content)
    assert reasons(folder) == {place: "malformed entry"}
    assert prompts(folder) == {"b.mov": "x"}


def test_repeated_entries_are_counted(folder: Path) -> None:
    (folder / "metadata.csv").write_text("video,prompt\na.mp4,first\n./a.mp4,second\n")
    assert prompts(folder) == {"a.mp4": "first"}
    assert reasons(folder) == {"a.mp4": "repeated entry"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.csv", "path,prompt\na.mp4,x\n", ("'path'", "video_path")),
        ("metadata.csv", "video,description\na.mp4,x\n", ("'description'", "prompt or text or caption")),
        ("metadata.csv", "video;prompt\na.mp4;x\n", ("'video;prompt'", "video or file_name")),
        ("metadata.csv", "video,description\n", ("'description'",)),
        ("metadata.csv", "video,file_name,prompt\na.mp4,b.mov,x\n", ("2 columns", "keep one")),
        ("metadata.csv", "video,prompt\n", ("is empty",)),
        ("metadata.csv", "", ("is empty",)),
        ("metadata.jsonl", '{"clip": "a.mp4", "prompt": "x"}', ("'clip'", "video or file_name")),
        ("metadata.json", '{"video": "a.mp4", "prompt": "x"}', ("does not hold a list",)),
        ("metadata.json", "[{", ("is not JSON",)),
    ],
)
def test_manifests_that_are_not_understood(folder: Path, name: str, content: str, words: tuple[str, ...]) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ConfigurationError) as caught:
        read_manifest(folder)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_text_of_another_encoding(folder: Path) -> None:
    (folder / "metadata.csv").write_bytes("video,prompt\na.mp4,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(ConfigurationError, match="save it as UTF-8"):
        read_manifest(folder)
    (folder / "metadata.csv").unlink()
    (folder / "a.txt").write_bytes(b"\xff\xfe\x00")
    assert reasons(folder)["a.mp4"] == "malformed entry"


def test_folders_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is no folder"):
        read_manifest(tmp_path / "gone")
    with pytest.raises(ConfigurationError, match="there is no manifest"):
        read_manifest(folder, ManifestOptions(manifest=Path("list.csv")))
    (folder / "list.xlsx").write_bytes(b"PK")
    with pytest.raises(ConfigurationError, match=r"unknown format; write \.csv, \.jsonl, \.json"):
        read_manifest(folder, ManifestOptions(manifest=Path("list.xlsx")))
    for name in ("metadata.csv", "metadata.json"):
        (folder / name).write_text("video,prompt\na.mp4,x\n")
    with pytest.raises(ConfigurationError, match=r"metadata\.csv and metadata\.json; keep one"):
        read_manifest(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="holds no videos"):
        read_manifest(tmp_path / "empty")
