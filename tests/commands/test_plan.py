# SPDX-License-Identifier: Apache-2.0
"""`moellava plan`: from the flags of a run to a table and a command; no weight is read."""

import json
import shutil

import pytest

from moellava.cli import main
from tests.older import IS_OLD, SHARDS
from tests.tiny import tiny_llava


@pytest.fixture(scope="module")
def config_alone(composed, tmp_path_factory):
    """A dense vision-language model that has lost its weights."""
    folder = tmp_path_factory.mktemp("plan") / "model"
    composed.save(folder, meta={"stage": "finetune"})
    (folder / "model.safetensors").unlink()
    return folder


def plan(folder, *flags: str) -> list[str]:
    return ["plan", "--model", str(folder), "--device", "cpu", *flags]


NO_CHECKPOINTS = ("--activation_checkpointing", "False")
MOE = ("--moe_enable", "True", "--num_experts", "2", "--moe_mode", "dense")


def test_a_plan_is_a_table_and_the_command_of_the_cheapest(config_alone, capsys):
    flags = ("--gpus", "2", "--tokens", "64", "--per_device_train_batch_size", "2", *NO_CHECKPOINTS, *MOE)
    assert main(plan(config_alone, *flags)) == 0
    out = capsys.readouterr().out
    assert "ZeRO-2" in out and "native" not in out
    command = out.strip().splitlines()[-1]
    assert command.startswith(f"torchrun --nproc-per-node 2 -m moellava.train --model_name_or_path {config_alone}")
    assert command.count("--per_device_train_batch_size") == 1 and "--deepspeed zero" in command


@pytest.mark.slow
def test_a_plan_says_whether_rows_are_padded_and_what_that_takes(config_alone, data_file, make_record, capsys):
    data = data_file([make_record(1, "what is it?", "a circle"), make_record(2, "what is it?", "a circle " * 30)])
    taken = {}
    for attention, words in (("sdpa", "end to end in one row"), ("eager", "Rows are padded")):
        flags = ("--data", str(data), "--per_device_train_batch_size", "2", "--attn_implementation", attention)
        assert main(plan(config_alone, "--gpus", "1", "--json", *flags, *NO_CHECKPOINTS)) == 0
        (row,) = json.loads(capsys.readouterr().out)["rows"][:1]
        taken[row["in_one_row"]] = row
        assert main(plan(config_alone, "--gpus", "1", *flags, *NO_CHECKPOINTS)) == 0
        assert words in capsys.readouterr().out
    assert taken[True]["memory"]["activations"] < 0.8 * taken[False]["memory"]["activations"]
    assert taken[True]["flops_bound"] > taken[False]["flops_bound"]


def test_rows_as_json_and_what_the_flags_fix(config_alone, capsys):
    flags = ("--gpus", "2", "--tokens", "64", "--deepspeed", "scripts/zero2.json", "--ep_size", "2", "--json")
    fixed = (*NO_CHECKPOINTS, "--per_device_train_batch_size", "1")
    assert main(plan(config_alone, *flags, *fixed, *MOE)) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(row["layout"]["zero"], row["layout"]["ep_size"]) for row in told["rows"]] == [(2, 2)]
    assert told["rows"][0]["total"] == sum(told["rows"][0]["memory"].values()) > 0
    assert told["cheapest"] == told["rows"][0]


@SHARDS
def test_a_model_that_is_sparse_of_itself_may_have_its_experts_spread(config_alone, tmp_path, capsys):
    """Its products are traced in fp32, of which torch tells no shapes on the CPU."""
    sparse = tiny_llava("qwen2_moe", num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24)
    shutil.copytree(config_alone, tmp_path / "model")
    config = json.loads((config_alone / "config.json").read_text())
    config["text_config"] = sparse.config.text_config.to_dict() | {"vocab_size": config["text_config"]["vocab_size"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    fixed = ("--tokens", "64", "--per_device_train_batch_size", "1", *NO_CHECKPOINTS)
    assert main(plan(tmp_path / "model", "--gpus", "4", "--fsdp_size", "4", "--json", *fixed)) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["layout"]["fsdp"], row["layout"]["ep_size"]) for row in rows] == [(4, 1), (4, 2), (4, 4)]
    assert main(plan(tmp_path / "model", "--gpus", "4", "--fsdp_size", "4", "--ep_size", "3", *fixed)) == 2
    assert "--ep_size 3 does not divide --fsdp_size 4" in capsys.readouterr().err


def test_lengths_are_those_of_the_records(config_alone, data_file, make_record, capsys):
    records = [make_record(1, "what is it?", "a circle"), make_record(2, "what is it?", "a circle " * 30)]
    data = data_file(records)
    assert (
        main(
            plan(
                config_alone, "--gpus", "1", "--data", str(data), "--per_device_train_batch_size", "1", *NO_CHECKPOINTS
            )
        )
        == 0
    )
    first = capsys.readouterr().out.splitlines()[0]
    longest, mean = int(first.split("longest sample ")[1].split()[0]), int(first.split("mean ")[1])
    assert longest > 1.5 * mean / 2 and mean < longest


