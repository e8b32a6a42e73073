# SPDX-License-Identifier: Apache-2.0
"""`preprocess` and its rows: dispatch, truncation and errors."""

from __future__ import annotations

import importlib

import pytest
import torch

from moellava import conversation
from moellava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moellava.data import preprocess as module
from moellava.data.preprocess import preprocess
from moellava.errors import DataError, UnknownNameError
from moellava.mm_utils import tokenizer_image_token

TURNS = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "one two three four"}]
ROWS = ["plain", "v1", "llama_2", "qwen", "phi", "stablelm", "mistral", "openchat", "minicpm", "mpt"]


@pytest.mark.parametrize("version", ROWS)
def test_each_named_function_is_a_row(tokenizers, version):
    tokenizer = tokenizers["qwen"]
    row = getattr(module, f"preprocess_{version}")
    assert row.__name__ == f"preprocess_{version}"
    named = row([TURNS, TURNS], tokenizer, has_image=True)
    dispatched = preprocess([TURNS, TURNS], tokenizer, version=version, has_image=True)
    for key in ("input_ids", "labels"):
        assert len(named[key]) == 2 and all(tensor.dtype == torch.long for tensor in named[key])
        assert all(torch.equal(*pair) for pair in zip(named[key], dispatched[key], strict=True))


def test_sources_are_not_changed(tokenizers):
    source = [dict(turn) for turn in TURNS]
    preprocess([source], tokenizers["phi"], version="v1_mmtag", has_image=True)
    module.preprocess_plain([source], tokenizers["phi"])
    assert source == TURNS


def test_plain_always_has_its_image(tokenizers):
    ids = module.preprocess_plain([TURNS], tokenizers["phi"])["input_ids"][0].tolist()
    assert ids[0] == IMAGE_TOKEN_INDEX


def test_an_image_tag_without_an_image_is_text(tokenizers):
    ids = preprocess([TURNS], tokenizers["phi"], version="phi")["input_ids"][0].tolist()
    assert IMAGE_TOKEN_INDEX not in ids
    assert "<image>" in tokenizers["phi"].decode(ids)


def test_mmtag_wraps_bare_and_wrapped_images_alike(tokenizers):
    wrapped = [{"from": "human", "value": "<Image><image></Image>\nwhat?"}, TURNS[1]]
    batch = preprocess([TURNS, wrapped], tokenizers["mistral"], version="v1_mmtag", has_image=True)
    assert batch["input_ids"][0].tolist() == batch["input_ids"][1].tolist()
    text = tokenizers["mistral"].decode([token for token in batch["input_ids"][0].tolist() if token >= 0])
    assert "<Image> </Image>" in text.replace("  ", " ")


def test_a_leading_answer_is_left_out(tokenizers):
    late = [{"from": "gpt", "value": "Welcome!"}, *TURNS]
    batch = preprocess([TURNS, late], tokenizers["qwen"], version="qwen", has_image=True)
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])


def test_an_open_question_trains_what_stands_before_it(tokenizers):
    turns = [*TURNS, {"from": "human", "value": "and now?"}]
    batch = preprocess([turns], tokenizers["qwen"], version="qwen", has_image=True)
    labels = batch["labels"][0]
    assert labels[-1] == IGNORE_INDEX and (labels != IGNORE_INDEX).sum() == 5


def test_overlong_conversations(tokenizers):
    options = {"version": "phi", "has_image": True}
    whole = preprocess([TURNS], tokenizers["phi"], **options)["input_ids"][0]
    cut = preprocess([TURNS], tokenizers["phi"], max_length=len(whole) - 2, **options)
    assert torch.equal(cut["input_ids"][0], whole[:-2]) and cut["labels"][0][-1] != IGNORE_INDEX
    kept = preprocess([TURNS], tokenizers["phi"], max_length=len(whole), overlong="error", **options)
    assert torch.equal(kept["input_ids"][0], whole)
    with pytest.raises(DataError, match=f"conversation 0 has {len(whole)} ids but at most {len(whole) - 1}"):
        preprocess([TURNS], tokenizers["phi"], max_length=len(whole) - 1, overlong="error", **options)
    assert preprocess([TURNS], tokenizers["phi"], max_length=9, overlong="drop", **options)["input_ids"] == []
    with pytest.raises(DataError, match="no answer to train on within the first 9 ids"):
        preprocess([TURNS], tokenizers["phi"], max_length=9, **options)
    with pytest.raises(ValueError, match="'cut' but must be one of"):
        preprocess([TURNS], tokenizers["phi"], max_length=9, overlong="cut", **options)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "has no turns"),
        ([TURNS[1]], "has no question"),
        ([TURNS[0]], "has no answer to train on"),
        ([TURNS[0], TURNS[0]], "do not alternate"),
        ([{"from": "system", "value": "x"}, *TURNS], "'system'; known are 'human' and 'gpt'"),
    ],
)
def test_malformed_conversations_are_errors(tokenizers, turns, message):
    with pytest.raises(DataError, match=f"conversation 1 .*{message}"):
        preprocess([TURNS, turns], tokenizers["phi"], version="phi", has_image=True)


def test_an_unknown_version_is_an_error(tokenizers):
    with pytest.raises(UnknownNameError, match="'phi3'.*Known: .*stablelm"):
        preprocess([TURNS], tokenizers["phi"], version="phi3")


def test_the_names_of_the_guide_work(tokenizers, monkeypatch):
    """The table 'In the guide → here' of docs/CUSTOM.md, from top to bottom."""
    tokenizer = tokenizers["stablelm"]
    assert tokenizer.added_tokens_encoder["<|reg0|>"] == tokenizer.unk_token_id
    mine = conversation.Conversation(
        system="Be brief.",
        roles=("USER", "ASSISTANT"),
        version="from-the-guide",
        messages=(),
        offset=0,
        sep_style=conversation.SeparatorStyle.TWO,
        sep=" ",
        sep2="<|endoftext|>",
    )
    monkeypatch.setattr(conversation.conv_templates, "_entries", dict(conversation.conv_templates))
    conversation.conv_templates["from-the-guide"] = mine
    with pytest.raises(ValueError, match="registered twice"):
        conversation.conv_templates["from-the-guide"] = mine
    sources = [[{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]]
    named = preprocess(sources, tokenizer, version="from-the-guide")
    usual = preprocess(sources, tokenizer)
    assert usual["input_ids"][0].tolist() == preprocess(sources, tokenizer, version="v1")["input_ids"][0].tolist()
    monkeypatch.setattr(conversation, "default_conversation", mine)
    found = preprocess(sources, tokenizer, has_image=False)
    assert found["labels"][0].tolist() == named["labels"][0].tolist() != usual["labels"][0].tolist()
    for name in ("v1", "qwen", "phi", "stablelm"):
        assert callable(getattr(module, f"preprocess_{name}"))
    assert tokenizer_image_token("<image>\nhi", tokenizer)[0] == -200
    for family in ("stablelm", "qwen", "phi", "mistral", "llama"):
        assert importlib.import_module(f"moellava.model.language_model.llava_{family}_moe")
