# SPDX-License-Identifier: Apache-2.0
"""Ids under the mask and those of plain transformers: hidden tokens keep the ids of others, other rules are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moellava.conversation import Origin, Piece
from moellava.data.encoder import CountedImages, Encoder
from moellava.data.masking import engine_for
from moellava.data.render import ChatRenderer
from moellava.data.tokenizer_facts import fit_of
from moellava.data.tokenizers import load_tokenizer
from moellava.errors import UserError
from tests.attacks.tokenizers import CHAT, rule, small_model, write_folder

TURNS = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "bye"}]


@pytest.fixture
def with_tokens(tmp_path):
    """Added tokens -> a tokenizer of a small SentencePiece vocabulary with them and a chat template."""

    def make(*tokens: dict) -> PreTrainedTokenizerFast:
        tokenizer = load_tokenizer(write_folder(tmp_path / "folder", small_model(tmp_path), list(tokens)))
        tokenizer.chat_template = CHAT
        return tokenizer

    return make


def test_tokens_behind_hidden_ones_keep_their_ids(with_tokens):
    tokenizer = with_tokens(rule("<|end|>"), rule("<|pad|>"), rule("<think>", special=False), rule("<|user|>"))
    think = tokenizer.convert_tokens_to_ids("<think>")
    ids = engine_for(tokenizer).encode([Piece("a<think>b <|end|>", origin=Origin.ANSWER), Piece("<|user|>")]).ids
    assert ids.count(think) == 1 and ids[-1] == tokenizer.convert_tokens_to_ids("<|user|>")
    assert tokenizer.convert_tokens_to_ids("<|end|>") not in ids and max(ids) < len(tokenizer)


@pytest.mark.parametrize("flags", [{"single_word": True}, {"normalized": True}])
def test_a_template_that_a_tokenizer_reads_otherwise_is_refused(tmp_path, flags, with_tokens):
    tokens = [rule(f"<|{name}|>", **flags) for name in ("user", "assistant", "end")]
    tokenizer = with_tokens(*tokens)
    tokenizer.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "tokenizer.json"
    state = json.loads(path.read_text())
    for token in state["added_tokens"]:  # where a folder of SentencePiece's files has none that is normalized
        token |= flags if token["content"].startswith("<|") else {}
    path.write_text(json.dumps(state))
    config = tmp_path / "saved" / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    settings.pop("added_tokens_decoder", None)
    config.write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path / "saved")
    encoder = Encoder(tokenizer, ChatRenderer(tokenizer), CountedImages(1))
    with pytest.raises(UserError, match='--version chat_template: .*means.*"normalized" and "single_word" to false'):
        encoder.encode({"conversations": TURNS})
    fit = fit_of(tokenizer, "chat_template")
    assert not fit.fits and "rules of its own" in fit.verdict


def test_typed_special_tokens_are_text_for_every_model_of_a_vocabulary(tmp_path: Path):
    words = ["<unk>", "</s>", "▁a", "a", "<", "/", "s", ">"]
    vocabulary = {word: number for number, word in enumerate(words)}
    known = {
        "Unigram": models.Unigram([(word, -1.0 - number) for number, word in enumerate(words)], unk_id=0),
        "WordPiece": models.WordPiece(vocabulary, unk_token="<unk>"),
        "WordLevel": models.WordLevel(vocabulary, unk_token="<unk>"),
    }
    for name, model in known.items():
        backend = Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.Metaspace() if name == "Unigram" else pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
        ids = engine_for(tokenizer).encode([Piece("a </s>", origin=Origin.ANSWER), Piece("</s>")]).ids
        assert ids.count(vocabulary["</s>"]) == 1 and ids[-1] == vocabulary["</s>"], name
