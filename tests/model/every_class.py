# SPDX-License-Identifier: Apache-2.0
"""What the commands that try every class of transformers have in common: their flags, and short words for a table."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as hf

SHORT = {
    "sparse already": "sparse already",
    "do not add up": "no",
    "be cut or redrawn": "no",
    "is a plain MLP": "no MLP",
}
"""Words of a refusal to upcycle -> what the table says of it."""


def in_short(verdict: str) -> str:
    """A verdict on upcycling for a cell of the table."""
    return next((short for words, short in SHORT.items() if words in verdict), verdict)


def untrained(model: torch.nn.Module, projector: torch.nn.Module, loss: torch.Tensor) -> str:
    """What is wrong with a step of training: '' if its loss is finite and the projector gets a gradient."""
    loss.backward()
    gradients = [parameter.grad for parameter in projector.parameters()]
    model.zero_grad()
    learns = all(grad is not None and grad.isfinite().all() and grad.any() for grad in gradients)
    return "" if loss.isfinite() and learns else f"loss {loss.item()}, or a projector without a gradient"


def run(
    description: str | None,
    every: Callable[[], Sequence[str]],
    check_all: Callable[[Sequence[str]], list[Any]],
    table: Callable[[list[Any]], str],
    verdict: Callable[[Any], str],
) -> int:
    """Prints the table of the types that are named, or of all; 1 if anything that was composed does not hold.

    Args:
        description: of the command.
        every: all types.
        check_all: types -> rows, with their `problems`.
        table: rows in Markdown.
        verdict: of a row, to be counted.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_type", nargs="*")
    parser.add_argument("--all", action="store_true")
    args = parser.parse_args()
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    rows = check_all(every() if args.all else args.model_type)
    print(table(rows))
    print("\n" + ", ".join(f"{name}: {count}" for name, count in Counter(map(verdict, rows)).items()))
    return int(any(row.problems for row in rows))
