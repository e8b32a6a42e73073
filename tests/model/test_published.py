# SPDX-License-Identifier: Apache-2.0
"""Folders that LLaVA and MoE-LLaVA wrote: every family, dense and sparse, there and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from moellava.convert.export.llava import published_config, published_state, write_published
from moellava.errors import UnknownNameError, UserError
from moellava.model.families import FAMILIES
from moellava.model.manifest import VLM, read_folder
from moellava.model.section import note
from moellava.moe import MoESpec, moe_layers, upcycle
from moellava.serve import cli as chat
from moellava.vlm import open_vlm
from tests.tiny import compose_tiny, reopen

GOLDENS = [
    "llama/dense",
    "llama/moe_sparse",
    "llama/moe_custom",
    "phi/dense",
    "phi/moe_sparse",
    "phi/moe_residual",
    "qwen/dense",
    "stablelm/dense",
]
SPARSE = {
    "dense": None,
    "sparse": {"moe_mode": "sparse", "num_experts": [2, 4]},
    "residual": {"moe_mode": "second_half", "num_experts": [4], "use_residual": True},
    "custom": {"moe_layers_idx": [1, 3], "num_experts": [4], "top_k_experts": 1, "second_expert": "top"},
}


def opened(folder: Path, base: Path | None = None):
    return open_vlm(folder, base=base, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("name", GOLDENS)
def test_writing_gives_back_what_the_reference_wrote(name, checkpoints, tokenizer_folder):
    """Same names, same numbers to the last bit: so each renaming is right in both directions. (With a tokenizer, whose
    image token finds a row that is free: without one, the table would grow.)"""
    folder = checkpoints / name
    model = opened(folder, tokenizer_folder).model
    config = published_config(model)
    found, wanted = published_state(model, config), torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert set(found) == set(wanted)
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
    raw = json.loads((folder / "config.json").read_text())
    for key in (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "mm_image_tower",
        "image_projector_type",
        "vocab_size",
    ):
        assert config[key] == raw[key]
    for key in ("moe_layers_idx", "num_experts", "top_k_experts", "use_residual"):
        assert config.get("moe", {}).get(key) == raw.get("moe", {}).get(key)


@pytest.mark.parametrize("name", GOLDENS)
def test_a_published_model_saves_as_one_of_ours(name, checkpoints, tokenizer_folder, inputs, tmp_path):
    """A published folder is a starting point like any other: opened, saved, opened again, and still exportable."""
    vlm = opened(checkpoints / name, tokenizer_folder)
    model = vlm.model
    assert vlm.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_index == 280
    vlm.save(tmp_path, meta={"stage": "finetune"})
    manifest = read_folder(tmp_path, "test")
    assert manifest.holds == VLM and not manifest.is_published and manifest.is_sparse == ("moe" in name)
    saved = reopen(tmp_path)
    again, processor = saved.model, saved.processor
    batch = inputs(model)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    text = processor(images=Image.new("RGB", (20, 30)), text="<image>what?", return_tensors="pt")
    assert (text["input_ids"] == 280).sum() == 16
    before, after = published_state(model, published_config(model)), published_state(again, published_config(again))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_folder_without_tokenizer_gives_the_model_alone(checkpoints, inputs):
    """The image token then has a row of its own behind the vocabulary."""
    folder = checkpoints / "llama/moe_sparse"
    vlm = opened(folder)
    model = vlm.model
    assert vlm.tokenizer is None and vlm.processor is None and vlm.context_length == 512
    assert model.config.image_token_index == 320 and model(**inputs(model)).logits.shape[-1] == 321
    with pytest.raises(UserError, match="holds no tokenizer"):
        vlm.require_tokenizer()
    with pytest.raises(UserError, match="holds no tokenizer"):
        chat.main(["--model-path", str(folder), "--question", "what?", "--device", "cpu"])


@pytest.fixture
def written(tmp_path, make_base, clip_tower):
    """(family, routing) -> a published folder, and the model that wrote it."""

    def make(name: str, routing: str, **options) -> tuple[Path, torch.nn.Module]:
        made = compose_tiny(make_base(name).folder, clip_tower, "plain", **options)
        model = made.model
        if made.section.head_bias:
            model.lm_head.bias = None
            note(model.config, head_bias=False)
        if SPARSE[routing]:
            upcycle(model, MoESpec.from_preset("moe-llava", **SPARSE[routing]))
            torch.manual_seed(6)
            with torch.no_grad():
                for _, layer in moe_layers(model):
                    for parameter in layer.parameters():
                        parameter.add_(0.1 * torch.randn_like(parameter))
        write_published(made, tmp_path / "out")
        return tmp_path / "out", model

    return make


@pytest.mark.parametrize("routing", list(SPARSE))
@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_survives_the_layout_dense_and_sparse(name, routing, written, inputs):
    folder, model = written(name, routing, image_projector_type="mlp2x_gelu", image_aspect_ratio="pad")
    raw = json.loads((folder / "config.json").read_text())
    assert raw["model_type"] == f"{'' if routing == 'dense' else 'moe_'}llava_{FAMILIES[name].published_types[0]}"
    vlm = opened(folder)
    again, batch = vlm.model, inputs(model)
    again.config.image_token_index = model.config.image_token_index
    scale = again.config.text_config.to_dict().get("embedding_multiplier", 1.0)
    if name == "minicpm":  # published ones are trained on embeddings that its factor does not touch
        assert scale == 1.0
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model.eval()(**batch).logits, rtol=1e-5, atol=1e-5)
    assert vlm.section.family == name and vlm.processor.chat_template


def test_names_inside_a_sparse_qwen1(written):
    folder, _ = written("qwen", "residual")
    keys = torch.load(folder / "pytorch_model.bin", weights_only=True)
    for key in (
        "transformer.h.2.mlp.deepspeed_moe.gate.wg.weight",
        "transformer.h.3.mlp.deepspeed_moe.experts.deepspeed_experts.3.w1.weight",
        "transformer.h.2.mlp.mlp.c_proj.weight",
        "transformer.h.2.mlp.coefficient.bias",
        "transformer.h.0.mlp.w2.weight",
        "transformer.h.0.attn.c_attn.bias",
        "transformer.image_tower.image_tower.vision_model.embeddings.class_embedding",
        "transformer.mm_projector.image_spatial_proj.weight",
    ):
        assert key in keys


@pytest.mark.parametrize("projector", ["linear", "mlp1x_gelu", "mlp3x_gelu"])
def test_every_projector_survives_the_layout(projector, written, inputs):
    folder, model = written("mistral", "dense", image_projector_type=projector)
    again = opened(folder).model
    batch = inputs(model)
    again.config.image_token_index = model.config.image_token_index
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def published(tmp_path, checkpoints, name="llama/dense", **changes) -> Path:
    """A copy of a golden folder with changes to its config, and the tower where the config looks for it."""
    folder = tmp_path / "copy"
    shutil.copytree(checkpoints / name, folder)
    shutil.copytree(checkpoints / "openai", tmp_path / "openai", dirs_exist_ok=True)
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def rewrite(folder, change) -> None:
    path = folder / "pytorch_model.bin"
    torch.save(change(torch.load(path, weights_only=True)), path)


def test_the_layout_of_llava_1_5(tmp_path, checkpoints):
    """Other names for the tower and the projector, and no tower among the weights: it comes from its own folder."""
    wanted = opened(checkpoints / "llama/dense").model
    folder = published(tmp_path, checkpoints, model_type="llava")
    raw = json.loads((folder / "config.json").read_text())
    raw["mm_vision_tower"], raw["mm_projector_type"] = raw.pop("mm_image_tower"), raw.pop("image_projector_type")
    (folder / "config.json").write_text(json.dumps(raw))
    rewrite(
        folder,
        lambda state: {
            key.replace("mm_projector.image_spatial_proj.", "mm_projector."): tensor
            for key, tensor in state.items()
            if "image_tower" not in key
        },
    )
    found = opened(folder).model.state_dict()
    tower = {key for key in found if ".vision_tower." in key}
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.state_dict().items() if key not in tower)
    rewrite(
        folder,
        lambda state: state | {"model.vision_tower.vision_tower.vision_model.post_layernorm.bias": torch.ones(32)},
    )
    with pytest.raises(UserError, match="missing: model.vision_tower"):
        opened(folder)


@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_head_may_be_stored_or_not(stored, make_base, clip_tower, inputs, tmp_path):
    """The reference's pickles name the table twice, sharded safetensors once."""
    made = compose_tiny(make_base("minicpm", tied=True).folder, clip_tower, "plain")
    write_published(made, tmp_path)
    key = "model.embed_tokens.weight"

    def store_head(state):
        bare = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
        return bare | ({"lm_head.weight": state[key].clone()} if stored else {})

    rewrite(tmp_path, store_head)
    again = opened(tmp_path).model
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    batch = inputs(made.model)
    again.config.image_token_index = made.model.config.image_token_index
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, made.model.eval()(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("feature", "tokens"), [("patch", 3), ("cls_patch", 4)])
def test_siglip_patches_as_the_reference_took_them(feature, tokens, make_base, siglip_tower, tmp_path):
    """Of a SigLIP's 4 patches 'patch' drops the first, as if it were a class token; 'cls_patch' takes all."""
    made = compose_tiny(make_base("llama").folder, siglip_tower, "plain")
    write_published(made, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["mm_vision_select_feature"] == "cls_patch"
    (tmp_path / "config.json").write_text(json.dumps(raw | {"mm_vision_select_feature": feature}))
    vlm = opened(tmp_path)
    model, processor = vlm.model, vlm.processor
    image = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        all_features = made.model.get_image_features(image).pooler_output[0]
        found = model.get_image_features(image).pooler_output[0]
    torch.testing.assert_close(found, all_features[4 - tokens :])
    batch = processor(images=Image.new("RGB", (9, 9)), text="<image>", return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_index).sum() == tokens == model.config.image_seq_length


def test_a_stage_1_folder_needs_its_language_model(tmp_path, make_base, checkpoints, tokenizer_folder):
    folder = published(
        tmp_path, checkpoints, hidden_size=32, vocab_size=280, intermediate_size=48, num_attention_heads=4
    )
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    projector = {
        "model.mm_projector.image_spatial_proj.0.weight": torch.randn(32, 32),
        "model.mm_projector.image_spatial_proj.0.bias": torch.randn(32),
        "model.mm_projector.image_spatial_proj.2.weight": torch.randn(32, 32),
        "model.mm_projector.image_spatial_proj.2.bias": torch.randn(32),
    }
    assert set(projector) <= set(state)
    torch.save(projector, folder / "mm_projector.bin")
    for without in (None, tokenizer_folder):
        with pytest.raises(UserError, match="stage-1 projector alone.*--model-base"):
            opened(folder, without)
    base = make_base("llama")
    vlm = opened(folder, base.folder)
    model = vlm.model
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[..., :280], base.oracle(ids).logits, rtol=1e-5, atol=1e-5)
    (learnt,) = vlm.parts["projector"]
    assert torch.equal(learnt.linear_2.bias, projector["model.mm_projector.image_spatial_proj.2.bias"])
    assert model.config.image_token_index == 280 == vlm.tokenizer.convert_tokens_to_ids("<image>")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "llava_bloom"},
            "No language model family reads published checkpoints of model_type 'llava_bloom'",
        ),
        ({"image_aspect_ratio": "anyres"}, "puts the features of tiles together as 'flat'"),
        ({"mm_video_tower": "LanguageBind/LanguageBind_Video"}, "has a video tower"),
        ({"mm_image_tower": "nobody/nothing"}, "the config's image tower nobody/nothing: there is no such folder"),
        ({"image_projector_type": "simple_in1_out1"}, "Unknown projector 'simple_in1_out1'"),
        ({"num_hidden_layers": 5}, "missing: model.language_model.layers.4"),
        ({"num_hidden_layers": 3}, "unexpected: model.language_model.layers.3"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, checkpoints, changes, message):
    folder = published(tmp_path, checkpoints, **changes)
    with pytest.raises((UserError, UnknownNameError), match=message):
        opened(folder)


def test_experts_of_other_ranks_are_missed(tmp_path, checkpoints):
    """A folder that the reference saved with ep_size 2 holds the first rank's experts alone."""
    folder = published(tmp_path, checkpoints, "llama/moe_sparse")
    rewrite(
        folder,
        lambda state: {k: v for k, v in state.items() if not any(f"deepspeed_experts.{e}." in k for e in (2, 3))},
    )
    with pytest.raises(UserError, match=r"missing: .*mlp.experts.2.down_proj.weight.* and 6 more"):
        opened(folder)
