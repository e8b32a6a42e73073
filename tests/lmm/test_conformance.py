"""What every architecture has to do, on a tiny random model of its class; `pytest tests/lmm --model-id ID` for one."""

import pytest
import torch

from moellava.constants import IGNORE_INDEX
from moellava.errors import UserError
from moellava.lmm.architecture import refuse_upcycling
from moellava.lmm.family_collators import collator_for
from moellava.lmm.loaders import find_model, load_lmm
from moellava.model.parts import parts_of
from moellava.model.saving import save_pretrained_folder
from moellava.moe import MoESpec, upcycle

STEPS = 6


def test_loads_masks_learns_saves_reopens_and_upcycles(conforming, samples_of, tiny_lmm, tmp_path):
    folder, raw, family = find_model(None, str(tiny_lmm(conforming)))
    released = load_lmm(folder, raw, family, dtype=torch.float32, trust_remote_code=family.remote_code)
    model = released.model

    placed = [id(held) for part in parts_of(model, family.keywords).values() for held in part.parameters()]
    assert sorted(placed) == sorted(map(id, model.parameters()))

    dataset = samples_of(conforming, released=released)
    collate = collator_for(conforming, released.processor, reader=dataset.reader)
    batch = collate([dataset[index] for index in range(3)])
    trained = batch["labels"] != IGNORE_INDEX
    assert trained.any(dim=1).all() and not trained[~batch["attention_mask"].bool()].any()
    assert not trained[batch["input_ids"] == dataset.reader.placeholder_id].any()
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

    model.config.moellava = {"version": "chat_template"}
    save_pretrained_folder(model.eval(), released.tokenizer, released.processor, tmp_path / "saved")
    again = load_lmm(
        *find_model(None, str(tmp_path / "saved")), dtype=torch.float32, trust_remote_code=family.remote_code
    )
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
        torch.testing.assert_close(again.model(**batch, use_cache=False).logits, logits, rtol=0, atol=1e-6)

    if family.remote_code:
        with pytest.raises(UserError, match="code in their own repository.* cannot be upcycled"):
            refuse_upcycling(family, "--moe_enable True")
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
    with pytest.raises(UserError, match="is a Linear, which is not a plain MLP"):
        upcycle(model, MoESpec(moe_mode="dense"))
