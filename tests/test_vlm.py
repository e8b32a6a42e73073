# SPDX-License-Identifier: Apache-2.0
"""Any folder opens as one type, and what it says decides how: parts, template, images, probes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from moellava.constants import CHAT_TEMPLATE
from moellava.errors import UserError
from moellava.model.devices import default_dtype
from moellava.model.parts import LLAVA
from moellava.model.section import section_of
from moellava.moe import MoESpec, upcycle
from moellava.vlm import PROBE_TOKENS, VLM, open_encoder, open_vlm
from tests.lmm.tiny import TINY
from tests.tiny import compose_tiny, record, reopen

ASKED = record("one", "<image>\nwhat is it?", "a red circle", image="unopened.png")


@pytest.fixture(scope="module")
def stage_folder(tiny_base, clip_tower, tmp_path_factory) -> Path:
    """What stage 1 leaves."""
    folder = tmp_path_factory.mktemp("vlm") / "pretrain"
    made = compose_tiny(tiny_base("vicuna"), clip_tower, "v1", image_projector_type="mlp2x_gelu")
    made.save(folder, meta={"stage": "pretrain"})
    return folder


@pytest.fixture
def folder(stage_folder, tmp_path) -> Path:
    """A copy to be changed."""
    return shutil.copytree(stage_folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def released_folder(small_tokenizers, tmp_path_factory) -> Path:
    """A tiny LLaVA-1.6, whose images are cut into tiles, as the hub would hold it."""
    folder = tmp_path_factory.mktemp("released") / "tiny"
    TINY["llava-1.6"].save(small_tokenizers, folder)
    return folder


def edit(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def text_of(vlm: VLM, asked=ASKED) -> str:
    return "".join(piece.text for piece in vlm.encoder.pieces(asked))


# -- opening -------------------------------------------------------------------------------------------------------


def test_a_stages_folder(stage_folder):
    vlm = open_vlm(stage_folder, device="cpu")
    assert (vlm.section.stage, vlm.section.version, vlm.encoder.version) == ("pretrain", "v1", "v1")
    assert vlm.architecture is None and vlm.trains_projector and vlm.keywords == LLAVA and vlm.spec is None
    assert vlm.source == f"--model-path {stage_folder}" and vlm.context_length == 512
    assert vlm.placeholder_ids == [vlm.tokenizer.convert_tokens_to_ids("<image>")]
    assert vlm.model.dtype == torch.float32 and not vlm.model.training
    example = vlm.encoder.encode(ASKED)
    assert example.length == len(example.ids) - 1 + 4 and example.is_trained
    assert text_of(vlm).endswith("USER: <image>\nwhat is it? ASSISTANT: a red circle</s>")
    vlm.require_answers()


def test_a_published_folder_with_a_tokenizer(checkpoints, golden_tokenizers):
    vlm = open_vlm(checkpoints / "phi/moe_sparse", base=golden_tokenizers / "phi", device="cpu")
    raw = json.loads((checkpoints / "phi/moe_sparse/config.json").read_text())
    assert vlm.section.family == vlm.section.version == vlm.encoder.version == "phi"
    assert vlm.section.stage is None and vlm.architecture is None
    assert vlm.spec.num_experts == raw["moe"]["num_experts"] and len(vlm.spec.moe_layers_idx) > 0
    assert vlm.placeholder_ids == [vlm.tokenizer.convert_tokens_to_ids("<image>")]
    example = vlm.encoder.encode(ASKED)
    assert example.length == len(example.ids) - 1 + vlm.model.config.image_seq_length
    vlm.require_answers()


def test_a_published_folder_without_a_tokenizer(checkpoints, caplog):
    """The model alone; whoever needs more says so by name."""
    vlm = open_vlm(checkpoints / "llama/dense", device="cpu", flag="--model_name_or_path")
    assert vlm.tokenizer is None and vlm.processor is None and "holds no tokenizer" in caplog.text
    assert vlm.section.family == "llama" and len(vlm.parts["language_model"]) == 1
    message = r"^--model_name_or_path .*llama/dense holds no tokenizer\. .*--model-base"
    for ask in (vlm.require_tokenizer, vlm.require_answers, vlm.probes, vlm.collator, vlm.settle):
        with pytest.raises(UserError, match=message):
            ask()
    with pytest.raises(UserError, match=message):
        assert vlm.encoder
    with pytest.raises(UserError, match=r"^--model-path .*llama/dense holds no tokenizer"):
        open_vlm(checkpoints / "llama/dense", device="cpu", version="v1")


def test_a_released_folder(released_folder):
    vlm = reopen(released_folder)
    assert vlm.architecture.name == vlm.section.architecture == "llava-1.6" and not vlm.trains_projector
    assert vlm.section.version == vlm.encoder.version == CHAT_TEMPLATE
    assert text_of(vlm, record("text", "what?", "a")).endswith("[INST] what? [/INST] a</s>")
    vlm.require_answers()


@pytest.mark.parametrize(("part", "holds"), [("base", "a language model"), ("tower", "a vision tower")])
def test_a_part_alone_is_refused(part, holds, make_base, clip_tower):
    path = make_base("llama").folder if part == "base" else clip_tower
    message = (
        f"^--model-path {path} is {holds}, no vision-language model. Stage 1 composes one of a language model and a "
        "vision tower: train.py --model_name_or_path LLM --image_tower TOWER"
    )
    with pytest.raises(UserError, match=message):
        open_vlm(path, device="cpu")
    with pytest.raises(UserError, match=f"^--model_name_or_path {path} is {holds}"):
        open_vlm(path, device="cpu", flag="--model_name_or_path")


def test_a_folder_that_other_code_composed_opens(folder, make_base, clip_tower, tmp_path):
    """By its config: LLaVA-1.5 where it is one, else as what we would have composed, with its family's template."""
    edit(folder, lambda config: config.pop("moellava"))
    assert reopen(folder).section.architecture == "llava-1.5"
    other = tmp_path / "other"
    made = compose_tiny(make_base("stablelm").folder, clip_tower, "plain", image_projector_type="mlp2x_gelu")
    made.save(other)
    edit(other, lambda config: config.pop("moellava"))
    vlm = reopen(other)
    assert vlm.architecture is None
    section = vlm.section
    assert (section.family, section.version, section.image_projector_type) == ("stablelm", "stablelm", "mlp2x_gelu")
    edit(other, lambda config: config.update(projector_hidden_act="relu"))
    with pytest.raises(UserError, match=r"projector's activation is 'relu'. Known: gelu"):
        reopen(other)


