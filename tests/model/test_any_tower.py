# SPDX-License-Identifier: Apache-2.0
"""Vision models without an entry of ours: composed by what probes find, equal to their own class, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

from moellava.convert.export.llava import write_published
from moellava.convert.upcycle_folder import upcycle_folder
from moellava.errors import UserError
from moellava.model.compose import Composition
from moellava.model.joined_towers import JoinedTowersConfig
from moellava.model.manifest import TOWER, read_folder
from moellava.model.tower_images import JoinedImageProcessor, tower_image_processor
from moellava.model.tower_probes import CannotBeTowerError, extras_and_grid, shape_of
from moellava.model.towers import check_select_layer, select_strategy, selected_features, tower_config, tower_tensors
from moellava.moe import MoESpec
from moellava.vlm import VLM, compose, open_vlm
from tests import tiny
from tests.model.any_tower import Row, check, check_all, pictures, projector_input, question, table, write_tower
from tests.model.tiny_towers import AS_THEY_ARE, OVERRIDES, OWN_CLASSES, tiny_config, tiny_vision_model, vision_models
from tests.processes import train_here

PAGE = Path(__file__).parents[2] / "docs" / "TOWERS.md"

SAMPLE = ("pixtral", "dinov2", "deit", "yolos", "siglip2_vision_model", "vit_mae")
"""In one row; one token before the patches; two; and three that are refused."""

HALVES = ("aimv2", "chinese_clip", "clip", "metaclip_2", "siglip", "tipsv2")
"""Image-text models whose vision half is a tower."""


def expected() -> dict[str, list[str]]:
    """`model_type` -> its row on the page: before the patches, `patch`, `full`, off, why not."""
    text = PAGE.read_text(encoding="utf-8").partition("## Every class")[2]
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def holds(row: Row) -> bool:
    """Whether a row says what the page says."""
    before, patch, full, _, reason = expected()[row.model_type]
    found = (
        "refused" if row.extras is None else str(row.extras),
        row.opens.get("patch", ""),
        row.opens.get("full", ""),
    )
    return found == (before, patch, full) and row.reason == reason and not row.problems


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample_gives_what_its_own_class_gives(model_type, make_base, tmp_path):
    row = check(model_type, make_base("llama").folder, tmp_path)
    assert holds(row), table([row])


@pytest.mark.slow
def test_vision_models_of_transformers_are_towers_or_refused_with_their_reason():
    names = vision_models()
    assert sorted(expected()) == names
    rows = check_all(names)
    wrong = [row for row in rows if not holds(row)]
    assert not wrong, table(wrong)
    assert sum(row.extras is not None for row in rows) >= 26
    assert {*OVERRIDES, *AS_THEY_ARE, *OWN_CLASSES} <= set(names)


@pytest.mark.parametrize("model_type", HALVES)
def test_the_vision_half_of_an_image_text_model_is_a_tower(model_type, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    ids = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32}
    config = hf.CONFIG_MAPPING[model_type](
        vision_config={**sizes, "image_size": 28, "patch_size": 14}, text_config={**sizes, **ids, "projection_dim": 16}
    )
    whole = hf.AutoModel.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    manifest = read_folder(tmp_path, "--image_tower")
    vision = tower_config(manifest.config, manifest.called)
    tower = hf.AutoModel.from_config(vision).eval()
    tower.load_state_dict(tower_tensors(tmp_path, vision, torch.float32))
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        found, wanted = (one(pixels, output_hidden_states=True).hidden_states for one in (tower, whole.vision_model))
    assert manifest.holds == TOWER and all(map(torch.equal, found, wanted))


def two_towers(make_base, tmp_path, **options) -> tuple[VLM, list[Path]]:
    """CLIP and DINOv2 with registers, of other sizes, widths and depths, whose patches are as many."""
    first = tiny.write_clip(tmp_path / "clip")
    second = write_tower(
        tmp_path / "dino", "dinov2_with_registers", image_size=20, patch_size=10, hidden_size=24, num_hidden_layers=2
    )
    choice = Composition("v1", "mlp2x_gelu", -2, **options)
    return compose(make_base("llama").folder, [str(first), str(second)], choice), [first, second]


def test_features_of_two_towers_are_joined_patch_by_patch(make_base, plain_transformers, tmp_path):
    vlm, folders = two_towers(make_base, tmp_path)
    batch = question(vlm)
    with torch.no_grad():
        seen, logits = projector_input(vlm, batch)
    wanted = []
    for folder, extras in zip(folders, (1, 5), strict=True):
        tower = hf.AutoModel.from_pretrained(folder).eval()
        own = tower_image_processor(folder, tower.config)
        with torch.no_grad():
            states = tower(own(pictures(), return_tensors="pt")["pixel_values"], output_hidden_states=True)
        wanted.append(states.hidden_states[-2][:, extras:])
    torch.testing.assert_close(seen, torch.cat(wanted, -1))
    assert seen.shape == (2, 4, 16 + 24)
    vlm.save(tmp_path / "saved")
    again = tiny.reopen(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again.model(**question(again)).logits, logits)
    assert again.section.image_tower == " + ".join(map(str, folders))
    assert (
        "the patches of its towers (clip_vision_model, dinov2_with_registers) are joined"
        in (tmp_path / "saved" / "README.md").read_text()
    )
    for opens in (hf.LlavaForConditionalGeneration, hf.AutoModelForImageTextToText):
        with pytest.raises((ValueError, KeyError), match="moellava"):
            opens.from_pretrained(tmp_path / "saved")


def test_joined_towers_stay_joined_when_upcycled_and_llavas_layout_has_no_place_for_them(make_base, tmp_path):
    vlm, _ = two_towers(make_base, tmp_path)
    vlm.save(tmp_path / "dense")
    certificate = upcycle_folder(read_folder(tmp_path / "dense", "--model-path"), tmp_path / "sparse", MoESpec(), 10**9)
    assert max(probe["max_abs_delta"] for probe in certificate.probes.values()) < 1e-6
    sparse = tiny.reopen(tmp_path / "sparse")
    batch = question(vlm)
    with torch.no_grad():
        torch.testing.assert_close(sparse.model(**batch).logits, vlm.model(**batch).logits)
    with pytest.raises(UserError, match="knows towers of CLIP and SigLIP, and this model's is moellava_towers"):
        write_published(vlm, tmp_path / "published")


@pytest.mark.parametrize("name", ["pipeline", "AutoModel", "CLIPModel", "os", "PilBackendPil"])
def test_a_folder_chooses_among_image_processors_alone(name):
    with pytest.raises(UserError, match=f"named '{name}', which is none of transformers"):
        JoinedImageProcessor([{"image_processor_type": name}]).processors  # noqa: B018


def test_joined_towers_are_of_one_dtype_with_the_rest(make_base, clip_tower, siglip_tower, tmp_path):
    towers = [str(clip_tower), str(siglip_tower)]
    vlm = compose(make_base("llama").folder, towers, Composition("v1"), torch.bfloat16)
    vlm.save(tmp_path)
    again = open_vlm(tmp_path, device="cpu", dtype=torch.bfloat16)
    for model in (vlm.model, again.model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    batch = question(vlm)
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(vlm.model(**batch).logits, again.model(**batch).logits)


def test_joined_towers_pad_each_picture_in_its_own_mean_colour(make_base, tmp_path):
    vlm, folders = two_towers(make_base, tmp_path)
    square = question(vlm)["pixel_values"]
    vlm.settle(image_aspect_ratio="pad")
    pad = question(vlm)["pixel_values"]
    assert pad.shape == square.shape == (2, 3, 28 + 20, 28) and not torch.equal(pad, square)
    for rows in (slice(0, 28), slice(28, 48)):  # the upper rows of a wide picture are the mean, which becomes zero
        assert pad[0, :, rows.start, :20].abs().max() < 0.02
    vlm.settle(image_aspect_ratio="square")
    assert torch.equal(question(vlm)["pixel_values"], square)


def test_towers_that_do_not_go_together_are_named(make_base, clip_tower, siglip_tower, tmp_path):
    other = write_tower(tmp_path / "fine", "dinov2", image_size=28, patch_size=7)
    base = make_base("llama").folder
    with pytest.raises(UserError, match=r"4 \(clip_vision_model, 2 × 2 of 28 .* 16 \(dinov2, 4 × 4 of 28 pixels\)"):
        compose(base, [str(clip_tower), str(other)], Composition("v1"))
    with pytest.raises(UserError, match="cls_patch: of joined towers there are the patches alone. Use patch"):
        compose(base, [str(clip_tower), str(siglip_tower)], Composition("v1", mm_vision_select_feature="cls_patch"))
    shallow = write_tower(tmp_path / "shallow", "dinov2", num_hidden_layers=2)
    with pytest.raises(UserError, match="layer 1: the towers have 3 and 2 layers. Count from the end"):
        compose(base, [str(clip_tower), str(shallow)], Composition("v1", mm_vision_select_layer=1))


def test_stage_1_trains_on_two_towers(flags_for, parts, siglip_tower, tmp_path):
    flags = flags_for(tmp_path, "pretrain")
    folder = train_here(flags | {"image_tower": [parts / "tower", siglip_tower]})
    vlm = tiny.reopen(folder)
    assert isinstance(vlm.model.config.vision_config, JoinedTowersConfig) and vlm.section.stage == "pretrain"
    own = hf.SiglipVisionModel.from_pretrained(siglip_tower).state_dict()
    found = vlm.model.model.vision_tower.towers[1].state_dict()
    assert all(torch.equal(found[name], own[name]) for name in own)


@pytest.mark.parametrize("projector", ["pool_mlp2x_gelu", "qformer1_2"])
def test_a_tower_that_gives_one_row_goes_with_projectors_that_read_whole_images(projector, make_base, tmp_path):
    tower = write_tower(tmp_path / "pixtral", "pixtral")
    vlm = compose(make_base("llama").folder, str(tower), Composition("v1", projector))
    batch = question(vlm)
    with torch.no_grad():
        seen, together = projector_input(vlm, batch)
        alone = vlm.model(**{name: value[1:] for name, value in batch.items()}).logits
    assert seen.shape == (2, 4, 16)
    torch.testing.assert_close(together[1:], alone)


def test_registers_are_told_from_class_tokens(tmp_path):
    config = tiny_config("dinov3_vit")
    assert shape_of(config).extras == 5
    assert shape_of(tiny_config("dinov3_vit", num_register_tokens=0)).extras == 1
    with pytest.raises(UserError, match="5 tokens before the patches, and none of them is known as the class token"):
        select_strategy(config, "cls_patch")
    assert select_strategy(config, "full") == "full"


@pytest.mark.parametrize(
    ("tower", "strategy", "features"),
    [
        ("clip_vision_model", "default", ("patch",)),
        ("clip_vision_model", "full", ("cls_patch", "full")),
        ("siglip_vision_model", "full", ("patch", "full")),
        ("deit", "full", ("full",)),
    ],
)
def test_a_folder_knows_what_it_was_put_together_with(tower, strategy, features):
    config = hf.LlavaConfig(vision_config=tiny_config(tower), vision_feature_select_strategy=strategy)
    assert selected_features(config) == features


@pytest.mark.parametrize(
    ("moved", "found"),
    [
        ([0, 1, 1, 1, 1], (1, 2)),
        ([1, 1, 1, 1], (0, 2)),
        ([0, 1e-5, 1, 0.5, 1, 1], (2, 2)),
        ([0, 1, 1, 1, 1, 0], "1 tokens that are no patches stand behind"),
        ([1, 0, 1, 1, 1], "stand among its patches"),
        ([0, 1, 1, 1], "3 patches are no square"),
        ([0, 0, 0], "do not depend on the pixels"),
    ],
)
def test_tokens_are_told_by_what_changes(moved, found):
    moved = torch.tensor(moved, dtype=torch.float32)
    if isinstance(found, tuple):
        assert extras_and_grid(moved) == found
        return
    with pytest.raises(CannotBeTowerError, match=found):
        extras_and_grid(moved)


def test_probes_leave_the_seed_and_work_while_a_model_is_built_on_meta():
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    with torch.device("meta"):
        shape = shape_of(tiny_config("dinov2_with_registers", hidden_size=32))
    assert (shape.extras, shape.grid, shape.width) == (5, 2, 32) and torch.equal(torch.rand(1), wanted)


def test_what_a_checkpoint_has_besides_its_features_may_lack(tmp_path):
    """A folder of a classifier has a head that LLaVA's tower lacks, and no pooler, which that has."""
    model = hf.ViTForImageClassification(tiny_config("vit"))
    model.save_pretrained(tmp_path)
    manifest = read_folder(tmp_path, "--image_tower")
    config = tower_config(manifest.config, manifest.called)
    tensors = tower_tensors(tmp_path, config, torch.float32)
    own = model.vit.state_dict()
    assert all(torch.equal(tensors[name], own[name]) for name in own) and set(tensors) > set(own)
    raw = json.loads((tmp_path / "config.json").read_text())
    deeper = type(config).from_dict({**raw, "num_hidden_layers": 4})
    with pytest.raises(UserError, match="lacks weights of its tower.*layer.*3"):
        tower_tensors(tmp_path, deeper, torch.float32)


