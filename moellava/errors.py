# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can mend. Everything else is a bug and keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """A mistake in a flag, file or record. The message names it, states both sides and the way out."""


class DataError(UserError):
    """What is wrong with data files: one line per problem, all of them at once.

    Args:
        problems: messages that each name file and record.
    """

    def __init__(self, problems: str | list[str], shown: int = 20):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        lines = self.problems[:shown]
        if len(self.problems) > shown:
            lines.append(f"… and {len(self.problems) - shown} more; `moellava check-data` lists all of them")
        super().__init__("\n".join(lines))


class BadFileError(DataError):
    """An image or a video that cannot be shown: what `--bad_files skip` leaves out."""


class UnknownNameError(UserError, KeyError):
    """A name that no registry entry has."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


def message_of(error: UserError) -> str:
    """What an error says, without the traceback that PyTorch writes before it in a worker of a `DataLoader`."""
    return str(error).rpartition(f"\n{type(error).__module__}.{type(error).__qualname__}: ")[2].strip()


def did_you_mean(name: str, known: Iterable[str], shown: Callable[[str], str] = str) -> str:
    """' Did you mean …?', or nothing where no known name is near. `shown`: how the message writes names."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {shown(close[0])}?" if close else ""
