# SPDX-License-Identifier: Apache-2.0
"""MMBench (arXiv:2307.06281), in English and Chinese: a question is asked with its options in every turn."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from moellava.errors import UserError
from moellava.eval.benchmarks import BENCHMARKS, LETTER, Answers, Benchmark, Question, Scored, Submission
from moellava.eval.choices import letter_of
from moellava.eval.layout import Layout, table_of, value_of
from moellava.eval.spreadsheet import write_xlsx
from moellava.eval.tally import Item, Tally, shares

TOKENS = 1024
"""As LLaVA's script."""

LETTERS = "ABCDEFGH"
EMPTY = ("", "nan", "none")
"""How tables write that there is nothing."""

TURNED = 1_000_000
"""Tables that hold turned options themselves number them so: the question's index plus multiples of this."""

LETTER_CN = "请直接回答选项字母。"
"""LLaVA's instruction in Chinese."""

SPLITS = {"mmbench": "mmbench_dev_20230712", "mmbench-cn": "mmbench_dev_cn_20231003"}
INSTRUCTIONS = {"mmbench": LETTER, "mmbench-cn": LETTER_CN}


def score_mmbench(questions: Sequence[Question], answers: Answers) -> Scored:
    """CircularEval: the share of questions that are answered right in all turns of their options. Also the share that
    is right in the published order (`vanilla`), and both by category.

    Each question of one `unit` is one turn; its `answer` is the right letter there, its notes hold its options.
    """
    right = []
    for question, said in zip(questions, answers, strict=True):
        options = dict(zip(question.notes["option_char"], question.notes["options"], strict=True))
        right.append(said is not None and letter_of(said, options) == question.answer)
    first: dict[str, tuple[Question, bool]] = {}
    whole: dict[str, bool] = {}
    for question, hit in zip(questions, right, strict=True):
        first.setdefault(question.unit, (question, hit))
        whole[question.unit] = whole.get(question.unit, True) and hit
    items = [Item(unit, question.cluster, (float(whole[unit]), 1.0)) for unit, (question, _) in first.items()]
    names, vanilla = [q.category for q, _ in first.values()], [hit for _, hit in first.values()]
    measures = {
        "by_category": shares(names, [whole[unit] for unit in first]),
        "vanilla": sum(vanilla) / len(vanilla) if vanilla else None,
        "turns": len(questions),
    }
    return Scored(Tally(items), "accuracy in all turns of the options (circular)", measures, right)


def turns_of(row: dict[str, str], where: str, image: str, instruction: str, turns: bool) -> list[Question]:
    """A row of the table as questions: its options in the published order, and if `turns` in all others."""
    options = [row[letter] for letter in LETTERS if not is_empty(row.get(letter))]
    number = value_of(row, "index", where)
    if not number.isdecimal() or len(options) < 2:
        raise UserError(f"{where}: an index and two options at least are needed; it has {number!r} and {options}.")
    answer = row.get("answer") or ""
    if answer and answer not in LETTERS[: len(options)]:
        raise UserError(f"{where}: the answer is {answer!r}, and the options are {', '.join(LETTERS[: len(options)])}.")
    asked = [row[name] for name in ("hint", "question") if not is_empty(row.get(name))]
    found = []
    for turn in range(len(options) if turns else 1):
        turned, letters = options[turn:] + options[:turn], LETTERS[: len(options)]
        lines = [*asked, *(f"{letter}. {text}" for letter, text in zip(letters, turned, strict=True)), instruction]
        found.append(
            Question(
                text="\n".join(lines),
                answer=letters[(letters.index(answer) - turn) % len(options)] if answer else None,
                image=f"data:;base64,{image}",
                category=row.get("category") or "default",
                id=int(number),
                about=blake2b(image.encode(), digest_size=8).hexdigest(),
                unit=str(int(number) % TURNED),
                notes={"round_id": turn, "options": turned, "option_char": list(letters)},
            )
        )
    return found


def is_empty(text: str | None) -> bool:
    """Whether a cell says that there is nothing."""
    return text is None or text.strip().lower() in EMPTY


def mmbench(root: Path, split: str | None, name: str = "mmbench") -> Benchmark:
    """mmbench/ holds {split}.tsv as MMBench publishes it, images included. Without right answers in it (the test
    split), only MMBench's server scores."""
    layout = Layout(name, root / "mmbench")
    split = split or SPLITS[name]
    file = layout.file(f"{split}.tsv")

    def questions() -> list[Question]:
        rows = list(table_of(file))
        images = {row.get("index"): row.get("image") or "" for row, _ in rows}
        turns = not any(str(row.get("index")).isdecimal() and int(row["index"]) >= TURNED for row, _ in rows)
        found = []
        for row, where in rows:
            image = value_of(row, "image", where)
            found += turns_of(row, where, images.get(image, image), INSTRUCTIONS[name], turns)  # or whose image it is
        return found

    has_answers = any(not is_empty(row.get("answer")) for row, _ in table_of(file))
    return Benchmark(
        name=name,
        split=split,
        source=f"MMBench, {file}",
        questions=questions,
        max_new_tokens=TOKENS,
        score=score_mmbench if has_answers else None,
        submissions=[Submission("mmbench_submission.xlsx", write_submission)],
    )


def mmbench_cn(root: Path, split: str | None) -> Benchmark:
    """The same in Chinese: see `mmbench`."""
    return mmbench(root, split, "mmbench-cn")


def write_submission(path: Path, questions: Sequence[Question], answers: Answers) -> None:
    """What MMBench's server takes: a row a question with what was said to its options in the published order."""
    rows: list[list[Any]] = [["index", "question", *LETTERS[:4], "prediction"]]
    for question, said in zip(questions, answers, strict=True):
        if question.notes["round_id"] == 0:
            options = [*question.notes["options"], "", "", ""][:4]
            text = question.text.split(f"\n{LETTERS[0]}. ", 1)[0]
            rows.append([int(question.id), text, *options, said or ""])
    write_xlsx(path, rows)


BENCHMARKS["mmbench"] = mmbench
BENCHMARKS["mmbench-cn"] = mmbench_cn
