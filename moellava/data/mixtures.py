# SPDX-License-Identifier: Apache-2.0
"""Data files as they are named: patterns, and LLaVA-NeXT's mixtures, YAML files that list files and how much of each.

seed: 0                           # of the draws; 0 unless said
temperature: 2                    # shares as sizes ** (1 / 2); none: as the sizes are
datasets:
  - json_path: instruct.json      # any format, or a pattern; relative to the working folder, or else to the mixture's
    sampling_strategy: first:3000 # all (the default), first:N, end:N, random:N; or N%
    epochs: 2.5                   # how often its records come in an epoch; 1 unless said
    weight: 3                     # in place of it: its share of an epoch, against the weights of the others
"""

from __future__ import annotations

import glob
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moellava.data.record_keys import brief
from moellava.data.remote import addresses, copied, is_remote
from moellava.errors import DataError, UserError
from moellava.files import NO_FILE, file_problem
from moellava.log import get_logger

_SHARE = re.compile(r"(?P<which>first|end|random):(?P<count>\d+)(?P<percent>%?)")

_KEYS = {"json_path", "sampling_strategy", "seed", "epochs", "weight"}

_OF_MIXTURES = {"datasets", "seed", "temperature"}

MIXTURES = (".yaml", ".yml")

logger = get_logger(__name__)


class Part(NamedTuple):
    """Data files of which records are taken together.

    Attributes:
        files: as they were named; of a pattern, those that fit it, by name.
        strategy: `sampling_strategy`; None: all.
        seed: of the draws.
        epochs: how often the records come in an epoch; None: once, or as the weights say.
        weight: their share of an epoch; None: not by weights.
        mixture: that lists them, for messages.
    """

    files: list[str]
    strategy: str | None = None
    seed: int = 0
    epochs: float | None = None
    weight: float | None = None
    mixture: str = ""


class Listing(NamedTuple):
    """What a name of data files stands for.

    Attributes:
        parts: one for a file or a pattern, several for a mixture.
        temperature: by which their sizes become their shares; None: not by it.
    """

    parts: list[Part]
    temperature: float | None = None


def listing_of(path: str | Path) -> Listing:
    """What a data file, a pattern or a mixture stands for.

    Raises:
        DataError: the mixture cannot be read, or no file fits the pattern.
        UserError: a package that a mixture needs is not installed.
    """
    if Path(path).suffix.lower() not in MIXTURES:
        return Listing([Part(fitting(str(path)))])
    mixture = _read(copied(str(path)) if is_remote(path) else Path(path))
    listed = mixture.get("datasets") if isinstance(mixture, dict) else None
    if not isinstance(listed, list) or not listed:
        raise DataError(f'{path} has no list "datasets" of data files: {brief(mixture)}')
    _refuse_unknown(path, mixture, _OF_MIXTURES)
    temperature = _positive(path, mixture, "temperature")
    parts = [_part(str(path), number, part, mixture) for number, part in enumerate(listed)]
    _refuse_two_ways(path, parts, temperature)
    return Listing(parts, temperature)


def fitting(name: str) -> list[str]:
    """The files of a name: itself, or those that fit it as a pattern (`*`, `?`, `[…]`, `**`). Raises DataError where
    none does. Of an address only `*` makes a pattern."""
    if is_remote(name):
        return addresses(name) if "*" in name else [name]
    if file_problem(name) != NO_FILE or not glob.has_magic(name):
        return [name]
    found = sorted(glob.glob(name, recursive=True))
    if not found:
        raise DataError(f"{name}: no data file fits this pattern")
    return found


def taken(listing: Listing, counts: Sequence[int]) -> list[list[int] | range]:
    """The records that are taken of each part, by their numbers, in order; some several times.

    Args:
        listing: of `listing_of`.
        counts: records that each part has.

    Raises:
        DataError: of a part that has records none would come.
    """
    chosen = [_sampled(part, count) for part, count in zip(listing.parts, counts, strict=True)]
    factors = _factors(listing, [len(rows) for rows in chosen])
    problems = [
        f"{part.mixture}: of the {len(rows)} records of {part.files[0]} none would come: its share is "
        f"{factor * len(rows):.3g} of a record; give it more, or take it off the list"
        for part, rows, factor in zip(listing.parts, chosen, factors, strict=True)
        if len(rows) and not round(factor * len(rows))
    ]
    if problems:
        raise DataError(problems)
    return [
        _repeated(rows, factor, part.seed) for part, rows, factor in zip(listing.parts, chosen, factors, strict=True)
    ]


def _factors(listing: Listing, sizes: Sequence[int]) -> list[float]:
    """How often the records of each part come in an epoch. By shares, all parts together have as many as without."""
    weights: Sequence[float | None] = [part.weight for part in listing.parts]
    if listing.temperature is not None:
        weights = _powers(sizes, 1 / listing.temperature)
    if weights[0] is None:
        return [1.0 if part.epochs is None else part.epochs for part in listing.parts]
    if math.isinf(sum(filter(None, weights))):
        weights = [(weight or 0) / max(filter(None, weights)) for weight in weights]
    total, whole = sum(sizes), sum(filter(None, weights)) or 1  # no weight at all: every part is empty
    return [(weight or 0) / whole * total / max(size, 1) for weight, size in zip(weights, sizes, strict=True)]


