# SPDX-License-Identifier: Apache-2.0
"""Compares a package's expert kernel with `fused`: outputs and all gradients; exit status 1 where they differ.

    python scripts/checks/kernel_parity.py NAME [--device DEVICE] [--output FILE]

Prints a row for each sort of experts and of rows, and writes the rows as JSON. Needs the package, and a GPU or Triton's
interpreter.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moellava.moe.experts import run_experts, sort_by_expert
from moellava.moe.kernels import KERNELS, Dispatch, require_kernel
from moellava.moe.places import lie_together
from moellava.moe.router import Choice

LARGEST = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Norm of a difference by that of what `fused` says in fp32: rounding."""

TOKENS, HIDDEN, WIDTH, EXPERTS, CHOICES = 150, 72, 100, 5, 2
"""More rows than a block of the kernels has, and sizes that are no multiples of one."""


class Gated(nn.Module):
    """(silu(x w1ᵀ) × (x w3ᵀ)) w2ᵀ, as Llama's."""

    def __init__(self, bias: bool):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(HIDDEN, WIDTH, bias), nn.Linear(HIDDEN, WIDTH, bias)
        self.down_proj, self.act_fn = nn.Linear(WIDTH, HIDDEN, bias), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class GatedInOne(nn.Module):
    """The same with w1 above w3 in one linear, as Phi-3's."""

    def __init__(self, bias: bool):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(HIDDEN, 2 * WIDTH, bias), nn.Linear(WIDTH, HIDDEN, bias)
        self.activation_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


class Plain(nn.Module):
    """gelu(x w1ᵀ) w2ᵀ, as Phi-2's."""

    def __init__(self, bias: bool):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(HIDDEN, WIDTH, bias), nn.Linear(WIDTH, HIDDEN, bias)
        self.activation_fn = nn.GELU("tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


def rows_of(kind: str, device: torch.device) -> tuple[Dispatch, Tensor]:
    """Rows sorted by expert, and the gates that they come from: 'all', 'padded' (some tokens are none) or 'full' (some
    experts take no more). One expert has none."""
    torch.manual_seed(1)
    token_N = torch.arange(0, TOKENS, 3) if kind == "padded" else None
    count = TOKENS if token_N is None else len(token_N)
    expert_Nk = torch.rand(count, EXPERTS - 1).argsort(1)[:, :CHOICES]
    kept_Nk = torch.rand(count, CHOICES) > 0.2 if kind == "full" else None
    choice = Choice(token_N, expert_Nk, kept_Nk, torch.zeros(count, dtype=torch.long), None)
    gate_Nk = torch.rand(count, CHOICES).requires_grad_()
    on_device = Choice(*(None if t is None else t.to(device) for t in vars(choice).values()))
    return sort_by_expert(on_device, gate_Nk.to(device), EXPERTS, leave_out=True), gate_Nk


def results(kernel: str, mlp: type, bias: bool, kind: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Output, and gradients of tokens, gates and weights."""
    torch.manual_seed(0)
    experts: list[nn.Module] = [mlp(bias).to(dtype).to(device) for _ in range(EXPERTS)]
    lie_together(experts)
    x_TD = torch.randn(TOKENS, HIDDEN).to(dtype).to(device).requires_grad_()
    dispatch, gate_Nk = rows_of(kind, device)
    out_TD = run_experts(experts, x_TD, dispatch, kernel)
    weights = [parameter for expert in experts for parameter in expert.parameters()]
    wanted = torch.randn(TOKENS, HIDDEN).to(device)
    dx, dgate, *dweights = torch.autograd.grad(out_TD.float(), [x_TD, gate_Nk, *weights], wanted)
    return [t.detach().cpu().double() for t in (out_TD, dx, dgate, torch.cat([d.flatten() for d in dweights]))]


def compared(kernel: str, device: torch.device) -> list[dict[str, Any]]:
    """A row for each case, of the dtypes that the kernel takes there."""
    require_kernel(kernel, device, torch.float32)
    rows = []
    for dtype, largest in LARGEST.items():
        if KERNELS[kernel].why_not(device, dtype) is not None:
            continue
        for mlp, bias in ((Gated, False), (Gated, True), (GatedInOne, False), (Plain, True)):
            for kind in ("all", "padded", "full"):
                case = (mlp, bias, kind)
                exact = results("fused", *case, torch.float32, device)
                off = [
                    float((found - wanted).norm() / wanted.norm())
                    for found, wanted in zip(results(kernel, *case, dtype, device), exact, strict=True)
                ]
                named = dict(zip(("output", "tokens", "gates", "weights"), off, strict=True))
                row = {"dtype": str(dtype).removeprefix("torch."), "experts": mlp.__name__, "bias": bias, "rows": kind}
                rows.append({**row, **named, "same": all(one <= largest for one in off)})
    return rows


def main() -> int:
    """Prints and writes the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    rows = compared(asked.kernel, torch.device(asked.device))
    print(f"{asked.kernel} beside fused in fp32, norm of the difference by the norm\n")
    print("| dtype | experts | bias | rows | output | tokens | gates | weights | |\n|" + 9 * "---|")
    for row in rows:
        told = [f"{value:.1e}" if isinstance(value, float) else str(value) for value in row.values()]
        print(f"| {' | '.join(told[:-1])} | {'same' if row['same'] else 'DIFFERS'} |")
    if asked.output is not None:
        asked.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
