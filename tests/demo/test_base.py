# SPDX-License-Identifier: Apache-2.0
"""The committed base models, and the recipe that makes them."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

from moellava.conversation import conv_templates
from moellava.demo.base_lm import (
    ANSWER_WEIGHT,
    conversation_pieces,
    encode,
    joined,
    lm_config,
    make_tokenizer,
    pad_batch,
    weighted_loss,
)
from moellava.demo.base_tower import CAPTION_GROUPS, augment, load_pixels, targets
from moellava.demo.easy_vqa_data import Facts, train_images
from tests.processes import ROOT

BASE = ROOT / "moellava" / "demo" / "base"


@pytest.fixture(scope="module")
def images():
    return train_images()[:200]


def test_they_are_small_enough_for_the_repository():
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) < 10_000_000


@pytest.mark.slow
def test_the_tokenizer_is_the_recipes():
    stored, made = AutoTokenizer.from_pretrained(BASE / "lm"), make_tokenizer(train_images())
    assert stored.is_fast
    text = "USER: what color is the shape? ASSISTANT: teal<|endoftext|> Grüße, 漢字, 12"
    assert stored(text).input_ids == made(text).input_ids
    assert stored.decode(stored(text).input_ids) == text
    assert "<image>" not in stored.get_vocab()


def test_the_language_model_leaves_rows_for_new_tokens():
    tokenizer = AutoTokenizer.from_pretrained(BASE / "lm")
    assert len(tokenizer) + 2 <= lm_config(tokenizer).vocab_size


def test_the_language_model_answers_from_a_caption():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE / "lm"), AutoTokenizer.from_pretrained(BASE / "lm")
    right = 0
    cases = [
        ("what color is the shape?", "teal"),
        ("what shape is in the image?", "circle"),
        ("is there a circle?", "yes"),
    ]
    cases += [("is there a red shape?", "no"), ("is no red shape present?", "yes")]
    for question, answer in cases:
        conversation = conv_templates["qwen"].start()
        conversation.append_message(conversation.roles[0], f"a teal circle\n{question}")
        conversation.append_message(conversation.roles[1], None)
        ids = tokenizer(conversation.get_prompt(), return_tensors="pt").input_ids
        said = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        right += tokenizer.decode(said, skip_special_tokens=True).strip() == answer
    assert right >= 4


def test_the_tower_tells_shapes_and_colours_apart(images):
    """Images of one caption are nearer to each other, in the mean of their patches, than to those of another."""
    tower = CLIPVisionModel.from_pretrained(BASE / "tower").eval()
    known = [image for image in images if image.facts.color and image.facts.shape]
    with torch.no_grad():
        states = tower(load_pixels(known)).last_hidden_state[:, 1:].amax(1)
    vectors = torch.nn.functional.normalize(states - states.mean(0), dim=-1)
    captions = [image.facts.caption for image in known]
    near = (vectors @ vectors.T).fill_diagonal_(-1).argmax(1)
    agree = sum(captions[i] == captions[j] for i, j in enumerate(near.tolist()))
    assert agree / len(known) > 0.9


def test_pieces_are_joined_as_the_template_renders_them(images):
    pieces = conversation_pieces(images[0], 3, random.Random(0))
    parts = joined(pieces)
    assert "".join(text for _, text in parts) == "".join(piece.text for piece in pieces)
    assert [flag for flag, _ in parts] == [False, True] * 3


def test_answers_weigh_more_and_padding_nothing(images):
    tokenizer = make_tokenizer(images)
    rows = [encode(conversation_pieces(images[0], turns, random.Random(0)), tokenizer) for turns in (1, 2)]
    ids, weights = pad_batch(rows)
    assert set(weights.unique().tolist()) == {0.0, 1.0, ANSWER_WEIGHT}
    logits = torch.randn(*ids.shape, len(tokenizer))
    changed = logits.masked_fill((weights == 0)[..., None].expand_as(logits), 5.0)
    assert torch.isclose(weighted_loss(logits, ids, weights), weighted_loss(changed, ids, weights))


def test_unknown_facts_are_left_out_of_the_contrast():
    full, colors, shapes = CAPTION_GROUPS
    facts = [Facts("blue", "circle"), Facts(color="blue"), Facts(shape="triangle"), Facts()]
    assert targets(facts, full).tolist() == [full.index(facts[0]), -100, -100, -100]
    assert targets(facts, colors).tolist() == [1, 1, -100, -100]
    assert targets(facts, shapes).tolist() == [0, -100, 2, -100]


def test_augmentation_moves_a_picture_as_a_whole(images):
    pixels = load_pixels(images[:8])
    moved = augment(pixels, torch.Generator().manual_seed(0))
    assert moved.shape == pixels.shape
    assert not torch.equal(moved, pixels)
    for before, after in zip(pixels, moved, strict=True):
        colors = {tuple(color) for color in before.flatten(1).T.tolist()}
        assert {tuple(color) for color in after.flatten(1).T.tolist()} <= colors
