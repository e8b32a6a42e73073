# SPDX-License-Identifier: Apache-2.0
"""Data files that are cut short, damaged or joined: whatever is left, no record goes missing without a word."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from moellava.data.formats import FORMATS, rows_of
from moellava.data.json_lists import Broken
from moellava.data.unpacking import UNPACK
from moellava.errors import DataError
from tests.tiny import record

ROWS = [record(str(number), "<image>\nq", f"answer {number}") for number in range(3)]


def tar_of(form: int = tarfile.PAX_FORMAT) -> bytes:
    """A shard whose records have a picture each."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=form) as tar:
        for row in ROWS:
            for ending, content in (("json", json.dumps(row).encode()), ("png", b"\x89PNG" + bytes(700))):
                member = tarfile.TarInfo(f"{row['id']}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return whole.getvalue()


def arrow(new: Callable[..., Any] = ipc.new_file) -> bytes:
    table, whole = pa.Table.from_pylist(ROWS), io.BytesIO()
    with new(whole, table.schema) as writer:
        writer.write_table(table, 1)
    return whole.getvalue()


def parquet() -> bytes:
    whole = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), whole, row_group_size=1)
    return whole.getvalue()


LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS).encode()

WHOLE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "pax.tar": ("a WebDataset shard", tar_of),
    "gnu.tar": ("a WebDataset shard", lambda: tar_of(tarfile.GNU_FORMAT)),
    "a.tar.gz": ("a WebDataset shard", lambda: gzip.compress(tar_of())),
    "a.tar.bz2": ("a WebDataset shard", lambda: bz2.compress(tar_of())),
    "a.tar.xz": ("a WebDataset shard", lambda: lzma.compress(tar_of())),
    "a.tar.lzma": ("a WebDataset shard", lambda: lzma.compress(tar_of(), lzma.FORMAT_ALONE)),
    "a.arrow": ("Arrow", arrow),
    "stream.arrow": ("Arrow", lambda: arrow(ipc.new_stream)),
    "a.parquet": ("Parquet", parquet),
    "a.json": ("JSON or JSON Lines", lambda: json.dumps(ROWS).encode()),
    "a.jsonl.gz": ("JSON or JSON Lines", lambda: gzip.compress(LINES)),
    "a.jsonl.bz2": ("JSON or JSON Lines", lambda: bz2.compress(LINES)),
    "a.jsonl.xz": ("JSON or JSON Lines", lambda: lzma.compress(LINES)),
}
"""Name of a data file -> its format, and what makes its content. Not here: a cut of JSON Lines at the end of a line,
which nobody can see."""


def read(path: Path, content: bytes) -> list[Any]:
    """The records of a data file with this content. Raises DataError."""
    path.write_bytes(content)
    return list(rows_of(path))


def test_every_format_of_one_file_and_every_packing_is_here():
    assert {name for name, _ in WHOLE.values()} == {entry.name for entry in FORMATS[1:]}
    contents = [make() for _, make in WHOLE.values()]
    assert all(any(content.startswith(magic) for content in contents) for magic in UNPACK)


@pytest.mark.parametrize("name", WHOLE)
def test_a_cut_loses_no_record_without_a_word(name, tmp_path):
    whole = WHOLE[name][1]()
    assert len(read(tmp_path / name, whole)) == len(ROWS)
    refused = 0
    for length in sorted({*range(1, len(whole), 1 + len(whole) // 300), *range(512, len(whole), 512)}):
        try:
            found = read(tmp_path / name, whole[:length])
        except DataError as error:
            refused += name in str(error)
        else:
            assert len(found) == len(ROWS) or any(isinstance(one, Broken) for one in found), length
    assert refused > 10


def test_an_arrow_stream_cut_between_batches_is_not_whole(tmp_path):
    whole = arrow(ipc.new_stream)
    reader = ipc.open_stream(file := pa.BufferReader(whole))
    for _ in reader:
        with pytest.raises(DataError, match="ends without Arrow's end of a stream"):
            read(tmp_path / "stream.arrow", whole[: file.tell()])


def test_two_arrow_streams_in_one_file_are_not_half_read(tmp_path):
    with pytest.raises(DataError, match="stream.arrow: more follows its end, as where two Arrow streams were joined"):
        read(tmp_path / "stream.arrow", arrow(ipc.new_stream) * 2)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_damaged_header_is_not_the_end_of_a_shard(form, tmp_path):
    whole = tar_of(form)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        headers = [member.offset for member in tar]
    for place in headers[1:]:
        damaged = whole[:place] + b"\xff" + whole[place + 1 :]
        with pytest.raises(DataError, match=f"a.tar is no tar file that can be read: .*damaged at byte {place}"):
            read(tmp_path / "a.tar", damaged)


def test_a_packed_shard_with_a_damaged_byte_is_refused(tmp_path):
    whole = bytearray(gzip.compress(tar_of()))
    whole[-6] ^= 1  # of its checksum
    with pytest.raises(DataError, match="CRC"):
        read(tmp_path / "a.tar.gz", bytes(whole))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_two_shards_in_one_file_are_not_half_read(pack, tmp_path):
    with pytest.raises(DataError, match="more follows its end, as where two tar files were joined"):
        read(tmp_path / "a.tar", pack(tar_of()) * 2)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_is_no_picture_that_a_record_loses(kind, tmp_path):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        content = json.dumps(ROWS[0]).encode()
        member = tarfile.TarInfo("0.json")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
        member = tarfile.TarInfo("0.png")
        member.type, member.linkname = kind, "elsewhere.png"
        tar.addfile(member)
    with pytest.raises(DataError, match="0.png in it is a link: pack what it leads to"):
        read(tmp_path / "a.tar", whole.getvalue())
