# SPDX-License-Identifier: Apache-2.0
"""Folders that `datasets.save_to_disk` has written: Arrow files, and what names them.

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
    try:
        split, described = "", []
        if (splits := _described(SPLITS, read)) is not None:
            names = splits["splits"]
            if len(names) != 1:
                raise DataError(f"{folder} holds the splits {', '.join(names)}: name the folder of one of them")
            split, described = f"{names[0]}/", [SPLITS]
        if (state := _described(split + STATE, read)) is None:
            raise DataError(
                f"{folder} is a folder, but no data set that `datasets` has saved to disk: name the files in it, as "
                f"{str(folder).rstrip('/')}/*.parquet"
            )
        return [*described, split + STATE], [split + file["filename"] for file in state["_data_files"]]
    except DataError:  # a ValueError, too
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is no data set that can be read: {error}") from error


def _described(name: str, read: Callable[[str], bytes]) -> Any:
    """What a file says; None where there is none."""
    try:
        return json.loads(read(name))
    except FileNotFoundError:
        return None
