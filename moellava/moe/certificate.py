# SPDX-License-Identifier: Apache-2.0
"""What a conversion did to the model: logits of the dense and of the sparse model on the same probes.

Shapes: N real tokens of a probe, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moellava.files import write_json
from moellava.moe.modes import evaluating
from moellava.moe.spec import MoESpec
from moellava.moe.upcycle import set_routing_context, upcycle

FILE = "moe_certificate.json"

ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""What rounding may change, as a fraction of the largest logit. Measured: 1e-6 in fp32, 1e-2 in bf16. (Of fp64,
routers compute in fp32.)"""

Probe = dict[str, Tensor]
Forward = Callable[[Probe], Tensor]


class NotExactError(RuntimeError):
    """A recipe that keeps the dense model's output in theory has changed it: the conversion is broken."""


@dataclass
class Certificate:
    """Differences between a sparse model and the dense one that it was made from.

    Args:
        exact_in_theory: whether the recipe keeps the output (docs/MOE.md, 'Exactness').
        recipe: the `moe` section of the config.
        dtype: what both models computed in.
        tolerance: allowed difference where the recipe is exact, as a fraction of the largest logit.
        probes: name -> tokens, max_abs_delta (largest difference of a logit), largest_logit, kl (mean Kullback-Leibler
            divergence of the sparse model's next-token distribution from the dense one's, in nats).
    """

    exact_in_theory: bool
    recipe: dict[str, Any]
    dtype: str
    tolerance: float
    probes: dict[str, dict[str, float]]

    def check(self) -> Certificate:
        """Returns itself; raises NotExactError where an exact recipe is off by more than rounding."""
        for name, probe in self.probes.items():
            limit = self.tolerance * max(probe["largest_logit"], 1.0)
            if self.exact_in_theory and not probe["max_abs_delta"] <= limit:
                raise NotExactError(
                    f"Upcycling with init '{self.recipe['init']}' should keep the logits, but on the probe {name!r} "
                    f"they changed by up to {probe['max_abs_delta']:.3g} (rounding explains {limit:.3g}). "
                    "Please report this."
                )
        return self

    def lines(self) -> list[str]:
        """The certificate in a few lines for the log."""
        drops = "tokens beyond an expert's capacity are dropped" if self.recipe.get("drop_tokens") else ""
        why = drops or "what the experts compute starts different"
        theory = "exact in theory" if self.exact_in_theory else f"not exact: {why}"
        rows = [
            f"  {name}: max |Δlogit| {probe['max_abs_delta']:.2e} of {probe['largest_logit']:.3g}, KL {probe['kl']:.2e}"
            for name, probe in self.probes.items()
        ]
        return [f"Upcycled with init '{self.recipe['init']}' ({theory}, {self.dtype}):", *rows]

    def save(self, folder: str | Path) -> Path:
        """Writes `moe_certificate.json` into a folder; a reader sees the old file or the new one."""
        write_json(Path(folder) / FILE, asdict(self))
        return Path(folder) / FILE


def forward_of(model: nn.Module) -> Forward:
    """A model's logits [N, V] in fp32 at the real positions of a probe, in evaluation mode and without gradient."""

    def forward(probe: Probe) -> Tensor:
        set_routing_context(model)
        with evaluating(model), torch.no_grad():
            logits = model(**probe, use_cache=False).logits.float()
        return logits[probe["attention_mask"].bool()]

    return forward


def dense_logits(forward: Forward, probes: Mapping[str, Probe]) -> dict[str, Tensor]:
    """The dense model's side; call it before the conversion."""
    return {name: forward(probe) for name, probe in probes.items()}


def compare(
    forward: Forward, probes: Mapping[str, Probe], dense: Mapping[str, Tensor], spec: MoESpec, dtype: torch.dtype
) -> Certificate:
    """The certificate of a converted model.

    Args:
        forward: of the sparse model.
        probes, dense: the probes, and what `dense_logits` gave for them.
        spec: the recipe.
        dtype: of the weights.
    """
    measured = {}
    for name, probe in probes.items():
        before, after = dense[name], forward(probe)
        log_before, log_after = before.log_softmax(-1), after.log_softmax(-1)
        measured[name] = {
            "tokens": len(before),
            "max_abs_delta": float((after - before).abs().max()),
            "largest_logit": float(before.abs().max()),
            "kl": max(float((log_before.exp() * (log_before - log_after)).sum(-1).mean()), 0.0),
        }
    name = str(dtype).removeprefix("torch.")
    return Certificate(spec.is_exact(), spec.to_config(), name, ROUNDING[dtype], measured)


def upcycle_certified(
    model: nn.Module, spec: MoESpec, probes: Mapping[str, Probe], share_copies: bool = False
) -> Certificate:
    """`upcycle` with the native engine, and its certificate, checked. Convert to another engine afterwards.

    Args:
        model: a dense model; it is sparse afterwards.
        spec: options.
        probes: name -> inputs of the model, with an attention mask.
        share_copies: see `upcycle`.

    Raises:
        NotExactError: an exact recipe changed the logits by more than rounding.
    """
    forward, dtype = forward_of(model), next(model.parameters()).dtype
    dense = dense_logits(forward, probes)
    upcycle(model, spec, share_copies=share_copies)
    return compare(forward, probes, dense, spec, dtype).check()
