# SPDX-License-Identifier: Apache-2.0
"""`moellava convert-data`: what it writes is read as what it was made from; nothing is overwritten or half written."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moellava.cli import main
from moellava.data.embedded import data_uri
from moellava.data.media import MediaFiles
from moellava.data.records import load_records, media_of
from tests.data.test_told import DIALECTS
from tests.tiny import record


def convert(*words: object) -> int:
    return main(["convert-data", *map(str, words)])


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_is_written_as_llava_and_read_again(name, data_file, tmp_path):
    given, expected = DIALECTS[name]
    path, out = data_file([{"id": name, "note": "kept"} | given]), tmp_path / "out.jsonl"
    assert convert(path, "--output", out) == 0
    (line,) = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert line == {"id": name, "note": "kept"} | expected
    assert list(load_records(out)) == list(load_records(path)) == [line]
    again = tmp_path / "again.jsonl"
    assert convert(out, "--output", again) == 0 and again.read_bytes() == out.read_bytes()


def test_files_of_several_formats_become_one(data_file, tmp_path, capsys):
    one = data_file([record(1, "q", "a")], "one.json")
    pq.write_table(pa.Table.from_pylist([record(2, "q", "é")]), tmp_path / "two.parquet")
    assert convert(one, tmp_path / "two.parquet", "--output", tmp_path / "out.jsonl") == 0
    assert list(load_records(tmp_path / "out.jsonl")) == [record(1, "q", "a"), record(2, "q", "é")]
    assert "2 records, 0 skip listed, 0 files written" in capsys.readouterr().out


def test_embedded_images_become_files(tmp_path, pictures):
    contents = [path.read_bytes() for path in pictures]
    turns = record(0, "<image>", "a")["conversations"]
    rows = [{"image": {"bytes": content, "path": None}, "conversations": turns} for content in [*contents, contents[0]]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    out, folder = tmp_path / "out.jsonl", tmp_path / "new" / "images"
    assert convert(tmp_path / "a.parquet", "--output", out, "--image-folder", folder) == 0
    records = load_records(out)
    assert len(list(folder.iterdir())) == 3, "the same image is one file"
    assert [(folder / row["image"]).read_bytes() for row in records] == [*contents, contents[0]]
    assert not MediaFiles(folder).problems([media_of(row)[0] for row in records], in_full=True)
    assert convert(tmp_path / "a.parquet", "--output", tmp_path / "uri.jsonl") == 0
    assert load_records(tmp_path / "uri.jsonl")[1]["image"] == data_uri(contents[1])


def test_videos_too_and_paths_stay(data_file, tmp_path):
    rows = [record("v", "<video><image>", "a", video=data_uri(b"\0\0\0\x20ftypisom"), image=["x/y.png"])]
    out = tmp_path / "out.jsonl"
    assert convert(data_file(rows), "--output", out, "--image-folder", tmp_path / "files") == 0
    (row,) = load_records(out)
    assert (
        row["image"] == ["x/y.png"] and row["video"].endswith(".mp4") and (tmp_path / "files" / row["video"]).is_file()
    )


def test_all_that_is_wrong_is_told_and_nothing_is_written(data_file, tmp_path, capsys):
    rows = [record(1, "q", "a"), {"id": "two"}, {"id": "three", "photo": "a.png"}]
    path, out = data_file(rows), tmp_path / "out.jsonl"
    assert convert(path, "--output", out) == 2
    said = capsys.readouterr().err
    assert "Record two of" in said and "Record three of" in said and not out.exists()
    assert main(["check-data", str(path), "--skip-list", str(tmp_path / "skip.txt")]) == 1
    assert convert(path, "--output", out, "--skip-list", tmp_path / "skip.txt") == 0
    assert len(load_records(out)) == 1


def test_a_broken_embedded_image_leaves_nothing(data_file, tmp_path, capsys):
    rows = [record("good", "q", "a"), record("bad", "<image>", "a", image="data:image/png;base64,@")]
    assert convert(data_file(rows), "--output", tmp_path / "out.jsonl", "--image-folder", tmp_path / "files") == 2
    assert "Record bad of" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "files"]


def test_roles_are_named_as_in_training(data_file, tmp_path):
    path = data_file([record(1, "q", "a", roles=("Ann", "Bob"))])
    assert convert(path, "--output", tmp_path / "no.jsonl") == 2
    assert convert(path, "--output", tmp_path / "yes.jsonl", "--user_key", "Ann", "--assistant_key", "Bob") == 0
    assert list(load_records(tmp_path / "yes.jsonl")) == [record(1, "q", "a")]


def test_what_exists_is_kept_and_what_cannot_be_written_is_told(data_file, tmp_path, capsys):
    path = data_file([record(1, "q", "a")])
    os.mkfifo(tmp_path / "pipe")
    before = path.read_bytes()
    said = {path: "exists", tmp_path: "is a folder", tmp_path / "gone" / "x": "no folder", tmp_path / "pipe": "pipe"}
    for output, words in {**said, tmp_path / ("x" * 300): "too long"}.items():
        assert convert(path, "--output", output) == 2
        assert "--output" in (err := capsys.readouterr().err) and words in err
    assert path.read_bytes() == before
    assert convert(path, "--output", tmp_path / "o.jsonl", "--image-folder", path) == 2
    assert "--image-folder" in capsys.readouterr().err and not (tmp_path / "o.jsonl").exists()


def test_a_full_disk_leaves_nothing(data_file, tmp_path, capsys, monkeypatch):
    def full(path: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moellava.files.flush", full)
    assert convert(data_file([record(1, "q", "a")]), "--output", tmp_path / "out.jsonl") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]
