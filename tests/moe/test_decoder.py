# SPDX-License-Identifier: Apache-2.0
"""Layers and MLPs are found without names, and experts run by the fused formula only where it is all that they do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moellava.errors import UserError
from moellava.moe import MoESpec, upcycle
from moellava.moe.decoder import decoder_layers, is_sparse, is_token_wise, mlp_name
from moellava.moe.experts import run_experts, sort_by_expert
from moellava.moe.mlp import check_slices, layouts_of
from moellava.moe.router import Choice
from moellava.moe.weights import tensors_of

D, UNITS = 16, 24


class Gated(nn.Module):
    """An MLP of unusual names; `order` is that in which its two inputs are set."""

    def __init__(self, order: tuple[str, str] = ("a", "b"), between: nn.Module | None = None):
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(D, UNITS))
        self.back = nn.Linear(UNITS, D)
        self.function = nn.SiLU()
        self.between = nn.Identity() if between is None else between

    def forward(self, x):
        return self.back(self.between(self.function(self.a(x)) * self.b(x)))


class Named(nn.Module):
    """The same by Llama's names, and maybe more to it than these say."""

    def __init__(self, between: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(D, UNITS), nn.Linear(D, UNITS), nn.Linear(UNITS, D)
        self.act_fn, self.between = nn.SiLU(), between

    def forward(self, x):
        return self.down_proj(self.between(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Mixing(nn.Module):
    """Larger than the MLP, of the same shapes, and looks at other tokens."""

    def __init__(self):
        super().__init__()
        self.q, self.o = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x):
        return self.o(self.q(x).cumsum(-2))


class Layer(nn.Module):
    def __init__(self, **parts: nn.Module):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class Cut(nn.Module):
    """Lets the larger half of the units through, as Gemma 3n does."""

    def forward(self, x):
        return x * (x >= x.median(-1, keepdim=True).values)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_the_largest_token_wise_part_is_the_mlp(order):
    layer = Layer(attention=Mixing(), norm=nn.LayerNorm(D), feed=Gated(order), gate=nn.Linear(D, D))
    assert mlp_name(layer, D) == "feed"
    assert not is_token_wise(layer.attention, D)


def test_a_part_without_memory_is_found_too():
    layer = Layer(attention=Mixing(), feed=Gated()).to("meta")
    with torch.device("meta"):  # as in `from_pretrained`
        assert mlp_name(layer, D) == "feed"
    assert next(layer.parameters()).device.type == "meta"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"attention": Mixing()}, r"attention \(Mixing\) none is a plain MLP"),
        ({"fc1": nn.Linear(D, UNITS), "fc2": nn.Linear(UNITS, D)}, "none is a plain MLP"),
        ({"moe": nn.ModuleList([Gated(), Gated()]), "shared": Gated()}, "experts of its own: it is sparse already"),
    ],
)
def test_layers_without_one_say_so(parts, message):
    with pytest.raises(UserError, match=message):
        mlp_name(Layer(**parts), D)


def test_a_convolution_is_no_stack_of_experts():
    assert not is_sparse(Layer(mixer=nn.Conv1d(4, 4, 3), feed=Gated()))


def test_layers_are_the_largest_list(tiny_llava):
    model = tiny_llava()
    decoder = model.get_decoder()
    layers = decoder.layers
    del decoder.layers
    decoder.few, decoder.blocks = nn.ModuleList([nn.Linear(2, 2)]), layers
    assert decoder_layers(model) is layers
    del decoder.few, decoder.blocks
    with pytest.raises(UserError, match="no decoder layers"):
        decoder_layers(model)


def routed(experts: list[nn.Module]) -> tuple[torch.Tensor, torch.Tensor]:
    """What experts give by the quickest way, and by calling them."""
    generator = torch.Generator().manual_seed(0)
    x_TD, gate_Nk = torch.randn(6, D, generator=generator), torch.rand(6, 1, generator=generator)
    expert_Nk = torch.arange(6)[:, None] % len(experts)
    choice = Choice(None, expert_Nk, None, torch.zeros(6, dtype=torch.long), None)
    with torch.no_grad():
        wanted = torch.stack([experts[e](x) * g for x, (e,), g in zip(x_TD, expert_Nk.tolist(), gate_Nk, strict=True)])
        return run_experts(experts, x_TD, sort_by_expert(choice, gate_Nk, len(experts))), wanted


@pytest.mark.parametrize(
    ("mlp", "fused"),
    [
        (Gated(("a", "b")), True),
        (Gated(("b", "a")), True),
        (Gated(between=nn.RMSNorm(UNITS)), False),
        (Named(nn.Identity()), True),
        (Named(nn.RMSNorm(UNITS)), False),
        (Named(Cut()), False),
        (Named(nn.Dropout(0.5)).eval(), False),
        (Named(nn.Dropout(0.0)), True),
    ],
)
def test_the_formula_gives_way_to_the_module_where_they_differ(mlp, fused):
    experts = [mlp, copy.deepcopy(mlp)]
    assert (tensors_of(experts) is not None) == fused
    found, wanted = routed(experts)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("between", [nn.RMSNorm(UNITS, elementwise_affine=False), Cut()])
def test_slices_that_do_not_add_up_are_refused(between):
    with pytest.raises(UserError, match="--granularity 2: slices of a Named do not add up"):
        check_slices(Named(between), 2)
    check_slices(Named(nn.Identity()), 2)
    check_slices(Gated(("b", "a")), 3)


def test_what_has_no_layout_is_copied_and_not_cut(tiny_llava):
    odd = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Tanh())
    assert layouts_of(odd) == []
    model = tiny_llava()
    for layer in model.get_decoder().layers:
        layer.mlp = copy.deepcopy(odd)
    ids = torch.arange(6, 18)[None]
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        with pytest.raises(UserError, match="can be copied into experts, and not be cut"):
            upcycle(copy.deepcopy(model), MoESpec(init="granular", granularity=2, num_experts=[4]))
        upcycle(model, MoESpec(num_experts=[3], moe_mode="dense"))
        torch.testing.assert_close(model(input_ids=ids).logits, dense, rtol=1e-5, atol=1e-5)
