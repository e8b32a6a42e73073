# SPDX-License-Identifier: Apache-2.0
"""Data files: what is read, and every way in which they are wrong."""

from __future__ import annotations

import json
import pickle

import pytest

from moellava.data.records import load_records, media_of, paths_of, read_records
from moellava.data.skip_lists import read_skip_list
from moellava.errors import DataError
from tests.records import place_of


def problems(path) -> list[str]:
    return [problem.text for problem in read_records(path)[1]]


def test_json_and_json_lines_of_several_files(data_file, make_record):
    one, two = make_record("a", "q", "naïve 🐱"), make_record(7, "<image>", "b", image="x.png")
    files = [
        data_file([one, two], "one.json"),
        data_file("\n".join(map(json.dumps, [two, one])) + "\n\n", "two.jsonl"),
        data_file("\ufeff" + json.dumps([one], indent=1), "bom.json"),
        data_file(json.dumps(one) + "\n" + json.dumps(two), "lines.json"),
    ]
    records = load_records(files)
    assert list(records) == [one, two, two, one, one, one, two]
    assert records[-1] == two and len(records) == 7
    assert records.name(0) == f"Record a of {files[0]}" and records.name(2) == f"Record 7 of {files[1]}"
    assert place_of(records.key(3)) == ("two.jsonl", 1)
    assert load_records(str(files[0]))[0] == one
    with pytest.raises(IndexError):
        records[7]


def test_the_index_is_compact_and_travels_to_workers(data_file, make_record):
    rows = [make_record(number, "what is it?", "a cat") for number in range(500)]
    records = load_records(data_file(rows))
    packed = pickle.dumps(records)
    assert len(packed) < 1.3 * len(json.dumps(rows))
    assert list(pickle.loads(packed)) == rows


def test_images_of_a_record(make_record):
    assert paths_of(make_record(1, "q"), "image") == paths_of(make_record(1, "q", image=[]), "image") == []
    assert paths_of(make_record(1, "q", image="a.png"), "image") == ["a.png"]
    assert paths_of(make_record(1, "q", image=["a.png", "b.png"]), "image") == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "a.json", "is empty"),
        (" \n", "a.jsonl", "is empty"),
        ("[]", "a.json", "holds no records"),
        ("{}", "a.json", "holds a JSON dict, not a list"),
        ('"x"', "a.json", "holds a JSON str, not a list"),
        ("[1, 2", "a.json", "not valid JSON"),
        ("nonsense", "a.json", "not valid JSON"),
        ("[3]", "a.json", "Record 0 .* is no JSON object: 3"),
        ('{"id": 1}\n{', "a.jsonl", r"Record 1 .* not valid JSON \(line 2\)"),
    ],
)
def test_files_that_are_no_list_of_records(data_file, content, name, message):
    with pytest.raises(DataError, match=message) as error:
        load_records(data_file(content, name))
    assert name in str(error.value)


def test_missing_and_undecodable_files(tmp_path):
    with pytest.raises(DataError, match="missing.json: no such data file"):
        load_records(tmp_path / "missing.json")
    (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(DataError, match="latin.json cannot be read"):
        load_records(tmp_path / "latin.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": None}, "no list of turns"),
        ({"conversations": "q"}, "no list of turns"),
        ({"conversations": []}, "no turns"),
        ({"conversations": [{"from": "human"}]}, "turn 0 that is not"),
        ({"conversations": [{"value": "q"}]}, "turn 0 that is not"),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 0 that is not"),
        ({"conversations": [{"from": "lama", "value": "q"}]}, "turn 0 from 'lama'; known are 'human' and 'gpt'"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "no question"),
        ({"conversations": [{"from": "human", "value": "q"}] * 2}, "turns 0 and 1 are both from 'human'"),
        ({"conversations": [{"from": "gpt", "value": "a"}] * 2}, "turns 0 and 1 are both from 'gpt'"),
        ({"image": 3}, "neither a path nor a list"),
        ({"image": ["a.png", 3]}, "no path"),
        ({"image": [""]}, "no path"),
        ({"image": ["a.png", "b.png"]}, "2 images but 1 <image> tags"),
        ({"image": None, "video": "a.mp4"}, "0 images but 1 <image> tags"),
        ({"video": 3}, '"video", which is neither a path nor a list'),
        ({"video": ["a.mp4", ""]}, "no path"),
        ({"video": "a.mp4"}, "1 videos but 0 <video> tags"),
        (
            {"conversations": [{"from": "human", "value": "<image> <video>"}, {"from": "gpt", "value": "a"}]},
            "0 videos but 1 <video> tags",
        ),
    ],
)
def test_records_that_are_wrong_are_named(data_file, make_record, change, message):
    good = make_record("good", "q", "a")
    bad = make_record("bad", "<image>\nq", "a", image="a.png") | change
    with pytest.raises(DataError, match=f"Record bad of .*data.json .*{message}"):
        load_records(data_file([good, bad]))


def test_a_record_without_conversations_lists_its_keys(data_file):
    assert "(its keys: id, text)" in problems(data_file([{"id": 4, "text": "x"}]))[0]


def test_half_of_a_surrogate_pair_is_found(data_file, make_record):
    (problem,) = problems(data_file([make_record(5, "q", "\ud83d")]))
    assert "Record 5" in problem and "surrogate" in problem


def test_tags_count_in_questions_alone(data_file, make_record):
    path = data_file([make_record(1, "<image>\nq", "the tag is <image>", "and?", "<image>", image="a.png")])
    assert problems(path) == []


def test_media_stand_in_the_order_of_their_tags(data_file, make_record):
    path = data_file(
        [make_record(1, "<video> <image>", "<video>", "<image><video>", "a", image=list("ab"), video=["c", "d"])]
    )
    assert [tuple(medium) for medium in media_of(load_records(path)[0])] == [
        ("video", "c"),
        ("image", "a"),
        ("image", "b"),
        ("video", "d"),
    ]


def test_all_problems_are_found_at_once(data_file, make_record, tmp_path):
    one = data_file([make_record(1, "q", "a"), make_record(2), {"id": 3}], "one.json")
    two = data_file('{"id": 4}\n{', "two.jsonl")
    with pytest.raises(DataError) as error:
        load_records([one, tmp_path / "gone.json", two])
    assert len(error.value.problems) == 5
    records, found = read_records([one, two])
    assert len(records) == 1
    places = [("one.json", 1), ("one.json", 2), ("two.jsonl", 0), ("two.jsonl", 1)]
    assert [place_of(problem.key) for problem in found] == places


def test_a_skip_list_leaves_records_out(data_file, make_record, tmp_path):
    path = data_file([make_record(1, "q", "a"), {"id": 2}, make_record(3, "q", "b")])
    (tmp_path / "skip.txt").write_text("data.json:1\tRecord 2 has no conversations\n\n", encoding="utf-8")
    records = load_records(path, read_skip_list(tmp_path / "skip.txt"))
    assert [row["id"] for row in records] == [1, 3] and records.skipped == 1
    assert place_of(records.key(1)) == ("data.json", 2)
    with pytest.raises(DataError, match="skip list cannot be read"):
        read_skip_list(tmp_path / "no.txt")
