# SPDX-License-Identifier: Apache-2.0
"""Shards on this machine: their pictures stay where they lie, and are read as files of their own are."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import random
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from moellava.data import findings, indexing
from moellava.data.check import check
from moellava.data.dataset import SupervisedDataset
from moellava.data.digests import digest_of
from moellava.data.embedded import Lying, data_uri
from moellava.data.formats import FORMATS, rows_of
from moellava.data.media import MediaFiles
from moellava.data.parquet_pages import Twice, places_of_group
from moellava.data.records import Records, load_records, media_of
from moellava.data.shard_parts import READERS
from moellava.data.shard_places import Place, place_told
from moellava.data.shown import Shown
from moellava.errors import BadFileError, DataError
from moellava.train.identity import data_content
from tests.tiny import record

COUNT = 6


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> list[Path]:
    """Pictures of some 30 KB, as they are larger than all that an index says of them."""
    folder = tmp_path_factory.mktemp("noise")
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (96 + 8 * number, 100, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def row(number: int) -> dict[str, Any]:
    return record(f"r{number}", "<image>\nq", f"answer {number}")


def write_tar(path: Path, pictures: Sequence[bytes], mode: str = "w", **options: Any) -> None:
    with tarfile.open(path, mode, **options) as tar:
        for number, picture in enumerate(pictures):
            for ending, content in (("json", json.dumps(row(number)).encode()), ("png", picture)):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def table_of(pictures: Sequence[bytes]) -> pa.Table:
    """Every second picture as `datasets` keeps it, in a list; the others are bare bytes."""
    rows = [
        row(number) | ({"images": [{"bytes": one, "path": None}]} if number % 2 else {"image": one})
        for number, one in enumerate(pictures)
    ]
    fields = {
        "id": pa.string(),
        "conversations": pa.list_(pa.struct({"from": pa.string(), "value": pa.string()})),
        "image": pa.large_binary(),
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
    }
    return pa.Table.from_pylist(rows, pa.schema(fields))


def write_arrow(path: Path, pictures: Sequence[bytes]) -> None:
    table = table_of(pictures)
    with ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, 4)


def write_folder(path: Path, pictures: Sequence[bytes]) -> None:
    datasets.Dataset(table_of(pictures)).save_to_disk(str(path), num_shards=2)


def write_split(path: Path, pictures: Sequence[bytes]) -> None:
    datasets.DatasetDict({"train; 1": datasets.Dataset(table_of(pictures))}).save_to_disk(str(path))


def write_parquet(path: Path, pictures: Sequence[bytes], **options: Any) -> None:
    pq.write_table(table_of(pictures), path, **{"row_group_size": 4} | options)


WRITERS: dict[str, tuple[str, Callable[..., None]]] = {
    "a.tar": ("a WebDataset shard", write_tar),
    "a.parquet": ("Parquet", write_parquet),
    "a.arrow": ("Arrow", write_arrow),
    "folder": ("a data set of `datasets.save_to_disk`", write_folder),
    "split": ("a data set of `datasets.save_to_disk`", write_split),
}
"""Name of a shard -> its format, and what writes it."""


def test_every_format_with_pictures_is_here():
    assert {name for name, _ in WRITERS.values()} == {entry.name for entry in FORMATS[:-1]}
    assert {read for _, _, read in READERS} <= {entry.read for entry in FORMATS}


@pytest.fixture
def keeping(empty_cache, monkeypatch) -> Path:
    """An empty cache, in which every index is kept."""
    monkeypatch.setattr(indexing, "KEPT_FROM", 1)
    monkeypatch.setattr(findings, "KEPT_FROM", 1)
    return empty_cache


@pytest.fixture
def shard(noise, keeping, tmp_path, request) -> Path:
    """The shard that a test is called with."""
    path = tmp_path / "data" / request.param
    path.parent.mkdir()
    WRITERS[request.param][1](path, contents(noise))
    return path


def contents(pictures: Sequence[Path]) -> list[bytes]:
    return [picture.read_bytes() for picture in pictures]


def same_as_loose(records: Records, pictures: Sequence[Path]) -> None:
    """That each record shows what its picture shows."""
    assert [one["id"] for one in records] == [f"r{number}" for number in range(len(pictures))]
    for one, picture in zip(records, pictures, strict=True):
        (medium,) = media_of(one)
        shown, expected = (MediaFiles().read(each) for each in (medium, medium._replace(path=picture)))
        assert (np.asarray(shown) == np.asarray(expected)).all()
    assert Shown(records).embedded().tolist() == [digest_of(data_uri(one).encode()) for one in contents(pictures)]


@pytest.mark.parametrize("shard", WRITERS, indirect=True)
def test_an_index_holds_no_picture(shard, noise, keeping):
    records = load_records(shard)
    same_as_loose(records, noise)
    size = sum(file.stat().st_size for file in keeping.rglob("*") if file.is_file())
    assert 0 < size < 0.1 * sum(map(len, contents(noise)))
    assert records.nbytes < 0.1 * sum(map(len, contents(noise)))
    assert not (keeping / "fetched").exists(), "nothing is copied"
    assert not check([str(shard)], MediaFiles(), in_full=True).problems


@pytest.mark.parametrize("shard", WRITERS, indirect=True)
def test_a_record_is_known_by_the_digest_that_earlier_versions_gave_it(shard, noise):
    """Of all that it says, its pictures among it: skip lists go on naming it."""
    for number, value in enumerate(rows_of(shard)):
        picture = data_uri(noise[number].read_bytes())
        said = {"images": [{"bytes": picture, "path": None}]} if number % 2 else {"image": picture}
        expected = dict.fromkeys(value) | row(number) | said if "image" in value else row(number)
        if shard.name == "a.tar":
            expected = row(number) | {"image": [picture]}
        digest = digest_of(json.dumps(expected, ensure_ascii=False).encode())
        assert load_records(shard).key(number) == f"{shard}:{number}:{digest:016x}"


@pytest.mark.parametrize("shard", ["a.tar"], indirect=True)
def test_a_run_is_known_by_the_digest_that_earlier_versions_gave_its_records(shard, noise):
    """Their indexes held the pictures."""
    said = [row(number) | {"image": [data_uri(one)]} for number, one in enumerate(contents(noise))]
    texts = [json.dumps(one, ensure_ascii=False).encode() for one in said]
    ends = np.cumsum([0, *map(len, texts)]).astype(np.int64)
    before = f"{COUNT} records, sha256 {hashlib.sha256(ends.tobytes() + b''.join(texts)).hexdigest()[:32]}"
    records = load_records(shard)
    now = f"{COUNT} records, {records.content()}"
    assert data_content(records, None) == data_content(records, now) == data_content(records, "another") == now
    assert data_content(records, before) == before != now


@pytest.mark.parametrize("shard", WRITERS, indirect=True)
def test_a_shard_that_changes_is_told_and_read_anew(shard, noise, encoder):
    dataset = SupervisedDataset(load_records(shard), encoder())
    assert len(dataset[3]["media"]) == 1
    WRITERS[shard.name][1](shard, contents(noise)[::-1])
    said = rf"Record r3 of .*{shard.name}.*{shard.name} \(.*the shard is another one than when it was read"
    with pytest.raises(BadFileError, match=said):
        dataset[3]
    same_as_loose(load_records(shard), noise[::-1])
    shard.rename(shard.with_name("away"))
    with pytest.raises(BadFileError, match=rf"Record r3 of .*{shard.name}.*No such file"):
        dataset[3]


@pytest.mark.parametrize("shard", ["a.tar", "a.parquet"], indirect=True)
def test_workers_read_the_same(shard, encoder):
    dataset = SupervisedDataset(load_records(shard), encoder())
    own = [dataset[number]["media"][0] for number in range(COUNT)]
    for _ in range(2):
        loader = DataLoader(dataset, batch_size=None, num_workers=2)
        assert [sample["media"][0] for sample in loader] == own


@pytest.mark.parametrize("shard", ["a.tar", "a.parquet", "folder"], indirect=True)
def test_an_epoch_makes_no_memory_grow(shard):
    def read(times: int) -> int:
        for _ in range(times):
            for one in records:
                MediaFiles().size(media_of(one)[0])
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")

    records = load_records(shard)
    before = read(20)
    assert read(200) - before < 8e6, "of 40 MB that are read"


@pytest.mark.parametrize("shard", ["a.tar", "a.parquet"], indirect=True)
def test_a_broken_picture_is_told_before_a_run(shard, noise, encoder):
    cut = [*contents(noise)[:-1], noise[-1].read_bytes()[:-100]]
    WRITERS[shard.name][1](shard, cut)
    with pytest.raises(DataError, match=rf"Record r{COUNT - 1} of .*{shard.name} \(.*cannot be read"):
        SupervisedDataset(load_records(shard), encoder())
    assert len(SupervisedDataset(load_records(shard), encoder(), bad_files="skip")) == COUNT - 1


def lying(path: Path) -> list[Place | None]:
    """The places of a shard's pictures, each of which is there; None for one in the index."""
    found: list[Place | None] = []
    for value in rows_of(path):
        images = value.get("images") or [{"bytes": value["image"]}] if path.suffix == ".parquet" else value["image"]
        (image,) = [one["bytes"] if isinstance(one, dict) else one for one in images]
        place = place_told(image.place) if isinstance(image, Lying) else None
        if place is not None:
            with path.open("rb") as file:
                file.seek(place.begin)
                assert data_uri(place.picture(file.read(place.size))) == image
        found.append(place)
    return found


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_packed_tar_file_goes_into_its_index_and_it_is_said(mode, noise, tmp_path, keeping, caplog):
    path = tmp_path / "a.tar"
    write_tar(path, contents(noise), mode)
    with caplog.at_level(logging.INFO, logger="moellava"):
        records = load_records(path)
    assert f"{path}: {COUNT} pictures are so packed that none can be read by itself" in caplog.text
    same_as_loose(records, noise)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_files_of_each_kind(form, noise, tmp_path, keeping):
    write_tar(tmp_path / "a.tar", contents(noise), format=form)
    assert all(lying(tmp_path / "a.tar"))
    whole = bytearray((tmp_path / "a.tar").read_bytes())
    for begin in [place.begin - 512 for place in lying(tmp_path / "a.tar") if place]:
        head = whole[begin : begin + 512]
        head[257:265], head[148:156] = bytes(8), b" " * 8
        head[148:156] = f"{sum(head):06o}\0 ".encode()
        whole[begin : begin + 512] = head
    (tmp_path / "old.tar").write_bytes(whole)
    same_as_loose(load_records(tmp_path / "old.tar"), noise)


