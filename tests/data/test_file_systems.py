# SPDX-License-Identifier: Apache-2.0
"""What is fetched of an archive that lies behind a server: about what is shown of it, and its state now and then."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from moellava.data import file_systems
from moellava.data.remote import RemoteFolder
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
