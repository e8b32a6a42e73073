# SPDX-License-Identifier: Apache-2.0
"""A run as a file: `moellava train run.yaml`, YAML or JSON, whose keys are the flags' names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moellava.errors import UserError
from moellava.files import file_problem, written

NAME = "run.yaml"
"""What every run leaves in its folder, and can be started from."""

TRUTH = "tag:yaml.org,2002:bool"
"""What YAML calls a truth value."""

ENDINGS = (".yaml", ".yml", ".json")
OF_A_LAUNCHER = "--local_rank"
"""What `deepspeed` puts in front of a script's own words."""

NOT_KEPT = {"local_rank": "it is one process's of a launch", "hub_token": "a folder is shown to others"}
"""Flags that no run file gets, and why."""

TITLE = "# A run of moellava {version}. `moellava train {name}` goes on with it; --output_dir starts it anew.\n"


def split_file(argv: list[str]) -> tuple[str | None, list[str]]:
    """The run file that leads the words of a command, if there is one, and the other words."""
    for position, text in enumerate(argv):
        if text.partition("=")[0] == OF_A_LAUNCHER and "=" in text:
            continue
        if text.endswith(ENDINGS) and not text.startswith("--"):
            return text, argv[:position] + argv[position + 1 :]
        return None, argv
    return None, argv


def read_run_file(path: str | Path) -> dict[str, Any]:
    """The keys and values of a file. Raises UserError for one that cannot be read, or holds something else."""
    import yaml

    if problem := file_problem(Path(path)):
        raise UserError(problem)
    try:
        text = Path(path).read_text(encoding="utf-8")
        read = json.loads(text) if str(path).endswith(".json") else yaml.load(text, _loader())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"no YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(read, dict) or not all(isinstance(name, str) for name in read):
        raise UserError("it holds no run: names of flags with their values, as `learning_rate: 2e-5`.")
    return read


def _loader() -> Any:
    """YAML's safe loader, for which `no` is a text and not a truth value: flags have it as a value, as in
    `save_strategy: no`, and those that are true or false read the text as well."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {
            first: [(tag, fits) for tag, fits in resolvers if tag != TRUTH]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    Loader.add_implicit_resolver(TRUTH, re.compile("(?i:yes|true|false|on|off)$"), list("yYtTfFoO"))
    return Loader


def words_of(values: Mapping[str, Any]) -> list[str]:
    """Flags by name, as they are typed; None is one that is not given."""
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, list | tuple):
            words += [f"--{name}", *map(_word, value)]
        elif value is not None:
            words.append(f"--{name}={_word(value)}")
    return words


def _word(value: Any) -> str:
    """A value as it is typed."""
    return json.dumps(value) if isinstance(value, dict) else str(value)


def as_yaml(given: Mapping[str, Any]) -> str:
    """Flags that were given, as a run file, without those in `NOT_KEPT`."""
    import yaml

    kept = {name: value for name, value in given.items() if name not in NOT_KEPT}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=120) if kept else ""


def write_run_file(folder: Path, given: Mapping[str, Any], version: str) -> None:
    """Leaves the run's file in its folder."""
    with written(folder / NAME) as staged:
        staged.write_text(TITLE.format(version=version, name=folder / NAME) + as_yaml(given), encoding="utf-8")
