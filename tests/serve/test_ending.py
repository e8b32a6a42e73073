# SPDX-License-Identifier: Apache-2.0
"""Where answers end, for every shape of terminator, in real tokenizers; and what of them is certain while they grow."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moellava.data.tokenizers import load_tokenizer
from moellava.serve.ending import Ending, SaysTerminator, special_in

ANSWER = "Yes, it is 5° 漢字, or 🙂 # <b>  two  spaces\tand a tab"
"""With characters that a small vocabulary spells byte by byte, and what looks like the beginning of a terminator."""

SHAPES = [
    ("mistral", "</s>"),
    ("mistral", "\n</s>"),
    ("mistral", " </s>"),
    ("mistral", "END</s>"),
    ("mistral", "###"),
    ("mistral", "\n"),
    ("mistral", "\n\n"),
    ("mistral", "\n###"),
    ("mistral", "<|im_end|>"),
    ("mistral", "<|im_end|>\n"),
    ("mistral", "。"),
    ("qwen", "<|endoftext|>"),
    ("qwen", "<|im_end|>"),
    ("qwen", "<|im_end|>\n"),
    ("qwen", "<|im_end|><|endoftext|>"),
    ("qwen", "###"),
    ("qwen", "\n"),
    ("qwen", "</s>"),
    ("phi", "<|endoftext|>"),
    ("phi", "  END"),
    ("phi", "\n"),
    ("stablelm", "<|endoftext|>"),
    ("stablelm", "###"),
]
"""Tokenizer and terminator: special tokens alone, behind text and before text, and plain text of one or many tokens."""


@pytest.fixture(scope="session")
def tokenizer_of(golden_tokenizers):
    """name -> that golden tokenizer."""
    return lru_cache(lambda name: load_tokenizer(golden_tokenizers / name))


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def said_by_steps(ending: Ending, ids: list[int], prompt: list[int]) -> int:
    """After how many tokens generation would stop; one more than there are, if it would not."""
    says = SaysTerminator(ending, len(prompt))
    for size in range(1, len(ids) + 1):
        if ids[size - 1] in ending.stop_ids:
            return size
        if ending.plain and bool(says(torch.tensor([prompt + ids[:size]]), None)):
            return size
    return len(ids) + 1


@pytest.mark.parametrize(("name", "terminator"), SHAPES)
def test_an_answer_ends_with_its_terminator_and_there_alone(name, terminator, tokenizer_of):
    tokenizer = tokenizer_of(name)
    ending = Ending(tokenizer, terminator)
    ids = ids_of(tokenizer, ANSWER + terminator + "Human: and then? " + terminator)
    prompt = ids_of(tokenizer, f"Human: what?{terminator}")
    end = said_by_steps(ending, ids, prompt)
    assert end < len(ids)
    assert ending.cut(ids) == ids[:end]
    padding = [tokenizer.pad_token_id or tokenizer.eos_token_id] * 3
    for row in (ids, ids[:end], ids[:end] + padding, ids[:end] + [-1] * 3):
        assert ending.text(row) == ANSWER
    whole = ids_of(tokenizer, ANSWER)
    assert said_by_steps(ending, whole, prompt) > len(whole)
    assert ending.text(whole) == ending.text(whole + padding) == ANSWER


@pytest.mark.parametrize(("name", "terminator"), SHAPES)
def test_the_tokenizers_end_token_ends_an_answer_too(name, terminator, tokenizer_of):
    tokenizer = tokenizer_of(name)
    ending = Ending(tokenizer, terminator)
    ids = [*ids_of(tokenizer, ANSWER), tokenizer.eos_token_id]
    assert said_by_steps(ending, [*ids, *ids], []) == len(ids)
    assert ending.text([*ids, *ids]) == ANSWER


@pytest.mark.parametrize(("name", "terminator"), SHAPES)
def test_pieces_join_to_the_text_and_never_show_a_terminator(name, terminator, tokenizer_of):
    tokenizer = tokenizer_of(name)
    ending = Ending(tokenizer, terminator)
    ids = ending.cut(ids_of(tokenizer, ANSWER + terminator + "more"))
    shown = [ending.certain(ids[:size]) for size in range(len(ids) + 1)]
    for before, after in zip(shown, [*shown[1:], ending.text(ids)], strict=True):
        assert after.startswith(before)
    assert len(set(shown)) > 10


SPELLED = ["漢", "é", "🙂", "\n", "###", "#", " ", "a", "END", "<|im_end|>", "</s>", "。"]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(SHAPES),
    st.lists(st.one_of(st.integers(0, 31999), st.integers(3, 258), st.sampled_from(SPELLED)), max_size=12),
)
def test_whatever_is_said_pieces_join_and_one_definition_holds(tokenizer_of, shape, said):
    """Random tokens, among them many bytes that make no character."""
    name, terminator = shape
    tokenizer = tokenizer_of(name)
    ending = Ending(tokenizer, terminator)
    ids = [token for one in said for token in ([one] if isinstance(one, int) else ids_of(tokenizer, one))]
    end = said_by_steps(ending, ids, [])
    assert ending.cut(ids) == ids[:end]
    text, shown = ending.text(ids), ""
    assert text == ending.text(ids[:end]) == text.strip()
    assert not ending.plain or ending.plain not in text
    for size in range(min(end, len(ids)) + 1):
        certain = ending.certain(ids[:size])
        assert certain.startswith(shown) and text.startswith(certain)
        shown = certain


def test_a_newline_behind_half_a_character_is_seen(tokenizer_of):
    """SentencePiece's decoder would make three replacement characters of it."""
    tokenizer = tokenizer_of("mistral")
    half = tokenizer.convert_tokens_to_ids(["<0xE6>", "<0xBC>", "<0x0A>"])
    assert "\n" not in tokenizer.decode(half)
    ending = Ending(tokenizer, "\n")
    assert said_by_steps(ending, [*half, 5], [10]) == 3
    assert ending.text([*half, 5]) == "\ufffd"
    assert Ending(tokenizer, "</s>").certain(tokenizer.convert_tokens_to_ids(["<0xE6>", "<0xBC>"])) == ""


