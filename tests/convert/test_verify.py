# SPDX-License-Identifier: Apache-2.0
"""`moellava verify` on what the reference implementation wrote and computed."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moellava.cli import main
from moellava.convert.export.llava import write_published
from moellava.convert.verify import recompute, verify
from moellava.errors import UserError
from moellava.moe import MoESpec, expert_parameters, router_parameters, upcycle
from tests.tiny import compose_tiny

DENSE = ["llama/dense", "phi/dense", "qwen/dense", "stablelm/dense"]
MOE = ["llama/moe_sparse", "llama/moe_custom", "phi/moe_sparse", "phi/moe_residual"]


INPUTS = {"input_ids", "attention_mask", "labels", "images"}


@pytest.mark.parametrize("name", DENSE + MOE)
def test_goldens_are_reproduced(name, checkpoints):
    """Every tensor of every golden file, from the folder alone."""
    folder = checkpoints / name
    result = verify(folder)
    wanted = {"logits", "loss"} | ({"moe_loss", "moe_loss_list"} if name in MOE else set())
    assert set(result) == wanted == set(load_file(folder / "golden.safetensors")) - INPUTS
    assert max(result.values()) < 5e-6


@pytest.fixture
def copied(checkpoints, tmp_path):
    """name -> a copy of a golden folder, with the tower beside it."""

    def copy(name: str):
        shutil.copytree(checkpoints / name, tmp_path / "copy")
        shutil.copytree(checkpoints / "openai", tmp_path / "openai")
        return tmp_path / "copy"

    return copy


def test_exit_status(checkpoints, tmp_path, capsys):
    assert main(["verify", str(checkpoints / "llama/moe_sparse")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("moe_loss ") and line.endswith("ok") for line in lines)
    assert main(["verify", str(checkpoints / "qwen/dense"), "--atol", "1e-9"]) == 1
    assert "above 1e-09" in capsys.readouterr().out
    assert main(["verify", str(tmp_path)]) == 2
    assert "holds no golden.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["logits", "loss", "moe_loss", "moe_loss_list"])
def test_a_tensor_that_differs_fails(name, copied):
    folder = copied("phi/moe_sparse")
    golden = load_file(folder / "golden.safetensors")
    golden[name].view(-1)[0] += 1e-3
    save_file(golden, folder / "golden.safetensors")
    assert main(["verify", str(folder)]) == 1


def test_weights_that_are_no_numbers_fail(copied):
    folder = copied("phi/dense")
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    state["lm_head.weight"][7] = float("nan")
    torch.save(state, folder / "pytorch_model.bin")
    assert main(["verify", str(folder)]) == 1


@pytest.mark.parametrize(("name", "strange"), [("phi/dense", "moe_loss"), ("phi/moe_sparse", "upcycled_logits")])
def test_a_tensor_that_does_not_follow_from_the_folder_is_named_and_never_passes(name, strange, copied, capsys):
    folder = copied(name)
    golden = load_file(folder / "golden.safetensors")
    save_file({**golden, strange: golden["logits"].clone()}, folder / "golden.safetensors")
    result = verify(folder)
    reason = result.pop(strange)
    assert reason.startswith("not computed: ") and reason.endswith(", ".join(sorted(result)))
    assert main(["verify", str(folder)]) == 3
    assert f"{strange:16} -           {reason}" in capsys.readouterr().out
    save_file({**golden, strange: golden["logits"] * 1, "loss": golden["loss"] + 1}, folder / "golden.safetensors")
    assert main(["verify", str(folder)]) == 1


def test_a_golden_file_that_says_too_little(copied):
    folder = copied("phi/dense")
    golden = load_file(folder / "golden.safetensors")
    save_file({name: golden[name] for name in INPUTS}, folder / "golden.safetensors")
    with pytest.raises(UserError, match="nothing to compare"):
        verify(folder)
    save_file({"logits": golden["logits"]}, folder / "golden.safetensors")
    with pytest.raises(UserError, match="lacks its inputs input_ids"):
        verify(folder)


OTHER_SPARSE = {
    "sparse": {"moe_mode": "sparse", "num_experts": [2, 4]},
    "residual": {"moe_mode": "second_half", "num_experts": [4], "use_residual": True},
    "custom": {"moe_layers_idx": [0, 3], "num_experts": [4], "top_k_experts": 1, "second_expert": "top"},
}


@pytest.mark.parametrize(
    ("name", "routing"),
    [
        ("mistral", "sparse"),
        ("qwen", "sparse"),
        ("qwen", "residual"),
        ("qwen2", "custom"),
        ("stablelm", "residual"),
        ("minicpm", "custom"),
    ],
)
def test_published_folders_of_other_families(name, routing, make_base, clip_tower, tmp_path):
    """What the model in memory computes, its experts moved apart, is what its folder in the published layout gives."""
    made = compose_tiny(make_base(name).folder, clip_tower, "plain")
    model = made.model
    upcycle(model, MoESpec.from_preset("moe-llava", **OTHER_SPARSE[routing]))
    golden, words = random_inputs(), model.config.text_config.vocab_size
    with torch.no_grad():
        before = recompute(model, golden, words)[0]
        for parameter in [*expert_parameters(model), *router_parameters(model)]:
            parameter += 0.05 * torch.randn_like(parameter)
        after = recompute(model, golden, words)[0]
    assert (after["logits"] - before["logits"]).abs().max() > 1e-4
    write_published(dataclasses.replace(made, tokenizer=None), tmp_path)
    golden |= {name: tensor.contiguous() for name, tensor in after.items()}
    save_file(golden, tmp_path / "golden.safetensors")
    assert max(verify(tmp_path).values()) < 1e-5
    assert main(["verify", str(tmp_path)]) == 0


def random_inputs() -> dict[str, torch.Tensor]:
    """A sample with an image and a shorter one without, for the towers of the tests."""
    torch.manual_seed(0)
    return {
        "input_ids": torch.tensor([[1, -200, 5, 6], [2, 7, 8, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, -100, 5, 6], [-100, 7, 8, -100]]),
        "images": torch.randn(2, 3, 28, 28),
    }


def test_folders_of_ours_verify_too(make_base, clip_tower, tmp_path):
    made = compose_tiny(make_base("mistral").folder, clip_tower, "plain")
    spec = MoESpec(num_experts=[4], moe_mode="sparse")
    upcycle(made.model, spec)
    made.sparse(spec)
    made.save(tmp_path)
    golden = random_inputs()
    with torch.no_grad():
        tensors, mask = recompute(made.model, golden, made.model.config.text_config.vocab_size)
    assert mask.sum(1).tolist() == [7, 3]
    save_file(golden | {name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "golden.safetensors")
    assert max(verify(tmp_path).values()) == 0
