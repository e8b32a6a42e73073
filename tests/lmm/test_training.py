# SPDX-License-Identifier: Apache-2.0
"""Released models through train.py: what trains, what is left behind, and MoE layers in them."""

import json
import logging

import pytest
import torch

from moellava.data.render.jinja import jinja_of
from moellava.errors import UserError
from moellava.lmm.loaders import find_model
from moellava.serve.answer import answer
from moellava.serve.prompt import Request
from tests.lmm.tiny import reopen
from tests.processes import train_here


def changed(before, after):
    """Names of the tensors that differ; the hub's folders store them under older names, hence by way of the models."""
    old, new = (reopen(folder).model.state_dict() for folder in (before, after))
    return {name for name in old if not torch.equal(old[name], new[name])}


def losses(folder):
    return [
        row["loss"] for row in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in row
    ]


@pytest.mark.slow
@pytest.mark.parametrize("family_id", ["llava-1.5", "qwen2.5-vl"])
def test_a_run_leaves_a_folder_of_the_models_own_class(family_id, run, small_lmm):
    from transformers import AutoModelForImageTextToText

    folder = run(family_id)
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    moved = changed(small_lmm(family_id), folder)
    assert moved and all("language_model" in name or "lm_head" in name for name in moved), "projector and tower rest"
    vlm = reopen(folder)
    assert vlm.architecture.name == family_id
    assert type(vlm.model) is type(model)
    saved = json.loads((folder / "processor_config.json").read_text())
    assert saved["processor_class"] == type(vlm.processor).__name__


@pytest.mark.slow
def test_what_trains_is_what_is_asked_for(run, small_lmm):
    parts = {"train_vision_encoder": True, "train_vision_projector": True, "freeze_backbone": True}
    moved = changed(small_lmm("qwen2.5-vl"), run("qwen2.5-vl", **parts))
    assert any("visual.blocks" in name for name in moved) and any("visual.merger" in name for name in moved)
    assert all("visual" in name for name in moved)
    table = json.loads((run("qwen2.5-vl", "other", **parts) / "parameters.json").read_text())
    assert {part for part, row in table.items() if row["trainable"]} == {"vision_tower", "projector"}


def test_lora_is_merged_into_the_folder_and_the_loss_falls(run, small_lmm):
    folder = run("llava-1.5", use_lora=True, lora_r=4, max_steps=12, learning_rate=5e-2)
    moved = changed(small_lmm("llava-1.5"), folder)
    assert moved and all(".language_model.layers." in name for name in moved)
    assert losses(folder)[-1] < losses(folder)[0]
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("family_id", ["llava-1.5", "qwen2.5-vl"])
def test_a_released_model_is_upcycled_and_trained_further(family_id, run):
    sparse = {"moe_enable": True, "moe_mode": "dense", "num_experts": 2}
    folder = run(family_id, "sparse", **sparse)
    certificate = json.loads((folder / "moe_certificate.json").read_text())
    assert certificate["exact_in_theory"]
    assert all(probe["max_abs_delta"] < 1e-5 for probe in certificate["probes"].values())
    assert {"text", "image"} == set(certificate["probes"])
    assert find_model(None, str(folder))[1].name == family_id
    further = run(folder, "further", moe_enable=True)
    moved = changed(folder, further)
    assert moved and all(".mlp.experts." in name or ".mlp.router." in name for name in moved)
    with pytest.raises(UserError, match="Mixture of Experts: add --moe_enable True"):
        run(folder, "dense")


@pytest.mark.slow
@pytest.mark.parametrize("family_id", ["llava-1.5", "qwen2.5-vl"])
def test_attention_is_computed_as_asked_and_recomputed_when_asked(family_id, run, monkeypatch):
    """Eager and sdpa give the same losses, and so does checkpointing, of the vision encoder too where it trains."""
    parts = {"train_vision_encoder": True, "train_vision_projector": True}
    reference = losses(run(family_id, "eager", attn_implementation="eager", **parts))
    used = []
    from torch.utils import checkpoint

    plain, sdpa = checkpoint.checkpoint, torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: used.append("sdpa") or sdpa(*a, **k)
    )
    assert losses(run(family_id, "sdpa", attn_implementation="sdpa", **parts)) == pytest.approx(reference, abs=1e-5)
    assert "sdpa" in used
    monkeypatch.setattr(
        "transformers.modeling_utils.checkpoint", lambda *a, **k: used.append(k["use_reentrant"]) or plain(*a, **k)
    )
    folder = run(family_id, "recomputed", attn_implementation="eager", gradient_checkpointing=True, **parts)
    assert losses(folder) == pytest.approx(reference, abs=1e-5)
    assert used.count(False) >= 3 * 2 and True not in used, "non-reentrant, each layer in each step"


@pytest.mark.parametrize("name", ["quick", "flash_attention_2"])
def test_attention_that_is_not_there_is_named_with_the_way_out(name, run):
    with pytest.raises(UserError, match=f"--attn_implementation {name}: .*Leave the flag out, or take sdpa"):
        run("llava-1.5", attn_implementation=name, bf16=True)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v1", "v0"])
def test_a_template_of_ours_takes_the_place_of_the_models_own(version, run):
    """`v0` ends answers with plain text, so that it could not be a chat template on record. Where a model has other
    placeholders than our templates write, the flag is refused."""
    folder = run("llava-1.5", version=version, max_steps=1)
    vlm = reopen(folder)
    assert vlm.section.version == vlm.encoder.version == version
    assert vlm.processor.chat_template == jinja_of(version)
    with pytest.raises(UserError, match=f"--version {version} (writes <image>|does not fit)"):
        run("qwen2.5-vl", "other", version=version, max_steps=1)


def test_no_code_of_its_own_runs_in_a_language_model(released_flags, parts):
    flags = released_flags(None, model_local_path=None, model_name_or_path=parts / "lm", image_tower=parts / "tower")
    with pytest.raises(UserError, match="--trust_remote_code True, but .* needs no code of its own"):
        train_here(flags | {"trust_remote_code": True})


@pytest.mark.slow
@pytest.mark.parametrize("family_id", ["llava-1.5", "qwen2.5-vl"])
def test_sample_answers_are_what_chat_says(family_id, run, tmp_path, pictures, caplog):
    flags = {"eval_data_path": tmp_path / "data.json", "eval_strategy": "steps", "eval_steps": 3, "eval_samples": 2}
    with caplog.at_level(logging.INFO, "moellava"):
        folder = run(family_id, **flags)
    shown = [entry.args for entry in caplog.records if entry.msg.startswith("Sample answer")]
    assert [prompt.count("Hello?") for _, _, prompt, _, _ in shown] == [1, 1], "records 0 and 4 are text alone"
    (said,) = answer(reopen(folder), [Request("Hello?")], max_new_tokens=64)
    assert {told for *_, told, _ in shown} == {said}
    assert [reference for *_, reference in shown] == ["A fractal, number 0.", "A fractal, number 4."]
    caplog.clear()
    with caplog.at_level(logging.INFO, "moellava"):
        folder = run(family_id, "more", **flags | {"eval_samples": 8})
    shown = [entry.args for entry in caplog.records if entry.msg.startswith("Sample answer")]
    (said,) = answer(reopen(folder), [Request("What is it?", [pictures[1]])], max_new_tokens=64)
    assert shown[1][3] == said and "What is it?" in shown[1][2]
    assert "eval_loss" in (folder / "trainer_state.json").read_text()
