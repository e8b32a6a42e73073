# SPDX-License-Identifier: Apache-2.0
"""Scores: what counts as right, and whose answer is whose."""

from __future__ import annotations

from pathlib import Path

import pytest

from moellava.eval import scoring
from moellava.eval.benchmarks import Question
from moellava.eval.scoring import Score, answers_of, by_category, score
from moellava.serve.answer import Answer
from moellava.serve.generate import Sampling

QUESTIONS = [
    Question("is there a circle in the image?", "yes", Path("a.png"), "yes/no"),
    Question("what color?", "red", Path("b.png"), "color"),
    Question("is it a circle?", "no", Path("c.png"), "yes/no"),
]


@pytest.mark.parametrize(
    ("said", "right"),
    [("yes", 1), (" yes\n", 1), ("Yes", 0), ("yes.", 0), ("yes it is", 0), ("", 0)],
)
def test_only_the_exact_answer_counts(said, right):
    assert score(QUESTIONS[:1], [said]) == Score(right, 1)


def test_every_question_needs_an_answer():
    with pytest.raises(ValueError, match="shorter"):
        score(QUESTIONS, ["yes"])


def test_accuracy_is_a_share():
    assert Score(3, 4).accuracy == 0.75
    assert Score(0, 0).accuracy == 0.0


def test_categories_are_counted_apart():
    assert by_category(QUESTIONS, ["yes", "blue", "yes"]) == {"color": Score(0, 1), "yes/no": Score(1, 2)}


def test_answers_come_back_in_the_order_of_the_questions(monkeypatch):
    asked = []

    def echo(vlm, requests, **settings):
        asked.extend(request.messages[-1]["value"] for request in requests)
        assert settings.pop("batch_size") == 2
        assert Sampling(**settings) == Sampling(max_new_tokens=8, temperature=0), "answers are greedy"
        return [Answer(request.images[0]) for request in requests]

    monkeypatch.setattr(scoring, "answer", echo)
    said = answers_of(None, QUESTIONS, max_new_tokens=8, batch_size=2)
    assert said == ["a.png", "b.png", "c.png"]
    assert asked == [f"<image>\n{question.text}" for question in QUESTIONS]
