# SPDX-License-Identifier: Apache-2.0
"""Limits for chat templates, which come with folders from anywhere: none loops for ever, none fills the memory.

transformers renders templates in a sandbox that keeps them from the interpreter, and not from its time and memory. Its
sandbox is replaced by one that counts. What makes work in Jinja is little, and each of it is counted here:

* a loop: the iterable of every `for` is wrapped when a template is compiled;
* a call, of a macro, a method or `loop(…)` alike, for recursion;
* text that grows: operators, `~`, filters, methods, `{% set %}` blocks and what is written out.

A number beyond a limit is refused before it is an argument (`'x'.center(10**10)`), and so is a product of two large
texts (`replace`, `join`).
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

STEPS = 300_000
"""Turns of loops, and calls, in one rendering."""

SIZE = 50_000_000
"""Characters that one rendering may make, and the longest text or list that an operation may give."""

NUMBER = 1_000_000
"""Largest number that is an argument, or a width in a format."""

BITS = 4096
"""Largest whole number that is calculated with."""

WIDTH = re.compile(r"\d{6,}|%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{")
"""Widths in a format string: long numbers, and those that are taken from arguments."""

SECONDS = 5.0
"""Time of the processor for one rendering."""

LOOK_EVERY = 31
"""The clock is looked at where these bits of the count of steps are 0."""

ENTRY = 64
"""Characters that an entry of a list counts for, with what stands around it."""

BREAKS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError)
"""What a template may make Python raise, beside Jinja's own errors, and TypeError and ValueError."""

CHEAP = {"length", "count", "first", "last", "default", "d", "attr", "random", "selectattr", "rejectattr", "map"}
"""Filters that look at no more of a value than there is of it at the top."""

_rendering = threading.local()


class Spent:
    """What a rendering has used up so far."""

    def __init__(self) -> None:
        self.steps = self.size = 0
        self.until = time.thread_time() + SECONDS

    def step(self, count: int = 1) -> None:
        """Counts turns and calls. Raises SecurityError beyond `STEPS`."""
        self.steps += count
        if self.steps > STEPS:
            raise SecurityError(f"it takes more than {STEPS:,} turns of loops and calls, so that it may never end")
        if self.steps & LOOK_EVERY == 0 and time.thread_time() > self.until:
            raise SecurityError(f"it takes longer than {SECONDS:.0f} s")

    def made(self, size: int) -> None:
        """Counts characters and entries. Raises SecurityError beyond `SIZE`."""
        self.size += size
        if self.size > SIZE:
            raise SecurityError(f"it makes more than {SIZE:,} characters of text")


def spent() -> Spent:
    """Of the rendering that this thread is in."""
    return _rendering.spent


def size_of(value: Any, limit: int = SIZE) -> int:
    """Characters that a value would be as text, roughly, counting what is in it as often as it stands there; it stops
    counting beyond a limit."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if not isinstance(value, list | tuple | set | frozenset):
        return 1
    total = ENTRY * len(value)
    for entry in value:
        if total <= limit:
            total += size_of(entry, limit - total)
    return total


def checked(value: Any) -> Any:
    """A result, counted. Raises SecurityError where it is too large."""
    if isinstance(value, str | bytes | list | tuple | dict):
        spent().made(len(value))
    elif isinstance(value, int) and value.bit_length() > BITS:
        raise SecurityError(f"it calculates with numbers of more than {BITS:,} bits")
    return value


def refuse_growth(name: str, args: Iterable[Any]) -> None:
    """Raises SecurityError for arguments that may make a result larger than the limit."""
    sizes = [0, 0]
    for value in args:
        if isinstance(value, int) and abs(value) > NUMBER:
            raise SecurityError(f"it gives {name} a number beyond {NUMBER:,}")
        sized = isinstance(value, str | bytes | list | tuple)
        sizes.append(len(value) if sized else abs(value) if isinstance(value, int) else size_of(value))
    one, other = sorted(sizes)[-2:]
    if one * other > 20 * SIZE:
        raise SecurityError(f"it gives {name} texts or numbers that may make more than {SIZE:,} characters")


def refuse_widths(name: str, text: Any) -> None:
    """Raises SecurityError for a format string that pads to great widths, or to such as its arguments say."""
    if isinstance(text, str) and WIDTH.search(text):
        raise SecurityError(f"it formats with {name} to a width that is not limited")


def bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or a test whose arguments and result are checked."""
    passed = {key: value for key, value in getattr(function, "__dict__", {}).items() if key.startswith("jinja_")}

    def limited(*args: Any, **options: Any) -> Any:
        values = [*args, *options.values()]
        refuse_growth(name, values)
        if name == "format":
            refuse_widths(name, next((value for value in args if isinstance(value, str)), ""))
        if name not in CHEAP:
            spent().made(sum(size_of(value) for value in values))
        return checked(function(*args, **options))

    limited.__dict__.update(passed)  # how Jinja passes its context
    return limited


