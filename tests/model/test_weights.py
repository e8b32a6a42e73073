# SPDX-License-Identifier: Apache-2.0
"""Reading weights: shards, damaged files, and pickles that hold code."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import save_file

from moellava.errors import UserError
from moellava.model.weights import read_file, read_tensors, weight_files
from tests.processes import run_python
from tests.tiny import compose_tiny, reopen


class Evil:
    """A pickle that would run code when it is opened without `weights_only`."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('ran code')",))


def test_shards_are_read_by_their_index(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(read_tensors(tmp_path)) == {"a", "b"}
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"names 2 shards, but two\.safetensors are missing"):
        weight_files(tmp_path)


def test_a_single_file_goes_before_shards_as_in_transformers(tmp_path):
    """Both are there where somebody saved anew into an old folder."""
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_files(tmp_path) == [tmp_path / "model-00001-of-00001.safetensors"]
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_safetensors_go_before_pickles(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert read_tensors(tmp_path)["a"].item() == 0
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert read_tensors(tmp_path)["a"].item() == 1


def test_an_old_pickle_is_read(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(3.0)}, path, _use_new_zipfile_serialization=False)
    assert dict(read_file(path))["a"].tolist() == [0.0, 1.0, 2.0]


def test_a_pickle_with_code_does_not_run(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": Evil()}, path)
    with pytest.raises(UserError, match="could run code"):
        dict(read_file(path))
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(UserError, match="could run code|damaged"):
        dict(read_file(path))
    torch.save([torch.zeros(1)], path)
    with pytest.raises(UserError, match="no plain dictionary of tensors"):
        dict(read_file(path))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_is_cut_off_is_named(tmp_path, name):
    path = tmp_path / name
    if name.endswith("bin"):
        torch.save({"a": torch.ones(1000)}, path)
    else:
        save_file({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(UserError, match=f"{name} is damaged or cut off"):
        read_tensors(tmp_path)


def test_a_folder_that_holds_nothing(tmp_path):
    with pytest.raises(UserError, match="holds no weights: neither model.safetensors nor pytorch_model.bin"):
        weight_files(tmp_path)


MEMORY = """
import logging, re, sys
from pathlib import Path

logging.disable(logging.WARNING)
import torch
from moellava.vlm import open_vlm


def peak() -> int:
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024


before = peak()
model = open_vlm(sys.argv[1], base=sys.argv[2], device="cpu", dtype=torch.float32).model
size = sum(parameter.nbytes for parameter in model.parameters())
assert size > 100e6, size
assert peak() - before < 0.5 * size, (peak() - before, size)
"""


@pytest.mark.slow
def test_a_checkpoint_is_mapped_and_not_copied(checkpoints, tokenizer_folder, tmp_path):
    """Opening a pickle of 100 MB takes less than half of that in memory: its pages are read when they are used. (With a
    tokenizer, whose image token finds a row that is free: without one, the table would grow, and be copied.)"""
    folder = tmp_path / "family" / "big"
    folder.mkdir(parents=True)
    shutil.copytree(checkpoints / "openai", tmp_path / "openai")
    raw = json.loads((checkpoints / "llama" / "dense" / "config.json").read_text()) | {"vocab_size": 220_000}
    state = torch.load(checkpoints / "llama" / "dense" / "pytorch_model.bin", weights_only=True)
    state |= {name: torch.zeros(220_000, 64) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(raw))
    run_python(MEMORY, folder, tokenizer_folder, fresh=True)


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (lambda raw: raw.pop("text_config"), "hidden_size is 4096, but no tensor is that wide"),
        (lambda raw: raw["text_config"].update(num_hidden_layers=10**9), "1000000000 layers, but there are"),
        (lambda raw: raw["vision_config"].update(num_hidden_layers=10**9), "1000000000 layers, but there are"),
    ],
)
def test_a_config_without_its_sizes_takes_no_memory(lost, words, make_base, clip_tower, tmp_path):
    """A folder without digests: what its class's defaults would be is 7 billion parameters, drawn at random."""
    compose_tiny(make_base("llama").folder, clip_tower, "v1").save(tmp_path / "folder")
    (tmp_path / "folder" / "digests.json").unlink()
    raw = json.loads((tmp_path / "folder" / "config.json").read_text())
    lost(raw)
    (tmp_path / "folder" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=f"config.json does not describe the weights beside it .*{words}"):
        reopen(tmp_path / "folder")


@pytest.mark.parametrize("count", [10**9, [2, 10**300]])
def test_more_experts_than_tensors_take_no_memory(count, checkpoints, tokenizer_folder, tmp_path):
    folder = shutil.copytree(checkpoints, tmp_path / "published") / "llama" / "moe_sparse"
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    raw = json.loads((folder / "config.json").read_text())
    raw["moe"]["num_experts"] = count
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="experts, but there are"):
        reopen(folder)
