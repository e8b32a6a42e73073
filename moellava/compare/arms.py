# SPDX-License-Identifier: Apache-2.0
"""The arms of a comparison: what is trained from one and the same stage-2 folder, and for how long.

A sparse model is better than the dense one it was made from because it has trained longer, because each token is given
more arithmetic, or because of its experts. The dense controls tell these apart: one trains as many steps, one spends as
many floating-point operations, one as many seconds.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

from moellava.errors import UserError
from moellava.log import get_logger
from moellava.moe import MoESpec
from moellava.registry import Registry
from moellava.train.arguments import MoEArguments

logger = get_logger(__name__)

OWN = ("model_name_or_path", "output_dir", "moe_enable", "seed", "init_seed", "data_path")
"""Flags of train.py that a comparison sets itself."""


@dataclass
class Costs:
    """What the arms that have run cost.

    Args:
        steps: optimizer steps of the sparse arm.
        flops: arm -> floating-point operations of a record, forward and backward.
        speed: arm -> tokens per second.
    """

    steps: int
    flops: dict[str, float] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One way to go on from stage 2.

    Args:
        title: what the table calls it.
        is_sparse: whether MoE flags are for it.
        flags: of train.py, beside those that all arms share.
        length: optimizer steps over those of the sparse arm, where it does not train as many as the flags say.
    """

    title: str
    is_sparse: bool = False
    flags: tuple[str, ...] = ()
    length: Callable[[Costs], float] | None = None

    def steps(self, costs: Costs) -> int | None:
        """How many optimizer steps it trains, one at least. None: as many as the flags say."""
        if self.length is None:
            return None
        steps = costs.steps * self.length(costs)
        if steps < 0.5:
            logger.warning("%s: one step is more than the %.2f that its budget is worth.", self.title, steps)
        return max(round(steps), 1)


SPARSE, DENSE = "moe", "dense"
"""The arm that is compared, and the control that it is compared with first."""

ARMS: Registry[Arm] = Registry("arm")
ARMS.register(SPARSE, Arm("MoE", is_sparse=True))
ARMS.register(DENSE, Arm("dense, equal steps"))
ARMS.register("dense-flops", Arm("dense, equal FLOPs", length=lambda costs: costs.flops[SPARSE] / costs.flops[DENSE]))
ARMS.register("dense-time", Arm("dense, equal time", length=lambda costs: costs.speed[DENSE] / costs.speed[SPARSE]))
ARMS.register("lora", Arm("LoRA, equal steps", flags=("--lora_enable", "True")))


def in_order(names: Sequence[str]) -> dict[str, Arm]:
    """The arms that run, in the order in which they have to: the sparse one and its first control before those whose
    length depends on them. Raises UserError for an unknown one."""
    for name in names:
        ARMS[name]
    return {name: arm for name, arm in ARMS.items() if name in {*names, SPARSE, DENSE}}


def variants(given: Sequence[Sequence[str]]) -> dict[str, Arm]:
    """Arms that differ from one of `ARMS` by a few flags.

    Args:
        given: (name, arm, flags in one string) of each.

    Raises:
        UserError: a name that is taken or that no folder can have, an unknown arm, or a flag that is not for it.
    """
    found: dict[str, Arm] = {}
    for name, base, words in given:
        if not re.fullmatch(r"[\w.+-]*\w", name) or name in {*ARMS, *found, "stage2"}:
            raise UserError(f"--variant {name}: each has a name of its own, of letters, digits, '-', '.', '+' and '_'.")
        arm = ARMS[base]
        shared, sparse = split_flags(shlex.split(words))
        if sparse and not arm.is_sparse:
            raise UserError(f"--variant {name} {base}: {sparse[0]} is for a sparse model, which {base} is not.")
        found[name] = replace(arm, title=name, flags=(*arm.flags, *shared, *sparse))
    return found


def overridden(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Words of a command line with the values that `flags` give in place of its own."""
    return [*without(words, *(group[0] for group in grouped(flags))), *flags]


def grouped(words: Sequence[str]) -> list[list[str]]:
    """Words of a command line as flags with their values. Raises UserError where a value stands before any flag."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            name, is_joined, value = word.partition("=")
            groups.append([name.replace("-", "_").replace("__", "--", 1), *([value] if is_joined else [])])
        elif groups:
            groups[-1].append(word)
        else:
            raise UserError(f"{word!r} stands where a flag of train.py is expected: `-- --learning_rate 2e-5 …`.")
    return groups


def split_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What all arms are given, and what the sparse one is given beside.

    Args:
        words: flags of train.py, with their values.

    Raises:
        UserError: a flag that the comparison sets itself.
    """
    sparse = {item.name for item in (*fields(MoESpec), *fields(MoEArguments))}
    shared: list[str] = []
    alone: list[str] = []
    for name, *values in grouped(words):
        if name[2:] in OWN:
            raise UserError(f"{name}: `moellava compare` gives each run its own. Leave the flag out.")
        (alone if name[2:] in sparse else shared).extend([name, *values])
    return shared, alone


def without(words: Sequence[str], *names: str) -> list[str]:
    """Words of a command line but for some flags and their values."""
    return [word for group in grouped(words) if group[0] not in names for word in group]
