# SPDX-License-Identifier: Apache-2.0
"""Optimizer states by parameter: experts under their global indices, whichever rank holds them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from moellava.errors import UserError
from moellava.moe import MoESpec, convert_engine, upcycle
from moellava.train.deepspeed.portable import FOLDER, META, StoredStates, fill_buffers, stored_ep_size, trained


def test_what_trains_is_named_as_in_the_folder_on_every_rank(tiny_llava, monkeypatch):
    whole = dict(upcycle(tiny_llava(), MoESpec(moe_mode="sparse", init="noise")).named_parameters())
    experts = {name for name in whole if ".experts." in name}
    held = set()
    for rank in (0, 1):
        monkeypatch.setattr("moellava.moe.deepspeed.rank", lambda rank=rank: rank)
        monkeypatch.setattr("moellava.moe.deepspeed.world_size", lambda: 2)
        model = upcycle(tiny_llava(), MoESpec(moe_mode="sparse", init="noise"))
        model.get_input_embeddings().requires_grad_(False)
        found = list(trained(convert_engine(model, "deepspeed", ep_size=2)))
        assert all(torch.equal(parameter, whole[name]) for name, parameter, _ in found)
        own = {name for name, _, is_expert in found if is_expert}
        assert {name for name, _, _ in found} - own == whole.keys() - experts - {
            "model.language_model.embed_tokens.weight"
        }
        assert len(own) == len(experts) / 2 and not own & held
        held |= own
    assert held == experts


def test_a_tensor_is_read_from_the_stretches_of_all_ranks(tmp_path):
    numbers = torch.arange(10.0)
    for rank, (first, end) in enumerate(((0, 4), (4, 10))):
        save_file({f"head::fp32::{first}": numbers[first:end]}, tmp_path / f"state-rank-{rank}.safetensors")
    stored = StoredStates(tmp_path)
    assert torch.equal(stored.read("head::fp32", 0, 10), numbers)
    assert torch.equal(stored.read("head::fp32", 2, 5), numbers[2:7])
    assert torch.equal(stored.read("head::fp32", 5, 2), numbers[5:7])
    for name, count in (("head::fp32", 11), ("head::exp_avg", 1)):
        with pytest.raises(UserError, match=f"holds no {name}: the checkpoint is of another model or stage"):
            stored.read(name, 0, count)


def test_whole_tensors_of_older_checkpoints_are_read(tmp_path):
    save_file({"head::fp32": torch.arange(6.0).view(2, 3)}, tmp_path / "state-rank-0.safetensors")
    assert StoredStates(tmp_path).read("head::fp32", 2, 3).tolist() == [2, 3, 4]


def test_a_checkpoint_says_how_its_experts_were_spread(tmp_path):
    assert stored_ep_size(tmp_path) is None
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / META).write_text('{"ep_size": 4, "step": 1}')
    assert stored_ep_size(tmp_path) == 4


def test_what_routers_learn_without_an_optimizer_comes_from_the_folder(tiny_llava, tmp_path):
    spec = MoESpec(moe_mode="sparse", router_balance="bias")
    model = upcycle(tiny_llava(), spec)
    learnt = {name: torch.rand_like(value) for name, value in model.named_buffers() if name.endswith("router.bias")}
    save_file(learnt | {"lm_head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    fill_buffers(model, tmp_path)
    assert learnt and all(torch.equal(dict(model.named_buffers())[name], value) for name, value in learnt.items())
