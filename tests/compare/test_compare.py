# SPDX-License-Identifier: Apache-2.0
"""`moellava compare` on a tiny composed model: every arm is trained, asked and told, and nothing is done twice."""

from __future__ import annotations

import json
import shlex

import pytest
import torch

from moellava.cli import main
from moellava.compare import compare
from moellava.compare.runs import Run, launcher_of, train
from moellava.compare.scores import by_category, difference, mean_of
from moellava.errors import UserError
from moellava.eval.benchmarks import Question
from moellava.eval.tally import STATISTICS, Item, Tally
from moellava.moe.interventions import INTERVENTIONS
from moellava.train.parsing import parse_arguments
from moellava.train.train import train as train_in_process
from tests.tiny import compose_tiny, weights_of

LENGTH = "--max_steps 3 --logging_steps 1 --save_strategy no --report_to none --model_max_length 256"
LEARNING = "--learning_rate 5e-2 --lr_scheduler_type constant --per_device_train_batch_size 2 --use_cpu True"


@pytest.fixture(scope="module")
def stage2(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "stage2"
    compose_tiny(parts / "lm", parts / "tower", "qwen").save(folder, meta={"stage": "finetune"})
    return folder


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """Trains in this process; the names of the runs that were started."""
    names: list[str] = []

    def here(run: Run, launcher: list[str], log) -> None:
        names.append(run.name)
        train_in_process(*parse_arguments(run.flags))

    monkeypatch.setattr(compare, "train", here)
    return names


def words(stage2, parts, output, *own: str) -> list[str]:
    ours = ["--stage2", str(stage2), "--data", str(parts / "sft.json"), "--output-dir", str(output), "--limit", "12"]
    theirs = ["--image_folder", str(parts / "images"), *shlex.split(LENGTH), *shlex.split(LEARNING)]
    return ["compare", *ours, *own, "--", *theirs, "--moe_mode", "sparse", "--num_experts", "4"]


@pytest.mark.slow
def test_every_arm_is_trained_asked_and_told(stage2, parts, tmp_path, started, monkeypatch, capsys):
    command = words(stage2, parts, tmp_path / "out", "--seeds", "0", "1")
    assert main(command) == 0
    said = capsys.readouterr().out
    arms = ["moe", "dense", "dense-flops", "dense-time"]
    assert started == [f"{arm}-seed{seed}" for arm in arms for seed in (0, 1)]
    told = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert list(told["arms"]) == ["stage2", *arms] and list(told["routing"]) == list(INTERVENTIONS)
    found = told["arms"]
    assert found["moe"]["steps"] == found["dense"]["steps"] == 3
    per_step = {arm: found[arm]["flops"] / found[arm]["steps"] for arm in arms}
    assert found["dense-flops"]["steps"] == round(3 * per_step["moe"] / per_step["dense"])
    assert per_step["dense-flops"] == pytest.approx(per_step["dense"])
    assert found["moe"]["bytes"] > found["dense"]["bytes"] == found["stage2"]["bytes"]
    assert all(len(found[arm]["accuracy"]) == 2 and found[arm]["seconds"] > 0 for arm in arms)
    assert [(lead["arm"], lead["over"]) for lead in told["leads"]] == [("moe", arm) for arm in arms[1:]]
    for name, arm in found.items():
        assert set(arm["by_category"]) == {"color", "yes/no"} and (arm["gain"] or name == "stage2")
    assert (tmp_path / "out" / "compare.txt").read_text().strip() in said
    assert (tmp_path / "out" / "compare.png").stat().st_size > 1000
    seeds = [weights_of(tmp_path / "out" / "runs" / f"moe-seed{seed}") for seed in (0, 1)]
    assert any(not torch.equal(seeds[0][name], seeds[1][name]) for name in seeds[0])

    monkeypatch.setattr("moellava.eval.asking.answer", lambda *_, **__: pytest.fail("a question was asked twice"))
    assert main(command) == 0
    assert capsys.readouterr().out == said


def test_the_least_that_is_compared(stage2, parts, tmp_path, started, monkeypatch, capsys):
    monkeypatch.setattr(compare, "INTERVENTIONS", {"shuffled": INTERVENTIONS["shuffled"]})
    assert main(words(stage2, parts, tmp_path / "out", "--arms", "dense", "--limit", "4")) == 0
    told = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert started == ["moe-seed0", "dense-seed0"] and list(told["arms"]) == ["stage2", "moe", "dense"]
    assert "MoE against dense, equal steps" in capsys.readouterr().out


@pytest.mark.slow
def test_variants_are_arms_of_other_flags(stage2, parts, tmp_path, started, monkeypatch, capsys):
    monkeypatch.setattr(compare, "INTERVENTIONS", {"top-1": INTERVENTIONS["top-1"]})
    given = ["--variant", "top-1", "moe", "--init noise --max_steps 2", "--variant", "slow", "dense", "--max_steps 1"]
    assert main(words(stage2, parts, tmp_path / "out", "--arms", "dense", "--limit", "4", *given)) == 0
    assert started == [f"{arm}-seed0" for arm in ("moe", "dense", "top-1", "slow")]
    told = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [told["arms"][name]["steps"] for name in ("moe", "top-1", "slow")] == [3, 2, 1]
    assert len(told["arms"]["top-1"]["accuracy"]) == len(told["routing"]["top-1"]["accuracy"]) == 1
    pairs = [("moe", "dense"), ("top-1", "dense"), ("moe", "slow")]
    assert [(lead["arm"], lead["over"]) for lead in told["leads"]] == pairs
    assert told["settings"]["arm_flags"]["top-1"] == ["--max_steps", "2", "--init", "noise"]
    one, other = (weights_of(tmp_path / "out" / "runs" / f"{name}-seed0") for name in ("moe", "top-1"))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_flags_are_read_before_anything_trains(stage2, parts, tmp_path, started, capsys):
    wrong = ["--variant", "fast", "dense", "--learn_quickly 1"]
    assert main(words(stage2, parts, tmp_path / "out", *wrong)) == 2
    assert "--learn_quickly" in capsys.readouterr().err and not started


def test_scores_are_told_by_category():
    asked = [Question("", "", None, category, number, unit=f"u{number}") for number, category in enumerate("aab")]
    seeds = ([1, 0, 1], [1, 1, 0])
    rows = [Tally([Item(str(i), str(i), (right, 1.0)) for i, right in enumerate(hits)]) for hits in seeds]
    assert by_category(asked, rows) == {"a": 0.75, "b": 0.5}
    assert by_category(asked[:2], [Tally(list(rows[0].items)[:2])]) == {}
    units = Tally([Item(f"u{number}", str(number), (1.0, 1.0)) for number in range(3)])
    assert by_category(asked, [units]) == {"a": 1.0, "b": 1.0}
    groups = Tally([Item("0", str(i), (float(i), 1.0), group) for i, group in enumerate("ab")])
    assert by_category(asked, [groups]) == {"a": 0.0, "b": 1.0} and STATISTICS[groups.statistic].scale == 100


@pytest.mark.slow
def test_a_run_that_is_there_is_not_trained_again(stage2, parts, tmp_path, started, monkeypatch, capsys):
    monkeypatch.setattr(compare, "INTERVENTIONS", {})
    command = words(stage2, parts, tmp_path / "out", "--arms", "dense", "--limit", "4")
    assert main(command) == 0
    run, again = tmp_path / "out" / "runs" / "moe-seed0", words(stage2, parts, tmp_path / "b", "--arms", "dense")
    started.clear()
    assert main([*again[:1], "--moe-run", str(run), *again[1:]]) == 0
    assert started == ["dense-seed0"]
    started.clear()
    more = words(stage2, parts, tmp_path / "c", "--arms", "dense", "--seeds", "0", "1", "--limit", "4")
    assert main([*more[:1], "--moe-run", str(run), *more[1:]]) == 0
    assert started == ["moe-seed1", "dense-seed0", "dense-seed1"]
    assert main([*again[:1], "--moe-run", str(run), str(run), *again[1:]]) == 2
    assert "--moe-run names 2 runs, and --seeds has 1" in capsys.readouterr().err
    other = [word.replace("sft.json", "captions.json") for word in again]
    assert main([*other[:1], "--moe-run", str(run), *other[1:]]) == 2
    assert "arms that are compared start alike" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--task", "llava-bench"], "llava-bench"),
        (["--seeds", "1", "1"], "each once"),
        (["--arms", "no-such"], "no-such"),
        (["--data-folder", "x"], "--data-folder x: is read by tasks other than easy-vqa"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused_before_anything_trains(
    stage2, parts, tmp_path, started, change, said, capsys
):
    assert main(words(stage2, parts, tmp_path / "out", *change)) == 2
    assert said in capsys.readouterr().err and not started


def test_a_sparse_folder_is_no_start(stage2, parts, tmp_path, started, capsys):
    assert main(["upcycle", "--model-path", str(stage2), "--output-dir", str(tmp_path / "moe")]) == 0
    assert main(words(tmp_path / "moe", parts, tmp_path / "out")) == 2
    assert "is sparse already" in capsys.readouterr().err and not started


@pytest.mark.slow
def test_a_run_is_a_process_of_its_own_and_its_failure_is_told(stage2, parts, tmp_path):
    flags = ["--model_name_or_path", str(stage2), "--data_path", str(parts / "sft.json"), *shlex.split(LENGTH)]
    folder = tmp_path / "run"
    run = Run("dense", 0, folder, [*flags, "--image_folder", str(parts / "images"), "--output_dir", str(folder)])
    train(run, launcher_of(None), tmp_path / "logs" / "dense.log")
    assert "is complete" in (tmp_path / "logs" / "dense.log").read_text() and weights_of(folder)
    bad = Run(
        "dense", 1, tmp_path / "bad", [*flags, "--image_folder", "nowhere", "--output_dir", str(tmp_path / "bad")]
    )
    with pytest.raises(
        UserError,
        match=r"--image_folder nowhere: no such folder(.|\n)*dense-seed1 ended with status 2; its whole log is",
    ):
        train(bad, launcher_of(None), tmp_path / "logs" / "bad.log")


def test_launchers_take_a_module():
    assert launcher_of("env OMP_NUM_THREADS=1 deepspeed --num_gpus 2")[-2:] == ["--module", "moellava.train"]
    assert launcher_of("deepspeed --num_accelerators 2")[-2:] == ["--module", "moellava.train"]
    assert launcher_of("torchrun --nproc-per-node 2") == [
        "torchrun",
        "--nproc-per-node",
        "2",
        "-m",
        "moellava.train",
    ]


def test_seeds_are_averaged_question_by_question():
    rights = ([1, 0, 1, 1], [0, 0, 1, 1]), ([0, 0, 1, 0], [0, 1, 0, 0])
    one, other = (
        [Tally([Item(str(i), str(i), (r, 1.0)) for i, r in enumerate(row)]) for row in rows] for rows in rights
    )
    assert mean_of(one).score == pytest.approx(5 / 8)
    gap = difference(one, other)
    assert gap.mean == pytest.approx(5 / 8 - 2 / 8) and gap.low < gap.mean < gap.high
