# SPDX-License-Identifier: Apache-2.0
"""The fused loss of Liger beside ours and full logits: how far loss and gradients are from those in fp64.

    python benchmarks/liger.py --json liger.json      # --rows, --hidden, --vocabulary

Liger's kernels are Triton's, which run without a GPU by its interpreter: the same arithmetic, slowly. So numbers are
compared, and no times. Liger cuts the rows into V / D pieces or so; ours is given as many.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from peers import installed
from torch import Tensor
from torch.nn import functional

from moellava.train.loss import LinearLoss

PACKAGES = ("liger-kernel==0.8.5", "triton==3.9.0")
DTYPES = (torch.float32, torch.bfloat16)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden states [N, D], weight of the head [V, D], labels [N]) -> the summed cross-entropy, a scalar."""


def full(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """By all logits at once, as transformers' models have it."""
    logits_NV = functional.linear(hidden_ND, weight_VD)
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    return functional.cross_entropy(logits_NV.to(wide), target_N, reduction="sum")


def ours(rows: int) -> Loss:
    """In chunks of so many rows."""
    return lambda hidden_ND, weight_VD, target_N: LinearLoss.apply(
        hidden_ND, weight_VD, None, target_N, rows, 0.0, hidden_ND.dtype
    )


def ligers() -> Loss:
    """Liger's, by Triton's interpreter. Raises ImportError."""
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    installed(*PACKAGES)
    function = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    fused = function.LigerFusedLinearCrossEntropyFunction

    def loss(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
        return fused.apply(hidden_ND, weight_VD, target_N, None, None, -100, 0.0, 0.0, "sum")[0]

    return loss


def computed(loss: Loss, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> tuple[Tensor, ...]:
    """The loss, and its gradients by hidden states and weight; as fp64."""
    hidden_ND, weight_VD = (tensor.detach().clone().requires_grad_() for tensor in (hidden_ND, weight_VD))
    value = loss(hidden_ND, weight_VD, target_N)
    value.backward()
    return tuple(tensor.detach().double() for tensor in (value, hidden_ND.grad, weight_VD.grad))


def off(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """How far each is from the exact one, as a share of it (by the 2-norm)."""
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--rows", type=int, default=512, help="N, supervised positions")
    parser.add_argument("--hidden", type=int, default=256, help="D")
    parser.add_argument("--vocabulary", type=int, default=16_384, help="V")
    arguments = parser.parse_args()
    n_rows, hidden, words = arguments.rows, arguments.hidden, arguments.vocabulary
    pieces = max(words // hidden, 1)
    losses = {"full logits": full, "ours": ours(max(n_rows // pieces, 1)), "Liger": ligers()}
    torch.manual_seed(0)
    # As a model has them after its last norm, and a head as it is initialized.
    hidden_ND, weight_VD = torch.randn(n_rows, hidden), torch.randn(words, hidden) * 0.02
    target_N = torch.randint(0, words, (n_rows,))
    rows = []
    for dtype in DTYPES:
        inputs = hidden_ND.to(dtype), weight_VD.to(dtype)
        exact = computed(full, *(tensor.double() for tensor in inputs), target_N)
        for name, loss in losses.items():
            errors = off(computed(loss, *inputs, target_N), exact)
            row = {"dtype": str(dtype).rpartition(".")[2], "way": name, "pieces": pieces}
            rows.append(row | dict(zip(("loss", "of_hidden", "of_weight"), errors, strict=True)))
            print("{dtype:9} {way:12} loss {loss:.1e}  gradients {of_hidden:.1e} {of_weight:.1e}".format(**rows[-1]))
    if arguments.json:
        machine = {"torch": torch.__version__, "packages": PACKAGES}
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
