# SPDX-License-Identifier: Apache-2.0
"""The adapter to ScatterMoE, against a stand-in for the package that does in torch what its functions are said to do.

The package itself needs Triton: `scripts/check_kernels.sh` compares it.
"""

from __future__ import annotations

import copy
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from moellava.errors import UserError
from moellava.moe import MoESpec, router_losses, scattered, upcycle, use_kernel
from moellava.moe.experts import run_experts, sort_by_expert
from moellava.moe.kernels import Dispatch, require_kernel
from moellava.moe.places import in_place, lie_together
from moellava.moe.router import Choice
from moellava.moe.weights import tensors_of
from tests.moe.test_fused import Gated, GatedInOne, Plain, gradients, problem
from tests.tiny import tiny_llava

CPU, FP32 = torch.device("cpu"), torch.float32


class StandIn(ModuleType):
    """`parallel_linear` of ScatterMoE 0.3.0 in torch; Attributes: calls, (fan out, sorted in, sorted out, weight)."""

    def __init__(self):
        super().__init__("scattermoe")
        self.__spec__ = ModuleSpec("scattermoe", None)
        self.kernels = SimpleNamespace(ops=SimpleNamespace(ALLOW_TF32=True))
        self.calls: list[tuple] = []

    def parallel_linear(
        self,
        inputs,
        expert_weights,
        k,
        sorted_expert_idxs,
        sorted_scattered_idxs,
        expert_offsets,
        expert_biases=None,
        gates=None,
        grouped_in=False,
        grouped_out=False,
    ):
        """Row r is multiplied by [in, out] of its expert. It is input row r (`grouped_in`), or the one of its choice's
        token; its result is row r (`grouped_out`), or that of its choice."""
        assert len(sorted_scattered_idxs) == len(sorted_expert_idxs) == len(inputs) * k
        assert gates is None and (sorted_expert_idxs.diff() >= 0).all()
        assert torch.equal(expert_offsets, sorted_expert_idxs.bincount(minlength=len(expert_weights)).cumsum(0))
        self.calls.append((k, grouped_in, grouped_out, expert_weights))
        rows = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
        y = torch.einsum("rd,rdi->ri", rows, expert_weights[sorted_expert_idxs])
        if expert_biases is not None:
            y = y + expert_biases[sorted_expert_idxs]
        return y if grouped_out else torch.empty_like(y).index_copy(0, sorted_scattered_idxs, y)


@pytest.fixture
def package(monkeypatch) -> StandIn:
    """In the place of the package, as if Triton's interpreter were on."""
    made = StandIn()
    monkeypatch.setitem(sys.modules, "scattermoe", made)
    monkeypatch.setenv(scattered.INTERPRETER, "1")
    return made


def by(kernel):
    return lambda experts, x, dispatch: run_experts(experts, x, dispatch, kernel)


@pytest.mark.parametrize("mlp", [Gated, GatedInOne, Plain])
@pytest.mark.parametrize("bias", [True, False])
def test_it_says_what_fused_says_of_rows_that_are_gathered(mlp, bias, package):
    """Their order among the choices is not known, as for rows that came from other ranks."""
    case = problem(mlp, bias)
    for found, wanted in zip(gradients(by("scattermoe"), *case), gradients(by("fused"), *case), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)
    assert all(call[0] == 1 and call[1] and call[2] for call in package.calls) and package.calls


def routed(kind: str, kernel: str, mlp: type, bias: bool) -> list[torch.Tensor]:
    """Output and gradients of a layer's forward; 'all': every token is real and keeps its choices."""
    experts, x, _ = problem(mlp, bias)
    token_N = torch.tensor([0, 2, 3, 5]) if kind == "padded" else None
    count = 6 if token_N is None else 4
    expert_Nk = torch.rand(count, 3, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :2]
    kept_Nk = torch.rand(count, 2, generator=torch.Generator().manual_seed(3)) > 0.3 if kind == "dropped" else None
    choice = Choice(token_N, expert_Nk, kept_Nk, torch.zeros(count, dtype=torch.long), None)
    gate_Nk = torch.linspace(0.1, 0.9, 2 * count).view(count, 2).requires_grad_()
    x.requires_grad_()
    out = run_experts(experts, x, sort_by_expert(choice, gate_Nk, 4), kernel)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), x.grad, gate_Nk.grad, *(p.grad for expert in experts for p in expert.parameters())]


@pytest.mark.parametrize("mlp", [Gated, GatedInOne, Plain])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "fan_out"), [("all", 2), ("padded", 1), ("dropped", 1)])
def test_rows_of_all_choices_are_read_and_written_where_tokens_are(kind, fan_out, mlp, bias, package):
    for found, wanted in zip(routed(kind, "scattermoe", mlp, bias), routed(kind, "fused", mlp, bias), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)
    inward, outward = package.calls[0], package.calls[-1]
    assert inward[:3] == (fan_out, fan_out == 1, True) and outward[:3] == (1, True, fan_out == 1)


