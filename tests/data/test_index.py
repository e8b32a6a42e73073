# SPDX-License-Identifier: Apache-2.0
"""Indexes of data files: kept by content, shared by processes, and the same as a reading."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
from array import array
from pathlib import Path

import pytest
import torch

from moellava.data import cache, index, indexing
from moellava.data.cache import cache_folder, kept
from moellava.data.json_lists import listed
from moellava.data.records import Records, load_records, read_records
from moellava.data.skip_lists import read_skip_list, write_skip_list
from moellava.errors import DataError, UserError
from tests.tiny import record


@pytest.fixture
def folder(empty_cache, monkeypatch) -> Path:
    """An empty cache, in which the index of every file is kept."""
    monkeypatch.setattr(indexing, "KEPT_FROM", 0)
    return empty_cache


@pytest.fixture
def readings(monkeypatch) -> list[str]:
    """The files that are read, as they are."""
    read: list[str] = []
    real = indexing.rows_of
    monkeypatch.setattr(indexing, "rows_of", lambda path: read.append(Path(path).name) or real(path))
    return read


def aged(path: Path) -> Path:
    """A file that was changed an hour ago."""
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 3600 * 10**9))
    return path


def written(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows))
    return aged(path)


ROWS = [record(n, "q", f"a{n}") if n % 3 else record(n, "<image>\nq", f"a{n}", image="ü.png") for n in range(40)]


def test_a_file_is_read_once_whatever_it_is_called(folder, readings, tmp_path):
    one = written(tmp_path / "one.json", ROWS)
    first = load_records(one)
    other = aged(one.rename(tmp_path / "other.json"))
    second = load_records(other)
    assert readings == ["one.json"] and list(first) == list(second) == ROWS
    assert second.name(3) == f"Record 3 of {other}" and first.content() == second.content()
    assert len(list((folder / indexing.INDEXES).iterdir())) == 1


def test_only_what_changed_is_read_again(folder, readings, tmp_path):
    files = [written(tmp_path / f"{name}.json", ROWS[:10]) for name in "ab"]
    written(files[1], ROWS[10:])
    load_records(files)
    written(files[1], [*ROWS[10:], record("new", "q", "a")])
    assert len(load_records(files)) == 41 and readings == ["a.json", "b.json", "b.json"]


def test_what_changes_a_reading_is_part_of_its_name(folder, readings, tmp_path, monkeypatch):
    path = written(tmp_path / "a.json", ROWS[:2])
    load_records(path)
    read_records(path, roles=("me", "you"))
    monkeypatch.setattr(indexing, "code_digest", lambda: "another version")
    load_records(path)
    assert len(readings) == 3


def test_the_content_of_a_file_is_not_read_again_while_it_rests(folder, tmp_path, monkeypatch):
    path = written(tmp_path / "a.json", ROWS)
    load_records(path)
    monkeypatch.setattr(indexing, "file_digest", lambda name: pytest.fail(f"{name} is read"))
    assert list(load_records(path)) == ROWS
    path.write_text(path.read_text().replace("a39", "b39"))
    aged(path)
    with pytest.raises(pytest.fail.Exception):
        load_records(path)


def test_the_content_of_records_is_that_of_earlier_versions(folder, tmp_path, monkeypatch):
    """A digest over the offsets and the bytes of all records: runs that it names can go on."""
    path = written(tmp_path / "a.json", ROWS[1:3])
    rows = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS[1:3]]
    ends = array("q", [0, len(rows[0]), len(rows[0]) + len(rows[1])])
    expected = f"sha256 {hashlib.sha256(ends.tobytes() + b''.join(rows)).hexdigest()[:32]}"
    assert load_records(path).content() == expected
    monkeypatch.setattr("moellava.data.records.KEPT_FROM", 0)
    assert load_records(path).content() == load_records(path).content() == expected
    assert load_records(written(tmp_path / "b.json", ROWS[2:0:-1])).content() != expected
    monkeypatch.setattr(Records, "_content", lambda self: pytest.fail("it is read again"))
    assert load_records(path).content() == expected


def test_a_file_that_may_still_change_in_the_same_tick_is_read_again(folder, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS[:1]))
    state = path.stat()
    assert len(load_records(path)) == 1
    path.write_text(json.dumps(ROWS[:1]).replace("a0", "b0"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert load_records(path)[0]["conversations"][1]["value"] == "b0"


def test_problems_are_kept_under_the_name_that_the_file_has_now(folder, readings, tmp_path):
    rows = [ROWS[0], {"id": "bad"}, ROWS[1], {"id": 7, "conversations": []}]
    one = written(tmp_path / "one.json", rows)
    before = read_records(one)[1]
    two = aged(one.rename(tmp_path / "two.json"))
    after = read_records(two)[1]
    assert [problem.text.replace("two.json", "one.json") for problem in after] == [problem.text for problem in before]
    assert "Record bad of" in after[0].text and readings == ["one.json"]
    skip = tmp_path / "skip.txt"
    write_skip_list(skip, after)
    assert list(load_records(two, read_skip_list(skip))) == ROWS[:2] and readings == ["one.json"]


def test_a_file_that_breaks_off_is_not_kept(folder, readings, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS)[:-30])
    aged(path)
    for _ in range(2):
        with pytest.raises(DataError, match="a.json is not valid JSON: .*line 1 column"):
            load_records(path)
    assert list((folder / indexing.INDEXES).iterdir()) == []


def test_a_mapped_index_travels_as_a_path_and_gives_its_pages_back(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "READS", 4)
    records = load_records(written(tmp_path / "a.json", ROWS))
    packed = pickle.dumps(records)
    assert len(packed) < 1500
    found = pickle.loads(packed)
    assert [list(found), list(found)] == [ROWS, ROWS]


def test_batches_of_an_index_join(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "BATCH_ROWS", 7)
    records = load_records(written(tmp_path / "a.json", ROWS))
    assert list(records) == ROWS
    assert len(set(records.said.tolist())) == 40 and list(pickle.loads(pickle.dumps(records))) == ROWS
    assert records.chosen[0].held.media.to_pylist()[:4] == [["iü.png"], [], [], ["iü.png"]]


@pytest.mark.parametrize("place", ["file/cache", "s3://bucket/cache"])
def test_without_a_place_to_write_every_process_reads(place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(cache.PLACE, place)
    monkeypatch.setattr(indexing, "KEPT_FROM", 0)
    assert cache_folder() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"], "no folder is called s3:"
    assert list(load_records(written(tmp_path / "a.json", ROWS))) == ROWS


def test_the_place_by_rule(tmp_path, monkeypatch):
    for variable, path in (("XDG_CACHE_HOME", "xdg"), ("HF_HOME", "hf"), (cache.PLACE, "own")):
        monkeypatch.setenv(variable, str(tmp_path / path))
        assert cache_folder() == tmp_path / (path if variable == cache.PLACE else f"{path}/moellava")


def make(number: int, folder: str) -> None:
    """One of two processes that want the same entry: each notes what it makes."""

    def build(entry: Path) -> None:
        with open(f"{folder}/made", "a") as notes:
            notes.write(f"{number}\n")
        (entry / "x").write_text("whole")

    assert (kept(Path(folder), "entry", build, "making it") / "x").read_text() == "whole"


def test_one_process_makes_an_entry_while_others_wait(tmp_path):
    torch.multiprocessing.start_processes(make, (str(tmp_path),), nprocs=2, start_method="fork")
    assert len((tmp_path / "made").read_text().splitlines()) == 1


def test_an_entry_that_fails_leaves_nothing(tmp_path):
    def build(entry: Path) -> None:
        (entry / "x").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        kept(tmp_path, "sub/entry", build, "making it")
    assert list((tmp_path / "sub").iterdir()) == []


def test_what_a_killed_process_has_left_goes(tmp_path):
    (tmp_path / "entry.new-1").mkdir()
    (tmp_path / "entry.new-1" / "x").write_text("half")
    (tmp_path / "entry2.new-1").mkdir()
    kept(tmp_path, "entry", lambda entry: None, "making it")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "entry", "entry2.new-1"]


def test_without_locks_each_works_for_itself(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache.fcntl, "lockf", refuse)
    (tmp_path / "entry.new-1").mkdir()
    assert kept(tmp_path, "entry", lambda entry: None, "making it").is_dir() and (tmp_path / "entry.new-1").is_dir()


def test_a_full_disk_is_told_with_the_way_out(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(indexing, "save_index", full)
    with pytest.raises(UserError, match="a.json cannot be kept in .*No space left.* by MOELLAVA_CACHE"):
        load_records(written(tmp_path / "a.json", ROWS))


@pytest.mark.parametrize("block", [1, 2, 7, 1000])
def test_a_list_is_read_as_json_reads_it_whatever_a_block_holds(block, monkeypatch, tmp_path):
    monkeypatch.setattr("moellava.data.json_lists.BLOCK", block)
    path = tmp_path / "a.json"
    for text in (
        "[]",
        " [ ] ",
        '[12, 34.5e3, "a\\"],[", {"k": [1, {"l": null}]}, true]',
        json.dumps(ROWS[:5], indent=1),
    ):
        path.write_text(text)
        with path.open(encoding="utf-8") as file:
            assert list(listed(file)) == json.loads(text)
    for text in ("[1 2]", "[", "[1", "[1]x", '[{"a":\n 1}\n,\n {"b" 2}]', "[\n\n1,\n  2 3]", '["\u00fc", "'):
        path.write_text(text)
        with pytest.raises(ValueError) as expected:
            json.loads(text)
        with path.open(encoding="utf-8") as file, pytest.raises(ValueError) as found:
            list(listed(file))
        assert str(found.value) == str(expected.value), text
    path.write_text("[1,\n ]")  # of which Pythons say different things
    with path.open(encoding="utf-8") as file, pytest.raises(ValueError, match="^Illegal trailing comma .* line 2 col"):
        list(listed(file))
