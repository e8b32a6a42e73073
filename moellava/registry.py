# SPDX-License-Identifier: Apache-2.0
"""Exact names: a duplicate raises, an unknown name lists the known ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from moellava.errors import UnknownNameError, did_you_mean

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """A mapping that grows only through `register` (or `registry[name] = value`), and changes only through `replace`.

    Args:
        noun: what an entry is, in the words of an error message ('template', 'family').
    """

    def __init__(self, noun: str):
        self.noun = noun
        self._entries: dict[str, T] = {}

    def register(self, name: str, value: T) -> T:
        """Adds an entry and returns it. Raises ValueError if the name is taken."""
        if name in self._entries:
            raise ValueError(f"{self.noun} {name!r} is registered twice")
        self._entries[name] = value
        return value

    def __setitem__(self, name: str, value: T) -> None:
        """The same as `register`, as the guides of LLaVA and MoE-LLaVA write it."""
        self.register(name, value)

    def replace(self, name: str, value: T) -> T:
        """Puts another value in the place of an entry's and returns it. Raises UnknownNameError if there is none."""
        _ = self[name]  # an unknown name is told as one that is looked up
        self._entries[name] = value
        return value

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            hint = did_you_mean(str(name), self._entries, repr)
            raise UnknownNameError(f"Unknown {self.noun} {name!r}.{hint} Known: {', '.join(self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
