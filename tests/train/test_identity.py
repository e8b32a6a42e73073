# SPDX-License-Identifier: Apache-2.0
"""A run is known by all that changes its numbers: every flag, and weights, data and files by content."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

from moellava.data.media import MediaFiles
from moellava.data.records import load_records
from moellava.errors import UserError
from moellava.train import identity as known
from moellava.train.arguments import ARGUMENT_CLASSES, parse_arguments
from moellava.train.checkpoint import require_same
from moellava.train.deepspeed.named import names, settings_named
from moellava.train.deepspeed.settings import WITHOUT_EFFECT as WITHOUT_DEEPSPEEDS
from moellava.train.deepspeed.settings import decisive
from moellava.train.identity import WITHOUT_EFFECT, run_identity, settings_content
from tests.processes import train_here
from tests.tiny import record, weights_of

EVERY_FLAG = {field.name for group in ARGUMENT_CLASSES for field in fields(group)}


def test_every_flag_counts_or_is_known_not_to():
    given = ["--model_name_or_path", "lm", "--data_path", "d.json", "--output_dir", "out", "--image_tower", "tower"]
    identity = run_identity("finetune", parse_arguments(given), 1)
    counted = {name.removeprefix("--") for name in identity} - {"stage", known.SAMPLES}
    assert counted | WITHOUT_EFFECT.keys() == EVERY_FLAG
    assert not counted & WITHOUT_EFFECT.keys()
    assert all(reason for reason in WITHOUT_EFFECT.values())
    assert json.loads(json.dumps(identity)) == identity


@pytest.fixture(scope="module")
def finished(parts, flags_for, tmp_path_factory):
    """(flags, folder) of a short run of stage 1 on parts of its own."""
    root = tmp_path_factory.mktemp("identity")
    shutil.copytree(parts, root / "parts")
    flags = flags_for(root, "pretrain") | {"max_steps": 2, "save_steps": 1, "skip_dry_save": True}
    flags |= {"model_name_or_path": root / "parts/lm", "image_tower": root / "parts/tower"}
    flags |= {"data_path": root / "parts/captions.json", "image_folder": root / "parts/images"}
    return flags, train_here(flags)


@pytest.fixture
def copied(finished, tmp_path):
    """The same flags, on copies of all that the run has read and of what it has left."""
    flags, folder = finished
    shutil.copytree(flags["model_name_or_path"].parent, tmp_path / "moved")
    shutil.copytree(folder, tmp_path / "run")
    names = {"model_name_or_path": "lm", "image_tower": "tower", "data_path": "captions.json", "image_folder": "images"}
    return flags | {flag: tmp_path / "moved" / name for flag, name in names.items()} | {"output_dir": tmp_path / "run"}


def edit_data(root):
    path = root / "captions.json"
    records = json.loads(path.read_text())
    records[3]["conversations"][1]["value"] += "!"
    path.write_text(json.dumps(records))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = content[len(content) // 2 :][::-1]
    path.write_bytes(content)


CHANGES = {
    "content of --data_path:": edit_data,
    "content of --data_path's images": lambda root: flip(sorted((root / "images").iterdir())[0]),
    "content of --image_tower": lambda root: flip(root / "tower/model.safetensors"),
    "content of the model": lambda root: flip(root / "lm/model.safetensors"),
}


@pytest.mark.parametrize("named", CHANGES)
def test_what_a_run_reads_is_compared_by_content(named, copied, tmp_path):
    CHANGES[named](tmp_path / "moved")
    with pytest.raises(UserError, match=named):
        train_here(copied)


def test_a_run_whose_files_have_moved_has_nothing_to_do(copied, finished, caplog):
    train_here(copied)
    assert "Nothing to do" in caplog.text


@pytest.mark.parametrize("flag, value", [("weight_decay", 0.5), ("max_grad_norm", 0.1), ("overlong", "drop")])
def test_a_flag_that_changes_numbers_is_named(flag, value, copied):
    with pytest.raises(UserError, match=f"--{flag}: .* there, '?{value}'? now"):
        train_here(copied | {flag: value})


def test_flags_without_effect_may_change(copied, caplog):
    train_here(copied | {"logging_steps": 2, "dataloader_num_workers": 1, "save_strategy": "no"})
    assert "Nothing to do" in caplog.text


@pytest.mark.slow
def test_a_finished_run_is_trained_longer_as_the_message_says(copied, tmp_path):
    with pytest.raises(UserError, match="--max_steps: 2 there, 3 now") as error:
        train_here(copied | {"max_steps": 3})
    assert f"--model_name_or_path {tmp_path / 'run'}" in str(error.value)
    left_out = dict.fromkeys(("image_tower", "image_projector_type", "pretrain_mm_mlp_adapter"))
    longer = {"model_name_or_path": tmp_path / "run", "max_steps": 1, "output_dir": tmp_path / "longer"}
    further = weights_of(train_here(copied | left_out | longer))
    assert any(not further[name].equal(value) for name, value in weights_of(tmp_path / "run").items())


def test_the_content_of_images_is_read_once(image_tree, data_file, tmp_path, monkeypatch):
    monkeypatch.setenv("MOELLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("moellava.data.findings.KEPT_FROM", 1)
    monkeypatch.setattr(known, "SLICE", 1)
    names = ["a.png", "sub/b.jpg", "a.png", "gone.png"]
    records = load_records(data_file([record(n, "<image>", "a", image=name) for n, name in enumerate(names)]))
    read = [known.ends_digest(image_tree / name) for name in ("a.png", "sub/b.jpg", "gone.png")]
    expected = f"3 files, {known.combined(read)}"
    assert known.media_content(records, MediaFiles(image_tree)) == expected
    seen, real = [], known.ends_digest
    monkeypatch.setattr(known, "ends_digest", lambda path: seen.append(path.name) or real(path))
    assert known.media_content(records, MediaFiles(image_tree)) == expected and seen == ["gone.png"]
    text = load_records(data_file([record(1, "q", "a")], "text.json"))
    assert known.media_content(text, MediaFiles(image_tree)) == f"0 files, {known.combined([])}"


COUNT = {
    *("bf16.enabled", "fp16.enabled", "fp16.loss_scale", "fp16.initial_scale_power", "fp16.loss_scale_window"),
    *("fp16.hysteresis", "fp16.min_loss_scale", "gradient_clipping"),
    *("zero_optimization.stage", "zero_optimization.offload_optimizer.device", "zero_optimization.sub_group_size"),
}
"""Of the settings that come with the package, those that a run's numbers depend on."""

