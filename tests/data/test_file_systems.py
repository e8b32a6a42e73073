# SPDX-License-Identifier: Apache-2.0
"""What is fetched of an archive that lies behind a server: about what is shown of it, and its state now and then."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec import AbstractFileSystem

from moellava.data import file_systems
from moellava.data.cache import PLACE
from moellava.data.media import MediaFiles
from moellava.data.records import Medium, load_records
from moellava.data.remote import RemoteFolder, fetch_together
from moellava.errors import BadFileError, UserError
from tests.data.test_remote import write_archive
from tests.data.test_shard_parts import Handler, serving

SIZE = 60_000
"""Bytes of a picture."""


def contents(number: int, seed: int = 0) -> dict[str, bytes]:
    """So many pictures by name, which nothing makes smaller."""
    draw = random.Random(seed)
    return {f"images/{one}.jpg": draw.randbytes(SIZE) for one in range(number)}


def read_all(folder: RemoteFolder, wanted: dict[str, bytes]) -> None:
    """Reads every picture, in random order."""
    for name in random.Random(1).sample(list(wanted), len(wanted)):
        assert (folder / name.removeprefix("images/")).fetch() == wanted[name]


@pytest.fixture(params=["zip", "tar"])
def archive(request, tmp_path) -> Iterator[tuple[Path, str]]:
    """A file to be written, and the address of its pictures behind a server."""
    with serving(tmp_path) as address:
        yield tmp_path / f"all.{request.param}", f"{request.param}://images::{address}/all.{request.param}"


def test_of_a_large_archive_little_more_is_fetched_than_is_shown(archive):
    path, address = archive
    pictures = contents(100)
    write_archive(path, pictures)
    assert path.stat().st_size > file_systems.WHOLE
    folder = RemoteFolder(address)
    opening = Handler.sent
    read_all(folder, pictures)
    assert Handler.sent - opening <= len(pictures) * (SIZE + 2 * file_systems.AHEAD)


@pytest.mark.parametrize("gives_parts", [True, False])
def test_a_small_archive_is_fetched_once(archive, gives_parts):
    path, address = archive
    pictures = contents(30)
    write_archive(path, pictures)
    folder = RemoteFolder(address)
    opening = Handler.sent
    Handler.gives_parts = gives_parts
    read_all(folder, pictures)
    assert Handler.sent - opening <= path.stat().st_size


def test_the_state_of_an_archive_is_asked_for_now_and_then(archive, monkeypatch):
    path, address = archive
    pictures, others = contents(30), contents(30, seed=1)
    write_archive(path, pictures)
    monkeypatch.setattr(file_systems, "BELIEVED", 3600.0)
    folder = RemoteFolder(address)
    (folder / "0.jpg").fetch()
    asked = Handler.heads
    read_all(folder, pictures)
    assert Handler.heads == asked
    write_archive(path, others | {"images/more.jpg": b"more" * 10_000})
    monkeypatch.setattr(file_systems, "BELIEVED", 1e-6)
    read_all(folder, others)


class NobodyAskedError(Exception):
    """As of a package that asks for a name and a password."""


class Guarded(AbstractFileSystem):
    """A store that answers nobody, in an error of its own."""

    protocol = "guarded"
    cachable = False

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        raise NobodyAskedError("unable to locate credentials")

    ls = find = _open = info


class Silent(Guarded):
    """A server that is not there, as `fsspec` tells it of HTTP."""

    protocol = "silent"

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        try:
            raise ConnectionRefusedError("Connect call failed: unable to locate credentials")
        except OSError as error:
            raise FileNotFoundError(path) from error

    ls = find = _open = info


@pytest.mark.parametrize("store", [Guarded, Silent])
@pytest.mark.parametrize("name", ["x.json", "*.json", "x.parquet", "x.tar", "mixture.yaml", "zip://x.json::"])
def test_data_of_a_store_that_does_not_answer_say_so(store, name, tmp_path, monkeypatch):
    fsspec.register_implementation(store.protocol, store, clobber=True)
    monkeypatch.setenv(PLACE, str(tmp_path))
    address = f"{store.protocol}://bucket/x"
    url = f"{name}{address}" if "::" in name else f"{address}/{name}"
    with pytest.raises(UserError, match=f"(?s){re.escape(url)}.*unable to locate credentials"):
        load_records(url)


@pytest.mark.parametrize("store", [Guarded, Silent])
@pytest.mark.parametrize("archive", ["", "zip://images::", "tar://images::"])
def test_pictures_of_a_store_that_does_not_answer_say_so(store, archive, tmp_path, monkeypatch):
    fsspec.register_implementation(store.protocol, store, clobber=True)
    monkeypatch.setenv(PLACE, str(tmp_path))
    url = f"{archive}{store.protocol}://bucket/x"
    with pytest.raises(UserError, match=f"(?s){re.escape(url)}.*unable to locate credentials"):
        MediaFiles(url).problems([Medium("image", "a.png")])


def test_pictures_are_left_to_their_readers_where_nobody_answers_any_more(tmp_path, monkeypatch):
    """In the middle of a run: each reader tells its record."""
    fsspec.register_implementation("silent", Silent, clobber=True)
    monkeypatch.setenv(PLACE, str(tmp_path))
    files, shown = MediaFiles("silent://bucket/x"), Medium("image", "a.png")
    files.fetch_ahead([shown, shown])
    with pytest.raises(BadFileError, match="silent://bucket/x/a.png.*unable to locate credentials"):
        files.read(shown)


def test_a_server_without_lists_is_asked_once_for_the_state_of_what_is_fetched_ahead(tmp_path, monkeypatch):
    monkeypatch.setenv(PLACE, str(tmp_path / "cache"))
    (tmp_path / "0.jpg").write_bytes(b"a picture")
    with serving(tmp_path) as address:
        folder = RemoteFolder(address)
        folder.state("0.jpg")
        asked = Handler.heads
        fetch_together([folder / "0.jpg"])
        assert Handler.heads == asked + 2, "for its state, and for its size when it is opened"
