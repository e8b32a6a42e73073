# SPDX-License-Identifier: Apache-2.0
"""Conversations per second per core: `preprocess` beside one pass of the bare fast tokenizer over the same text.

    python benchmarks/preprocess.py --json FILE

The conversations are those of easy-VQA's training split, one per image (about 10 questions each; `plain` takes the
first question and answer). For every pair of template and tokenizer, both are timed in turn, one conversation at a time
in one thread, and the best of several rounds counts: other load on the machine slows both. Tokenizers are the golden
ones of the tests, or the folders of --tokenizer. The first ratio is to `tokenizer(text)`, the second to the Rust code
under it, without the Python that transformers adds.
"""

from __future__ import annotations

import argparse
import json
import os
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

# Before `tokenizers` is imported: a core each is what is compared.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import torch
from transformers import PreTrainedTokenizerFast

from moellava.data.preprocess import preprocess
from moellava.data.render import renderer_for
from moellava.data.tokenizer_facts import is_plain
from moellava.data.tokenizers import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "tokenizers"
PAIRS = [
    *(("v1", "mistral"), ("mistral", "mistral"), ("llama_2", "mistral"), ("qwen", "qwen"), ("mpt", "qwen")),
    *(("phi", "phi"), ("stablelm", "stablelm"), ("plain", "mistral"), ("plain", "qwen")),
]
TARGET = 0.5
"""Least speed of `preprocess`, as a fraction of the bare tokenizer's."""


def easy_vqa_conversations(limit: int | None = None) -> list[list[dict[str, str]]]:
    """One conversation per training image of the package `easy-vqa`, all its questions in turn."""
    from easy_vqa import get_train_questions

    asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image in zip(*get_train_questions(), strict=True):
        asked[image].append((question, answer))
    return [
        [
            turn
            for number, (question, answer) in enumerate(pairs)
            for turn in (
                {"from": "human", "value": question if number else f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            )
        ]
        for pairs in list(asked.values())[:limit]
    ]


def golden_tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """The tokenizers that the tests come with."""
    with tempfile.TemporaryDirectory() as folder:
        for archive in sorted(GOLDEN.glob("*.tar.xz")):
            with tarfile.open(archive) as packed:
                packed.extraction_filter = getattr(tarfile, "data_filter", None)  # which Python 3.11.2 has not
                packed.extractall(folder)
        return {path.name: load_tokenizer(path) for path in sorted(Path(folder).iterdir())}


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def compare(
    conversations: Sequence[list[dict[str, str]]], tokenizer: PreTrainedTokenizerFast, version: str, rounds: int
) -> dict[str, float]:
    """Speeds of both, in conversations per second, and tokens per conversation."""
    renderer = renderer_for(version, tokenizer)
    if is_plain(renderer):
        conversations = [turns[:2] for turns in conversations]
    rendered = [pieces for turns in conversations for pieces, _ in renderer.texts(turns, has_media=True)]
    texts = ["".join(piece.text for piece in pieces) for pieces in rendered]

    def ours() -> None:
        for turns in conversations:
            preprocess([turns], tokenizer, version=version, has_image=True)

    def bare() -> None:
        for text in texts:
            tokenizer(text)

    def backend() -> None:
        for text in texts:
            tokenizer.backend_tokenizer.encode(text)

    best = [
        min(times)
        for times in zip(*([seconds(work) for work in (ours, bare, backend)] for _ in range(rounds)), strict=True)
    ]
    ours_s, bare_s, backend_s = (len(texts) / time_s for time_s in best)
    return {
        "conversations_per_s": ours_s,
        "bare_tokenizer_per_s": bare_s,
        "bare_backend_per_s": backend_s,
        "ratio": ours_s / bare_s,
        "ratio_to_backend": ours_s / backend_s,
        "tokens_per_conversation": sum(len(tokenizer(text).input_ids) for text in texts) / len(texts),
    }


def main() -> int:
    """Prints the table and writes it; exit status 1 if a pair is slower than `TARGET`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--conversations", type=int, help="number of conversations (default: all 4,000)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of which the best counts (default: 7)")
    parser.add_argument("--tokenizer", nargs=2, action="append", metavar=("VERSION", "FOLDER"), help="instead of ours")
    args = parser.parse_args()
    torch.set_num_threads(1)
    conversations = easy_vqa_conversations(args.conversations)
    if args.tokenizer:
        tokenizers = {folder: load_tokenizer(folder, version) for version, folder in args.tokenizer}
        pairs = [(version, folder) for version, folder in args.tokenizer]
    else:
        tokenizers, pairs = golden_tokenizers(), PAIRS
    rows = []
    print("template  tokenizer   preprocess/s  tokenizer(text)/s  ratio  backend.encode/s  ratio")
    for version, name in pairs:
        row = {"template": version, "tokenizer": name, **compare(conversations, tokenizers[name], version, args.rounds)}
        rows.append(row)
        print(
            f"{version:9} {name:11} {row['conversations_per_s']:12,.0f} {row['bare_tokenizer_per_s']:18,.0f}"
            f" {row['ratio']:6.2f} {row['bare_backend_per_s']:17,.0f} {row['ratio_to_backend']:6.2f}"
        )
    if args.json:
        figures = {"target_ratio": TARGET, "conversations": len(conversations), "rounds": args.rounds, "rows": rows}
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["ratio"] >= TARGET for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
