# SPDX-License-Identifier: Apache-2.0
"""Adapters: where they attach, that they learn, what a run leaves, and that merging changes nothing."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import LlavaForConditionalGeneration

from moellava.adapters.folder import merged
from moellava.adapters.gradient_watch import GradientWatch
from moellava.adapters.lora import attach, lora_layers, lora_parameters, pattern_of, target_names
from moellava.cli import main
from moellava.convert import merge_lora
from moellava.errors import UserError
from moellava.files import DIGESTS
from moellava.moe import MoESpec, upcycle
from moellava.train.adapt import adapt
from moellava.train.arguments import parse_arguments
from moellava.train.intact import write_digests
from moellava.vlm import VLM, open_vlm
from tests.processes import ROOT, train_here, words_of
from tests.tiny import reopen, weights_of

# One worker runs this module: its fixtures train a stage each.
pytestmark = pytest.mark.xdist_group("lora")

LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "save_total_limit": 9}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Repeatable to the bit, as the runs in processes of their own are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, flags_for) -> Path:
    """Stage 1, then stages 2 and 3 with adapters and dropout."""
    root = tmp_path_factory.mktemp("lora")
    train_here(flags_for(root, "pretrain"))
    train_here(flags_for(root, "finetune") | LORA)
    train_here(flags_for(root, "moe") | LORA)
    return root


# -- what trains ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stage_3_trains_adapters_of_experts_and_routers_in_full(runs):
    before, after = weights_of(runs / "finetune"), weights_of(runs / "moe")
    assert all(torch.equal(before[name], after[name]) for name in before.keys() & after.keys())
    for layer in (0, 2):
        mlp = f"model.language_model.layers.{layer}.mlp"
        for linear in ("gate_proj", "up_proj", "down_proj"):
            experts = [after[f"{mlp}.experts.{expert}.{linear}.weight"] for expert in range(4)]
            assert all(not torch.equal(before[f"{mlp}.{linear}.weight"], expert) for expert in experts)
            change = experts[0] - before[f"{mlp}.{linear}.weight"]
            assert torch.linalg.matrix_rank(change, atol=1e-6) <= LORA["lora_r"]
    table = json.loads((runs / "moe" / "parameters.json").read_text())
    # 2 layers x 4 experts x 3 linears of 32 x 48, r = 4; a router row for each expert
    assert {part: row["trainable"] for part, row in table.items() if row["trainable"]} == {
        "experts": 2 * 4 * 3 * 4 * (32 + 48),
        "routers": 2 * 4 * 32,
    }


def test_stage_2_trains_adapters_of_all_linears_and_the_projector_in_full(runs):
    before, after = weights_of(runs / "pretrain"), weights_of(runs / "finetune")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linears = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    in_decoder = {name for name in changed if "language_model.layers." in name}
    assert {name.split(".")[-2] for name in in_decoder} == linears
    assert len(in_decoder) == 4 * len(linears)
    assert all("multi_modal_projector" in name for name in changed - in_decoder)
    assert changed - in_decoder


def test_the_towers_linears_get_adapters_when_asked(runs, flags_for, tmp_path):
    flags = flags_for(runs, "finetune") | {"use_vision_lora": True, "lora_r": 2, "max_steps": 2}
    folder = train_here(flags | {"freeze_backbone": True, "output_dir": tmp_path / "run"})
    before, after = weights_of(runs / "pretrain"), weights_of(folder)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    tower = {name for name in moved if "vision_tower" in name}
    assert {name.split(".")[-2] for name in tower} == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert all("multi_modal_projector" in name for name in moved - tower) and moved - tower


def upcycled(folder: Path, **options) -> VLM:
    """A stage's model whose layer 1 has two experts."""
    vlm = reopen(folder)
    upcycle(vlm.model, MoESpec(num_experts=[2], moe_layers_idx=[1], **options))
    return vlm


def test_targets_are_the_decoders_linears_and_never_what_routes(runs):
    vlm = upcycled(runs / "pretrain", use_residual=True)
    experts, everything = target_names(vlm, only_experts=True), target_names(vlm, only_experts=False)
    assert len(experts) == (2 + 1) * 3, "two experts and the dense MLP beside them"
    assert all(".layers.1.mlp." in name for name in experts)
    assert len(everything) == len(experts) + 3 * 3 + 4 * 4
    assert not any(part in name for name in everything for part in ("router", "coefficient", "head", "vision"))
    config = LoraConfig(r=2, target_modules=pattern_of(everything))
    attach(vlm.model, config, everything)
    assert [name for name, _ in lora_layers(vlm.model)] == everything


