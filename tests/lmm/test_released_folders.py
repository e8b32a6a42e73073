# SPDX-License-Identifier: Apache-2.0
"""`moellava upcycle` and `moellava merge-lora` on folders of released models."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from moellava.cli import main
from moellava.lmm.architecture import ARCHITECTURES
from moellava.model.section import Section
from moellava.moe import moe_layers
from moellava.vlm import open_vlm
from tests.lmm.tiny import reopen


def upcycle(folder, target, *flags):
    words = ["--moe_mode", "dense", "--num_experts", "2", *flags]
    return main(["upcycle", "--model-path", str(folder), "--output-dir", str(target), *words])


def logits(vlm, probes):
    with torch.no_grad():
        return {name: vlm.model(**probe, use_cache=False).logits for name, probe in probes.items()}


def assert_equal_models(one, other, atol):
    one, other = reopen(one), reopen(other)
    probes = one.probes()
    before, after = logits(one, probes), logits(other, probes)
    for name in probes:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=atol)


def test_upcycling_streams_and_keeps_the_logits(conforming, small_lmm, tmp_path, capsys, monkeypatch):
    """Every architecture, shard by shard, certified with its processor's own inputs."""
    monkeypatch.setattr("moellava.convert.upcycle_folder.in_memory", None)
    folder, target = small_lmm(conforming), tmp_path / "moe"
    if ARCHITECTURES[conforming].remote_code:
        assert upcycle(folder, target) == 2 and not target.exists()
        assert "whose MLPs are not known here: it cannot be upcycled" in capsys.readouterr().err
        return
    assert upcycle(folder, target) == 0
    assert "exact in theory" in capsys.readouterr().out
    certificate = json.loads((target / "moe_certificate.json").read_text())
    assert set(certificate["probes"]) == {"text", "image"}
    assert max(probe["max_abs_delta"] for probe in certificate["probes"].values()) < 1e-6
    sparse = reopen(target)
    assert sparse.architecture is ARCHITECTURES[conforming] and len(moe_layers(sparse.model)) >= 2
    origin = {"models": {conforming: {}}}
    assert sparse.section == Section("chat_template", "moe", conforming, made_of=origin)


@pytest.mark.slow
def test_a_folder_that_cannot_be_streamed_is_converted_in_memory(small_lmm, tmp_path, monkeypatch):
    folder = small_lmm("qwen2.5-vl")
    assert upcycle(folder, tmp_path / "streamed") == 0
    monkeypatch.setattr("moellava.convert.upcycle_folder.streamed", lambda _: None)
    assert upcycle(folder, tmp_path / "whole") == 0
    one, other = (reopen(tmp_path / name).model.state_dict() for name in ("streamed", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_cannot_be_upcycled_says_why(small_lmm, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "phi3_v"}')
    assert upcycle(tmp_path, tmp_path / "moe") == 2
    assert "the decoder of phi3-v models is code of their own" in capsys.readouterr().err
    assert upcycle(small_lmm("llava-1.5"), tmp_path / "first") == 0
    assert upcycle(tmp_path / "first", tmp_path / "moe") == 2
    assert "is sparse already" in capsys.readouterr().err
    assert not (tmp_path / "moe").exists()


def test_a_decoder_without_plain_mlps_stops_before_anything_is_computed(small_lmm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("moellava.moe.decoder.has_usual_names", lambda mlp: False)
    monkeypatch.setattr("moellava.moe.decoder.is_token_wise", lambda mlp, width: False)
    monkeypatch.setattr("moellava.convert.upcycle_folder.run_from_disk", None)
    assert upcycle(small_lmm("llava-1.5"), tmp_path / "moe") == 2
    assert "none is a plain MLP" in capsys.readouterr().err
    assert not (tmp_path / "moe").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("family_id", "sparse"), [("llava-1.5", False), ("qwen2.5-vl", True), ("gemma3", False)])
def test_merge_lora_gives_the_runs_own_folder(family_id, sparse, small_lmm, run, tmp_path, capsys):
    flags = {"moe_enable": True, "moe_mode": "dense", "num_experts": 2} if sparse else {}
    folder = run(family_id, use_lora=True, lora_r=4, train_vision_projector=not sparse, **flags)
    target = tmp_path / "merged"
    words = ["--model-path", small_lmm(family_id), "--adapter", folder / "adapter", "--output-dir", target]
    assert main(["merge-lora", *map(str, words)]) == 0
    assert "with an image" in capsys.readouterr().out
    merged, trained = reopen(target), reopen(folder)
    assert merged.architecture is ARCHITECTURES[family_id] and merged.section == trained.section
    assert type(merged.model) is type(trained.model) and type(merged.processor) is type(trained.processor)
    assert bool(moe_layers(merged.model)) is sparse
    one, other = merged.model.state_dict(), trained.model.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert merged.processor.chat_template == trained.processor.chat_template


SLOW = pytest.param("qwen-vl", marks=pytest.mark.slow)  # its vocabulary; its model opens the files of images itself


@pytest.mark.slow
@pytest.mark.parametrize("family_id", ["phi3-v", SLOW])
def test_merge_lora_runs_a_models_own_code_only_when_it_may(family_id, small_lmm, run, tmp_path, capsys):
    folder = run(family_id, use_lora=True, lora_r=2, trust_remote_code=True, max_steps=2, model_max_length=1024)
    target = tmp_path / "merged"
    adapter = ["--adapter", str(folder / "adapter")]
    words = ["--model-path", str(small_lmm(family_id)), *adapter, "--output-dir", str(target)]
    assert main(["merge-lora", *words]) == 2 and not target.exists()
    assert "--trust_remote_code True" in capsys.readouterr().err
    assert main(["merge-lora", *words, "--trust_remote_code", "True"]) == 0
    said = capsys.readouterr().out
    assert "without an image" in said and ("with an image" in said) is ARCHITECTURES[family_id].loads_images
    merged, trained = (reopen(path, trust_remote_code=True).model.state_dict() for path in (target, folder))
    assert all(torch.equal(merged[name], trained[name]) for name in trained)


@pytest.fixture
def tied(small_lmm, tmp_path):
    """The folder of a tiny Qwen2.5-VL whose head is its embedding, in bf16, as the small ones on the hub are."""
    config = AutoConfig.from_pretrained(small_lmm("qwen2.5-vl"))
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    folder = tmp_path / "tied"
    shutil.copytree(small_lmm("qwen2.5-vl"), folder)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_head_that_is_the_embedding_is_stored_once_and_learns_as_one(tied, run, tmp_path):
    assert upcycle(tied, tmp_path / "moe") == 0
    stored = load_file(tmp_path / "moe" / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert {tensor.dtype for name, tensor in stored.items() if "router" not in name} == {torch.bfloat16}
    assert_equal_models(tied, tmp_path / "moe", atol=1e-6)
    folder = run(tied, use_vision_lora=True, lora_r=2, bf16=True, max_steps=2)
    words = ["--model-path", tied, "--adapter", folder / "adapter", "--output-dir", tmp_path / "merged"]
    assert main(["merge-lora", *map(str, words)]) == 0
    paths = (tmp_path / "merged", folder)
    merged, trained = (open_vlm(path, device="cpu", dtype=torch.bfloat16).model for path in paths)
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in merged.state_dict().items())
