# SPDX-License-Identifier: Apache-2.0
"""The start of a command: nothing heavy is imported before it is needed, and the garbage collector rests meanwhile."""

import gc
import json
import sys
import weakref

import pytest

from moellava import moe
from moellava.cli import COMMANDS
from moellava.startup import HEAVY, importing
from tests.processes import run_python

COUNT = """
import contextlib, io, json, sys
import moellava
from moellava.cli import main

found = {}
for words in json.loads(sys.argv[1]):
    before = set(sys.modules)
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main(words)
    assert said.getvalue(), words
    found[" ".join(words)] = sorted((set(sys.modules) - before) & set(json.loads(sys.argv[2])))
print(json.dumps({words: names for words, names in found.items() if names}))
"""
"""Runs commands one after the other in a fresh interpreter; prints which of them has imported what."""


def test_no_help_waits_for_what_is_heavy():
    helps = [["--help"], ["--version"], ["models"], *([command, "--help"] for command in COMMANDS)]
    said = run_python(COUNT, json.dumps(helps), json.dumps(HEAVY), fresh=True)
    assert json.loads(said.splitlines()[-1]) == {}


def test_names_of_a_lazy_package_are_what_they_were():
    """`upcycle` is a submodule, too: the name stays the function, whichever is imported first."""
    assert "moellava.moe.upcycle" in sys.modules and moe.upcycle.__name__ == "upcycle" and callable(moe.upcycle)
    assert set(moe.__all__) <= set(dir(moe))
    assert all(getattr(moe, name) is not None for name in moe.__all__)
    with pytest.raises(AttributeError, match="'moellava.moe' has no attribute 'nothing'"):
        moe.nothing  # noqa: B018


@pytest.fixture
def unloaded(monkeypatch):
    """As if torch had not been imported."""
    monkeypatch.delitem(sys.modules, "torch")


class Thing:
    """What can be told to have gone."""


def test_the_collector_rests_and_then_leaves_what_was_made_alone(unloaded):
    frozen = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
        made = [[] for _ in range(10_000)]
    assert gc.isenabled() and gc.get_freeze_count() > frozen + len(made)
    circle = Thing()
    circle.itself, gone = circle, weakref.ref(circle)
    del circle
    gc.collect()
    assert gone() is None, "garbage of afterwards is collected"


def test_a_failed_import_leaves_the_collector_on(unloaded):
    with pytest.raises(ImportError), importing():
        raise ImportError("no torch")
    assert gc.isenabled()
