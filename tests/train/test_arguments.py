# SPDX-License-Identifier: Apache-2.0
"""Flags: conflicts are refused by name and all at once; old spellings work; nothing is accepted in vain."""

import json
import re
from dataclasses import fields

import pytest

from moellava.errors import UserError
from moellava.moe.spec import MoESpec
from moellava.train.arguments import DataArguments, ModelArguments, MoEArguments, RunArguments, parse_arguments
from moellava.train.conflicts import PLACES
from moellava.train.deepspeed.named import FOLDER, names
from tests.processes import ROOT, train_here

BASE = ["--model_name_or_path", "lm", "--data_path", "a.json", "--output_dir", "out"]


def parse(flags=""):
    return parse_arguments([*BASE, *flags.split()])


def test_spellings_of_older_releases_work():
    model, _, _, training = parse(
        "--evaluation_strategy no --warmup_ratio 0.03 --gradient_checkpointing True --vision_tower clip "
        '--gradient_checkpointing_kwargs {"use_reentrant":false}'
    )
    assert training.eval_strategy == "no"
    assert training.warmup_steps == 0.03
    assert training.activation_checkpointing
    assert training.activation_checkpointing_kwargs == {"use_reentrant": False}
    assert model.image_tower == ["clip"]


def test_every_conflict_is_named_in_one_error():
    with pytest.raises(UserError) as caught:
        parse("--tune_mm_mlp_adapter True --freeze_mm_mlp_adapter True --moe_enable True --ep_size 2")
    for flag in ("--freeze_mm_mlp_adapter", "--moe_enable", "--ep_size 2 needs --deepspeed"):
        assert flag in str(caught.value)


def test_an_address_is_no_place_on_this_machine():
    """Data and pictures are read from one; a model is asked for at the hub, and named where that has none."""
    read = {"data_path", "eval_data_path", "image_folder", "model_name_or_path", "model_local_path", "bad_files"}
    read |= {"pretrain_mm_mlp_adapter", "resume_from_checkpoint"}
    own = {item.name for group in (ModelArguments, DataArguments, MoEArguments, RunArguments) for item in fields(group)}
    named = {name for name in own | {"output_dir"} if re.search("dir$|folder|file|path|cache_", name)}
    assert named - read == {*PLACES} and len(PLACES) > 3
    for name in PLACES:
        words = [*BASE, f"--{name}", "s3://bucket/x"]
        with pytest.raises(UserError, match=f"--{name} s3://bucket/x: a place on this machine is needed"):
            parse_arguments(words)
    with pytest.raises(UserError, match="--output_dir simplecache::s3:.*: a place on this machine is needed"):
        parse_arguments([*BASE, "--output_dir", "simplecache::s3://bucket/x"])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--no_such_flag 3", "--no_such_flag"),
        ("--num_experts 8", "--moe_enable"),
        ("--moe_enable True --num_experts 4 --top_k_experts 5", "--top_k_experts 5 does not fit"),
        ("--train_modules fc1", "--train_modules"),
        ("--overlong chop", "--overlong chop"),
        ("--image_aspect_ratio wide", "--image_aspect_ratio wide"),
        ("--video_tower languagebind", "--video_tower"),
        ("--mm_use_im_patch_token True", "--mm_use_im_patch_token"),
        ("--eval_strategy steps", "--eval_data_path"),
        ('--gradient_checkpointing_kwargs {"use_reentrant":true}', "leaves the routers without a gradient"),
        ("--gradient_checkpointing_kwargs none-such", "none-such"),
        ("--moe_enable True --freeze_backbone True", "--freeze_backbone"),
        ("--attn_implementation flash_attention_2", "flash_attention_2 computes in 16 bits alone.*--bf16 True"),
        ("--use_liger_kernel True", "--use_liger_kernel True: is not served: .*Leave the flag out"),
    ],
)
def test_a_flag_that_cannot_be_served_is_refused_by_name(flags, named):
    with pytest.raises(UserError, match=named):
        parse(flags)


RELEASED = ["--data_path", "x.json", "--output_dir", "out", "--report_to", "none"]


def parse_released(flags):
    return parse_arguments([*RELEASED, *flags.split()])


def test_a_released_model_is_found_and_its_projector_rests_unless_asked():
    model, _, _, training = parse_released("--model_id qwen2-vl-2b-instruct")
    assert model.is_released and model.model_name_or_path == "Qwen/Qwen2-VL-2B-Instruct"
    assert model.version is None, "the folder says which template it has"
    assert model.freeze_mm_mlp_adapter and not model.freeze_backbone and not training.lora_enable
    model, *_ = parse_released("--model_local_path /some/folder --train_vision_projector True")
    assert model.model_name_or_path == "/some/folder" and not model.freeze_mm_mlp_adapter


