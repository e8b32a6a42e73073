# SPDX-License-Identifier: Apache-2.0
"""Shards that lie elsewhere: in memory, and behind an HTTP server that gives parts of files, or does not."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from moellava.data import fetched, findings, indexing, remote
from moellava.data.check import check
from moellava.data.media import MediaFiles
from moellava.data.records import Records, load_records, media_of
from moellava.data.rewrite import rewrite
from moellava.data.shard_parts import ShardPart
from moellava.data.shown import Shown
from moellava.errors import BadFileError, DataError
from tests.processes import Flags, losses_of, train_here

SHARDS = ("a.tar", "a.parquet")

ROWS_OF_A_GROUP = 2


def turns(answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": answer}]


def write_shards(folder: Path, pictures: list[Path], rows: list[dict[str, Any]] | None = None) -> Path:
    """The same records as a tar file and as Parquet: one an image, with its own words where no rows are given."""
    rows = rows or [{"id": f"r{n}", "conversations": turns(f"a shape {n}")} for n in range(len(pictures))]
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, (picture, row) in enumerate(zip(pictures, rows, strict=True)):
            for ending, content in (("json", json.dumps(row).encode()), ("png", picture.read_bytes())):
                member = tarfile.TarInfo(f"{number:06d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    images = [{"bytes": picture.read_bytes(), "path": picture.name} for picture in pictures]
    table = pyarrow.Table.from_pylist([row | {"image": image} for row, image in zip(rows, images, strict=True)])
    parquet.write_table(table, folder / "a.parquet", row_group_size=ROWS_OF_A_GROUP)
    return folder


@pytest.fixture
def shards(pictures, tmp_path, empty_cache, monkeypatch) -> Path:
    """Both shards of five pictures, and an empty cache in which every index is kept."""
    monkeypatch.setattr(indexing, "KEPT_FROM", 1)
    monkeypatch.setattr(findings, "KEPT_FROM", 1)
    return write_shards(tmp_path / "shards", [pictures[number] for number in (0, 1, 2, 0, 1)])


@pytest.fixture
def bucket(shards) -> Iterator[AbstractFileSystem]:
    """A store with both of them."""
    store = fsspec.filesystem("memory")
    for name in SHARDS:
        store.pipe(f"/bucket/{name}", (shards / name).read_bytes())
    yield store
    store.rm("/bucket", recursive=True)


def shown(records: Records, number: int) -> np.ndarray:
    (medium,) = media_of(records[number])
    return np.asarray(MediaFiles().read(medium))


def same_as_local(records: Records, local: Records) -> None:
    """That records of a shard elsewhere are those of the shard here, and show the same: a run may go on with either."""
    assert records.content() == local.content()
    assert len(records) == len(local) == 5
    for number, (one, other) in enumerate(zip(records, local, strict=True)):
        assert one | {"image": None} == other | {"image": None}
        assert (shown(records, number) == shown(local, number)).all()
    assert (Shown(records).embedded() == Shown(local).embedded()).all(), "a picture is known by its content"


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_is_read_by_its_pictures_and_not_copied(name, bucket, shards, empty_cache, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, logger="moellava"):
        records = load_records(f"memory://bucket/{name}")
    assert f"bucket/{name} is read once; its pictures are fetched when they are shown" in caplog.text
    same_as_local(records, load_records(shards / name))
    assert not (empty_cache / "copies").exists()
    assert sum(file.stat().st_size for file in (empty_cache / "indexes").rglob("*.arrow")) > 0
    assert b"PNG" not in records.chosen[0].held.content(0) and b"base64" not in records.chosen[0].held.content(0)
    # Once they are kept, nothing is asked for again but whether the shard is the same.
    monkeypatch.setattr(type(bucket), "cat_file", None)
    same_as_local(load_records(f"memory://bucket/{name}"), load_records(shards / name))


def test_files_that_are_no_shards_or_were_copied_before_are_copied(bucket, shards, empty_cache, monkeypatch):
    from moellava.data.remote import copied

    copied("memory://bucket/a.tar")
    assert "/copies/" in load_records("memory://bucket/a.tar")[0]["image"][0]
    bucket.pipe("/bucket/rows.jsonl", b"".join(json.dumps({"conversations": turns("x")[1:]}).encode() for _ in "ab"))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(shards / "a.parquet", "x.json")
    bucket.pipe("/bucket/b.tar.gz", packed.getvalue())
    with pytest.raises(DataError):
        load_records("memory://bucket/b.tar.gz")
    assert len(list((empty_cache / "copies").iterdir())) == 2


@pytest.mark.parametrize("name", SHARDS)
def test_what_is_damaged_or_another_is_told(name, bucket, shards, monkeypatch):
    url = f"memory://bucket/{name}"
    records = load_records(url)
    assert not check([url], MediaFiles(), in_full=True).problems
    (medium,) = media_of(records[1])
    monkeypatch.setenv(fetched.LIMIT, "0")
    damaged = (shards / name).read_bytes().replace(b"IDAT", b"IDOT")
    bucket.pipe(f"/bucket/{name}", damaged)
    with pytest.raises(BadFileError, match=f"bucket/{name} .*another one than when it was read"):
        MediaFiles().read(medium)
    assert check([url], MediaFiles(), in_full=True).problems, "it is read anew, and its pictures are broken"
    assert not check([url], MediaFiles(), in_full=False).problems
    bucket.pipe(f"/bucket/{name}", (shards / name).read_bytes()[:1600])
    with pytest.raises(DataError, match=f"bucket/{name} is no .* file that can be read"):
        load_records(url)


def test_a_record_may_not_name_a_part_of_a_shard(tmp_path, bucket):
    path = load_records("memory://bucket/a.tar")[0]["image"]
    (tmp_path / "a.json").write_text(json.dumps([{"image": path, "conversations": turns("x")}]))
    with pytest.raises(DataError, match="names a part of a shard, as no record may"):
        load_records(tmp_path / "a.json")


def test_a_micro_batch_is_fetched_together(bucket, monkeypatch):
    asked: list[int] = []
    read = remote._side_by_side
    monkeypatch.setattr(remote, "_side_by_side", lambda spans: asked.append(len(spans)) or read(spans))
    records, files = load_records("memory://bucket/a.tar"), MediaFiles()
    files.fetch_ahead(medium for number in range(5) for medium in media_of(records[number]))
    assert asked == [3]
    assert fetched.is_kept(ShardPart(records[2]["image"][0]).state or 0)
    files.fetch_ahead(media_of(records[2]))
    assert asked == [3], "of three pictures, each once"


class Waiting(AsyncFileSystem):
    """A store that serves when five ask at once."""

    protocol, cachable = "waiting", False
    asked: list[tuple[str, int | None, int | None]] = []

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self.asked.append((path, start, end))
        while len(self.asked) < 5:
            await asyncio.sleep(0.01)
        if path.endswith("4"):
            raise FileNotFoundError(path)
        return b"0123456789"[start:end]


class Piece(remote.Distant):
    """Bytes of a file there."""

    def __init__(self, number: int, store: Waiting):
        self.state, self._store = number + 1, store

    def span(self) -> remote.Span:
        number = int(self.state or 0) - 1
        return remote.Span(self._store, f"/{number}", *((None, None) if number == 0 else (number, number + 2)))


def test_a_store_that_can_is_asked_for_all_at_once(empty_cache):
    pieces = [Piece(number, store) for store in [Waiting()] for number in range(5)]
    remote.fetch_together(pieces)
    assert [fetched.kept_content(number) for number in range(1, 6)] == [b"0123456789", b"12", b"23", b"34", None]


@pytest.mark.parametrize("name", SHARDS)
def test_other_formats_are_written_of_them(name, bucket, shards, tmp_path):
    for folder in (None, tmp_path / "images"):
        there, here = tmp_path / f"there {folder is None}.jsonl", tmp_path / f"here {folder is None}.jsonl"
        rewrite([f"memory://bucket/{name}"], there, folder)
        rewrite([str(shards / name)], here, folder)
        assert there.read_text() == here.read_text()


class Handler(SimpleHTTPRequestHandler):
    """Gives files, and parts of them where `gives_parts`; counts the bytes of parts, and how often it is asked about a
    file."""

    gives_parts, sent, heads = True, 0, 0

    def send_head(self) -> Any:
        type(self).heads += self.command == "HEAD"
        part = self.headers.get("Range")
        if part is None or not self.gives_parts:
            return super().send_head()
        content = Path(self.translate_path(self.path)).read_bytes()
        begin, _, end = part.removeprefix("bytes=").partition("-")
        content = content[int(begin) : int(end) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        type(self).sent += len(content)
        return io.BytesIO(content)

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


class Ranged(AbstractFileSystem):
    """The least that `fsspec` wants for HTTP; its own needs a package more."""

    protocol = "ranged"
    cachable = False

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        with urlopen(Request(f"http://{self._strip_protocol(path)}", method="HEAD")) as answer:
            size, changed = int(answer.headers["Content-Length"]), answer.headers["Last-Modified"]
        return {"name": path, "size": size, "type": "file", "Last-Modified": changed}

    def _open(self, path: str, mode: str = "rb", block_size: Any = None, **kwargs: Any) -> Any:
        return RangedFile(self, path, mode, block_size, **kwargs)


class RangedFile(AbstractBufferedFile):
    """A file there."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        asked = Request(f"http://{self.path}", headers={"Range": f"bytes={start}-{end - 1}"})
        with urlopen(asked) as answer:
            if answer.status != 206 and start > 0:
                raise ValueError("no parts of files")
            return answer.read()[: end - start]


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a folder behind a server of this machine."""
    fsspec.register_implementation("ranged", Ranged, clobber=True)
    Handler.gives_parts, Handler.sent, Handler.heads = True, 0, 0
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield f"ranged://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()
            thread.join()


@pytest.fixture
def server(shards) -> Iterator[str]:
    """The address of the shards."""
    with serving(shards) as address:
        yield address


def test_parts_are_asked_of_a_server(server, shards):
    records = load_records(f"{server}/a.tar")
    Handler.sent = 0
    (medium,) = media_of(records[3])
    MediaFiles().read(medium)
    assert Handler.sent == ShardPart(medium.path).place.size, "a picture, and nothing else"
    for name in SHARDS:
        same_as_local(load_records(f"{server}/{name}"), load_records(shards / name))


class LostError(Exception):
    """As of a package that knows connections."""


@pytest.mark.parametrize("error", [ConnectionResetError, LostError])
@pytest.mark.parametrize("name", SHARDS)
def test_a_connection_that_breaks_is_told_and_the_next_start_reads(name, error, server, shards, monkeypatch):
    """In the middle of a shard, while its index is made: nothing of that is kept."""

    class Lost(RangedFile):
        def _fetch_range(self, start: int, end: int) -> bytes:
            if len(Lost.asked) == Lost.last:
                raise error("the connection was lost")
            Lost.asked.append(start)
            return super()._fetch_range(start, end)

    monkeypatch.setattr(remote, "BLOCK", 1)
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules[__name__], "RangedFile", Lost)
        for last in [0, 1, 2, *range(3, 400, 25)]:
            Lost.asked, Lost.last = [], last
            try:
                load_records(f"{server}/{name}")
                break
            except DataError as told:
                assert re.search(f"{server}/{name}.*the connection was lost", str(told)), last
        assert last > 2, "the head is asked for first, and then the shard"
    same_as_local(load_records(f"{server}/{name}"), load_records(shards / name))


@pytest.mark.parametrize("name", SHARDS)
def test_without_parts_the_whole_file_is_copied_and_it_is_said(name, server, shards, empty_cache, caplog):
    Handler.gives_parts = False
    with caplog.at_level(logging.INFO, logger="moellava"):
        records = load_records(f"{server}/{name}")
    assert f"{name} is copied as a whole, for the other side gives no parts of files" in caplog.text
    same_as_local(records, load_records(shards / name))
    assert len(list((empty_cache / "copies").iterdir())) == 1


def test_a_run_trains_and_goes_on_as_on_a_local_shard(flags_for, begin_at, parts, tmp_path, empty_cache, caplog):
    rows = [row for row in json.loads((parts / "captions.json").read_text()) if isinstance(row.get("image"), str)]
    pictures = [parts / "images" / row.pop("image") for row in rows]
    folder = write_shards(tmp_path / "shards", pictures, rows)
    store = fsspec.filesystem("memory")
    store.pipe("/run/a.tar", (folder / "a.tar").read_bytes())
    flags: Flags = flags_for(tmp_path, "pretrain") | {
        "skip_dry_save": True,
        "max_steps": 4,
        "save_steps": 2,
        "save_total_limit": 9,
    }
    local = train_here(flags | {"output_dir": tmp_path / "local", "data_path": folder / "a.tar"})
    flags |= {"data_path": "memory://run/a.tar"}
    whole = train_here(flags | {"output_dir": tmp_path / "whole"})
    assert losses_of(whole) == losses_of(local)
    rest = train_here(flags | {"output_dir": begin_at(2, local, tmp_path / "rest")})
    assert "Going on from" in caplog.text
    assert losses_of(rest) == losses_of(whole)
    store.rm("/run", recursive=True)
