# SPDX-License-Identifier: Apache-2.0
"""Ids and labels against the reference implementation's, row by row."""

from __future__ import annotations

from collections import Counter

from moellava.constants import IGNORE_INDEX
from moellava.data.masking import Encoded
from moellava.data.preprocess import preprocess
from moellava.data.render import TemplateRenderer
from moellava.data.tokenizer_facts import mask_problem

MAX_LENGTH = 2048


def has_image(row: dict) -> bool:
    return any("<image>" in turn["value"] for turn in row["conversations"] if turn["from"] == "human")


def encoded(row: dict, tokenizers: dict) -> tuple[list[int], list[int]]:
    tokenizer = tokenizers[row["tokenizer"]]
    options = {"version": row["template"], "has_image": has_image(row), "max_length": MAX_LENGTH}
    batch = preprocess([row["conversations"]], tokenizer, **options)
    return batch["input_ids"][0].tolist(), batch["labels"][0].tolist()


def test_the_rows_cover_all_templates(golden_rows):
    counts = Counter((row["template"], row["tokenizer"]) for row in golden_rows)
    assert sum(counts.values()) >= 117
    templates = {template for template, _ in counts}
    assert templates >= {"plain", "v1", "qwen", "phi", "stablelm", "mistral", "llama_2", "mpt", "v0", "v1_mmtag"}


def test_ids_and_labels_equal_the_reference(golden_rows, tokenizers):
    kept = [row for row in golden_rows if not row.get("mismatch")]
    assert len(kept) >= 109
    wrong = [
        (row["template"], row["tokenizer"], row["name"])
        for row in kept
        if encoded(row, tokenizers) != (row["input_ids"], row["labels"])
    ]
    assert wrong == []


def test_what_the_reference_lost_is_supervised_here(golden_rows, tokenizers):
    lost = [row for row in golden_rows if row.get("mismatch")]
    assert len(lost) == 8
    for row in lost:
        tokenizer = tokenizers[row["tokenizer"]]
        pieces = TemplateRenderer(row["template"]).pieces(row["conversations"], has_media=has_image(row))
        ids, labels = encoded(row, tokenizers)
        assert mask_problem(tokenizer, pieces, Encoded(ids, labels)) is None, row["name"]
        assert labels[-1] == ids[-1] == tokenizer.eos_token_id
        if row["name"] == "separator-in-question":
            assert ids == row["input_ids"]
        else:
            assert ids.count(tokenizer.eos_token_id) == 1, "the typed terminator is text"


def test_a_truncated_sample_is_the_beginning_of_the_whole(golden_rows, tokenizers):
    row = next(row for row in golden_rows if row["name"] == "very-long" and row["tokenizer"] == "qwen")
    ids, labels = encoded(row, tokenizers)
    whole = preprocess([row["conversations"]], tokenizers["qwen"], version="qwen")
    assert len(ids) == MAX_LENGTH < len(whole["input_ids"][0])
    assert whole["input_ids"][0][:MAX_LENGTH].tolist() == ids
    assert whole["labels"][0][:MAX_LENGTH].tolist() == labels
    assert labels[-1] != IGNORE_INDEX
