# SPDX-License-Identifier: Apache-2.0
"""Forward + backward of one MoE layer: dense, native, the DeepSpeed engine here, and the stock DeepSpeed layer.

    python benchmarks/moe_layer.py --json moe_layer.json

Every row has the same tokens and the same FLOPs: experts of `width` units of which each token visits k, and a dense MLP
of k × width units. The variants take turns within one run and the fastest turn of each counts, so that what else the
machine does falls on all of them. Freed memory is kept by the process, as in a run.

The stock layer builds masks of tokens × experts × capacity numbers, quadratic in the tokens. Where one of them would be
larger than --stock-gib, the stock rows are left out, and the output says so.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from moellava import heap
from moellava.moe import MoESpec
from moellava.moe.deepspeed import to_deepspeed
from moellava.moe.upcycle import sparse_mlp

HIDDEN = 512
TOKENS = (512, 2048, 8192)
SHAPES = ((4, 2, 1376), (8, 2, 688), (16, 4, 344), (64, 8, 172))
"""(experts, choices per token, units per expert)."""
STOCK_CAPACITY = 1.5
"""Tokens per expert of the stock layer as a multiple of the even share, as MoE-LLaVA trains."""
DENSE = "dense MLP of k × width"

Variants = dict[str, Callable[[Tensor], Tensor]]


class GatedMLP(nn.Module):
    """The MLP of Llama, Mistral, Qwen2."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width, bias=False)
        self.down_proj, self.act_fn = nn.Linear(width, hidden, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Products(torch.autograd.Function):
    """The nine matrix products per expert, on rows that lie ready: what no dispatch on this machine can go below."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: int, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x[0, :rows], *weights)
        out = torch.empty_like(x)
        for gate, up, down in zip(*[iter(weights)] * 3, strict=True):
            units, _ = x[0, :rows] @ gate.t(), x[0, :rows] @ up.t()
            torch.mm(units, down.t(), out=out[0, :rows])
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        x, *weights = ctx.saved_tensors
        dout, dx, grads = dout[0, : len(x)], torch.empty_like(dout), []
        for gate, up, down in zip(*[iter(weights)] * 3, strict=True):
            units = dout @ down
            torch.mm(units, gate, out=dx[0, : len(x)]).addmm_(units, up)
            grads += [units.t() @ x, units.t() @ x, dout.t() @ units]
        return dx, None, *grads


def products_alone(experts: list[nn.Module], k: int) -> Callable[[Tensor], Tensor]:
    """Runs `Products` on the even share of the rows for each expert."""
    weights = [part.weight for expert in experts for part in (expert.gate_proj, expert.up_proj, expert.down_proj)]
    return lambda x: Products.apply(x, x.shape[1] * k // len(experts), *weights)


def stock_layer(expert: nn.Module, n_experts: int, k: int, capacity_factor: float | None) -> nn.Module:
    """`deepspeed.moe.layer.MoE` as it comes, second experts not sampled.

    Args:
        capacity_factor: tokens per expert as a multiple of the even share; None: nothing is dropped.
    """
    from deepspeed.moe.layer import MoE

    return MoE(
        HIDDEN,
        expert,
        n_experts,
        k=k,
        capacity_factor=capacity_factor or 1.0,
        min_capacity=0,
        drop_tokens=capacity_factor is not None,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )


def stock_mask_gib(tokens: int, n_experts: int, k: int) -> float:
    """GiB of one of the stock layer's fp32 masks at capacity 1.5. It holds several at a time."""
    capacity = STOCK_CAPACITY * k * tokens / n_experts
    return 4 * tokens * n_experts * capacity / 2**30


def variants(n_experts: int, k: int, width: int, stock: bool) -> tuple[Variants, list[nn.Module]]:
    """What is compared, by name, and the modules whose gradients are cleared between turns.

    Args:
        stock: whether the stock layer is among them.
    """
    torch.manual_seed(0)
    expert = GatedMLP(HIDDEN, width)
    spec = MoESpec(num_experts=[n_experts], top_k_experts=k)
    dense = GatedMLP(HIDDEN, k * width)
    native = sparse_mlp(expert, spec, n_experts, 0).train()
    spread = to_deepspeed(sparse_mlp(expert, spec, n_experts, 0).train(), ep_size=1)
    runs: Variants = {
        DENSE: dense,
        "the experts' matrix products alone": products_alone(list(native.experts), k),
        "native engine, dropless": native,
        "deepspeed engine, dropless, ep_size 1": spread,
    }
    if not stock:
        return runs, [dense, native, spread]
    dropping = stock_layer(expert, n_experts, k, STOCK_CAPACITY).train()
    dropless = stock_layer(expert, n_experts, k, None).train()
    runs[f"stock DeepSpeed layer, capacity {STOCK_CAPACITY}"] = lambda x: dropping(x)[0]
    runs["stock DeepSpeed layer, dropless"] = lambda x: dropless(x)[0]
    return runs, [dense, native, spread, dropping, dropless]


def turn(run: Callable[[Tensor], Tensor], modules: list[nn.Module], x: Tensor, clock: Callable[[], float]) -> float:
    """Seconds of one forward and backward."""
    for module in modules:
        module.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    start = clock()
    out = run(x)
    out.backward(x.detach())
    return clock() - start


def measure(
    tokens: int, shape: tuple[int, int, int], repeats: int, clock: Callable[[], float], stock: bool
) -> list[dict]:
    """One row per variant: milliseconds, and as multiples of the dense MLP's."""
    runs, modules = variants(*shape, stock)
    x = torch.randn(1, tokens, HIDDEN)
    for run in runs.values():
        turn(run, modules, x, clock)
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            best[name] = min(best[name], turn(run, modules, x, clock))
    dense = best[DENSE]
    n_experts, k, width = shape
    return [
        {
            "variant": name,
            "tokens": tokens,
            "hidden": HIDDEN,
            "experts": n_experts,
            "choices_per_token": k,
            "units_per_expert": width,
            "milliseconds": round(1e3 * seconds, 2),
            "times_dense": round(seconds / dense, 3),
        }
        for name, seconds in best.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--experts", type=int, nargs="+", help="only the shapes with these numbers of experts")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--stock-gib", type=float, default=1.0, help="largest mask of the stock layer, in GiB")
    parser.add_argument("--cpu-time", action="store_true", help="not the wall clock: for a machine that is busy")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    torch.set_num_threads(arguments.threads)
    rows = []
    for tokens in arguments.tokens:
        for shape in SHAPES:
            if arguments.experts and shape[0] not in arguments.experts:
                continue
            mask = stock_mask_gib(tokens, shape[0], shape[1])
            with heap.kept():
                measured = measure(tokens, shape, arguments.repeats, clock, stock=mask <= arguments.stock_gib)
            rows += measured
            print(f"{tokens} tokens, {shape[0]} experts of {shape[2]} units, {shape[1]} per token")
            if mask > arguments.stock_gib:
                print(f"  stock DeepSpeed layer left out: each of its masks would take {mask:.1f} GiB")
            for row in measured:
                print(f"  {row['variant']:40} {row['milliseconds']:9.2f} ms  {row['times_dense']:6.2f} × dense")
    if arguments.json:
        machine = {"torch": torch.__version__, "threads": arguments.threads, "repeats": arguments.repeats}
        machine["clock"] = "CPU time" if arguments.cpu_time else "wall"
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
