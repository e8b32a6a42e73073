# SPDX-License-Identifier: Apache-2.0
"""Towers: which token of which layer, how many there are, and what becomes of an image."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, CLIPConfig, CLIPModel

from moellava.errors import UnknownNameError, UserError
from moellava.model.manifest import read_folder
from moellava.model.tower_images import composed_image_processor, tower_image_processor
from moellava.model.towers import (
    check_select_layer,
    select_strategy,
    tower_config,
    tower_tensors,
    tower_tokens,
)


def config_of(folder):
    return tower_config(read_folder(folder, "--image_tower").config, f"--image_tower {folder}")


def tower_of(folder):
    """The tower of a folder with its weights."""
    config = config_of(folder)
    model = AutoModel.from_config(config).eval()
    model.load_state_dict(tower_tensors(folder, config, torch.float32))
    return model


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.RandomState(0).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("tower_type", ["clip", "siglip"])
def test_hidden_states_end_before_the_final_norm(tower_type, request):
    """Layer -1 of the reference is the last layer's output; today's transformers must not have normed it."""
    tower = tower_of(request.getfixturevalue(f"{tower_type}_tower"))
    found = {}
    layers = dict(tower.named_modules())
    name = max(key for key in layers if key.endswith("layers.2"))
    layers[name].register_forward_hook(lambda module, args, out: found.update(out=out))
    states = tower(torch.randn(1, 3, 28, 28), output_hidden_states=True).hidden_states
    last = found["out"][0] if isinstance(found["out"], tuple) else found["out"]
    assert len(states) == 4
    torch.testing.assert_close(states[-1], last)


@pytest.mark.parametrize(
    ("tower_type", "feature", "strategy", "tokens"),
    [("clip", "patch", "default", 4), ("clip", "cls_patch", "full", 5), ("siglip", "patch", "full", 4)],
)
def test_tokens_per_image(tower_type, feature, strategy, tokens, request):
    config = config_of(request.getfixturevalue(f"{tower_type}_tower"))
    assert select_strategy(config, feature) == strategy
    assert tower_tokens(config, strategy) == tokens


def test_a_tower_without_class_token_has_no_cls_patch(siglip_tower):
    config = config_of(siglip_tower)
    with pytest.raises(UserError, match="no class token"):
        select_strategy(config, "cls_patch")
    with pytest.raises(UserError, match="'cls' is unknown. Known: patch, cls_patch, full"):
        select_strategy(config, "cls")
    with pytest.raises(UserError, match="choose from -4 to 3"):
        check_select_layer(config, -5)


def test_the_vision_half_of_a_full_clip_is_a_tower(tmp_path):
    vision = {"image_size": 28, "patch_size": 14, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    full = CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).eval()
    full.save_pretrained(tmp_path)
    tower = tower_of(tmp_path)
    image = torch.randn(1, 3, 28, 28)
    torch.testing.assert_close(tower(image).pooler_output, full.vision_model(image).pooler_output)


@pytest.mark.parametrize("tower_type", ["clip", "siglip"])
def test_pad_keeps_the_whole_image_and_square_is_the_towers_own(tower_type, request):
    folder = request.getfixturevalue(f"{tower_type}_tower")
    config = config_of(folder)
    own = tower_image_processor(folder, config)
    wide = picture(60, 20)
    square = composed_image_processor(own, "square")
    assert square is own
    pad = composed_image_processor(own, "pad")
    side = Image.new("RGB", (60, 60), tuple(int(255 * channel) for channel in own.image_mean))
    side.paste(wide, (0, 20))
    wanted = own(side, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pad(wide, return_tensors="pt")["pixel_values"], wanted)
    back = composed_image_processor(pad, "square")
    torch.testing.assert_close(
        back(wide, return_tensors="pt")["pixel_values"], own(wide, return_tensors="pt")["pixel_values"]
    )
    with pytest.raises(UserError, match="'anyres' is unknown. Known: square, pad"):
        composed_image_processor(own, "anyres")


def test_what_is_no_tower_is_refused(tmp_path, make_base, clip_tower):
    with pytest.raises(UnknownNameError, match="'llama' model, not a known vision tower. Known: the vision models"):
        config_of(make_base("llama").folder)
    with pytest.raises(UserError, match="no such folder"):
        config_of(tmp_path / "nowhere")
    shutil.copy(clip_tower / "config.json", tmp_path)
    with pytest.raises(UserError, match="holds no weights"):
        tower_of(tmp_path)


def test_a_tower_that_lacks_weights_is_refused(tmp_path, clip_tower):
    shutil.copytree(clip_tower, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(UserError, match="lacks weights of its tower.*layers.3"):
        tower_of(tmp_path)
