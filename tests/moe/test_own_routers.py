# SPDX-License-Identifier: Apache-2.0
"""Language models that are sparse of themselves: their own balancing loss, to the digit, and their experts' load."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from moellava.moe.own_routers import OwnRouters, has_own_experts
from tests import tiny
from tests.model.tiny_language_models import SPARSE, tiny_language_model

WITHOUT = (
    "afmoe aria_text axk1 axk2 bailing_hybrid cohere2_moe deepseek_v2 dots1 dots3_note_text exaone_moe glm4_moe "
    "glm4_moe_lite hunyuan_v1_moe hy_v3 hy_v4 inkling_text kimi_linear kolibri1 llama4_text "
    "longcat_flash mimo_v2_flash nemotron_h sarvam_mla sarvam_moe solar_open zamba zaya"
)
"""Sparse by their layers, with no balancing loss in transformers."""

UNWATCHED = "zamba"
"""Its experts are one block that layers share, without a router."""

SAMPLE = ("qwen3_moe", "mixtral", "jetmoe", "olmoe")


def composed(model_type: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A language model, and a Llava that holds its very body."""
    base = tiny_language_model(model_type)
    base.config.tie_word_embeddings = getattr(base.config, "tie_word_embeddings", False)
    vision = hf.CLIPVisionConfig(**tiny.VISION)
    config = hf.LlavaConfig(vision_config=vision, text_config=base.config, image_token_index=5, image_seq_length=4)
    model = hf.LlavaForConditionalGeneration(config)
    model.model.language_model = base.model if hasattr(base, "model") else base.transformer
    return base.train(), model.train()


def check_own_loss(model_type: str) -> None:
    base, model = composed(model_type)
    ids = torch.randint(20, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    torch.manual_seed(0)  # some jitter what their routers read, while they train
    wanted = base(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    routers = OwnRouters(model)
    assert routers.balance is not None and has_own_experts(model)
    torch.manual_seed(0)
    model(input_ids=ids, attention_mask=mask)
    found = routers.loss(mask, ids < 100)
    torch.testing.assert_close(found, wanted)
    found.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.get_decoder().parameters())


@pytest.mark.parametrize("model_type", SAMPLE)
def test_the_loss_is_that_of_the_language_model(model_type):
    check_own_loss(model_type)


def check_usual_loss(model_type: str) -> None:
    """Mixtral's loss, written out over the logits of all layers and real tokens, E · Σ of an expert's share of
    the choices, k in sum, and its mean probability."""
    _, model = composed(model_type)
    assert OwnRouters(model).balance is None
    ids, mask = torch.randint(20, 250, (2, 9), generator=torch.Generator().manual_seed(0)), torch.ones(2, 9).long()
    mask[1, -4:] = 0
    routers = OwnRouters(model, 0.5)
    assert routers.balance is not None and not routers.balance.is_own and routers.coefficient == 0.5
    model(input_ids=ids, attention_mask=mask)
    seen = [logits.reshape(-1, logits.shape[-1])[mask.flatten().bool()] for logits in routers._logits]
    logit_NE, k = torch.cat(seen).float(), routers.balance.k
    choices_NE = torch.zeros_like(logit_NE).scatter(1, logit_NE.topk(k).indices, 1.0)
    wanted = logit_NE.shape[1] * (choices_NE.mean(0) * logit_NE.softmax(1).mean(0)).sum()
    found = routers.loss(mask, ids < 100)
    torch.testing.assert_close(found, wanted)
    found.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.get_decoder().parameters())


@pytest.mark.parametrize("model_type", ["deepseek_v2", "aria_text"])
def test_a_language_model_without_a_loss_takes_the_usual_one(model_type):
    check_usual_loss(model_type)


def test_a_given_weight_stands_in_place_of_the_own():
    _, model = composed("qwen3_moe")
    routers = OwnRouters(model, 0.25)
    assert routers.balance.is_own and routers.coefficient == 0.25
    assert OwnRouters(composed(UNWATCHED)[1], 0.25).balance is None


@pytest.mark.slow
def test_every_sparse_language_model_has_its_own_loss_or_takes_the_usual_one():
    for model_type in [*SPARSE.split(), "nemotron_h", "dbrx"]:
        if model_type == UNWATCHED:
            continue
        if model_type in WITHOUT.split():
            check_usual_loss(model_type)
        else:
            check_own_loss(model_type)


def test_the_load_of_image_and_text_tokens_is_counted():
    _, model = composed("qwen3_moe")
    routers, ids = OwnRouters(model), torch.randint(20, 250, (1, 8))
    image = torch.arange(8)[None] < 3
    for _ in range(2):
        model(input_ids=ids)
        routers.loss(torch.ones_like(ids), image)
    metrics = routers.metrics(torch.device("cpu"))
    assert list(metrics) == ["layer_0", "layer_1"]
    assert metrics["layer_0"]["tokens"] == 16 and sum(metrics["layer_0"]["load_image"]) == pytest.approx(1.0)
    assert routers.metrics(torch.device("cpu"))["layer_0"]["tokens"] == 0


def test_nothing_is_asked_of_the_routers_in_evaluation():
    _, model = composed("qwen3_moe")
    routers = OwnRouters(model)
    model.eval()(input_ids=torch.arange(20, 28)[None])
    assert routers._logits == ()
    assert routers.trains
    model.requires_grad_(False)
    assert not routers.trains
    model.get_input_embeddings().weight.requires_grad_(True)  # as in stage 1, for new words
    assert not routers.trains and routers.coefficient == 0


def test_a_dense_model_has_none(tiny_llava):
    assert not has_own_experts(tiny_llava())
