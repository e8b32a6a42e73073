# SPDX-License-Identifier: Apache-2.0
"""Every flag of `train.py` is judged, and the judgement is true: it acts, or is refused by name."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import trainer, training_args
from transformers.integrations import integration_utils
from transformers.utils import logging as hf_logging

import moellava
from moellava.errors import UserError
from moellava.moe.spec import MoESpec
from moellava.train import hf_flags
from moellava.train.arguments import ARGUMENT_CLASSES, TrainingArguments, given_flags, parse_arguments
from moellava.train.assemble import assemble
from moellava.train.stages import stage_of
from moellava.train.train import make_dataset, make_trainer, read_data, train
from moellava.train.trainer import StageTrainer
from tests.attacks.hf_flags import REFUSALS, attacks
from tests.older import RENAMED
from tests.processes import run_train, words_of

BASE = ["--model_name_or_path", "lm", "--data_path", "a.json", "--output_dir", "out"]


def test_every_flag_of_transformers_is_judged_once():
    """A new transformers brings flags that fail here: judge them in `hf_flags.py`, and show below that they act."""
    assert not set(hf_flags.SERVED) & set(hf_flags.REFUSED)
    assert {*hf_flags.SERVED, *hf_flags.REFUSED} == set(hf_flags.hf_names()) | RENAMED
    assert {*BUILT, *RUN, *READ, *ELSEWHERE} == set(hf_flags.SERVED)


def test_a_flag_that_nobody_has_judged_is_refused(monkeypatch):
    monkeypatch.delitem(hf_flags.SERVED, "max_grad_norm")
    parse_arguments(BASE)
    with pytest.raises(UserError, match="--max_grad_norm 2.0: .* has not been judged"):
        parse_arguments([*BASE, "--max_grad_norm", "2"])


def test_what_is_given_is_known_even_where_it_is_the_default():
    assert given_flags([*BASE, "--seed=42", "--no-use-cache", "--gradient-checkpointing", "True"]) == {
        "model_name_or_path": "lm",
        "data_path": ["a.json"],
        "output_dir": "out",
        "seed": 42,
        "use_cache": False,
        "activation_checkpointing": True,
    }


OTHER_VALUE = {
    "debug": "underflow_overflow",
    "train_sampling_strategy": "sequential",
    "eval_accumulation_steps": "2",
}


@pytest.mark.parametrize("name", hf_flags.REFUSED)
def test_a_flag_that_is_refused_says_why(name):
    default = next(item.default for item in fields(TrainingArguments) if item.name == name)
    value = OTHER_VALUE.get(name) or (str(not default) if isinstance(default, bool) else "True")
    if name == "do_train":
        value = "False"
    with pytest.raises(UserError, match=f"--{name}"):
        parse_arguments([*BASE, f"--{name}", value])


def test_what_is_done_anyway_may_be_said():
    parse_arguments([*BASE, *["--push_to_hub", "False", "--do_train", "True", "--train_sampling_strategy", "random"]])


SOURCE = "\n".join(
    path.read_text() for path in Path(moellava.__file__).parent.rglob("*.py") if path.name != "arguments.py"
)
OPTIONS = {item.name for item in fields(MoESpec)}
SETTLED = {"use_lora", "q_lora", "model_id", "model_local_path", "train_vision_projector", "moe_preset"}
"""Flags that `arguments.py` itself writes into others."""

OWN = {item.name for group in ARGUMENT_CLASSES for item in fields(group)} - set(hf_flags.hf_names())


@pytest.mark.parametrize("name", sorted(OWN - OPTIONS - SETTLED))
def test_a_flag_of_ours_is_read(name):
    assert re.search(rf"\.{name}\b|[\"']{name}[\"']", SOURCE) or name.startswith("max_"), f"nothing reads --{name}"


# -- flags of transformers that are served: what a trainer is built with -------------------------------------------


def optimizer_of(trained: StageTrainer) -> dict[str, Any]:
    """The optimizer's type, and what its first group says."""
    group = {name: value for name, value in trained.create_optimizer().param_groups[0].items() if name != "params"}
    return group | {"type": type(trained.optimizer).__name__}


def rates_of(trained: StageTrainer) -> list[float]:
    """Learning rates of 20 steps."""
    trained.create_optimizer()
    schedule, rates = trained.create_scheduler(20), []
    for _ in range(20):
        trained.optimizer.step()
        schedule.step()
        rates += schedule.get_last_lr()
    return rates


