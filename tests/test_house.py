# SPDX-License-Identifier: Apache-2.0
"""One house: every command takes every model, or says why not; and one folder is prompted the same everywhere.

`TABLE` says what each command does with each folder: 'works', or words of its refusal. Where training is refused or
starts from a sparse folder, the flags that go with the folder are given (`TRAIN`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from moellava.cli import main
from moellava.constants import IGNORE_INDEX
from moellava.convert.export.llava import write_published
from moellava.data.dataset import SupervisedDataset
from moellava.data.media import MediaFiles
from moellava.data.records import load_records
from moellava.serve import answer as answering
from moellava.serve.api import scheduler as scheduling
from moellava.serve.prompt import Request
from moellava.vlm import open_vlm
from tests import tiny
from tests.conftest import COMMON
from tests.lmm.tiny import TINY
from tests.processes import Flags, train_here
from tests.serve.api.serving import asking, serving

QUESTION, ANSWER = "what colour is it?", "a red circle"

COMPOSED = ("stage 1", "stage 2", "stage 3", "published dense", "published MoE")
RELEASED = ("llava-1.5", "qwen2-vl", "smolvlm")
FOLDERS = (*COMPOSED, *RELEASED)
SPARSE = ("stage 3", "published MoE")
HEAVY = ("qwen2-vl",)
"""Folders whose vocabulary takes time."""

NO_GOLDEN = "holds no golden.safetensors"
SPARSE_ALREADY = "is sparse already"
OWN_LAYOUT = "which LLaVA's layout does not hold"

LOOK = ("check-data", "inspect", "verify")
ASK = ("chat", "eval", "answer", "serve")
COMMANDS = ("train", *LOOK, *ASK, "routing", "upcycle", "prune", "merge-lora", "export", "export to llava")

REFUSED: dict[str, dict[str, str]] = {
    "upcycle": dict.fromkeys(SPARSE, SPARSE_ALREADY),
    "prune": dict.fromkeys([name for name in FOLDERS if name not in SPARSE], "it has no experts that could go"),
    "routing": dict.fromkeys([name for name in FOLDERS if name not in SPARSE], "is dense"),
    "verify": dict.fromkeys([name for name in FOLDERS if not name.startswith("published")], NO_GOLDEN),
    "export": {"published MoE": "drops tokens"},
    "export to llava": dict.fromkeys(RELEASED, OWN_LAYOUT),
}
"""Command -> folder -> words of the refusal. What is not here works."""

LORA = {"lora_enable": True, "lora_r": 4, "only_lora_ffn": False}
MOE = {"moe_enable": True, "only_lora_ffn": True}


@pytest.fixture(scope="module")
def folder_of(
    tmp_path_factory, parts, flags_for, golden_tokenizers, small_tokenizers, checkpoints
) -> Callable[[str], Path]:
    """name of `FOLDERS` -> such a folder."""
    root = tmp_path_factory.mktemp("house")
    stages = {"stage 1": "pretrain", "stage 2": "finetune", "stage 3": "moe"}

    def published(name: str, layout: str) -> Path:
        """What the reference wrote, with a tokenizer beside it, as released folders have one."""
        shutil.copytree(checkpoints / "phi" / layout, root / name)
        shutil.copytree(golden_tokenizers / "phi", root / name, dirs_exist_ok=True)
        shutil.copytree(checkpoints / "openai", root / "openai", dirs_exist_ok=True)
        return root / name

    @cache
    def make(name: str) -> Path:
        if name in stages:
            for before in FOLDERS[: FOLDERS.index(name)]:
                make(before)
            return train_here(flags_for(root, stages[name]) | {"max_steps": 2, "save_strategy": "no"})
        if name in RELEASED:
            TINY[name].save(small_tokenizers, root / name)
            return root / name
        return published(name.replace(" ", "-"), "dense" if name == "published dense" else "moe_sparse")

    return make


@pytest.fixture(scope="module")
def data(tmp_path_factory, pictures) -> Path:
    """One record about one picture."""
    path = tmp_path_factory.mktemp("data") / "data.json"
    path.write_text(json.dumps([tiny.record("one", f"<image>\n{QUESTION}", ANSWER, image=pictures[0].name)]))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, folder_of, data, pictures) -> Callable[[str], Path]:
    """name of `FOLDERS` -> the folder of a run with adapters that started from it."""
    root = tmp_path_factory.mktemp("trained")

    @cache
    def run(name: str) -> Path:
        flags: Flags = {key: COMMON[key] for key in ("learning_rate", "model_max_length", "report_to")}
        flags |= {"max_steps": 1, "per_device_train_batch_size": 1, "save_strategy": "no", **LORA}
        flags |= {"data_path": data, "image_folder": pictures[0].parent, "output_dir": root / name.replace(" ", "-")}
        start = {"model_local_path" if name in RELEASED else "model_name_or_path": folder_of(name)}
        return train_here(flags | start | (MOE if name in SPARSE else {}))

    return run


@pytest.fixture
def run_command(folder_of, trained, data, pictures, tmp_path, capsys) -> Callable[[str, str], tuple[int, str]]:
    """(command, folder) -> exit status, and what was printed."""

    def run(command: str, name: str) -> tuple[int, str]:
        folder, picture = folder_of(name), pictures[0]
        model, out = ["--model-path", str(folder)], ["--output-dir", str(tmp_path / "out")]
        images = ["--image-folder", str(picture.parent)]
        if command == "train":
            return 0, str(trained(name))
        if command == "answer":
            said = answering.answer(
                open_vlm(folder, device="cpu"), [Request(QUESTION, [picture])] * 2, max_new_tokens=2
            )
            return int(len(said) != 2), ""
        if command == "serve":
            with serving(open_vlm(folder, device="cpu")) as server:
                status, reply = server.send(body=asking(QUESTION, picture, max_tokens=2))
            return int(status != 200), str(reply)
        words = {
            "check-data": [str(data), *model, *images],
            "inspect": [str(data), *model, *images],
            "chat": [*model, "--image-file", str(picture), "--question", QUESTION, "--max-new-tokens", "2"],
            "eval": [*model, "--limit", "2", "--batch-size", "2"],
            "routing": [*model, "--data", str(data), *images, "--output", str(tmp_path / "out")],
            "upcycle": [*model, *out, "--num_experts", "2", "--moe_mode", "sparse"],
            "prune": [*model, *out, "--data", str(data), *images, "--keep", "2"],
            "merge-lora": [*model, *out, "--adapter", str(trained(name) / "adapter")],
            "verify": [str(folder)],
            "export": [*model, *out, "--verify", "False"],  # tests/convert/test_export_targets.py compares
            "export to llava": [*model, *out, "--to", "llava"],
        }[command]
        status = main([command.split()[0], *words])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def cells() -> list[Any]:
    """Every command with every folder."""
    return [
        pytest.param(command, name, marks=[pytest.mark.slow] if name in HEAVY else [], id=f"{command}-{name}")
        for name in FOLDERS
        for command in COMMANDS
    ]


@pytest.mark.parametrize(("command", "name"), cells())
def test_every_command_takes_every_folder_or_says_why_not(command, name, run_command):
    refusal = REFUSED.get(command, {}).get(name)
    status, said = run_command(command, name)
    if refusal is None:
        assert status == 0, said
    else:
        assert status == 2 and refusal in said, said


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in HEAVY else []) for n in FOLDERS])
def test_one_folder_is_prompted_the_same_everywhere(name, folder_of, data, pictures, monkeypatch):
    """Training, chat, evaluation, the server and Python read the same ids in front of an answer; inspect shows them."""
    vlm = open_vlm(folder_of(name), device="cpu", dtype=torch.float32)
    picture = pictures[0]
    dataset = SupervisedDataset(load_records(data), vlm.encoder, MediaFiles(picture.parent))
    batch = vlm.collator()([dataset[0]])
    end = int((batch["labels"][0] != IGNORE_INDEX).nonzero()[0])
    trained_on = batch["input_ids"][0, :end].tolist()

    asked: dict[str, list[int]] = {}

    def note(who: str) -> Callable[..., Any]:
        def generate(model: Any, batch: Any, *_: Any, **__: Any) -> Any:
            asked[who] = batch["input_ids"][0].tolist()
            return iter(()) if who == "chat" else [[] for _ in batch["input_ids"]]

        return generate

    monkeypatch.setattr(answering, "generate", note("answer"))
    answering.answer(vlm, [Request(QUESTION, [picture])])
    monkeypatch.setattr(answering, "stream_row", note("chat"))
    folder = ["--model-path", str(folder_of(name))]
    assert main(["chat", *folder, "--image-file", str(picture), "--question", QUESTION]) == 0
    monkeypatch.setattr(answering, "generate", note("eval"))
    monkeypatch.setattr("moellava.eval.easy_vqa.test_questions", lambda: one_question(picture))
    assert main(["eval", *folder]) == 0
    monkeypatch.setattr(scheduling, "generate", note("serve"))
    with serving(vlm) as server:
        assert server.send(body=asking(QUESTION, picture))[0] == 200
    assert asked == dict.fromkeys(("answer", "chat", "eval", "serve"), trained_on)
    shown = vlm.encoder.encode(Request(QUESTION, [picture]).record, opens=True)
    assert dataset[0]["input_ids"][: len(shown.ids)].tolist() == shown.ids


def one_question(picture: Path) -> list[Any]:
    """A benchmark of the record's question."""
    from moellava.eval.benchmarks import Question

    return [Question(QUESTION, ANSWER, picture, "color")]


def test_a_folder_written_again_is_the_same_model(folder_of, tmp_path):
    """Published -> ours -> published: the layout loses nothing."""
    vlm = open_vlm(folder_of("published MoE"), device="cpu", dtype=torch.float32)
    write_published(vlm, tmp_path / "again")
    shutil.copytree(folder_of("published MoE").parent / "openai", tmp_path / "openai")
    again = open_vlm(tmp_path / "again", device="cpu", dtype=torch.float32)
    state = again.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in vlm.model.state_dict().items())
