# SPDX-License-Identifier: Apache-2.0
"""Images in tiles: composed as Hugging Face's LLaVA-NeXT or LLaVA-OneVision, whose processor and model agree with every
sample of ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.utils.import_utils import is_torchvision_available

from moellava.cli import main
from moellava.convert.export.llava import write_published
from moellava.convert.upcycle_folder import upcycle_folder
from moellava.errors import UserError
from moellava.model.manifest import read_folder
from moellava.model.tiles import parse_pinpoints
from moellava.moe import MoESpec
from moellava.serve.answer import Request, answer
from moellava.vlm import open_vlm
from tests import tiny
from tests.processes import train_here

SHAPES = ((56, 56), (100, 40), (30, 90), (28, 28))
PICTURES = [Image.effect_mandelbrot(shape, (-3, -2.5, 2, 2.5), 20).convert("RGB") for shape in SHAPES]


@pytest.fixture(scope="module")
def towers(clip_tower, siglip_tower) -> dict[str, Path]:
    return {"clip": clip_tower, "siglip": siglip_tower}


@pytest.fixture(scope="module")
def tiled(tiny_base, clip_tower):
    """A random Llama and a CLIP tower of 28 × 28 pixels."""
    return tiny.compose_tiny(tiny_base("vicuna"), clip_tower, "v1", image_aspect_ratio="anyres")


BOUND = "anyres_max_3"
"""A bound that the larger ones of `PICTURES` exceed."""

PADDED = {"return_tensors": "pt", "padding": True, "padding_side": "left"}

CLASSES = {"anyres": LlavaNextForConditionalGeneration, BOUND: LlavaOnevisionForConditionalGeneration}


@pytest.fixture(scope="module")
def bounded(tiny_base, siglip_tower):
    """The same with a SigLIP tower and a bound."""
    return tiny.compose_tiny(
        tiny_base("vicuna"), siglip_tower, "v1", image_aspect_ratio=BOUND, image_projector_type="mlp2x_gelu"
    )


def processor_of(folder: Path):
    """As plain transformers opens it; OneVision's with a video processor of ours where torchvision is not installed."""
    if is_torchvision_available() or "Onevision" not in (folder / "processor_config.json").read_text():
        return AutoProcessor.from_pretrained(folder)
    return tiny.reopen(folder).processor


@pytest.mark.parametrize(
    ("tower", "ratio"),
    [
        ("clip", "anyres"),
        pytest.param("siglip", "anyres", marks=pytest.mark.slow),
        pytest.param("clip", BOUND, marks=pytest.mark.slow),
        ("siglip", BOUND),
    ],
)
def test_plain_transformers_computes_the_same_of_the_same_input(tower, ratio, towers, tiny_base, tmp_path):
    options = {"image_aspect_ratio": ratio, "image_projector_type": "mlp2x_gelu"}
    vlm = tiny.compose_tiny(tiny_base("vicuna"), towers[tower], "v1", **options)
    vlm.save(tmp_path / "folder")
    plain, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not any(info.values()) and type(plain) is CLASSES[ratio]
    processor, reader = processor_of(tmp_path / "folder"), vlm.encoder.reader
    lengths = [reader.run_length(picture.size, 1) for picture in PICTURES]
    assert len(set(lengths)) > (1 if ratio == BOUND else 2)
    prompts = ["USER: <image>\nwhat? ASSISTANT:"] * len(PICTURES)
    batch = processor(
        images=[[picture] for picture in PICTURES], text=prompts, return_tensors="pt", padding=True, padding_side="left"
    )
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == lengths
    with torch.no_grad():
        wanted, found = plain.eval()(**batch).logits, vlm.model(**batch).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["tiled", "bounded"])
def test_a_batch_answers_as_single_requests_do(name, request):
    tiled = request.getfixturevalue(name)
    requests = [Request("what?", [picture]) for picture in PICTURES]
    requests += [Request("compare", PICTURES[:2]), Request("no picture")]
    alone = [answer(tiled, [request], max_new_tokens=6)[0] for request in requests]
    assert answer(tiled, requests, max_new_tokens=6) == alone and not any(one.error for one in alone)


