# SPDX-License-Identifier: Apache-2.0
"""Real tokenizers with the beginning of their vocabulary alone, for tests that ask for no id in particular.

A model's folder is opened many times in them, and its tokenizer was most of that: Qwen's has 151,936 entries.
"""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copyfile
from typing import Any

from moellava.data.tokenizers import load_tokenizer

SIZE = 2000
"""Entries that stay beside letters and added tokens: all bytes, and the commonest pieces, which are numbered first."""


def write_cut_tokenizer(source: Path, folder: Path) -> None:
    """Writes a golden tokenizer as a tokenizer.json of its first `SIZE` entries, their letters and its added tokens.

    Of a tiktoken file there is the same beginning, and the settings are those of the source: a model may read them.
    """
    folder.mkdir(parents=True)
    for path in source.glob("*.tiktoken"):
        copyfile(source / "tokenizer_config.json", folder / "tokenizer_config.json")
        (folder / path.name).write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:SIZE]))
        source = folder
    tokenizer = load_tokenizer(source)
    if source != folder:
        tokenizer.save_pretrained(folder)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    _cut(state)
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")


def _cut(state: dict[str, Any]) -> None:
    """Cuts a serialized BPE tokenizer in place."""
    model, added = state["model"], {token["content"]: token for token in state["added_tokens"]}
    in_order = sorted(model["vocab"], key=model["vocab"].get)
    letters = set("".join(in_order[:SIZE]))  # SentencePiece numbers them last, and every merge begins with them
    kept = [text for at, text in enumerate(in_order) if at < SIZE or text in letters or text in added]
    vocab = {text: index for index, text in enumerate(kept)}
    model["vocab"] = vocab
    model["merges"] = [[left, right] for left, right in model["merges"] if {left, right, left + right} <= vocab.keys()]
    beside = (text for text in added if text not in vocab)
    for text, index in (vocab | {text: index for index, text in enumerate(beside, len(vocab))}).items():
        if text in added:
            added[text]["id"] = index
