# SPDX-License-Identifier: Apache-2.0
"""What runs the experts is chosen by name (`--moe_kernel`): it acts, is refused where it cannot, and says the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moellava.errors import UserError
from moellava.moe import MoESpec, experts, router_losses, upcycle, use_kernel
from moellava.moe.kernels import KERNELS, ExpertKernel
from moellava.moe.weights import Layout
from moellava.train.arguments import parse_arguments
from moellava.train.assemble import assemble
from moellava.train.stages import stage_of
from tests.processes import words_of
from tests.tiny import compose_tiny, tiny_llava

CPU, FP32 = torch.device("cpu"), torch.float32


def run_masked(x_TD, dispatch, layout: Layout, flat):
    """As a package of somebody's would: all experts over all rows, and a mask."""
    ends_E = dispatch.count_E.cumsum(0)
    every_R, out_TD = torch.arange(len(dispatch.token_R)), torch.zeros_like(x_TD)
    row_RD = x_TD.index_select(0, dispatch.token_R)
    for expert, end, count in zip(layout.experts(flat), ends_E, dispatch.count_E, strict=True):
        inner_RI = layout.activation(nn.functional.linear(row_RD, expert.w1_ID, expert.b1_I))
        if layout.is_gated:
            inner_RI = inner_RI * nn.functional.linear(row_RD, expert.w3_ID, expert.b3_I)
        y_RD = nn.functional.linear(inner_RI, expert.w2_DI, expert.b2_D)
        gate_R = torch.where((every_R < end) & (every_R >= end - count), dispatch.gate_R, 0)
        out_TD = out_TD.index_add(0, dispatch.token_R, y_RD * gate_R.unsqueeze(1))
    return out_TD


@pytest.fixture
def masked(monkeypatch) -> list[int]:
    """Registers it, for this test; how many rows it has run."""
    rows: list[int] = []
    monkeypatch.setattr(KERNELS, "_entries", dict(KERNELS._entries))

    def run(x_TD, dispatch, *tensors):
        rows.append(len(dispatch.token_R))
        return run_masked(x_TD, dispatch, *tensors)

    KERNELS.register("masked", ExpertKernel(run))
    return rows


@pytest.fixture
def sparse() -> nn.Module:
    return upcycle(tiny_llava(hidden_size=32, intermediate_size=64), MoESpec(moe_mode="dense")).train()


