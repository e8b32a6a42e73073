# SPDX-License-Identifier: Apache-2.0
"""A frozen tower sees each picture once; training goes on as without `--cache_features`."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from moellava.errors import UserError
from moellava.model.known_tower import placed, tower_of
from moellava.moe import MoESpec, upcycle
from moellava.train.arguments import parse_arguments
from moellava.train.assemble import assemble
from moellava.train.known_features import refuse_features
from moellava.train.stages import freeze_all_but, stage_of
from moellava.train.train import KEPT, make_dataset, make_trainer, read_data
from tests import tiny
from tests.processes import ROOT, Flags, losses_of, run_train, train_here, words_of

SHORT: Flags = {"save_strategy": "no", "skip_dry_save": True, "max_steps": 3, "learning_rate": "2e-2"}


@pytest.fixture
def seen(monkeypatch) -> list[int]:
    """The pictures and tiles that CLIP's encoder is shown at a time in training; what finds out its shape evaluates."""
    rows: list[int] = []
    encoder = transformers.models.clip.modeling_clip.CLIPVisionEmbeddings
    forward = encoder.forward

    def counted(self, pixel_values, **kwargs):
        if self.training:
            rows.append(len(pixel_values))
        return forward(self, pixel_values, **kwargs)

    monkeypatch.setattr(encoder, "forward", counted)
    return rows


@pytest.mark.slow
def test_losses_are_those_of_a_tower_that_runs_and_a_later_run_has_none(flags_for, seen, tmp_path, caplog):
    # One picture at a time: the last bit of a product of matrices depends on how many rows go together.
    flags = flags_for(tmp_path, "pretrain") | SHORT | {"per_device_train_batch_size": 1}
    plain = train_here(flags | {"output_dir": tmp_path / "plain"})
    known = flags | {"cache_features": tmp_path / "features"}
    seen.clear()
    assert losses_of(train_here(known)) == losses_of(plain)
    probed = 2 + 2 + 1  # the same two pictures twice, and one of them alone
    assert sum(seen) == probed + 1 + 3  # a blank, and the three pictures of 24 records
    assert "Features: 3 pictures, 0 of them known before, 3 computed" in caplog.text
    seen.clear()
    again = train_here(known | {"output_dir": tmp_path / "again", "dataloader_num_workers": 1})
    assert losses_of(again) == losses_of(plain)
    assert seen == []
    assert "Features: 3 pictures, 3 of them known before, 0 computed" in caplog.text
    files = [load_file(folder / "model.safetensors") for folder in (plain, again)]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    transformers.LlavaForConditionalGeneration.from_pretrained(again)


FOLDERS = ("dense", "sparse")


@pytest.fixture(scope="module")
def folders(parts, tmp_path_factory) -> dict[str, Path]:
    """A dense and a sparse folder, and one of a class that takes no features."""
    root = tmp_path_factory.mktemp("folders")
    for name in FOLDERS:
        vlm = tiny.compose_tiny(parts / "lm", parts / "tower", "qwen")
        if name == "sparse":
            upcycle(vlm.model, MoESpec())
            vlm.sparse(MoESpec())
        vlm.save(root / name, meta={"stage": "moe" if name == "sparse" else "finetune"})
    return {name: root / name for name in FOLDERS}


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{"moe_enable": True}, {"packing": True, "model_max_length": 700}], ids=str)
def test_later_stages_share_what_the_first_has_kept(flags, folders, parts, tmp_path, seen):
    start = folders["sparse" if "moe_enable" in flags else "dense"]
    common: Flags = {"model_name_or_path": start, "data_path": parts / "sft.json", "image_folder": parts / "images"}
    common |= SHORT | flags | {"report_to": "none", "use_cpu": True, "eval_data_path": parts / "sft.json"}
    common |= {"eval_strategy": "steps", "eval_steps": 2, "eval_samples": 1, "per_device_train_batch_size": 2}
    plain = train_here(common | {"output_dir": tmp_path / "plain"})
    known = common | {"cache_features": tmp_path / "features"}
    for name in ("first", "second"):
        seen.clear()
        folder = train_here(known | {"output_dir": tmp_path / name})
        assert losses_of(folder) == pytest.approx(losses_of(plain), abs=1e-5)
    assert seen == []


