# SPDX-License-Identifier: Apache-2.0
"""Opening released models: architectures, processors, templates, and what is refused."""

import dataclasses
import json
import shutil

import pytest
import torch

from moellava.errors import UnknownNameError, UserError
from moellava.lmm.architecture import ARCHITECTURES
from moellava.lmm.loaders import find_model
from tests.lmm.tiny import reopen

REMOTE = [name for name, architecture in ARCHITECTURES.items() if architecture.remote_code]


@pytest.mark.parametrize("family_id", ["llava-1.5", "qwen2-vl", "gemma3"])
def test_a_folder_opens_in_its_own_class_with_its_own_processor(family_id, opened, tiny_lmm):
    from transformers import AutoConfig, AutoModelForImageTextToText

    vlm = opened(family_id)
    assert vlm.architecture is ARCHITECTURES[family_id]
    plain = AutoModelForImageTextToText.from_pretrained(tiny_lmm(family_id))
    assert type(vlm.model) is type(plain)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in vlm.model.state_dict().items())
    assert type(vlm.processor).__name__.removesuffix("Processor") in type(plain).__name__
    assert vlm.processor.chat_template == ARCHITECTURES[family_id].template, "the folder has none of its own"
    assert AutoConfig.from_pretrained(tiny_lmm(family_id)).model_type == vlm.architecture.model_type


def test_a_processor_keeps_the_settings_of_its_video_processor(opened, tmp_path):
    vlm = opened("qwen2-vl")
    vlm.processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == "Qwen2VLProcessor"
    assert saved["video_processor"]["size"] == {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    assert saved["video_processor"]["video_processor_type"] == "Qwen2VLVideoProcessor"


def test_an_id_and_a_folder_of_another_architecture_are_refused(tiny_lmm):
    with pytest.raises(
        UserError, match="--model_id qwen2-vl-2b-instruct is of the architecture qwen2-vl.*type 'llava'"
    ):
        find_model("qwen2-vl-2b-instruct", str(tiny_lmm("llava-1.5")))
    assert find_model("llava-1.5-7b", str(tiny_lmm("llava-1.5")))[1].name == "llava-1.5"
    with pytest.raises(UnknownNameError, match="Unknown model id 'llava-1.5'. Did you mean 'llava-1.5-7b'"):
        find_model("llava-1.5", None)


@pytest.fixture
def copy_of(tiny_lmm, tmp_path):
    def copy(family_id):
        shutil.copytree(tiny_lmm(family_id), tmp_path / "copy")
        return tmp_path / "copy"

    return copy


@pytest.mark.parametrize("family_id", ["llava-1.5", "smolvlm", "llama-3.2-vision"])
@pytest.mark.parametrize("lost", ["processor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_the_processor_needs_is_named(family_id, lost, copy_of):
    folder = copy_of(family_id)
    (folder / lost).unlink()
    with pytest.raises(UserError, match=f"lacks .*{lost}.*: no processor can be built for {family_id}"):
        reopen(folder)


def test_missing_weights_are_named(copy_of):
    folder = copy_of("llava-1.5")
    (folder / "model.safetensors").unlink()
    with pytest.raises((UserError, OSError), match="model"):
        reopen(folder)


def test_a_package_that_the_processor_needs_is_named(tiny_lmm, monkeypatch):
    from transformers.models.smolvlm import processing_smolvlm

    folder = tiny_lmm("smolvlm")  # before the package is gone: it is made with it, if no other test has
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(UserError, match="cannot be built: Package `num2words` is required"):
        reopen(folder)


UNMASKABLE = {
    "repeats": "{% for m in messages %}{{ m['content'][0]['text'] }}{{ m['content'][0]['text'] }}</s>{% endfor %}",
    "not prefix-stable": "{{ messages | length }}{% for m in messages %}{{ m['content'][0]['text'] }}</s>{% endfor %}",
    "ends an answer with nothing": "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}",
    "cannot render": "{{ raise_exception('no') }}",
}


@pytest.mark.slow
@pytest.mark.parametrize("reason", list(UNMASKABLE))
def test_a_template_that_cannot_be_masked_is_named(reason, copy_of, architectures, caplog):
    """The one on record takes its place, and a warning says why; where there is none, the run stops."""
    folder = copy_of("llava-1.5")
    (folder / "chat_template.jinja").write_text(UNMASKABLE[reason])
    caplog.set_level("WARNING", logger="moellava")
    assert reopen(folder).processor.chat_template == ARCHITECTURES["llava-1.5"].template
    architectures.replace("llava-1.5", dataclasses.replace(architectures["llava-1.5"], template=None))
    with pytest.raises(UserError, match=f"chat template of llava-1.5 cannot be trained on: .*{reason}"):
        reopen(folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template and none is on record for llava-1.5"):
        reopen(folder)


@pytest.mark.parametrize("family_id", REMOTE)
def test_remote_code_runs_only_when_it_is_allowed(family_id, tmp_path):
    architecture = ARCHITECTURES[family_id]
    raw = {"model_type": architecture.model_type, **dict.fromkeys(architecture.needs, {})}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=f"{family_id} models need the Python code.*--trust_remote_code True"):
        reopen(tmp_path)


def test_a_template_that_never_stops_gives_way_to_the_one_on_record(copy_of, caplog):
    folder = copy_of("llava-1.5")
    endless = ARCHITECTURES["llava-1.5"].template.replace("{{ eos_token }}", "{{ ' ' }}")
    (folder / "chat_template.jinja").write_text(endless)
    assert reopen(folder).processor.chat_template == ARCHITECTURES["llava-1.5"].template
    own = ARCHITECTURES["llava-1.5"].template.replace("USER", "HUMAN")
    (folder / "chat_template.jinja").write_text(own)
    assert reopen(folder).processor.chat_template == own, "a folder's own template comes first"
