# SPDX-License-Identifier: Apache-2.0
"""Whether what the flags of data name is there: asked before anything loads, for weights may take minutes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moellava.data.formats import missing
from moellava.data.mixtures import listing_of
from moellava.data.remote import is_remote
from moellava.data.skip_lists import read_skip_list
from moellava.errors import DataError
from moellava.train.arguments import DataArguments

FOLDERS = ("image_folder", "video_folder")
"""Flags that name a folder that is read."""


def require_present(data: DataArguments) -> None:
    """Looks for data files, those of mixtures among them, for folders and the skip list. Records are not read, and
    what lies elsewhere is not asked for.

    Raises:
        DataError: with one line for each that is not there, or that is a mixture that cannot be read.
        UserError: a skip list that cannot be read; a package that a mixture needs is not installed.
    """
    named = [path for path in (*data.data_path, *data.eval_data_path) if not is_remote(path)]
    problems = [problem for path in named for problem in _problems(path)]
    for flag in FOLDERS:
        folder = getattr(data, flag)
        if folder and not is_remote(folder) and not Path(folder).is_dir():
            problems.append(f"--{flag} {folder}: no such folder")
    if problems:
        raise DataError(problems)
    if data.skip_list:
        read_skip_list(data.skip_list)


def _problems(path: str) -> Iterator[str]:
    """What is wrong with a data file, a pattern or a mixture before records are read."""
    try:
        parts = listing_of(path).parts
    except DataError as error:
        yield from error.problems
        return
    for file in (file for part in parts for file in part.files):
        if not is_remote(file) and (problem := missing(file)):
            yield problem