def loader_of(name: str) -> Callable[[StageTrainer], Any]:
    """An attribute of the loader of training data."""
    return lambda trained: getattr(trained.get_train_dataloader(), name)


def context_of(trained: StageTrainer) -> Any:
    """How workers are started."""
    context = trained.get_train_dataloader().multiprocessing_context
    return context and context.get_start_method()


def callbacks_of(trained: StageTrainer) -> set[str]:
    """Names of the trainer's callbacks."""
    return {type(callback).__name__ for callback in trained.callback_handler.callbacks}


WORKERS = "--dataloader_num_workers 1"

BUILT: dict[str, tuple[str, str, Callable[[StageTrainer], Any]]] = {
    "per_device_train_batch_size": ("3", "", loader_of("total_batch_size")),
    "gradient_accumulation_steps": ("3", "", lambda t: t._get_train_sampler().step),
    "learning_rate": ("0.5", "", lambda t: optimizer_of(t)["lr"]),
    "weight_decay": ("0.5", "", lambda t: [group["weight_decay"] for group in t.create_optimizer().param_groups]),
    "adam_beta1": ("0.5", "", lambda t: optimizer_of(t)["betas"]),
    "adam_beta2": ("0.5", "", lambda t: optimizer_of(t)["betas"]),
    "adam_epsilon": ("0.5", "", lambda t: optimizer_of(t)["eps"]),
    "optim": ("adafactor", "", lambda t: optimizer_of(t)["type"]),
    "optim_args": ("momentum=0.5", "--optim sgd", lambda t: optimizer_of(t)["momentum"]),
    "lr_scheduler_type": ("cosine", "", rates_of),
    "lr_scheduler_kwargs": ('{"min_lr":1e-4}', "--lr_scheduler_type cosine_with_min_lr", rates_of),
    "warmup_steps": ("5", "", rates_of),
    "data_seed": ("7", "", lambda t: list(t._get_train_sampler())),
    "seed": ("7", "", lambda t: list(t._get_train_sampler())),
    "dataloader_num_workers": ("1", "", loader_of("num_workers")),
    "dataloader_drop_last": ("True", "--per_device_train_batch_size 5", lambda t: len(t.get_train_dataloader())),
    "dataloader_persistent_workers": ("True", WORKERS, loader_of("persistent_workers")),
    "dataloader_prefetch_factor": ("5", WORKERS, loader_of("prefetch_factor")),
    "dataloader_multiprocessing_context": ("forkserver", WORKERS, context_of),
    "report_to": ("tensorboard", "", callbacks_of),
    "bf16": ("True", "", lambda t: t.accelerator.mixed_precision),
    "use_cache": ("False", "", lambda t: t.model.config.use_cache),
    "full_determinism": ("True", "", lambda t: torch.are_deterministic_algorithms_enabled()),
    "log_level": ("error", "", lambda t: hf_logging.get_verbosity()),
    "output_dir": ("elsewhere", "", lambda t: t._get_output_dir(None)),
    "average_tokens_across_devices": ("False", "", lambda t: t.args.average_tokens_across_devices),
}
"""Flag -> value, other flags that it needs, and what of a trainer it changes."""

NEEDED = {"lr_scheduler_kwargs": '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":2e-4}'}
"""Flags without which what a flag needs does not stand."""


@pytest.fixture(scope="module")
def build(flags_for, tmp_path_factory):
    """(words) -> a trainer of stage 1 with the flags of those words; the model is built once."""
    base = flags_for(tmp_path_factory.mktemp("ledger"), "pretrain") | {"lr_scheduler_type": None}
    words = words_of(base | {"save_steps": None, "learning_rate": None})
    model, data, moe, args = parse_arguments(words)
    stage = stage_of(model, moe)
    assembled = assemble(stage, model, data, moe, args)

    def make(more: str) -> StageTrainer:
        model, data, _, args = parse_arguments([*words, *more.split()])
        dataset = make_dataset(read_data(model, data)[0], assembled.vlm, data, args)
        return make_trainer(stage, assembled, None, model, args, {"train_dataset": dataset, "eval_dataset": None})

    return make