def _turns(iterable: Any, weight: int) -> Iterator[Any]:
    """The iterable of a loop, counted; `weight`: characters that a turn writes."""
    counts = spent()
    for entry in iterable:
        counts.step()
        counts.made(weight)
        yield entry


def _joined(parts: list[Any]) -> str:
    """`a ~ b`."""
    spent().made(sum(size_of(part) for part in parts))
    return "".join(map(str, parts))


COUNTED: dict[str, Callable[..., Any]] = {"_turns": _turns, "_joined": _joined, "_made": checked}
"""Filters that a template is given when it is compiled."""


class Filters(dict[str, Callable[..., Any]]):
    """Filters that are bounded, whoever adds them."""

    def __init__(self, filters: dict[str, Callable[..., Any]]):
        super().__init__(COUNTED)
        for name, function in filters.items():
            self[name] = function

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        super().__setitem__(name, bounded(name, function))


class _Counting(NodeTransformer):
    """Puts the filters of `COUNTED` into a template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  # as the library's dispatch names it
        self.generic_visit(node)
        weight = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.iter = _filter("_turns", node.iter, nodes.Const(weight))
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter("_made", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter("_joined", nodes.List(node.nodes))

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.filter = _filter("_made", node.filter)
        return node


def _filter(name: str, value: Any, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(args), [], None, None)


@pass_context  # or it would be called, uncounted, for what is constant
def _written(context: Context, value: Any) -> Any:
    """What is written out, counted."""
    spent().made(len(value) if type(value) is str else size_of(value))
    return value


class LimitedTemplate(Template):
    """A template whose renderings are counted, each from zero."""

    def render(self, *args: Any, **options: Any) -> str:
        """The text. Raises TemplateError: see `LimitedEnvironment`."""
        return "".join(self.generate(*args, **options))

    def generate(self, *args: Any, **options: Any) -> Iterator[str]:
        """The text in pieces."""
        before, _rendering.spent = getattr(_rendering, "spent", None), Spent()
        try:
            yield from super().generate(*args, **options)
        except BREAKS as error:
            raise TemplateRuntimeError(f"{type(error).__name__}: {error}") from error
        finally:
            _rendering.spent = before


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which time and memory are limited. Raises SecurityError, a TemplateError, beyond that."""

    template_class = LimitedTemplate
    intercepted_binops = frozenset({"+", "*", "**", "%", "-", "//", "/"})

    def __init__(self, **options: Any):
        # Nothing is computed while a template is compiled, where nothing would be counted.
        super().__init__(**options, finalize=_written, optimized=False)
        self.filters = Filters(self.filters)
        del self.globals["lipsum"]  # random texts

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> Any:
        counting = _Counting().visit(source)
        counting.set_environment(self)
        return super()._generate(_with_lines(counting), *args, **options)

    def call(self, __context: Any, __obj: Any, *args: Any, **options: Any) -> Any:
        """Calls what a template calls. See `SandboxedEnvironment`."""
        counts, own = spent(), getattr(__obj, "__self__", None)
        counts.step()
        name = getattr(__obj, "__name__", None) or type(__obj).__name__
        if not isinstance(__obj, Macro):
            values = [*args, *options.values()]
            refuse_growth(name, [own, *values] if isinstance(own, str) else values)
            if isinstance(own, str) or name in ("format", "format_map"):
                counts.made(size_of(own) + sum(size_of(value) for value in values))
        return checked(super().call(__context, __obj, *args, **options))

    def wrap_str_format(self, value: Any) -> Any:
        """`str.format`, whose widths are limited. See `SandboxedEnvironment`."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            refuse_widths("format", value.__self__)
        return wrapped

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Calculates. See `SandboxedEnvironment`."""
        counts = spent()
        counts.step()
        if operator == "*":
            for value, factor in ((left, right), (right, left)):
                if isinstance(value, str | bytes | list | tuple) and isinstance(factor, int):
                    counts.made(len(value) * max(factor, 0))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > BITS:
                raise SecurityError(f"it calculates with numbers of more than {BITS:,} bits")
        elif operator == "%" and isinstance(left, str):
            refuse_widths(operator, left)
            counts.made(size_of(right))
        return checked(super().call_binop(context, operator, left, right))


def _with_lines(template: nodes.Template) -> nodes.Template:
    """The template, whose new nodes have the lines of those around them, for messages."""

    def fill(node: nodes.Node, line: int) -> None:
        node.lineno = node.lineno or line
        for child in node.iter_child_nodes():
            fill(child, node.lineno)

    fill(template, 1)
    return template


def limit_templates() -> None:
    """Has transformers compile every chat template under these limits, whoever renders it."""
    chat_template_utils.ImmutableSandboxedEnvironment = LimitedEnvironment
