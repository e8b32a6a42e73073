# SPDX-License-Identifier: Apache-2.0
"""What makes a command start sooner: nothing that is heavy is imported before it is needed."""

from __future__ import annotations

import ast
import gc
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "accelerate", "datasets", "gradio")
"""Packages that no `--help`, no `--version` and no `import moellava` waits for."""


@contextmanager
def importing() -> Iterator[None]:
    """Around the first import of torch and transformers, which takes seconds.

    They make a million objects that stay. Python's garbage collector would look at all of them several times meanwhile,
    a tenth of the start, and again whenever a run asks it to collect: here it rests, and forgets them for good. Where
    they are there already, nothing happens.
    """
    if "torch" in sys.modules and "transformers" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def lazily(package: str) -> None:
    """Turns the `if TYPE_CHECKING:` imports of a package's `__init__.py` into imports of what is used, when it is used.

    So the list of names stands once, where type checkers read it. A submodule that is called as one of the names
    (`moellava.moe.upcycle`) is hidden by it, as by a plain import. A subpackage that is (`moellava.train`) stays what
    it is, since code looks into it; it is made to be called instead, by `called`.
    """
    module = sys.modules[package]
    homes, packages = {}, set()
    for node in _checked_imports(Path(str(module.__file__))):
        for alias in node.names:
            if f"{node.module}.".startswith(f"{package}.{alias.name}.") and node.module != f"{package}.{alias.name}":
                packages.add(alias.name)
            else:
                homes[alias.asname or alias.name] = (str(node.module), alias.name)

    class Lazy(ModuleType):
        """A package whose names are imported when they are used."""

        def __getattr__(self, name: str) -> Any:
            if name in packages:
                return importlib.import_module(f"{package}.{name}")
            if name not in homes:
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            home, there = homes[name]
            value = getattr(importlib.import_module(home), there)
            super().__setattr__(name, value)
            return value

        def __setattr__(self, name: str, value: Any) -> None:
            if not (name in homes and isinstance(value, ModuleType)):  # what an import of that submodule would set
                super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return sorted({*super().__dir__(), *homes, *packages})

    module.__class__ = Lazy


def once_imported(name: str, act: Callable[[], object]) -> None:
    """Calls `act` when a module has been imported: now, or when somebody does; it is not imported for this."""
    if name in sys.modules:
        act()
    else:
        sys.meta_path.insert(0, _Awaited(name, act))


class _Awaited(importlib.abc.MetaPathFinder):
    """Finds a module as others do, and acts after its code has run."""

    def __init__(self, name: str, act: Callable[[], object]):
        self.name, self.act = name, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_act(module: ModuleType) -> None:
                run(module)
                self.act()

            spec.loader.exec_module = run_and_act  # type: ignore[method-assign]
        return spec


def _checked_imports(path: Path) -> Iterator[ast.ImportFrom]:
    """The imports of a file's `if TYPE_CHECKING:` block."""
    for block in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING":
            yield from (node for node in block.body if isinstance(node, ast.ImportFrom))


def called(package: str, home: str, name: str) -> None:
    """Makes a package that can be called: that calls `name` of the module `home`, which is imported then."""

    class Called(ModuleType):
        """A package that is also a function."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(home), name)(*args, **kwargs)

    sys.modules[package].__class__ = Called