@pytest.mark.slow
def test_packed_rows_are_as_long_as_flags_let_them_be(config_alone, data_file, make_record, capsys):
    data = data_file([make_record(number, "what is it?", "a circle " * 5) for number in range(12)])
    for words in (("--tokens", "60"), ("--data", str(data))):
        told = {}
        for packing in ("False", "True"):
            flags = ("--gpus", "1", "--per_device_train_batch_size", "1", "--model_max_length", "512", *NO_CHECKPOINTS)
            assert main(plan(config_alone, *flags, *words, "--packing", packing)) == 0
            first = capsys.readouterr().out.splitlines()[0]
            told[packing] = int(first.split(" positions")[0].split()[-1])
        assert "longest row of samples" in first and told["True"] == 512 // told["False"] * told["False"]


def test_nothing_fits_is_said_with_the_smallest(config_alone, capsys):
    assert main(plan(config_alone, "--gpus", "1", "--tokens", "64", "--hbm", "0.0001")) == 1
    assert "Nothing fits into 0.0001 GB: the smallest takes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--gpus", "1"), "Give --data FILE, or --tokens N"),
        (("--gpus", "1", "--tokens", "9", "--device", "abacus"), "Unknown device 'abacus'"),
        (("--gpus", "1", "--data", "d.json", "--images", "2"), "--images 2: is read with --tokens alone"),
        (("--gpus", "1", "--tokens", "9", "--supervised", "10"), "--supervised 10: a sample has --tokens 9 positions"),
        (("--gpus", "1", "--tokens", "4", "--images", "2"), "--images, --tokens: 2 images take 8 positions of a batch"),
        (("--gpus", "3", "--tokens", "9", "--ep_size", "2", *MOE), "--ep_size 2 does not divide --gpus 3"),
        (("--gpus", "1", "--tokens", "9", "--tune_mm_mlp_adapter", "True", *MOE), "conflict: choose one stage"),
    ],
)
def test_mistakes_are_told_by_name(config_alone, capsys, flags, words):
    assert main(plan(config_alone, *flags)) == 2
    assert words in capsys.readouterr().err


LORA = ("--use_lora", "True", "--lora_r", "2")
SPARSE = ("--moe_enable", "True", "--num_experts", "4", "--moe_mode", "dense")
RUNS = {
    "bf16": ("--bf16", "True"),
    "fp16": ("--fp16", "True"),
    "fp32": ("--bf16", "False"),
    "adapters": ("--bf16", "True", *LORA),
    "adapters of the tower": ("--bf16", "True", "--use_vision_lora", "True", *LORA),
    "4 bits": ("--bf16", "True", "--bits", "4", *LORA),
    "8 bits": ("--bf16", "True", "--bits", "8", *LORA),
    "4 bits, single scales": ("--fp16", "True", "--bits", "4", "--double_quant", "False", *LORA),
    "capacity": ("--bf16", "True", "--capacity_factor", "1.0"),
    "first choice": ("--fp16", "True", "--router_balance", "first_choice"),
    "bias": ("--bf16", "True", "--router_balance", "bias"),
    "one by one": ("--bf16", "True", "--moe_kernel", "loop"),
    "small experts": ("--bf16", "True", "--init", "granular", "--granularity", "2"),
    "packing": ("--bf16", "True", "--packing", "True"),
}
"""Runs of stage 2 or 3 on a GPU, by what their flags change in the step."""

OF_EXPERTS = {"capacity", "first choice", "bias", "one by one", "small experts"}


ONE_WAY = ("--gpus", "2", "--tokens", "64", "--per_device_train_batch_size", "2", "--deepspeed", "scripts/zero2.json")
ONE_WAY += ("--ep_size", "1", *NO_CHECKPOINTS, "--json")


QUICK = {("fp16", True), ("4 bits", True), ("8 bits", False)}


@pytest.mark.parametrize(
    ("name", "moe"),
    [
        pytest.param(name, moe, marks=[] if (name, moe) in QUICK else pytest.mark.slow)
        for name in RUNS
        for moe in (False, True)
        if moe or name not in OF_EXPERTS
    ],
)
def test_every_kind_of_run_is_planned(name, moe, config_alone, capsys):
    words = ["plan", "--model", str(config_alone), "--device", "h100", *ONE_WAY, *RUNS[name], *(SPARSE if moe else ())]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    weights = [row["memory"]["weights"] for row in told["rows"]]
    assert told["flags"] and all(weights) and all(row["memory"]["activations"] > 0 for row in told["rows"])


