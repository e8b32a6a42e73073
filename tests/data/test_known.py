# SPDX-License-Identifier: Apache-2.0
"""Digests of what files show, kept by the state that they are in."""

from __future__ import annotations

from moellava.data import known
from moellava.data.known import Contents
from moellava.data.media import MediaFiles
from moellava.data.records import load_records
from moellava.data.shown import Shown
from tests.tiny import record


def contents_of(path, pictures) -> list[int]:
    return Contents(Shown(load_records(path)), MediaFiles(pictures[0].parent)).of_media.tolist()


def test_a_file_is_read_once_and_again_only_where_it_could_not_be(kept, data_file, pictures, monkeypatch):
    rows = [record(path.name, "<image>", "a", image=path.name) for path in pictures]
    path, read = data_file(rows), known.content_of_file
    unreadable = str(pictures[1])
    monkeypatch.setattr(known, "content_of_file", lambda file: 0 if str(file) == unreadable else read(file))
    first = contents_of(path, pictures)
    seen: list[str] = []
    monkeypatch.setattr(known, "content_of_file", lambda file: seen.append(str(file)) or read(file))
    second = contents_of(path, pictures)
    assert sum(content == 0 for content in first) == 1 and seen == [unreadable]
    assert len({*second}) == len(pictures) and set(first) - {0} < set(second)
    seen.clear()
    assert contents_of(path, pictures) == second and not seen
