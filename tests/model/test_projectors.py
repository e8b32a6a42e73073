# SPDX-License-Identifier: Apache-2.0
"""Every entry of `PROJECTORS`: it composes, counts its tokens, trains, saves, starts a stage, upcycles and exports."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from transformers import LlavaForConditionalGeneration
from transformers.models.internvl.modeling_internvl import InternVLModel

from moellava.convert.export.llava import write_published
from moellava.errors import UnknownNameError, UserError
from moellava.model.extended import extension_of
from moellava.model.projector_start import load_projector
from moellava.model.projectors import PROJECTORS, Sizes, parse_projector
from moellava.model.projectors.entry import as_grid
from moellava.model.projectors.grid import PixelShuffle
from moellava.moe import MoESpec, upcycle
from tests.processes import train_here
from tests.tiny import VISION, clip_processor, compose_tiny, reopen

EXAMPLES = {
    "linear": ("linear", 16),
    "identity": ("identity", 16),
    "mlpNx_gelu": ("mlp3x_gelu", 16),
    "pool_mlpNx_gelu": ("pool_mlp2x_gelu", 4),
    "pixel_shuffle": ("pixel_shuffle", 4),
    "qformerN_Q": ("qformer1_3", 3),
    "resamplerN_Q": ("resampler1_5", 5),
    "cabstractorN_Q": ("cabstractor1_9", 9),
    "cblockN": ("cblock1", 4),
}
"""Pattern -> a name, and the tokens that an image of 4 × 4 patches becomes."""


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A tower of 4 × 4 patches, as wide as the language model, so that `identity` fits."""
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(2)
    hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION | {"hidden_size": 32, "image_size": 56})).save_pretrained(folder)
    clip_processor(56).save_pretrained(folder)
    return folder


def test_every_entry_has_an_example():
    assert set(EXAMPLES) == set(PROJECTORS)
    assert all(parse_projector(name).entry is PROJECTORS[pattern] for pattern, (name, _) in EXAMPLES.items())


@pytest.mark.parametrize(("name", "tokens"), EXAMPLES.values(), ids=list(EXAMPLES))
def test_each_composes_trains_and_reopens(name, tokens, make_base, tower, inputs, tmp_path):
    made = compose_tiny(make_base("qwen2").folder, tower, "plain", image_projector_type=name)
    model, spec = made.model, parse_projector(name)
    assert made.encoder.reader.run_length((30, 20), 1) == model.config.image_seq_length == tokens
    batch = inputs(model)

    projector = made.parts["projector"][0]
    if list(projector.parameters()):
        losses = overfit(model, projector, batch)
        assert losses[-1] < losses[0] - 0.1, losses
        assert all(parameter.grad is not None for parameter in projector.parameters())
    with torch.no_grad():
        wanted = model.eval()(**batch).logits
    assert model.generate(**batch, max_new_tokens=2, do_sample=False).shape[1] == batch["input_ids"].shape[1] + 2

    made.save(tmp_path / "ours", meta={"stage": "pretrain"})
    again = reopen(tmp_path / "ours")
    assert again.encoder.reader.run_length((30, 20), 1) == tokens
    assert torch.equal(logits(again.model, batch), wanted)
    opens = not extension_of(model.config).reasons
    assert opens != spec.is_extended
    if opens:
        assert torch.equal(
            logits(LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval(), batch), wanted
        )
    else:
        with pytest.raises((ValueError, KeyError), match="moellava_"):
            LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, _ in EXAMPLES.values()], ids=list(EXAMPLES))
