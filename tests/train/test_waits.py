# SPDX-License-Identifier: Apache-2.0
"""What makes the host wait for the device: numbers that are read, and sizes that only the device knows."""

from __future__ import annotations

import traceback
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llava import modeling_llava
from transformers.utils import import_utils

from moellava.data.places import Places, places_of
from moellava.moe import (
    MoESpec,
    convert_engine,
    deepspeed,
    experts,
    losses,
    moe_layers,
    router_losses,
    router_metrics,
    set_routing_context,
    upcycle,
)
from moellava.moe.weights import tensors_of
from moellava.train.loss import SupervisedHead, supervised_positions
from moellava.train.stopping import StepWatch, StopRequest
from moellava.train.trainer import StageTrainer
from tests import tiny
from tests.processes import train_here

READS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "repeat_interleave.Tensor")


class Waits(TorchDispatchMode):
    """Counts operations whose result the host has to wait for.

    Attributes:
        names: of those that there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = str(function).removeprefix("aten.")
        is_mask = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        )
        is_sized = (kwargs or {}).get("output_size") is not None
        if is_mask or (name.startswith(READS) and not is_sized):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("operation", "waits"),
    [
        (lambda x: float(x.sum()), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: (x > 0).nonzero(), 1),
        (lambda x: x.index_select(0, torch.tensor([1])), 0),
        (lambda x: torch.where(x > 0, x, 0).sum(), 0),
    ],
)
def test_waits_are_counted(operation, waits):
    with Waits() as counted:
        operation(torch.ones(3))
    assert len(counted.names) == waits


def sparse_model(**options: Any) -> Any:
    """A Llava with two sparse layers, each of whose experts has been looked at: a trace has no numbers."""
    model = upcycle(tiny.tiny_llava(hidden_size=32, intermediate_size=64), MoESpec(moe_mode="dense", **options)).train()
    for _, layer in moe_layers(model):
        assert tensors_of(list(layer.experts)) is not None
    return model


def step(model: Any, places: Places, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A micro-batch of the language model as `compute_loss` has it: experts, loss, router losses, statistics."""
    head = SupervisedHead(model.lm_head, 96)
    head.is_last = True
    supervised = supervised_positions(labels, places.supervised)
    set_routing_context(model, mask, mask, places.real, (places.sequence, places.n_sequences))
    embedded = model.get_input_embeddings()(labels.clamp_min(0))
    hidden = model.get_decoder()(inputs_embeds=embedded, use_cache=False).last_hidden_state
    with head.only(supervised):
        logits = model.lm_head(hidden)
    loss = head.loss_sum(logits, supervised.target_N)
    loss = loss + router_losses(model, total_tokens=mask.sum().double()).total
    loss.backward()
    return loss.detach()


@pytest.fixture
def batch() -> tuple[Places, torch.Tensor, torch.Tensor]:
    """Two rows of 16 tokens, the second with padding: places, labels, mask."""
    labels, mask = torch.randint(6, 96, (2, 16)), torch.ones(2, 16, dtype=torch.bool)
    mask[1, 9:] = False
    labels = labels.where(mask, -100)
    return places_of(labels, mask.long()), labels, mask


@pytest.fixture
def gpu_paths(monkeypatch) -> None:
    """What runs where the host must not ask: a build of torch without CUDA cannot index tensors that are there."""
    for module in (losses, experts):
        monkeypatch.setattr(module, "is_at_hand", lambda tensor: False)
    monkeypatch.setattr(experts, "can_group", lambda *found: True)


OPTIONS = [{}, {"capacity_factor": 1.0}, {"router_balance": "bias"}, {"use_residual": True}]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_sparse_step_on_a_gpu_needs_no_number_of_the_device(options, gpu_paths, batch):
    """Traced without numbers: whatever needs one is an error there."""
    model = sparse_model(**options).bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        places = batch[0]._replace(**{name: mode.from_tensor(getattr(batch[0], name)) for name in TENSORS})
        loss = step(model, places, *map(mode.from_tensor, batch[1:]))
    assert type(loss).__name__ == "FakeTensor"
    sums = moe_layers(model)[0][1].stats.vector(loss.device)
    assert type(sums).__name__ == "FakeTensor", "it was counted"


