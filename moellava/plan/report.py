# SPDX-License-Identifier: Apache-2.0
"""A plan as text: one line for each way to lay a run out, and the flags of the cheapest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moellava.plan.plan import Row, cheapest
from moellava.train.memory import Layout, in_units

FILES = {(1, False): "zero1", (2, False): "zero2", (2, True): "zero2_offload", (3, False): "zero3"}
"""(ZeRO stage, offloaded) -> the name of its settings."""

PARTS = ("weights", "gradients", "optimizer", "activations", "buckets", "gathered")


def best_of_each(rows: Iterable[Row], memory: float) -> list[Row]:
    """For every layout its cheapest row that fits into so many GB, or else its smallest; the cheapest of all first."""
    found = []
    by_layout: dict[Layout, list[Row]] = {}
    for row in rows:
        by_layout.setdefault(row.layout, []).append(row)
    for own in by_layout.values():
        found.append(cheapest(own, memory) or min(own, key=lambda row: row.total))
    chosen = cheapest(found, memory)
    return sorted(found, key=lambda row: (row is not chosen, row.total > memory * 1e9, -row.bound, row.total))


def table(rows: Sequence[Row], memory: float) -> list[str]:
    """The rows as aligned text. Bytes of one process, tokens per second of all together."""
    head = ["engine", "ep_size", "batch", "checkpoints", *PARTS, "in all", "fits", "tokens/s: FLOPs", "bandwidth"]
    cells = [head, *(_cells(row, memory) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def _cells(row: Row, memory: float) -> list[str]:
    parts = [in_units(row.memory[part]) if row.memory.get(part) else "-" for part in PARTS]
    fits = "yes" if row.samples and row.total <= memory * 1e9 else "no"
    if not row.samples:  # what it holds is too much already
        return [called(row.layout), str(row.layout.ep_size), "-", "-", *parts, in_units(row.total), fits, "-", "-"]
    speeds = [f"{bound:,.0f}" for bound in (row.flops_bound, row.bandwidth_bound)]
    checkpoints = "yes" if row.checkpointing else "no"
    many = [str(row.layout.ep_size), str(row.samples), checkpoints]
    return [called(row.layout), *many, *parts, in_units(row.total), fits, *speeds]


def called(layout: Layout) -> str:
    """The engine in a few letters."""
    if layout.fsdp > 1:
        return "FSDP2" if layout.fsdp == layout.processes else f"FSDP2 of {layout.fsdp}"
    if not layout.deepspeed:
        return "native"
    return f"ZeRO-{layout.zero}" + (" offload" if layout.offload else "")


def settings_of(layout: Layout) -> dict[str, Any]:
    """The flags of training that make a run one of this layout, by name, where settings of this package do."""
    flags: dict[str, Any] = {}
    if layout.deepspeed and (layout.zero, layout.offload) in FILES:
        flags["deepspeed"] = FILES[layout.zero, layout.offload]
    if layout.fsdp > 1:
        flags["fsdp_size"] = layout.fsdp
    if layout.ep_size > 1:
        flags["ep_size"] = layout.ep_size
    return flags


def flags_of(row: Row) -> list[str]:
    """The flags of training that make a run one such row."""
    flags = {"per_device_train_batch_size": row.samples, **settings_of(row.layout)}
    if row.checkpointing:
        flags["activation_checkpointing"] = True
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def launcher(gpus: int, per_host: int) -> str:
    """The beginning of the command."""
    if gpus == 1:
        return "python"  # a launcher would have gradients summed, over one process, in a second copy
    hosts, left = divmod(gpus, per_host)
    if hosts == 0 or (hosts == 1 and not left):
        return f"torchrun --nproc-per-node {gpus}"
    where = "--rdzv-backend c10d --rdzv-endpoint HOST:29500"
    return f"torchrun --nnodes {hosts + bool(left)} --nproc-per-node {per_host} {where}"
