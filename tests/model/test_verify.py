"""`moellava verify` on what the reference implementation wrote and computed."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moellava.cli import main
from moellava.convert.export import write_published
from moellava.convert.verify import NO_DENSE, ROUTERS_GONE, recompute, verify
from moellava.errors import UserError
from moellava.model.builder import save_pretrained_folder
from moellava.model.compose import compose
from moellava.model.published import read_published
from moellava.moe import MoESpec, upcycle

DENSE = ["llama/dense", "phi/dense", "qwen/dense", "stablelm/dense"]
MOE = ["llama/moe_sparse", "llama/moe_custom", "phi/moe_sparse", "phi/moe_residual"]


INPUTS = {"input_ids", "attention_mask", "labels", "images"}
BEFORE = {"upcycled_logits", "upcycled_loss"}


@pytest.mark.parametrize("name", DENSE + MOE)
def test_goldens_are_reproduced(name, checkpoints):
    """Every tensor of every golden file, from the folder alone."""
    folder = checkpoints / name
    result = verify(folder)
    wanted = {"logits", "loss"} | ({"moe_loss", "moe_loss_list"} | BEFORE if name in MOE else set())
    assert set(result) == wanted == set(load_file(folder / "golden.safetensors")) - INPUTS
    assert max(result.values()) < 5e-6


@pytest.fixture
def trained(checkpoints, tmp_path):
    """kind -> a folder whose experts have learnt something, and whose golden file only says what was before."""

    def make(kind: str):
        folder = tmp_path / "kind"
        shutil.copytree(checkpoints / kind, folder)
        shutil.copytree(checkpoints / "openai", tmp_path / "openai")
        state = torch.load(folder / "pytorch_model.bin", weights_only=True)
        learnt = [name for name in state if ".deepspeed_experts.1." in name]
        state[learnt[0]][0, 0] += 1e-3
        torch.save(state, folder / "pytorch_model.bin")
        golden = load_file(folder / "golden.safetensors")
        save_file({name: golden[name] for name in INPUTS | BEFORE}, folder / "golden.safetensors")
        return folder

    return make


def test_what_a_trained_folder_cannot_tell_is_said(trained, checkpoints, capsys):
    folder, dense = trained("llama/moe_sparse"), checkpoints / "llama/dense"
    assert verify(folder) == {"upcycled_logits": NO_DENSE, "upcycled_loss": ROUTERS_GONE}
    assert verify(folder, dense)["upcycled_logits"] < 5e-6
    assert main(["verify", str(folder), "--dense", str(dense)]) == 3
    assert ROUTERS_GONE in capsys.readouterr().out


def test_with_one_expert_a_token_the_routers_matter(trained, checkpoints):
    folder = trained("llama/moe_custom")
    assert set(verify(folder, checkpoints / "llama/dense").values()) == {ROUTERS_GONE}


def test_exit_status(checkpoints, tmp_path, capsys):
    assert main(["verify", str(checkpoints / "llama/moe_sparse")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("moe_loss ") and line.endswith("ok") for line in lines)
    assert main(["verify", str(checkpoints / "qwen/dense"), "--atol", "1e-9"]) == 1
    assert "above 1e-09" in capsys.readouterr().out
    assert main(["verify", str(tmp_path)]) == 2
    assert "holds no golden.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["logits", "loss", "moe_loss", "moe_loss_list", "upcycled_logits", "upcycled_loss"])
def test_a_tensor_that_differs_fails(name, checkpoints, tmp_path):
    folder = tmp_path / "kind"
    shutil.copytree(checkpoints / "phi/moe_sparse", folder)
    shutil.copytree(checkpoints / "openai", tmp_path / "openai")
    golden = load_file(folder / "golden.safetensors")
    golden[name].view(-1)[0] += 1e-3
    save_file(golden, folder / "golden.safetensors")
    assert main(["verify", str(folder), "--dense", str(checkpoints / "phi/dense")]) == 1


def test_weights_that_are_no_numbers_fail(checkpoints, tmp_path):
    folder = tmp_path / "kind"
    shutil.copytree(checkpoints / "phi/dense", folder)
    shutil.copytree(checkpoints / "openai", tmp_path / "openai")
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    state["lm_head.weight"][7] = float("nan")
    torch.save(state, folder / "pytorch_model.bin")
    assert main(["verify", str(folder)]) == 1


def test_a_golden_file_that_says_too_little_or_too_much(checkpoints, tmp_path):
    folder = tmp_path / "kind"
    shutil.copytree(checkpoints / "phi/dense", folder)
    shutil.copytree(checkpoints / "openai", tmp_path / "openai")
    golden = load_file(folder / "golden.safetensors")
    save_file({**golden, "moe_loss": torch.zeros(1)}, folder / "golden.safetensors")
    with pytest.raises(UserError, match="'moe_loss', which this model does not compute"):
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
    ("name", "kind"),
    [
        ("mistral", "sparse"),
        ("qwen", "sparse"),
        ("qwen", "residual"),
        ("qwen2", "custom"),
        ("stablelm", "residual"),
        ("minicpm", "custom"),
    ],
)
def test_golden_folders_of_other_families(name, kind, make_base, clip_tower, tmp_path):
    """As the reference's were made: upcycled, measured, moved by noise in the order of the file, measured again."""
    made = compose(str(make_base(name).folder), str(clip_tower), version="plain")
    upcycle(made.model, MoESpec.from_preset("moe-llava", **OTHER_SPARSE[kind]))
    write_published(made.model.eval(), None, tmp_path)
    golden = random_inputs()
    with torch.no_grad():
        before, _ = recompute(read_published(tmp_path, torch.float32), golden)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    generator = torch.Generator().manual_seed(5)
    for key in state:
        if "deepspeed_moe" in key or "coefficient" in key:
            state[key] = state[key] + (0.3 if ".wg." in key else 0.05) * torch.randn(
                state[key].shape, generator=generator
            )
    torch.save(state, tmp_path / "pytorch_model.bin")
    with torch.no_grad():
        after, _ = recompute(read_published(tmp_path, torch.float32), golden)
    assert (after["logits"] - before["logits"]).abs().max() > 1e-4
    golden |= after | {"upcycled_logits": before["logits"], "upcycled_loss": before["loss"]}
    save_file({name: tensor.contiguous() for name, tensor in golden.items()}, tmp_path / "golden.safetensors")
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
    made = compose(str(make_base("mistral").folder), str(clip_tower), version="plain")
    spec = MoESpec(num_experts=[4], moe_mode="sparse")
    upcycle(made.model, spec)
    made.model.config.moe = spec.to_config()
    save_pretrained_folder(made.model, made.tokenizer, made.processor, tmp_path)
    golden = random_inputs()
    with torch.no_grad():
        tensors, mask = recompute(made.model, golden)
    assert mask.sum(1).tolist() == [7, 3]
    save_file(golden | {name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "golden.safetensors")
    assert max(verify(tmp_path).values()) == 0
