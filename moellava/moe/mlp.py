# SPDX-License-Identifier: Apache-2.0
"""Dense MLPs as material for experts: which linear is which, slices, and the ways to start an expert.

Legend: D hidden, I intermediate units.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moellava.errors import UserError


@dataclass(frozen=True)
class MLPLayout:
    """Where the parts of a decoder's MLP are: act(w1 x) × (w3 x), or act(w1 x) alone, then w2.

    Args:
        linears: attribute name of each linear: w1, w3 (D -> I) or w13 (D -> 2 I: w1 above w3), and last w2 (I -> D).
        activation: attribute name of the function; empty where no part of the module is one.
    """

    linears: dict[str, str]
    activation: str

    @property
    def inputs(self) -> dict[str, int]:
        """Attribute name of each linear but the last -> how many blocks of I rows it holds."""
        return {name: 2 if role == "w13" else 1 for role, name in self.linears.items() if role != "w2"}

    @property
    def output(self) -> str:
        """Attribute name of the linear I -> D."""
        return self.linears["w2"]


LAYOUTS = (
    MLPLayout({"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}, "act_fn"),
    MLPLayout({"w13": "gate_up_proj", "w2": "down_proj"}, "activation_fn"),
    MLPLayout({"w1": "fc1", "w2": "fc2"}, "activation_fn"),
)
"""Llama, Mistral, Qwen2/3, StableLM, Gemma; Phi-3; Phi. Others are told by their shapes."""

SLICES_OFF = 1e-2
"""How far slices may be from the whole, as a fraction of its norm: rounding in half precision."""


def has_usual_names(mlp: nn.Module) -> bool:
    """Whether the parts of an MLP are called as one of `LAYOUTS` has them."""
    return any(_has_parts(mlp, layout) for layout in LAYOUTS)


def _has_parts(mlp: nn.Module, layout: MLPLayout) -> bool:
    return all(hasattr(mlp, name) for name in (*layout.linears.values(), layout.activation))


def layouts_of(mlp: nn.Module) -> list[MLPLayout]:
    """The layouts that an MLP may have, by the names of its parts, or else by their shapes; the likeliest first."""
    named = [layout for layout in LAYOUTS if _has_parts(mlp, layout)]
    return named or _layouts_by_shape(mlp)


def _layouts_by_shape(mlp: nn.Module) -> list[MLPLayout]:
    linears = {name: part for name, part in mlp.named_children() if isinstance(part, nn.Linear)}
    functions = [name for name, part in mlp.named_children() if not any(True for _ in part.parameters())]
    activation = next((name for name in functions if not isinstance(getattr(mlp, name), nn.Dropout)), "")
    if not 2 <= len(linears) <= 3:
        return []
    *inputs, output = linears  # the last one that is set is the one back, as the forward has them
    back = linears[output]
    outer, inner = back.out_features, back.in_features
    if any(linears[name].in_features != outer for name in inputs):
        return []
    widths = [linears[name].out_features for name in inputs]
    if widths == [2 * inner]:
        return [MLPLayout({"w13": inputs[0], "w2": output}, activation)]
    if widths == [inner]:
        return [MLPLayout({"w1": inputs[0], "w2": output}, activation)]
    if widths != [inner, inner]:
        return []
    orders = (inputs, inputs[::-1])  # which of the two the function is of, shapes do not say
    return [MLPLayout({"w1": one, "w3": other, "w2": output}, activation) for one, other in orders]


def layout_of(mlp: nn.Module) -> MLPLayout:
    """The likeliest layout of an MLP. Raises UserError where it cannot be cut."""
    layouts = layouts_of(mlp)
    if not layouts:
        raise UserError(
            f"A decoder layer's MLP is a {type(mlp).__name__}, whose parts are no two or three linears around a "
            "function: it can be copied into experts, and not be cut or redrawn. "
            "Use --init copy, without --granularity."
        )
    return layouts[0]


def hidden_size(mlp: nn.Module) -> int:
    """D."""
    layouts = layouts_of(mlp)
    if layouts:
        return getattr(mlp, layouts[0].output).out_features
    first = next(part for part in mlp.modules() if getattr(part, "weight", None) is not None and part.weight.dim() == 2)
    return first.in_features if isinstance(first, nn.Linear) else first.weight.shape[0]  # Conv1D of GPT-2


@torch.no_grad()
def check_slices(mlp: nn.Module, of: int) -> None:
    """Raises UserError where the slices of an MLP do not average to it: something in it looks at all units at once."""
    parameter = next(mlp.parameters())
    if parameter.device.type == "meta":
        return
    whole_mlp = copy.deepcopy(mlp).eval()
    if len({each.dtype for each in mlp.parameters()}) > 1:  # as in files of several dtypes; no forward takes those
        parameter = next(whole_mlp.float().parameters())
    x = torch.randn(4, hidden_size(mlp), generator=torch.Generator().manual_seed(0)).to(parameter)
    whole, off = whole_mlp(x).float(), float("inf")
    slices = [slice_mlp(whole_mlp, index, of) for index in range(of)]
    with suppress(RuntimeError):  # of a norm over all units, that there are fewer
        joined = torch.stack([part(x).float() for part in slices]).mean(0)
        off = float((joined - whole).norm() / whole.norm().clamp_min(1e-30))
    if not off <= SLICES_OFF + (0 if parameter.dtype == torch.float32 else 0.05):
        raise UserError(
            f"--granularity {of}: slices of a {type(mlp).__name__} do not add up to it ({off:.1g} of its norm off), so "
            "the sparse model would not start as the dense one. Copies are exact: --init copy, without --granularity."
        )


def slice_mlp(mlp: nn.Module, index: int, of: int) -> nn.Module:
    """One of `of` equal slices of an MLP: its share of the intermediate units, with the output weights × `of`.

    The slices' outputs average to the MLP's; a bias of the output is kept as it is, since the gates sum to 1.
    Scaling the output alone is exact for gated MLPs too; spreading the factor over all matrices is not.
    """
    layout = layout_of(mlp)
    output = getattr(mlp, layout.output)
    if output.in_features % of:
        raise UserError(f"--granularity {of} does not divide the MLP's {output.in_features} intermediate units.")
    width = output.in_features // of
    units = slice(index * width, (index + 1) * width)
    part = copy.copy(mlp)
    part._modules = dict(mlp._modules)
    part._parameters, part._buffers = dict(mlp._parameters), dict(mlp._buffers)
    for name, blocks in layout.inputs.items():
        linear = getattr(mlp, name)
        pick = lambda tensor, blocks=blocks: torch.cat([b[units] for b in tensor.chunk(blocks)])  # noqa: E731
        setattr(part, name, _linear(pick(linear.weight), None if linear.bias is None else pick(linear.bias)))
    setattr(part, layout.output, _linear(output.weight[:, units] * of, output.bias))
    if hasattr(part, "intermediate_size"):
        part.intermediate_size = width
    return copy.deepcopy(part)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear that owns copies of the given tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


@torch.no_grad()
def add_noise(mlp: nn.Module, fraction: float, generator: torch.Generator) -> None:
    """Adds normal noise to each weight matrix, with `fraction` of the matrix's standard deviation."""
    for parameter in mlp.parameters():
        if parameter.dim() == 2:
            parameter += _normal(parameter.shape, generator).to(parameter) * (fraction * parameter.std())


