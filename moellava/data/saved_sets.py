# SPDX-License-Identifier: Apache-2.0
"""Folders that `datasets.save_to_disk` has written.

Arrow files, and what names them:

    state.json                      {"_data_files": [{"filename": "data-00000-of-00002.arrow"}, …], …}
    data-00000-of-00002.arrow  …
    dataset_dict.json               {"splits": ["train"]}: each split is such a folder
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from moellava.errors import DataError

STATE = "state.json"
"""What names the files of a data set, or of one split."""

SPLITS = "dataset_dict.json"
"""What names the splits of a data set."""


def files_of_set(folder: object, read: Callable[[str], bytes]) -> tuple[list[str], list[str]]:
    """What describes a data set, and its Arrow files in their order; of one that holds splits, if there is a single
    one. Names within the folder.

    Args:
        folder: as messages call it.
        read: the content of a file in it, by its name. Raises FileNotFoundError where there is none.

    Raises:
        DataError: it is none, or not one that can be read.
    """
    splits = _said(folder, SPLITS, read, lambda said: [str(name) for name in said["splits"]])
    if splits is not None and len(splits) != 1:
        raise DataError(f"{folder} holds the splits {', '.join(splits)}: name the folder of one of them")
    within = f"{splits[0]}/" if splits else ""
    state = within + STATE
    files = _said(folder, state, read, lambda said: [within + file["filename"] for file in said["_data_files"]])
    if files is None:
        raise DataError(
            f"{folder} is a folder, but no data set that `datasets` has saved to disk: name the files in it, as "
            f"{str(folder).rstrip('/')}/*.parquet"
        )
    return [*[SPLITS] * bool(splits), state], files


def _said(
    folder: object, name: str, read: Callable[[str], bytes], names_in: Callable[[Any], list[str]]
) -> list[str] | None:
    """The names in a file that describes a data set; None where there is no such file. Raises DataError where it cannot
    be read."""
    try:
        return names_in(json.loads(read(name)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is no data set that can be read: {error}") from error
