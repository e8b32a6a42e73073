# SPDX-License-Identifier: Apache-2.0
"""Whether a model keeps samples of one row apart: found out on the model and the data of a run, before its first step.

Some do not: positions that are counted from images (Qwen2-VL), states that run on through a row (Mamba), attention in
both directions over a row's images. None of them raises anything; the loss is only another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moellava.constants import IGNORE_INDEX
from moellava.data.collate import PLACEHOLDERS, UNREADABLE
from moellava.data.packing import PackedDataset, joined
from moellava.data.places import PLACES, Places
from moellava.errors import UserError
from moellava.log import get_logger
from moellava.moe.decoder import FAILURES
from moellava.moe.modes import evaluating
from moellava.train.loss import supervised_positions

PROBED = 64
"""Samples from which those that are tried out are taken."""

OFF = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far hidden states of a packed row may be from those of its samples in rows of their own, as a fraction of their
norm: rounding."""


HEARD = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""How far those of a sample may move when another one of its row is changed: the shapes are the same, so that dense
layers round alike; experts have other rows beside them."""


def require_exact_packing(trainer: Any) -> None:
    """Raises UserError unless a row of several samples gives what its samples give in rows of their own. Collective.

    Args:
        trainer: a `StageTrainer`, wrapped and before its first step.
    """
    dataset = trainer.train_dataset
    if not isinstance(dataset, PackedDataset):
        return
    if trainer.is_moe and trainer.vlm.spec.router_balance == "first_choice":
        raise UserError(
            "--packing True and --router_balance first_choice (--moe_preset moe-llava) conflict: that loss counts the "
            "padding of every row, of which packed rows have less. Leave --packing out, or give another balance."
        )
    samples = [dataset.dataset[number] for number in probed(dataset.dataset)]
    samples = [sample for sample in samples if UNREADABLE not in sample]
    if len(samples) < 2:
        get_logger().warning("--packing True: there are no two samples to try it out on.")
        return
    why = difference(trainer, samples)
    if why:
        raise UserError(
            f"--packing True: {trainer.vlm.source} ({type(trainer.model).__name__}) does not keep samples of one row "
            f"apart: {why}. Leave the flag out; --group_by_modality_length True saves padding, too."
        )


def probed(dataset: Any) -> list[int]:
    """Samples of a data set that are tried out in one row: short ones, with media and without where there are both, and
    one with media behind them. Of the first ones, for all processes must take the same."""
    lengths, shows = dataset.lengths, dataset.shows_media
    order = sorted(range(min(len(lengths), PROBED)), key=lengths.__getitem__)
    shown, others = ([number for number in order if bool(shows[number]) is wanted] for wanted in (True, False))
    return [*shown[:1], *others[:1], *(shown[1:] or others[1:])[:1]]


@torch.no_grad()
def difference(trainer: Any, samples: Sequence[dict[str, Any]]) -> str | None:
    """What is wrong with samples that share a row; None: nothing.

    Args:
        trainer: see `require_exact_packing`.
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
    dtype, first = next(trainer.model.parameters()).dtype, int((samples[0]["labels"][1:] != IGNORE_INDEX).sum())
    off, heard = distance(together, apart), distance(beside[first:], together[first:])
    for found, allowed, what in (
        (off, OFF[dtype], "off"),
        (heard, HEARD[dtype], "moved by another sample of the row"),
    ):
        if not found <= allowed:
            return f"hidden states are {found:.1g} of their norm {what}, where {allowed:.0e} is rounding"
    get_logger().info("Packing is exact for this model: hidden states are within %.0e of their norm.", off)
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
    if places.is_packed:
        del inputs["attention_mask"]
    with evaluating(trainer.model_wrapped):
        return trainer.head.seen(lambda: trainer.model_wrapped(**inputs, use_cache=False), supervised)
