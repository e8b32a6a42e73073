# SPDX-License-Identifier: Apache-2.0
"""Runs that end early: asked to, with a checkpoint; or because their numbers are no numbers, without a mark."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest
import torch
from transformers import TrainerCallback

from moellava.errors import UserError
from moellava.train import stopping, train
from moellava.train.checkpoint import last_checkpoint
from moellava.train.stopping import Stopped, StopRequest
from moellava.train.trainer import StageTrainer
from tests.older import SHARDS
from tests.processes import environment, kill_session, losses_of, train_command, train_here, words_of
from tests.tiny import weights_of


class At(TrainerCallback):
    """Does something in the middle of a step."""

    def __init__(self, step, action):
        self.step = step
        self.action = action

    def on_substep_end(self, args, state, control, **kwargs):
        self.on_step_begin(args, state, control)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.action()


def during(monkeypatch, step, action):
    """Makes every trainer do something in a step."""
    begin = StageTrainer.__init__

    def init(self, **kwargs):
        begin(self, **kwargs)
        self.add_callback(At(step, lambda: action(self)))

    monkeypatch.setattr(StageTrainer, "__init__", init)


def equal(one, other):
    mine, reference = weights_of(one), weights_of(other)
    return mine.keys() == reference.keys() and all(torch.equal(mine[name], reference[name]) for name in reference)


@pytest.fixture(scope="module")
def whole(flags_for, tmp_path_factory):
    """(flags, folder) of three steps of stage 1, in epochs of one step and a broken one."""
    root = tmp_path_factory.mktemp("stopping")
    flags = flags_for(root, "pretrain") | {"max_steps": 3, "skip_dry_save": True, "save_strategy": "no"}
    return flags, train_here(flags)


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_ends_a_run_behind_its_step_with_a_checkpoint(number, code, whole, monkeypatch, tmp_path, caplog):
    flags = whole[0] | {"output_dir": tmp_path / "run"}
    with monkeypatch.context() as patched:
        during(patched, 2, lambda trainer: os.kill(os.getpid(), number))
        assert train.main(words_of(flags)) == code
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-2"
    assert not json.loads((tmp_path / "run/run.json").read_text())["finished"]
    assert f"{signal.Signals(number).name}: stopped, with {tmp_path / 'run/checkpoint-2'} saved" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert equal(train_here(flags), whole[1])


@pytest.mark.slow
def test_a_signal_in_the_last_step_does_not_complete_a_run(whole, monkeypatch, tmp_path):
    flags = whole[0] | {"output_dir": tmp_path / "run"}
    with monkeypatch.context() as patched:
        during(patched, 3, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            train_here(flags)
    assert not (tmp_path / "run/config.json").exists()
    assert equal(train_here(flags), whole[1])


def test_launchers_may_say_it_twice_and_a_later_signal_stops_at_once(monkeypatch):
    request, ended = StopRequest(), []
    monkeypatch.setattr(stopping.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(stopping.os, "kill", lambda process, number: ended.append(number))
    request.receive(signal.SIGINT)
    request.receive(signal.SIGTERM)
    assert (request.number, ended) == (signal.SIGINT, [])
    now = time.monotonic()
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now + 60)
    request.receive(signal.SIGTERM)
    assert ended == [signal.SIGTERM]


def spoil(trainer):
    next(p for p in trainer.model.parameters() if p.requires_grad).data.fill_(float("nan"))


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_loss_that_is_no_number_stops_the_run_and_names_its_records(step, whole, monkeypatch, tmp_path):
    during(monkeypatch, step, spoil)
    with pytest.raises(UserError) as error:
        train_here(whole[0] | {"output_dir": tmp_path / "run", "save_strategy": "steps", "save_steps": 1})
    said, last = str(error.value), tmp_path / "run" / f"checkpoint-{step - 1}"
    assert f"Step {step} is not finite" in said
    assert said.count("ce nan for Record ") == 2, "a batch of two"
    assert (f"The last good checkpoint is {last}" if step > 1 else "No checkpoint was complete") in said
    assert not json.loads((tmp_path / "run/run.json").read_text())["finished"]


def test_a_gradient_that_is_no_number_stops_the_run(whole, monkeypatch, tmp_path):
    monkeypatch.setattr(StageTrainer, "_clip_grad_norm", lambda self, model: torch.tensor(float("inf")))
    with pytest.raises(UserError, match=r"Step 1 is not finite(?s:.*)a gradient of norm inf for Record "):
        train_here(whole[0] | {"output_dir": tmp_path / "run"})


def test_weights_that_are_no_numbers_are_not_saved(whole, monkeypatch, tmp_path):
    """A last step that breaks them is followed by no loss."""
    make = StageTrainer.create_optimizer

    def breaking(self, model=None):
        optimizer = make(self, model)
        optimizer.register_step_post_hook(lambda *_: spoil(self) if self.state.global_step == 2 else None)
        return optimizer

    monkeypatch.setattr(StageTrainer, "create_optimizer", breaking)
    with pytest.raises(UserError, match=r"The weights are not finite after step 3 \(.*\), and are not saved"):
        train_here(whole[0] | {"output_dir": tmp_path / "run"})
    assert not (tmp_path / "run/config.json").exists()


ENGINES = {"native": (2, {}), "shards": (3, {"fsdp_size": 3}), "ZeRO-3": (2, {"deepspeed": "zero3"})}
"""Engine -> (processes, flags)."""


@pytest.mark.slow
@pytest.mark.parametrize("engine", [pytest.param(name, marks=SHARDS if name == "shards" else ()) for name in ENGINES])
def test_processes_stop_together(engine, flags_for, tmp_path):
    processes, own = ENGINES[engine]
    flags = flags_for(tmp_path, "pretrain") | {"max_steps": 400, "save_steps": 2, "skip_dry_save": True} | own
    words = train_command(flags, processes, "torchrun", fresh=True)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, env=environment(), start_new_session=True, **pipes) as process:
        try:
            deadline = time.monotonic() + 100
            while last_checkpoint(tmp_path / "pretrain") is None:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.kill(process.pid, signal.SIGTERM)
            said = process.communicate(timeout=60)[0]
        finally:
            kill_session(process.pid)
    assert process.returncode != 0
    assert f"stopped, with {last_checkpoint(tmp_path / 'pretrain')} saved" in said, said[-3000:]
    assert not json.loads((tmp_path / "pretrain/run.json").read_text())["finished"]
    assert losses_of(last_checkpoint(tmp_path / "pretrain"))
