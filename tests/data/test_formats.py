# SPDX-License-Identifier: Apache-2.0
"""Every wrapping that a data file may have: the same records come out of it, and a bad file is named."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from moellava.data.formats import FORMATS, rows_of
from moellava.data.media import MediaFiles
from moellava.data.records import load_records, media_of, read_records
from moellava.errors import DataError, UserError
from tests.tiny import record

ROWS = [record("a", "<image>\nq\u2028 é", "naïve 🐱", image="x.png"), record("7", "q", "b", image=None)]
SAID = [ROWS[0], {key: value for key, value in ROWS[1].items() if key != "image"}]


def lines(rows: list[Any]) -> str:
    return "\n".join(map(json.dumps, rows))


TEXTS: dict[str, Callable[[list[Any]], bytes]] = {
    "list.json": lambda rows: json.dumps(rows).encode(),
    "pretty.json": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False).encode(),
    "lines.jsonl": lambda rows: lines(rows).encode(),
    "lines.json": lambda rows: lines(rows).encode(),
    "lines.ndjson": lambda rows: (lines(rows) + "\r\n\r\n").encode(),
    "crlf.jsonl": lambda rows: lines(rows).replace("\n", "\r\n").encode(),
    "mac.jsonl": lambda rows: lines(rows).replace("\n", "\r").encode(),
    "one-line.json": lambda rows: " ".join(map(json.dumps, rows)).encode(),
    "list.jsonl": lambda rows: json.dumps(rows).encode(),
    "pretty-lines.jsonl": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows).encode(),
    "bom.json": lambda rows: b"\xef\xbb\xbf" + json.dumps(rows).encode(),
    "utf16.json": lambda rows: json.dumps(rows).encode("utf-16"),
    "utf32.jsonl": lambda rows: lines(rows).encode("utf-32"),
    "noname": lambda rows: lines(rows).encode(),
    "list.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "lines.jsonl.gz": lambda rows: gzip.compress(lines(rows).encode()),
    "lines.jsonl.bz2": lambda rows: bz2.compress(lines(rows).encode()),
    "lines.jsonl.xz": lambda rows: lzma.compress(lines(rows).encode()),
    "misnamed.txt": lambda rows: gzip.compress(b"\xef\xbb\xbf" + lines(rows).encode()),
}


@pytest.mark.parametrize("name", TEXTS)
def test_json_in_every_wrapping(name, tmp_path):
    (tmp_path / name).write_bytes(TEXTS[name](ROWS))
    assert list(load_records(tmp_path / name)) == SAID


@pytest.mark.parametrize("name", ["one.json", "one.jsonl", "one.json.gz"])
def test_a_single_record_is_a_file(name, tmp_path):
    content = json.dumps(ROWS[0]).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert list(load_records(tmp_path / name)) == SAID[:1]


def arrow_stream(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def arrow_file(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


TABLES: dict[str, Callable[[Path, pa.Table], Any]] = {
    "rows.parquet": lambda path, table: pq.write_table(table, path),
    "stream.arrow": arrow_stream,
    "file.arrow": arrow_file,
    "folder": lambda path, table: datasets.Dataset(table).save_to_disk(str(path)),
    "splits": lambda path, table: datasets.DatasetDict({"train": datasets.Dataset(table)}).save_to_disk(str(path)),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name, tmp_path):
    TABLES[name](tmp_path / name, pa.Table.from_pylist(ROWS))
    assert list(load_records(tmp_path / name)) == SAID


@pytest.mark.parametrize("name", TABLES)
def test_images_in_tables_are_read(name, tmp_path, pictures):
    """As `datasets` keeps them, as bare bytes, and as a path alone."""
    content = pictures[0].read_bytes()
    rows = [
        {"images": [{"bytes": content, "path": "0.png"}], "messages": ROWS[0]["conversations"]},
        {"images": [{"bytes": None, "path": str(pictures[1])}], "messages": ROWS[0]["conversations"]},
    ]
    TABLES[name](tmp_path / name, pa.Table.from_pylist(rows))
    records = load_records(tmp_path / name)
    sizes = [MediaFiles().read(media_of(row)[0]).size for row in records]
    assert sizes == [(40, 24), (40, 32)]
    assert not MediaFiles().problems([medium for row in records for medium in media_of(row)], in_full=True)


def test_a_column_of_bytes_is_an_image(tmp_path, pictures):
    rows = [{"image": pictures[0].read_bytes(), "conversations": ROWS[0]["conversations"]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (medium,) = media_of(load_records(tmp_path / "a.parquet")[0])
    assert MediaFiles().size(medium) == (40, 24)


def test_turns_in_columns_and_turns_as_json(tmp_path):
    """`datasets` makes a list of objects a row of lists; some tables keep turns as a text."""
    turns = SAID[0]["conversations"]
    columns = {key: [turn[key] for turn in turns] for key in ("from", "value")}
    rows = [{"image": "x.png", "conversations": columns}, {"image": "x.png", "messages": json.dumps(turns)}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert [row["conversations"] for row in load_records(tmp_path / "a.json")] == [turns, turns]


def mixture(tmp_path: Path, text: str) -> Path:
    for name, count in (("a", 10), ("b", 3)):
        (tmp_path / f"{name}.json").write_text(json.dumps([record(f"{name}{n}", "q", "x") for n in range(count)]))
    (tmp_path / "mix.yaml").write_text(text)
    return tmp_path / "mix.yaml"


@pytest.mark.parametrize(
    ("strategy", "taken"),
    [
        ("all", range(10)),
        ("first:3", range(3)),
        ("end:3", range(7, 10)),
        ("end:0", []),
        ("first:25%", range(3)),
        ("end:25%", range(7, 10)),
        ("first:99", range(10)),
    ],
)
def test_a_mixture_takes_what_it_says(strategy, taken, tmp_path):
    text = f"datasets:\n  - json_path: a.json\n    sampling_strategy: {strategy}\n  - json_path: b.json\n"
    records = load_records(mixture(tmp_path, text))
    assert [row["id"] for row in records] == [f"a{n}" for n in taken] + ["b0", "b1", "b2"]
    if taken:
        assert records.name(0) == f"Record a{taken[0]} of {tmp_path}/a.json"
        assert records.key(0).startswith(f"{tmp_path}/a.json:{taken[0]}:")


def test_random_shares_are_of_their_seed(tmp_path):
    def drawn(strategy: str, seed: str = "") -> list[str]:
        text = f"{seed}datasets:\n  - json_path: a.json\n    sampling_strategy: {strategy}\n"
        return [row["id"] for row in load_records(mixture(tmp_path, text))]

    half, other = drawn("random:50%"), drawn("random:50%", "seed: 1\n")
    assert len(half) == 5 and half == drawn("random:5") == drawn("random:5", "seed: 0\n") == sorted(half)
    assert half != other and len(set(other)) == 5


def ids_of(tmp_path, text: str) -> Counter[str]:
    return Counter(row["id"][0] for row in load_records(mixture(tmp_path, text)))


@pytest.mark.parametrize(
    ("head", "of_a", "of_b", "expected"),
    [
        ("", "epochs: 2", "epochs: 1", (20, 3)),
        ("", "epochs: 0.5", "", (5, 3)),
        ("", "epochs: 2.25", "epochs: 3", (22, 9)),  # 22.5, to the even one
        ("", "weight: 1", "weight: 1", (6, 6)),  # 13 records, 6.5 of each
        ("", "weight: 3", "weight: 10", (3, 10)),
        ("", "weight: 1, sampling_strategy: first:3", "weight: 1", (3, 3)),
        ("temperature: 1\n", "", "", (10, 3)),
        ("temperature: 2\n", "", "", (8, 5)),  # 3.16 to 1.73
        ("temperature: 1000\n", "", "", (7, 6)),
        ("", "weight: 1.0e+308", "weight: 1.0e+308", (6, 6)),
    ],
)
def test_how_often_records_come(head, of_a, of_b, expected, tmp_path):
    text = f"{head}datasets:\n  - {{json_path: a.json, {of_a}}}\n  - {{json_path: b.json, {of_b}}}\n"
    counts = ids_of(tmp_path, text)
    assert (counts["a"], counts["b"]) == expected
    each = Counter(row["id"] for row in load_records(mixture(tmp_path, text)))
    for name, count in (("a", 10), ("b", 3)):
        times = [each[f"{name}{number}"] for number in range(count)]
        assert max(times) - min(times) <= 1


def test_patterns_name_files_in_order(tmp_path, monkeypatch):
    path = mixture(tmp_path, "datasets: [{json_path: '[ab].json', sampling_strategy: 'end:4'}]")
    assert [row["id"] for row in load_records(path)] == ["a9", "b0", "b1", "b2"]
    monkeypatch.chdir(tmp_path)
    records = load_records("?.json")
    assert len(records) == 13 and records.name(12) == "Record b2 of b.json" and records.key(10).startswith("b.json:0:")
    with pytest.raises(DataError, match=r"none\*.json: no data file fits this pattern"):
        load_records(["?.json", "none*.json"])
    Path("odd[1].json").write_text(json.dumps([record("odd", "q", "a")]))
    assert [row["id"] for row in load_records("odd[1].json")] == ["odd"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", 'no list "datasets"'),
        ("temperature: 0\ndatasets: [{json_path: a.json}]", "temperature is a number above 0, not 0"),
        ("datasets: [{json_path: a.json, epochs: x}]", "epochs is a number above 0, not 'x'"),
        ("datasets: [{json_path: a.json, weight: .inf}]", "weight is a number above 0"),
        ("datasets: [{json_path: a.json, epochs: 1, weight: 1}]", "has weight and epochs, and each says how much"),
        ("temperature: 2\ndatasets: [{json_path: a.json, epochs: 1}]", "has temperature and epochs"),
        ("datasets: [{json_path: a.json, weight: 1}, {json_path: b.json}]", "b.json has no weight"),
        ("datasets: [{json_path: 'c*.json'}]", "no data file fits this pattern"),
        ("datasets: []", 'no list "datasets"'),
        ("datasets: [a.json]", 'has no "json_path"'),
        ("datasets: [{json_path: a.json, sampling_strategy: 'half'}]", "sampling_strategy 'half'; known are"),
        ("datasets: [{json_path: a.json, share: 2}]", "has 'share', which would not act"),
        ("datasets: [{json_path: a.json}]\nname: x", "has 'name', which would not act"),
        ("datasets: [{json_path: mix.yaml}]", "no other mixture"),
        ("datasets: [{json_path: gone.json}]", "gone.json: no such data file"),
        ("datasets: [{json_path: a.json, seed: x}]", "seed is a whole number"),
        ("datasets: [{json_path: a.json, epochs: 2, epochs: 3}]", "'epochs' twice in one place"),
        ("seed: 1\ndatasets: [{json_path: a.json}]\nseed: 2", "'seed' twice in one place"),
        ("datasets: [", "is not valid YAML"),
        ("[" * 5000, "is not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("datasets: [&a [x, x], &b [*a, *a], &c [*b, *b]]", 'has no "json_path"'),
    ],
)
def test_a_mixture_that_is_wrong_says_what(text, said, tmp_path):
    with pytest.raises(DataError) as error:
        load_records(mixture(tmp_path, text))
    assert said in str(error.value) and len(str(error.value)) < 600


def test_the_same_record_of_a_mixture_and_of_its_file_has_the_same_key(tmp_path, monkeypatch):
    path = mixture(tmp_path, "datasets: [{json_path: a.json}]")
    monkeypatch.chdir(tmp_path)
    assert load_records(path).key(4) == load_records("a.json").key(4)


def shard(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("other", "w")])
def test_shards_of_web_datasets(name, mode, tmp_path, image_tree):
    picture = (image_tree / "a.png").read_bytes()
    files = {
        "train/0001.json": as_bytes(record(7, "<image>\nq", "ü", image="ignored.png")),
        "train/0001.png": picture,
        "train/0002.txt": b" A cat.\n",
        "train/0002.jpg": picture,
        "0003.json": as_bytes(record("x", "<image><image>", "b")),
        "0003.0.png": picture,
        "0003.1.PNG": picture,
        "0003.cls": b"4",
    }
    records = load_records(shard(tmp_path / name, files, mode))
    assert [row["id"] for row in records] == [7, "train/0002", "x"]
    assert records[1]["conversations"] == record("x", "<image>", "A cat.")["conversations"]
    for row in records:
        assert [MediaFiles().read(medium).size for medium in media_of(row)] == [(64, 40)] * len(row["image"])
    assert len(records[2]["image"]) == 2 and any("'cls' in 1 records" in notice for notice in records.notices)


def test_a_shard_that_is_wrong_says_what(tmp_path):
    files = {"1.json": b"{", "2.json": b"[1]", "3.bin": b"\xff\xfe", "4.json": as_bytes(record("good", "q", "a"))}
    records, problems = read_records(shard(tmp_path / "a.tar", files))
    assert [row["id"] for row in records] == ["good"]
    said = ["Record 0 .*is not valid JSON .1.json", "Record 1 .*no JSON object .2.json", 'Record 3 .*has "bin", which']
    for problem, words in zip(problems, said, strict=True):
        assert re.search(words, problem.text), problem.text
    (tmp_path / "cut.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:1400])
    with pytest.raises(DataError, match="cut.tar"):
        load_records(tmp_path / "cut.tar")


BAD: list[tuple[str, bytes, str]] = [
    ("a.json", b"", "is empty"),
    ("a.json.gz", gzip.compress(b"")[:12], "cannot be read"),
    ("a.json.gz", gzip.compress(b"[" * 4000)[:-9], "cannot be read"),
    ("a.json.gz", b"\x1f\x8bnonsense", "cannot be read"),
    ("a.json.bz2", b"BZh9nonsense", "cannot be read"),
    ("a.json.xz", b"\xfd7zXZ\x00nonsense", "cannot be read"),
    ("a.json", b"\xff\xfe\x00", "cannot be read"),
    ("a.json", '["é"]'.encode("latin-1"), "cannot be read"),
    ("a.json", b"[" * 100_000, "nested too deeply"),
    ("a.json", b'[{"x":' + b"[" * 100_000, "nested too deeply"),
    ("a.jsonl", b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "Record 0 .*nested too deeply"),
    ("a.json", b'[{"x":' + b"[" * 200 + b"]" * 200 + b"}]", "Record 0 .*is nested too deeply"),
    ("a.json", b'[{"image": "a.png", "image": "b.png"}]', "key 'image' twice"),
    ("a.jsonl", b'{"image": "a.png", "image": "b.png"}', "Record 0 .*key 'image' twice"),
    ("a.json", b"[" + b"1" * 5000 + b"]", "not valid JSON"),
    ("a.json", b"null", "holds a JSON NoneType"),
    ("a.json", b'{"data": 1}', "not a list of records .its keys: data."),
    ("a.csv", b"image,question\na.png,what\n", "is not valid JSON: .*Data files are .*Parquet, Arrow, .* JSON Lines"),
    ("a.parquet", b"PAR1 nonsense PAR1", "no Parquet file that can be read"),
    ("a.parquet", b"PAR1", "no Parquet file that can be read"),
    ("a.arrow", b"ARROW1\0\0nonsense", "no Arrow file that can be read"),
    ("a.arrow", b"\xff\xff\xff\xffnonsense", "no Arrow file that can be read"),
]


@pytest.mark.parametrize(("name", "content", "said"), BAD, ids=[f"{n}-{name}" for n, (name, _, _) in enumerate(BAD)])
def test_bad_files_are_named(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"(?s){said}") as error:
        load_records(tmp_path / name)
    assert name in str(error.value) and len(str(error.value)) < 700


def test_paths_that_are_no_files_are_named(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("closed.json"))  # root reads all
    (tmp_path / "closed.json").write_text("[]")
    said = {
        "pipe.json": "is a pipe",
        "empty": "is a folder, but no data set",
        "closed.json": "permission denied",
        "gone.json": "no such data file",
        "x" * 300: "File name too long",
        "a\0b.json": "null",
        "closed.json/x.json": "no such data file",
    }
    problems = [problem.text for problem in read_records([tmp_path / name for name in said])[1]]
    assert len(problems) == len(said)
    for problem, words in zip(problems, said.values(), strict=True):
        assert words in problem and problem.isprintable()


def test_a_data_set_of_several_splits_names_them(tmp_path):
    table = datasets.Dataset.from_list(SAID[:1])
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path))}/both holds the splits train, test"):
        load_records(tmp_path / "both")
    assert len(load_records(tmp_path / "both" / "train")) == 1


@pytest.mark.parametrize(
    ("name", "package"), [("rows.parquet", "pyarrow"), ("stream.arrow", "pyarrow"), ("folder", "pyarrow")]
)
def test_an_absent_package_is_named_with_what_installs_it(name, package, tmp_path, monkeypatch):
    TABLES[name](tmp_path / name, pa.Table.from_pylist(ROWS))
    import importlib

    real = importlib.import_module

    def absent(module: str) -> Any:
        if module == package:
            raise ImportError(module)
        return real(module)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match=rf"needs the package {package}: pip install 'moellava\[data\]'"):
        load_records(tmp_path / name)


def test_a_broken_line_leaves_the_others(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(ROWS[:1]) + "\n{broken\n" + lines(ROWS[1:]))
    records, problems = read_records(tmp_path / "a.jsonl")
    assert list(records) == SAID and "Record 1 of" in problems[0].text and "(line 2)" in problems[0].text
    (tmp_path / "b.json").write_text("{broken\n" + lines(ROWS))
    records, problems = read_records(tmp_path / "b.json")
    assert list(records) == SAID and "Record 0 of" in problems[0].text


def test_the_last_format_takes_what_no_other_does(tmp_path):
    assert FORMATS[-1].fits(tmp_path, b"") and len({entry.name for entry in FORMATS}) == len(FORMATS)
    (tmp_path / "a.json").write_text("[1, 2]")
    assert list(rows_of(tmp_path / "a.json")) == [1, 2]