def _powers(sizes: Sequence[int], power: float) -> list[float]:
    """Numbers that are to each other as the sizes to a power; these themselves where floats can hold them."""
    try:
        powers = [float(size**power) for size in sizes]
    except OverflowError:
        powers = [math.inf]
    if all(map(math.isfinite, powers)):
        return powers
    return [(size / max(sizes)) ** power for size in sizes]


def _repeated(rows: list[int] | range, factor: float, seed: int) -> list[int] | range:
    """Numbers so many times; of what is left of a factor beside whole times, as many as are due are drawn."""
    if factor == 1:
        return rows
    due = round(factor * len(rows))
    times, rest = divmod(due, max(len(rows), 1))
    return sorted(list(rows) * times + random.Random(seed).sample(rows, rest))


def _part(path: str, number: int, part: Any, mixture: dict[str, Any]) -> Part:
    """An entry of a mixture. Raises DataError for what would not act."""
    if not isinstance(part, dict) or not isinstance(part.get("json_path"), str):
        raise DataError(f'{path}: entry {number} of "datasets" has no "json_path": {brief(part)}')
    _refuse_unknown(path, part, _KEYS)
    seed = part.get("seed", mixture.get("seed", 0))
    if not isinstance(seed, int):
        raise DataError(f"{path}: the seed is a whole number, not {brief(seed)}")
    strategy, file = part.get("sampling_strategy"), part["json_path"]
    if strategy not in (None, "all") and _match(strategy) is None:
        raise DataError(
            f"{path}: {file} has the sampling_strategy {brief(strategy)}; known are all, first:N, end:N and random:N, "
            "with N a number of records or a share in %"
        )
    epochs, weight = (_positive(path, part, name) for name in ("epochs", "weight"))
    return Part(fitting(_found(path, file)), strategy, seed, epochs, weight, str(path))


def _positive(path: str | Path, given: dict[str, Any], name: str) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise DataError(f"{path}: {name} is a number above 0, not {brief(value)}")
    return float(value)


def _refuse_two_ways(path: str | Path, parts: Sequence[Part], temperature: float | None) -> None:
    """Raises DataError where it is said in two ways how much of each part there is."""
    weighted = [part for part in parts if part.weight is not None]
    said = [
        name
        for name, is_said in {
            "temperature": temperature is not None,
            "weight": bool(weighted),
            "epochs": any(part.epochs is not None for part in parts),
        }.items()
        if is_said
    ]
    if len(said) > 1:
        raise DataError(f"{path} has {' and '.join(said)}, and each says how much there is of the data files: keep one")
    if weighted and len(weighted) < len(parts):
        bare = next(part for part in parts if part.weight is None)
        raise DataError(f"{path}: {bare.files[0]} has no weight, and other data files have: give all of them one")


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
        text = path.read_text(encoding="utf-8-sig")
        if (twice := _key_twice(yaml.compose(text, yaml.SafeLoader))) is not None:
            raise DataError(f"{path} has {brief(twice)} twice in one place, and the first would not act: keep one")
        return yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())[:300]}") from error


def _key_twice(node: Any) -> str | None:
    """A key that a mapping of YAML has twice, of which it would keep the last. Aliases are looked at where they are."""
    left, met = [node], set()
    while left:
        node = left.pop()
        if node is None or id(node) in met or node.id == "scalar":
            continue
        met.add(id(node))
        keys = [key.value for key, _ in node.value if key.id == "scalar"] if node.id == "mapping" else []
        if len(set(keys)) < len(keys):
            return next(key for number, key in enumerate(keys) if key in keys[:number])
        left += [part for pair in node.value for part in pair] if node.id == "mapping" else node.value
    return None


def _refuse_unknown(path: str | Path, given: dict[Any, Any], known: set[str]) -> None:
    unknown = [key for key in given if key not in known]
    if unknown:
        raise DataError(f"{path} has {brief(unknown[0])}, which would not act; known are {', '.join(sorted(known))}")


def _found(path: str, name: str) -> str:
    """Where a file of a mixture lies: as it is named, or beside the mixture."""
    if Path(name).suffix.lower() in MIXTURES:
        raise DataError(f"{path} lists {name}: a mixture holds data files, no other mixture")
    if is_remote(name) or is_remote(path):
        return name if is_remote(name) else f"{path.rpartition('/')[0]}/{name}"
    places = [name, str(Path(path).parent / name)]
    return next((place for place in places if file_problem(place) != NO_FILE or glob.glob(place)), name)


def _match(strategy: Any) -> re.Match[str] | None:
    return _SHARE.fullmatch(str(strategy).replace(" ", ""))


def _sampled(part: Part, count: int) -> list[int] | range:
    """The records that a strategy takes of so many, in their order."""
    match = None if part.strategy is None else _match(part.strategy)
    if match is None:
        return range(count)
    wanted = int(match["count"])
    wanted = math.ceil(wanted * count / 100) if match["percent"] else wanted
    if wanted > count:
        logger.warning(
            "%s: %s of %s are asked for, but it has %d records: all are taken",
            part.mixture, wanted, part.files[0], count,
        )  # fmt: skip
    wanted = min(wanted, count)
    if match["which"] == "random":
        return sorted(random.Random(part.seed).sample(range(count), wanted))
    return range(wanted) if match["which"] == "first" else range(count - wanted, count)
