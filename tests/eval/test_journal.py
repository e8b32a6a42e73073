# SPDX-License-Identifier: Apache-2.0
"""Answers that outlive the process which has given them."""

from __future__ import annotations

import json

import pytest

from moellava.errors import UserError
from moellava.eval.asking import Share
from moellava.eval.journal import Journal, claim, complete_lines


def line(place: int, text: str = "yes") -> dict:
    return {"question_id": place, "text": text, "metadata": {"index": place}}


def test_lines_of_all_processes_are_read_and_joined(tmp_path):
    first, second = Journal(tmp_path, rank=0), Journal(tmp_path, rank=1)
    first.add([line(0), line(2)])
    second.add([line(1)])
    assert sorted(first.known()) == [0, 1, 2] and first.count() == 3
    first.finish([line(0), line(1), line(2)])
    assert [row["metadata"]["index"] for row in complete_lines(tmp_path / "answers.jsonl")] == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
    assert sorted(second.known()) == [0, 1, 2]


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_half_a_line_is_dropped_by_who_goes_on_there(tmp_path, cut):
    Journal(tmp_path).add([line(0), line(1, "no")])
    path = tmp_path / "answers.part-0.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert sorted(Journal(tmp_path, rank=1).known()) == [0]  # another process reads, and leaves it as it is
    again = Journal(tmp_path)
    assert sorted(again.known()) == [0]
    again.add([line(1, "maybe")])
    assert again.known()[1]["text"] == "maybe"
    assert len(path.read_text().splitlines()) == 2


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "answers.part-0.jsonl"
    path.write_text(json.dumps(line(0)) + "\n{broken\n")
    with pytest.raises(UserError, match="part-0.jsonl, line 2 is damaged"):
        Journal(tmp_path).known()


def test_anything_can_be_said(tmp_path):
    text = "a\u2028b\n\u0000 \ud800"
    Journal(tmp_path).add([line(0, text)])
    assert Journal(tmp_path).known()[0]["text"].startswith("a\u2028b\n\u0000 ")


def test_a_folder_belongs_to_one_model_and_its_questions(tmp_path):
    claim(tmp_path / "a", {"checkpoint": "1", "questions": 3}, first=True)
    claim(tmp_path / "a", {"checkpoint": "1", "questions": 3}, first=False)
    with pytest.raises(UserError, match="checkpoint is '1' there and '2' here"):
        claim(tmp_path / "a", {"checkpoint": "2", "questions": 3}, first=True)
    claim(tmp_path / "b", {"checkpoint": "1"}, first=False)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_each_question_is_one_process_s(world):
    shares = [Share(rank, world).of(range(20)) for rank in range(world)]
    assert sorted(place for share in shares for place in share) == list(range(20))
    # … whatever an earlier run has answered, though the processes may not see the same of it
    some = Share(0, world).of([place for place in range(20) if place % 3])
    assert set(some) <= set(shares[0])
