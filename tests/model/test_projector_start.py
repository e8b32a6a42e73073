# SPDX-License-Identifier: Apache-2.0
"""A projector that has learnt already: from which files it comes, and what it has to fit."""

from __future__ import annotations

import pytest
import torch

from moellava.errors import UserError
from moellava.model import projector_start
from moellava.vlm import VLM
from tests.tiny import compose_tiny


def load_projector(vlm: VLM, path) -> None:
    projector_start.load_projector(vlm.model, path)


def projector_of(vlm: VLM) -> dict[str, torch.Tensor]:
    (projector,) = vlm.parts["projector"]
    return projector.state_dict()


@pytest.fixture(scope="module")
def made(make_base, clip_tower):
    return compose_tiny(make_base("llama").folder, clip_tower, "plain", image_projector_type="mlp2x_gelu")


@pytest.fixture
def folder(made, tmp_path):
    path = tmp_path / "model"
    made.save(path, meta={"stage": "pretrain"})
    return path


@pytest.fixture
def fresh(make_base, clip_tower):
    """(family, options) -> a composed model whose projector has weights of its own."""

    def make(name: str, **options) -> VLM:
        vlm = compose_tiny(make_base(name).folder, clip_tower, "plain", **options)
        with torch.no_grad():
            for parameter in vlm.parts["projector"].parameters():
                parameter.add_(1.0)
        return vlm

    return make


def test_a_projector_comes_from_a_folder_or_a_file(made, folder, fresh, tmp_path):
    wanted = projector_of(made)
    theirs = {
        "model.mm_projector.image_spatial_proj.0.weight": wanted["linear_1.weight"],
        "model.mm_projector.image_spatial_proj.0.bias": wanted["linear_1.bias"],
        "model.mm_projector.image_spatial_proj.2.weight": wanted["linear_2.weight"],
        "model.mm_projector.image_spatial_proj.2.bias": wanted["linear_2.bias"],
    }
    torch.save(theirs, tmp_path / "mm_projector.bin")
    torch.save({key.replace("image_spatial_proj.", ""): value for key, value in theirs.items()}, tmp_path / "llava.bin")
    for source in (folder, tmp_path, tmp_path / "mm_projector.bin", tmp_path / "llava.bin"):
        vlm = fresh("llama", image_projector_type="mlp2x_gelu")
        load_projector(vlm, source)
        found = projector_of(vlm)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_tokens_around_an_image_come_with_the_projector(fresh, tmp_path):
    """Stage 1 with --mm_use_im_start_end trains their embeddings; stage 2 must not start without them."""
    made = fresh("mistral", use_im_start_end=True)
    ids = made.section.image_token_ids
    assert made.tokenizer.convert_ids_to_tokens(ids) == ["<image>", "<im_start>", "<im_end>"]
    table = made.model.get_input_embeddings().weight
    with torch.no_grad():
        table[ids[1:]] = torch.randn(2, 32)
    made.save(tmp_path / "folder")
    linear = made.parts["projector"][0].linear_1
    theirs = {f"model.mm_projector.image_spatial_proj.{name}": tensor for name, tensor in linear.state_dict().items()}
    for number, rows in enumerate((table, table[ids[1:]])):
        torch.save({**theirs, "model.embed_tokens.weight": rows.detach().clone()}, tmp_path / f"{number}.bin")
    for source in ("folder", "0.bin", "1.bin"):
        vlm = fresh("mistral", use_im_start_end=True)
        load_projector(vlm, tmp_path / source)
        assert torch.equal(vlm.model.get_input_embeddings().weight[ids[1:]], table[ids[1:]])
        with pytest.raises(UserError, match="was trained with <im_start>.*set --mm_use_im_start_end True"):
            load_projector(fresh("mistral"), tmp_path / source)
    torch.save(theirs, tmp_path / "without.bin")
    with pytest.raises(UserError, match="was trained without <im_start>.*set --mm_use_im_start_end False"):
        load_projector(fresh("mistral", use_im_start_end=True), tmp_path / "without.bin")


def test_a_projector_of_another_shape_is_refused(folder, fresh, make_base):
    linear = fresh("llama")
    with pytest.raises(UserError, match=r"does not fit --image_projector_type: it holds .*linear_2.weight"):
        load_projector(linear, folder)
    with pytest.raises(UserError, match="holds no projector"):
        load_projector(linear, make_base("llama").folder)