def of_samples(flags: Flags) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """A run's batch of all samples, as their files are read and as what is kept of them; and its trainer."""
    groups = parse_arguments(words_of(flags))
    stage = stage_of(groups[0], groups[2])
    assembled = assemble(stage, *groups)
    freeze_all_but(assembled.vlm.model, stage.selects(assembled.vlm, groups[0], groups[2]))
    (refuse, know), folder = next((KEPT[name], flags[name]) for name in KEPT if name in flags)
    refuse(assembled.vlm, folder, groups[3])
    dataset = make_dataset(read_data(*groups[:2])[0], assembled.vlm, groups[1], groups[3])
    trainer = make_trainer(stage, assembled, None, groups[0], groups[3], {"train_dataset": dataset})
    before = trainer.data_collator([dataset[number] for number in range(len(dataset))])
    know(trainer, Path(folder), [dataset])
    return before, trainer.data_collator([dataset[number] for number in range(len(dataset))]), trainer


@pytest.fixture(scope="module")
def shown(tmp_path_factory, clips) -> Path:
    """Records with one image, several, the same, none, and videos; and their files."""
    root = tmp_path_factory.mktemp("shown")
    for number, size in enumerate([(64, 40), (30, 90), (50, 50)]):
        Image.effect_mandelbrot(size, (-3, -2.5, 2, 2.5 + number), 20).convert("RGB").save(root / f"{number}.png")
    records = [
        tiny.record("a", "<image>\nwhat?", "a shape", image="0.png"),
        tiny.record("b", "<image>\n<image>\nwhat?", "two", image=["1.png", "0.png"]),
        tiny.record("c", "hello?", "yes"),
        tiny.record("d", "<image>\nand?", "red", image="2.png"),
        tiny.record("e", "<video>\nwhat?", "a clip", video=str(clips / "shapes.mp4")),
        tiny.record("f", "<image>\n<video>\nboth?", "no", image="2.png", video=str(clips / "wide.mp4")),
    ]
    (root / "data.json").write_text(json.dumps(records))
    return root


def in_full(parts: Path, data: Path, runs: Path) -> Flags:
    """Flags of a run of `shown`."""
    flags: Flags = {"model_name_or_path": parts / "lm", "image_tower": parts / "tower", "untrained_projector": True}
    flags |= {"data_path": data / "data.json", "image_folder": data, "num_frames": 3, "model_max_length": 900}
    return flags | {"output_dir": runs / "out", "report_to": "none", "cache_features": runs / "features"}


@pytest.mark.parametrize("ratio", ["pad", pytest.param("anyres", marks=pytest.mark.slow), "anyres_max_9"])
def test_features_take_the_place_of_pixels(ratio, parts, shown, tmp_path, seen):
    before, after, trainer = of_samples(in_full(parts, shown, tmp_path) | {"image_aspect_ratio": ratio})
    pixels = [name for name in before if name.startswith("pixel_values")]
    for name in before.keys() - {*pixels, "places", "records"}:
        assert torch.equal(before[name], after[name]), name
    inputs = [
        {name: one[name] for name in one if name not in ("places", "records", "labels")} for one in (before, after)
    ]
    trainer.model.train()
    with torch.no_grad():
        expected = trainer.model(**inputs[0]).logits
        seen.clear()
        found = trainer.model(**inputs[1]).logits
    assert seen == []
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def known(vlm: Any, folder: Path, **args: Any) -> None:
    for parameter in vlm.model.parameters():
        parameter.requires_grad_(False)
    refuse_features(vlm, str(folder), SimpleNamespace(deepspeed=None) if not args else SimpleNamespace(**args))


