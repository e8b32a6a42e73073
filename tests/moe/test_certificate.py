# SPDX-License-Identifier: Apache-2.0
"""Certificates: what they measure, and that a broken exact recipe stops."""

from __future__ import annotations

import json

import pytest
import torch

from moellava.moe import MoESpec, moe_layers
from moellava.moe import certificate as certificates
from moellava.moe.certificate import NotExactError, upcycle_certified
from moellava.vlm import VLM
from tests.tiny import compose_tiny


@pytest.fixture
def vlm(make_base, clip_tower) -> VLM:
    """A dense model of its own, whose images are 4 tokens."""
    return compose_tiny(make_base("llama").folder, clip_tower, "v1")


def test_an_exact_recipe_is_exact_with_and_without_an_image(vlm, tmp_path):
    certificate = upcycle_certified(vlm.model, MoESpec(), vlm.probes())
    assert len(moe_layers(vlm.model)) == 2
    stored = json.loads(certificate.save(tmp_path).read_text())
    assert stored["exact_in_theory"] and set(stored["probes"]) == {"text", "image"}
    for probe in stored["probes"].values():
        assert 0 <= probe["max_abs_delta"] < 1e-6 and 0 <= probe["kl"] < 1e-6
    extra = stored["probes"]["image"]["tokens"] - stored["probes"]["text"]["tokens"]
    assert extra == 4 + 1  # patches, and the line break behind the image's tag
    assert stored["recipe"]["num_experts"] == [4]


def test_another_recipe_reports_what_it_costs(vlm):
    spec = MoESpec(init="drop", init_drop_ratio=0.5)
    certificate = upcycle_certified(vlm.model, spec, vlm.probes())
    assert not certificate.exact_in_theory
    assert certificate.probes["text"]["kl"] > 1e-9
    assert "not exact" in certificate.lines()[0]


def test_bf16_is_judged_by_its_own_rounding(vlm):
    vlm.model.bfloat16()
    certificate = upcycle_certified(vlm.model, MoESpec(), vlm.probes())
    assert certificate.dtype == "bfloat16"
    assert moe_layers(vlm.model)[0][1].router.weight.dtype == torch.float32


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_an_exact_recipe_that_is_off_is_an_error(vlm, monkeypatch, factor):
    def broken(model, spec, share_copies):  # the "conversion" changes the head
        model.lm_head.weight.data *= factor

    monkeypatch.setattr(certificates, "upcycle", broken)
    with pytest.raises(NotExactError, match="should keep the logits"):
        upcycle_certified(vlm.model, MoESpec(), vlm.probes())