@pytest.fixture
def as_before(monkeypatch, tmp_path):
    """Puts back what trainers change of the process; folders that they make lie out of the way."""
    monkeypatch.chdir(tmp_path)
    verbosity, environment = hf_logging.get_verbosity(), dict(os.environ)
    hf_logging.set_verbosity_warning()  # transformers' own; a test before may have left another
    yield
    hf_logging.set_verbosity(verbosity)
    torch.use_deterministic_algorithms(False)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]


@pytest.mark.parametrize("name", BUILT)
def test_a_flag_changes_what_is_built(name, build, as_before):
    value, needs, fact = BUILT[name]
    before = fact(build(NEEDED.get(name, needs)))
    assert fact(build(f"{needs} --{name} {value}")) != before


def test_an_optimizer_of_8_bits_keeps_8_bits(build, as_before):
    """On a CPU, which those of bitsandbytes 0.48 and 0.49 do not know: that is said by the flag's name."""
    if Version(version("bitsandbytes")) < Version("0.50"):
        with pytest.raises(UserError, match="--optim adamw_8bit: .*GPU"):
            build("--optim adamw_8bit").create_optimizer()
        return
    assert build("--optim adamw_8bit").create_optimizer().args.optim_bits == 8
    assert build("--optim lion_32bit").create_optimizer().args.optim_bits == 32


# -- what a run does with them -------------------------------------------------------------------------------------

EVALUATED = "--eval_strategy steps --eval_steps 1"


def logged(*names: str) -> Callable[[Path], Any]:
    """The values of a run's log under some names."""

    def of(folder: Path) -> Any:
        rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return [(row["step"], name, row[name]) for row in rows for name in names if name in row]

    return of


def checkpoints_of(folder: Path) -> list[str]:
    """Names of a run's checkpoints and of their files."""
    return sorted(str(path.relative_to(folder)) for path in folder.glob("checkpoint-*/*"))


def rows_of(folder: Path) -> list[Any]:
    """Steps and names of what is logged."""
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(row["step"], sorted(row)) for row in rows]


RUN: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "max_steps": ("3", "", logged("loss")),
    "num_train_epochs": ("1", "--max_steps -1", logged("loss")),
    "max_grad_norm": ("0.01", "--optim sgd --learning_rate 1", logged("loss")),
    "label_smoothing_factor": ("0.5", "", logged("loss")),
    "neftune_noise_alpha": ("5", "", logged("loss")),
    "logging_strategy": ("no", "", rows_of),
    "logging_steps": ("2", "", rows_of),
    "logging_first_step": ("True", "--logging_steps 2", rows_of),
    "include_num_input_tokens_seen": ("True", "", rows_of),
    "skip_memory_metrics": ("False", "", rows_of),
    "eval_strategy": ("epoch", "--eval_on_start True", rows_of),
    "eval_steps": ("2", "--eval_strategy steps", rows_of),
    "eval_delay": ("2", EVALUATED, rows_of),
    "eval_on_start": ("True", EVALUATED, rows_of),
    "save_strategy": ("steps", "--save_steps 1", checkpoints_of),
    "save_steps": ("1", "--save_strategy steps --save_total_limit 2", checkpoints_of),
    "save_total_limit": ("2", "--save_strategy steps --save_steps 1", checkpoints_of),
}
"""Flag -> value, other flags that it needs, and what of a run's folder it changes."""


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_a_flag_changes_a_run(name, flags_for, tmp_path):
    value, needs, fact = RUN[name]

    def run(folder: str, more: str) -> Any:
        short = {"max_steps": 2, "save_strategy": "no", "save_steps": None, "skip_dry_save": True}
        flags = flags_for(tmp_path, "pretrain") | short | {"output_dir": tmp_path / folder}
        if "--eval" in f"{needs} {more}":
            flags["eval_data_path"] = flags["data_path"]
        train_folder = train_here_with(flags, f"{needs} {more}")
        return fact(train_folder)

    assert run("with", f"--{name} {value}") != run("without", "")


def train_here_with(flags: dict[str, Any], more: str) -> Path:
    """A run with flags, and with more words that stand behind them."""
    return train(*parse_arguments([*words_of(flags), *more.split()]))


# -- what this machine cannot show ---------------------------------------------------------------------------------

