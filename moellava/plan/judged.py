# SPDX-License-Identifier: Apache-2.0
"""Which ways to lay a run out training takes: its own rules judge each, as in one of the processes that are planned."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from moellava.errors import UserError
from moellava.plan.model import Groups
from moellava.plan.report import settings_of
from moellava.train.conflicts import Flags, find_conflicts
from moellava.train.deepspeed.named import settings_named
from moellava.train.deepspeed.zero import refuse_zero3_experts
from moellava.train.hf_flags import find_problems
from moellava.train.memory import Layout
from moellava.train.parsing import defaults

DTYPES = ("bf16", "fp16")
"""Flags whose rules ask for this machine's GPU, which is another one."""


def judged(
    layouts: Sequence[Layout], fixed: Mapping[str, Any], groups: Groups, gpus: int, is_gpu: bool
) -> tuple[Layout, ...]:
    """Those that training takes.

    Args:
        fixed: flags that are not varied, by name.
        groups: all others.

    Raises:
        UserError: none of them, in training's own words.
    """
    problems = {layout: problems_of(settings_of(layout) | dict(fixed), groups, gpus, is_gpu) for layout in layouts}
    kept = tuple(layout for layout, found in problems.items() if not found)
    if problems and not kept:
        raise UserError("\n".join(dict.fromkeys(chain.from_iterable(problems.values()))))
    return kept


@contextmanager
def as_one_of(processes: int) -> Iterator[None]:
    """Inside, rules that ask for the number of processes are told that of the planned run."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(processes)
    try:
        yield
    finally:
        if before is None:
            del os.environ["WORLD_SIZE"]
        else:
            os.environ["WORLD_SIZE"] = before


def problems_of(flags: Mapping[str, Any], groups: Groups, gpus: int, is_gpu: bool) -> list[str]:
    """What training says of flags beside those of `groups`; [] where it takes them. See `judged`."""
    model, data, moe, training = *groups[:2], copy.copy(groups[2]), copy.copy(groups[3])
    named = dict(flags)
    if "deepspeed" in flags:
        named["deepspeed"] = settings_named(flags["deepspeed"])
    for name, value in {**dict.fromkeys(DTYPES, False), **named}.items():
        setattr(moe if hasattr(moe, name) else training, name, value)
    with as_one_of(gpus):
        found = find_problems(judgeable(named, is_gpu), defaults()) or find_conflicts(Flags(model, data, moe, training))
    if not found:
        try:
            refuse_zero3_experts(training.deepspeed, moe.moe_enable)
        except UserError as error:
            found = [str(error)]
    return found


def judgeable(flags: Mapping[str, Any], is_gpu: bool) -> dict[str, Any]:
    """Flags whose values can be judged here: not what is off, nor the dtype of a GPU, which this machine may lack."""
    return {name: value for name, value in flags.items() if value is not None and not (is_gpu and name in DTYPES)}
