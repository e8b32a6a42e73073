# SPDX-License-Identifier: Apache-2.0
"""Functions run as torch's kernels if they compute what these do, whatever they are called."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.activations import ACT2CLS, ACT2FN

from moellava.moe.activations import KERNELS, kernel_name, use_kernels
from moellava.moe.experts import run_experts
from moellava.plan.counting import EvenLoad
from tests.moe.test_fused import Gated, problem

NAMES = {
    **dict.fromkeys(("silu", "swish"), "silu"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"), "gelu_tanh"),
    **{
        name: name
        for name in ("relu", "relu2", "quick_gelu", "gelu_10", "mish", "tanh", "sigmoid", "leaky_relu", "relu6")
    },
    **{name: name for name in ("hardswish", "laplace", "linear", "sqrtsoftplus")},
    "gelu_python_tanh": "gelu_tanh",
    **dict.fromkeys(("prelu", "xielu"), None),  # they learn
}


def test_every_name_of_transformers_is_known_here():
    assert set(ACT2CLS) <= set(NAMES) and set(KERNELS) <= set(NAMES.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_function_has_the_kernel_that_computes_it(name):
    activation = ACT2FN[name]
    found = kernel_name(activation)
    assert found == NAMES[name] == kernel_name(activation)
    if found is None:
        return
    x = torch.cat([torch.randn(50), 12 * torch.randn(200)]).double().requires_grad_()
    grad = torch.randn(250).double()
    wanted = activation(x)
    (wanted_grad,) = torch.autograd.grad(wanted, x, grad)
    out = torch.empty_like(grad)
    KERNELS[found].forward(x.detach(), out)
    KERNELS[found].backward(x.detach(), grad)
    torch.testing.assert_close(out, wanted.detach(), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(grad, wanted_grad, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name, kernel in NAMES.items() if kernel])
def test_experts_are_differentiated_without_autograd_within(name, monkeypatch):
    """On both paths; and so in a trace, where nothing has a number."""
    monkeypatch.setattr(torch.autograd, "grad", None)
    for run in ("fused", "grouped"):
        experts, x, dispatch = problem(Gated, activation=ACT2FN[name])
        run_experts(experts, x.requires_grad_(), dispatch, run).sum().backward()
        assert x.grad.isfinite().all() and x.grad.any()


@pytest.mark.parametrize("answers_true", [False, True])
def test_a_function_is_looked_at_on_numbers_within_a_trace_too(answers_true):
    with FakeTensorMode(), EvenLoad(1, True) if answers_true else nullcontext():
        assert kernel_name(ACT2FN["mish"]) == "mish" and kernel_name(nn.ELU()) is None


def test_what_learns_or_draws_is_no_kernel():
    assert kernel_name(nn.PReLU(init=0.0)) is None
    assert kernel_name(nn.RReLU()) is None and kernel_name(lambda x: x.sum()) is None
    assert kernel_name(torch.nn.functional.silu) == "silu"


def test_a_tanh_gelu_of_many_operations_becomes_one():
    model = nn.Sequential(nn.Linear(4, 4), ACT2FN["gelu_new"], nn.Sequential(ACT2FN["gelu_new"], nn.GELU()))
    x = torch.randn(3, 4)
    wanted = model(x)
    assert use_kernels(model) == 2 and use_kernels(model) == 0
    assert [type(part) for part in (model[1], model[2][0])] == [nn.GELU, nn.GELU] and model[2][1].approximate == "none"
    torch.testing.assert_close(model(x), wanted)