def test_each_starts_a_stage_and_upcycles_and_exports(name, make_base, tower, inputs, tmp_path):
    made = compose_tiny(make_base("qwen2").folder, tower, "plain", image_projector_type=name)
    spec, batch = parse_projector(name), inputs(made.model)
    with torch.no_grad():
        for parameter in made.parts["projector"][0].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    wanted = logits(made.model, batch)
    made.save(tmp_path / "ours", meta={"stage": "pretrain"})
    if spec.layers != 0:
        other = compose_tiny(make_base("qwen2").folder, tower, "plain", image_projector_type=name)
        load_projector(other.model, tmp_path / "ours")
        assert torch.equal(logits(other.model, batch), wanted)

    sparse = upcycle(copy.deepcopy(made.model), MoESpec(num_experts=[2]))
    torch.testing.assert_close(logits(sparse.eval(), batch), wanted, atol=1e-5, rtol=0)

    if spec.entry.to_published is None:
        with pytest.raises(UserError, match=f"projector is {name}, which the code of LLaVA and MoE-LLaVA lacks"):
            write_published(made, tmp_path / "theirs")
        return
    write_published(made, tmp_path / "theirs")
    published = reopen(tmp_path / "theirs")
    assert published.model.config.image_seq_length == made.model.config.image_seq_length
    assert torch.equal(logits(published.model, batch), wanted)


def overfit(model, projector, batch):
    """The loss before each of six steps of the projector alone on one batch."""
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_index, -100)
    optimizer = torch.optim.Adam(projector.parameters(), lr=2e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("pool_mlp2x_gelu", Sizes(8, 8, 9), "joins 2 × 2 patches, but the tower gives a grid of 3 × 3"),
        ("cblock2", Sizes(8, 8, 9), "a grid of 3 × 3"),
        ("pixel_shuffle", Sizes(8, 8, 17), "gives 17 tokens. .*--mm_vision_select_feature patch"),
        ("cabstractor1_5", Sizes(8, 8, 16), "5 tokens do not fill: take 4 or 9"),
        ("cabstractor1_25", Sizes(8, 8, 16), "pools to a grid of 5 × 5, but the tower gives 4 × 4: take 16"),
    ],
)
def test_a_projector_that_does_not_fit_the_tower_is_named(name, sizes, message):
    with pytest.raises(UserError, match=f"--image_projector_type {name} .*{message}"):
        parse_projector(name).tokens(sizes)


def test_a_grid_that_does_not_divide_is_named_before_weights_are_read(make_base, tower, monkeypatch):
    monkeypatch.setattr("moellava.model.compose.read_tensors", lambda folder: pytest.fail("weights are read"))
    with pytest.raises(UserError, match="--mm_vision_select_feature patch"):
        compose_tiny(
            make_base("qwen2").folder,
            tower,
            "plain",
            image_projector_type="pixel_shuffle",
            mm_vision_select_feature="cls_patch",
        )


@pytest.mark.parametrize(
    "name", ["mlp0x_gelu", "pool_mlp0x_gelu", "qformer0_0", "qformer4_0", "cblock0", "mlp02x_gelu"]
)
def test_numbers_count_from_one(name):
    with pytest.raises(UnknownNameError, match="count from 1 on. Known: linear, .*, cblockN"):
        parse_projector(name)


@pytest.mark.parametrize("name", ["qformer", "cheap_qformer4_36", "pool", "mlp²x_gelu", "Linear", "qformer4_36_2"])
def test_a_wrong_name_lists_the_known(name):
    with pytest.raises(UnknownNameError, match="Unknown projector .*Known: linear, .*, cblockN"):
        parse_projector(name)


def test_patches_are_shuffled_as_internvl_does():
    torch.manual_seed(0)
    features = torch.randn(2, 16, 3)
    grid = as_grid(features).permute(0, 2, 3, 1)
    theirs = InternVLModel.pixel_shuffle(None, grid, 0.5).flatten(1, 2)
    projector = PixelShuffle(Sizes(3, 8, 16)).eval()
    expected = super(PixelShuffle, projector)
    torch.testing.assert_close(projector(features), expected.forward(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pool_mlp2x_gelu", "qformer1_3"])
def test_three_stages_run(name, flags_for, losses_of, tmp_path):
    short = {"max_steps": 2, "save_strategy": "no", "skip_dry_save": True}
    for stage in ("pretrain", "finetune", "moe"):
        flags = flags_for(tmp_path, stage) | short
        train_here(flags if stage == "moe" else flags | {"image_projector_type": name})
    assert losses_of(tmp_path / "moe")
    assert reopen(tmp_path / "moe").section.image_projector_type == name