OPTIONS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "a page's values as they are": {"use_dictionary": False},
    "the second kind of pages": {"use_dictionary": False, "data_page_version": "2.0"},
    "small pages": {"use_dictionary": False, "write_batch_size": 1, "data_page_size": 2**12},
    "with digests": {"write_page_checksum": True, "write_page_index": True},
}


@pytest.mark.parametrize("packed", ["none", "snappy", "gzip", "zstd", "brotli"])
@pytest.mark.parametrize("options", OPTIONS)
def test_values_of_parquet_have_places(packed, options, noise, tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, contents(noise) * 2, compression=packed, **OPTIONS[options])
    assert all(lying(path))


@pytest.mark.parametrize("packed, expected", [("none", True), ("snappy", True), ("zstd", False)])
def test_of_a_large_page_no_more_is_unpacked_than_a_picture_needs(packed, expected, tmp_path, caplog):
    """Of snappy the blocks that hold it, also where it packs a lot; a page of another packing is too much."""
    draw = random.Random(0)
    pictures = [b"\x89PNG" + draw.randbytes(90_000) + b"abc" * draw.randint(1, 30_000) for _ in range(40)]
    path = tmp_path / "a.parquet"
    write_parquet(path, pictures, compression=packed, row_group_size=100, use_dictionary=False)
    with caplog.at_level(logging.INFO, logger="moellava"):
        places = lying(path)
    assert all(place.size < 330_000 for place in places if place)
    assert [bool(place) for place in places[:30]] == [expected] * 30, "the last page is a small one"
    assert ("pictures are so packed" in caplog.text) is not expected


