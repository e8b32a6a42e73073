# SPDX-License-Identifier: Apache-2.0
"""Flags of a command, and their values: each range once, as argparse takes it."""

from __future__ import annotations

import argparse
import math
from typing import Any, NoReturn

from moellava.errors import did_you_mean
from moellava.files import refuse_address

UNKNOWN = "unrecognized arguments: "
"""How argparse begins what it says of words that it does not know."""

PLACES = ("output", "output_dir", "runs", "skip_list", "known", "adapter", "against", "data_folder", "video_folder")
"""Flags, as argparse calls them, of files and folders on this machine."""


class CommandParser(argparse.ArgumentParser):
    """A command's parser. Names of flags are given whole: what an abbreviation means changes with the next new flag."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it. Raises UserError where an address is given for a place."""
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            if action.dest in PLACES and getattr(found, action.dest, None):
                refuse_address(getattr(found, action.dest), action.option_strings[0])
        return found, rest

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
