"""The start of a command: the garbage collector rests while libraries are imported, and works afterwards."""

import gc
import weakref

import pytest

from moellava.startup import importing


class Thing:
    """What can be told to have gone."""


def test_the_collector_rests_and_then_leaves_what_was_made_alone():
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


def test_a_failed_import_leaves_the_collector_on():
    with pytest.raises(ImportError), importing():
        raise ImportError("no torch")
    assert gc.isenabled()
