# SPDX-License-Identifier: Apache-2.0
"""A skip list names a record by what it says: no file loses a record because of another one's name or content."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from moellava.cli import main
from moellava.data.records import load_records, read_records
from moellava.data.skip_lists import SkipList, read_skip_list, write_skip_list
from moellava.errors import DataError, UserError
from tests.tiny import record


@pytest.fixture
def two(tmp_path) -> tuple[Path, Path]:
    """Two files of one name: record 1 of the first is bad, that of the second is good."""
    good = [record(n, "q", f"a{n}") for n in range(3)]
    bad = [good[0], {"id": 1}, good[2]]
    paths = []
    for folder, rows in (("a", bad), ("b", good)):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "train.json")
        paths[-1].write_text(json.dumps(rows))
    return paths[0], paths[1]


def written(path: Path, *data: Path) -> Path:
    write_skip_list(path, read_records(data)[1])
    return path


def ids(*paths: Path, skip: Path | SkipList) -> list[int]:
    return [row["id"] for row in load_records(paths, skip)]


def test_two_files_of_one_name_lose_what_is_listed_and_nothing_else(two, tmp_path):
    skip = written(tmp_path / "skip.txt", *two)
    assert ids(*two, skip=skip) == [0, 2, 0, 1, 2]
    assert ids(*two[::-1], skip=skip) == [0, 1, 2, 0, 2]
    assert ids(two[0], skip=skip) == [0, 2]


def test_a_list_serves_whatever_the_path_is_written_as(two, tmp_path, monkeypatch):
    skip = written(tmp_path / "skip.txt", two[0])
    monkeypatch.chdir(tmp_path)
    assert ids(Path("a/train.json"), skip=skip) == [0, 2]
    shutil.copytree("a", "elsewhere")
    assert ids(Path("elsewhere/train.json"), skip=skip) == [0, 2]


def test_a_file_that_has_changed_since_is_refused(two, tmp_path):
    skip = written(tmp_path / "skip.txt", two[0])
    two[0].write_text(two[1].read_text())
    with pytest.raises(DataError, match="other contents of .*train.json: record 1 has changed since"):
        load_records(two[0], skip)


def test_a_list_that_names_nothing_is_refused(two, tmp_path):
    skip = read_skip_list(written(tmp_path / "skip.txt", two[0]))
    assert ids(two[1], skip=skip) == [0, 1, 2]
    with pytest.raises(DataError, match="names 1 records, none of which is in the data files"):
        skip.require_used()
    assert ids(two[0], skip=skip) == [0, 2]
    skip.require_used()
    SkipList().require_used()


def test_an_old_list_is_read_where_it_is_unambiguous(two, tmp_path):
    (tmp_path / "old.txt").write_text("train.json:1\tRecord 1 of a/train.json has no conversations\n\n")
    assert ids(two[0], skip=tmp_path / "old.txt") == [0, 2]
    with pytest.raises(DataError, match="by their names alone, and both .*a/train.json and .*b/train.json are called"):
        load_records(two, tmp_path / "old.txt")


def test_the_command_writes_what_training_reads(two, tmp_path, capsys):
    skip = tmp_path / "skip.txt"
    assert main(["check-data", *map(str, two), "--skip-list", str(skip)]) == 1
    assert main(["check-data", *map(str, two), "--known", str(skip)]) == 0
    assert main(["check-data", str(two[1]), "--known", str(skip)]) == 2
    assert "none of which is in the data files" in capsys.readouterr().err


NAMES = ["tab\there.json", "new\nline.json", 'quo"te.json', '"q".json', "a:1:2.json", "ü\u2028.json"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_file_survives(name, tmp_path, monkeypatch):
    path = tmp_path / name
    path.write_text(json.dumps([{"id": "a\tb\nc\u2028"}, record(1, "q", "a")]))
    assert ids(path, skip=written(tmp_path / "skip.txt", path)) == [1]
    monkeypatch.chdir(tmp_path)
    assert ids(Path(name), skip=written(tmp_path / "skip.txt", Path(name))) == [1]


@pytest.mark.parametrize("line", ["nonsense", "train.json", "train.json:x", ":1", '"open:1:0123456789abcdef'])
def test_what_is_no_key_is_told_with_its_line(line, tmp_path):
    (tmp_path / "skip.txt").write_text(f"\n{line}\tsaid\n")
    with pytest.raises(DataError, match="skip.txt, line 2: .* is no key of a record"):
        read_skip_list(tmp_path / "skip.txt")


def test_a_list_that_cannot_be_read_is_told(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes(b"\xe9:1")
    for name, said in {
        "gone": "no such file",
        "pipe": "pipe",
        ".": "folder",
        "latin": "utf-8",
        "x" * 300: "too long",
    }.items():
        with pytest.raises(DataError, match=f"skip list cannot be read: .*{said}"):
            read_skip_list(tmp_path / name)


def test_a_list_that_cannot_be_written_is_told_before_the_work(two, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("moellava.data.check.check", lambda *_: pytest.fail("the work had begun"))
    os.mkfifo(tmp_path / "pipe")
    for name, said in {
        ".": "is a folder",
        "gone/x": "there is no folder",
        "pipe": "is a pipe",
        "x" * 300: "too long",
    }.items():
        assert main(["check-data", str(two[0]), "--skip-list", str(tmp_path / name)]) == 2
        assert "--skip-list" in (err := capsys.readouterr().err) and said in err
    with pytest.raises(UserError, match="--skip-list .* cannot be written: is a folder"):
        write_skip_list(tmp_path, [])


def test_broken_lines_and_half_surrogates_are_listed_too(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{broken\n" + json.dumps(record("\ud83d", "q", "a")) + "\n" + json.dumps(record(2, "q", "a")))
    assert ids(path, skip=written(tmp_path / "skip.txt", path)) == [2]
