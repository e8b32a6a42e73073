# SPDX-License-Identifier: Apache-2.0
"""Counters of a router for the log: load, entropy, dropped and dead experts, for image and text tokens.

Legend: N real tokens, E experts, k choices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moellava.moe.losses import Reduce, tally
from moellava.moe.router import Routing

PARTS = ("image", "text")


class RouterStats:
    """What one layer has routed since the counters were last reset. Adds on the device, so that nothing waits for it.

    Layout of the vector: choices per expert, the same for image tokens, the same for text tokens, then the sums of
    tokens, of router entropy (nats) and of choices that found their expert full.
    """

    def __init__(self, n_experts: int):
        self.n_experts = n_experts
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, routing: Routing, choices_E: Tensor) -> None:
        """Counts one forward, in which each expert was chosen so often."""
        choice, n_experts = routing.choice, self.n_experts
        prob_NE = routing.prob_NE
        load = choices_E.double()
        image = torch.zeros_like(load)
        if choice.image_N is not None:  # what other tokens chose goes behind the last expert
            of_image_Nk = torch.where(choice.image_N.unsqueeze(1), choice.expert_Nk, n_experts)
            image = tally(of_image_Nk.reshape(-1), n_experts + 1)[:n_experts].double()
        text = torch.zeros_like(load) if choice.image_N is None else load - image
        entropy = -torch.special.xlogy(prob_NE, prob_NE).sum().double()
        dropped = torch.zeros_like(entropy) if choice.kept_Nk is None else (~choice.kept_Nk).sum().double()
        tail = torch.stack([torch.full_like(entropy, len(prob_NE)), entropy, dropped])
        sums = torch.cat([load, image, text, tail])
        self._sums = sums if self._sums is None else self._sums + sums

    def vector(self, device: torch.device) -> Tensor:
        """The sums, [3E + 3] float64; zeros if nothing was counted."""
        if self._sums is None:
            return torch.zeros(3 * self.n_experts + 3, dtype=torch.float64, device=device)
        return self._sums

    def reset(self) -> None:
        """Forgets everything."""
        self._sums = None


def summarise(sums: Tensor, n_experts: int) -> dict[str, Any]:
    """One layer's counters in plain numbers.

    Returns:
        load: fraction of all choices per expert; load_image, load_text: of those of image and of text tokens (absent
        when the routing context named no images); entropy: mean entropy of a token's router in nats;
        dead: experts that no token chose; dropped: fraction of choices that found their expert full; tokens: N.
    """
    load, image, text = sums[: 3 * n_experts].view(3, n_experts)
    tokens, entropy, dropped = sums[3 * n_experts :].tolist()
    share = lambda part: (part / part.sum().clamp_min(1)).tolist()  # noqa: E731
    result: dict[str, Any] = {"load": share(load)}
    for name, part in zip(PARTS, (image, text), strict=True):
        if float(image.sum() + text.sum()):
            result[f"load_{name}"] = share(part)
    result["entropy"] = entropy / max(tokens, 1)
    result["dead"] = (load == 0).nonzero().flatten().tolist() if tokens else []
    result["dropped"] = dropped / max(float(load.sum()), 1)
    result["tokens"] = int(tokens)
    return result


def summarise_all(stats: list[tuple[int, RouterStats]], device: torch.device, reduce: Reduce | None) -> dict[str, Any]:
    """The counters of all layers, summed over ranks by one call of `reduce`: {"layer_3": {...}, ...}."""
    vectors = [stat.vector(device) for _, stat in stats]
    if reduce is not None and vectors:
        vectors = list(reduce(torch.cat(vectors)).split([len(v) for v in vectors]))
    return {
        f"layer_{index}": summarise(vector, stat.n_experts)
        for (index, stat), vector in zip(stats, vectors, strict=True)
    }
