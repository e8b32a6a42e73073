# SPDX-License-Identifier: Apache-2.0
"""What the viewer and the tokenizer doctor show is what training gets: the labels of `Encoded`, and no others."""

from __future__ import annotations

import pytest

from moellava.constants import IGNORE_INDEX
from moellava.data.masking import Encoded, MaskEngine, engine_for
from moellava.data.render import TemplateRenderer
from moellava.data.tokenizer_facts import PROBE, fit_of, mask_problem
from moellava.data.view import tokens_of, trained_texts

FITTING = {"mistral": "v1", "qwen": "qwen", "phi": "phi", "stablelm": "stablelm"}


@pytest.fixture(params=FITTING)
def probe(request, tokenizers):
    """(tokenizer, template, pieces of the probe conversation) for every tokenizer and the template that fits it."""
    tokenizer, version = tokenizers[request.param], FITTING[request.param]
    return tokenizer, version, TemplateRenderer(version).pieces(PROBE, has_media=True)


def nothing(encoded: Encoded) -> None:
    encoded.labels[:] = [IGNORE_INDEX] * len(encoded.ids)


def shifted(encoded: Encoded) -> None:
    encoded.labels.insert(0, encoded.labels.pop())


def one_too_many(encoded: Encoded) -> None:
    last = max(n for n, label in enumerate(encoded.labels) if label == IGNORE_INDEX)
    encoded.labels[last] = encoded.ids[last]


def one_too_few(encoded: Encoded) -> None:
    encoded.labels[-1] = IGNORE_INDEX


def another_token(encoded: Encoded) -> None:
    encoded.labels[-1] += 1


def everything(encoded: Encoded) -> None:
    encoded.labels[:] = encoded.ids


MISTAKES = [nothing, shifted, one_too_many, one_too_few, another_token, everything]


def test_tokens_are_those_of_training_and_their_texts_the_prompts(probe):
    tokenizer, _, pieces = probe
    tokens = tokens_of(tokenizer, pieces, has_image=True)
    encoded = engine_for(tokenizer).encode(pieces, has_image=True)
    assert [token.id for token in tokens] == encoded.ids and [token.label for token in tokens] == encoded.labels
    text = "".join(piece.text for piece in pieces)
    assert "".join(token.text for token in tokens).removeprefix(tokenizer.bos_token or "") == text
    trained = "".join(piece.text for piece in pieces if piece.trained)
    assert "".join(token.text for token in tokens if token.trained) == trained


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_label_is_a_problem(probe, mistake):
    tokenizer, _, pieces = probe
    encoded = engine_for(tokenizer).encode(pieces, has_image=True)
    assert mask_problem(tokenizer, pieces, encoded) is None
    mistake(encoded)
    assert mask_problem(tokenizer, pieces, encoded) is not None


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_viewer_and_the_doctor_show_what_the_engine_did_wrong(probe, mistake, monkeypatch):
    tokenizer, version, pieces = probe
    encode = MaskEngine.encode

    def wrong(*arguments, **options) -> Encoded:
        encoded = encode(*arguments, **options)
        mistake(encoded)
        return encoded

    assert fit_of(tokenizer, version).fits
    monkeypatch.setattr(MaskEngine, "encode", wrong)
    assert not fit_of(tokenizer, version).fits
    labels = wrong(engine_for(tokenizer), pieces, has_image=True).labels
    assert [token.label for token in tokens_of(tokenizer, pieces, has_image=True)] == labels


def test_labels_are_decoded_and_not_the_ids_that_they_stand_under(tokenizers):
    ids = tokenizers["phi"]("one two three").input_ids
    other = tokenizers["phi"](" four").input_ids
    assert trained_texts(tokenizers["phi"], Encoded(ids, [IGNORE_INDEX, *other, IGNORE_INDEX])) == [" four"]
    assert trained_texts(tokenizers["phi"], Encoded(ids, [ids[0], IGNORE_INDEX, ids[2]])) == ["one", " three"]
    assert trained_texts(tokenizers["phi"], Encoded([-200, *ids], [-200, *ids])) == ["<image>one two three"]
