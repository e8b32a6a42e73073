# SPDX-License-Identifier: Apache-2.0
"""Training from Python: `moellava.train(…)`, as often as one likes in a process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moellava.train import train as stage
from moellava.train.parsing import arguments_of, flags_in, flags_in_file


def train(run: str | Path | Mapping[str, Any] | None = None, /, **flags: Any) -> Path:
    """Runs one stage in this process, or goes on with it, and returns its folder.

    Args:
        run: a run file (YAML or JSON), or the same as a mapping.
        flags: flags of `moellava train` by name, which go before those of the file; None takes one away from it.
            Values are Python's (`learning_rate=2e-5`, `data_path=["a.json", "b.json"]`, `bf16=True`).

    Raises:
        UserError: what the command would say, before the first step.
        Stopped: a signal has ended the run (Ctrl-C); the same call goes on from its last checkpoint.
    """
    given: dict[str, Any] = {}
    if isinstance(run, Mapping):
        given = flags_in(run)
    elif run is not None:
        given = flags_in_file(str(run))
    taken = {name for name, value in flags.items() if value is None}
    given = {name: value for name, value in given.items() if name not in taken} | flags_in(flags)
    return stage.train(*arguments_of(given))