def test_processor_and_model_agree_on_the_tokens_of_any_size(bounded):
    """Of an image alone, as many as the bound lets through; of several of a record, a square each and its newline."""
    reader, body = bounded.encoder.reader, bounded.model.model
    sizes = torch.randint(1, 400, (40, 2), generator=torch.Generator().manual_seed(0)).tolist()
    for wide, high in sizes:
        media = reader.read([[Image.new("RGB", (wide, high))]])
        with torch.no_grad():
            (features,) = body.get_image_features(**media.tensors, return_dict=True).pooler_output
        assert len(media.runs[0][0].ids) == len(features) == reader.run_length((wide, high), 1), (wide, high)
        assert (
            len(features) <= 4 + 1.21 * 12 + 12
        )  # the whole image, and of the tiles a tenth more along each side, and newlines
    assert {reader.run_length((wide, high), 2) for wide, high in sizes} == {5}


def test_a_bound_may_be_another_one_later(bounded, tiny_base, siglip_tower):
    vlm = tiny.compose_tiny(tiny_base("vicuna"), siglip_tower, "v1", image_aspect_ratio="anyres_max_9")
    before = vlm.encoder.reader.run_length((100, 100), 1)
    vlm.settle("v1", BOUND)
    assert vlm.encoder.reader.run_length((100, 100), 1) == bounded.encoder.reader.run_length((100, 100), 1) < before
    assert vlm.model.config.vision_aspect_ratio == vlm.section.image_aspect_ratio == BOUND
    with pytest.raises(UserError, match="--image_aspect_ratio anyres, but .* for anyres_max_3: .* of three classes"):
        vlm.settle("v1", "anyres")


@pytest.fixture
def flags_in_tiles(flags_for, parts, tmp_path):
    """stage -> the flags of a run from the folder of the one before, on pictures of several shapes."""
    images = tmp_path / "images"
    images.mkdir()
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a shape"}]
    records = [{"id": str(n), "image": f"{n}.png", "conversations": turns} for n in range(len(PICTURES))]
    for number, picture in enumerate(PICTURES):
        picture.save(images / f"{number}.png")
    (tmp_path / "data.json").write_text(json.dumps(records * 2))
    given = {"data_path": tmp_path / "data.json", "image_folder": images, "image_aspect_ratio": "anyres"}
    given |= {"max_steps": 2, "save_strategy": "no", "logging_steps": 1}
    return lambda stage: flags_for(tmp_path, stage) | given


