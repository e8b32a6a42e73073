# SPDX-License-Identifier: Apache-2.0
"""No file of a mixture and no member of a shard goes missing without a word."""

from __future__ import annotations

import io
import re
import tarfile

import pytest

from moellava.data.records import load_records, read_records
from moellava.errors import DataError
from tests.data.test_formats import mixture, shard

TURNS = b'{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "%s"}]}'


@pytest.mark.parametrize("temperature", ["0.01", "0.001", "1.0e-300", "1.0e-320"])
@pytest.mark.parametrize(
    ("head", "of_b", "of_a"),
    [
        ("", "epochs: 0.1", ""),
        ("", "weight: 1", "weight: 1000"),
        ("", "weight: 1.0e-308", "weight: 1.0e+308"),
        ("temperature: {}\n", "", ""),
    ],
)
def test_a_data_file_of_which_nothing_would_come_is_named(head, of_b, of_a, temperature, tmp_path):
    text = f"datasets:\n  - {{json_path: a.json, {of_a}}}\n  - {{json_path: b.json, {of_b}}}\n"
    path = mixture(tmp_path, head.format(temperature) + text)
    records, problems = read_records(path)
    assert not len(records) and len(problems) == 1
    assert re.search(r"mix\S*: of the 3 records of \S*b.json none would come: its share is", problems[0].text)


@pytest.mark.parametrize("head", ["", "temperature: 2\n", "temperature: 0.001\n"])
def test_empty_data_files_are_named_in_any_mixture(head, tmp_path):
    path = mixture(tmp_path, f"{head}datasets: [{{json_path: empty.json}}]")
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(DataError, match=r"empty.json holds no records"):
        load_records(path)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("first", "second", "twice"),
    [
        (("json", TURNS % b"a"), ("json", TURNS % b"b"), "conversations"),
        (("json", TURNS % b"a"), ("txt", b"b"), "conversations"),
        (("json", TURNS % b"a"), ("meta.json", TURNS % b"b"), "conversations"),
        (("txt", b"a"), ("txt", b"b"), "conversations"),
        (("txt", b"a"), ("caption", b"b"), "conversations"),
        (("cls", b"1"), ("cls", b"2"), "cls"),
        (("json", TURNS[:-1] % b"a" + b', "cls": "1"}'), ("cls", b"2"), "cls"),
        (("bin", b"\xff\x00"), ("bin", b"\xff\x01"), "bin"),
    ],
)
def test_no_file_of_a_shard_takes_the_place_of_another_silently(first, second, twice, order, tmp_path):
    files = [(f"0.{ending}", content) for ending, content in (first, second)[::order]]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in [("1.json", TURNS % b"sound"), *files]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    records, problems = read_records(tmp_path / "a.tar")
    assert [row["id"] for row in records] == ["1"] and len(problems) == 1
    assert f"Record 1 of {tmp_path / 'a.tar'} has '{twice}' twice, in files of the name 0" in problems[0].text


def test_captions_stand_beside_facts_of_their_images(tmp_path):
    files = {"0.txt": b"a cat", "0.json": b'{"width": 3, "key": "0"}', "0.cls": b"1"}
    (row,) = load_records(shard(tmp_path / "a.tar", files))
    assert row["conversations"][1]["value"] == "a cat"
