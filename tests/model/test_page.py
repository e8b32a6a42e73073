# SPDX-License-Identifier: Apache-2.0
"""The page of a folder: the hub reads it, it says where the model is from, and a user's own is never overwritten."""

from __future__ import annotations

import re
import shutil

import pytest
from huggingface_hub import ModelCard
from transformers import LlavaConfig

from moellava.cli import main
from moellava.files import PAGE
from moellava.model.origin import DATASETS, hub_id, made_of, note_data
from moellava.model.page import adapter_page, folder_page, is_ours, licence_of, signed, write_page
from moellava.model.section import Section, section_of
from tests.processes import run_python, train_here
from tests.tiny import compose_tiny, reopen

LLM_CARD = "---\nlicense: llama2\nlanguage: en\n---\n# A language model\n"
TOWER_CARD = "---\nlicense: other\nlicense_name: tower-terms\nlicense_link: LICENSE\n---\n"


def cached(root, repository, source, card, of="models"):
    """A folder as the hub's cache has it, with a page."""
    folder = root / f"{of}--{repository.replace('/', '--')}" / "snapshots" / "abc"
    shutil.copytree(source, folder)
    (folder / PAGE).write_text(card)
    return folder


@pytest.fixture(scope="module")
def released_parts(parts, tmp_path_factory):
    """Language model, tower and records as the hub's cache has them."""
    root = tmp_path_factory.mktemp("hub")
    lm = cached(root, "org/lm-7b", parts / "lm", LLM_CARD)
    tower = cached(root, "openai/clip-tiny", parts / "tower", TOWER_CARD)
    data = root / "datasets--org--talks" / "snapshots" / "def" / "talks.json"
    data.parent.mkdir(parents=True)
    return lm, tower, data


@pytest.fixture(scope="module")
def stages(released_parts, flags_for, tmp_path_factory):
    """The folders of the three stages."""
    lm, tower, data = released_parts
    root, folders = tmp_path_factory.mktemp("stages"), {}
    for stage in ("pretrain", "finetune", "moe"):
        flags = flags_for(root, stage) | {"max_steps": 1, "save_strategy": "no", "skip_dry_save": True}
        if stage == "pretrain":
            data.write_text(flags["data_path"].read_text())
            flags["data_path"] = data
        if stage != "moe":
            flags |= {"model_name_or_path": lm, "image_tower": tower}
        folders[stage] = train_here(flags)
    return folders


def test_the_card_says_what_a_model_was_made_of_through_all_stages(stages):
    for stage, folder in stages.items():
        card = ModelCard.load(folder / PAGE)
        fields = card.data.to_dict()
        assert fields["base_model"] == ["openai/clip-tiny", "org/lm-7b"] and fields["library_name"]
        assert fields["pipeline_tag"] == "image-text-to-text" and "moellava" in fields["tags"]
        assert (fields["license"], fields["license_name"]) == ("other", "llama2-and-tower-terms")
        assert fields["library_name"] == ("moellava" if stage == "moe" else "transformers")
        assert ("mixture-of-experts" in fields["tags"]) == (stage == "moe")
        assert "| org/lm-7b | llama2 |" in card.text and "| openai/clip-tiny | tower-terms |" in card.text
        assert str(folder.parent) not in card.content and "/snapshots/" not in card.content
    assert all(ModelCard.load(folder / PAGE).data.datasets == ["org/talks"] for folder in stages.values())
    assert "Trained on: org/talks, sft.json." in ModelCard.load(stages["moe"] / PAGE).text


def code_of(folder):
    """The two pieces of code on a folder's card: for transformers, and for moellava."""
    blocks = re.findall(r"^## In (\w+)\n\n((?:    .*\n)+)", (folder / PAGE).read_text(), re.M)
    assert [name for name, _ in blocks] == ["transformers", "moellava"]
    return (re.sub("^    ", "", block, flags=re.M) for _, block in blocks)


@pytest.mark.slow
def test_the_code_on_the_card_runs(stages, pictures):
    """A dense folder's without moellava; then a sparse folder's."""
    plain, _ = code_of(stages["finetune"])
    registered, ours = code_of(stages["moe"])
    shown = "print(type(model).__name__, type(processor).__name__)"
    lines = ["import os, sys", "os.chdir(sys.argv[1])", plain, shown, "assert 'moellava' not in sys.modules"]
    lines += ["os.chdir(sys.argv[2])", registered, shown, ours.replace("IMAGE", str(pictures[0]))]
    said = run_python("\n".join(lines), stages["finetune"], stages["moe"], fresh=True)
    assert said.startswith("LlavaForConditionalGeneration LlavaProcessor\nExtendedLlavaForConditionalGeneration Llava")


