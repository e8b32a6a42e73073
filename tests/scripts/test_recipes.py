# SPDX-License-Identifier: Apache-2.0
"""Every shipped script, recipe and JSON parses, says what it promises, and can be overridden."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from moellava import recipes
from moellava.cli import main
from moellava.commands.recipe import text_of
from moellava.constants import CHAT_TEMPLATE
from moellava.conversation import conv_templates
from moellava.errors import UserError
from moellava.recipes import BASES
from moellava.train.arguments import given_flags, parse_arguments
from tests.processes import ROOT, stage_command

RECIPES = ROOT / "scripts" / "v1"
FAMILIES = {"vicuna": "v1", "qwen": "qwen", "phi2": "phi", "stablelm": "stablelm", "openchat": "openchat"}
FAMILIES |= dict.fromkeys(("qwen3", "llama3", "gemma3", "phi4", "smollm"), CHAT_TEMPLATE)
STAGES = ("pretrain", "finetune", "finetune_moe")
SCRIPTS = [RECIPES / family / f"{stage}.sh" for family in FAMILIES for stage in STAGES]


def flags_of(command: list[str]) -> list[str]:
    """What stands after train.py."""
    return command[command.index(str(ROOT / "train.py")) + 1 :]


def test_no_script_is_missing_or_untested():
    assert sorted(RECIPES.glob("*/*.sh")) == sorted([*SCRIPTS, *(RECIPES / "eval").glob("*.sh")])
    assert set(FAMILIES) == set(BASES) and set(STAGES) == set(recipes.STAGES)


@pytest.mark.parametrize("script", sorted(ROOT.glob("scripts/**/*.sh")) + [ROOT / ".ci" / "run"], ids=str)
def test_bash_reads_it(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_flags_are_accepted_and_are_the_references(script):
    command = stage_command(script)
    assert command[:3] == ["deepspeed", "--num_accelerators", "2"]
    model, data, moe, training = parse_arguments(flags_of(command))
    stage, template = script.stem, FAMILIES[script.parent.name]
    assert model.version == ("plain" if stage == "pretrain" else template)
    assert model.version in (*conv_templates, CHAT_TEMPLATE)
    assert model.tune_mm_mlp_adapter == (stage == "pretrain")
    assert moe.moe_enable == (stage == "finetune_moe")
    batch, accumulation, rate = (32, 1, 1e-3) if stage == "pretrain" else (8, 2, 2e-5)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (batch, accumulation)
    assert (training.learning_rate, training.weight_decay, training.warmup_steps) == (rate, 0, 0.03)
    assert training.lr_scheduler_type == "cosine"
    assert training.model_max_length == 2048
    if stage != "finetune_moe":
        assert model.image_tower == ["openai/clip-vit-large-patch14-336"]
        assert model.mm_vision_select_layer == -2
    else:
        assert (moe.num_experts, moe.top_k_experts, moe.capacity_factor, moe.moe_mode) == ([4], 2, 1.5, "sparse")
    assert all(path.endswith(".json") for path in data.data_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_stage_takes_the_folder_of_the_one_before(family):
    first, second, third = (
        parse_arguments(flags_of(stage_command(RECIPES / family / f"{stage}.sh"))) for stage in STAGES
    )
    assert second[0].pretrain_mm_mlp_adapter == first[3].output_dir
    assert third[0].model_name_or_path == second[3].output_dir
    assert second[0].model_name_or_path == first[0].model_name_or_path


OVERRIDES = {
    "MODEL": ("lm", "--model_name_or_path"),
    "TOWER": ("tower", "--image_tower"),
    "PROJECTOR": ("linear", "--image_projector_type"),
    "SELECT_LAYER": ("-1", "--mm_vision_select_layer"),
    "IMAGE_FOLDER": ("pictures", "--image_folder"),
    "DATA": ("a.json b.jsonl", "--data_path"),
    "PRETRAIN_DIR": ("stage1", "--pretrain_mm_mlp_adapter"),
    "OUTPUT": ("out", "--output_dir"),
    "EPOCHS": ("3", "--num_train_epochs"),
    "BATCH": ("2", "--per_device_train_batch_size"),
    "ACCUMULATION": ("4", "--gradient_accumulation_steps"),
    "LR": ("1e-4", "--learning_rate"),
    "WEIGHT_DECAY": ("0.1", "--weight_decay"),
    "WARMUP": ("0.1", "--warmup_ratio"),
    "SCHEDULER": ("linear", "--lr_scheduler_type"),
    "MAX_LENGTH": ("64", "--model_max_length"),
    "CHECKPOINTING": ("False", "--gradient_checkpointing"),
    "SAVE_STEPS": ("7", "--save_steps"),
    "SAVE_TOTAL_LIMIT": ("2", "--save_total_limit"),
    "LOGGING_STEPS": ("5", "--logging_steps"),
    "WORKERS": ("0", "--dataloader_num_workers"),
    "REPORT_TO": ("none", "--report_to"),
    "SEED": ("1", "--seed"),
    "ASPECT": ("square", "--image_aspect_ratio"),
    "ZERO": ("zero3.json", "--deepspeed"),
}
MOE_OVERRIDES = {
    "FINETUNE_DIR": ("stage2", "--model_name_or_path"),
    "MOE_MODE": ("dense", "--moe_mode"),
    "NUM_EXPERTS": ("2 4", "--num_experts"),
    "TOP_K": ("1", "--top_k_experts"),
    "CAPACITY": ("2.0", "--capacity_factor"),
    "USE_RESIDUAL": ("True", "--use_residual"),
    "AUX_COEF": ("0.1", "--router_aux_loss_coef"),
    "EP_SIZE": ("2", "--ep_size"),
}


def values_of(flags: list[str], name: str) -> str:
    """The words after the flag `name`, joined by spaces."""
    start = flags.index(name) + 1
    end = next((at for at in range(start, len(flags)) if flags[at].startswith("--")), len(flags))
    return " ".join(flags[start:end])


@pytest.mark.parametrize(("stage", "overrides"), [("finetune", OVERRIDES), ("finetune_moe", MOE_OVERRIDES)])
def test_environment_variables_reach_the_command(stage, overrides):
    environment = {variable: value for variable, (value, _) in overrides.items()}
    flags = flags_of(stage_command(RECIPES / "qwen" / f"{stage}.sh", **environment))
    assert {flag: values_of(flags, flag) for _, flag in overrides.values()} == {
        flag: value for value, flag in overrides.values()
    }


class Noting(dict):
    """Variables, none of them set, that note which are read."""

    def __init__(self):
        super().__init__()
        self.read = set()

    def get(self, key, default=None):
        self.read.add(key)
        return default


def test_every_variable_of_the_recipe_is_tested():
    noting = Noting()
    for stage in STAGES:
        recipes.flags_of("qwen", stage, noting)
    text = (RECIPES / "recipe.sh").read_text()
    of_the_shell = {"BASH_SOURCE", "DS_ACCELERATOR", "PYTHONPATH"}
    read = noting.read | (set(re.findall(r"\$\{([A-Z_]+)[:+-]", text)) - of_the_shell)
    elsewhere = {"JSON_FOLDER", "OUTPUT_ROOT", "NPROC", "LAUNCHER", "LAUNCHER_FLAGS", "PRECISION", "DRY_RUN"}
    elsewhere |= {"NAME", "VERSION"}
    assert read == (set(OVERRIDES) | set(MOE_OVERRIDES) | elsewhere)


def test_launcher_precision_and_folders():
    script = RECIPES / "vicuna" / "finetune.sh"
    command = stage_command(script, NPROC="1", LAUNCHER_FLAGS="--master_port 29999", PRECISION="bf16")
    assert command[:5] == ["deepspeed", "--num_accelerators", "1", "--master_port", "29999"]
    assert parse_arguments(flags_of(command))[3].bf16
    alone = stage_command(script, LAUNCHER="python", ZERO="none", JSON_FOLDER="/d", OUTPUT_ROOT="/o")
    assert alone[:2] == ["python", str(ROOT / "train.py")]
    _, data, _, training = parse_arguments(flags_of(alone))
    assert training.deepspeed is None
    assert {Path(path).parent for path in data.data_path} == {Path("/d")}
    assert Path(training.output_dir).parent == Path("/o")


def test_an_empty_capacity_means_dropless():
    flags = flags_of(stage_command(RECIPES / "phi2" / "finetune_moe.sh", CAPACITY=""))
    assert parse_arguments(flags)[2].capacity_factor is None


def test_flags_after_the_script_win():
    flags = flags_of(stage_command(RECIPES / "phi2" / "pretrain.sh", "--learning_rate", "0.5", "--max_steps", "2"))
    training = parse_arguments(flags)[3]
    assert (training.learning_rate, training.max_steps) == (0.5, 2)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload", "zero3"])
def test_zero_files_leave_sizes_to_the_flags(name):
    settings = json.loads((ROOT / "scripts" / f"{name}.json").read_text())
    assert settings["zero_optimization"]["stage"] == int(name[4])
    assert settings["train_micro_batch_size_per_gpu"] == settings["gradient_accumulation_steps"] == "auto"
    # An optimizer from here would merge the parameter groups that MoE layers and the projector's rate need.
    assert "optimizer" not in settings


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_recipe_is_a_run_file_of_the_same_flags_as_its_script(base, stage, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text_of(base, stage, path.name))
    parse_arguments([str(path)])
    flags = recipes.flags_of(base, stage)
    assert given_flags([str(path)]) == given_flags(recipes.words_of(flags))
    assert flags["deepspeed"] == "zero2" and flags["bf16"] is True
    assert f"moellava train {path.name}" in path.read_text() and BASES[base].about in path.read_text()


def test_the_command_lists_prints_and_writes_and_overwrites_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipe"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*BASES, *STAGES))
    assert main(["recipe", "qwen3", "pretrain", "--print"]) == 0
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir()) and "model_name_or_path: Qwen/Qwen3-0.6B" in printed
    assert main(["recipe", "qwen3", "pretrain"]) == 0
    assert (tmp_path / "qwen3-pretrain.yaml").read_text() == printed
    assert main(["recipe", "qwen3", "pretrain"]) == 2
    assert "exists: it may have been edited" in capsys.readouterr().err
    assert main(["recipe", "qwen33", "pretrain"]) == 2
    assert "Did you mean 'qwen3'?" in capsys.readouterr().err
    assert main(["recipe", "qwen3"]) == 2
    with pytest.raises(UserError, match="Unknown stage 'moe'"):
        recipes.flags_of("qwen3", "moe")
