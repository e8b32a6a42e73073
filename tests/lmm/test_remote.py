# SPDX-License-Identifier: Apache-2.0
"""Architectures with code of their own: our adapters against stand-ins that have the interface of that code."""

import importlib.util
import json
import shutil

import pytest
import torch
from PIL import Image

from moellava.constants import IGNORE_INDEX
from moellava.errors import DataError, UserError
from moellava.lmm.architecture import ARCHITECTURES
from moellava.model.manifest import read_folder
from moellava.model.parts import group_names
from moellava.vlm import describe
from tests.lmm.tiny import batch_of, reopen

RECORD = {
    "id": "two",
    "image": ["0.png", "1.png"],
    "system_prompt": "Be brief.",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A fractal."},
        {"from": "human", "value": "And this one?\n<image>"},
        {"from": "gpt", "value": "Another."},
    ],
}


def python_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_qwen_vl_gets_the_ids_that_its_own_tokenizer_makes_of_paths(samples_of, tiny_lmm, pictures):
    dataset = samples_of("qwen-vl", [RECORD])
    sample = dataset[0]
    assert sample["media"] == list(pictures[:2]), "unopened"
    batch = batch_of("qwen-vl", dataset, 0)
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\nPicture 1: <img>{pictures[0]}</img>\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\nA fractal.<|im_end|>\n"
        f"<|im_start|>user\nAnd this one?Picture 2: <img>{pictures[1]}</img>\n<|im_end|>\n"
        "<|im_start|>assistant\nAnother.<|im_end|>\n"
    )
    theirs = python_of(tiny_lmm("qwen-vl") / "tokenization_qwen.py").QWenTokenizer(tiny_lmm("qwen-vl"))
    assert batch["input_ids"][0].tolist() == theirs(text)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert dataset.lengths == [batch["input_ids"].shape[1]]
    trained = batch["labels"][0][batch["labels"][0] != IGNORE_INDEX]
    assert dataset.encoder.tokenizer.decode(trained) == "A fractal.<|im_end|>Another.<|im_end|>"


def test_qwen_vl_renders_paths_that_a_message_brings_along(opened):
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Hi"}]
    processor = opened("qwen-vl").processor
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=processor.chat_template, tokenize=False
    )
    assert text.endswith("<|im_start|>user\nPicture 1: <img>a.png</img>\nHi<|im_end|>\n")


def test_a_path_that_does_not_fit_is_named(samples_of, pictures, tmp_path):
    deep = tmp_path / ("d" * 120) / ("e" * 120)
    deep.mkdir(parents=True)
    shutil.copy(pictures[0], deep / "0.png")
    record = RECORD | {"image": [str(deep / "0.png"), "1.png"]}
    with pytest.raises(
        DataError, match="Record two .* bytes long, and Qwen-VL reads paths of at most 254.*--image_folder"
    ):
        samples_of("qwen-vl", [record])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_phi_3_vision_gets_what_its_own_processor_makes_of_the_prompt(count, samples_of, tiny_lmm, pictures):
    from transformers import AutoProcessor

    asked = "<image>\n" * count + "What is it?"
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "A fractal."}]
    shown = {"image": [f"{number}.png" for number in range(count)]} if count else {}
    dataset = samples_of("phi3-v", [{"id": "a", "conversations": turns, **shown}])
    batch = batch_of("phi3-v", dataset, 0)
    numbered = "".join(f"<|image_{number}|>\n" for number in range(1, count + 1))
    text = f"<|user|>\n{numbered}What is it?<|end|>\n<|assistant|>\nA fractal.<|end|>\n"
    theirs = AutoProcessor.from_pretrained(tiny_lmm("phi3-v"), trust_remote_code=True)
    expected = theirs(text, [Image.open(path) for path in pictures[:count]], return_tensors="pt")
    length = expected["input_ids"].shape[1]
    assert batch["input_ids"][0, :length].tolist() == expected["input_ids"][0].tolist()
    assert batch["attention_mask"].sum() == length
    if count:
        assert set(batch) == set(expected) | {"labels"}
        assert all(torch.equal(batch[name], value) for name, value in expected.items())
    trained = batch["labels"][0][batch["labels"][0] != IGNORE_INDEX]
    assert dataset.encoder.tokenizer.decode(trained).replace(" ", "") == "Afractal.<|end|>"


@pytest.mark.parametrize("family_id", ["qwen-vl", "phi3-v"])
def test_parts_and_gradients(family_id, samples_of, opened):
    model = opened(family_id).model
    names = [name for name, _ in model.named_parameters()]
    groups = group_names(names, ARCHITECTURES[family_id].keywords)
    assert sorted(name for group in groups.values() for name in group) == sorted(names)
    dataset = samples_of(family_id)
    model.train().zero_grad()
    model(**batch_of(family_id, dataset, 2)).loss.backward()
    towers = {name: model.get_parameter(name).grad for name in groups["vision_encoder"] + groups["vision_projector"]}
    model.eval().zero_grad()
    assert all(gradient is not None and not gradient.any() for gradient in towers.values())


@pytest.mark.parametrize("family_id", ["qwen-vl", "phi3-v"])
def test_a_trained_folder_opens_with_its_own_code_alone(family_id, opened, samples_of, tmp_path):
    from transformers import AutoModelForCausalLM

    vlm = opened(family_id)
    vlm.save(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    batch = batch_of(family_id, samples_of(family_id), 0, 1)
    with torch.no_grad():
        assert torch.equal(plain.eval()(**batch).logits, vlm.model(**batch).logits)
    again = reopen(tmp_path / "saved", trust_remote_code=True)
    assert again.processor.chat_template == vlm.processor.chat_template
    if family_id == "qwen-vl":
        assert python_of(tmp_path / "saved" / "tokenization_qwen.py").QWenTokenizer(tmp_path / "saved")("Hi") == [13048]


@pytest.fixture
def copy_of(tiny_lmm, tmp_path):
    def copy(family_id):
        return shutil.copytree(tiny_lmm(family_id), tmp_path / "copied")

    return copy


def test_nothing_runs_without_the_flag(copy_of):
    folder = copy_of("phi3-v")
    (folder / "modeling_phi3_v.py").write_text("raise SystemExit('was run')")
    with pytest.raises(UserError, match="phi3-v models need the Python code.*--trust_remote_code True"):
        reopen(folder)


@pytest.mark.slow
def test_code_that_does_not_run_and_code_that_is_missing_are_named(copy_of):
    folder = copy_of("qwen-vl")
    code = (folder / "modeling_qwen.py").read_text()
    (folder / "modeling_qwen.py").write_text(f"from transformers import BeamHypotheses\n{code}")
    with pytest.raises(UserError, match=r"cannot make its model with transformers .*BeamHypotheses.*config.json names"):
        reopen(folder, trust_remote_code=True)
    raw = json.loads((folder / "config.json").read_text())
    del raw["auto_map"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="has no code for its model"):
        reopen(folder, trust_remote_code=True)


def test_upcycling_says_why_not(tiny_lmm):
    description = describe(read_folder(tiny_lmm("qwen-vl"), "--model-path"), trust_remote_code=True)
    with pytest.raises(UserError, match="--moe_enable True: the decoder of qwen-vl models is code of their own"):
        description.architecture.refuse_upcycling("--moe_enable True")
