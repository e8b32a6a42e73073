# SPDX-License-Identifier: Apache-2.0
"""What a method has found out, kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar, cast

T = TypeVar("T")


class Remembered(Generic[T]):
    """A function that keeps its values. Unlike one of `lru_cache`, it goes to spawned workers with its owner.

    Args:
        function: of hashable arguments.
        limit: values kept; the next one takes the place of them all.
    """

    def __init__(self, function: Callable[..., T], limit: int):
        self.function = function
        self.limit = limit
        self.values: dict[tuple[Hashable, ...], T] = {}

    def __call__(self, *arguments: Hashable) -> T:
        found = self.values.get(arguments, self)  # another thread may clear it at any time
        if found is not self:
            return cast(T, found)
        value = self.function(*arguments)
        if len(self.values) >= self.limit:
            self.values.clear()
        self.values[arguments] = value
        return value
