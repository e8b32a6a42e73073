# SPDX-License-Identifier: Apache-2.0
"""transformers' own tools open sparse folders, once our classes are registered."""

from __future__ import annotations

import importlib
import runpy
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moellava
from moellava.auto_classes import PREFIX, register_auto_classes
from moellava.model import extended
from moellava.serve.answer import answer
from moellava.serve.prompt import Request
from moellava.vlm import open_vlm
from tests.processes import run_python, train_here

QUESTION = "what is it?"


@pytest.fixture(scope="module")
def sparse(flags_for, tmp_path_factory):
    """A stage-3 folder."""
    root = tmp_path_factory.mktemp("auto")
    short = {"max_steps": 1, "save_strategy": "no", "skip_dry_save": True}
    for stage in ("pretrain", "finetune", "moe"):
        folder = train_here(flags_for(root, stage) | short)
    return folder


def test_the_auto_classes_open_a_sparse_folder(sparse, pictures):
    vlm = open_vlm(sparse, device="cpu", dtype=torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(sparse, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(sparse)
    assert type(model) is type(vlm.model) and type(AutoConfig.from_pretrained(sparse)) is type(vlm.model.config)
    assert type(AutoModel.from_pretrained(sparse)) is type(vlm.model)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    batch = processor(images=Image.open(pictures[0]), text=text, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, vlm.model(**batch).logits)
    words = pipeline("image-text-to-text", model=sparse, dtype=torch.float32)
    asked = [{"role": "user", "content": [{"type": "image", "path": str(pictures[0])}, turns[0]["content"][1]]}]
    said = words(asked, max_new_tokens=6, return_full_text=False)[0]["generated_text"]
    assert said.strip() == answer(vlm, [Request(QUESTION, [pictures[0]])], max_new_tokens=6)[0].strip() != ""


def test_lmms_evals_way_to_ask_a_model_works(sparse, pictures):
    """The calls of its model `huggingface`: AutoModel answers, prompted by the processor, decoded by it."""
    model = AutoModel.from_pretrained(sparse, dtype=torch.float32).eval()
    processor, tokenizer = AutoProcessor.from_pretrained(sparse), AutoTokenizer.from_pretrained(sparse)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    media = {"images": [Image.open(pictures[0])]}
    inputs = processor(text=[text], padding=True, padding_side="right", return_tensors="pt", **media)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "num_beams": 1, "max_new_tokens": 6}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids = model.generate(**inputs, **greedy, **ends, use_cache=True)[:, inputs.input_ids.shape[1] :]
    (said,) = processor.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    wanted = answer(
        open_vlm(sparse, device="cpu", dtype=torch.float32), [Request(QUESTION, [pictures[0]])], max_new_tokens=6
    )
    assert said.strip() == wanted[0].strip() != ""


def test_every_type_of_model_is_known_and_made_when_a_folder_asks_for_it():
    register_auto_classes()
    register_auto_classes()  # a second time changes nothing
    assert {PREFIX + name for name in ("llava", "llava_next", "qwen2_vl", "smolvlm")} <= set(CONFIG_MAPPING.keys())
    config = CONFIG_MAPPING[f"{PREFIX}llava_next"].from_dict({"text_config": {"model_type": f"{PREFIX}qwen2"}})
    assert type(config) is extended.extended_config(extended.base_of("llava_next").config_class)
    assert config.text_config.model_type == "qwen2"


ORDERS = {
    "moellava first": "import moellava\nassert not {'torch', 'transformers'} & set(sys.modules)\nimport transformers",
    "transformers first": "import transformers\nimport moellava",
    "a table first": "from transformers import AutoConfig\nimport moellava",
    "within another import": "import moellava\nimport transformers.quantizers.auto",
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_importing_moellava_registers_its_classes_in_any_order(sparse, order):
    code = f"import sys\n{ORDERS[order]}\nfrom transformers import AutoConfig\n"
    code += "print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__)"
    assert run_python(code, sparse, fresh=True).split() == ["ExtendedLlavaConfig"]


def test_importing_moellava_registers_where_transformers_is_there(plain_transformers):
    importlib.reload(moellava)
    assert f"{PREFIX}llava" in CONFIG_MAPPING


def test_a_tool_is_run_with_our_classes_known(sparse, tmp_path, monkeypatch, capsys, plain_transformers):
    tool = "import sys\nfrom transformers import AutoConfig\nprint(AutoConfig.from_pretrained(sys.argv[1]).model_type)"
    (tmp_path / "some_tool.py").write_text(tool)
    with pytest.raises(ValueError, match="moellava_llava"):
        AutoConfig.from_pretrained(sparse)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.argv", ["auto_classes", "some_tool", str(sparse)])
    monkeypatch.delitem(sys.modules, "moellava.auto_classes")
    runpy.run_module("moellava.auto_classes", run_name="__main__")
    assert capsys.readouterr().out.split() == ["moellava_llava"]
