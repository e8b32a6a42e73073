# SPDX-License-Identifier: Apache-2.0
"""A frozen tower runs the layers that are read, counted, and its features are those of the whole one."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, Dinov2Config, LlamaConfig, LlavaConfig, SiglipVisionConfig
from transformers import LlavaForConditionalGeneration as Llava

from moellava.model.joined_towers import join
from moellava.model.short_tower import ShortTower

LAYERS, SIDE = 4, 28
SIZES = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 14}
TOWERS = {
    "clip": lambda: CLIPVisionConfig(**SIZES, intermediate_size=24),
    "siglip": lambda: SiglipVisionConfig(**SIZES, intermediate_size=24),
    "dinov2": lambda: Dinov2Config(**SIZES, mlp_ratio=2),
    "joined": lambda: join([TOWERS["clip"](), TOWERS["siglip"]()]),
}


def llava(tower: str, read: int | list[int]) -> Llava:
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1)
    parts = {"vision_config": TOWERS[tower](), "text_config": text}
    made = Llava(LlavaConfig(**parts, image_token_index=5, vision_feature_layer=read)).train()
    made.model.vision_tower.requires_grad_(False)
    return made


def layers_run(model: Llava) -> list[int]:
    """The number of each layer that runs from now on."""
    ran: list[int] = []
    lists = [one for one in model.model.vision_tower.modules() if isinstance(one, torch.nn.ModuleList)]
    for layers in (one for one in lists if len(one) == LAYERS):
        for number, layer in enumerate(layers):
            norm = next(part for part in layer.modules() if isinstance(part, torch.nn.LayerNorm))
            norm.register_forward_pre_hook(lambda _, __, number=number: ran.append(number))
    return ran


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("read, needed", [(-2, 3), (1, 1), (-1, 4), ([-3, -2], 3)])
def test_layers_that_nothing_reads_do_not_run(tower, read, needed):
    if tower == "joined" and isinstance(read, list):
        read = -2  # it has one index
    model, pixels = llava(tower, read), torch.randn(2, 3, 2 * SIDE if tower == "joined" else SIDE, SIDE)
    features = lambda: torch.stack(list(model.model.get_image_features(pixels).pooler_output))  # noqa: E731
    names, short, ran = list(model.state_dict()), ShortTower(model), layers_run(model)
    towers = 2 if tower == "joined" else 1
    wanted = features()
    assert ran == [*range(LAYERS)] * towers
    ran.clear()
    with short:
        found = features()
    assert ran == [*range(needed)] * towers and short.unread == (LAYERS - needed) * towers
    assert torch.equal(found, wanted) and found.requires_grad  # by the projector
    assert list(model.state_dict()) == names
    ran.clear()
    features()
    assert ran == [*range(LAYERS)] * towers


def test_a_tower_that_trains_or_fails_is_whole():
    trains = llava("clip", -2)
    trains.model.vision_tower.requires_grad_(True)
    assert ShortTower(trains).unread == 0
    model = llava("clip", -2)
    names = list(model.state_dict())
    with ShortTower(model), pytest.raises(ValueError):
        model.model.get_image_features(torch.zeros(1, 3, SIDE, SIDE - 1))
    assert list(model.state_dict()) == names and torch.is_grad_enabled()
