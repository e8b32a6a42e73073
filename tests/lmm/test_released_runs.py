# SPDX-License-Identifier: Apache-2.0
"""Released models from the command line, in real processes: the whole way, and a rank without any image."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from moellava.cli import main
from tests.lmm.tiny import reopen
from tests.processes import train_here

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ["llava-1.5", "qwen2.5-vl"]


@pytest.fixture
def moellava(capsys):
    """Words of a `moellava` command -> what it prints."""

    def run(*words):
        assert main([str(word) for word in words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def trained(result):
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("family_id", ARCHITECTURES)
def test_train_merge_upcycle_train_again_and_chat(
    family_id, small_lmm, released_flags, run_train, moellava, pictures, tmp_path
):
    base = small_lmm(family_id)
    trained(run_train(released_flags(base, "lora", use_lora=True, lora_r=4)))
    said = moellava("merge-lora", "--model-path", base, "--adapter", tmp_path / "lora" / "adapter",
                    "--output-dir", tmp_path / "merged")  # fmt: skip
    assert "merging changes them by" in said and "with an image" in said
    plain, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(plain) is type(AutoModelForImageTextToText.from_pretrained(base))
    assert "processor_class" in json.loads((tmp_path / "merged" / "processor_config.json").read_text())

    said = moellava("upcycle", "--model-path", tmp_path / "merged", "--output-dir", tmp_path / "moe",
                    "--moe_mode", "dense", "--num_experts", "2")  # fmt: skip
    assert "exact in theory" in said
    train_here(released_flags(tmp_path / "moe", "moe-run", moe_enable=True))
    before, after = (reopen(tmp_path / name).model.state_dict() for name in ("moe", "moe-run"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".mlp.experts." in name or ".mlp.router." in name for name in moved)
    assert moellava("chat", "--model-path", tmp_path / "moe-run", "--image-file", pictures[0],
                    "--question", "What is it?", "--max-new-tokens", 4).endswith("\n")  # fmt: skip


@pytest.fixture
def one_with_and_one_without(released_flags, clips, tmp_path):
    """(folder, run, flags) -> flags of a run whose every step has a record with image and video, and one without."""

    def make(folder, name, **flags):
        turns = [{"from": "user", "value": "Hello?"}, {"from": "bot", "value": "Hello, and some more words."}]
        shown = [{"from": "user", "value": "<video> <image>\nWhat is it?"}, {"from": "bot", "value": "A fractal."}]
        media = {"image": "0.png", "video": "shapes.mp4"}
        records = [{"id": "text", "conversations": turns}, {"id": "shown", **media, "conversations": shown}]
        made = released_flags(folder, name, video_folder=clips, num_frames=3, **flags)
        (tmp_path / "data.json").write_text(json.dumps(records))
        everything = {"train_vision_encoder": True, "train_vision_projector": True, "num_train_epochs": 3}
        return made | everything | {"max_steps": 3, "learning_rate": 1e-3}

    return make


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "family_id"), [(2, "llava-1.5"), (3, "qwen2.5-vl")])
def test_a_rank_without_an_image_trains_beside_one_with(
    zero, family_id, small_lmm, one_with_and_one_without, run_train, losses_of, tmp_path
):
    """Two ranks with a sample each, every part trained, against one process with both samples in its batch."""
    zero_file = ROOT / "scripts" / f"zero{zero}.json"
    flags = one_with_and_one_without(small_lmm(family_id), "split", deepspeed=zero_file, skip_dry_save=True)
    samples = {"eval_data_path": flags["data_path"], "eval_strategy": "steps", "eval_steps": 3, "eval_samples": 1}
    result = run_train(flags | samples | {"per_device_train_batch_size": 1}, processes=2)
    trained(result)
    assert (result.stdout + result.stderr).count("Sample answer at step 3") == 1, "answered together, shown once"
    flags = one_with_and_one_without(small_lmm(family_id), "whole", skip_dry_save=True)
    train_here(flags)
    assert losses_of(tmp_path / "split") == pytest.approx(losses_of(tmp_path / "whole"), abs=1e-4)
    one, other = (reopen(tmp_path / name).model.state_dict() for name in ("split", "whole"))
    assert all(torch.allclose(one[name], other[name], atol=2e-3) for name in other)
