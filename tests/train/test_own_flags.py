# SPDX-License-Identifier: Apache-2.0
"""Each flag of ours, with a value that is not its default, from each start: it changes what is put together before step
0, or is refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import set_seed

from moellava.adapters.lora import trainable_parameters
from moellava.data.dataset import SupervisedDataset
from moellava.data.records import Problem, load_records
from moellava.data.skip_lists import write_skip_list
from moellava.errors import UserError
from moellava.moe import MoESpec, upcycle
from moellava.train.arguments import ARGUMENT_CLASSES, DataArguments, parse_arguments
from moellava.train.assemble import assemble
from moellava.train.hf_flags import hf_names
from moellava.train.stages import freeze_all_but, stage_of
from moellava.train.train import make_dataset, make_trainer, read_data, tell_idle_media_flags
from moellava.train.trainer import StageTrainer
from tests import tiny
from tests.older import RENAMED
from tests.processes import Flags, words_of

TESTS = Path(__file__).parent.parent

STARTS = ("parts", "stage 1", "stage 2", "stage 3", "released")
"""What a run starts from; all go on with stage 2, but the sparse folder of stage 3."""

SPARSE = {item.name for item in fields(MoESpec)}
"""Flags that tests/train/test_reconcile.py goes through."""


@pytest.fixture(scope="module")
def root(parts, tmp_path_factory) -> Path:
    """A folder of the starts, and of records: with images, a video, tags of other roles, and a long one."""
    folder = tmp_path_factory.mktemp("own")
    for stage in ("pretrain", "finetune", "moe", "other"):
        vlm = tiny.compose_tiny(parts / "lm", parts / "tower", "plain" if stage == "pretrain" else "qwen")
        if stage == "other":
            vlm.parts["projector"].apply(lambda part: [value.data.mul_(2) for value in part.parameters(recurse=False)])
        if stage == "moe":
            upcycle(vlm.model, MoESpec())
            vlm.sparse(MoESpec())
        vlm.save(folder / stage, meta={"stage": stage})
    # Without our section a dense folder is what the hub holds of LLaVA 1.5.
    for source, name in (("finetune", "released"), ("other", "another")):
        config = json.loads((folder / source / "config.json").read_text())
        shutil.copytree(folder / source, folder / name)
        del config["moellava"]
        (folder / name / "digests.json").unlink()
        (folder / name / "config.json").write_text(json.dumps(config))
    tiny.write_pictures(folder / "images")
    Image.new("RGB", (60, 60)).save(folder / "outside.png")
    (folder / "videos").mkdir()
    tiny.write_video(folder / "videos" / "clip.mp4", [Image.new("RGB", (32, 32), (9 * n, 0, 0)) for n in range(12)])
    (folder / "images" / "clip.mp4").symlink_to(folder / "videos" / "clip.mp4")
    (folder / "images" / "torn.png").write_bytes(b"torn")
    shown = tiny.record("a", "<image>\nwhat?", "a shape", image="0.png")
    sets = {
        "data": [shown, tiny.record("b", "and red?", "no " * 80)],
        "clip": [tiny.record("v", "<video>\nwhat?", "a clip", video="clip.mp4")],
        "torn": [shown, tiny.record("t", "<image>\nwhat?", "a shape", image="torn.png")],
        "captions": [tiny.record("c", "<image>", "a shape", image="0.png")],
        "out": [tiny.record("o", "<image>\nwhat?", "a shape", image="../outside.png")],
        "asked": [tiny.record("r", "hi", "ho", roles=("me", "gpt"))],
        "said": [tiny.record("r", "hi", "ho", roles=("human", "it"))],
    }
    for name, records in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    write_skip_list(folder / "skip", [Problem(load_records(folder / "data.json").key(1), "too long")])
    return folder


@pytest.fixture(scope="module")
def base(parts, root) -> Callable[[str], Flags]:
    """start -> the flags of a run from it."""
    own: dict[str, Flags] = {
        "parts": {"model_name_or_path": parts / "lm", "image_tower": parts / "tower", "untrained_projector": True},
        "stage 1": {"model_name_or_path": root / "pretrain"},
        "stage 2": {"model_name_or_path": root / "finetune"},
        "stage 3": {"model_name_or_path": root / "moe", "moe_enable": True},
        "released": {"model_local_path": root / "released"},
    }
    common = {"data_path": root / "data.json", "image_folder": root / "images", "output_dir": root / "out"}
    return lambda start: common | {"report_to": "none"} | own[start]


@pytest.fixture(scope="module")
def put_together(base, root) -> Callable[[str, Flags], dict[str, str]]:
    """(start, flags) -> what is known of the run before step 0, or {'refused': the message}."""
    made: dict[str, dict[str, str]] = {}

    def make(start: str, flags: Flags) -> dict[str, str]:
        filled = {n: v.format(root=root) if isinstance(v, str) else v for n, v in flags.items()}
        words = words_of(base(start) | filled)
        key = " ".join(words)
        if key not in made:
            try:
                made[key] = facts(words)
            except UserError as error:
                made[key] = {"refused": str(error)}
        return made[key]

    return make


TOWER_FIELDS = ("vision_feature_layer", "vision_feature_select_strategy")


def facts(words: list[str]) -> dict[str, str]:
    """What a run is made of: sections, weights, what trains, adapters, and every sample."""
    groups = parse_arguments(words)
    model_args, data_args, moe_args, args = groups
    stage = stage_of(model_args, moe_args)
    set_seed(0)
    assembled = assemble(stage, *groups)
    vlm, adapter = assembled.vlm, assembled.adapter
    freeze_all_but(
        vlm.model, trainable_parameters(vlm, adapter) if adapter else stage.selects(vlm, model_args, moe_args)
    )
    dataset, others = (make_dataset(records, vlm, data_args, args) for records in read_data(model_args, data_args))
    batch = vlm.collator(train_questions=not model_args.mask_question_tokens)([dataset[n] for n in range(len(dataset))])
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    return {
        "section": str(asdict(vlm.section)),
        "tower": str([getattr(vlm.model.config, name, None) for name in TOWER_FIELDS]),
        "routing": str(vlm.spec),
        "attention": str(vlm.model.config._attn_implementation),
        "weights": str({name: float(value.double().abs().sum()) for name, value in vlm.model.named_parameters()}),
        "trained": str([name for name, value in vlm.model.named_parameters() if value.requires_grad]),
        "adapter": str(adapter and (adapter.origin, adapter.config.to_dict())),
        "batch": str([(name, value.shape, float(value.double().sum())) for name, value in tensors.items()]),
        "report": str(dataset.report()),
        "evaluated": str(others and len(others)),
    }


LORA: Flags = {"lora_enable": True, "lora_r": 4, "only_lora_ffn": False}

VALUES: dict[str, tuple[object, Flags]] = {
    "model_name_or_path": ("{root}/other", {}),
    "model_local_path": ("{root}/another", {}),
    "trust_remote_code": (True, {}),
    "train_vision_encoder": (True, {}),
    "train_vision_projector": (True, {}),
    "use_vision_lora": (True, {}),
    "use_lora": (True, {}),
    "mask_question_tokens": (False, {}),
    "user_key": ("me", {"data_path": "{root}/asked.json"}),
    "assistant_key": ("it", {"data_path": "{root}/said.json"}),
    "version": ("v1", {}),
    "force_version": (True, {"version": "v1"}),
    "image_tower": ("{root}/images", {}),
    "image_projector_type": ("mlp2x_gelu", {}),
    "mm_vision_select_layer": (-2, {}),
    "mm_vision_select_feature": ("cls_patch", {}),
    "mm_use_im_start_end": (True, {}),
    "pretrain_mm_mlp_adapter": ("{root}/other", {}),
    "untrained_projector": (True, {}),
    "tune_mm_mlp_adapter": (True, {"data_path": "{root}/captions.json", "untrained_projector": None}),
    "freeze_mm_mlp_adapter": (True, {}),
    "freeze_backbone": (True, {}),
    "attn_implementation": ("eager", {}),
    "data_path": ("{root}/clip.json", {}),
    "eval_data_path": ("{root}/data.json", {"eval_strategy": "epoch"}),
    "image_folder": ("{root}/videos", {}),
    "video_folder": ("{root}/nowhere", {"data_path": "{root}/clip.json"}),
    "confine_media": (True, {"data_path": "{root}/out.json"}),
    "num_frames": (2, {"data_path": "{root}/clip.json"}),
    "image_aspect_ratio": ("pad", {}),
    "image_grid_pinpoints": ("(1x1),...,(2x2)", {}),
    "is_multimodal": (False, {}),
    "overlong": ("drop", {"model_max_length": 200}),
    "bad_files": ("skip", {"data_path": "{root}/torn.json"}),
    "max_image_pixels": (100, {}),
    "max_image_side": (20, {}),
    "max_aspect_ratio": (1.1, {}),
    "skip_list": ("{root}/skip", {}),
    "moe_enable": (True, {}),
    "moe_preset": ("moe-llava", {}),
    "ep_size": (2, {}),
    "fsdp_size": (2, {}),
    "train_modules": ("wg", {}),
    "lora_enable": (True, {}),
    "lora_r": (2, LORA),
    "lora_alpha": (8, LORA),
    "lora_dropout": (0.5, LORA),
    "lora_bias": ("lora_only", LORA),
    "only_lora_ffn": (False, LORA),
    "model_max_length": (200, {}),
}
"""Flag -> a value, and flags that it needs, which the run that it is compared with has too."""

FOLDERS = ("stage 1", "stage 2", "stage 3")
DENSE = ("parts", "stage 1", "stage 2", "released")
OWN_PARTS = dict.fromkeys(FOLDERS, "was put together with|released model")
CONFLICTS = {"released": "conflicts with --model_id and --model_local_path"}


def everywhere(words: str, starts: tuple[str, ...] = STARTS) -> dict[str, str]:
    """Words of a refusal from each start."""
    return dict.fromkeys(starts, words)


REFUSED: dict[str, dict[str, str]] = {
    "model_name_or_path": {
        "parts": "--image_tower .* conflicts with .*--model_name_or_path",
    }
    | CONFLICTS,
    "model_local_path": everywhere("--model_name_or_path .* conflicts with .*--model_local_path", ("parts", *FOLDERS)),
    "trust_remote_code": everywhere("--trust_remote_code True, but .* Leave the flag out"),
    "use_vision_lora": {"stage 3": "--use_vision_lora True and --moe_enable True"},
    "version": everywhere("--version v1 does not fit"),
    "image_tower": everywhere("--image_tower .*conflicts", FOLDERS)
    | {"parts": "--image_tower .*config.json"}
    | CONFLICTS,
    "image_projector_type": OWN_PARTS | CONFLICTS,
    "mm_vision_select_layer": OWN_PARTS | CONFLICTS,
    "mm_vision_select_feature": OWN_PARTS | CONFLICTS,
    "mm_use_im_start_end": OWN_PARTS | CONFLICTS,
    "pretrain_mm_mlp_adapter": {"parts": "--untrained_projector True, but the projector has been trained"} | CONFLICTS,
    "untrained_projector": everywhere("the projector has been trained", (*FOLDERS, "released")),
    "tune_mm_mlp_adapter": {
        "stage 3": "--tune_mm_mlp_adapter True .* and --moe_enable True",
        "released": "--tune_mm_mlp_adapter True .stage 1. is for composed models",
    },
    "freeze_backbone": {
        "stage 3": "--freeze_backbone True and --moe_enable True",
        "released": "--freeze_backbone True and --freeze_mm_mlp_adapter True",
    },
    "image_folder": everywhere("videos/0.png: no such image file"),
    "video_folder": everywhere("nowhere/clip.mp4: no such video file"),
    "confine_media": everywhere("outside.png"),
    "image_aspect_ratio": {"released": "--image_aspect_ratio pad: .* is a released model"},
    "image_grid_pinpoints": {"parts": "--image_grid_pinpoints .* needs --image_aspect_ratio anyres"}
    | dict.fromkeys((*FOLDERS, "released"), "--image_grid_pinpoints .* was put together with"),
    "is_multimodal": everywhere("--is_multimodal False"),
    "max_image_pixels": everywhere("--max_image_pixels"),
    "max_image_side": everywhere("--max_image_side"),
    "max_aspect_ratio": everywhere("--max_aspect_ratio"),
    "moe_enable": {
        "parts": "--moe_enable True .stage 3. starts from a stage-2 folder",
        "stage 1": "--moe_enable True .stage 3. starts from a stage-2 folder",
    },
    "moe_preset": everywhere("need --moe_enable True.*--moe_preset moe-llava", DENSE),
    "ep_size": everywhere("--ep_size 2 needs --deepspeed .* or --fsdp_size"),
    "fsdp_size": everywhere("--fsdp_size 2: a number that divides the 1 processes of this run"),
    "train_modules": everywhere("--train_modules is read in stage 3 only", DENSE),
}
"""Flag -> start -> words of the refusal. Where no words stand, the flag acts."""

AS_IT_IS: dict[str, tuple[str, ...]] = {
    "train_vision_projector": ("parts", "stage 1", "stage 2"),
    "untrained_projector": ("parts",),
    "freeze_mm_mlp_adapter": ("stage 3", "released"),
    "moe_enable": ("stage 3",),
    "only_lora_ffn": DENSE,
}
"""Flag -> starts whose runs are without it as it says; or which have it in their base."""

ELSEWHERE = {
    "model_id": "lmm/test_loaders.py",
    "plugin": "test_plugins.py",
    "q_lora": "lmm/test_adapters.py",
    "bits": "adapters/test_lora.py",
    "double_quant": "adapters/test_lora.py",
    "quant_type": "adapters/test_lora.py",
    "cache_dir": "train/test_arguments.py",
    "eval_samples": "train/test_samples.py",
    "eval_task": "train/test_tasks.py",
    "eval_task_folder": "train/test_tasks.py",
    "eval_task_limit": "train/test_tasks.py",
    "skip_dry_save": "train/test_train.py",
    "report_html": "vis/test_report.py",
    "packing": "train/test_packing.py",
    "moe_kernel": "moe/test_kernels.py",
    "cache_features": "train/test_known_features.py",
    "cache_pixels": "train/test_known_pixels.py",
}
"""Flag -> the file that shows what it does."""

HERE = {"lazy_preprocess", "group_by_modality_length", "mm_projector_lr"}
"""Flags of the tests below."""


def test_every_flag_of_ours_is_judged_once():
    """A new flag fails here: give it a value above, and say where it acts and where it is refused."""
    own = {item.name for group in ARGUMENT_CLASSES for item in fields(group)} - set(hf_names()) - RENAMED - SPARSE
    judged = [*VALUES, *ELSEWHERE, *HERE]
    assert sorted(judged) == sorted(own)
    assert REFUSED.keys() | AS_IT_IS.keys() <= VALUES.keys()
    assert not [name for name in ELSEWHERE if name not in (TESTS / ELSEWHERE[name]).read_text()]


def cells() -> list[Any]:
    """Every flag from every start. Those that a stage-2 folder refuses are quick."""
    cases = [(name, start) for start in STARTS for name in VALUES]
    is_quick = {(name, "stage 2") for name, words in REFUSED.items() if "stage 2" in words}
    marks = {case: [] if case in is_quick else [pytest.mark.slow] for case in cases}
    return [pytest.param(*case, marks=marks[case], id="-".join(case)) for case in cases]


@pytest.mark.parametrize(("name", "start"), cells())
def test_a_flag_acts_or_is_refused_by_name(name, start, put_together):
    value, needed = VALUES[name]
    words = REFUSED.get(name, {}).get(start)
    given = put_together(start, needed | {name: value})
    if words is not None:
        assert re.search(words, given.get("refused", "acts"), re.DOTALL), given
        return
    assert "refused" not in given
    without = {flag: said for flag, said in needed.items() if flag != name}
    assert (given == put_together(start, without)) == (start in AS_IT_IS.get(name, ()))


@pytest.fixture(scope="module")
def trainer_of(base, root) -> Callable[..., StageTrainer]:
    """(flags) -> the trainer of a run from a stage-2 folder."""

    def make(**flags: object) -> StageTrainer:
        groups = parse_arguments(words_of(base("stage 2") | flags))
        stage = stage_of(groups[0], groups[2])
        assembled = assemble(stage, *groups)
        dataset = make_dataset(read_data(*groups[:2])[0], assembled.vlm, groups[1], groups[3])
        return make_trainer(stage, assembled, None, groups[0], groups[3], {"train_dataset": dataset})

    return make


def test_a_projector_has_its_own_rate(trainer_of):
    groups = trainer_of(mm_projector_lr=0.25, learning_rate=0.5).create_optimizer().param_groups
    assert {group["lr"] for group in groups} == {0.25, 0.5}


def test_batches_of_one_modality_are_drawn_otherwise(trainer_of, parts):
    data = {"data_path": parts / "sft.json", "image_folder": parts / "images", "per_device_train_batch_size": 4}
    orders = [list(trainer_of(**data, group_by_modality_length=one)._get_train_sampler()) for one in (True, False)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_all_records_may_be_read_before_step_0(trainer_of, monkeypatch):
    read, made = [], SupervisedDataset.__getitem__
    monkeypatch.setattr(SupervisedDataset, "__getitem__", lambda self, index: read.append(index) or made(self, index))
    trainer_of()
    assert read == []
    trainer_of(lazy_preprocess=False)
    assert read == [0, 1]


@pytest.mark.parametrize(
    ("flags", "modalities", "told"),
    [
        (
            {"image_folder": "f", "num_frames": 3},
            {"image"},
            ["--num_frames 3 does nothing: .* no videos"],
        ),
        ({"image_folder": "f", "video_folder": "v"}, {"video"}, ["--image_folder f does nothing"]),
        ({"image_folder": "f", "confine_media": True}, set(), ["--image_folder f", "--confine_media True"]),
        ({"image_folder": "f"}, {"video"}, []),
    ],
)
def test_flags_about_media_that_no_record_shows_are_told(flags, modalities, told, caplog):
    tell_idle_media_flags(DataArguments(**flags), modalities)
    assert len(caplog.messages) == len(told)
    assert all(re.search(words, said) for words, said in zip(told, caplog.messages, strict=True))
