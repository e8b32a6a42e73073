# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is as it was written, or refused by name; no code in it runs."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch

from moellava.errors import UserError
from moellava.train.checkpoint import chosen_checkpoint
from moellava.train.intact import DIGESTS, reading, require_intact, write_digests
from tests.processes import train_here

DAMAGE = {
    "lost": (lambda path: path.unlink(), "it has lost"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-7]), "has changed|is damaged"),
    "garbage": (lambda path: path.write_bytes(b"\x00garbage"), "has changed|is damaged"),
}


@pytest.fixture(scope="module")
def run(flags_for, tmp_path_factory):
    """(flags, folder) of a run of stage 1 with two checkpoints."""
    root = tmp_path_factory.mktemp("intact")
    short = {"max_steps": 2, "save_steps": 1, "skip_dry_save": True, "save_total_limit": 2}
    flags = flags_for(root, "pretrain") | short
    return flags, train_here(flags)


@pytest.fixture
def killed(run, tmp_path):
    """The same, as a kill behind its last checkpoint leaves it."""
    flags, folder = run
    shutil.copytree(folder, tmp_path / "run")
    state = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(state | {"finished": False}))
    return flags | {"output_dir": tmp_path / "run"}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_file_of_a_checkpoint_is_looked_at(damage, killed):
    """All of them, one by one: states of optimizer, schedule and random numbers among them."""
    spoil, words = DAMAGE[damage]
    folder = killed["output_dir"]
    checkpoint, older = folder / "checkpoint-2", [folder / "checkpoint-1"]
    names = [path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file()]
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {str(name) for name in names}
    require_intact(checkpoint, older)
    for name in names:
        content = (checkpoint / name).read_bytes()
        spoil(checkpoint / name)
        with pytest.raises(UserError, match=f"(?s){name}.*({words})|({words}).*{name}") as error:
            require_intact(checkpoint, older)
        assert f"remove the folder to go on from {older[0]}" in str(error.value)
        (checkpoint / name).write_bytes(content)


def test_a_damaged_checkpoint_stops_a_run_and_the_way_out_works(killed, run):
    folder = killed["output_dir"]
    (folder / "checkpoint-2/optimizer.pt").unlink()
    with pytest.raises(UserError, match="it has lost optimizer.pt"):
        train_here(killed)
    shutil.rmtree(folder / "checkpoint-2")
    train_here(killed)
    assert (folder / "model.safetensors").read_bytes() == (run[1] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"finished": true}', '{"identity": 1, "finished": false}'])
def test_garbage_in_run_json_is_named(content, killed):
    (killed["output_dir"] / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json"):
        train_here(killed)


def test_checkpoints_whose_run_is_unknown_are_not_taken(killed):
    for name in ("run.json", "config.json"):
        (killed["output_dir"] / name).unlink()
    with pytest.raises(UserError, match=r"holds checkpoints, but no run\.json"):
        train_here(killed)


class Planted:
    """What a pickle runs when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("scheduler.pt", "rng_state.pth")]


@pytest.mark.parametrize("name", ["optimizer.pt", *SLOW])
def test_code_in_a_checkpoint_does_not_run(name, killed, tmp_path):
    checkpoint = killed["output_dir"] / "checkpoint-1"
    shutil.rmtree(killed["output_dir"] / "checkpoint-2")
    torch.save({"state": Planted(tmp_path / "it-ran")}, checkpoint / name)
    write_digests(checkpoint)  # whoever plants code can write digests too
    with pytest.raises(UserError, match="it could run code"):
        train_here(killed)
    assert not (tmp_path / "it-ran").exists()


def test_whoever_reads_without_care_reads_with_care_inside(tmp_path):
    """DeepSpeed asks for `weights_only=False`."""
    torch.save({"state": Planted(tmp_path / "it-ran")}, tmp_path / "states.pt")
    with pytest.raises(UserError, match="it could run code"), reading(tmp_path, with_deepspeed=True):
        torch.load(tmp_path / "states.pt", weights_only=False)
    assert not (tmp_path / "it-ran").exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "states.pt", weights_only=True)


@pytest.mark.slow
def test_code_in_the_files_of_deepspeed_does_not_run(flags_for, run_train, tmp_path):
    """Each of its own files is read as it was written, and no more when code is in it."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    short = {"max_steps": 1, "save_steps": 1, "skip_dry_save": True}
    for stage in ("pretrain", "finetune"):
        train_here(flags_for(tmp_path, stage) | short)
    done = run_train(flags_for(tmp_path, "moe") | short | {"ep_size": 2}, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    files = sorted((tmp_path / "moe/checkpoint-1").rglob("*.pt"))
    for part in ("layer_0_expert_3_", "zero_pp_rank_1_", "mp_rank_00_model_states"):
        assert any(file.name.startswith(part) for file in files), part
    for file in files:
        with reading(file, with_deepspeed=True):
            assert TorchCheckpointEngine().load(str(file), map_location="cpu")
        torch.save({"module": Planted(tmp_path / "it-ran")}, file)
        with pytest.raises(UserError, match="it could run code"), reading(file, with_deepspeed=True):
            TorchCheckpointEngine().load(str(file), map_location="cpu")
    assert not (tmp_path / "it-ran").exists()


def test_resume_from_checkpoint_acts_or_is_refused(killed, tmp_path):
    folder = killed["output_dir"]
    assert chosen_checkpoint(folder, None) == chosen_checkpoint(folder, "True") == folder / "checkpoint-2"
    assert chosen_checkpoint(folder, str(folder / "checkpoint-1")) == folder / "checkpoint-1"
    assert chosen_checkpoint(tmp_path / "new", "false") is None
    for flag, place in [("nowhere", folder), (str(tmp_path), folder), ("False", folder), ("True", tmp_path / "new")]:
        with pytest.raises(UserError, match=f"--resume_from_checkpoint {flag}"):
            chosen_checkpoint(place, flag)
    with pytest.raises(UserError, match=r"--resume_from_checkpoint nowhere is no checkpoint .*checkpoint-1"):
        train_here(killed | {"resume_from_checkpoint": "nowhere"})


def test_digests_are_written_beside(run):
    assert (run[1] / "checkpoint-2" / DIGESTS).is_file()
