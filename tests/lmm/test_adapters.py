# SPDX-License-Identifier: Apache-2.0
"""Adapters in released models: in the vision encoder, the decoder or both; quantised; killed, resumed and merged."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from moellava.adapters.gradient_watch import GradientWatch
from moellava.adapters.lora import attach, lora_layers, vision_target_names
from moellava.cli import main
from moellava.errors import UserError
from moellava.lmm.architecture import ARCHITECTURES
from moellava.lmm.supported_models import MULTIMODAL_KEYWORDS
from moellava.model.parts import group_names
from moellava.train.arguments import parse_arguments
from moellava.vlm import VLM
from tests.lmm.tiny import reopen

VISION_LORA = {"use_vision_lora": True, "lora_r": 2, "lora_alpha": 4}


def state_of(folder):
    return reopen(folder).model.state_dict()


def moved_groups(family_id, before, after):
    """Part of the model -> names of its tensors that differ between two folders."""
    old, new = state_of(before), state_of(after)
    names = {name for name in old if not torch.equal(old[name], new[name])}
    return {part: set(found) for part, found in group_names(names, MULTIMODAL_KEYWORDS[family_id]).items() if found}


def test_targets_are_linears_of_the_vision_encoder(conforming, small_opened):
    """By the keywords, which say where the encoder is; projectors inside it are none of it."""
    vlm = small_opened(conforming)
    targets = vision_target_names(vlm)
    groups = group_names([f"{name}.weight" for name in targets], MULTIMODAL_KEYWORDS[conforming])
    assert len(groups["vision_encoder"]) == len(targets)
    if ARCHITECTURES[conforming].remote_code:
        return  # a stand-in for code that is not here, with hardly an encoder
    assert targets
    layers = 1 if getattr(vlm.model.config, "vision_feature_layer", None) == -2 else 2
    assert len({part for name in targets for part in name.split(".") if part.isdigit()}) == layers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family_id", "flags", "parts"),
    [
        ("llava-1.5", {"use_lora": True}, {"vision_encoder", "language_model"}),
        ("qwen2.5-vl", {"freeze_backbone": True}, {"vision_encoder"}),
        ("gemma3", {"train_vision_projector": True}, {"vision_encoder", "vision_projector", "language_model"}),
    ],
)
def test_vision_adapters_train_beside_a_decoder_that_is_adapted_rests_or_trains_in_full(
    family_id, flags, parts, run, small_lmm, small_opened, tmp_path
):
    folder = run(family_id, **VISION_LORA, **flags)
    moved = moved_groups(family_id, small_lmm(family_id), folder)
    assert set(moved) == parts
    targets = vision_target_names(small_opened(family_id))
    assert moved["vision_encoder"] == {f"{name}.weight" for name in targets}
    old, new = state_of(small_lmm(family_id)), state_of(folder)
    assert all(
        torch.linalg.matrix_rank(new[f"{name}.weight"] - old[f"{name}.weight"], atol=1e-6) <= 2 for name in targets
    )
    in_full = "lora" not in str(flags) and "freeze_backbone" not in flags
    assert any("embed_tokens" in name for name in moved.get("language_model", ())) is in_full
    words = ["--model-path", small_lmm(family_id), "--adapter", folder / "adapter", "--output-dir", tmp_path / "merged"]
    assert main(["merge-lora", *map(str, words)]) == 0
    merged = state_of(tmp_path / "merged")
    assert all(torch.equal(merged[name], new[name]) for name in new)


def test_an_encoder_in_full_beside_an_adapted_decoder(run, small_lmm):
    folder = run("llava-1.5", use_lora=True, lora_r=2, train_vision_encoder=True)
    moved = moved_groups("llava-1.5", small_lmm("llava-1.5"), folder)
    assert set(moved) == {"vision_encoder", "language_model"}
    assert any("layer_norm1" in name for name in moved["vision_encoder"]), "no adapter moves a norm"
    assert {name.split(".")[-2][-5:] for name in moved["language_model"]} == {"_proj"}


@pytest.mark.slow
def test_vision_parts_train_beside_experts_when_they_are_asked_for(run, small_lmm, tmp_path):
    words = ["--model-path", small_lmm("qwen2.5-vl"), "--output-dir", tmp_path / "sparse", "--moe_mode", "dense"]
    assert main(["upcycle", *map(str, words), "--num_experts", "2"]) == 0
    folder = run(
        tmp_path / "sparse", "both", moe_enable=True, use_lora=True, **VISION_LORA, train_vision_projector=True
    )
    moved = moved_groups("qwen2.5-vl", tmp_path / "sparse", folder)
    assert set(moved) == {"vision_encoder", "vision_projector", "language_model"}
    assert all(".experts." in name or ".router." in name for name in moved["language_model"])
    folder = run(tmp_path / "sparse", "full", moe_enable=True, train_vision_encoder=True)
    assert set(moved_groups("qwen2.5-vl", tmp_path / "sparse", folder)) == {"vision_encoder", "language_model"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family_id", "flags"),
    [
        ("qwen3-vl", {"use_lora": True, "lora_r": 4, "train_vision_projector": True}),
        ("llava-onevision", {**VISION_LORA, "train_vision_projector": True}),
        ("llava-1.5", {}),
    ],
)
def test_a_killed_run_goes_on_to_exactly_the_same_losses(family_id, flags, run, begin_at, losses_of, tmp_path):
    flags |= {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 9}
    whole = run(family_id, "whole", **flags)
    resumed = run(family_id, "resumed", **flags, output_dir=begin_at(2, whole, tmp_path / "resumed"))
    assert losses_of(resumed) == losses_of(whole)
    one, other = state_of(whole), state_of(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)
    if family_id == "qwen3-vl":  # its projector is several modules inside the encoder
        saved = load_file(whole / "adapter" / "adapter_model.safetensors")
        for part in ("merger", "deepstack_merger_list"):
            assert any(f".visual.{part}." in name for name in saved)


@pytest.mark.slow
def test_q_lora_rounds_the_decoder_alone(run, small_lmm, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = small_lmm("qwen2.5-vl")
    folder = run("qwen2.5-vl", q_lora=True, lora_r=2, use_vision_lora=True)
    moved = moved_groups("qwen2.5-vl", base, folder)
    old, new = state_of(base), state_of(folder)
    assert set(moved) == {"vision_encoder", "language_model"}, "the projector keeps its precision"
    assert all(name.endswith("_proj.weight") for name in moved["language_model"])
    for name in moved["vision_encoder"]:
        assert torch.linalg.matrix_rank(new[name] - old[name], atol=1e-5) <= 2, "not rounded, adapted"
    words = ["--model-path", base, "--adapter", folder / "adapter", "--output-dir", tmp_path / "merged"]
    assert main(["merge-lora", *map(str, words)]) == 0
    merged = state_of(tmp_path / "merged")
    assert all(torch.equal(merged[name], new[name]) for name in new)


class Seeing(nn.Module):
    """An encoder with an adapter that only counts where there is an image, and a decoder that always does."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
        self.decoder = nn.Linear(4, 4)
        attach(self, LoraConfig(r=2, target_modules=r"encoder\..*|decoder"))
        self.watch = GradientWatch(self, self.encoder)

    def step(self, image: float, second: float = 1.0) -> None:
        seen = self.encoder["first"](torch.ones(1, 4)) + second * self.encoder["second"](torch.ones(1, 4))
        self.decoder(image * seen + 1.0).sum().backward()
        self.watch.on_pre_optimizer_step(None, None, None)


