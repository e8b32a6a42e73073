# SPDX-License-Identifier: Apache-2.0
"""Packages that are measured beside ours and are no dependencies: pip puts each into a folder of the cache."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path.home() / ".cache" / "moellava" / "benchmarks"


def installed(*packages: str) -> Any:
    """The first of these packages, imported; what else they need comes from this environment.

    Args:
        packages: names with their versions, as `trl==1.16.0`.

    Raises:
        ImportError: they cannot be had, and why.
    """
    folder = FOLDER / "+".join(package.replace("==", "-") for package in packages)
    name = packages[0].partition("==")[0].replace("-", "_")
    if not (folder / name).is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*command, *packages], capture_output=True, text=True)
        if done.returncode:
            raise ImportError(f"pip: {done.stderr.strip().splitlines()[-1]}")
    sys.path.append(str(folder))  # behind this environment, whose packages they shall use
    return importlib.import_module(name)