def test_a_target_that_peft_skips_is_an_error_that_names_it(runs):
    vlm = upcycled(runs / "pretrain")
    targets = target_names(vlm, only_experts=True)
    config = LoraConfig(r=2, target_modules=pattern_of(targets), exclude_modules=r".*experts\.1\.up_proj")
    with pytest.raises(UserError, match=r"5 linears where 6 .*experts\.1\.up_proj\. Not meant: none"):
        attach(vlm.model, config, targets)


def test_adapters_are_fp32_beside_16_bit_weights_and_merge_into_16_bits():
    model = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    attach(model, LoraConfig(r=2, target_modules="0"), ["0"])
    assert {parameter.dtype for parameter in lora_parameters(model)} == {torch.float32}
    assert {value.dtype for value in merged(model.state_dict(), 1.0).values()} == {torch.bfloat16}


class HalfUsed(nn.Module):
    """Two linears, the second of which does not count or is not run."""

    def __init__(self, run_second: bool):
        super().__init__()
        self.first, self.second, self.run_second = nn.Linear(4, 4), nn.Linear(4, 4), run_second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + (0.0 * self.second(x) if self.run_second else 0.0)


@pytest.mark.parametrize("run_second", [True, False])
def test_a_run_stops_in_its_first_step_if_an_adapter_gets_no_gradient(run_second):
    model = HalfUsed(run_second)
    attach(model, LoraConfig(r=2, target_modules="first|second"), ["first", "second"])
    watch = GradientWatch(model)
    model(torch.ones(3, 4)).sum().backward()
    with pytest.raises(UserError, match=r"reached 1 of \d trained parts: second"):
        watch.on_pre_optimizer_step(None, None, None)


def test_a_run_whose_adapters_learn_goes_on():
    model = HalfUsed(run_second=False)
    attach(model, LoraConfig(r=2, target_modules="first"), ["first"])
    model.second.requires_grad_(False)
    watch = GradientWatch(model)
    model(torch.ones(3, 4)).sum().backward()
    watch.on_pre_optimizer_step(None, None, None)
    assert not watch.handles, "only the first step is watched"


def test_experts_without_a_gradient_stop_a_real_run(runs, flags_for, tmp_path, monkeypatch):
    loop = "moellava.moe.experts.loop_over_experts"
    monkeypatch.setattr(loop, lambda experts, x_TD, dispatch: x_TD.detach())
    with pytest.raises(UserError, match="the experts of layer 0, the experts of layer 2"):
        train_here(flags_for(runs, "moe") | LORA | {"output_dir": tmp_path / "dead"})


# -- what a run leaves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["finetune", "moe"])
def test_a_killed_run_goes_on_to_exactly_the_same_losses(stage, runs, flags_for, losses_of, tmp_path, begin_at):
    folder = begin_at(2, runs / stage, tmp_path / stage)
    train_here(flags_for(runs, stage) | LORA | {"output_dir": folder})
    assert losses_of(folder) == losses_of(runs / stage)
    mine, reference = weights_of(folder), weights_of(runs / stage)
    assert all(torch.equal(mine[name], reference[name]) for name in reference)


def test_another_rank_is_another_run(runs, flags_for, tmp_path, begin_at):
    folder = begin_at(2, runs / "finetune", tmp_path / "again")
    with pytest.raises(UserError, match="--lora_r: 4 there, 8 now"):
        train_here(flags_for(runs, "finetune") | LORA | {"lora_r": 8, "output_dir": folder})


def test_a_base_that_has_changed_meanwhile_is_refused(runs, flags_for, tmp_path, begin_at):
    """What lies under the adapter is built anew, so it has to be the same."""
    folder = begin_at(2, runs / "moe", tmp_path / "again")
    origin = folder / "checkpoint-2" / "adapter" / "origin.json"
    content = json.loads(origin.read_text())
    origin.write_text(json.dumps(content | {"fingerprint": 1.01 * content["fingerprint"]}))
    (origin.parent / DIGESTS).unlink()
    write_digests(folder / "checkpoint-2")  # as one whose base differs would be written
    with pytest.raises(UserError, match="--model_name_or_path .* is not what the adapter has learnt on"):
        train_here(flags_for(runs, "moe") | LORA | {"output_dir": folder})


def test_plain_transformers_and_plain_peft_compute_what_the_stage_2_folder_does(runs):
    """The merged folder opens without moellava; so does the adapter, with peft, on the folder that it has learnt on."""
    vlm = reopen(runs / "finetune")
    probes = vlm.probes()
    ours = merge_lora.probe_logits(vlm, probes)
    plain = LlavaForConditionalGeneration.from_pretrained(runs / "finetune").eval()
    base = LlavaForConditionalGeneration.from_pretrained(runs / "pretrain")
    with_peft = PeftModel.from_pretrained(base, runs / "finetune" / "adapter").eval()
    without_us, by_peft = (merge_lora.probe_logits(replace(vlm, model=model), probes) for model in (plain, with_peft))
    assert max(merge_lora.largest_difference(ours, without_us).values()) == 0.0
    assert max(merge_lora.largest_difference(ours, by_peft).values()) < 1e-5


