# SPDX-License-Identifier: Apache-2.0
"""The fused experts against a plain loop over the modules, which autograd differentiates."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moellava.moe import MoESpec
from moellava.moe.experts import Dispatch, loop_over_experts, run_experts, sort_by_expert
from moellava.moe.grouped import can_group, run_grouped
from moellava.moe.places import in_place, lie_together
from moellava.moe.router import Choice
from moellava.moe.upcycle import sparse_mlp
from moellava.moe.weights import tensors_of


class Gated(nn.Module):
    def __init__(self, hidden: int, width: int, bias: bool, activation: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(hidden, width, bias), nn.Linear(hidden, width, bias)
        self.down_proj, self.act_fn = nn.Linear(width, hidden, bias), activation

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class GatedInOne(nn.Module):
    def __init__(self, hidden: int, width: int, bias: bool, activation: nn.Module):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(hidden, 2 * width, bias), nn.Linear(width, hidden, bias)
        self.activation_fn = activation

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


class Plain(nn.Module):
    def __init__(self, hidden: int, width: int, bias: bool, activation: nn.Module):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(hidden, width, bias), nn.Linear(width, hidden, bias)
        self.activation_fn = activation

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))


def problem(mlp, bias=True, activation=None, width=24, dtype=torch.float32):
    """Four experts with 5, 0, 3 and 4 rows, of six tokens."""
    torch.manual_seed(0)
    experts = [mlp(16, width, bias, activation or nn.SiLU()).to(dtype) for _ in range(4)]
    x = torch.randn(6, 16).to(dtype)
    tokens = torch.tensor([0, 1, 2, 4, 5, 0, 2, 3, 1, 3, 4, 5])
    return experts, x, Dispatch(tokens, torch.rand(12), torch.tensor([5, 0, 3, 4]))


def gradients(run, experts, x, dispatch):
    experts = copy.deepcopy(experts)
    x, gate = x.clone().requires_grad_(), dispatch.gate_R.clone().requires_grad_()
    out = run(experts, x, Dispatch(dispatch.token_R, gate, dispatch.count_E))
    (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), x.grad, gate.grad, *(p.grad for e in experts for p in e.parameters())]


def grouped(experts, x, dispatch):
    layout, flat = tensors_of(experts)
    return run_grouped(x, dispatch.gate_R, dispatch.token_R, dispatch.count_E, layout, flat)


BOTH = pytest.mark.parametrize("run", [run_experts, grouped], ids=["fused", "grouped"])


@pytest.mark.parametrize("mlp", [Gated, GatedInOne, Plain])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU("tanh"), nn.ReLU()])
def test_values_and_gradients(mlp, bias, activation):
    case = problem(mlp, bias, activation)
    assert tensors_of(case[0]) is not None
    for fused, plain in zip(gradients(run_experts, *case), gradients(loop_over_experts, *case), strict=True):
        torch.testing.assert_close(fused, plain, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("mlp", [Gated, GatedInOne, Plain])
def test_tensors_by_name_are_those_of_the_modules(mlp):
    """By hand they give what the module does; gate and up in one linear are two views of it."""
    experts, x, _ = problem(mlp)
    layout, flat = tensors_of(experts)
    for module, named in zip(experts, layout.experts([tensor.detach() for tensor in flat]), strict=True):
        inner = layout.activation(x @ named.w1_ID.t() + named.b1_I)
        if layout.is_gated:
            inner = inner * (x @ named.w3_ID.t() + named.b3_I)
        torch.testing.assert_close(inner @ named.w2_DI.t() + named.b2_D, module(x))
        parameters = {parameter.data_ptr() for parameter in module.parameters()}
        assert {named.w1_ID.data_ptr(), named.b1_I.data_ptr(), named.w2_DI.data_ptr()} <= parameters
        named.zero_()
        assert not any(parameter.any() for parameter in module.parameters())


def test_more_rows_than_one_elementwise_block(monkeypatch):
    monkeypatch.setattr("moellava.moe.fused.BLOCK", 50)
    case = problem(Gated)
    for fused, plain in zip(gradients(run_experts, *case), gradients(loop_over_experts, *case), strict=True):
        torch.testing.assert_close(fused, plain, atol=2e-6, rtol=1e-5)


@BOTH
def test_the_router_learns_the_same_where_a_gate_has_vanished(run):
    """Gates of 0 and of 1e-33: their own gradients are quotients, which must stay finite and right."""
    experts, x, dispatch = problem(Gated)

    def router_gradient(experts_run):
        logit = torch.tensor([0.0, 75.0, -69.0, 74.5]).repeat(3).requires_grad_()
        gate = logit.view(3, 4).softmax(1).view(-1)
        assert (gate == 0).any() and ((gate > 0) & (gate < 1e-30)).any()
        (experts_run(experts, x, Dispatch(dispatch.token_R, gate, dispatch.count_E)) * x).sum().backward()
        return logit.grad

    torch.testing.assert_close(router_gradient(run), router_gradient(loop_over_experts), atol=1e-7, rtol=1e-5)


@BOTH
def test_experts_used_twice_and_a_graph_walked_twice(run):
    """What the forward keeps is not used up: a second backward gives the same again."""
    experts, x, dispatch = problem(Gated)
    first, second = (gradients(run, experts, x * scale, dispatch)[3:] for scale in (1, 2))
    weight = torch.linspace(-1, 1, x.numel()).view_as(x)
    out = run(experts, x, dispatch) + run(experts, 2 * x, dispatch)
    for times in (1, 2):
        (out * weight).sum().backward(retain_graph=True)
        found = [parameter.grad for expert in experts for parameter in expert.parameters()]
        for mine, one, other in zip(found, first, second, strict=True):
            torch.testing.assert_close(mine, times * (one + other), atol=1e-5, rtol=1e-5)


@BOTH
def test_idle_experts_get_zero_gradients_and_not_none(run):
    _, _, _, *grads = gradients(run, *problem(Gated))
    idle = grads[6:12]
    assert all(g is not None and not g.any() for g in idle)


@BOTH
def test_no_rows_at_all(run):
    experts, x, _ = problem(Gated)
    nothing = Dispatch(torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(4, dtype=torch.long))
    out, dx, _, *grads = gradients(run, experts, x, nothing)
    assert not out.any() and not dx.any() and all(g is not None and not g.any() for g in grads)


def test_bf16_is_as_near_to_fp32_as_the_loop_is():
    case, exact = problem(Gated, dtype=torch.bfloat16), problem(Gated)
    for fused, plain, reference in zip(
        gradients(run_experts, *case),
        gradients(loop_over_experts, *case),
        gradients(loop_over_experts, *exact),
        strict=True,
    ):
        error = (plain.float() - reference).abs().max()
        assert (fused.float() - reference).abs().max() <= 1.5 * error + 1e-2


@BOTH
def test_frozen_experts_and_frozen_inputs(run):
    experts, x, dispatch = problem(Gated)
    for parameter in experts[0].parameters():
        parameter.requires_grad_(False)
    run(experts, x, dispatch).sum().backward()
    assert all(p.grad is None for p in experts[0].parameters())
    assert all(p.grad is not None for e in experts[1:] for p in e.parameters())


def test_wrapped_linears_are_called_and_not_bypassed():
    experts, x, dispatch = problem(Gated)
    plain = run_experts(experts, x, dispatch)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    doubled = Doubled(24, 16)
    doubled.load_state_dict(experts[0].down_proj.state_dict())
    experts[0].down_proj = doubled
    assert tensors_of(experts) is None
    assert (run_experts(experts, x, dispatch) - plain).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_experts_are_one_node_too(dtype, monkeypatch):
    """As near to fp32 as calling each expert under autocast is, with gradients for the fp32 weights."""
    case = problem(Gated)
    exact, slow = gradients(loop_over_experts, *case), "moellava.moe.experts.loop_over_experts"
    with torch.autocast("cpu", dtype=dtype):
        plain = gradients(loop_over_experts, *case)
        monkeypatch.setattr(slow, None)
        fused = gradients(run_experts, *case)
    for mine, theirs, reference in zip(fused, plain, exact, strict=True):
        assert mine.dtype == reference.dtype == torch.float32
        assert (mine - reference).abs().max() <= 1.5 * (theirs - reference).abs().max() + 1e-2
    assert float((fused[0] - exact[0]).abs().max()) > 1e-5, "the products ran in fp32"


def test_under_autocast_an_input_of_its_dtype_meets_weights_of_another():
    """What comes from a linear under autocast is bf16 already, and the weights are fp32 still."""
    experts, x_TD, dispatch = problem(Gated)[:3]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = loop_over_experts(experts, x_TD.bfloat16(), dispatch)
        fused = run_experts(experts, x_TD.bfloat16(), dispatch)
    assert fused.dtype == torch.bfloat16 and torch.allclose(fused.float(), plain.float(), atol=0.05)


@pytest.mark.parametrize("mlp", [Gated, GatedInOne, Plain])
@pytest.mark.parametrize("bias", [True, False])
def test_grouped_products_equal_the_loop(mlp, bias):
    """The GPU path, on the CPU."""
    case = problem(mlp, bias)
    for found, plain in zip(gradients(grouped, *case), gradients(loop_over_experts, *case), strict=True):
        torch.testing.assert_close(found, plain, atol=2e-6, rtol=1e-5)


def test_grouped_products_in_bf16():
    case, exact = problem(Gated, dtype=torch.bfloat16), problem(Gated)
    for found, reference in zip(gradients(grouped, *case), gradients(loop_over_experts, *exact), strict=True):
        torch.testing.assert_close(found.float(), reference, atol=0.05, rtol=0.05)


def test_the_cpu_does_not_take_the_gpu_path():
    experts, x, _ = problem(Gated, dtype=torch.bfloat16)
    assert tensors_of(experts) is not None and not can_group(x.device, x.dtype, x.shape[1:])


@pytest.mark.parametrize(
    ("capability", "has_them"), [((8, 0), False), ((9, 0), True), ((10, 3), True), ((12, 0), False)]
)
def test_gpus_for_which_torch_has_no_grouped_kernels_do_without(capability, has_them, monkeypatch):
    """There each product would wait for the counts, and loop."""
    place = (torch.device("cuda"), torch.bfloat16, (16, 24))
    assert can_group(*place), "of a plan"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert can_group(*place) is has_them


def test_stacked_weights_are_read_where_they_lie():
    """After `lie_together`, and in flat buffers as DeepSpeed has them; each expert's gradient is its own."""
    case = problem(Gated)
    before = gradients(grouped, *case)
    experts = case[0]
    parameters, values = list(experts[1].parameters()), [p.clone() for p in experts[1].parameters()]
    assert in_place([expert.up_proj.weight for expert in experts]) is None
    lie_together(experts)
    assert all(new is old for new, old in zip(experts[1].parameters(), parameters, strict=True))
    assert all(torch.equal(new, old) for new, old in zip(parameters, values, strict=True))
    stacked = in_place([expert.up_proj.weight for expert in experts])
    assert stacked.shape == (4, 24, 16) and stacked.data_ptr() == experts[0].up_proj.weight.data_ptr()
    experts[2].up_proj.weight.data.add_(1.0)
    assert torch.equal(stacked[2], experts[2].up_proj.weight), "what an optimizer writes is read"
    experts[2].up_proj.weight.data.sub_(1.0)
    run = grouped(*case)
    assert run.grad_fn is not None
    for mine, theirs in zip(gradients(grouped, *case), before, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)

    flat = torch.arange(40.0)
    parts = [flat[begin : begin + 6].view(2, 3) for begin in (3, 13, 23)]
    assert torch.equal(in_place(parts), torch.stack(parts)) and in_place(parts).data_ptr() == parts[0].data_ptr()
    assert in_place([parts[0], parts[2], parts[1]]) is None, "the order is another one"
    assert in_place([flat[:6], flat[6:12], flat[20:26]]) is None and in_place([flat[:6], flat[6:11]]) is None


