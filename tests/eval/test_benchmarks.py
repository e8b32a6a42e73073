# SPDX-License-Identifier: Apache-2.0
"""The benchmark's questions, and images that change places."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from moellava.errors import UnknownNameError, UserError
from moellava.eval.benchmarks import Question, shuffle_images
from moellava.eval.easy_vqa import category_of, easy_vqa
from moellava.eval.suite import BENCHMARKS


def test_easy_vqa_is_the_whole_official_test_split():
    questions = easy_vqa().questions()
    assert len(questions) == 9673
    assert len({question.image for question in questions}) == 1000
    assert all(question.image.parent.parent.name == "test" and question.image.exists() for question in questions)
    assert Counter(question.category for question in questions) == {"yes/no": 7136, "shape": 1257, "color": 1280}


@pytest.mark.parametrize(
    ("answer", "category"), [("yes", "yes/no"), ("no", "yes/no"), ("circle", "shape"), ("teal", "color")]
)
def test_the_answer_tells_the_category(answer, category):
    assert category_of(answer) == category


def test_shuffling_is_a_derangement_that_keeps_questions_and_images():
    questions = easy_vqa().questions()
    shuffled = shuffle_images(questions, seed=0)
    assert [(q.text, q.answer, q.category) for q in shuffled] == [(q.text, q.answer, q.category) for q in questions]
    assert not any(before.image == after.image for before, after in zip(questions, shuffled, strict=True))
    assert Counter(q.image for q in shuffled) == Counter(q.image for q in questions)


def test_shuffling_depends_on_the_seed_alone():
    questions = easy_vqa().questions()[:500]
    assert shuffle_images(questions, seed=1) == shuffle_images(questions, seed=1)
    assert shuffle_images(questions, seed=1) != shuffle_images(questions, seed=2)


@pytest.mark.parametrize("counts", [(3, 2), (1,), (2, 1, 0)])
def test_an_image_with_most_of_the_questions_cannot_be_shuffled(counts):
    questions = [
        Question("?", "yes", Path(f"{i}.png"), "yes/no") for i, count in enumerate(counts) for _ in range(count)
    ]
    with pytest.raises(UserError, match=f"one image has {max(counts)} of the {sum(counts)}"):
        shuffle_images(questions, seed=0)


@pytest.mark.parametrize("counts", [(1, 1), (2, 2), (3, 1, 2), (1, 1, 1)])
def test_small_sets_are_deranged_as_well(counts):
    questions = [
        Question("?", "yes", Path(f"{i}.png"), "yes/no") for i, count in enumerate(counts) for _ in range(count)
    ]
    for seed in range(5):
        shuffled = shuffle_images(questions, seed)
        assert not any(before.image == after.image for before, after in zip(questions, shuffled, strict=True))


def test_an_unknown_benchmark_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match="Did you mean 'vqav2'.*easy-vqa"):
        BENCHMARKS["vqa-v2"]


def test_questions_about_no_image_stay_where_they_are():
    questions = [Question("?", "a", image, "c", number) for number, image in enumerate(("a.png", None, "b.png"))]
    shuffled = shuffle_images(questions, seed=0)
    assert [question.image for question in shuffled] == ["b.png", None, "a.png"]
    assert [question.cluster for question in shuffled] == ["b.png", "question 1", "a.png"]
