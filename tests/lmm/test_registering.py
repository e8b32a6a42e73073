# SPDX-License-Identifier: Apache-2.0
"""A class of transformers that no entry names, registered while the program runs, in the four steps of the guide."""

import json

import pytest
import torch
import transformers as hf

from moellava.errors import UnknownNameError, UserError
from moellava.lmm.architecture import architecture_of
from moellava.lmm.collators import COLLATORS, MediaCollator
from moellava.lmm.datasets import TO_LOAD_IMAGE
from moellava.lmm.loaders import LOADERS, find_model
from moellava.lmm.supported_models import MULTIMODAL_KEYWORDS, register_model
from moellava.lmm.templates import vicuna
from moellava.model.build import read
from moellava.model.section import section_of
from moellava.vlm import build, describe
from tests.lmm.tiny import (
    CLIP,
    CROP,
    IMAGE,
    OLD_NAMES,
    SELECT,
    TEXT,
    TinyArchitecture,
    batch_of,
    manifest_of,
    reopen,
)

ROW = TinyArchitecture(
    name="my-family",
    model_type="vipllava",
    prompt="<s>USER: <image>\nWhat is it? ASSISTANT: A fractal.</s>",
    end="</s>",
    config={
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": CLIP,
        "vision_feature_layers": [-2, -1],
        "image_seq_length": 4,
    },
    tokens=IMAGE,
    fields=OLD_NAMES,
    processor=lambda tokenizer: hf.LlavaProcessor(hf.CLIPImageProcessorPil(**CROP), tokenizer, **SELECT),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, golden_tokenizers):
    """A tiny VipLLaVA, with the chat template that its folder has to have: none is on record."""
    folder = tmp_path_factory.mktemp("vipllava") / "model"
    ROW.save(golden_tokenizers, folder)
    (folder / "chat_template.jinja").write_text(vicuna("<image>\n"))
    return folder


@pytest.fixture
def registered(architectures):
    """Step 1 of the guide."""
    MULTIMODAL_KEYWORDS["my-family"] = ["vision_tower", "multi_modal_projector"]
    register_model(model_id="mine", model_family_id="my-family", model_hf_path="somebody/mine")


class Numbered(MediaCollator):
    """Step 4, with something to see."""

    batches = 0

    def __call__(self, samples):
        type(self).batches += 1
        return super().__call__(samples)


def opened_by_id(folder):
    manifest, architecture = find_model("mine", str(folder))
    return build(describe(manifest, architecture=architecture), torch.float32)


@pytest.mark.slow
def test_a_new_architecture_is_loaded_by_its_id_and_learns(registered, folder, samples_of):
    loaded = []

    def load(path, config, dtype):
        loaded.append((path, section_of(config).architecture, dtype))
        return read(path, config, dtype)

    LOADERS["my-family"] = load
    TO_LOAD_IMAGE["my-family"] = True
    COLLATORS["my-family"] = Numbered
    vlm = opened_by_id(folder)
    assert type(vlm.model) is hf.VipLlavaForConditionalGeneration and loaded == [(folder, "my-family", torch.float32)]

    parts, inner = vlm.parts, vlm.model.model
    assert list(parts["vision_tower"]) == [inner.vision_tower, inner.multi_modal_projector]
    parts["vision_tower"].requires_grad_(False)

    dataset = samples_of("my-family", vlm=vlm)
    batch = batch_of("my-family", dataset, 0, 2)
    assert type(vlm.collator()) is Numbered
    assert Numbered.batches == 1 and int((batch["input_ids"] == vlm.reader.placeholder_id).sum()) >= 4
    vlm.model(**batch).loss.backward()
    learning = {id(held) for held in vlm.model.parameters() if held.grad is not None and held.grad.any()}
    assert learning and not learning & {id(held) for held in parts["vision_tower"].parameters()}


@pytest.mark.slow
def test_a_run_by_the_id_leaves_a_folder_that_opens_by_itself(registered, folder, run):
    trained = run(folder, model_id="mine", max_steps=1)
    manifest, architecture = find_model(None, str(trained))
    assert architecture.name == manifest.section.architecture == "my-family"
    before, after = (vlm.model.state_dict() for vlm in (opened_by_id(folder), reopen(trained)))
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved and all("language_model" in name or "lm_head" in name for name in moved)


def test_what_is_not_registered_or_no_model_for_images_and_text_is_named(architectures, folder, tmp_path):
    raw = json.loads((folder / "config.json").read_text()) | {"moellava": {"lmm_family": "my-family"}}
    with pytest.raises(UnknownNameError, match="'vipllava', which no .* is, and says that it is of 'my-family', which"):
        architecture_of(manifest_of(raw))
    MULTIMODAL_KEYWORDS["my-family"] = ["vision_tower"]
    register_model(model_id="mine", model_family_id="my-family", model_hf_path="somebody/mine")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="'bert' model, and the installed transformers has no class .* images and text"):
        opened_by_id(tmp_path)
