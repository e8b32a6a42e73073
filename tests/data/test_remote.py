# SPDX-License-Identifier: Apache-2.0
"""Data that lie elsewhere, in a file system of `fsspec` that needs no network."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import re
import shutil
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
from PIL import Image

from moellava.data import fetched, file_systems, indexing
from moellava.data.cache import PLACE
from moellava.data.check import check
from moellava.data.images import open_image
from moellava.data.media import MediaFiles
from moellava.data.records import Medium, load_records, media_of
from moellava.data.remote import RemoteFolder, addresses, copied, is_remote
from moellava.data.shown import states_of
from moellava.errors import BadFileError, DataError, UserError
from moellava.files import read_json
from tests import tiny
from tests.data.test_shard_parts import write_shards
from tests.processes import losses_of, train_here

ROOT = "memory://bucket"


@pytest.fixture
def bucket(pictures, tmp_path, monkeypatch) -> Iterator[fsspec.AbstractFileSystem]:
    """A store with records and their images, and an empty cache."""
    monkeypatch.setenv(PLACE, str(tmp_path / "cache"))
    monkeypatch.setattr(indexing, "KEPT_FROM", 1)
    store = fsspec.filesystem("memory")
    for number, picture in enumerate(pictures[:2]):
        store.pipe(f"/bucket/images/cats/{number}.png", picture.read_bytes())
    for name, numbers in {"a": (0, 1), "b": (1,)}.items():
        rows = [tiny.record(f"{name}{n}", "<image>\nwhat?", "a shape", image=f"cats/{n}.png") for n in numbers]
        store.pipe(f"/bucket/data/{name}.json", json.dumps(rows).encode())
    yield store
    store.rm("/bucket", recursive=True)


def test_data_files_are_read_as_local_ones_are(bucket, tmp_path, monkeypatch):
    bucket.get_file("/bucket/data/a.json", str(tmp_path / "a.json"))
    found, here = load_records(f"{ROOT}/data/a.json"), load_records(tmp_path / "a.json")
    assert list(found) == list(here) and found.content() == here.content()
    assert found.name(1) == "Record a1 of memory://bucket/data/a.json"
    assert [record["id"] for record in load_records(f"{ROOT}/data/*.json")] == ["a0", "a1", "b1"]
    mixture = "datasets:\n  - json_path: a.json\n    sampling_strategy: first:1\n  - json_path: b.json\n"
    bucket.pipe("/bucket/data/all.yaml", mixture.encode())
    assert [record["id"] for record in load_records(f"{ROOT}/data/all.yaml")] == ["a0", "b1"]
    monkeypatch.setattr(type(bucket), "get_file", None)  # all of it lies in the cache by now
    assert len(load_records(f"{ROOT}/data/a.json")) == 2


@pytest.mark.parametrize("name", ["rows.jsonl", "a.tar", "a.parquet"])
@pytest.mark.parametrize("archive", ["zip", "tar"])
def test_data_may_lie_in_archives(archive, name, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv(PLACE, str(tmp_path / "cache"))
    folder = write_shards(tmp_path / "shards", pictures[:3])
    (folder / "rows.jsonl").write_text(json.dumps(tiny.record("r", "q", "a")))
    whole = tmp_path / f"all.{archive}"
    if archive == "zip":
        with zipfile.ZipFile(whole, "w") as packed:
            packed.write(folder / name, name)
    else:
        with tarfile.open(whole, "w") as packed_by_tar:
            packed_by_tar.add(folder / name, name)
    records, here = load_records(f"{archive}://{name}::file://{whole}"), load_records(folder / name)
    assert len(records) == len(here) > 0
    shown, files = [[media_of(row) for row in rows] for rows in (records, here)], MediaFiles()
    for there, local in zip(*shown, strict=True):
        for one, other in zip(there, local, strict=True):
            assert (np.asarray(files.read(one)) == np.asarray(files.read(other))).all()


def write_archive(whole: Path, files: dict[str, bytes]) -> None:
    """A zip or a tar, by its ending, that takes the place of one that is there."""
    new = whole.with_name("new")
    if whole.suffix == ".zip":
        with zipfile.ZipFile(new, "w") as packed:
            for name, content in files.items():
                packed.writestr(name, content)
    else:
        with tarfile.open(new, "w") as packed_by_tar:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                packed_by_tar.addfile(entry, io.BytesIO(content))
    new.replace(whole)


Archive = tuple[MediaFiles, list[Medium], Callable[[dict[str, bytes]], None]]


@pytest.fixture(params=["zip", "tar", "zip in a tar"])
def archive(request, pictures, tmp_path, monkeypatch) -> Archive:
    """Pictures in an archive, of which nothing is kept; and what puts others there."""
    monkeypatch.setenv(PLACE, str(tmp_path / "cache"))
    monkeypatch.setenv(fetched.LIMIT, "0")
    inner, outer = request.param.split(" in a ")[0], tmp_path / f"all.{request.param.split()[-1]}"
    nested = " in a " in request.param

    def write(files: dict[str, bytes]) -> None:
        write_archive(tmp_path / f"inside.{inner}" if nested else outer, files)
        if nested:
            write_archive(outer, {"inside.zip": (tmp_path / "inside.zip").read_bytes()})

    contents = {f"images/{number % 2}/{number}.png": pictures[number % 3].read_bytes() for number in range(12)}
    write(contents)
    chain = f"{inner}://images::" + ("tar://inside.zip::" if nested else "") + f"file://{outer}"
    return MediaFiles(chain), [Medium("image", name.removeprefix("images/")) for name in contents], write


@pytest.fixture
def openings(monkeypatch) -> list[str]:
    """The addresses of archives that are opened."""
    addresses: list[str] = []
    really = file_systems.opened
    monkeypatch.setattr(
        file_systems, "opened", lambda url: (addresses.append(url) if "::" in url else None) or really(url)
    )
    file_systems._held.cache_clear()
    return addresses


def shown_by(files: MediaFiles, media: list[Medium]) -> list[bytes]:
    return [files.read(medium).tobytes() for medium in media]  # type: ignore[union-attr]


@pytest.mark.parametrize("nested", [False, True])
def test_a_folder_of_datasets_is_read_as_a_local_one_is(nested, bucket, pictures, tmp_path):
    rows = [tiny.record(str(n), "<image>\nwhat?", "a shape") | {"image": Image.open(pictures[n])} for n in range(3)]
    table = datasets.Dataset.from_list(rows)
    local, address = tmp_path / "saved", f"{ROOT}/saved"
    (datasets.DatasetDict({"train": table}) if nested else table).save_to_disk(str(local))
    bucket.put(str(local), "/bucket/saved", recursive=True)
    records, here = load_records(address), load_records(local)
    assert len(records) == 3 and records.content(whole=True) == here.content(whole=True)
    bucket.rm(next(name for name in bucket.find("/bucket/saved") if name.endswith(".arrow")))
    with pytest.raises(DataError, match=r"saved is not whole: .*arrow is missing, which it names"):
        load_records(address)


def test_an_archive_is_opened_once_for_all_its_pictures(archive, openings, pictures):
    files, media, _ = archive
    assert files.problems(media, in_full=True) == {}
    files.fetch_ahead(media)
    wanted = [open_image(pictures[number % 3]).tobytes() for number in range(12)]
    assert shown_by(files, media) == wanted
    assert len(openings) == len(set(openings)) <= 2, "one, and one that lies in another"


def test_threads_do_not_disturb_each_other_in_an_archive(archive, pictures):
    files, media, _ = archive
    wanted = [open_image(pictures[number % 3]).tobytes() for number in range(12)] * 8
    with ThreadPoolExecutor(8) as pool:
        assert [one.tobytes() for one in pool.map(files.read, media * 8)] == wanted


def test_an_archive_that_another_takes_the_place_of_is_opened_again(archive, openings, pictures):
    files, media, write = archive
    shown_by(files, media)
    write({"images/0/0.png": pictures[1].read_bytes(), "images/other.png": b""})
    assert shown_by(files, media[:1]) == [open_image(pictures[1]).tobytes()]
    assert max(Counter(openings).values()) == 2


def test_a_process_opens_archives_for_itself(archive, openings):
    files, media, _ = archive
    wanted = shown_by(files, media)
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        found, opened = pool.submit(shown_and_opened, files, media).result()
    assert found == wanted and 1 <= opened <= 2, "not what its parent reads from, at a place that both move"


@pytest.mark.parametrize("name", ["missing.zip", "missing.tar", "bad.zip", "bad.tar", "bad.tar.gz", "cut.tar.xz"])
def test_an_archive_that_is_missing_or_damaged_is_named(name, tmp_path):
    (tmp_path / "bad.zip").write_text("no")
    (tmp_path / "bad.tar").write_text("no, but longer")
    (tmp_path / "bad.tar.gz").write_bytes(gzip.compress(b"a" * 2**16)[:-9])
    (tmp_path / "cut.tar.xz").write_bytes(lzma.compress(b"a" * 2**16)[:50])
    url = f"{'zip' if name.endswith('zip') else 'tar'}://images::file://{tmp_path / name}"
    for ask in (lambda: MediaFiles(url), lambda: load_records(url)):
        with pytest.raises(UserError, match=f"{re.escape(url)} cannot be opened"):
            ask()


@pytest.mark.parametrize("harm", ["a byte", "a password", "packed by nobody"])
def test_a_picture_that_an_archive_cannot_give_is_named(harm, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv(fetched.LIMIT, "0")
    content = pictures[0].read_bytes()
    write_archive(tmp_path / "all.zip", {"images/0.png": content})
    whole = bytearray((tmp_path / "all.zip").read_bytes())
    central = whole.rindex(b"PK\x01\x02")
    for place, byte in {
        "a byte": [(whole.index(content) + len(content) // 2, 0x5A)],
        "a password": [(6, 1), (central + 8, 1)],
        "packed by nobody": [(8, 77), (central + 10, 77)],
    }[harm]:
        whole[place] = byte ^ (whole[place] if harm == "a byte" else 0)
    (tmp_path / "all.zip").write_bytes(whole)
    files = MediaFiles(f"zip://images::file://{tmp_path}/all.zip")
    medium = Medium("image", "0.png")
    with pytest.raises(BadFileError, match=r"all\.zip/0\.png: the file cannot be read"):
        files.read(medium)
    assert "cannot be read" in files.problems([medium], in_full=True)[medium]


def shown_and_opened(files: MediaFiles, media: list[Medium]) -> tuple[list[bytes], int]:
    before = file_systems._held.cache_info().misses
    return shown_by(files, media), file_systems._held.cache_info().misses - before


def test_a_data_file_that_changes_is_copied_again(bucket):
    assert len(load_records(f"{ROOT}/data/b.json")) == 1
    before = copied(f"{ROOT}/data/b.json")
    bucket.pipe("/bucket/data/b.json", bucket.cat_file("/bucket/data/a.json"))
    assert copied(f"{ROOT}/data/b.json") != before
    assert len(load_records(f"{ROOT}/data/b.json")) == 2


def test_pictures_are_fetched_when_they_are_shown(bucket, pictures):
    files, shown = MediaFiles(f"{ROOT}/images/"), Medium("image", "cats/1.png")
    expected = np.asarray(Image.open(pictures[1]).convert("RGB"))
    assert (np.asarray(files.read(shown)) == expected).all()
    assert files.size(shown) == Image.open(pictures[1]).size
    assert files.problem(shown) is None and files.problem(shown, in_full=True) is None
    missing = "memory://bucket/images/cats/9.png"
    assert files.problem(Medium("image", "cats/9.png")) == f"{missing}: no such image file"
    with pytest.raises(BadFileError, match=missing):
        files.read(Medium("image", "cats/9.png"))
    assert files.problem(Medium("image", "/nowhere/x.png")) == "/nowhere/x.png: no such image file"
    assert "videos are read from this machine's disks" in str(files.problem(Medium("video", "x.mp4")))
    bucket.pipe("/bucket/images/torn.png", b"torn")
    report = check([f"{ROOT}/data/a.json"], files)
    assert not report.problems
    assert "torn.png: not an image" in str(files.problem(Medium("image", "torn.png"), in_full=True))
    confined = MediaFiles(f"{ROOT}/images", confined=True)
    assert "--confine_media forbids" in str(confined.problem(Medium("image", "../data/a.json")))
    assert "--confine_media forbids" in str(confined.problem(Medium("image", "/etc/hosts")))


def test_the_state_of_a_picture_is_that_of_its_content(bucket, monkeypatch):
    media = [Medium("image", f"cats/{number}.png") for number in (0, 1, 9)]
    first = states_of(media, MediaFiles(f"{ROOT}/images"))
    assert len(set(first.tolist())) == 3 and first[2] == 0
    assert (states_of(media, MediaFiles(f"{ROOT}/images")) == first).all()
    bucket.pipe("/bucket/images/cats/0.png", b"another")
    again = states_of(media, MediaFiles(f"{ROOT}/images"))
    assert again[0] != first[0] and (again[1:] == first[1:]).all()
    # A server that lists nothing is asked for each file.
    with monkeypatch.context() as patched:
        patched.setattr(type(bucket), "ls", lambda *args, **kwargs: [])
        folder = RemoteFolder(f"{ROOT}/images")
        assert folder.state("cats/0.png") and folder.state("cats/9.png") is None


def test_what_is_not_there_or_cannot_be_opened_is_told_before_training(bucket, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match="(?s)s3://here/x.json: such addresses need s3fs: pip install s3fs"):
        load_records("s3://here/x.json")
    with pytest.raises(UserError, match="s3://here/images: such addresses need s3fs"):
        MediaFiles("s3://here/images")
    with pytest.raises(UserError, match="nosuch://x: Protocol not known: nosuch"):
        RemoteFolder("nosuch://x")
    with pytest.raises(
        DataError, match="(?s)x.json: no such data file.*data is a folder, but no data set .*: name the files in it"
    ):
        load_records([f"{ROOT}/x.json", f"{ROOT}/data"])
    with pytest.raises(DataError, match="no data file fits this pattern"):
        addresses(f"{ROOT}/*.parquet")


@pytest.mark.timeout(60)
def test_what_is_no_file_is_not_opened_and_links_are_followed(tmp_path, data_file, make_record, pictures):
    """In a folder that `file://` names: who opened the pipe would wait for ever."""
    folder = tmp_path / "folder"
    (folder / "sub.png").mkdir(parents=True)
    os.mkfifo(folder / "pipe.png")
    shutil.copy(pictures[0], folder / "there.png")
    for target in ("there.png", "pipe.png", "gone.png"):
        os.symlink(folder / target, folder / f"to_{target}")
    names = ["there.png", "to_there.png", "sub.png", "pipe.png", "to_pipe.png", "to_gone.png"]
    path = data_file([make_record(name, "<image>", "a", image=name) for name in names])
    for in_full in (False, True):
        found = check([str(path)], MediaFiles(folder.as_uri()), in_full=in_full).problems
        assert [problem.text.partition(" of ")[0] for problem in found] == [f"Record {name}" for name in names[2:]]
        assert all(problem.text.endswith("no such image file") for problem in found)
    with pytest.raises(DataError, match="is a pipe or a device"):
        copied((folder / "pipe.png").as_uri())


def test_the_state_of_a_link_is_that_of_what_it_leads_to(tmp_path):
    (tmp_path / "there.png").write_bytes(b"one")
    os.symlink(tmp_path / "there.png", tmp_path / "link.png")
    before = RemoteFolder(tmp_path.as_uri()).state("link.png")
    (tmp_path / "there.png").write_bytes(b"two")
    os.utime(tmp_path / "there.png", (1, 1))
    assert RemoteFolder(tmp_path.as_uri()).state("link.png") != before


def test_what_is_an_address():
    assert all(map(is_remote, ("s3://b/x", "hf://datasets/a/b", "http://h/x", "zip://a.json::s3://b/x.zip")))
    assert not any(map(is_remote, ("/s3/x", "x.json", "data:image/png;base64,AA", "C:/x", Path("a/b"))))


def test_a_stage_trains_on_them_as_on_local_data(flags_for, parts, bucket, tmp_path):
    for picture in (parts / "images").iterdir():
        bucket.pipe(f"/bucket/parts/{picture.name}", picture.read_bytes())
    bucket.pipe("/bucket/parts/captions.json", (parts / "captions.json").read_bytes())
    flags = flags_for(tmp_path, "pretrain") | {"save_strategy": "no", "skip_dry_save": True, "max_steps": 2}
    elsewhere = {"data_path": f"{ROOT}/parts/captions.json", "image_folder": f"{ROOT}/parts"}
    local = train_here(flags | {"output_dir": tmp_path / "local"})
    assert losses_of(train_here(flags | elsewhere)) == losses_of(local)
    assert read_json(local / "trainer_state.json")["global_step"] == 2