def test_where_features_cannot_be_kept_the_flag_is_refused_by_name(composed, tmp_path):
    vlm = copy.deepcopy(composed)
    known(vlm, tmp_path / "new")
    with pytest.raises(UserError, match="--cache_features .*ZeRO-3"):
        known(vlm, tmp_path, deepspeed=str(ROOT / "scripts" / "zero3.json"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache_features .*file cannot be written"):
        known(vlm, tmp_path / "file")
    vlm.model.model.vision_tower.requires_grad_(True)
    with pytest.raises(UserError, match="the vision encoder trains"):
        refuse_features(vlm, str(tmp_path), SimpleNamespace(deepspeed=None))
    vlm.model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(UserError, match="several layers"):
        tower_of(vlm.model)
    other = SimpleNamespace(config=transformers.Qwen2VLConfig(), base_model=vlm.model.model)
    with pytest.raises(UserError, match="does not take features in place of pixels, as Llava, LlavaNext"):
        tower_of(other)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ({"train_vision_encoder": True}, "--cache_features .* and --train_vision_encoder True conflict"),
        ({"use_vision_lora": True}, "--cache_features .* and --use_vision_lora True conflict"),
        ({"is_multimodal": False}, "--cache_features .* and --is_multimodal False conflict"),
    ],
)
def test_flags_that_contradict_it(flag, words, parts, tmp_path):
    flags = {"model_name_or_path": parts / "lm", "data_path": parts / "sft.json", "output_dir": tmp_path}
    with pytest.raises(UserError, match=words):
        parse_arguments(words_of(flags | {"cache_features": tmp_path} | flag))


def test_a_tower_that_is_random_is_refused(parts, shown, tmp_path):
    shutil.copytree(parts / "tower", tmp_path / "tower")
    config = json.loads((tmp_path / "tower" / "config.json").read_text())
    (tmp_path / "tower" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    with pytest.raises(UserError, match="gives other features each time"):
        of_samples(in_full(parts, shown, tmp_path) | {"image_tower": tmp_path / "tower"})


def test_a_file_that_is_damaged_or_changes_is_told(parts, shown, tmp_path):
    for name in ("0.png", "1.png", "2.png", "data.json"):
        (tmp_path / name).write_bytes((shown / name).read_bytes())
    flags = in_full(parts, tmp_path, tmp_path) | {"bad_files": "skip"}
    content = bytearray((tmp_path / "2.png").read_bytes())
    content[len(content) // 2] ^= 255  # a hole that head and ending do not show
    (tmp_path / "2.png").write_bytes(content)
    _, _, trainer = of_samples(flags)
    dataset = trainer.train_dataset
    assert [len(dataset[number]["media"]) for number in range(6)] == [1, 2, 0, 0, 3, 0]
    Image.new("RGB", (9, 9)).save(tmp_path / "0.png")
    assert "has changed since this run looked at it" in str(dataset[0]["unreadable"])


@pytest.mark.slow
@pytest.mark.parametrize("flag", KEPT)
def test_two_processes_share_the_work(flag, flags_for, tmp_path):
    flags = flags_for(tmp_path, "pretrain") | SHORT | {"report_to": "none"}
    plain = run_train(flags | {"output_dir": tmp_path / "plain"}, 2, "torchrun")
    kept = run_train(flags | {flag: tmp_path / "kept"}, 2, "torchrun")
    assert "3 pictures, 0 of them known before, 3 computed" in kept.stdout + kept.stderr
    assert plain.returncode == kept.returncode == 0
    assert losses_of(tmp_path / "pretrain") == losses_of(tmp_path / "plain")
    assert len(list((tmp_path / "kept").glob("*/*.safetensors"))) == 2


@pytest.mark.parametrize("layer", [-1, -3, 0, 2])
def test_features_stand_where_the_layer_is_read(layer):
    assert placed("features", layer)[layer] == "features"