def test_gradient_checkpointing_changes_no_loss(runs, flags_for, losses_of, tmp_path):
    flags = flags_for(runs, "moe") | LORA | {"output_dir": tmp_path / "moe", "gradient_checkpointing": True}
    train_here(flags)
    assert losses_of(tmp_path / "moe") == pytest.approx(losses_of(runs / "moe"), abs=1e-5)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_train_when_asked_and_are_merged(bias, runs, flags_for, tmp_path):
    flags = flags_for(runs, "moe") | LORA | {"only_lora_ffn": False, "lora_bias": bias, "max_steps": 2}
    folder = train_here(flags | {"output_dir": tmp_path / "run"})
    before, after = weights_of(runs / "finetune"), weights_of(folder)
    biases = [name for name in before if ".language_model.layers." in name and name.endswith(".bias")]
    assert len(biases) == 4 * 3, "Qwen2 has them on query, key and value"
    assert all(not torch.equal(before[name], after[name]) for name in biases)
    merge_lora.merge(str(runs / "finetune"), folder / "adapter", tmp_path / "merged")
    assert all(torch.equal(value, after[name]) for name, value in weights_of(tmp_path / "merged").items())


# -- quantised -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_runs_merge_what_they_have_computed_with(bits, runs, flags_for, losses_of, tmp_path, begin_at):
    flags = flags_for(runs, "moe") | LORA | {"bits": bits, "max_steps": 4}
    folder = train_here(flags | {"output_dir": tmp_path / "run"})
    before, after = weights_of(runs / "finetune"), weights_of(folder)
    query = "model.language_model.layers.1.self_attn.q_proj.weight"
    step = before[query].abs().max() * {4: 0.4, 8: 0.01}[bits]
    assert 0 < (before[query] - after[query]).abs().max() < step, "every linear of the decoder is rounded"
    kept = [name for name in before if "norm" in name or "embed" in name or "head" in name]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    table = json.loads((folder / "parameters.json").read_text())
    assert table["experts"]["frozen"] == 2 * 4 * 3 * 32 * 48, "in numbers, not in bytes"
    resumed = begin_at(2, folder, tmp_path / "resumed")
    train_here(flags | {"output_dir": resumed})
    assert losses_of(resumed) == losses_of(folder)
    merge_lora.merge(str(runs / "finetune"), folder / "adapter", tmp_path / "merged")
    assert all(torch.equal(value, after[name]) for name, value in weights_of(tmp_path / "merged").items())


def test_quantising_without_bitsandbytes_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "moellava.adapters.quantize", raising=False)
    with pytest.raises(UserError, match=r"bitsandbytes.*moellava\[quant\]"):
        import moellava.adapters.quantize  # noqa: F401


# -- merge-lora ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "base"), [("finetune", "pretrain"), ("moe", "finetune")])
def test_merge_lora_gives_the_runs_own_folder(stage, base, runs, tmp_path, capsys):
    out = tmp_path / "merged"
    words = ["--model-path", str(runs / base), "--adapter", str(runs / stage / "adapter"), "--output-dir", str(out)]
    assert main(["merge-lora", *words]) == 0
    printed = capsys.readouterr().out
    assert "merging changes them by      max |Δ|" in printed
    assert "with an image" in printed
    assert "without an image" in printed
    mine, reference = weights_of(out), weights_of(runs / stage)
    assert mine.keys() == reference.keys()
    assert all(torch.equal(mine[name], reference[name]) for name in mine)
    for file in ("chat_template.jinja", "processor_config.json", "tokenizer.json", "README.md"):
        assert (out / file).read_bytes() == (runs / stage / file).read_bytes()
    assert reopen(out).model.config.moellava == reopen(runs / stage).model.config.moellava
    assert main(["merge-lora", *words]) == 2, "the folder already holds a model"


def test_an_adapter_that_peft_wrote_is_merged(runs, tmp_path):
    torch.manual_seed(0)
    base = LlavaForConditionalGeneration.from_pretrained(runs / "finetune")
    names = ["q_proj", "down_proj"]
    wrapped = PeftModel(base, LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|down_proj)"))
    for parameter in lora_parameters(wrapped):
        nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(tmp_path / "peft")
    found = merge_lora.merge(str(runs / "finetune"), tmp_path / "peft", tmp_path / "merged")
    assert found["adapter"]["with an image"] > 1e-3
    before, after = weights_of(runs / "finetune"), weights_of(tmp_path / "merged")
    assert {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])} == set(names)


