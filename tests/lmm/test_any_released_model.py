# SPDX-License-Identifier: Apache-2.0
"""Released models without an entry: their parts found, trained by their folder's name, or refused with the reason."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf

from moellava.cli import main
from moellava.data.video import Clip
from moellava.errors import UserError
from moellava.lmm import processors
from moellava.lmm.any_released import probe_batch
from moellava.lmm.architecture import ARCHITECTURES
from moellava.model.manifest import read_folder
from moellava.model.parts import parts_of
from moellava.model.vision_probes import PartsError, decoder_of, find_parts, on_paper
from moellava.vlm import describe
from tests import tiny
from tests.lmm.any_released_model import check, check_all, page_rows, table, write
from tests.lmm.tiny import AREA, NATIVE, reopen
from tests.lmm.tiny_released_models import (
    OVERRIDES,
    needs_torchvision,
    released_models,
    tiny_config,
    tiny_processor,
    write_tokenizer,
)
from tests.older import PAGE, marked

SLOW = pytest.mark.slow
SAMPLE = ("glm46v", "janus", "blip")
SAMPLE += tuple(pytest.param(name, marks=SLOW) for name in ("aya_vision", "qwen3_5_moe", "hunyuan_vl"))
"""A projector inside the tower, parts left over, no place for images; a projector beside it, a sparse decoder, a
placeholder that wants tokens around it."""


@pytest.fixture(scope="module")
def released_tokenizer(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("released") / "tokenizer")


@pytest.fixture(scope="module")
def vipllava(tmp_path_factory, released_tokenizer) -> Path:
    """A folder of a class that no entry names."""
    folder = tmp_path_factory.mktemp("vipllava") / "hub"
    write("vipllava", released_tokenizer, folder)
    return folder


def said_of(model_type: str) -> list[str]:
    """Verdict, copies, slices and reason of the page."""
    row = next(row for row in page_rows() if row[0] == model_type)
    return [row[1], *row[3:]]


def cells(row) -> list[str]:
    cells = table([row]).splitlines()[-1].split(" | ")
    return [cells[1], *cells[3:5], cells[5].removesuffix("|").strip()]


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample_does_what_the_page_says(model_type, released_tokenizer, tmp_path):
    assert cells(check(model_type, released_tokenizer, tmp_path)) == said_of(model_type)


@pytest.mark.slow
def test_classes_of_transformers_train_or_are_refused_as_the_page_says():
    """Every fourth that runs without torchvision."""
    names = [name for name in released_models() if said_of(name)[0] == "trains" and not needs_torchvision(name)]
    rows = check_all(names[::4])
    wrong = [row for row in rows if cells(row) != said_of(row.model_type)]
    assert not wrong, table(wrong)
    assert len(rows) > 8


@PAGE
def test_the_page_has_a_row_for_each_class_and_most_of_them_train():
    rows = page_rows()
    assert sorted(row[0] for row in rows) == sorted(released_models()) and set(OVERRIDES) <= set(released_models())
    verdicts = [row[1] for row in rows]
    assert set(verdicts) == {"trains", "refused", "undecided"} and verdicts.count("trains") >= 52
    assert sum(row[1] == "trains" and not needs_torchvision(row[0]) for row in rows) >= 49, "without torchvision"
    assert all(bool(row[5]) == (row[1] != "trains") for row in rows)


@pytest.mark.parametrize("name", marked(NATIVE))
def test_probes_find_the_parts_that_entries_name(name, released_tokenizer):
    entry = ARCHITECTURES[name]
    processor = tiny_processor(entry.model_type, released_tokenizer)
    model = on_paper(tiny_config(entry.model_type, processor))
    found = find_parts(model, probe_batch(processor, entry.collator))
    by_probes, by_entry = (
        {part: sorted(map(id, held.parameters())) for part, held in parts_of(model, keywords).items()}
        for keywords in (found, entry.keywords)
    )
    assert by_probes == by_entry


def test_a_projector_inside_the_tower_is_what_stands_behind_its_blocks_but_for_norms(released_tokenizer):
    processor = tiny_processor("glm46v", released_tokenizer)
    found = find_parts(on_paper(tiny_config("glm46v", processor)), probe_batch(processor))
    assert found.vision_projector == ("visual.merger", "visual.downsample")
    assert {"visual.blocks", "visual.post_layernorm", "visual.post_conv_layernorm"} <= set(found.vision_encoder)


@pytest.fixture(scope="module")
def of_llava(released_tokenizer):
    """A LLaVA on paper, and its processor."""
    processor = tiny_processor("llava", released_tokenizer)
    return on_paper(tiny_config("llava", processor)), processor


def test_on_paper_no_weight_takes_memory(of_llava):
    assert all(parameter.untyped_storage().nbytes() == 4 for parameter in of_llava[0].parameters())


def test_what_is_left_over_is_named(of_llava):
    model = copy.deepcopy(of_llava[0])
    model.model.ears = torch.nn.Linear(2, 2)
    with pytest.raises(PartsError, match=r"no part of what turns .* are its model\.ears"):
        find_parts(model, probe_batch(of_llava[1]))


def test_a_text_alone_reaches_no_tower(of_llava):
    with pytest.raises(PartsError, match="no parameter outside its decoder has a hand"):
        find_parts(of_llava[0], {"input_ids": torch.ones(1, 3, dtype=torch.long)})


def test_a_decoder_that_is_the_whole_model_is_no_part():
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    with pytest.raises(PartsError, match="no decoder of its own"):
        decoder_of(hf.LlamaModel(hf.LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes)))


def test_a_folder_of_no_entry_trains_by_its_name_and_remembers_its_parts(vipllava, run, architectures):
    trained = run(vipllava, "unregistered", max_steps=1, train_vision_projector=True)
    before, after = reopen(vipllava), reopen(trained)
    assert (after.architecture.name, after.architecture.keywords) == ("vipllava", None)
    assert after.section.parts == before.section.parts and after.keywords == before.keywords
    assert after.section.parts["vision_projector"] == ["multi_modal_projector"]
    assert "vipllava" not in {entry.model_type for entry in architectures.values()}
    old, new = before.model.state_dict(), after.model.state_dict()
    moved = {name.split(".")[1] for name in old if not torch.equal(old[name], new[name])}
    assert moved == {"multi_modal_projector", "language_model", "weight"}, "all but the tower"
    plain = hf.AutoModelForImageTextToText.from_pretrained(trained)
    assert type(plain) is hf.VipLlavaForConditionalGeneration


@pytest.mark.slow
def test_a_sparse_model_is_balanced_where_a_flag_asks_for_it(released_tokenizer, tmp_path, run):
    write("qwen3_vl_moe", released_tokenizer, tmp_path / "hub")
    trained = run(tmp_path / "hub", "balanced", max_steps=1, logging_steps=1, router_aux_loss_coef=0.5)
    history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    (line,) = [entry for entry in history if "ce" in entry]
    assert line["aux"] > 1 and line["loss"] == pytest.approx(line["ce"] + 0.5 * line["aux"], abs=1e-3)


def test_parts_that_are_left_over_stop_a_run_before_weights_are_read(released_tokenizer, tmp_path, run):
    write("janus", released_tokenizer, tmp_path / "hub")
    (tmp_path / "hub" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot be taken apart: .* are its model\.vqmodel"):
        run(tmp_path / "hub")


def test_a_template_that_cannot_be_masked_stops_a_run(vipllava, tmp_path):
    shutil.copytree(vipllava, tmp_path / "hub")
    (tmp_path / "hub" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content[0].text }}{% endfor %}")
    with pytest.raises(UserError, match="chat template of vipllava cannot be trained on"):
        describe(read_folder(tmp_path / "hub", "--model_local_path")).inputs()


class Wanting:
    """A processor class whose package is not there, as transformers has them."""

    @classmethod
    def from_pretrained(cls, folder, **options):
        raise ImportError("LlavaProcessor requires the Torchvision library but it was not found")


def test_a_processor_that_needs_torchvision_says_so(vipllava, monkeypatch):
    monkeypatch.setattr(hf, "LlavaProcessor", Wanting)
    monkeypatch.setattr(processors, "is_torchvision_available", lambda: False)
    with pytest.raises(UserError, match="LlavaProcessor, needs torchvision: pip install torchvision"):
        describe(read_folder(vipllava, "--model_local_path")).inputs()


def test_videos_are_read_as_the_class_reads_them_that_a_folder_names(released_tokenizer, tmp_path, monkeypatch):
    """Exaone's video processor is Qwen2-VL's, of which an entry knows what it does."""
    monkeypatch.setattr(processors, "is_torchvision_available", lambda: False)
    write("exaone4_5", released_tokenizer, tmp_path / "hub")
    path = tmp_path / "hub" / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["video_processor"] = {"video_processor_type": "Qwen2VLVideoProcessor"} | AREA
    path.write_text(json.dumps(settings))
    reader = reopen(tmp_path / "hub").reader
    assert reader.reads_videos
    assert reader.clip_length(Clip((56, 56), 8, 1.0, tuple(range(8)))) == 4 * 4, "four pairs of frames of 2 × 2 tokens"


def test_inspect_shows_what_can_be_done_on_one_screen(vipllava, capsys):
    assert main(["inspect", "--model-path", str(vipllava)]) == 0
    out = capsys.readouterr().out
    lines = {line[:26].strip(): line[26:] for line in out.splitlines()}
    assert lines["class"] == "VipLlavaForConditionalGeneration (model type vipllava)"
    assert lines["architecture"] == "vipllava, by probes" and lines["each parameter once"] == "yes"
    assert lines["masks"] == "exactly; an answer ends with '<|endoftext|>'"
    assert lines["images"] == "any size: 4 tokens" and lines["videos"] == "as their frames, an image each"
    assert lines["experts as copies"] == lines["experts as slices"] == "exact"
    assert "2 q_proj" in lines["LoRA, language_model"] and lines["plain transformers"] == "opens it"
    assert lines["trains"] == "yes" and len(lines) < 24


def test_inspect_says_as_json_why_a_folder_cannot_be_trained(vipllava, tmp_path, capsys):
    shutil.copytree(vipllava, tmp_path / "hub")
    (tmp_path / "hub" / "chat_template.jinja").unlink()
    assert main(["inspect", "--model-path", str(tmp_path / "hub"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["trains"] is False and "no chat template" in found["problems"][0]
    assert found["covered"] and found["upcycles"] == {"copies": "exact", "slices": "exact"}
    model = reopen(vipllava).model
    assert sum(found["parts"].values()) == sum(parameter.numel() for parameter in model.parameters())


def test_inspect_works_for_what_is_composed(make_base, clip_tower, tmp_path, capsys):
    vlm = tiny.compose_tiny(make_base("llama").folder, clip_tower, "qwen", image_projector_type="mlp3x_gelu")
    vlm.save(tmp_path)
    assert main(["inspect", "--model-path", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["architecture"], found["version"], found["images"]) == ("composed", "qwen", {"any size": 4})
    assert found["covered"] and not found["plain"] and "its projector is mlp3x_gelu" in found["plain_reason"]
    assert main(["inspect", "--model-path", str(tmp_path), "--version", "qwen"]) == 2
    assert "the folder's own template" in capsys.readouterr().err
    assert main(["inspect", "--tokenizer", str(tmp_path)]) == 0, "of its tokenizer alone"
    assert "template        ends with" in capsys.readouterr().out