def test_rows_of_dropped_choices_weigh_nothing():
    """On a GPU they are run, so that the host need not count them."""
    experts, x, _ = problem(Gated)
    kept_Nk = torch.tensor([[1, 1], [0, 1], [1, 0]]).bool()
    choice = Choice(None, torch.tensor([[0, 1], [1, 2], [3, 1]]), kept_Nk, torch.zeros(3, dtype=torch.long), None)
    gate_Nk = torch.rand(3, 2) * kept_Nk
    kept, all_rows = (sort_by_expert(choice, gate_Nk, 4, leave_out) for leave_out in (True, False))
    assert len(kept.token_R) == 4 and len(all_rows.token_R) == 6
    assert kept.counts == [1, 1, 1, 1] and all_rows.counts == [1, 3, 1, 1]
    torch.testing.assert_close(run_experts(experts, x[:3], all_rows), run_experts(experts, x[:3], kept))


def saved_bytes(module, x):
    """What a forward keeps for the backward beside parameters, every memory once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def note(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = module(x)
    assert out.grad_fn is not None
    return sum(kept.values())


@pytest.mark.parametrize(("n_experts", "k", "width"), [(4, 2, 256), (16, 4, 128), (64, 8, 64)])
@pytest.mark.parametrize("mlp", [Gated, Plain])
@pytest.mark.parametrize("kernel", ["fused", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_keeps_less_than_a_dense_mlp_of_the_same_work(mlp, n_experts, k, width, kernel, dtype, padded):
    """Of k × width units, at any granularity, routing and its losses counted."""
    own = torch.float32 if dtype == "autocast" else dtype
    spec = MoESpec(num_experts=[n_experts], top_k_experts=k)
    layer = sparse_mlp(mlp(128, width, False, nn.SiLU()).to(own), spec, n_experts, 0)
    layer.context.kernel = kernel
    x, mask = torch.randn(2, 64, 128, dtype=own, requires_grad=True), torch.ones(2, 64, dtype=torch.bool)
    mask[1, 60:] = not padded
    layer.context.set(mask, None)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        sparse, dense = saved_bytes(layer, x), saved_bytes(mlp(128, k * width, False, nn.SiLU()).to(own), x)
    assert x.numel() * x.element_size() / 2 <= sparse <= dense