@pytest.mark.parametrize("ratio", ["anyres", pytest.param("anyres_max_3", marks=pytest.mark.slow)])
def test_the_stages_train_on_tiles(ratio, flags_in_tiles, tmp_path, capsys):
    for stage in ("pretrain", "finetune", "moe"):
        train_here(flags_in_tiles(stage) | {"image_aspect_ratio": ratio})
    sections = [tiny.reopen(tmp_path / stage).section for stage in ("pretrain", "finetune", "moe")]
    assert [section.image_aspect_ratio for section in sections] == [ratio] * 3
    before, after = (tiny.weights_of(tmp_path / stage) for stage in ("pretrain", "finetune"))
    newline = next(name for name in after if name.endswith("image_newline"))
    assert not torch.equal(before[newline], after[newline]), "it trains with the projector"
    words = ["inspect", str(tmp_path / "data.json"), "--image-folder", str(tmp_path / "images")]
    assert main([*words, "--tokenizer", str(tmp_path / "moe"), "--limit", "4", "--json"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len({view["counts"]["image_tokens"] for view in shown}) > 2


def test_a_folder_says_how_it_was_put_together(flags_in_tiles, tmp_path):
    train_here(flags_in_tiles("pretrain"))
    for flags, words in (
        ({"image_aspect_ratio": "pad"}, "--image_aspect_ratio pad, but .* was put together for anyres"),
        ({"image_grid_pinpoints": "(1x1),...,(2x2)"}, "--image_grid_pinpoints .* was put together with"),
    ):
        again = {"model_name_or_path": tmp_path / "pretrain", "output_dir": tmp_path / "again"}
        left_out = dict.fromkeys(("image_tower", "image_projector_type", "pretrain_mm_mlp_adapter"))
        with pytest.raises(UserError, match=words):
            train_here(flags_in_tiles("finetune") | left_out | again | flags)


@pytest.mark.slow
def test_upcycling_keeps_the_logits(tiled, tmp_path):
    tiled.save(tmp_path / "dense")
    spec = MoESpec(num_experts=[2], top_k_experts=2)
    certificate = upcycle_folder(read_folder(tmp_path / "dense", "--model-path"), tmp_path / "moe", spec, 2**30)
    certificate.check()
    requests = [Request("what?", [picture]) for picture in PICTURES]
    assert answer(tiny.reopen(tmp_path / "moe"), requests, max_new_tokens=4) == answer(
        tiled, requests, max_new_tokens=4
    )


@pytest.mark.parametrize(("name", "ratio", "tower"), [("tiled", "anyres", "clip"), ("bounded", BOUND, "siglip")])
def test_llava_16s_own_layout_is_read_and_written(name, ratio, tower, towers, tmp_path, request):
    tiled = request.getfixturevalue(name)
    tiled.model.config.moellava["image_tower"] = str(towers[tower])
    write_published(tiled, tmp_path / "llava-v1.6")
    raw = json.loads((tmp_path / "llava-v1.6" / "config.json").read_text())
    assert raw["image_aspect_ratio"] == ratio and [28, 56] in raw["image_grid_pinpoints"]
    assert "model.image_newline" in torch.load(tmp_path / "llava-v1.6" / "pytorch_model.bin", weights_only=True)
    again = open_vlm(tmp_path / "llava-v1.6", device="cpu")
    ours, theirs = tiled.model.state_dict(), again.model.state_dict()
    assert type(again.model) is type(tiled.model)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sorted(again.model.config.image_grid_pinpoints) == sorted(tiled.model.config.image_grid_pinpoints)
    raw["mm_patch_merge_type"] = "spatial"
    (tmp_path / "llava-v1.6" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"as 'spatial' \(mm_patch_merge_type\)"):
        open_vlm(tmp_path / "llava-v1.6", device="cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mm_vision_select_feature": "cls_patch"}, "50|tokens are taken where"),
        ({"image_projector_type": "pool_mlp2x_gelu"}, "needs a token for every patch"),
        ({"image_grid_pinpoints": "[(30, 56)]"}, "30 × 56 pixels are no whole number of the tower's squares of 28"),
        ({"image_aspect_ratio": "anyres_max_1"}, "cut into 6 squares in a row, .* Use anyres_max_3 or more"),
        ({"image_grid_pinpoints": "many"}, "give pairs of width and height"),
    ],
)
def test_what_cannot_be_tiled_is_named(options, words, tiny_base, clip_tower):
    with pytest.raises(UserError, match=words):
        tiny.compose_tiny(tiny_base("vicuna"), clip_tower, "v1", **{"image_aspect_ratio": "anyres"} | options)


def test_grids_are_named_as_llavas():
    """Width before height in the flag, height before width in Hugging Face's config."""
    assert parse_pinpoints("[(336, 672), (1008, 336)]", 336) == [(672, 336), (336, 1008)]
    assert parse_pinpoints([[336, 672]], 336) == [(672, 336)]
    assert parse_pinpoints("(2x1)", 14) == [(14, 28)]
    assert parse_pinpoints("(1x1),...,(2x3)", 10) == [(10 * h, 10 * w) for w in (1, 2) for h in (1, 2, 3)]


@pytest.mark.slow
def test_a_deep_projector_and_tiles_go_together(tiny_base, clip_tower, tmp_path):
    options = {"image_aspect_ratio": "anyres", "image_projector_type": "mlp3x_gelu"}
    vlm = tiny.compose_tiny(tiny_base("vicuna"), clip_tower, "v1", **options)
    vlm.save(tmp_path / "folder")
    requests = [Request("what?", [PICTURES[1]])]
    again = tiny.reopen(tmp_path / "folder")
    assert "LlavaNext" in type(again.model).__name__
    assert answer(again, requests, max_new_tokens=4) == answer(vlm, requests, max_new_tokens=4)
