# SPDX-License-Identifier: Apache-2.0
"""Data files of any format -> one file as LLaVA has it: JSON Lines, and embedded images as files of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moellava.constants import ROLES
from moellava.data.embedded import content_of, file_name, is_embedded
from moellava.data.record_shape import with_paths
from moellava.data.records import load_records
from moellava.data.shard_parts import with_pictures
from moellava.data.skip_lists import SkipList
from moellava.errors import DataError, UserError
from moellava.files import file_problem, refuse_address, require_output, written

OUTPUT, IMAGE_FOLDER = "--output", "--image-folder"


def rewrite(
    paths: Sequence[str],
    output: str | Path,
    image_folder: str | Path | None = None,
    skip: SkipList | None = None,
    roles: tuple[str, str] = ROLES,
) -> dict[str, int]:
    """Writes the records of data files as LLaVA's JSON Lines. The file appears whole or not at all.

    Args:
        paths: data files.
        output: the file, which must not exist.
        image_folder: where images and videos that records hold themselves are written to, each under a name of its
            content; None: they stay data URIs.
        skip: records to leave out.
        roles: what the files call the human and the model, beside the usual names.

    Returns:
        Counts: records, left out by the skip list, and files written.

    Raises:
        DataError: with one line for every problem of every file; nothing is written.
        UserError: output or folder cannot be written to.
    """
    target = require_output(output, OUTPUT)
    if file_problem(target) is None:
        raise UserError(f"{OUTPUT} {output} exists: name another file, or remove it")
    folder = None if image_folder is None else _folder(image_folder)
    records = load_records(paths, skip, roles)
    files: set[str] = set()
    with written(target) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for index in range(len(records)):
            record = _whole(records[index], folder, files, records.name(index))
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    return {"records": len(records), "skip_listed": records.skipped, "files_written": len(files)}


def _folder(name: str | Path) -> Path:
    refuse_address(name, IMAGE_FOLDER)
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{IMAGE_FOLDER} {name} cannot be made: {error.strerror}") from error
    return folder


def _whole(record: dict[str, Any], folder: Path | None, files: set[str], name: str) -> dict[str, Any]:
    """A record that names no shard: what it or its shard holds is a file in a folder, or without one a data URI. Raises
    DataError where that is broken."""
    try:
        whole = with_pictures(record)
        return whole if folder is None else with_paths(whole, lambda path: _as_file(path, folder, files))
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def _as_file(path: str, folder: Path, files: set[str]) -> str:
    """The name of a file with what a data URI holds; a path as it is."""
    if not is_embedded(path):
        return path
    content = content_of(path)
    name = file_name(content)
    if name not in files and not (folder / name).exists():
        with written(folder / name) as temporary:
            temporary.write_bytes(content)
    files.add(name)
    return name