@pytest.mark.parametrize("crops", [True, False])
def test_pictures_are_brought_to_the_size_of_the_tower(crops, tmp_path):
    """DINOv2's folders crop to 224 pixels, and its config says 518."""
    folder = write_tower(tmp_path, "dinov2")
    mean, std = [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]
    size = (
        {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}
        if crops
        else {"size": {"height": 56, "width": 56}}
    )
    settings = {"image_processor_type": "DINOv3ViTImageProcessorFast", "do_center_crop": crops, **size}
    settings |= {"image_mean": mean, "image_std": std, "do_resize": True, "do_rescale": True, "do_normalize": True}
    settings |= {"rescale_factor": 1 / 255, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    found = tower_image_processor(folder, tiny_config("dinov2"))
    assert ([*found.image_mean], [*found.image_std], found.resample) == (mean, std, 2)
    assert found(pictures(), return_tensors="pt")["pixel_values"].shape == (2, 3, 28, 28)
    assert found.size.get("shortest_edge") == (32 if crops else None)


def test_settings_for_pictures_may_lie_in_a_whole_processor(tmp_path):
    """As transformers 5 saves a CLIPProcessor."""
    folder = write_tower(tmp_path, "dinov2_with_registers")
    (folder / "preprocessor_config.json").rename(folder / "alone.json")
    settings = {**json.loads((folder / "alone.json").read_text()), "image_mean": [0.1, 0.2, 0.3]}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert [*tower_image_processor(folder, tiny_config("dinov2")).image_mean] == [0.1, 0.2, 0.3]


def test_a_tower_without_settings_for_its_pictures_is_named(tmp_path):
    tiny_vision_model("dinov2_with_registers").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no preprocessor_config.json with an image_mean.*copy the file"):
        tower_image_processor(tmp_path, tiny_config("dinov2_with_registers"))


def test_a_layer_that_a_tower_lacks_is_named():
    with pytest.raises(UserError, match="the tower has 3 layers, so choose from -4 to 3"):
        check_select_layer(tiny_config("dinov2"), 4)