def test_weights_are_read_where_they_lie_and_bf16_stays(package):
    experts, x, dispatch = problem(Gated, dtype=torch.bfloat16)
    lie_together(experts)
    assert by("scattermoe")(experts, x, dispatch).dtype == torch.bfloat16
    for linear, (*_, weight) in zip(("gate_proj", "up_proj", "down_proj"), package.calls, strict=True):
        own = [getattr(expert, linear).weight for expert in experts]
        assert in_place(own) is not None and weight.data_ptr() == own[0].data_ptr()
        torch.testing.assert_close(weight, torch.stack(own).transpose(1, 2), atol=0, rtol=0)


def test_no_rows_at_all(package):
    experts, x, _ = problem(Gated)
    nothing = Dispatch(torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(4, dtype=torch.long))
    out, dx, _, *grads = gradients(by("scattermoe"), experts, x, nothing)
    assert not out.any() and not dx.any() and all(g is not None and not g.any() for g in grads)


def test_a_model_says_the_same(package):
    sparse = upcycle(tiny_llava(hidden_size=32, intermediate_size=64), MoESpec(moe_mode="dense")).train()
    found = []
    for kernel in ("fused", "scattermoe"):
        model, ids = copy.deepcopy(sparse), torch.arange(6, 22).view(2, 8)
        assert use_kernel(model, kernel, CPU, FP32) == kernel
        out = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        ((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + router_losses(model).total).backward()
        found.append({"out": out.detach()} | {key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    assert len(package.calls) == 4 * 3, "four layers of three linears"


def test_tf32_is_as_in_products_of_torch(package):
    case, matmul = problem(Plain), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            matmul.fp32_precision = precision
            by("scattermoe")(*case)
            assert package.kernels.ops.ALLOW_TF32 is (precision == "tf32")
    finally:
        matmul.fp32_precision = before


def test_importing_it_leaves_transformers_as_it_was(monkeypatch):
    """The package replaces forwards of two of transformers' classes when it is imported."""
    ours = SimpleNamespace(Patched=type("Patched", (nn.Module,), {"forward": lambda self, x: "ours"}))
    made = StandIn()

    def imported(name):
        if name == "scattermoe":
            ours.Patched.forward = lambda self, x: "theirs"
            return made
        return ours

    monkeypatch.setattr(scattered, "REPLACED", {"a.module": "Patched", "another.module": "Gone"})
    monkeypatch.setattr(scattered, "import_module", imported)
    assert scattered._imported() is made and ours.Patched()(None) == "ours"


@pytest.mark.parametrize(
    ("device", "dtype", "interpreter", "words"),
    [
        ("cpu", torch.float32, "0", "scattermoe cannot run here .cpu, float32.: .*TRITON_INTERPRET=1"),
        ("cpu", torch.bfloat16, "1", "scattermoe cannot run here .cpu, bfloat16.: Triton's interpreter multiplies"),
        ("cuda", torch.float64, "0", "scattermoe cannot run here .cuda, float64.: it sums in float32"),
    ],
)
def test_where_it_cannot_run_it_is_refused(device, dtype, interpreter, words, package, monkeypatch):
    monkeypatch.setenv(scattered.INTERPRETER, interpreter)
    with pytest.raises(UserError, match=words + ".*--moe_kernel auto"):
        require_kernel("scattermoe", torch.device(device), dtype)
    assert require_kernel("scattermoe", torch.device("cuda"), torch.bfloat16).run is scattered.run_scattered


def test_an_older_release_is_refused(package, monkeypatch):
    monkeypatch.setattr(package, "parallel_linear", lambda inputs, expert_weights, k, padded_block_idxs: None)
    with pytest.raises(UserError, match="scattermoe cannot run here.*older than release 0.3.0.*--moe_kernel auto"):
        require_kernel("scattermoe", torch.device("cuda"), torch.bfloat16)


def test_without_the_package_it_is_refused(monkeypatch):
    monkeypatch.setattr("moellava.moe.kernels.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--moe_kernel scattermoe needs the package scattermoe.*--moe_kernel auto"):
        require_kernel("scattermoe", torch.device("cuda"), torch.bfloat16)


def test_experts_with_adapters_are_refused(package):
    sparse = upcycle(tiny_llava(hidden_size=32, intermediate_size=64), MoESpec(moe_mode="dense"))
    expert = sparse.get_decoder().layers[0].mlp.experts[0]
    assert tensors_of([expert]) is not None
    expert.down_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="--moe_kernel scattermoe runs experts of two or three plain linears"):
        use_kernel(sparse, "scattermoe", CPU, FP32)
