# SPDX-License-Identifier: Apache-2.0
"""Packages that pictures and tables are made with: installed with `moellava[vis]`, imported when they are asked for."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

from moellava.errors import UserError

PACKAGES = ("matplotlib", "pyarrow")


def missing() -> list[str]:
    """Those of `PACKAGES` that are not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]


def require_packages(what: str) -> None:
    """Raises UserError where packages are missing; `what` is the command or flag that needs them."""
    names = missing()
    if names:
        raise UserError(f"{what} needs {' and '.join(names)}: pip install 'moellava[vis]'")


def pyplot() -> Any:
    """matplotlib's `Figure` class and no window system: figures are files."""
    return importlib.import_module("matplotlib.figure").Figure
