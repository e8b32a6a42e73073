# SPDX-License-Identifier: Apache-2.0
"""Samples that share a row train as they do in rows of their own, or the model is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moellava.data.packing import joined
from moellava.errors import UserError
from moellava.moe import MoESpec, router_metrics, upcycle
from moellava.train import packing
from moellava.train.arguments import parse_arguments
from moellava.train.assemble import assemble
from moellava.train.packing import probed, settle_rows
from moellava.train.stages import stage_of
from moellava.train.train import make_dataset, make_trainer, read_data
from moellava.train.trainer import StageTrainer
from tests import tiny
from tests.processes import losses_of, train_here, words_of


@pytest.fixture(scope="module")
def folders(parts, tmp_path_factory) -> dict[str, Any]:
    """A dense and a sparse folder of a composed model."""
    root = tmp_path_factory.mktemp("packing")
    for name in ("dense", "sparse"):
        vlm = tiny.compose_tiny(parts / "lm", parts / "tower", "qwen")
        if name == "sparse":
            upcycle(vlm.model, MoESpec())
            vlm.sparse(MoESpec())
        vlm.save(root / name, meta={"stage": "moe" if name == "sparse" else "finetune"})
    return {name: root / name for name in ("dense", "sparse")}


@pytest.fixture(scope="module")
def trainer_of(folders, parts, tmp_path_factory) -> Callable[..., StageTrainer]:
    """(folder, flags) -> the trainer of a run that packs."""

    def make(name: str, **flags: object) -> StageTrainer:
        start = {"model_name_or_path": folders[name], "moe_enable": name == "sparse", "packing": True}
        data = {"data_path": parts / "sft.json", "image_folder": parts / "images", "report_to": "none"}
        data |= {"output_dir": tmp_path_factory.mktemp("run"), "model_max_length": 700}
        groups = parse_arguments(words_of(start | data | flags))
        assembled = assemble(stage_of(groups[0], groups[2]), *groups)
        datasets = {"train_dataset": make_dataset(read_data(*groups[:2])[0], assembled.vlm, groups[1], groups[3])}
        return make_trainer(stage_of(groups[0], groups[2]), assembled, None, groups[0], groups[3], datasets)

    return make


def step(trainer: StageTrainer, samples: list[dict[str, Any]]) -> tuple[float, dict[str, torch.Tensor], dict[str, Any]]:
    """Loss, gradients and routing of one step."""
    batch = trainer._prepare_inputs(trainer.data_collator(samples))
    trainer.model.train().zero_grad(set_to_none=True)
    trainer.begin_interval()
    trainer.step_tokens = torch.tensor(float(batch["attention_mask"].sum()))
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum())
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients, router_metrics(trainer.model)


@pytest.mark.parametrize(
    ("name", "attention", "flags"),
    [
        ("dense", "sdpa", {"mask_question_tokens": False}),
        ("sparse", "sdpa", {}),
        ("sparse", "eager", {"router_balance": "batch", "capacity_factor": 1.0}),
    ],
)
def test_losses_gradients_and_routing_are_those_of_rows_of_their_own(name, attention, flags, trainer_of):
    trainer = trainer_of(name, attn_implementation=attention, **flags)
    dataset = trainer.train_dataset
    rows = sorted(dataset.rows, key=lambda row: (dataset.dataset.shows_media[row[0]], len(row)))[-3:]
    rows += [row for row in dataset.rows if not any(map(dataset.dataset.shows_media.__getitem__, row))][:1]
    assert max(map(len, rows)) > 2
    apart = [dataset.dataset[number] for row in rows for number in row]
    together = [joined([dataset.dataset[number] for number in row]) for row in rows]
    loss, gradients, routing = step(trainer, apart)
    packed_loss, packed_gradients, packed_routing = step(trainer, together)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert packed_gradients.keys() == gradients.keys() and len(gradients) > 10
    for key, gradient in gradients.items():
        assert float((packed_gradients[key] - gradient).norm()) <= 1e-5 * max(float(gradient.norm()), 1e-3), key
    for layer, counts in routing.items():
        assert packed_routing[layer]["load_image"] == pytest.approx(counts["load_image"])
        assert packed_routing[layer]["tokens"] == counts["tokens"] and counts["dropped"] == pytest.approx(
            packed_routing[layer]["dropped"]
        )


def test_a_row_that_is_tried_out_has_samples_with_and_without_images(trainer_of, monkeypatch, caplog):
    trainer = trainer_of("sparse")
    shown = [trainer.train_dataset.dataset.shows_media[number] for number in probed(trainer.train_dataset.dataset)]
    assert shown == [True, False, True]
    settle_rows(trainer)
    assert "Samples keep apart in one row" in caplog.text
    real = packing.joined

    def running_on(samples: list[dict[str, Any]]) -> dict[str, Any]:
        return real(samples) | {"begins": [0]}

    monkeypatch.setattr(packing, "joined", running_on)
    with pytest.raises(UserError, match=r"--packing True: .*sparse .* does not keep samples of one row apart"):
        settle_rows(trainer)


def test_routing_that_counts_padding_is_refused(trainer_of):
    trainer = trainer_of("sparse", router_balance="first_choice")
    with pytest.raises(UserError, match=r"--packing True and --router_balance first_choice"):
        settle_rows(trainer)


@pytest.mark.slow
def test_a_packed_run_goes_on_where_it_stopped_and_is_the_same_on_two_processes(
    flags_for, run_train, begin_at, tmp_path
):
    flags = flags_for(tmp_path, "pretrain") | {"packing": True, "model_max_length": 64, "skip_dry_save": True}
    flags |= {"max_steps": 4, "save_steps": 2, "save_total_limit": 9, "per_device_train_batch_size": 4}
    whole = train_here(flags | {"output_dir": tmp_path / "whole"})
    begin_at(2, whole, tmp_path / "resumed")
    resumed = train_here(flags | {"output_dir": tmp_path / "resumed"})
    assert losses_of(resumed) == losses_of(whole)
    two = flags | {"output_dir": tmp_path / "two", "per_device_train_batch_size": 2, "deepspeed": "scripts/zero2.json"}
    done = run_train(two, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    full = (1, 2)  # what is left over of an epoch is dealt otherwise to two processes
    assert [losses_of(tmp_path / "two")[n] for n in full] == pytest.approx(
        [losses_of(whole)[n] for n in full], rel=1e-5
    )
