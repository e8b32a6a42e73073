# SPDX-License-Identifier: Apache-2.0
"""Options that say everything of themselves: a dataclass field holds its default, help, range and choices.

From these follow the check of its values, and its flag in every command that takes it.
"""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Collection
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from typing import Any

from moellava.errors import UserError


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes: from `least` or `above`, to `most` or `below`. None: no bound on that side."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)


def option(
    default: Any, text: str, within: Range | None = None, choices: Collection[str] = (), is_fixed: bool = False
) -> Any:
    """A dataclass field that is an option.

    Args:
        default: its value where nothing is given.
        text: what `--help` says of it; choices, range and default are added there.
        within: range of a number, or of each number in a list.
        choices: the names that it takes; a registry's are those that it has when a value is given.
        is_fixed: what has been made with one value cannot go on with another; see `fixed_option`.
    """
    metadata = {"help": text, "range": within, "choices": choices, "is_fixed": is_fixed}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def fixed_option(default: Any, text: str, within: Range | None = None, choices: Collection[str] = ()) -> Any:
    """An option of how something is made, which cannot be changed afterwards. For the arguments see `option`."""
    return option(default, text, within, choices, is_fixed=True)


def check_options(options: Any) -> None:
    """Compares every field of a dataclass of options with its range and its choices.

    Raises:
        UserError: the first value that does not fit, with its flag and what that takes.
    """
    for item in fields(options):
        check_option(item, getattr(options, item.name))


def check_option(item: Field, value: Any) -> None:
    """Compares a value with the range and the choices of an option. Raises UserError: see `check_options`."""
    within, choices = item.metadata["range"], item.metadata["choices"]
    if choices and value not in choices:
        raise UserError(f"--{item.name} {value!r} is unknown. Known: {', '.join(choices)}.")
    numbers = value if isinstance(value, list) else [value]
    if within and not (numbers and all(number in within for number in numbers)):
        raise UserError(f"--{item.name} {_words(value)} is out of range: it must be {within}.")


def optional_flags(options: type, title: str) -> type:
    """A dataclass with the fields of a dataclass of options, each None until it is given, for `HfArgumentParser`.

    That class makes a flag of each field, in both spellings (`--init_seed`, `--init-seed`), and lists them together.

    Args:
        options: a dataclass whose fields are `option`s.
        title: what `--help` calls the list.
    """
    types = typing.get_type_hints(options)
    flags = [(item.name, types[item.name] | None, _flag(item)) for item in fields(options)]
    group = {"_argument_group_name": title}  # the name that HfArgumentParser looks for
    return make_dataclass(f"{options.__name__}Flags", flags, namespace=group)


def _flag(item: Field) -> Any:
    """An option's field in `optional_flags`; its metadata are what argparse is told."""
    default = item.default if item.default_factory is MISSING else item.default_factory()
    text = item.metadata["help"]
    if choices := item.metadata["choices"]:
        text += f" One of {', '.join(choices)}."
    if within := item.metadata["range"]:
        text += f" {str(within).capitalize()}."
    if default is not None:
        text += f" Default: {_words(default)}."
    bare = {"nargs": "?", "const": True} if isinstance(default, bool) else {}  # the flag alone means True
    return field(default=None, metadata={"help": text, **bare})


def add_flags(parser: Any, options: type, without: Collection[str] = ()) -> None:
    """Adds the flags of a dataclass to a parser, or to a group of one, as `HfArgumentParser` does, without
    transformers: what only shows its `--help` need not wait for that.

    Args:
        options: a dataclass; its fields hold a value, None for one that is unset, or a list.
        without: fields that get no flag.
    """
    hints = typing.get_type_hints(options)
    for item in fields(options):
        if item.name in without:
            continue
        sorts = [sort for sort in typing.get_args(hints[item.name]) if sort is not types.NoneType]
        union = isinstance(hints[item.name], types.UnionType)
        sort = (str if str in sorts else sorts[0]) if union else hints[item.name]
        default = item.default if item.default_factory is MISSING else item.default_factory()
        settings = {"default": default, "type": sort, **item.metadata}
        if sort is bool:
            settings["type"] = truth
            if default is not None:
                settings |= {"nargs": "?", "const": True}  # the flag alone means True
        elif typing.get_origin(sort) is list:
            settings |= {"type": typing.get_args(sort)[0], "nargs": "+"}
        parser.add_argument(*spellings(item.name), **settings)


def spellings(name: str) -> list[str]:
    """How a flag is written: `--init_seed`, and `--init-seed`."""
    return [f"--{name}", f"--{name.replace('_', '-')}"] if "_" in name else [f"--{name}"]


def truth(text: str) -> bool:
    """True or False, in the spellings that transformers takes. Raises ArgumentTypeError."""
    for value, known in ((True, ("yes", "true", "t", "y", "1")), (False, ("no", "false", "f", "n", "0"))):
        if text.lower() in known:
            return value
    raise argparse.ArgumentTypeError(f"{text}: True or False is needed")


def _words(value: Any) -> str:
    """A value as it stands on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


class FlagHelp(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but none of a flag that is unset: its help says what that means."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", []) else super()._get_help_string(action)
