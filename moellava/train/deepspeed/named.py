# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's settings by name: `--deepspeed zero2` is the file zero2.json of this package."""

from __future__ import annotations

from pathlib import Path

from moellava.errors import UserError

FOLDER = Path(__file__).parent

NONE = "none"
"""In place of a name: without DeepSpeed, also where a run file has one."""


def names() -> list[str]:
    """The settings that the package brings."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def settings_named(value: str | None) -> str | None:
    """A file of settings, or JSON itself, stays what it is; a name becomes the file of the package that has it.

    Raises:
        UserError: a plain word that is neither.
    """
    if value is None or value == NONE:
        return None
    if value in names():
        return str(FOLDER / f"{value}.json")
    if value.isidentifier() and not Path(value).exists():
        raise UserError(f"--deepspeed {value}: it takes {', '.join(names())}, {NONE}, or a JSON file of your own.")
    return value
