# SPDX-License-Identifier: Apache-2.0
"""Whether a model keeps samples of one row apart: found out on the model and the data of a run, before its first step.

Some do not: images that are looked for along all rows (Qwen-VL, Llama 3.2 Vision), states that run on through a row
(Mamba), attention in both directions over a row's images. Few of them raise anything; the loss is only another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moellava.data.collate import PLACEHOLDERS, UNREADABLE
from moellava.data.packing import PackedDataset, joined
from moellava.data.places import PLACES, Places
from moellava.errors import UserError
from moellava.log import get_logger
from moellava.moe.decoder import FAILURES
from moellava.moe.modes import drops_rows, evaluating
from moellava.train.loss import supervised_positions
from moellava.train.own_positions import share_rows

PROBED = 64
"""Samples with media, and without, from which those that are tried out are taken."""

OFF = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far hidden states of a packed row may be from those of its samples in rows of their own, as a fraction of their
norm: rounding."""


HEARD = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""How far those of a sample may move when another one of its row is changed: the shapes are the same, so that dense
layers round alike; experts have other rows beside them."""


def settle_rows(trainer: Any) -> None:
    """Decides whether the samples of a batch lie end to end in one row: where that changes no loss. Collective.

    Args:
        trainer: a `StageTrainer`, wrapped and before its first step.

    Raises:
        UserError: --packing True, and a row of several samples does not give what they give in rows of their own.
    """
    dataset = trainer.train_dataset
    is_packed = isinstance(dataset, PackedDataset)
    if is_packed and counts_padding(trainer):
        raise UserError(
            "--packing True and --router_balance first_choice (--moe_preset moe-llava) conflict: that loss counts the "
            "padding of every row, of which packed rows have less. Leave --packing out, or give another balance."
        )
    may_join = lets_join(trainer)
    if not is_packed and not may_join:
        return
    apart = dataset.dataset if is_packed else dataset
    samples = [apart[number] for number in probed(apart)]
    samples = [sample for sample in samples if UNREADABLE not in sample]
    if len(samples) < 2:
        if is_packed:
            get_logger().warning("--packing True: there are no two samples to try it out on.")
        return
    trainer.attention.is_on = may_join
    why = difference(trainer, samples)
    dataset.in_one_row = may_join and why is None
    if why and may_join:
        trainer.attention.is_on = False
        why = difference(trainer, samples) if is_packed else why
    if why and is_packed:
        raise UserError(
            f"--packing True: {trainer.vlm.source} ({type(trainer.model).__name__}) does not keep samples of one row "
            f"apart: {why}. Leave the flag out; --group_by_modality_length True saves padding, too."
        )
    if why:
        get_logger().info("Rows are padded, for samples do not keep apart in one: %s.", why)


def counts_padding(trainer: Any) -> bool:
    """Whether the loss of a run counts how padding is routed."""
    return trainer.is_moe and trainer.vlm.spec.router_balance == "first_choice"


def lets_join(trainer: Any) -> bool:
    """Whether flags and model let the samples of a batch lie in a single row.

    Args:
        trainer: see `settle_rows`; or what a plan has in its place (`moellava.plan.rows`).
    """
    return not counts_padding(trainer) and may_share_one_row(trainer)


def may_share_one_row(trainer: Any) -> bool:
    """Whether the samples of a batch may be tried out in a single row, with attention over each of them.

    Not where a row is dropped as a whole (stochastic depth), or noise is added by its length (NEFTune). A dropout draws
    for each number by itself, whatever the row. Compiled models would be compiled anew for each batch.
    """
    args = trainer.args
    several = args.per_device_train_batch_size > 1 or isinstance(trainer.train_dataset, PackedDataset)
    counts_rows = args.neftune_noise_alpha or drops_rows(trainer.model.get_decoder())
    return several and not counts_rows and not args.torch_compile and trainer.attention.suits(args.model_max_length)


def probed(dataset: Any) -> list[int]:
    """Samples of a data set that are tried out in one row: short ones, with media and without where there are both, and
    the longest with media behind them. Of the first ones of each sort, for all processes must take the same."""
    lengths, shows = dataset.positions, dataset.with_media
    sorts = (np.flatnonzero(shows == wanted)[:PROBED].tolist() for wanted in (True, False))
    shown, others = (sorted(numbers, key=lengths.__getitem__) for numbers in sorts)
    return [*shown[:1], *others[:1], *(shown[1:][-1:] or others[1:2])]


@torch.no_grad()
def difference(trainer: Any, samples: Sequence[dict[str, Any]]) -> str | None:
    """What is wrong with samples that share a row; None: nothing.

    Args:
        trainer: see `settle_rows`.
        samples: two or more.
    """
    rows: list[Tensor] = []
    for batch in (samples, [joined(samples)], [joined([changed(samples[0]), *samples[1:]])]):
        try:
            rows.append(hidden_rows(trainer, trainer.data_collator(batch)).float())
        except FAILURES as error:
            return f"it stops with {type(error).__name__}: {error}"
    apart, together, beside = rows
    if apart.shape != together.shape:
        return f"{len(apart)} trained tokens become {len(together)}"
    dtype, first = next(trainer.model.parameters()).dtype, len(trainer.data_collator(samples[:1])[PLACES]["supervised"])
    off, heard = distance(together, apart), distance(beside[first:], together[first:])
    for found, allowed, what in (
        (off, OFF[dtype], "off"),
        (heard, HEARD[dtype], "moved by another sample of the row"),
    ):
        if not found <= allowed:
            return f"hidden states are {found:.1g} of their norm {what}, where {allowed:.0e} is rounding"
    get_logger().info("Samples keep apart in one row: hidden states are within %.0e of their norm.", off)
    return None


def distance(found: Tensor, wanted: Tensor) -> float:
    """How far rows [N, D] are from others at most, as a fraction of their norm."""
    return float(((found - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-30)).max())


def changed(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample with the words of another order, and its media where they were."""
    ids = sample["input_ids"].clone()
    is_text = torch.tensor([token not in PLACEHOLDERS for token in ids.tolist()])
    ids[is_text] = ids[is_text].flip(0)
    return sample | {"input_ids": ids}


def hidden_rows(trainer: Any, batch: dict[str, Any]) -> Tensor:
    """What the head is given at the supervised positions of a batch, [N, D]."""
    inputs = trainer._prepare_inputs(batch)
    inputs = {name: value for name, value in inputs.items() if isinstance(value, Tensor)} | {PLACES: inputs[PLACES]}
    places = Places(**inputs.pop(PLACES))
    supervised = supervised_positions(inputs.pop("labels"), places.supervised)
    trainer.tell_routers(inputs, places)
    with evaluating(trainer.model_wrapped), trainer.attention:
        if places.is_packed:
            share_rows(trainer.model, inputs, places.lengths)
            trainer.attention.tell(places.lengths)
        return trainer.head.seen(lambda: trainer.model_wrapped(**inputs, use_cache=False), supervised)
