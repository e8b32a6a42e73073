# SPDX-License-Identifier: Apache-2.0
"""Questions of one's own: a JSON Lines file with the right answers in it, scored by exact match."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from moellava.eval.benchmarks import BENCHMARKS, Benchmark, Question
from moellava.eval.easy_vqa import score_exact
from moellava.eval.layout import Layout, lines_of, text_of
from moellava.log import get_logger

logger = get_logger(__name__)

MOST_TOKENS = 64

KEYS = ("text", "answer", "image", "category", "question_id")
"""What is read of a line."""


def own(root: Path, split: str | None) -> Benchmark:
    """own/questions.jsonl: `text` and `answer` of each question, and where it has them `image` (a path in own/, or a
    whole one), `category` and `question_id`.

    Raises:
        UserError: the file is missing, or another split is asked for.
    """
    layout = Layout("own", root / "own")
    split = layout.split(split, ("test",))
    file = layout.file("questions.jsonl")

    def questions() -> list[Question]:
        rows = list(lines_of(file))
        for key, count in Counter(key for row, _ in rows for key in row if key not in KEYS).items():
            logger.warning("%s: %r of %d lines is not used; known are %s", file, key, count, ", ".join(KEYS))
        return [
            Question(
                text=text_of(row, "text", where),
                answer=text_of(row, "answer", where).strip(),
                image=layout.folder / text_of(row, "image", where) if row.get("image") is not None else None,
                category=str(row.get("category", "default")),
                id=row.get("question_id", number),
            )
            for number, (row, where) in enumerate(rows)
        ]

    return Benchmark(
        name="own",
        split=split,
        source=str(file),
        questions=questions,
        max_new_tokens=MOST_TOKENS,
        score=score_exact,
    )


BENCHMARKS["own"] = own
