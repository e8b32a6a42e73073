# SPDX-License-Identifier: Apache-2.0
"""Families are data: their renamings invert, and a config finds its family or an error that lists the known ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moellava.errors import UnknownNameError, UserError
from moellava.model.build import text_config
from moellava.model.families import FAMILIES, Family, KeyRule, base_family, family_of, published_family
from moellava.registry import Registry


@pytest.mark.parametrize("name", list(FAMILIES))
def test_names_and_numbers_survive_the_way_there_and_back(name, make_base):
    base = make_base(name)
    family, raw = FAMILIES[name], json.loads((base.folder / "config.json").read_text())
    state = base.oracle.state_dict()
    theirs = family.to_theirs(state, raw)
    back = {}
    for key, tensor in theirs.items():
        back |= family.to_ours(key, tensor, raw)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        torch.testing.assert_close(back[key], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_config_survives_the_way_there_and_back(name, make_base):
    raw = json.loads((make_base(name).folder / "config.json").read_text())
    family = FAMILIES[name]
    fields = family.text_config(raw)
    again = family.text_config({**family.their_config(fields), "model_type": raw["model_type"]})
    assert {key: again[key] for key in fields if key in again} == {key: fields[key] for key in fields if key in again}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_base_config_finds_its_family(name, make_base):
    raw = json.loads((make_base(name).folder / "config.json").read_text())
    assert base_family(raw).name == name


def test_a_rule_splits_in_equal_parts_and_scales():
    rule = KeyRule("h.*.qkv.**", ("a.*.q.**", "a.*.k.**"), scale=lambda raw: raw["factor"])
    family = Family(
        name="toy", text_model_type="llama", base_model_types=(), published_types=(), version="v1", rules=(rule,)
    )
    ours = family.to_ours("h.3.qkv.lora.weight", torch.arange(4.0), {"factor": 2.0})
    assert {key: value.tolist() for key, value in ours.items()} == {
        "a.3.q.lora.weight": [0.0, 2.0],
        "a.3.k.lora.weight": [4.0, 6.0],
    }
    assert family.to_theirs(ours, {"factor": 2.0})["h.3.qkv.lora.weight"].tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ({"model_type": "llava"}, "llama"),
        ({"model_type": "llava_llama"}, "llama"),
        ({"model_type": "moe_llava_mistral"}, "mistral"),
        ({"model_type": "moe_llava_qwen1_5"}, "qwen2"),
        ({"model_type": "llava_qwen", "kv_channels": 16, "layer_norm_epsilon": 1e-6}, "qwen"),
        ({"model_type": "llava_qwen", "rms_norm_eps": 1e-6}, "qwen2"),
        ({"model_type": "moe_llava_minicpm"}, "minicpm"),
        ({"model_type": "moe_llava_stablelm"}, "stablelm"),
    ],
)
def test_a_published_config_finds_its_family(raw, name):
    assert published_family(raw).name == name


def test_unknown_model_types_list_the_known():
    with pytest.raises(UnknownNameError, match="'falcon'.*Known: .*llama.*qwen2"):
        base_family({"model_type": "falcon"})
    with pytest.raises(UnknownNameError, match="'llava_falcon'.*minicpm.*mistral"):
        published_family({"model_type": "llava_falcon"})
    with pytest.raises(UserError, match="names no model_type"):
        base_family({})
    with pytest.raises(UnknownNameError, match="Did you mean 'qwen2'"):
        FAMILIES["qwen22"]


def test_family_of_a_composed_config_is_what_it_says():
    text = AutoConfig.for_model("qwen2").to_dict()
    assert family_of({"text_config": text}).name == "qwen2"
    assert family_of({"text_config": text, "moellava": {"family": "qwen"}}).name == "qwen"
    assert family_of(LlamaConfig()).name == "llama"


def test_minicpm_scalings_are_those_of_its_paper(make_base):
    """arXiv:2404.06395, table 1: embeddings × scale_emb, branches × scale_depth / √layers, logits × d_base / d."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    llama = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        llama.model.norm.weight.uniform_(0.5, 1.5)
    raw = {**llama.config.to_dict(), "model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 8}
    ids = torch.randint(0, 50, (2, 7))

    hidden = llama.model.embed_tokens(ids) * 12
    positions = torch.arange(7)[None]
    rotary = llama.model.rotary_emb(hidden, positions)
    mask = torch.full((7, 7), float("-inf")).triu(1)[None, None]
    for layer in llama.model.layers:
        attended, _ = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=mask)
        hidden = hidden + attended * 1.4 / math.sqrt(3)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden)) * 1.4 / math.sqrt(3)
    wanted = llama.lm_head(llama.model.norm(hidden) / (32 / 8))

    family = FAMILIES["minicpm"]
    granite = AutoModelForCausalLM.from_config(text_config(family, family.text_config(raw))).eval()
    state = {}
    for key, tensor in llama.state_dict().items():
        state |= family.to_ours(key, tensor, raw)
    granite.load_state_dict(state)
    torch.testing.assert_close(granite(ids).logits, wanted, rtol=1e-5, atol=1e-5)


def test_old_names_of_rope_are_read():
    raw = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    rope = text_config(FAMILIES["llama"], raw).rope_parameters
    assert (rope["rope_theta"], rope["rope_type"], rope["factor"]) == (1e6, "linear", 2.0)
    raw = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 96, "layer_norm_epsilon": 1e-6}
    qwen = text_config(FAMILIES["qwen"], FAMILIES["qwen"].text_config({**raw, "rotary_emb_base": 5000}))
    assert qwen.rope_parameters["rope_theta"] == 5000
    stablelm = text_config(FAMILIES["stablelm"], FAMILIES["stablelm"].text_config({"rope_pct": 0.5, "norm_eps": 1e-3}))
    assert (stablelm.rope_parameters["partial_rotary_factor"], stablelm.layer_norm_eps) == (0.5, 1e-3)


def test_the_example_of_the_page_is_a_family():
    """docs/CHECKPOINTS.md, 'Another language model': the four lines read a model that nothing here knows."""
    page = (Path(__file__).parents[2] / "docs" / "CHECKPOINTS.md").read_text(encoding="utf-8")
    code = page.split("## Another language model")[1].split("```python\n")[1].split("```")[0]
    known: Registry = Registry("language model family")
    exec(code, {"FAMILIES": known, "Family": Family})
    (family,) = known.values()
    config = AutoConfig.for_model(family.text_model_type, hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    assert text_config(family, family.text_config(config.to_dict())).to_dict() == config.to_dict()
    assert family.name not in FAMILIES, "the page should show a family that is not there yet"
