# SPDX-License-Identifier: Apache-2.0
"""`moellava train --help`: groups, ours first; `--help_all` has the rest; nothing there that is not true."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from moellava.cli import main
from moellava.train.arguments import ARGUMENT_CLASSES, RunArguments, TrainingArguments
from moellava.train.entry import main as entry
from moellava.train.help import GROUPS, HIDDEN, USUAL, help_text
from moellava.train.hf_flags import REFUSED, SERVED, hf_names, word

OWN = {item.name for group in ARGUMENT_CLASSES for item in fields(group)} - set(hf_names())


def flags_of(text: str) -> list[str]:
    """The flags that a page explains, in order."""
    return re.findall(r"^  --([\w-]+)", text, re.M)


def test_help_is_ours_in_groups_and_short(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert text == help_text() + "\n"
    shown = flags_of(text)
    assert len(shown) == len(set(shown)) and OWN | set(USUAL) <= set(shown)
    assert {item.name for item in fields(RunArguments)} & set(REFUSED) == HIDDEN
    assert [title for title in ("the run", *(group[0] for group in GROUPS)) if f"\n{title}:\n" not in text] == []
    assert len(text.splitlines()) < 400 and "<" not in text.replace("<im_start> and <im_end>", "")


def test_help_all_adds_what_is_served_of_hugging_faces(capsys):
    assert entry(["--help_all"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(help_text())
    shown = set(flags_of(text))
    assert set(SERVED) <= shown and not shown & set(REFUSED)
    assert "Strategy." not in text and "SchedulerType" not in text, "names of enums mean nothing to a reader"


@pytest.mark.parametrize("name", [name for name, text in USUAL.items() if "Default: " in text])
def test_defaults_that_are_told_are_true(name):
    told = USUAL[name].rpartition("Default: ")[2].rstrip(".")
    default = next(item.default for item in fields(TrainingArguments) if item.name == name)
    assert (float(told) if isinstance(default, int | float) else told) == word_or_number(default)


def word_or_number(default: object) -> object:
    """A default as it is told."""
    return default if isinstance(default, int | float) else word(default)
