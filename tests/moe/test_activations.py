# SPDX-License-Identifier: Apache-2.0
"""Functions run as torch's kernels if they compute what these do, whatever they are called."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from moellava.moe.activations import KERNELS, kernel_name, use_kernels

NAMES = {
    **dict.fromkeys(("silu", "swish"), "silu"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"), "gelu_tanh"),
    **{name: name for name in ("relu", "relu2", "quick_gelu")},
    **dict.fromkeys(("gelu_10", "mish", "tanh", "sigmoid", "leaky_relu", "relu6", "linear", "xielu"), None),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_function_has_the_kernel_that_computes_it(name):
    activation = ACT2FN[name]
    found = kernel_name(activation)
    assert found == NAMES[name] == kernel_name(activation)
    if found is None:
        return
    x, grad = torch.randn(50, requires_grad=True), torch.randn(50)
    wanted = activation(x)
    (wanted_grad,) = torch.autograd.grad(wanted, x, grad)
    out = torch.empty(50)
    KERNELS[found].forward(x.detach(), out)
    KERNELS[found].backward(x.detach(), grad)
    torch.testing.assert_close(out, wanted.detach(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(grad, wanted_grad, atol=2e-6, rtol=1e-5)


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
