# SPDX-License-Identifier: Apache-2.0
"""Plug-ins: what they register acts in every command, and a folder that needs one says so, and runs nothing."""

from __future__ import annotations

import json
import re
import shutil
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from moellava import plugins
from moellava.cli import main
from moellava.conversation import conv_templates
from moellava.convert.export.targets import TARGETS
from moellava.convert.upcycle_folder import upcycle_folder
from moellava.data.tokenizers import TOKENIZERS
from moellava.errors import UserError
from moellava.eval.benchmarks import BENCHMARKS
from moellava.lmm.architecture import ARCHITECTURES, SUPPORTED_MODELS
from moellava.model.families import FAMILIES
from moellava.model.manifest import read_folder
from moellava.model.projectors import PROJECTORS
from moellava.model.section import section_of
from moellava.moe import MoESpec
from moellava.moe.spec import MODES, PRESETS
from moellava.plugins import PLUGINS, load_plugin
from moellava.train.arguments import parse_arguments
from moellava.vlm import open_vlm
from tests import tiny
from tests.processes import ROOT, run_python, train_here, words_of

PAGE = (ROOT / "docs" / "PLUGINS.md").read_text(encoding="utf-8")
EXAMPLE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
REGISTRIES = (conv_templates, PROJECTORS, ARCHITECTURES, SUPPORTED_MODELS)
REGISTRIES += (TOKENIZERS, FAMILIES, TARGETS, BENCHMARKS, MODES, PRESETS)
AUTO_CLASSES = (CONFIG_MAPPING, MODEL_MAPPING)
"""Where transformers keeps classes that are not its own: those of a plug-in's tower."""

EVERYTHING = ROOT / "tests" / "plugin_of_everything.py"


@pytest.fixture
def anew(monkeypatch):
    """A function that makes this process forget all plug-ins; the test leaves none behind."""
    kept = [dict(registry._entries) for registry in REGISTRIES]
    theirs = [dict(mapping._extra_content) for mapping in AUTO_CLASSES]

    def forget() -> None:
        PLUGINS.clear()
        for mapping, content in zip(AUTO_CLASSES, theirs, strict=True):
            mapping._extra_content = dict(content)
        for registry, entries in zip(REGISTRIES, kept, strict=True):
            registry._entries = dict(entries)

    yield forget
    forget()


@pytest.fixture
def mine(anew, tmp_path) -> Path:
    """The page's example as a file."""
    path = tmp_path / "mine.py"
    path.write_text(EXAMPLE)
    return path


