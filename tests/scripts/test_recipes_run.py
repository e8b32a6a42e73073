# SPDX-License-Identifier: Apache-2.0
"""Every stage script trains for two steps on tiny models, each stage from the folder of the one before.

The flags are the scripts' own but for sizes and paths, which environment variables set. Phi-2's third script runs as a
user would start it, `deepspeed` launcher and two processes included. The others run without DeepSpeed in one process,
because twenty launches would take most of CI's time; the launcher with all stages is tested in tests/train.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from moellava.moe import moe_layers
from moellava.serve.answer import Request, answer
from tests.model.tiny_language_models import CHATML, tiny_language_model
from tests.processes import ROOT, free_port, run, stage_command
from tests.tiny import record, reopen

TEMPLATES = {"vicuna": "v1", "qwen": "qwen", "phi2": "phi", "stablelm": "stablelm", "openchat": "openchat"}
CHAT_BASES = {"gemma3": "gemma3_text", "smollm": "llama"}
"""Folder of scripts/v1 -> `model_type` of a language model whose tokenizer brings its template along."""
TEMPLATES |= dict.fromkeys(CHAT_BASES, "chat_template")
STAGES = {"pretrain": "pretrain", "finetune": "finetune", "finetune_moe": "moe"}
"""script -> what the folder says its stage is."""


@pytest.fixture(scope="session")
def records(tmp_path_factory, pictures) -> dict[str, Path]:
    """script -> its data: captions for stage 1; for the others conversations, one of them without an image."""
    folder = tmp_path_factory.mktemp("records")
    shown = [(str(number), path.name) for number, path in enumerate(pictures)]
    captions = [record(name, "<image>", f"a picture of colour {name}", image=image) for name, image in shown]
    chats = [record(name, "<image>\nwhich colour?", f"number {name}", image=image) for name, image in shown]
    chats.append(record("3", "no picture here?", "none"))
    (folder / "captions.json").write_text(json.dumps(captions * 3))
    (folder / "chats.jsonl").write_text("\n".join(json.dumps(chat) for chat in chats * 2))
    return {
        "pretrain": folder / "captions.json",
        "finetune": folder / "chats.jsonl",
        "finetune_moe": folder / "chats.jsonl",
    }


@pytest.fixture(scope="module")
def tiny_environment(tiny_base, tokenizer_folder, clip_tower, pictures, tmp_path_factory):
    """family -> the variables that make its recipe tiny; its stages' folders lie in OUTPUT_ROOT."""

    def base(family: str) -> Path:
        if family not in CHAT_BASES:
            return tiny_base(family)
        return chat_base(family, tokenizer_folder, tmp_path_factory.mktemp("base") / family)

    def settings(family: str) -> dict[str, str]:
        return {
            "MODEL": str(base(family)),
            "TOWER": str(clip_tower),
            "IMAGE_FOLDER": str(pictures[0].parent),
            "OUTPUT_ROOT": str(tmp_path_factory.mktemp(family)),
            "BATCH": "2",
            "ACCUMULATION": "1",
            "MAX_LENGTH": "128",
            "WORKERS": "0",
            "REPORT_TO": "none",
        }

    return settings


def chat_base(family: str, tokenizer_folder: Path, folder: Path) -> Path:
    """A tiny language model of four layers without an entry of ours, and a tokenizer with a chat template."""
    if not folder.exists():
        tiny_language_model(CHAT_BASES[family], num_hidden_layers=4).save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
        tokenizer.chat_template = CHATML
        tokenizer.save_pretrained(folder)
    return folder


def check_folders(root: Path, family: str, pictures: list[Path]) -> None:
    """Each stage's folder says what it is, two steps were logged, and the last one's model answers."""
    for script, stage in STAGES.items():
        (folder,) = root.glob(f"*-{script.removeprefix('finetune_')}")
        config = json.loads((folder / "config.json").read_text())
        assert config["moellava"]["stage"] == stage
        assert config["moellava"]["version"] == ("plain" if script == "pretrain" else TEMPLATES[family])
        assert ("moe" in config) == (stage == "moe")
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        assert [entry["step"] for entry in history if "ce" in entry] == [1, 2]
        assert all(0 < entry["ce"] < 20 for entry in history if "ce" in entry)
    (last,) = root.glob("*-moe")
    vlm = reopen(last)
    assert [index for index, _ in moe_layers(vlm.model)] == [0, 2]
    requests = [Request("which colour?", [pictures[0]]), Request("hello")]
    assert len(answer(vlm, requests, max_new_tokens=2)) == 2


def run_together(commands: list[list[str]]) -> None:
    """Runs what follows train.py in each command, one after the other in one Python process."""
    flags = [command[command.index(str(ROOT / "train.py")) + 1 :] for command in commands]
    runner = [sys.executable, str(Path(__file__).with_name("run_stages.py"))]
    done = run(runner, input="\n".join(json.dumps(words) for words in flags))
    assert done.returncode == 0, done.stderr[-4000:]


def run_script(script: Path, *flags: str, **variables: str) -> None:
    """Starts a script as a user would."""
    done = run(["bash", str(script), *flags], env=variables)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


LAUNCHED = ("phi2", "finetune_moe")
"""The script that runs as a user would start it."""


@pytest.fixture(scope="module")
def trained(tiny_environment, records) -> dict[str, Path]:
    """family -> the root of its stages' folders."""
    settings = {family: tiny_environment(family) for family in TEMPLATES}
    alone = {"LAUNCHER": "python", "ZERO": "none"}
    scripts = {
        (family, script): ROOT / "scripts" / "v1" / family / f"{script}.sh" for family in settings for script in STAGES
    }
    data = {script: {"DATA": str(path)} for script, path in records.items()}
    run_together(
        [
            stage_command(path, "--max_steps", "2", **settings[family], **data[script], **alone)
            for (family, script), path in scripts.items()
            if (family, script) != LAUNCHED
        ]
    )
    family, script = LAUNCHED
    port = f"--master_port {free_port()}"
    run_script(scripts[LAUNCHED], "--max_steps", "2", LAUNCHER_FLAGS=port, **settings[family], **data[script])
    return {family: Path(values["OUTPUT_ROOT"]) for family, values in settings.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", TEMPLATES)
def test_every_script_trains(family, trained, pictures):
    check_folders(trained[family], family, pictures)
