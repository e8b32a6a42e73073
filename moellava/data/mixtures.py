# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT's mixtures: a YAML file that lists data files, and how much of each.

seed: 0                           # of the draws; 0 unless said
datasets:
  - json_path: instruct.json      # any format; relative to the working folder, or else to the mixture's
    sampling_strategy: first:3000 # all (the default), first:N, end:N, random:N; or N%
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moellava.data.formats import rows_of
from moellava.data.record_keys import brief
from moellava.errors import DataError, UserError
from moellava.files import NO_FILE, file_problem
from moellava.log import get_logger

_SHARE = re.compile(r"(?P<which>first|end|random):(?P<count>\d+)(?P<percent>%?)")

_KEYS = {"json_path", "sampling_strategy", "seed"}

logger = get_logger(__name__)


class Entry(NamedTuple):
    """A record as its file has it.

    Attributes:
        file: the data file, as it was given.
        number: of the record in it, from 0.
        value: a JSON value, or a `Broken`.
    """

    file: str
    number: int
    value: Any


def entries(path: str | Path) -> Iterator[Entry]:
    """The records of a data file of any format, or of all files of a mixture.

    Raises:
        DataError: the file cannot be read; also on the way.
        UserError: a package that its format needs is not installed.
    """
    if Path(path).suffix.lower() in (".yaml", ".yml"):
        for part in _parts(Path(path)):
            yield from part
        return
    for number, value in enumerate(rows_of(path)):
        yield Entry(str(path), number, value)


def _parts(path: Path) -> Iterator[Iterator[Entry]]:
    mixture = _read(path)
    listed = mixture.get("datasets") if isinstance(mixture, dict) else None
    if not isinstance(listed, list) or not listed:
        raise DataError(f'{path} has no list "datasets" of data files: {brief(mixture)}')
    _refuse_unknown(path, mixture, {"datasets", "seed"})
    for number, part in enumerate(listed):
        if not isinstance(part, dict) or not isinstance(part.get("json_path"), str):
            raise DataError(f'{path}: entry {number} of "datasets" has no "json_path": {brief(part)}')
        _refuse_unknown(path, part, _KEYS)
        seed = part.get("seed", mixture.get("seed", 0))
        if not isinstance(seed, int):
            raise DataError(f"{path}: the seed is a whole number, not {brief(seed)}")
        yield _sampled(path, _found(path, part["json_path"]), part.get("sampling_strategy"), seed)


def _read(path: Path) -> Any:
    """What a YAML file says. Raises DataError if it cannot be read."""
    try:
        import yaml
    except ImportError as error:
        raise UserError(f"{path} needs the package pyyaml: pip install 'moellava[data]'") from error
    problem = file_problem(path)
    if problem:
        raise DataError(f"{path}: {'no such data file' if problem == 'no such file' else problem}")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())[:300]}") from error


def _refuse_unknown(path: Path, given: dict[Any, Any], known: set[str]) -> None:
    unknown = [key for key in given if key not in known]
    if unknown:
        raise DataError(f"{path} has {brief(unknown[0])}, which would not act; known are {', '.join(sorted(known))}")


def _found(path: Path, name: str) -> str:
    """Where a file of a mixture lies: as it is named, or beside the mixture."""
    if Path(name).suffix.lower() in (".yaml", ".yml"):
        raise DataError(f"{path} lists {name}: a mixture holds data files, no other mixture")
    beside = path.parent / name
    return str(beside) if file_problem(name) == NO_FILE and file_problem(beside) != NO_FILE else name


def _sampled(path: Path, file: str, strategy: Any, seed: int) -> Iterator[Entry]:
    """The records that a strategy takes of a file, in the file's order."""
    match = _SHARE.fullmatch(str(strategy).replace(" ", ""))
    if match is None and strategy not in (None, "all"):
        raise DataError(
            f"{path}: {file} has the sampling_strategy {brief(strategy)}; known are all, first:N, end:N and random:N, "
            "with N a number of records or a share in %"
        )
    rows = entries(file)
    if match is None:
        return rows
    read = list(rows)
    wanted = int(match["count"])
    count = math.ceil(wanted * len(read) / 100) if match["percent"] else wanted
    if count > len(read):
        logger.warning("%s: %s of %s are asked for, but it has %d records: all are taken", path, count, file, len(read))
    return iter(_chosen(read, match["which"], count, seed))


def _chosen(read: list[Entry], which: str, count: int, seed: int) -> list[Entry]:
    count = min(count, len(read))
    if which == "random":
        return [read[index] for index in sorted(random.Random(seed).sample(range(len(read)), count))]
    return read[:count] if which == "first" else read[len(read) - count :]
