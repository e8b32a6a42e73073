# SPDX-License-Identifier: Apache-2.0
"""What became of bad inputs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Outcome:
    """What became of bad inputs of one sort.

    Attributes:
        counts: how many were 'read' all the same, how many 'named', …; together the number of inputs without failures.
        failures: an input, and its traceback or what is wrong with its message, of those that were silent, lost or in
            a traceback. None of them may be.
        slowest: seconds, and input, of the one that took longest; (0, '') where time does not matter.
    """

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
