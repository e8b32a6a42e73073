# SPDX-License-Identifier: Apache-2.0
"""Numbers of flags, over every command that takes one."""

from __future__ import annotations

import argparse
import importlib

import pytest

from moellava.cli import COMMANDS
from moellava.commands.values import amount, count


def parsers():
    for name, (module, _) in COMMANDS.items():
        made = importlib.import_module(module)
        for maker in ("make_parser", "parser", "_parser"):
            if hasattr(made, maker):
                yield name, getattr(made, maker)()


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", ""])
def test_a_count_is_a_whole_number_from_one_on(text):
    assert count("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="a whole number from 1 on"):
        count(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "x"])
def test_an_amount_is_finite_and_above_zero(text):
    assert amount("0.5") == 0.5
    with pytest.raises(argparse.ArgumentTypeError, match="a number above 0"):
        amount(text)


def test_counts_are_asked_for_as_counts():
    """A bare int would take a length of -1. Those that are named below are judged by what reads them."""
    elsewhere = {"seed", "num_frames", "max_new_tokens", "top_k", "num_beams", "records", "max_image_pixels"}
    elsewhere |= {"max_image_side", "init_seed", "seeds", "port"}
    found = [(name, action.dest) for name, made in parsers() for action in made._actions if action.type is int]
    assert found and not [(name, dest) for name, dest in found if dest not in elsewhere]
