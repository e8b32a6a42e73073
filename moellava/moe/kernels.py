# SPDX-License-Identifier: Apache-2.0
"""What runs the experts of a layer, by name: ours, and what a plug-in registers for a package of its own.

Legend: T tokens, D hidden, R routed rows sorted by expert, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec

import torch
from torch import Tensor

from moellava.errors import UserError
from moellava.moe.weights import Layout
from moellava.registry import Registry

AUTO = "auto"
"""The name of whatever fits: grouped products on a GPU in bf16, else one autograd node, else calling each expert."""


@dataclass
class Dispatch:
    """Routed rows, sorted by expert.

    Args:
        token_R: which row of x each routed row reads and adds to.
        gate_R: weight of the row's output, with gradient.
        count_E: rows of each expert, in order; their sum is R.
        order_R: where each row stands among the choices of all T tokens, k of each, token by token. None: some of them
            have no row, or it is not known.
    """

    token_R: Tensor
    gate_R: Tensor
    count_E: Tensor
    order_R: Tensor | None = None

    @cached_property
    def counts(self) -> list[int]:
        """`count_E` as numbers. On a GPU the host waits for them, which grouped products do without."""
        return self.count_E.tolist()


Run = Callable[[Tensor, Dispatch, Layout, list[Tensor | None]], Tensor]


def _anywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


@dataclass(frozen=True)
class ExpertKernel:
    """A way to run experts.

    Args:
        run: (x_TD, dispatch, layout, flat) -> Σ over a token's experts of gate × expert(token), [T, D], which autograd
            differentiates by x, gates and tensors; layout and flat are those of `tensors_of`. It sees no numbers of
            the device unless it asks for them. None: each expert is called, whatever it is made of.
        package: what has to be installed, as it is imported; None: nothing.
        why_not: (device, dtype of the products) -> why it cannot run there; None: it can.
        casts: whether under autocast it takes the experts' tensors as they are, and casts them where it reads them;
            else they have the dtype of x.
    """

    run: Run | None
    package: str | None = None
    why_not: Callable[[torch.device, torch.dtype], str | None] = _anywhere
    casts: bool = False


KERNELS: Registry[ExpertKernel] = Registry("--moe_kernel")
"""Name -> what runs. `moellava.moe.experts` adds ours."""

KERNELS.register(AUTO, ExpertKernel(None))

_RATHER = "Take grouped (a GPU in bf16) or scattermoe, or register it in a plug-in (docs/MOE.md, 'Kernels')."

NOT_SERVED = {
    "sonicmoe": f"its kernels are made on a Hopper GPU when first run, and no call of it could be tried. {_RATHER}",
    "megablocks": "its last release is for torch 2.7.0 alone, and the hub's build of it is a layer of GPT-OSS with the "
    f"router in it. {_RATHER}",
    "liger": "its experts have w1 and w3 in one tensor of all experts, which each forward would copy; and its flag for "
    f"dense layers, --use_liger_kernel, is refused too (docs/TRAIN.md). {_RATHER}",
    "flashattn": "it computes attention: --attn_implementation flash_attention_2.",
    "flashattention2": "it computes attention: --attn_implementation flash_attention_2.",
}
"""Package that may be asked for -> why no kernel has its name, and what to do. In small letters, without - and _."""


def require_kernel(name: str, device: torch.device, dtype: torch.dtype) -> ExpertKernel:
    """A kernel by name, where it can run.

    Args:
        device, dtype: where, and of the products.

    Raises:
        UserError: an unknown name, a package that is not served or not installed, another device or dtype.
    """
    reason = NOT_SERVED.get(re.sub("[-_]|kernel", "", name.lower()))
    if name not in KERNELS and reason is not None:
        raise UserError(f"--moe_kernel {name} is not served: {reason}")
    kernel = KERNELS[name]
    if kernel.package is not None and find_spec(kernel.package) is None:
        raise UserError(
            f"--moe_kernel {name} needs the package {kernel.package}, which is not installed here. Install it, or "
            f"leave the flag out: --moe_kernel {AUTO} takes what there is."
        )
    reason = kernel.why_not(device, dtype)
    if reason is not None:
        raise UserError(
            f"--moe_kernel {name} cannot run here ({device.type}, {str(dtype).removeprefix('torch.')}): {reason}. "
            f"Leave the flag out: --moe_kernel {AUTO} takes what can."
        )
    return kernel