def test_what_is_said_matches_the_tokenizer_where_bytes_are_whole(tokenizer_of):
    for name in ("mistral", "qwen", "phi", "stablelm"):
        tokenizer = tokenizer_of(name)
        ids = ids_of(tokenizer, f"{ANSWER}\n{ANSWER}")
        assert Ending(tokenizer, "</s>").text(ids) == tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("text", "certain"),
    [("a cat", "a cat"), ("a cat ", "a cat"), ("so #", "so"), ("so ##", "so"), ("so # it", "so # it"), ("", "")],
)
def test_what_may_still_change_is_held_back(text, certain, tokenizer_of):
    tokenizer = tokenizer_of("mistral")
    assert Ending(tokenizer, "###").certain(ids_of(tokenizer, text)) == certain


def test_the_special_token_of_a_terminator_is_found_as_the_tokenizer_splits_it(tokenizer_of):
    tokenizer = copy.deepcopy(tokenizer_of("mistral"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im|>", "<|im|>end", "   "]})
    assert special_in("   <|im|>end</s>", tokenizer) == "<|im|>end"
    assert special_in("  ", tokenizer) is None and special_in("", tokenizer) is None
    ending = Ending(tokenizer, "<|im|>end\n")
    assert ending.stop_ids == sorted([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im|>end")])
    assert 0 not in ending.stop_ids


def test_a_tokenizer_without_an_end_token_stops_at_text_alone(tokenizer_of):
    tokenizer = copy.deepcopy(tokenizer_of("mistral"))
    tokenizer.eos_token = None
    ending = Ending(tokenizer, "###")
    assert ending.stop_ids == []
    assert ending.text(ids_of(tokenizer, "yes###no")) == "yes"
    assert Ending(tokenizer, "").text(ids_of(tokenizer, "yes###no")) == "yes###no"
