# SPDX-License-Identifier: Apache-2.0
"""Composition: for every family the parts keep what they compute, and the folder opens without moellava."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from moellava.errors import UnknownNameError, UserError
from moellava.model.build import text_config
from moellava.model.compose import Composition
from moellava.model.families import FAMILIES, family_of
from moellava.vlm import VLM, compose
from tests.processes import run_python
from tests.tiny import compose_tiny, reopen

ROWS = 280  # tokens of the test tokenizer
IDS = torch.tensor([[5, 9, 200, 3, 77, 8]])


def composed(base, tower, **options) -> VLM:
    return compose_tiny(base.folder, tower, "plain", **options)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_text_alone_gives_the_base_models_logits(name, make_base, clip_tower):
    base = make_base(name)
    model = composed(base, clip_tower).model
    with torch.no_grad():
        wanted, found = base.oracle(IDS).logits, model(IDS).logits
    torch.testing.assert_close(found[..., : wanted.shape[-1]], wanted, rtol=1e-5, atol=1e-5)
    assert family_of(model).name == name
    assert model.config.moellava["version"] == "plain"


@pytest.mark.parametrize("name", list(FAMILIES))
def test_features_stand_where_the_image_token_does(name, make_base, clip_tower, inputs):
    out = composed(make_base(name), clip_tower, mm_vision_select_layer=-2, image_projector_type="mlp2x_gelu")
    model, batch = out.model, inputs(out.model)
    (tower,), (projector,) = out.parts["vision_tower"], out.parts["projector"]
    with torch.no_grad():
        states = tower(batch["pixel_values"], output_hidden_states=True).hidden_states
        features = projector(states[-2][:, 1:])
        embeddings = model.get_input_embeddings()(batch["input_ids"])
        embeddings[:, 1 : 1 + model.config.image_seq_length] = features
        wanted = model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).logits
        found = model(**batch).logits
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found[0, -1], model(**{**batch, "pixel_values": batch["pixel_values"] + 1}).logits[0, -1])


@pytest.mark.parametrize("tied", [False, True])
def test_a_full_vocabulary_grows_and_old_rows_stay(tied, make_base, clip_tower):
    base = make_base("qwen2", tied=tied)
    out = composed(base, clip_tower, use_im_start_end=True)
    table, old = out.model.get_input_embeddings().weight, base.oracle.get_input_embeddings().weight
    assert out.model.config.image_token_index == ROWS
    assert table.shape[0] == ROWS + 3 == len(out.tokenizer) == out.model.config.text_config.vocab_size
    assert torch.equal(table[:ROWS], old)
    torch.testing.assert_close(table[ROWS:], old.mean(0).expand(3, -1))
    head = out.model.lm_head.weight
    assert torch.equal(head[:ROWS], base.oracle.lm_head.weight)
    assert (head is table) == tied


def test_a_padded_vocabulary_has_room(make_base, clip_tower):
    base = make_base("qwen2", rows=ROWS + 20)
    out = composed(base, clip_tower)
    table = out.model.get_input_embeddings().weight
    assert out.model.config.image_token_index == ROWS
    assert torch.equal(table, base.oracle.get_input_embeddings().weight)
    assert torch.equal(out.model.lm_head.weight, base.oracle.lm_head.weight)


def test_a_biased_head_grows_with_its_bias(make_base, clip_tower):
    base = make_base("phi")
    model = composed(base, clip_tower).model
    assert model.lm_head.bias.shape == (ROWS + 1,)
    assert torch.equal(model.lm_head.bias[:ROWS], base.oracle.lm_head.bias)


@pytest.mark.parametrize(
    ("tower", "feature", "tokens"), [("clip", "patch", 4), ("clip", "cls_patch", 5), ("siglip", "patch", 4)]
)
def test_the_processor_writes_as_many_tokens_as_there_are_features(tower, feature, tokens, make_base, request):
    folder = request.getfixturevalue(f"{tower}_tower")
    out = composed(make_base("llama"), folder, mm_vision_select_feature=feature)
    image = Image.new("RGB", (30, 50), (255, 0, 0))
    batch = out.processor(images=image, text="<image>what colour?", return_tensors="pt")
    assert out.model.config.image_seq_length == out.reader.run_length((30, 50), 1) == tokens
    assert (batch["input_ids"] == out.model.config.image_token_index).sum() == tokens
    assert batch["pixel_values"].shape[-2:] == (28, 28)
    assert out.model(**batch).logits.isfinite().all()


def test_dtype_is_kept(make_base, clip_tower):
    base, tower = make_base("mistral").folder, str(clip_tower)
    model = compose(base, tower, Composition(version="plain"), torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_same_seed_draws_the_same_projector(make_base, clip_tower):
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        vlm = compose(make_base("llama").folder, str(clip_tower), Composition(version="plain"))
        weights.append(vlm.parts["projector"][0].linear_1.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_projector_type": "qformer"}, "Unknown projector 'qformer'. Known: linear"),
        ({"image_projector_type": "identity"}, "identity needs equal widths.*16.*32"),
        ({"mm_vision_select_layer": -9}, "--mm_vision_select_layer -9: the tower has 3 layers"),
        ({"mm_vision_select_feature": "cls"}, "Known: patch, cls_patch"),
        ({"image_aspect_ratio": "round"}, "Known: square, pad"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message, make_base, clip_tower):
    with pytest.raises(UserError, match=message):
        composed(make_base("llama"), clip_tower, **options)


def test_folders_that_hold_something_else_are_named(tmp_path, make_base, clip_tower):
    with pytest.raises(UnknownNameError, match="'clip_vision_model'.*Known: .*llama"):
        compose_tiny(clip_tower, clip_tower, "plain")
    with pytest.raises(UnknownNameError, match="not a known vision tower"):
        compose_tiny(make_base("llama").folder, make_base("llama").folder, "plain")
    shutil.copytree(make_base("llama").folder, tmp_path, dirs_exist_ok=True)
    shutil.copy(make_base("qwen").folder / "model.safetensors", tmp_path)
    with pytest.raises(UserError, match="no embeddings under the names of the family 'llama'"):
        compose_tiny(tmp_path, clip_tower, "plain")


def test_hub_ids_are_fetched_without_code(make_base, clip_tower, monkeypatch):
    folders = {"org/llm": make_base("llama").folder, "org/tower": clip_tower}
    asked = []

    def fetch(name, allow_patterns):
        asked.append(name)
        assert "*.safetensors" in allow_patterns and not any(pattern.endswith("py") for pattern in allow_patterns)
        return str(folders[name])

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    made = compose_tiny("org/llm", "org/tower", "plain")
    assert asked == ["org/llm", "org/tower"] and made.section.image_tower == "org/tower"


PLAIN = """
import sys
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