def test_a_page_of_a_users_own_stays(make_base, clip_tower, tmp_path):
    made = compose_tiny(make_base("qwen2").folder, clip_tower, "plain")
    made.save(tmp_path)
    first = (tmp_path / PAGE).read_text()
    made.save(tmp_path, meta={"stage": "finetune"})
    second = (tmp_path / PAGE).read_text()
    assert is_ours(first) and is_ours(second) and "# finetune" in second and first != second
    for own in (second.replace("# finetune", "# My fine"), "# Mine\n"):
        (tmp_path / PAGE).write_text(own)
        made.save(tmp_path, meta={"stage": "moe"})
        assert (tmp_path / PAGE).read_text() == own


def test_commands_write_cards_too(stages, tmp_path, capsys):
    dense, sparse = str(stages["finetune"]), str(stages["moe"])
    assert main(["upcycle", "--model-path", dense, "--output-dir", str(tmp_path / "up"), "--num_experts", "2"]) == 0
    assert main(["export", "--model-path", sparse, "--output-dir", str(tmp_path / "out"), "--verify", "False"]) == 0
    for folder, library in ((tmp_path / "up", "moellava"), (tmp_path / "out", "transformers")):
        fields = ModelCard.load(folder / PAGE).data.to_dict()
        assert fields["base_model"] == ["openai/clip-tiny", "org/lm-7b"] and fields["library_name"] == library
        assert "mixture-of-experts" in fields["tags"] and is_ours((folder / PAGE).read_text())
    capsys.readouterr()


def test_a_folder_without_a_name_on_the_hub_is_named_without_its_path(make_base, clip_tower, tmp_path):
    llm = shutil.copytree(make_base("qwen2").folder, tmp_path / "my-lm")
    (llm / PAGE).write_text("---\n: [no yaml\n---\n")
    made = compose_tiny(llm, clip_tower, "plain")
    assert made.section.made_of == {"models": {"my-lm": {}, clip_tower.name: {}}}
    made.save(tmp_path / "saved")
    fields = ModelCard(folder_page(made.model.config)).data.to_dict()
    assert "base_model" not in fields and "license" not in fields and "datasets" not in fields
    assert reopen(tmp_path / "saved").section == made.section


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        ([], {}),
        ([{}, {"license": "mit"}], {"license": "mit"}),
        ([{"license": "mit"}, {"license": "mit"}], {"license": "mit"}),
        ([{"license": "mit"}, {"license": "llama2"}], {"license": "other", "license_name": "llama2-and-mit"}),
        (
            [{"license": "other", "license_name": "x", "license_link": "L"}],
            {"license": "other", "license_name": "x", "license_link": "L"},
        ),
    ],
)
def test_the_licence_of_a_whole(parts, whole):
    assert licence_of(parts) == whole


def test_data_are_named_once_by_id_or_file_name(tmp_path):
    config = LlavaConfig()
    files = ["/a/datasets--org--talks/snapshots/1/x.json", "/home/me/mine.json", "/home/you/mine.json"]
    for _ in range(2):  # a run that goes on notes them again
        note_data(config, files)
    assert section_of(config).made_of == {"models": {}, "datasets": ["org/talks"], "files": ["mine.json"]}
    assert hub_id(files[0]) is None and hub_id(files[0], DATASETS) == "org/talks"


def test_an_adapter_has_a_card_of_its_own():
    section = Section(version="v1", family="llama", made_of={"models": {"org/lm": {"license": "mit"}}})
    card = ModelCard(adapter_page(section, "/home/me/stage1"))
    assert (card.data.library_name, card.data.base_model, card.data.license) == ("peft", ["org/lm"], "mit")
    assert "lora" in card.data.tags and "`stage1`" in card.text and "/home" not in card.content
    assert "`org/vlm`" in adapter_page(section, "org/vlm"), "an id on the hub is said in full"


def test_a_page_is_ours_until_a_letter_changes(tmp_path):
    page = signed("# A model\n")
    assert is_ours(page) and not is_ours(page.replace("A model", "B model")) and not is_ours("# A model\n")
    write_page("text", tmp_path, tmp_path / "new")
    assert is_ours((tmp_path / PAGE).read_text())
    assert made_of([]) == {}