def test_lora_has_two_spellings():
    *_, training = parse_released("--model_id llava-1.5-7b --use_lora True")
    assert training.lora_enable and training.bits == 16
    *_, training = parse_released("--model_id llava-1.5-7b --q_lora True")
    assert training.lora_enable and training.bits == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model_id llava-1.5-7b --image_tower t", "--image_tower t conflicts with --model_id"),
        ("--model_local_path f --model_name_or_path g", "--model_name_or_path g conflicts with --model_id"),
        ("--model_id llava-1.5-7b --tune_mm_mlp_adapter True", "is for composed models"),
        ("--model_id llava-9", "Unknown model id 'llava-9'.*llava-1.5-7b"),
        ("--model_id llava-1.5-7b --freeze_backbone True", "nothing would train"),
        (
            "--model_name_or_path g --train_vision_projector True --freeze_mm_mlp_adapter True",
            "--train_vision_projector True and --freeze_mm_mlp_adapter True conflict",
        ),
    ],
)
def test_conflicts_about_released_models_are_named(flags, message):
    with pytest.raises(UserError, match=message):
        parse_released(flags)


def test_the_vision_encoder_alone_can_train():
    model, *_ = parse_released("--model_id llava-1.5-7b --freeze_backbone True --train_vision_encoder True")
    assert model.train_vision_encoder and model.freeze_backbone


def test_flags_of_released_models_act_for_every_model():
    """That they do is shown in test_train.py and test_assemble.py."""
    model, *_ = parse("--trust_remote_code True --mask_question_tokens False")
    assert model.trust_remote_code and not model.mask_question_tokens and not model.is_released


def test_predecessors_flags_that_are_off_change_nothing():
    parse("--mm_use_im_patch_token False --video_tower None")


def test_missing_essentials_are_listed_together():
    with pytest.raises(UserError) as caught:
        parse_arguments([])
    for flag in ("--model_name_or_path", "--data_path", "--output_dir"):
        assert f"{flag} is missing: " in str(caught.value)


def test_a_capacity_factor_means_that_tokens_are_dropped():
    assert parse("--moe_enable True --capacity_factor 1.5")[2].spec().drop_tokens
    assert not parse("--moe_enable True")[2].spec().drop_tokens


def test_a_preset_gives_way_to_flags():
    spec = parse("--moe_enable True --moe_preset moe-llava --capacity_factor 2")[2].spec()
    assert spec.capacity_factor == 2.0
    assert spec.router_balance == MoESpec.from_preset("moe-llava").router_balance


def test_the_cache_dir_is_where_downloads_go(monkeypatch, tmp_path):
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    seen = []

    def offline(*_, **__):
        seen.append(constants.HF_HUB_CACHE)
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", "before")
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    (tmp_path / "d.json").write_text("[]")
    flags = {"model_name_or_path": "no/model", "data_path": tmp_path / "d.json", "report_to": "none"}
    with pytest.raises(UserError, match="no/model"):
        train_here(flags | {"output_dir": tmp_path / "run", "cache_dir": tmp_path / "cache"})
    assert seen == [str(tmp_path / "cache")]


def test_a_folder_says_itself_whether_images_are_enclosed(tmp_path, flags_for):
    def run(stage, **flags):
        return train_here(flags_for(tmp_path, stage) | {"max_steps": 1, "save_strategy": "no"} | flags)

    run("pretrain", mm_use_im_start_end=True)
    with pytest.raises(UserError, match="without.*set --mm_use_im_start_end True"):
        run("finetune")
    run("finetune", mm_use_im_start_end=True)
    run("moe")  # follows the folder
    for stage in ("finetune", "moe"):
        config = json.loads((tmp_path / stage / "config.json").read_text())
        assert config["moellava"]["use_im_start_end"] is True
    with pytest.raises(UserError, match="--mm_use_im_start_end False, but .* was put together with True"):
        run("moe", mm_use_im_start_end="False", output_dir=tmp_path / "other")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--learning_rat_ 1", "--learning_rat_ is no flag. Did you mean --learning_rate?"),
        ("--learning_rat 1", "--learning_rat is no flag. Did you mean --learning_rate?"),
        ("--output o", "--output is no flag."),
        ("--image-towr t", "--image_towr is no flag. Did you mean --image_tower?"),
        ("stray", "'stray' (after 'out') belongs to no flag"),
        ("--learning_rate fast", "--learning_rate: 'fast' is no number"),
        ("--model_max_length 1.5", "--model_max_length: '1.5' is no whole number"),
        ("--bf16 maybe", "--bf16: 'maybe' is no value of True or False"),
        ("--lr_scheduler_type cosin", "--lr_scheduler_type: 'cosin' is unknown. Did you mean cosine? Known: linear, "),
        ("--deepspeed zero9", "--deepspeed zero9: it takes zero1, zero2, zero2_offload, zero3, none, or a JSON file"),
    ],
)
def test_a_mistyped_flag_or_value_is_answered_in_a_line(flags, said):
    with pytest.raises(UserError) as caught:
        parse(flags)
    line = str(caught.value)
    assert line.startswith(said) and "\n" not in line and "Type." not in line and "<" not in line


@pytest.mark.parametrize("name", names())
def test_settings_of_deepspeed_go_by_their_name(name):
    assert parse(f"--deepspeed {name}")[3].deepspeed == str(FOLDER / f"{name}.json")
    assert (ROOT / "scripts" / f"{name}.json").samefile(FOLDER / f"{name}.json")
    assert parse(f"--deepspeed {name} --deepspeed none")[3].deepspeed is None
