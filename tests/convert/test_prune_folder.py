# SPDX-License-Identifier: Apache-2.0
"""`moellava prune`: the folder that is written holds the experts that carry most, and opens."""

from __future__ import annotations

import pytest
import torch

from moellava.cli import main
from moellava.convert import prune_folder
from moellava.moe import MoESpec, moe_layers, upcycle
from tests.tiny import compose_tiny, reopen


@pytest.fixture
def sparse(make_base, clip_tower, tmp_path):
    """A stage-3 folder whose router of layer 0 sends all tokens to experts 3 and 1."""
    vlm = compose_tiny(make_base("llama").folder, clip_tower, "v1")
    spec = MoESpec(moe_mode="dense", router_balance="bias")
    upcycle(vlm.model, spec)
    for _, layer in moe_layers(vlm.model):
        layer.experts[2].down_proj.weight.data.mul_(1e-6)
    moe_layers(vlm.model)[0][1].router.bias.copy_(torch.tensor([0.0, 2.0, 1.0, 3.0]))
    vlm.sparse(spec)
    vlm.save(tmp_path / "sparse", meta={"stage": "moe"})
    return tmp_path / "sparse"


def prune(folder, target, parts, *flags):
    words = ["--data", str(parts / "sft.json"), "--image-folder", str(parts / "images"), "--records", "4", *flags]
    return main(["prune", "--model-path", str(folder), "--output-dir", str(target), *words])


@pytest.mark.parametrize("merge", [[], ["--merge"]])
def test_the_heaviest_stay(sparse, tmp_path, parts, capsys, merge):
    assert prune(sparse, tmp_path / "small", parts, "--keep", "3", *merge) == 0
    said = capsys.readouterr().out
    assert "layer 0: keeps 0, 1, 3 of 4 experts, which carried 100.0 %" in said
    assert said.count("keeps") == 4 and "keeps 0, 1, 3" in said.splitlines()[1]
    before, after = reopen(sparse), reopen(tmp_path / "small")
    assert after.spec.num_experts == [3, 3, 3, 3] and after.section.stage == "moe"
    layers = (moe_layers(one.model)[0][1] for one in (before, after))
    old, new = (layer.experts for layer in layers)
    assert torch.equal(new[2].down_proj.weight, old[3].down_proj.weight)
    assert moe_layers(after.model)[0][1].router.bias.tolist() == [0.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "keep, said",
    [
        (1, "--keep 1: each token visits 2 experts"),
        (4, "--keep 4: no layer has more than 4 experts, so that none would go"),
        (9, "--keep 9: no layer has more than 4 experts"),
    ],
)
def test_too_few_and_too_many_are_refused_before_anything_is_measured(
    sparse, tmp_path, parts, capsys, keep, said, monkeypatch
):
    monkeypatch.setattr(prune_folder, "carried", lambda *_: pytest.fail("measured"))
    assert prune(sparse, tmp_path / "small", parts, "--keep", str(keep)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
