# SPDX-License-Identifier: Apache-2.0
"""Sample answers during training: what chat would say, to what training shows, without touching the run."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch

from moellava.errors import UserError
from moellava.serve.answer import Request, answer
from moellava.train.arguments import parse_arguments
from moellava.train.samples import SampleAnswers, is_common_effort, split_at_answer
from tests.processes import train_here
from tests.tiny import reopen

EVALUATION = {"eval_strategy": "steps", "eval_steps": 3, "eval_samples": 4, "save_strategy": "no"}


@pytest.fixture
def run(flags_for, tmp_path, caplog):
    """(name, flags) -> the folder of a short stage 2, and (step, record, prompt, answer, reference) of its samples."""

    def start(name, **flags):
        flags = {"output_dir": tmp_path / name, "pretrain_mm_mlp_adapter": None, "untrained_projector": True} | flags
        caplog.clear()
        with caplog.at_level(logging.INFO, "moellava"):
            folder = train_here(flags_for(tmp_path, "finetune") | flags)
        return folder, [entry.args for entry in caplog.records if entry.msg.startswith("Sample answer")]

    return start


@pytest.mark.slow
def test_samples_are_what_chat_answers_and_change_no_loss(run, parts, losses_of):
    folder, shown = run("with", **EVALUATION, eval_data_path=parts / "sft.json")
    assert [step for step, *_ in shown] == [3] * 4 + [6] * 4
    plain, _ = run("without")
    assert losses_of(folder) == losses_of(plain)
    vlm = reopen(folder)
    pictures = {"a red circle": "0.png", "a green square": "1.png", "a blue shape": "2.png"}
    seen = []
    for step, _, prompt, said, reference in shown:
        image = pictures.get(reference.removesuffix(" here").replace(" here", ""))
        question = "what is in the image?" if image else "what is red?"
        assert question in prompt
        request = Request(question, [parts / "images" / image] if image else [])
        if step == 6:
            assert said == answer(vlm, [request], max_new_tokens=64)[0]
            seen.append(image)
    assert None in seen and len(set(seen)) > 1
    assert any(said for *_, said, _ in shown)


@pytest.mark.slow
def test_evaluation_leaves_the_load_that_is_logged_alone(run, parts, tmp_path):
    dense, _ = run("dense", max_steps=1, save_strategy="no")
    sparse = {
        "moe_enable": True,
        "moe_mode": "dense",
        "num_experts": 2,
        "image_tower": None,
        "untrained_projector": None,
        "model_name_or_path": dense,
    }
    logs = []
    for name, flags in {"without": {}, "with": EVALUATION | {"eval_data_path": parts / "sft.json"}}.items():
        folder, _ = run(name, **sparse, **{"max_steps": 4} | flags)
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        rows = [row for row in history if "loss" in row]
        logs.append([{key: row[key] for key in row if key.startswith(("expert_load", "router_"))} for row in rows])
    assert logs[0] == logs[1] and logs[0][0]


def test_tensorboard_gets_the_texts(run, parts):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = {"max_steps": 2, "eval_steps": 2, "eval_samples": 1, "report_to": "tensorboard"}
    folder, _ = run("board", **EVALUATION | flags, eval_data_path=parts / "sft.json")
    (events,) = folder.rglob("events.out.tfevents*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert "eval/sample_0/text_summary" in accumulator.Tags()["tensors"]
    assert "eval/loss" in accumulator.Tags()["scalars"]


def test_a_sample_is_cut_at_its_first_answer_with_the_media_shown_until_there():
    sample = {
        "input_ids": torch.tensor([1, -200, 5, 6, 7, -200, 8, 9]),
        "labels": torch.tensor([-100, -100, -100, 6, 7, -100, 8, 9]),
        "media": ["first", "second"],
        "record": "a",
    }
    prompt, reference = split_at_answer(sample)
    assert prompt["input_ids"].tolist() == [1, -200, 5] and reference == [6, 7]
    assert prompt["media"] == ["first"] and len(sample["media"]) == 2


def test_records_are_spread_over_the_data_and_never_more_than_there_are():
    trainer = SimpleNamespace(eval_dataset=range(10))
    assert SampleAnswers(trainer, 3).chosen == [0, 3, 6]
    assert SampleAnswers(trainer, 99).chosen == list(range(10))


def test_split_parameters_make_a_forward_a_common_effort():
    model = torch.nn.Linear(2, 2)
    assert not is_common_effort(model)
    model.weight.ds_id = 0
    assert is_common_effort(model)


@pytest.mark.parametrize("flags", ["--eval_samples -1", "--eval_samples 2"])
def test_flags_without_an_evaluation_are_named(flags):
    base = "--model_name_or_path m --data_path a.json --output_dir o --report_to none"
    with pytest.raises(UserError, match="--eval_samples"):
        parse_arguments([*base.split(), *flags.split()])
