# SPDX-License-Identifier: Apache-2.0
"""Flags of a command, and their values: each range once, as argparse takes it."""

from __future__ import annotations

import argparse
import math
from typing import Any, NoReturn

from moellava.errors import did_you_mean

UNKNOWN = "unrecognized arguments: "
"""How argparse begins what it says of words that it does not know."""


class CommandParser(argparse.ArgumentParser):
    """A command's parser. Names of flags are given whole: what an abbreviation means changes with the next new flag."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Exits with status 2, the command's usage and what is wrong; of an unknown flag also the nearest known one."""
        flag = message.removeprefix(UNKNOWN).split()[0].partition("=")[0] if message.startswith(UNKNOWN) else ""
        known = [name for action in self._actions for name in action.option_strings]
        hint = did_you_mean(flag, known) if flag.startswith("-") else ""
        super().error(message + (f".{hint}" if hint else ""))


def count(text: str) -> int:
    """A whole number from 1 on. Raises ArgumentTypeError, which argparse tells with the flag."""
    number = int(text) if text.strip().lstrip("+-").isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: a whole number from 1 on is needed")
    return number


def amount(text: str) -> float:
    """A finite number above 0. Raises ArgumentTypeError: see `count`."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: a number above 0 is needed")
    return number


def truth(text: str) -> bool:
    """True or False. Raises ArgumentTypeError: see `count`."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text}: True or False is needed")
    return text.lower() == "true"
