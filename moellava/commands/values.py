# SPDX-License-Identifier: Apache-2.0
"""Values of flags: each range once, as argparse takes it."""

from __future__ import annotations

import argparse
import math


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