def test_a_variant_of_lora_is_refused_by_name(runs, tmp_path):
    shutil.copytree(runs / "finetune" / "adapter", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    (tmp_path / "adapter" / DIGESTS).unlink()
    with pytest.raises(UserError, match="variant of LoRA .use_rslora."):
        merge_lora.merge(str(runs / "pretrain"), tmp_path / "adapter", tmp_path / "merged")


def test_quantised_linears_under_zero_3_are_refused(runs, flags_for, tmp_path):
    model_args, _, moe_args, args = parse_arguments(words_of(flags_for(runs, "finetune") | LORA | {"bits": 4}))
    args.deepspeed = str(ROOT / "scripts" / "zero3.json")
    with pytest.raises(UserError, match=r"--bits 4 and --deepspeed .*zero3\.json"):
        adapt(reopen(runs / "pretrain"), model_args, moe_args, args)


def test_another_base_is_refused(runs, tmp_path, capsys):
    words = ["--model-path", str(runs / "pretrain"), "--adapter", str(runs / "moe" / "adapter")]
    assert main(["merge-lora", *words, "--output-dir", str(tmp_path / "merged")]) == 2
    assert "is not what the adapter has learnt on" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_changes_logits_writes_nothing(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_lora, "merged", lambda state, scaling: merged(state, 2 * scaling))
    with pytest.raises(UserError, match="more than rounding"):
        merge_lora.merge(str(runs / "pretrain"), runs / "finetune" / "adapter", tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_16_bits_is_merged_in_16_bits(runs, tmp_path):
    open_vlm(runs / "pretrain", device="cpu", dtype=torch.bfloat16).save(tmp_path / "base")
    shutil.copytree(runs / "finetune" / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "origin.json").write_text(json.dumps({"dtype": "bfloat16"}))
    (tmp_path / "adapter" / DIGESTS).unlink()
    found = merge_lora.merge(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")
    assert max(found["folder"].values()) == 0.0
    assert {value.dtype for value in weights_of(tmp_path / "merged").values()} == {torch.bfloat16}


def test_a_folder_without_an_adapter_is_refused(runs):
    with pytest.raises(UserError, match=r"holds no adapter_config\.json"):
        merge_lora.merge(str(runs / "pretrain"), runs / "pretrain", runs / "merged")


# -- flags ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--lora_r 8", "--lora_r 8: needs --lora_enable True"),
        ("--bits 4", "--bits 4: needs --lora_enable True"),
        ("--lora_enable True --tune_mm_mlp_adapter True", "--tune_mm_mlp_adapter True conflict"),
        ("--lora_enable True --freeze_backbone True", "--freeze_backbone True conflict"),
        ("--lora_enable True --moe_enable True --train_modules fc1", "--train_modules conflict"),
        ("--lora_enable True --lora_bias some", "--lora_bias some"),
        ("--lora_enable True --lora_dropout 1", "--lora_dropout 1"),
        ("--lora_enable True --lora_r 0", "--lora_r 0"),
        ("--lora_enable True --bits 2", "--bits 2"),
        ("--lora_enable True --bits 4 --quant_type int4", "--quant_type int4"),
        ("--lora_enable True --double_quant False", "--double_quant need --bits 4"),
    ],
)
def test_a_flag_that_cannot_be_served_is_refused_by_name(flags, named):
    with pytest.raises(UserError, match=named):
        parse_arguments(["--model_name_or_path", "m", "--data_path", "a.json", "--output_dir", "o", *flags.split()])


# -- real processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_that_share_quantised_experts_train_as_one(runs, run_train, flags_for, losses_of, tmp_path):
    """DeepSpeed with ep_size 2 against the native engine with twice the batch: adapters are marked as experts are."""
    flags = flags_for(runs, "moe") | LORA | {"bits": 4, "lora_dropout": 0.0, "max_steps": 3}
    samples = {"eval_data_path": flags["data_path"], "eval_strategy": "steps", "eval_steps": 3, "eval_samples": 1}
    spread = run_train(flags | samples | {"ep_size": 2, "output_dir": tmp_path / "spread"}, processes=2)
    assert spread.returncode == 0, (spread.stdout + spread.stderr)[-3000:]
    assert (spread.stdout + spread.stderr).count("Sample answer at step 3") == 1, "answered together, shown once"
    single = train_here(flags | {"per_device_train_batch_size": 4, "output_dir": tmp_path / "single"})
    assert losses_of(tmp_path / "spread") == pytest.approx(losses_of(single), abs=1e-4)
    mine, reference = weights_of(tmp_path / "spread"), weights_of(single)
    assert mine.keys() == reference.keys()
    assert all(torch.allclose(mine[name], reference[name], atol=1e-4) for name in reference)