@torch.no_grad()
def redraw_units(mlp: nn.Module, ratio: float, generator: torch.Generator) -> None:
    """Drop-upcycling (arXiv:2502.19261): draws a fraction of the intermediate units anew.

    The same units in every matrix, each matrix from a normal distribution with the mean and standard deviation of
    the entries that it replaces.
    """
    layout = layout_of(mlp)
    width = getattr(mlp, layout.output).in_features
    units = torch.randperm(width, generator=generator)[: round(ratio * width)]
    if len(units) == 0:
        return
    for name, blocks in layout.inputs.items():
        weight = getattr(mlp, name).weight
        for block in range(blocks):
            rows = units.to(weight.device) + block * width
            weight[rows] = _like(weight[rows], generator)
    weight = getattr(mlp, layout.output).weight
    weight[:, units.to(weight.device)] = _like(weight[:, units.to(weight.device)], generator)


@torch.no_grad()
def silence(mlp: nn.Module) -> None:
    """Zeroes the output linear: the expert adds nothing until it has learnt something."""
    for parameter in getattr(mlp, layout_of(mlp).output).parameters():
        parameter.zero_()


def _normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _like(replaced: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers with the mean and standard deviation of what they replace."""
    old = replaced.float()
    return (_normal(old.shape, generator).to(old.device) * old.std(unbiased=False) + old.mean()).to(replaced.dtype)