DO_NOT = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *(
        f"zero_optimization.{name}"
        for name in (
            *("reduce_bucket_size", "overlap_comm", "contiguous_gradients"),
            *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters"),
            *("stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save", "offload_optimizer.pin_memory"),
        )
    ),
}
"""And those by which a run is only faster, or lies elsewhere."""


def leaves(settings: dict[str, object], inside: str = "") -> set[str]:
    """Dotted keys of settings."""
    below = (leaves(v, f"{inside}{k}.") if isinstance(v, dict) else {inside + k} for k, v in settings.items())
    return set().union(*below)


def test_every_setting_of_the_package_counts_or_does_not():
    files = {name: json.loads(Path(str(settings_named(name))).read_text()) for name in names()}
    assert len(files) == 4 and set().union(*(leaves(one) for one in files.values())) == COUNT | DO_NOT
    assert set().union(*(decisive(one) for one in files.values())) == COUNT


def test_settings_that_do_not_count_are_deepspeeds_own():
    """A mistyped one would be refused as before, and nobody would know why."""
    known = {name for key, one in DeepSpeedZeroConfig.model_fields.items() for name in (key, one.alias)}
    known |= {f"offload_optimizer.{name}" for name in DeepSpeedZeroOffloadOptimizerConfig.model_fields}
    known |= {f"offload_param.{name}" for name in DeepSpeedZeroOffloadParamConfig.model_fields}
    zero = {name.removeprefix("zero_optimization.") for name in WITHOUT_DEEPSPEEDS if name.startswith("zero_opt")}
    assert len(zero) > 25 and not zero - known and all(WITHOUT_DEEPSPEEDS.values())


def test_settings_of_deepspeed_differ_by_what_decides_a_step(tmp_path):
    stored = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True}}
    faster = {"steps_per_print": 5, "tensorboard": {"enabled": True}}
    faster |= {
        "zero_optimization": {"stage": 2, "allgather_bucket_size": 10, "offload_optimizer": {"pin_memory": True}}
    }
    assert settings_content(faster, stored) is stored
    for other in ({"zero_optimization": {"stage": 1}}, stored | {"gradient_clipping": 2.0}, stored | {"unknown": 1}):
        assert settings_content(other, stored) is other and settings_content(other, None) is other
    assert settings_content(None, stored) is None
    before, now = {"contents": {"content of --deepspeed": stored}, "finished": False}, stored | {"unknown": 1}
    with pytest.raises(UserError) as refused:
        require_same(tmp_path, before, "contents", {"content of --deepspeed": now | {"steps_per_print": 5}})
    lines = [line for line in str(refused.value).splitlines() if "there" in line]
    assert lines == ["  content of --deepspeed, unknown: None there, 1 now"]
