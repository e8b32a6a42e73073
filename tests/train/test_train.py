# SPDX-License-Identifier: Apache-2.0
"""A run in one process: that its end may be killed too, and what flags do to its loss."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch.nn import functional

from moellava.constants import IGNORE_INDEX
from moellava.data.dataset import SupervisedDataset
from moellava.data.media import MediaFiles
from moellava.data.records import load_records
from moellava.errors import UserError
from tests.processes import train_here
from tests.tiny import reopen, weights_of


def test_a_run_killed_behind_its_last_checkpoint_makes_no_further_step(flags_for, losses_of, begin_at, tmp_path):
    flags = flags_for(tmp_path, "pretrain")
    finished = train_here(flags)
    resumed = begin_at(6, finished, tmp_path / "resumed")
    train_here(flags | {"output_dir": resumed})
    assert losses_of(resumed) == losses_of(finished)
    mine, reference = weights_of(resumed), weights_of(finished)
    assert mine.keys() == reference.keys()
    assert all(torch.equal(mine[name], reference[name]) for name in reference)
    assert json.loads((resumed / "run.json").read_text())["finished"]


def test_a_disk_that_is_full_at_the_very_end_is_told_as_such(flags_for, monkeypatch, tmp_path):
    flags = flags_for(tmp_path, "pretrain") | {"max_steps": 1, "save_strategy": "no", "skip_dry_save": True}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    with pytest.raises(UserError, match=r"Saving at step 1 failed: .*0\.00 GB are free.*run the same command to go on"):
        train_here(flags)
    monkeypatch.undo()
    assert not (tmp_path / "pretrain" / "config.json").exists()
    assert (train_here(flags) / "config.json").exists()


@pytest.mark.parametrize("masked", [True, False])
def test_questions_of_a_composed_model_train_if_a_flag_says_so(masked, parts, flags_for, losses_of, tmp_path):
    """The loss of all records in one batch, worked out from the model's own logits."""
    short = {"max_steps": 1, "save_strategy": "no", "skip_dry_save": True}
    start = train_here(flags_for(tmp_path, "pretrain") | short)
    none = dict.fromkeys(("image_tower", "image_projector_type", "pretrain_mm_mlp_adapter"))
    whole = none | {"model_name_or_path": start, "per_device_train_batch_size": 24}
    run = train_here(flags_for(tmp_path, "finetune") | short | whole | {"mask_question_tokens": masked})
    (loss,) = losses_of(run).values()

    vlm = reopen(start)
    vlm.settle("qwen")
    dataset = SupervisedDataset(load_records(parts / "sft.json"), vlm.encoder, MediaFiles(parts / "images"))
    batch = vlm.collator()([dataset[index] for index in range(len(dataset))])
    labels = batch.pop("labels")
    if not masked:
        said = batch["attention_mask"].bool() & (batch["input_ids"] != vlm.model.config.image_token_id)
        labels = batch["input_ids"].where(said, torch.tensor(IGNORE_INDEX))
    with torch.no_grad():
        logits = vlm.model(**batch).logits
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert loss == pytest.approx(float(expected), rel=1e-5)
