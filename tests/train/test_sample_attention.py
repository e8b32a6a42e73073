# SPDX-License-Identifier: Apache-2.0
"""Samples of a batch lie in one row, and attention runs over each of them: what trains stays the same, no position is
padding, and no layer sees more than its samples."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from moellava.data.packing import Batches, joined
from moellava.train import packing, sample_attention
from moellava.train.sample_attention import ATTENTION, SampleAttention, attend
from tests.data.test_collate import sample
from tests.processes import losses_of, train_here

LENGTHS = [3, 1, 6]


def tiny(**options: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=32, num_key_value_heads=2, attn_implementation="sdpa", **sizes | options)
    return LlamaForCausalLM(config).train()


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """Positions of the queries of every call of torch's attention."""
    seen, real = [], functional.scaled_dot_product_attention

    def noted(query, *args, **options):
        seen.append(query.shape[2])
        return real(query, *args, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    return seen


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_row_says_what_its_samples_say_alone_and_so_do_gradients(recomputes, sizes):
    ids = torch.randint(5, 32, (1, sum(LENGTHS)))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    apart, together = tiny(), tiny()
    if recomputes:
        together.gradient_checkpointing_enable({"use_reentrant": False})
    wanted = torch.cat([apart(input_ids=one, use_cache=False).logits for one in ids.split(LENGTHS, 1)], dim=1)
    wanted.square().sum().backward()
    attention = SampleAttention(together)
    attention.is_on = True
    sizes.clear()
    with attention:
        attention.tell(LENGTHS)
        found = together(input_ids=ids, position_ids=positions, use_cache=False).logits
        found.square().sum().backward()
    assert sizes == LENGTHS * 2 * (2 if recomputes else 1), "of every layer, and of no more than a sample at a time"
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_what_is_told_is_forgotten_and_nothing_else_is_touched(sizes):
    model = tiny()
    attention = SampleAttention(model)
    with attention:
        attention.tell(LENGTHS)
        assert model.config._attn_implementation == "sdpa", "it is not on"
        attention.is_on = True
        attention.tell(LENGTHS)
        assert model.config._attn_implementation == ATTENTION and "sdpa_of_samples" not in model.config.to_json_string()
        states = torch.randn(1, 4, 7, 4)
        attend(model.model.layers[0].self_attn, states, states[:, :2], states[:, :2], None)
    assert sizes == [7], "a row of another length is none of these samples"
    assert model.config._attn_implementation == "sdpa" and not sample_attention._lengths
    with pytest.raises(ZeroDivisionError), attention:
        attention.tell(LENGTHS)
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("config", "suits"),
    [
        ({}, True),
        ({"attn_implementation": "flash_attention_2"}, True),
        ({"attn_implementation": "eager"}, False),
        ({"sliding_window": 512}, True),
        ({"sliding_window": 511}, False),
        ({"attention_chunk_size": 256}, False),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 600}, True),
        ({"layer_types": ["full_attention", "linear_attention"]}, False),
    ],
)
def test_attention_over_whole_samples_alone_suits(config, suits):
    config = {"_attn_implementation": config.pop("attn_implementation", "sdpa")} | config
    decoder = SimpleNamespace(config=SimpleNamespace(**config))
    assert SampleAttention(SimpleNamespace(get_decoder=lambda: decoder)).suits(512) is suits


def test_a_batch_is_one_row_of_all_its_records():
    class Three(Batches, list):
        pass

    blank = sample([9], 0, "") | {"unreadable": {}}
    dataset = Three([sample([1, 5], 1, "Record 1"), blank, sample([1, -200, 5], 1, "Record 3")])
    assert [len(one["input_ids"]) for one in dataset.__getitems__([0, 1, 2])] == [2, 1, 3]
    dataset.in_one_row = True
    (row,) = dataset.__getitems__([0, 1, 2])
    assert row["input_ids"].tolist() == [1, 5, 1, -200, 5] and row["begins"] == [0, 2], "a filler is no record"
    assert row["records"] == ["Record 1", "Record 3"]
    again = joined([row, sample([7, 8], 1, "Record 4")])
    assert again["begins"] == [0, 2, 5] and again["records"] == ["Record 1", "Record 3", "Record 4"]


