# SPDX-License-Identifier: Apache-2.0
"""Plug-ins: Python of a user's own that registers a template, tokenizer, family, projector or architecture.

    moellava chat --plugin mine.py --model-path DIR …
    deepspeed train.py --plugin mine.py --version mine …

A plug-in is code. It runs where a user says so: by `--plugin FILE`, or as an installed package with an entry point in
the group `moellava.plugins`. A folder that was made with one names it and carries a copy of the file, which runs only
for somebody who names it, too, or says `--trust_remote_code True`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from moellava.errors import UserError
from moellava.files import file_problem
from moellava.log import get_logger

logger = get_logger(__name__)

GROUP = "moellava.plugins"
"""Entry points of installed packages."""

FLAG = "--plugin"


@dataclass(frozen=True)
class Plugin:
    """A plug-in that has run in this process.

    Attributes:
        name: of its file, or of its entry point.
        code: what the file holds; None for that of an installed package.
    """

    name: str
    code: bytes | None = None


PLUGINS: dict[str, Plugin] = {}
"""Those that have run, by name."""


def load_plugin(path: str | Path, flag: str = FLAG) -> Plugin:
    """Runs a file, once in a process; what it registers is there from here on.

    Raises:
        UserError: there is no such file, another of its name has run, or it ends in an error, which is shown.
    """
    path = Path(path)
    problem = "is no Python file (.py)" if path.suffix != ".py" else file_problem(path)
    if problem:
        raise UserError(f"{flag} {path}: {problem}")
    plugin = Plugin(path.name, path.read_bytes())
    known = PLUGINS.get(plugin.name)
    if known == plugin:
        return known
    if known is not None:
        raise UserError(f"{flag} {path}: another plug-in named {plugin.name} has been loaded. Give it another name.")
    spec = importlib.util.spec_from_file_location(f"moellava_plugin_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{flag} {path}: Python cannot import it")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # classes of a module that is not there cannot be pickled
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's code raises
        del sys.modules[spec.name]
        raise UserError(f"{flag} {path} ends in an error: {type(error).__name__}: {error}") from error
    logger.info("Plug-in %s", path)
    return PLUGINS.setdefault(plugin.name, plugin)


def load_plugins(files: Iterable[str | Path]) -> None:
    """Runs the plug-ins of installed packages, then those files. Raises UserError: see `load_plugin`."""
    for point in entry_points(group=GROUP):
        if point.name not in PLUGINS:
            _load(point)
    for file in files:
        load_plugin(file)


def _load(point: EntryPoint) -> None:
    try:
        point.load()
    except Exception as error:  # whatever a package's code raises
        raise UserError(
            f"The plug-in {point.name} of an installed package ({point.value}) ends in an error: "
            f"{type(error).__name__}: {error}. Mend it, or uninstall it."
        ) from error
    logger.info("Plug-in %s (%s)", point.name, point.value)
    PLUGINS[point.name] = Plugin(point.name)


def require_plugins(names: Iterable[str], folder: Path, trust_remote_code: bool = False) -> None:
    """Sees to it that the plug-ins of a folder have run.

    Args:
        names: those that the folder was made with.
        folder: it carries copies of those that were files.
        trust_remote_code: run these copies.

    Raises:
        UserError: one has not run and may not, or is not there; or the one that has run is not the folder's.
    """
    for name in names:
        copy = folder / name
        if name not in PLUGINS and not name.endswith(".py"):
            _load(_installed(name, folder))
        elif name not in PLUGINS and not trust_remote_code:
            raise UserError(
                f"{folder} was made with the plug-in {name}, which is code. Read {copy}, then give "
                f"{FLAG} {copy}, or {FLAG} and the file that it is a copy of."
            )
        elif name not in PLUGINS:
            load_plugin(copy, "the folder's plug-in")
        elif copy.is_file() and copy.read_bytes() != PLUGINS[name].code:
            logger.warning("%s %s is not the plug-in that %s was made with (%s)", FLAG, name, folder, copy)


def _installed(name: str, folder: Path) -> EntryPoint:
    """The entry point of this name. Raises UserError where no installed package has it."""
    found = [point for point in entry_points(group=GROUP) if point.name == name]
    if not found:
        raise UserError(f"{folder} was made with the plug-in {name} of a package that is not installed here.")
    return found[0]


def write_plugins(names: Iterable[str], folder: Path) -> None:
    """Puts copies of plug-ins into a folder that is being written."""
    for name in names:
        code = PLUGINS[name].code
        if code is not None:
            (folder / name).write_bytes(code)