@pytest.mark.parametrize("name", ["loop", "fused", "grouped", "masked"])
def test_every_kernel_says_the_same(name, sparse, masked):
    found = []
    for kernel in ("auto", name):
        model, ids = copy.deepcopy(sparse), torch.arange(6, 22).view(2, 8)
        assert use_kernel(model, kernel, CPU, FP32) == ("fused" if kernel == "auto" else name)
        out = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        ((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + router_losses(model).total).backward()
        grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        found.append({"out": out.detach()} | grads)
    assert found[0].keys() == found[1].keys() and any("experts.3" in key for key in found[0])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    assert masked == (4 * [32] if name == "masked" else []), "four layers, two choices of 16 tokens"


def test_the_name_decides_what_runs(sparse, monkeypatch):
    for name, replaced in (("loop", "loop_over_experts"), ("fused", "FusedExperts"), ("grouped", "run_grouped")):
        use_kernel(sparse, name, CPU, FP32)
        with monkeypatch.context() as patched:
            patched.setattr(experts, replaced, None)
            with pytest.raises((TypeError, AttributeError), match="NoneType"):
                sparse.get_decoder()(input_ids=torch.arange(6, 14).view(1, 8), use_cache=False)


@pytest.mark.parametrize(
    ("kernel", "place", "words"),
    [
        ("fusde", (CPU, FP32), "Unknown --moe_kernel 'fusde'. Did you mean 'fused'.*auto, loop, fused, grouped, sc"),
        ("theirs", (CPU, FP32), "--moe_kernel theirs needs the package no_such_package.*--moe_kernel auto"),
        ("gpu", (CPU, FP32), "--moe_kernel gpu cannot run here .cpu, float32.: it needs a GPU.*--moe_kernel auto"),
        ("sonicmoe", (CPU, FP32), "--moe_kernel sonicmoe is not served: .*Hopper GPU.*Take grouped .*plug-in"),
        ("Sonic-MoE", (CPU, FP32), "--moe_kernel Sonic-MoE is not served: .*Hopper GPU"),
        ("megablocks", (CPU, FP32), "--moe_kernel megablocks is not served: .*torch 2.7.0 alone.*Take grouped"),
        ("liger_kernel", (CPU, FP32), "--moe_kernel liger_kernel is not served: .*--use_liger_kernel, is refused too"),
        ("flash-attn", (CPU, FP32), "--moe_kernel flash-attn is not served: .*--attn_implementation flash_attention_2"),
        ("grouped", (torch.device("cuda"), torch.float16), "grouped cannot run here .cuda, float16.*--bf16 True"),
    ],
)
def test_what_cannot_run_is_refused_by_name(kernel, place, words, sparse, masked):
    KERNELS.register("theirs", ExpertKernel(run_masked, package="no_such_package"))
    no_gpu = lambda device, dtype: None if device.type == "cuda" else "it needs a GPU"  # noqa: E731
    KERNELS.register("gpu", ExpertKernel(run_masked, why_not=no_gpu))
    with pytest.raises(UserError, match=words):
        use_kernel(sparse, kernel, *place)


@pytest.mark.parametrize(("dtype", "multiple"), [(FP32, 4), (torch.bfloat16, 8)])
def test_sizes_that_grouped_products_do_not_take_are_refused(dtype, multiple):
    odd = upcycle(tiny_llava(hidden_size=32, intermediate_size=62), MoESpec(moe_mode="dense")).train()
    with pytest.raises(UserError, match=f"takes sizes that are multiples of {multiple} numbers; .* have 32 and 62"):
        use_kernel(odd, "grouped", CPU, dtype)
    assert use_kernel(odd, "auto", torch.device("cuda"), torch.bfloat16) == "fused"


def test_a_plug_in_may_take_a_name_that_is_not_served(sparse, masked):
    KERNELS.register("sonicmoe", KERNELS["masked"])
    assert use_kernel(sparse, "sonicmoe", CPU, FP32) == "sonicmoe"


def test_experts_that_a_kernel_does_not_know_are_refused(sparse):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    sparse.get_decoder().layers[1].mlp.experts[0].down_proj = Doubled(64, 32, bias=False)
    for name in ("fused", "grouped"):
        with pytest.raises(UserError, match=f"--moe_kernel {name} runs experts of two or three plain linears"):
            use_kernel(sparse, name, CPU, FP32)
    assert use_kernel(sparse, "auto", CPU, FP32) == "fused, loop" and use_kernel(sparse, "loop", CPU, FP32) == "loop"


def test_auto_takes_grouped_products_on_a_gpu(sparse):
    assert use_kernel(sparse, "auto", torch.device("cuda"), torch.bfloat16) == "grouped"
    assert use_kernel(sparse, "auto", torch.device("cuda"), torch.float16) == "fused"


def test_the_flag_acts_in_stage_3_and_the_log_says_what_runs(parts, flags_for, tmp_path, caplog, masked):
    compose_tiny(parts / "lm", parts / "tower", "qwen").save(tmp_path / "finetune", meta={"stage": "finetune"})

    def assembled(**flags):
        groups = parse_arguments(words_of(flags_for(tmp_path, "moe") | {"deepspeed": None} | flags))
        return assemble(stage_of(groups[0], groups[2]), *groups).vlm.model

    model = assembled(moe_kernel="masked")
    model.get_decoder()(input_ids=torch.arange(6, 14).view(1, 8), use_cache=False)
    assert masked and "Experts run by --moe_kernel masked: masked" in caplog.messages
    assembled()
    assert "Experts run by --moe_kernel auto: fused" in caplog.messages
    with pytest.raises(UserError, match="--moe_kernel fused runs experts of two or three plain linears"):
        use_kernel(assembled(lora_enable=True, lora_r=2), "fused", CPU, FP32)