def test_vision_adapters_are_judged_at_the_first_step_with_an_image():
    model = Seeing()
    assert len(list(lora_layers(model))) == 3
    model.step(image=0.0)
    assert set(model.watch.handles) == {"encoder.first", "encoder.second"}
    model.step(image=1.0)
    assert not model.watch.handles
    model = Seeing()
    model.step(image=0.0)
    with pytest.raises(UserError, match="reached 1 of 2 trained parts: encoder.second"):
        model.step(image=1.0, second=0.0)


def test_a_first_batch_without_an_image_stops_no_run(run, tmp_path, released_flags):
    flags = released_flags("", "run")
    turns = [{"from": "user", "value": "Hello?"}, {"from": "bot", "value": "Hello."}]
    (tmp_path / "text.json").write_text(json.dumps([{"id": str(n), "conversations": turns} for n in range(4)]))
    flags = {"data_path": tmp_path / "text.json", "output_dir": flags["output_dir"], "max_steps": 1}
    run("llava-1.5", **VISION_LORA, use_lora=True, **flags)


def test_targets_that_match_nothing_are_named(run, monkeypatch):
    monkeypatch.setattr("moellava.adapters.lora.read_layers", lambda *_: [])
    with pytest.raises(UserError, match="--use_vision_lora True: the vision encoder of this LlavaForCond.* no linear"):
        run("llava-1.5", **VISION_LORA)
    parts = VLM.parts.fget
    monkeypatch.setattr(VLM, "parts", property(lambda vlm: parts(vlm) | {"language_model": nn.ModuleList()}))
    with pytest.raises(UserError, match="--lora_enable True: the language model of this LlavaForCond.* no linear"):
        run("llava-1.5", use_lora=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--use_vision_lora True --train_vision_encoder True", "--use_vision_lora True and --train_vision_encoder"),
        ("--use_vision_lora True --moe_enable True", "together with --lora_enable True only"),
        ("--use_vision_lora True --lora_bias all", "--use_vision_lora True and --lora_bias all"),
        ("--use_vision_lora True --bits 4", "--bits 4: needs --lora_enable True"),
        ("--lora_r 4", "--lora_r 4: needs --lora_enable True"),
        ("--mm_use_im_start_end True", "--mm_use_im_start_end True conflicts with --model_id"),
        ("--image_projector_type identity", "--image_projector_type identity conflicts with --model_id"),
    ],
)
def test_flags_that_cannot_go_together_are_named(flags, message):
    base = "--model_local_path m --data_path a.json --output_dir o --report_to none"
    with pytest.raises(UserError, match=message):
        parse_arguments([*base.split(), *flags.split()])