def test_whatever_a_page_says_nothing_but_its_rows_are_refused(noise, tmp_path):
    write_parquet(tmp_path / "a.parquet", contents(noise)[:2])
    whole, draw = (tmp_path / "a.parquet").read_bytes(), random.Random(0)
    metadata = pq.ParquetFile(tmp_path / "a.parquet").metadata
    begins = [metadata.row_group(0).column(number).data_page_offset for number in range(metadata.num_columns)]
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            damaged[min(draw.choice([0, *begins]) + draw.randint(0, 60), len(whole) - 1)] = draw.randint(0, 255)
        assert isinstance(places_of_group(Twice(io.BytesIO(damaged)), metadata, 0), dict)


def test_a_packed_arrow_file_goes_into_its_index(noise, tmp_path, keeping, caplog):
    table = table_of(contents(noise))
    with ipc.new_file(str(tmp_path / "a.arrow"), table.schema, options=ipc.IpcWriteOptions(compression="zstd")) as file:
        file.write_table(table)
    with caplog.at_level(logging.INFO, logger="moellava"):
        same_as_loose(load_records(tmp_path / "a.arrow"), noise)
    assert f"{COUNT} pictures are so packed" in caplog.text


@pytest.mark.parametrize("place", [Place(1, 2), Place(1, 2, "a;b:c,d/ü.arrow"), Place(1, 2, "", "zstd", 9, 3, 4)])
def test_a_place_is_a_text_without_the_marks_of_a_path(place):
    assert place_told(str(place)) == place and ";" not in str(place)