READ: dict[str, Any] = {
    "run_name": integration_utils,
    "project": integration_utils,
    "trackio_space_id": integration_utils,
    "trackio_bucket_id": integration_utils,
    "trackio_static_space_id": integration_utils,
    "log_on_each_node": training_args,
    "log_level_replica": training_args,
    "logging_nan_inf_filter": trainer,
    "torch_empty_cache_steps": trainer,
    "tf32": training_args,
    "fp16": training_args,
    "use_cpu": training_args,
    "ddp_find_unused_parameters": trainer,
    "ddp_bucket_cap_mb": trainer,
    "ddp_broadcast_buffers": trainer,
    "ddp_static_graph": trainer,
    "ddp_backend": training_args,
    "ddp_timeout": training_args,
    "per_device_eval_batch_size": training_args,
    "dataloader_pin_memory": trainer,
}
"""Flag -> the module of transformers that acts upon it with a tracker, with a GPU or with several processes."""


@pytest.mark.parametrize("name", READ)
def test_transformers_reads_a_flag(name):
    assert re.search(rf"(args|self)\.{name}\b", inspect.getsource(READ[name]))


ELSEWHERE = {
    "activation_checkpointing": "tests/train/test_stages_run.py",
    "activation_checkpointing_kwargs": "tests/train/test_arguments.py",
    "gradient_checkpointing": "tests/train/test_arguments.py",
    "gradient_checkpointing_kwargs": "tests/train/test_arguments.py",
    "deepspeed": "tests/train/test_stages_run.py",
    "disable_tqdm": "moellava/train/trainer.py",
    "resume_from_checkpoint": "tests/train",
    "local_rank": "moellava/train/hf_flags.py",
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo"), "tests/train/test_hub.py"),
    **dict.fromkeys(("hub_revision", "hub_strategy"), "tests/train/test_hub.py"),
}
"""Flags that tests of their own show, or that a launcher gives."""


# -- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "named"), REFUSALS)
def test_a_bad_value_is_refused_by_name(words, named):
    with pytest.raises(UserError) as caught:
        parse_arguments([*BASE, *words.split()])
    assert named in str(caught.value)
    assert words.split()[0] in str(caught.value)


def test_hostile_values_of_some_flags_are_named(tmp_path):
    outcome = attacks(False, tmp_path)["values of flags"]
    assert not outcome.failures
    assert outcome.counts["named"] > 50


@pytest.mark.slow
def test_hostile_values_of_all_flags_are_named(tmp_path):
    outcome = attacks(True, tmp_path)["values of flags"]
    assert not outcome.failures
    assert outcome.counts["named"] > 500


@pytest.mark.slow
def test_the_command_line_says_it_in_lines_without_a_traceback(tmp_path):
    bad = {"learning_rate": "nan", "save_total_limit": "-1", "hub_always_push": "True"}
    done = run_train({"data_path": "d.json", "output_dir": tmp_path / "o", "model_name_or_path": "m"} | bad)
    assert done.returncode == 2
    assert all(f"--{name} {value}: " in done.stderr for name, value in bad.items())
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_one_process_needs_no_launcher_for_deepspeed(flags_for, tmp_path):
    short = {"max_steps": 1, "save_strategy": "no", "skip_dry_save": True, "deepspeed": "scripts/zero2.json"}
    done = run_train(flags_for(tmp_path, "pretrain") | short)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "pretrain" / "config.json").exists()


@pytest.mark.slow
def test_a_mean_on_each_process_weighs_like_one_process(flags_for, tmp_path):
    """All records alike: both means are the same number, whichever way the tokens are counted. In the second step one
    process has none."""
    flags = flags_for(tmp_path, "pretrain")
    first = json.loads(Path(str(flags["data_path"])).read_text())[0]
    (tmp_path / "alike.json").write_text(json.dumps([first] * 3))
    short = {"max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "logging_steps": 1}
    short |= {"save_strategy": "no", "skip_dry_save": True, "data_path": tmp_path / "alike.json"}
    losses = []
    for average in (True, False):
        folder = tmp_path / str(average)
        own = short | {"output_dir": folder, "average_tokens_across_devices": average}
        done = run_train(flags | own, processes=2, launcher="torchrun")
        assert done.returncode == 0, done.stderr[-2000:]
        losses.append([value for _, _, value in logged("loss")(folder)])
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-5)
