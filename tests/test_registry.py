# SPDX-License-Identifier: Apache-2.0
"""Registries: names are given once, and an unknown one lists the known."""

import pytest

from moellava.errors import UnknownNameError
from moellava.registry import Registry


def test_an_entry_is_added_once_and_replaced_only_where_there_is_one():
    known: Registry[int] = Registry("number")
    assert known.register("one", 1) == 1
    with pytest.raises(ValueError, match="number 'one' is registered twice"):
        known.register("one", 2)
    assert known.replace("one", 3) == known["one"] == 3
    with pytest.raises(UnknownNameError, match="Unknown number 'on'. Did you mean 'one'"):
        known.replace("on", 4)
    assert dict(known) == {"one": 3}