def test_the_example_acts_in_commands(mine, capsys):
    assert main(["models", "--plugin", str(mine)]) == 0
    assert "my-llava" in capsys.readouterr().out
    assert conv_templates["mine"].system == "Answer in one word." and "normed_linear" in PROJECTORS
    assert load_plugin(mine) is PLUGINS["mine.py"], "it runs once"


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("mine.txt", "", "is no Python file"),
        ("nothing.py", None, "no such file"),
        ("bad.py", "import nothing_of_the_sort", "ModuleNotFoundError: No module named 'nothing_of_the_sort'"),
        ("half.py", "def f(:", "SyntaxError"),
        ("twice.py", "from moellava.conversation import *\nconv_templates.register('v1', 1)", "registered twice"),
    ],
)
def test_a_file_that_is_no_plug_in_is_named(name, code, words, anew, tmp_path, capsys):
    if code is not None:
        (tmp_path / name).write_text(code)
    assert main(["models", "--plugin", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert f"--plugin {tmp_path / name}" in said and words in said and not PLUGINS
    with pytest.raises(UserError, match=re.escape(words)):
        parse_arguments(words_of({"plugin": tmp_path / name, "output_dir": tmp_path}))


def test_two_files_of_one_name_are_refused(mine, tmp_path):
    load_plugin(mine)
    other = tmp_path / "other" / "mine.py"
    other.parent.mkdir()
    other.write_text("")
    with pytest.raises(UserError, match="another plug-in named mine.py has been loaded"):
        load_plugin(other)


@pytest.fixture
def folder(mine, parts, flags_for, tmp_path) -> Path:
    """Stage 2 with the example's template and projector."""
    own = {
        "plugin": mine,
        "version": "mine",
        "force_version": True,
        "image_projector_type": "normed_linear",
        "untrained_projector": True,
    }
    flags = flags_for(tmp_path, "finetune") | own | {"max_steps": 1, "save_strategy": "no"}
    return train_here(flags | {"pretrain_mm_mlp_adapter": None})


def test_a_folder_carries_its_plug_in_and_runs_it_for_those_who_say_so(folder, mine, anew, tmp_path, caplog):
    section = section_of(open_vlm(folder, device="cpu").model.config)
    assert section.plugins == ["mine.py"] and section.version == "mine"
    assert (folder / "mine.py").read_text() == EXAMPLE and "mine.py" in (folder / "README.md").read_text()

    anew()
    with pytest.raises(UserError, match=f"was made with the plug-in mine.py, which is code. Read {folder}/mine.py"):
        open_vlm(folder, device="cpu")
    assert main(["inspect", "--tokenizer", str(folder), "--conversation", "a", "b"]) == 2
    assert main(["verify", "--files", str(folder)]) == 0, "its digests cover the copy, and no code runs"
    assert not PLUGINS

    vlm = open_vlm(folder, device="cpu", trust_remote_code=True)
    vlm.save(tmp_path / "again")
    upcycle_folder(read_folder(folder, "--model-path"), tmp_path / "moe", MoESpec(num_experts=[2]), 2**30)
    for copy in ("again", "moe"):
        assert (tmp_path / copy / "mine.py").read_text() == EXAMPLE
        assert section_of(tiny.reopen(tmp_path / copy).model.config).plugins == ["mine.py"]

    anew()
    mine.write_text(EXAMPLE + "\n# changed\n")
    load_plugin(mine)
    again = open_vlm(folder, device="cpu")
    assert "is not the plug-in that" in caplog.text
    for name, value in vlm.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)


def test_the_plug_in_of_a_package_runs_without_a_flag(anew, tmp_path, monkeypatch, clip_tower, tiny_base, capsys):
    package = tmp_path / "my_package.py"
    package.write_text(EXAMPLE)
    monkeypatch.syspath_prepend(tmp_path)
    found = [EntryPoint("mine", "my_package", plugins.GROUP)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: found)
    assert main(["models"]) == 0 and "my-llava" in capsys.readouterr().out
    options = {"image_projector_type": "normed_linear"}
    tiny.compose_tiny(tiny_base("vicuna"), clip_tower, "mine", **options).save(tmp_path / "made")
    assert not list((tmp_path / "made").glob("*.py"))

    anew()
    monkeypatch.delitem(__import__("sys").modules, "my_package")
    assert tiny.reopen(tmp_path / "made").section.plugins == ["mine"]
    anew()
    found.clear()
    with pytest.raises(UserError, match="plug-in mine of a package that is not installed"):
        tiny.reopen(tmp_path / "made")
    monkeypatch.delitem(__import__("sys").modules, "my_package")
    package.write_text("1 / 0")
    found.append(EntryPoint("mine", "my_package", plugins.GROUP))
    assert main(["models"]) == 2
    assert "The plug-in mine of an installed package (my_package) ends in an error" in capsys.readouterr().err


@pytest.mark.slow
def test_in_another_process_the_copy_is_enough(folder, tmp_path):
    shutil.move(folder, tmp_path / "moved")
    code = "import sys\nfrom moellava.cli import main\nsys.exit(main(sys.argv[1:]))"
    words = ["chat", "--model-path", tmp_path / "moved", "--question", "hi", "--max-new-tokens", "2"]
    run_python(code, *words, "--plugin", tmp_path / "moved" / "mine.py")


def test_another_content_is_another_run(mine, anew, parts, flags_for, tmp_path):
    given = {"plugin": mine, "version": "mine", "force_version": True, "untrained_projector": True, "max_steps": 1}
    flags = flags_for(tmp_path, "finetune") | given | {"pretrain_mm_mlp_adapter": None, "save_strategy": "no"}
    train_here(flags)
    anew()
    mine.write_text(EXAMPLE.replace("one word", "two words"))
    with pytest.raises(UserError, match=r"content of --plugin mine\.py"):
        train_here(flags)


@pytest.fixture
def own_parts(parts, anew, tmp_path) -> dict[str, Path]:
    """The plug-in that adds one of each, a language model of its family with its tokenizer, and its tower."""
    plugin = tmp_path / "everything.py"
    shutil.copyfile(EVERYTHING, plugin)
    for name, model_type in (("lm", "my_llm"), ("tower", "my_tower")):
        shutil.copytree(parts / name, tmp_path / name)
        config = json.loads((parts / name / "config.json").read_text()) | {"model_type": model_type}
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"architectures": None}))
    (tmp_path / "lm" / "tokenizer.json").rename(tmp_path / "lm" / "mine.json")
    (tmp_path / "lm" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MyTokenizer"}))
    return {"plugin": plugin, "lm": tmp_path / "lm", "tower": tmp_path / "tower"}


@pytest.mark.slow
def test_one_of_each_is_added_by_a_file(own_parts, flags_for, tmp_path, capsys):
    """A template, tokenizer, family, tower, projector, released model, architecture, mode and preset of upcycling, a
    benchmark and an export target: each by its entry alone, and each acts in the command that reads it."""
    plugin = str(own_parts["plugin"])
    flags = flags_for(tmp_path, "finetune") | {"pretrain_mm_mlp_adapter": None, "untrained_projector": True}
    flags |= {"plugin": plugin, "model_name_or_path": own_parts["lm"], "image_tower": own_parts["tower"]}
    flags |= {"image_projector_type": "mine2x_gelu", "max_steps": 1, "save_strategy": "no", "version": None}
    trained = train_here(flags)
    vlm = open_vlm(trained, device="cpu")
    said, vision = vlm.section, vlm.model.config.vision_config
    assert (said.version, said.family, said.image_projector_type) == ("mine", "mine", "mine2x_gelu")
    assert vision.model_type == "my_tower" and "Answer in one word." in vlm.processor.chat_template
    train_here(
        {"plugin": plugin, "moe_enable": True, "model_name_or_path": trained, "output_dir": tmp_path / "moe"}
        | {"moe_mode": "last", "moe_preset": "mine", "max_steps": 1, "save_strategy": "no", "num_experts": 2}
        | {name: flags[name] for name in ("data_path", "image_folder", "report_to")}
    )
    sparse = tiny.reopen(tmp_path / "moe")
    assert sparse.spec.layers_of(4) == {3: 2} and sparse.spec.router_aux_loss_coef == 0.5
    words = ["--plugin", plugin, "--model-path", str(trained)]
    assert main(["eval", *words, "--benchmark", "mine"]) == 0 and "mine" in capsys.readouterr().out
    capsys.readouterr()
    assert main(["models", "--plugin", plugin]) == 0
    shown = capsys.readouterr().out
    assert "my-llava" in shown and "my-vip-llava" in shown
    words = ["--plugin", plugin, "--model-path", str(tmp_path / "moe"), "--output-dir", str(tmp_path / "out")]
    assert main(["export", *words, "--to", "my-moe", "--verify", "False"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["model_type"] == "qwen2_moe"
