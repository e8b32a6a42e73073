# SPDX-License-Identifier: Apache-2.0
"""Which experts of a sparse model read the pictures and the words of a prompt, and wrote its answer.

Legend: B rows, L positions of a forward, T = B × L, D hidden, E experts, k choices, P parts (`PARTS`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moellava.moe import moe_layers
from moellava.moe.layer import RoutedMLP
from moellava.moe.router import select

PARTS = ("pictures", "words", "answer")

PADDING = -1

Shares = dict[int, dict[str, list[float]]]
"""Decoder layer -> part -> the share of its choices that each expert has; parts without tokens are left out."""


class ExpertCounts:
    """Choices of each row of a batch.

    Args:
        model: a sparse one; of a dense one, nothing is counted.
        rows: B.
        placeholders: tokens that stand for pictures.
    """

    def __init__(self, model: nn.Module, rows: int, placeholders: Sequence[int]):
        self.model = model
        self.placeholders = torch.tensor(sorted(placeholders))
        self.layers = moe_layers(model)
        self.counts = {
            index: torch.zeros(rows, len(PARTS), layer.n_experts, device=layer.router.weight.device)
            for index, layer in self.layers
        }
        self.part_BL: Tensor | None = None

    @contextmanager
    def counting(self, over: Callable[[], Sequence[bool]]) -> Iterator[None]:
        """Counts what the model is given inside.

        Args:
            over: whether each row's answer has ended: what is fed to it from then on is padding.
        """
        is_prompt = True

        def note_parts(_: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
            nonlocal is_prompt
            ids_BL = inputs["input_ids"]
            self.part_BL = self._prompt_parts(ids_BL, inputs.get("attention_mask")) if is_prompt else None
            if self.part_BL is None:
                over_B1 = torch.tensor(list(over()), device=ids_BL.device)[:, None]
                answer = PARTS.index("answer")
                self.part_BL = torch.full_like(ids_BL, answer).masked_fill(over_B1, PADDING)
            is_prompt = False

        hooks = [self.model.register_forward_pre_hook(note_parts, with_kwargs=True)]
        hooks += [layer.register_forward_pre_hook(self._counter(index)) for index, layer in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def shares(self, row: int) -> Shares:
        """What a row's tokens chose."""
        found: Shares = {}
        for index, counts in self.counts.items():
            parts = zip(PARTS, counts[row].double().cpu(), strict=True)
            found[index] = {name: (count_E / count_E.sum()).tolist() for name, count_E in parts if count_E.sum()}
        return found

    def _prompt_parts(self, ids_BL: Tensor, mask_BL: Tensor | None) -> Tensor:
        is_picture = torch.isin(ids_BL, self.placeholders.to(ids_BL.device))
        part_BL = torch.where(is_picture, PARTS.index("pictures"), PARTS.index("words"))
        return part_BL if mask_BL is None else part_BL.masked_fill(mask_BL == 0, PADDING)

    def _counter(self, index: int) -> Callable[..., None]:
        @torch.no_grad()
        def count(layer: RoutedMLP, args: tuple[Tensor, ...]) -> None:
            x_BLD = args[0]
            if self.part_BL is None or x_BLD.shape[:2] != self.part_BL.shape:
                return  # not the decoder's own tokens
            logit_TE = layer.router(x_BLD.reshape(-1, x_BLD.shape[-1]))
            expert_Tk = select(logit_TE, logit_TE.softmax(1), layer.router.bias, layer.spec, False)
            part_T = self.part_BL.reshape(-1)
            row_T = torch.arange(len(self.part_BL), device=part_T.device).repeat_interleave(self.part_BL.shape[1])
            real = part_T != PADDING
            place_Tk = (row_T * len(PARTS) + part_T)[real, None] * layer.n_experts + expert_Tk[real]
            counts = self.counts[index]
            counts += torch.bincount(place_Tk.reshape(-1), minlength=counts.numel()).view_as(counts)

        return count