@pytest.mark.slow
def test_packed_weights_are_smaller_and_not_split(config_alone, capsys):
    taken = {}
    for bits in ("16", "8", "4"):
        flags = ("--gpus", "2", "--tokens", "64", "--per_device_train_batch_size", "2", "--json", "--bf16", "True")
        assert main(plan(config_alone, *flags, *NO_CHECKPOINTS, *LORA, "--bits", bits)) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert bits == "16" or all(row["layout"]["zero"] < 3 and row["layout"]["fsdp"] == 1 for row in rows)
        taken[bits] = min(row["memory"]["weights"] for row in rows if row["layout"]["zero"] == 2)
    assert taken["4"] < taken["8"] < taken["16"]
    words = plan(
        config_alone, "--gpus", "2", "--tokens", "64", "--bits", "4", *LORA, "--deepspeed", "scripts/zero3.json"
    )
    assert main(words) == 2
    assert "--bits 4: packed weights are not split" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--gpus 12",
            "hosts of --per-host 8 devices have 8 or 16 together. --per-host 6 makes 2 hosts of 6.",
        ),
        ("--gpus 7 --per-host 3", "--per-host 1 makes 7 hosts of 1"),
        ("--gpus 2 --deepspeed /nope.json", "No such file"),
        ("--gpus 2 --deepspeed zero2 --fsdp_size 2", "--fsdp_size 2 and --deepspeed conflict"),
        ("--gpus 2 --fp16 True --fsdp_size 2 --device h100", "--fsdp_size 2 and --fp16 True conflict"),
        ("--gpus 2 --optim adafactor --fsdp_size 2", "--fsdp_size 2 and --optim adafactor conflict"),
        ("--gpus 2 --deepspeed zero3 --moe_enable True", "--deepspeed"),
        ("--gpus 2 --deepspeed none --moe_enable True", "--deepspeed"),
        ("--gpus 2 --ep_size 0", "--ep_size 0"),
        ("--gpus 2 --ep_size 2", "--ep_size 2: the model has no experts to spread"),
        ("--gpus 2 --fsdp_size 0", "--fsdp_size 0"),
        ("--gpus 2 --per_device_train_batch_size 0", "--per_device_train_batch_size 0"),
        ("--gpus 1 --model_max_length 32", "--tokens 64: training takes samples of --model_max_length 32"),
    ],
)
def test_what_training_refuses_is_not_planned(config_alone, capsys, flags, words):
    assert main(plan(config_alone, "--tokens", "64", *flags.split())) == 2
    assert words in capsys.readouterr().err


FIXED = ("--tokens", "64", "--per_device_train_batch_size", "1", *NO_CHECKPOINTS, "--json")


@pytest.mark.parametrize(
    ("flags", "engines"),
    [
        ("--gpus 4", {"native", "ZeRO", "FSDP2"}),
        ("--gpus 4 --optim adafactor", {"native", "ZeRO"}),
        ("--gpus 4 --deepspeed none", {"native", "FSDP2"}),
        ("--gpus 4 --fp16 True --device h100", {"native", "ZeRO"}),
        ("--gpus 4 --moe_enable True --num_experts 4", {"ZeRO"}),
        pytest.param("--gpus 4 --fsdp_size 2", {"FSDP2"}, marks=SHARDS),
        ("--gpus 2 --ddp_timeout 600", {"native", "ZeRO", "FSDP2"}),
    ],
)
def test_engines_that_training_refuses_have_no_row(config_alone, capsys, flags, engines):
    assert main(plan(config_alone, *FIXED, *flags.split())) == 0
    rows = [row["layout"] for row in json.loads(capsys.readouterr().out)["rows"]]
    found = {"FSDP2" if row["fsdp"] > 1 else "ZeRO" if row["deepspeed"] else "native" for row in rows}
    assert found == engines - ({"FSDP2"} if IS_OLD else set())


def test_settings_of_ones_own_are_planned_and_stand_in_the_command(config_alone, tmp_path, capsys):
    for name, zero in (("none", {}), ("far", {"stage": 3, "offload_optimizer": {"device": "cpu"}})):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"zero_optimization": zero, "train_micro_batch_size_per_gpu": "auto"}))
        assert main(plan(config_alone, *FIXED[:-1], "--gpus", "2", "--deepspeed", str(path))) == 0
        assert f"--deepspeed {path}" in capsys.readouterr().out


def test_experts_that_the_folder_says_are_spread(config_alone, capsys):
    flags = ("--gpus", "2", "--moe_enable", "True", "--ep_size", "2")  # four experts, which no flag says
    assert main(plan(config_alone, *FIXED, *flags)) == 0
    assert {row["layout"]["ep_size"] for row in json.loads(capsys.readouterr().out)["rows"]} == {2}


def test_the_command_says_how_long_samples_are_and_where_data_goes(config_alone, capsys):
    model = f"--model={config_alone}"
    assert main(["plan", model, "--device", "h100", "--gpus", "1", "--tokens", "1024", *FIXED[2:-1]]) == 0
    command = capsys.readouterr().out.strip().splitlines()[-1]
    assert "--data_path DATA.json --model_max_length 1024" in command and "offload" not in command
