# SPDX-License-Identifier: Apache-2.0
"""Runs experts over the tokens that chose them.

Legend: T tokens, N real ones, k choices, D hidden, R routed rows (one per token and choice that is kept) sorted by
expert, n the rows of one expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moellava.errors import UserError
from moellava.moe.adapted import Adapted, adapted_of
from moellava.moe.compiled import ALIGNMENT, are_aligned
from moellava.moe.fused import FusedExperts
from moellava.moe.grouped import can_group, run_adapted, run_grouped
from moellava.moe.kernels import AUTO, KERNELS, Dispatch, ExpertKernel, require_kernel
from moellava.moe.losses import tally
from moellava.moe.router import Choice, is_at_hand
from moellava.moe.scattered import PACKAGE as SCATTERMOE
from moellava.moe.scattered import run_scattered, why_not_scattered
from moellava.moe.weights import Layout, tensors_of


def sort_by_expert(choice: Choice, gate_Nk: Tensor, n_experts: int, leave_out: bool | None = None) -> Dispatch:
    """Turns choices into rows sorted by expert; in the order of the tokens within one.

    Args:
        leave_out: whether there are no rows of dropped choices. Else they are rows like any other, whose gate is 0: on
            a GPU (the default there), knowing how many they are would take longer than running them.
    """
    k = choice.expert_Nk.shape[1]
    flat_R = choice.expert_Nk.reshape(-1)
    leaves_out = is_at_hand(flat_R) if leave_out is None else leave_out
    if choice.kept_Nk is not None and leaves_out:
        # dropped choices sort behind the last expert
        flat_R = torch.where(choice.kept_Nk.reshape(-1), flat_R, n_experts)
    order_R = flat_R.argsort(stable=True)
    count_E = tally(flat_R, n_experts + 1)[:n_experts]
    if choice.kept_Nk is not None and leaves_out:
        order_R = order_R[: int(count_E.sum())]
    token_R = order_R // k
    if choice.token_N is not None:
        token_R = choice.token_N.index_select(0, token_R)
    is_whole = choice.token_N is None and len(order_R) == len(flat_R)
    gate_R = gate_Nk.reshape(-1).index_select(0, order_R)
    return Dispatch(token_R, gate_R, count_E, order_R if is_whole else None)


def run_experts(experts: list[nn.Module], x_TD: Tensor, dispatch: Dispatch, kernel: str = AUTO) -> Tensor:
    """Σ over a token's experts of gate × expert(token), [T, D].

    Under autocast the products run in its dtype, and sums in fp32. An expert without tokens gets a zero gradient and
    not none: ranks must agree on which parameters have one.

    Args:
        kernel: a name of `KERNELS` that these experts can be run by (`use_kernel`).
    """
    device = x_TD.device.type
    mixed = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if mixed else x_TD.dtype
    fusable, cast_TD = tensors_of(experts), x_TD.to(dtype)
    # Adapters are looked for where grouped products may run them: reading them takes long beside a few rows.
    seeks = kernel == GROUPED or (kernel == AUTO and can_group(x_TD.device, dtype, x_TD.shape[1:]))
    wrapped = adapted_of(experts) if fusable is None and seeks else None
    if kernel == AUTO:
        kernel = what_fits(fusable, wrapped, x_TD.device, dtype)
    if kernel == LOOP or (fusable is None and wrapped is None):
        return loop_over_experts(experts, x_TD, dispatch)
    with torch.autocast(device, enabled=False):
        if wrapped is not None:
            rows = (dispatch.gate_R, dispatch.token_R, dispatch.count_E)
            return run_adapted(cast_TD, *rows, wrapped).to(x_TD.dtype)
        assert fusable is not None
        layout, flat = fusable
        runs = KERNELS[kernel]
        if mixed and not runs.casts:
            flat = [tensor if tensor is None else tensor.to(dtype) for tensor in flat]
        assert runs.run is not None
        return runs.run(cast_TD, dispatch, layout, flat).to(x_TD.dtype)


def what_fits(
    fusable: tuple[Layout, list[Tensor | None]] | None,
    wrapped: Adapted | None,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """The kernel that `AUTO` stands for.

    Args:
        fusable: of `tensors_of` the experts.
        wrapped: of `adapted_of` them, where they are not that.
        device, dtype: where, and of the products.
    """
    if (fusable or wrapped) and can_group(device, dtype, _sizes(fusable, wrapped)):
        return GROUPED
    if fusable is None:
        return LOOP
    return GROUPED if torch.compiler.is_compiling() else FUSED


def _sizes(fusable: tuple[Layout, list[Tensor | None]] | None, wrapped: Adapted | None) -> tuple[int, ...]:
    """D and I of experts, one of which is known."""
    if fusable is None:
        assert wrapped is not None
        return wrapped.linears["w2"][0].sizes
    layout, flat = fusable
    w2_DI = layout.experts(flat[: len(layout.names)])[0].w2_DI
    assert w2_DI is not None
    return tuple(w2_DI.shape)


def _fused(x_TD: Tensor, dispatch: Dispatch, layout: Layout, flat: list[Tensor | None]) -> Tensor:
    return FusedExperts.apply(x_TD, dispatch.gate_R, dispatch.token_R, dispatch.counts, layout, *flat)


def _grouped(x_TD: Tensor, dispatch: Dispatch, layout: Layout, flat: list[Tensor | None]) -> Tensor:
    return run_grouped(x_TD, dispatch.gate_R, dispatch.token_R, dispatch.count_E, layout, flat)


def _why_not_grouped(device: torch.device, dtype: torch.dtype) -> str | None:
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped products"
    return "on a GPU they are for --bf16 True" if device.type == "cuda" and dtype != torch.bfloat16 else None


LOOP, FUSED, GROUPED = "loop", "fused", "grouped"

KERNELS.register(LOOP, ExpertKernel(None))
KERNELS.register(FUSED, ExpertKernel(_fused, casts=True))
KERNELS.register(GROUPED, ExpertKernel(_grouped, why_not=_why_not_grouped, casts=True))
KERNELS.register(SCATTERMOE, ExpertKernel(run_scattered, SCATTERMOE, why_not_scattered))


def loop_over_experts(experts: list[nn.Module], x_TD: Tensor, dispatch: Dispatch) -> Tensor:
    """The same by calling each expert: for experts whose linears are wrapped, where no grouped products run."""
    out_TD = torch.zeros_like(x_TD)
    rows = zip(dispatch.token_R.split(dispatch.counts), dispatch.gate_R.split(dispatch.counts), experts, strict=True)
    for token_n, gate_n, expert in rows:
        y_nD = expert(x_TD.index_select(0, token_n))
        out_TD = out_TD.index_add(0, token_n, (y_nD * gate_n.unsqueeze(1)).to(out_TD.dtype))
    return out_TD


def kernel_for(experts: list[nn.Module], name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of what runs these experts under a name of `KERNELS`: itself, or what `AUTO` takes.

    Raises:
        UserError: `require_kernel`, or the experts are more than the kernel's tensors.
    """
    kernel, fusable = require_kernel(name, device, dtype), tensors_of(experts)
    wrapped = adapted_of(experts) if fusable is None and name in (AUTO, GROUPED) else None
    if name == AUTO:
        return what_fits(fusable, wrapped, device, dtype)
    if kernel.run is not None and fusable is None and wrapped is None:
        raise UserError(
            f"--moe_kernel {name} runs experts of two or three plain linears around a function; these have adapters or "
            f"weights in 4 or 8 bits, or are more than that. Leave the flag out: --moe_kernel {AUTO} runs them."
        )
    if name == GROUPED and not are_aligned(dtype, sizes := _sizes(fusable, wrapped)):
        raise UserError(
            f"--moe_kernel {name} takes sizes that are multiples of {ALIGNMENT // dtype.itemsize} numbers; these "
            f"experts have {sizes[0]} and {sizes[1]}. Leave the flag out: --moe_kernel {AUTO} runs them."
        )
    return name
