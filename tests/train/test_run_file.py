# SPDX-License-Identifier: Apache-2.0
"""A run as a file: its keys are flags, the command line goes before it, and every run leaves one to start from."""

from __future__ import annotations

import json

import pytest
import yaml

from moellava import train
from moellava.cli import main
from moellava.errors import UserError
from moellava.train.arguments import given_flags, parse_arguments
from moellava.train.run_file import NAME, as_yaml
from tests.processes import words_of

RUN = """
model_name_or_path: lm
data_path: [a.json, b.json]
output-dir: out           # either spelling
learning_rate: 1e-3       # a text for YAML 1.1
gradient_checkpointing: true
num_experts: 4
moe_enable: yes
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 1.0e-5}
mm_projector_lr: null
"""


@pytest.fixture
def run(tmp_path):
    """(text, ending) -> a file of it."""

    def write(text: str = RUN, ending: str = "yaml"):
        path = tmp_path / f"a.{ending}"
        path.write_text(text)
        return str(path)

    return write


def test_a_file_says_what_words_would(run):
    words = "--model_name_or_path lm --data_path a.json b.json --output_dir out --learning_rate 1e-3 --num_experts 4"
    words += " --gradient_checkpointing True --moe_enable True --lr_scheduler_type cosine_with_min_lr"
    assert given_flags([run()]) == given_flags([*words.split(), "--lr_scheduler_kwargs", '{"min_lr": 1e-05}'])
    as_json = json.dumps(yaml.safe_load(RUN))
    assert given_flags([run(as_json, "json")]) == given_flags([run()])


@pytest.mark.parametrize("flag", ["save_strategy", "logging_strategy", "eval_strategy"])
@pytest.mark.parametrize("value", ["no", "'no'"])
def test_no_is_a_value_with_quotes_or_without(flag, value, run):
    """In YAML 1.1 it is false, which no such flag knows."""
    *_, training = parse_arguments([run(f"{RUN}{flag}: {value}\n")])
    assert getattr(training, flag) == "no"


@pytest.mark.parametrize("value", ["yes", "on", "On", "true", "TRUE", "no", "off", "false", "False"])
def test_a_truth_value_is_one_in_all_its_spellings(value, run):
    _, data, _, training = parse_arguments([run(f"{RUN}packing: {value}\nis_multimodal: {value}\n")])
    assert training.packing is data.is_multimodal is (value.lower() in ("yes", "on", "true"))


def test_the_command_line_goes_before_the_file(run):
    said = ["--local_rank=0", run(), "--learning_rate", "0.5", "--data_path", "c.json"]  # as deepspeed starts it
    model, data, moe, training = parse_arguments(said)
    assert (training.learning_rate, data.data_path) == (0.5, ["c.json"])
    assert (moe.num_experts, model.model_name_or_path) == ([4], "lm")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat: 1", "learning_rat is no flag. Did you mean learning_rate?"),
        ("learning_rate: fast", "--learning_rate: 'fast' is no number"),
        ("data_path: {a: b}", "--data_path"),
        ("- a\n- b", "it holds no run"),
        ("a: [", "no YAML or JSON"),
        ("1: 2", "it holds no run"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_name(text, said, run):
    path = run(text)
    if "data_path" in text:
        assert given_flags([path])["data_path"] == ['{"a": "b"}']  # no such file: told when it is read
        return
    with pytest.raises(UserError) as caught:
        given_flags([path])
    assert str(caught.value).startswith(f"{path}: {said}")


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match="gone.yaml: "):
        given_flags([str(tmp_path / "gone.yaml")])


def test_print_config_is_a_file_of_the_same_run(run, capsys):
    assert main(["train", run(), "--seed", "7", "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert given_flags([run(printed)]) == given_flags([run(), "--seed", "7"])
    assert main(["train", run("learning_rat: 1"), "--print_config"]) == 2


def test_a_file_keeps_no_secret_and_nothing_of_one_process():
    given = {"hub_token": "hf_secret", "local_rank": 1, "learning_rate": 0.1, "data_path": ["a b.json"]}
    assert yaml.safe_load(as_yaml(given)) == {"learning_rate": 0.1, "data_path": ["a b.json"]}
    assert as_yaml({"local_rank": 0}) == ""


def test_a_run_leaves_its_file_and_starts_from_it(tmp_path, flags_for, losses_of):
    flags = flags_for(tmp_path, "pretrain") | {"max_steps": 2, "save_strategy": "no"}
    assert main(["train", *words_of(flags)]) == 0
    left = tmp_path / "pretrain" / NAME
    assert given_flags([str(left)]) == given_flags(words_of(flags))
    assert main(["train", str(left)]) == 0  # it has finished: nothing to do
    again = train(left, output_dir=tmp_path / "again")
    assert losses_of(again) == losses_of(tmp_path / "pretrain")
    assert yaml.safe_load((again / NAME).read_text())["output_dir"] == str(tmp_path / "again")


def test_training_may_be_repeated_in_a_process(tmp_path, flags_for, losses_of):
    """Other precision, or DeepSpeed, in between: nothing of one run is left for the next."""
    flags = flags_for(tmp_path, "pretrain") | {"max_steps": 1, "save_strategy": "no", "skip_dry_save": True}
    between = {"half": {"bf16": True}, "split": {"deepspeed": "zero2"}}
    first, *_, last = [
        losses_of(train(flags, output_dir=tmp_path / name, **between.get(name, {})))
        for name in ("one", "half", "split", "two")
    ]
    assert first == last != {}


def test_a_forgotten_image_folder_is_told(tmp_path, flags_for):
    flags = flags_for(tmp_path, "pretrain") | {"image_folder": None}
    with pytest.raises(UserError, match=r"no such image file \(no --image_folder is given, which such paths are rel"):
        train(flags)