def test_experts_over_several_ranks_wait_once_a_layer(gpu_paths, batch, monkeypatch):
    """For the sizes of the exchange. Here each rank talks to a mirror: it gets back what it sends."""
    monkeypatch.setattr(deepspeed, "rank", lambda: 0)
    monkeypatch.setattr(deepspeed, "world_size", lambda: 2)
    mirror = SimpleNamespace(all_to_all_single=lambda received, sent, *splits, **group: received.copy_(sent))
    monkeypatch.setattr(deepspeed, "dist", mirror)
    listed, plain = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: listed.append(self.shape) or plain(self))
    model = convert_engine(sparse_model(), "deepspeed", ep_size=2)
    for _, layer in moe_layers(model):
        layer.deepspeed_moe.ep_group = "two ranks"
    with Waits() as waits:
        step(model, *batch)
    from_layers = [name for name in waits.names if not name.startswith("_local_scalar")]
    assert from_layers == [] and listed == [(2, 2)] * len(moe_layers(model))


TENSORS = ("supervised", "real", "sequence")


@pytest.mark.parametrize("options", OPTIONS)
def test_the_paths_of_a_gpu_give_what_those_of_the_cpu_give(options, batch, request):
    losses_found, loads = [], []
    for _ in range(2):
        model = sparse_model(**options)
        with Waits() as waits:
            losses_found.append(step(model, *batch))
        loads.append(router_metrics(model))
        gradient = model.get_decoder().layers[1].mlp.experts[2].up_proj.weight.grad
        if not loads[1:]:
            wanted = gradient
            request.getfixturevalue("gpu_paths")
    mine = [name for name in waits.names if not name.startswith("_local_scalar")]
    assert mine == [], "of the second, on the paths of a GPU"
    torch.testing.assert_close(losses_found[1], losses_found[0])
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-4)
    for layer, counts in loads[0].items():
        assert loads[1][layer]["load"] == counts["load"] and loads[1][layer]["load_image"] == counts["load_image"]


def test_masks_are_looked_at_once_a_forward_where_places_are_not_known(gpu_paths, batch):
    model = sparse_model()
    with Waits() as waits:
        set_routing_context(model, batch[2])
        model.get_decoder()(inputs_embeds=torch.randn(2, 16, 32), use_cache=False)
    assert [name for name in waits.names if name.startswith(("index", "nonzero"))] == ["index.Tensor", "nonzero"][:1]


class WaitsOfFiles(Waits):
    """Counts them by the file that asks, without those of the data, which lie on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.files: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        before = len(self.names)
        out = super().__torch_dispatch__(function, types, args, kwargs)
        if len(self.names) > before:
            files = [frame.filename for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
            if not any("/moellava/data/" in file for file in files):
                self.files[next(file for file in reversed(files) if file not in (__file__, IMPORTS))] += 1
        return out


IMPORTS = import_utils.__file__  # where transformers' check stands


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_micro_batch_of_a_run_has_the_host_wait_for_questions_of_transformers_alone(
    attention, flags_for, tmp_path, monkeypatch, request
):
    """Of a whole model and the whole loop: LLaVA compares image tokens and features, in two questions one after the
    other; nothing is asked at a micro-batch's end."""
    train_here(flags_for(tmp_path, "pretrain") | {"max_steps": 1, "skip_dry_save": True})
    train_here(flags_for(tmp_path, "finetune") | {"max_steps": 1, "skip_dry_save": True})
    flags = flags_for(tmp_path, "moe") | {"max_steps": 2, "skip_dry_save": True, "save_strategy": "no"}
    flags |= {"per_device_train_batch_size": 2, "attn_implementation": attention}
    request.getfixturevalue("gpu_paths")
    found, loop = [], StageTrainer._inner_training_loop

    def counted(self: StageTrainer, *args: Any, **options: Any) -> Any:
        with WaitsOfFiles() as waits:
            result = loop(self, *args, **options)
        found.append(waits.files)
        return result

    monkeypatch.setattr(StageTrainer, "_inner_training_loop", counted)
    for accumulation in (1, 4):
        train_here(flags | {"gradient_accumulation_steps": accumulation, "output_dir": tmp_path / str(accumulation)})
    more = found[1] - found[0]
    assert more == {modeling_llava.__file__: 2 * (2 * 4 - 2 * 1)}


def test_losses_are_looked_at_once_a_step():
    watch = StepWatch(SimpleNamespace(last_grad_norm=torch.tensor(1.0)), StopRequest())
    arguments = SimpleNamespace(fp16=False, device="cpu")
    with Waits() as waits:
        for _ in range(4):
            watch.see({"ce": torch.ones(()), "aux": torch.ones(())}, ["Record 1"])
        assert not waits.names
        watch.on_pre_optimizer_step(arguments, SimpleNamespace(global_step=0), None)
    assert len(waits.names) <= 1 and not watch.seen
