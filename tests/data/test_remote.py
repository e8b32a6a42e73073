# SPDX-License-Identifier: Apache-2.0
"""Data that lie elsewhere, in a file system of `fsspec` that needs no network."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from moellava.data import indexing
from moellava.data.cache import PLACE
from moellava.data.check import check
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
    with pytest.raises(DataError, match="(?s)x.json: no such data file.*data is a folder: name the files in it"):
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