def test_a_folder_without_tokenizer_is_named(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="tokenizer"):
        reopen(folder)


def test_inputs_are_missed_before_weights_are_read(folder):
    """Gigabytes are not read for an error that could be told at once."""
    (folder / "model.safetensors").unlink()
    (folder / "processor_config.json").unlink()
    with pytest.raises(UserError, match=f"^--model-path {folder} holds no processor: copy processor_config.json"):
        reopen(folder)


def test_dtype_follows_the_device(stage_folder, monkeypatch):
    assert default_dtype(torch.device("cpu")) == torch.float32
    assert default_dtype(torch.device("mps")) == torch.float16
    for supported, wanted in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported: supported)
        assert default_dtype(torch.device("cuda")) == wanted
    assert open_vlm(stage_folder, device="cpu", dtype=torch.bfloat16).model.dtype == torch.bfloat16


# -- template and images -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_template_is_settled_and_saved(stage_folder, tmp_path):
    vlm = reopen(stage_folder)
    before, encoder = vlm.model.config.moellava, vlm.encoder
    assert vlm.encoder is encoder, "made once"
    vlm.settle("llava_llama_2")
    assert vlm.section.version == vlm.encoder.version == "llava_llama_2"
    assert vlm.model.config.moellava == before | {"version": "llava_llama_2"}
    assert "[INST]" in text_of(vlm) and vlm.encoder.encode(ASKED).ids != encoder.encode(ASKED).ids
    vlm.save(tmp_path)
    again = reopen(tmp_path)
    assert text_of(again) == text_of(vlm) and again.processor.chat_template == vlm.processor.chat_template
    assert text_of(open_vlm(stage_folder, device="cpu", version="llava_llama_2")) == text_of(vlm)


def test_another_aspect_ratio_changes_what_is_read(stage_folder):
    vlm = reopen(stage_folder)
    pixels = np.random.RandomState(0).randint(0, 255, (20, 60, 3), dtype=np.uint8)
    wide = [[Image.fromarray(pixels)]]

    def read() -> torch.Tensor:
        return vlm.reader.read(wide).tensors["pixel_values"]

    square = read()
    vlm.settle(image_aspect_ratio="pad")
    padded = read()
    assert (vlm.section.version, vlm.section.image_aspect_ratio) == ("v1", "pad")
    assert square.shape == padded.shape and not torch.allclose(square, padded)
    vlm.settle("plain")
    assert vlm.section.image_aspect_ratio == "pad" and torch.equal(read(), padded), "the folder's stays"
    vlm.settle(image_aspect_ratio="square")
    assert vlm.section.version == "plain" and torch.equal(read(), square)


def test_a_released_model_takes_a_template_but_cuts_images_as_it_does(released_folder, tmp_path):
    vlm = reopen(released_folder)
    with pytest.raises(UserError, match="--image_aspect_ratio pad: .* is a released model.*Leave the flag out"):
        vlm.settle(image_aspect_ratio="pad")
    said = record("one", "what is it?", "a red circle")
    vlm.settle("v1")
    assert vlm.section.version == vlm.encoder.version == "v1" and vlm.section.architecture == "llava-1.6"
    assert text_of(vlm, said).endswith("USER: what is it? ASSISTANT: a red circle</s>")
    turns = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}]}]
    prompt = vlm.processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text_of(vlm, said).startswith(prompt), "plain transformers asks as training did"
    vlm.save(tmp_path)
    assert text_of(reopen(tmp_path), said) == text_of(vlm, said)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage_folder", "released_folder"])