def padding_of(folder) -> list[float]:
    lines = [json.loads(line) for line in (folder / "run_log.jsonl").read_text().splitlines()]
    return [line["padding"] for line in lines if "padding" in line]


@pytest.mark.slow
def test_runs_have_the_losses_of_padded_rows_and_no_padding(flags_for, tmp_path, monkeypatch, caplog):
    short = {"max_steps": 3, "skip_dry_save": True}
    asks = {"mask_question_tokens": False, "gradient_accumulation_steps": 2}
    runs = [
        ("pretrain", {}),
        ("finetune", asks),
        ("moe", {"model_name_or_path": tmp_path / "finetune", "capacity_factor": 1.0, "train_modules": None}),
        ("finetune", asks | {"lora_enable": True, "lora_dropout": 0.0, "output_dir": tmp_path / "lora"}),
    ]
    for stage, added in runs:
        flags = flags_for(tmp_path, stage) | short | added
        name = Path(flags["output_dir"]).name
        joined_losses = losses_of(train_here(flags))
        with monkeypatch.context() as patched:
            patched.setattr(packing, "may_share_one_row", lambda trainer: False)
            folder = train_here(flags | {"output_dir": tmp_path / f"{name}-padded"})
        assert joined_losses == pytest.approx(losses_of(folder), rel=1e-5), name
        assert len(joined_losses) == 3 and max(padding_of(folder)) > 0.01
        assert set(padding_of(tmp_path / name)) == {0.0}


def test_samples_share_a_row_with_dropout_which_a_run_that_goes_on_draws_again(flags_for, begin_at, tmp_path):
    untrained = {"pretrain_mm_mlp_adapter": None, "untrained_projector": True, "skip_dry_save": True}
    flags = flags_for(tmp_path, "finetune") | untrained | {"lora_enable": True, "max_steps": 4}
    flags |= {"save_steps": 2, "save_total_limit": 9}
    whole = train_here(flags | {"lora_dropout": 0.5})
    assert set(padding_of(whole)) == {0.0}
    without = train_here(flags | {"lora_dropout": 0.0, "output_dir": tmp_path / "without"})
    assert losses_of(whole) != pytest.approx(losses_of(without), rel=1e-3)
    again = train_here(flags | {"lora_dropout": 0.5, "output_dir": begin_at(2, whole, tmp_path / "again")})
    assert losses_of(again) == losses_of(whole)


@pytest.mark.parametrize(
    "flags",
    [
        {"moe_enable": True, "moe_preset": "moe-llava"},
        {"attn_implementation": "eager"},
        {"per_device_train_batch_size": 1},
        {"neftune_noise_alpha": 5.0},
    ],
    ids=str,
)
def test_what_would_not_be_exact_or_not_faster_is_padded(flags, flags_for, tmp_path, caplog):
    untrained = {"pretrain_mm_mlp_adapter": None, "untrained_projector": True}
    if "moe_enable" in flags:
        train_here(flags_for(tmp_path, "finetune") | untrained | {"max_steps": 3, "skip_dry_save": True})
        caplog.clear()
        untrained = {}
    stage = "moe" if "moe_enable" in flags else "finetune"
    train_here(flags_for(tmp_path, stage) | untrained | {"max_steps": 3, "skip_dry_save": True} | flags)
    assert "keep apart" not in caplog.text
    assert max(padding_of(tmp_path / stage)) > 0.01 or flags.get("per_device_train_batch_size") == 1


def test_a_model_that_mixes_samples_is_padded_and_says_so(flags_for, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sample_attention.SampleAttention, "tell", lambda self, lengths: None)
    monkeypatch.setattr(packing, "joined", lambda samples: joined(samples) | {"begins": [0]})
    train_here(flags_for(tmp_path, "pretrain") | {"max_steps": 2, "skip_dry_save": True})
    assert "Rows are padded, for samples do not keep apart in one: hidden states are" in caplog.text
    assert max(padding_of(tmp_path / "pretrain")) > 0