for folder in sys.argv[1:]:
    wanted = torch.load(f"{folder}/wanted.pt")
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    processor = AutoProcessor.from_pretrained(folder)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour?"}]}]
    assert processor.chat_template and processor.apply_chat_template(turns, add_generation_prompt=True)
    batch = processor(images=Image.open(f"{folder}/image.png"), text="<image>what colour?", return_tensors="pt")
    assert all(torch.equal(batch[name], wanted[name]) for name in batch), folder
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, wanted["logits"]), folder
assert not any(name.split(".")[0] == "moellava" for name in sys.modules)
"""


@pytest.mark.slow
def test_folders_open_in_a_process_without_moellava(tmp_path, make_base, clip_tower, siglip_tower):
    """Every family and every projector that Hugging Face's class can hold: same logits, same processor."""
    recipes = [(name, clip_tower, "mlp2x_gelu", "square") for name in FAMILIES if name != "phi"]
    recipes += [("qwen2", siglip_tower, "linear", "pad"), ("llama", clip_tower, "mlp1x_gelu", "pad")]
    pixels = np.random.RandomState(0).randint(0, 255, (20, 44, 3), dtype=np.uint8)
    folders = []
    for number, (name, tower, projector, aspect) in enumerate(recipes):
        out = composed(
            make_base(name, tied=name == "qwen2"), tower, image_projector_type=projector, image_aspect_ratio=aspect
        )
        folder = tmp_path / str(number)
        out.save(folder, meta={"stage": "pretrain"})
        Image.fromarray(pixels).save(folder / "image.png")
        batch = out.processor(images=Image.fromarray(pixels), text="<image>what colour?", return_tensors="pt")
        with torch.no_grad():
            torch.save({**batch, "logits": out.model(**batch).logits}, folder / "wanted.pt")
        assert "opens in plain transformers" in (folder / "README.md").read_text()
        folders.append(str(folder))
    run_python(PLAIN, *folders, fresh=True)


def test_a_head_of_its_own_stays_one_whatever_the_config_says_of_ties(make_base, clip_tower, tmp_path):
    base = shutil.copytree(make_base("llama").folder, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    head = load_file(base / "model.safetensors")["lm_head.weight"]
    for round_trip in range(2):
        if not round_trip:
            compose_tiny(base, clip_tower, "plain").save(tmp_path / "0")
        else:
            reopen(tmp_path / "0").save(tmp_path / "1")
        saved = reopen(tmp_path / str(round_trip)).model
        assert torch.equal(saved.lm_head.weight[: len(head)], head)
        assert not saved.config.get_text_config().tie_word_embeddings
    raw = json.loads((tmp_path / "1" / "config.json").read_text())
    (tmp_path / "1" / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    (tmp_path / "1" / "digests.json").unlink()
    reopen(tmp_path / "1").save(tmp_path / "2")
    assert torch.equal(reopen(tmp_path / "2").model.lm_head.weight[: len(head)], head)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_what_is_null_in_a_config_stays_null(name, make_base, clip_tower, tmp_path):
    """Wherever the config's class lets it: a window that is null is none, and not the default's."""
    family = FAMILIES[name]
    raw = json.loads((make_base(name).folder / "config.json").read_text())
    cls = type(text_config(family, family.text_config(raw)))
    nullable = {field.name for field in dataclasses.fields(cls) if type(None) in get_args(field.type)}
    known = nullable & set(family.text_config(raw)) - {"rope_parameters"}
    theirs = family.text_config(raw) | dict.fromkeys(known)
    ours, plain = text_config(family, theirs), cls(**dict.fromkeys(known))
    assert {key: getattr(ours, key) for key in known if getattr(plain, key) is None} == dict.fromkeys(
        key for key in known if getattr(plain, key) is None
    )
    if "sliding_window" in nullable:
        base = shutil.copytree(make_base(name).folder, tmp_path / "base")
        (base / "config.json").write_text(json.dumps(raw | {"sliding_window": None}))
        compose_tiny(base, clip_tower, "plain").save(tmp_path / "saved")
        assert reopen(tmp_path / "saved").model.config.text_config.sliding_window is None