def test_an_encoder_needs_no_weights(name, request, tmp_path):
    path = request.getfixturevalue(name)
    bare = shutil.copytree(path, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    asked = record("one", "<image>\nwhat is it?", "a red circle", image=Image.new("RGB", (60, 20)))
    for version in (None, "v1"):
        ours = open_encoder(bare, version=version, flag="test")
        theirs = open_vlm(path, device="cpu", version=version).encoder
        assert ours.version == theirs.version
        assert ours.encode(asked) == theirs.encode(asked)


def test_the_encoder_of_a_language_model_is_told_template_and_tokens(make_base):
    path = make_base("llama").folder
    with pytest.raises(UserError, match=f"^--version names the template, which --tokenizer {path} does not"):
        open_encoder(path, flag="--tokenizer")
    encoder = open_encoder(path, version="v1", tokens_per_image=9, flag="--tokenizer")
    example = encoder.encode(ASKED)
    assert example.length == len(example.ids) - 1 + 9


# -- parts and probes ----------------------------------------------------------------------------------------------


def tied_model(make_base, clip_tower) -> VLM:
    return compose_tiny(make_base("qwen2", tied=True).folder, clip_tower, "plain")


def sparse_model(make_base, clip_tower) -> VLM:
    vlm = compose_tiny(make_base("llama").folder, clip_tower, "plain", image_projector_type="mlp3x_gelu")
    spec = MoESpec(num_experts=[4], moe_mode="sparse", use_residual=True)
    upcycle(vlm.model, spec)
    vlm.sparse(spec)
    return vlm


@pytest.mark.parametrize("name", ["stage", "tied", "sparse", "published", "released"])
def test_parts_cover_every_parameter_once(name, stage_folder, released_folder, checkpoints, make_base, clip_tower):
    vlm = {
        "stage": lambda: reopen(stage_folder),
        "tied": lambda: tied_model(make_base, clip_tower),
        "sparse": lambda: sparse_model(make_base, clip_tower),
        "published": lambda: reopen(checkpoints / "qwen/dense"),
        "released": lambda: reopen(released_folder),
    }[name]()
    parts = vlm.parts
    if name == "tied":  # the head is the embedding, and in both
        assert list(parts.pop("lm_head").parameters()) == [vlm.model.get_input_embeddings().weight]
    owned = [id(parameter) for part in parts.values() for module in part for parameter in module.parameters()]
    assert len(owned) == len(set(owned))
    assert set(owned) == {id(parameter) for parameter in vlm.model.parameters()}
    assert all(len(part) for part in parts.values())


def test_a_sparse_model_knows_its_options(make_base, clip_tower, tmp_path):
    vlm = sparse_model(make_base, clip_tower)
    assert vlm.spec.use_residual and vlm.spec.num_experts == [4]
    vlm.save(tmp_path, meta={"stage": "moe"})
    again = reopen(tmp_path)
    assert again.spec == vlm.spec and again.section.stage == "moe" and type(again.model) is type(vlm.model)


@pytest.mark.parametrize("name", ["stage_folder", "released_folder"])
def test_probes_are_inputs_of_the_model(name, request):
    vlm = reopen(request.getfixturevalue(name))
    probes = vlm.probes()
    assert set(probes) == {"text", "image"}
    text, image = probes["text"], probes["image"]
    placeholder = vlm.placeholder_ids[0]
    shown = image["input_ids"] == placeholder
    assert not any("labels" in probe for probe in probes.values()) and "pixel_values" in image
    assert "pixel_values" not in text and placeholder not in text["input_ids"]
    assert text["input_ids"].shape[0] == 1 and text["input_ids"].shape[1] >= 2 * PROBE_TOKENS
    words = text["input_ids"][0, -PROBE_TOKENS:]
    assert torch.equal(image["input_ids"][0, -PROBE_TOKENS:], words), "the same words behind the image"
    assert shown.sum() >= 4 and image["attention_mask"].all()
    with torch.no_grad():
        logits = vlm.model(**image).logits
        assert logits.isfinite().all() and vlm.model(**text).logits.isfinite().all()
        other = {**image, "pixel_values": image["pixel_values"] + 1}
        assert not torch.equal(vlm.model(**other).logits, logits), "the image is seen"
    again = vlm.probes()
    assert all(torch.equal(again["image"][key], value) for key, value in image.items())


def test_probes_have_the_models_dtype(stage_folder):
    vlm = open_vlm(stage_folder, device="cpu", dtype=torch.bfloat16)
    image = vlm.probes()["image"]
    assert image["pixel_values"].dtype == torch.bfloat16 and image["input_ids"].dtype == torch.long


# -- saving --------------------------------------------------------------------------------------------------------


def test_a_saved_model_is_the_one_that_was_given(stage_folder, tmp_path):
    vlm = reopen(stage_folder)
    state = {name: tensor + 1 for name, tensor in vlm.model.state_dict().items()}
    vlm.save(tmp_path, state_dict=state, meta={"stage": "finetune"})
    raw = json.loads((tmp_path / "config.json").read_text())
    assert section_of(raw) == vlm.section and vlm.section.stage == "finetune"
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_file(tmp_path / "model.safetensors").items())
