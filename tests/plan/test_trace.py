# SPDX-License-Identifier: Apache-2.0
"""A step on fake tensors keeps and multiplies what a real one does."""

import pytest
import torch

from moellava.moe import MoESpec, expert_parameters, fused, moe_layers, router_losses, router_parameters, upcycle
from moellava.moe.fused import FusedExperts
from moellava.plan.counting import Counting
from moellava.plan.samples import Batch
from moellava.plan.spread import spread
from moellava.plan.trace import StepTrace
from moellava.train.loss import LinearLoss, cross_entropy_sum, supervised_positions
from moellava.train.rows import NeededRows
from moellava.train.sample_attention import SampleAttention
from tests.tiny import tiny_llava

BATCH = Batch(samples=2, length=48, supervised=12)
ROW = Batch(samples=1, length=96, supervised=24, parts=(60, 36))


def model(is_sparse: bool, device: str):
    with torch.device(device):
        made = tiny_llava()
    if is_sparse:
        upcycle(made, MoESpec(num_experts=[4], moe_mode="dense"))
        trained = {id(parameter) for parameter in [*expert_parameters(made), *router_parameters(made)]}
        for parameter in made.parameters():
            parameter.requires_grad_(id(parameter) in trained)
    return made.train()


def real_step(made, batch: Batch, chunked: bool) -> Counting:
    """What a real step with real numbers allocates, by the same count."""
    counting = Counting([*made.parameters(), *made.buffers()])
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(counting.keep_gradient)
    labels, places, positions = batch.told()
    supervised = supervised_positions(labels, places.supervised)
    ids = torch.arange(batch.positions).view(batch.samples, -1) % 50
    rows, attention = NeededRows(made), SampleAttention(made)
    attention.is_on = True
    with counting, rows.only_within(), attention:
        rows.tell(places, supervised)
        attention.tell(places.lengths)
        outputs = made.model.language_model(input_ids=ids, position_ids=positions, use_cache=False)
        hidden = outputs.last_hidden_state
        hidden_ND, target_N = hidden.flatten(0, 1).index_select(0, supervised.place_N), supervised.target_N
        if chunked:
            loss = LinearLoss.apply(hidden_ND, made.lm_head.weight, None, target_N, len(target_N), 0.0, hidden.dtype)
        else:
            loss = cross_entropy_sum(made.lm_head(hidden_ND), target_N)
        if moe_layers(made):
            loss = loss + router_losses(made).total
        loss.backward()
    return counting


@pytest.mark.parametrize("batch", [BATCH, ROW], ids=["rows", "one row"])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("is_sparse", [False, True])
def test_a_fake_step_takes_what_a_real_one_takes(is_sparse, chunked, batch):
    real = real_step(model(is_sparse, "cpu"), batch, chunked)
    told = StepTrace(model(is_sparse, "meta"), on_gpu=False).step(batch, checkpointing=False, chunked=chunked)
    assert told.activations == pytest.approx(real.peak, rel=0.1)
    assert told.with_gradients == pytest.approx(real.peak_with_gradients, rel=0.1)
    assert told.flops == pytest.approx(real.flops, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_checkpoints_keep_less_and_multiply_more_and_a_gpu_runs_grouped_products(ep_size, monkeypatch):
    monkeypatch.setattr(FusedExperts, "apply", None)  # a thousand blocks of elements an expert, of which a GPU has none
    made = model(True, "meta").to(torch.bfloat16)
    spread(made, ep_size)
    trace = StepTrace(made, on_gpu=True)
    kept, again = (trace.step(Batch(4, 128, 4), checkpointing=on) for on in (False, True))
    assert again.activations < 0.9 * kept.activations
    assert again.flops > kept.flops
    back = trace.step(Batch(4, 128, 4), checkpointing=False)
    assert back.activations == pytest.approx(kept.activations, rel=1e-3) and back.flops == kept.flops


@pytest.mark.slow
@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_blocks_of_elements_are_a_cpus_alone_forward_and_backward(on_gpu, ep_size, monkeypatch):
    """Experts in fp16 and fp32 run one after another on a GPU, too."""
    cut: list[bool] = []
    blocks = fused._blocks
    monkeypatch.setattr(fused, "BLOCK", 2048)
    monkeypatch.setattr(fused, "_blocks", lambda rows, *of: cut.append(rows < len(of[0])) or blocks(rows, *of))
    made = model(True, "meta")
    spread(made, ep_size)
    trace = StepTrace(made, on_gpu)
    trace.step(Batch(4, 128, 4), checkpointing=False)
    assert len(cut) > 2 * len(moe_layers(trace.model)) and set(cut) == {not on_gpu}


def test_spread_experts_multiply_as_much_and_keep_the_rows_that_travel():
    whole, part = model(True, "meta"), model(True, "meta")
    spread(part, 2)
    assert [len(layer.experts) for _, layer in moe_layers(part)] == [2] * len(moe_layers(part))
    whole, part = (StepTrace(made, on_gpu=False).step(BATCH, checkpointing=False) for made in (whole, part))
    assert part.flops == pytest.approx(whole.flops, rel=0.02)
    assert part.activations > whole.activations


def test_images_are_traced_through_the_tower():
    trace = StepTrace(model(False, "meta"), on_gpu=False)
    assert trace.shows_images
    text, shown = (trace.step(Batch(2, 48, 12, images), False) for images in (0, 1))
    assert shown.flops > text.flops
