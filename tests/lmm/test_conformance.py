# SPDX-License-Identifier: Apache-2.0
"""What every architecture has to do, on a tiny random model of its class; `pytest tests/lmm --model-id ID` for one."""

import pytest
import torch

from moellava.constants import IGNORE_INDEX
from moellava.errors import UserError
from moellava.lmm.architecture import ARCHITECTURES
from moellava.model.manifest import read_folder
from moellava.moe import MoESpec, upcycle
from moellava.vlm import describe
from tests.lmm.tiny import batch_of, reopen

STEPS = 6


def test_loads_masks_learns_saves_reopens_and_upcycles(conforming, samples_of, tiny_lmm, tmp_path):
    remote_code = ARCHITECTURES[conforming].remote_code
    vlm = reopen(tiny_lmm(conforming), remote_code)
    model = vlm.model
    assert vlm.architecture is ARCHITECTURES[conforming]

    placed = [id(held) for part in vlm.parts.values() for held in part.parameters()]
    assert sorted(placed) == sorted(map(id, model.parameters()))

    dataset = samples_of(conforming, vlm=vlm)
    batch = batch_of(conforming, dataset, 0, 1, 2)
    trained = batch["labels"] != IGNORE_INDEX
    assert trained.any(dim=1).all() and not trained[~batch["attention_mask"].bool()].any()
    assert not trained[batch["input_ids"] == vlm.reader.placeholder_id].any()
    assert not trained[batch["input_ids"] < 0].any()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]

    model.eval()
    vlm.save(tmp_path / "saved")
    again = reopen(tmp_path / "saved", remote_code)
    assert again.section == vlm.section and again.section.architecture == conforming
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
        torch.testing.assert_close(again.model(**batch, use_cache=False).logits, logits, rtol=0, atol=1e-6)

    if remote_code:
        with pytest.raises(UserError, match="code of their own.* cannot be upcycled"):
            folder = read_folder(tiny_lmm(conforming), "--model-path")
            describe(folder, trust_remote_code=True).architecture.refuse_upcycling("--moe_enable True")
        return
    spec = MoESpec(num_experts=[2], moe_mode="dense")
    upcycle(again.model, spec)
    with torch.no_grad():
        sparse = again.model(**batch, use_cache=False).logits
    torch.testing.assert_close(sparse, logits, rtol=1e-4, atol=1e-5)


def test_a_decoder_without_plain_mlps_says_why_it_cannot_be_upcycled(opened):
    import copy

    model = copy.deepcopy(opened("llava-1.5").model)
    model.get_decoder().layers[1].mlp = torch.nn.Linear(16, 16)
    with pytest.raises(UserError, match=r"mlp \(Linear\).* none is a plain MLP"):
        upcycle(model, MoESpec(moe_mode="dense"))
