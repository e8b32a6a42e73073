# SPDX-License-Identifier: Apache-2.0
"""Flags of a command that were given, and would do nothing: refused by name, each table of them one of data."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from moellava.errors import UserError


class Idle(NamedTuple):
    """Flags that nothing reads.

    Attributes:
        flags: names, as `argparse` keeps their values.
        applies: whether it is so for the flags that were given.
        why: what they would need, or what takes their place.
    """

    flags: Sequence[str]
    applies: object
    why: str


def given_values(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """Names and values of the flags that stand on a command line, be they the defaults or not."""
    bare = copy.deepcopy(parser)
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    return vars(bare.parse_args(argv))


def refuse_idle(parser: argparse.ArgumentParser, argv: Sequence[str] | None, idle: Iterable[Idle]) -> None:
    """Raises UserError, a line for each flag that was given and that nothing would read."""
    given = given_values(parser, argv)
    spelled = {action.dest: (action.option_strings or [action.dest])[0] for action in parser._actions}
    unread = [(name, rule.why) for rule in idle if rule.applies for name in rule.flags if name in given]
    lines = [f"{spelled[name]} {given[name]}: {why}" for name, why in unread]
    if lines:
        raise UserError("\n".join(lines))
