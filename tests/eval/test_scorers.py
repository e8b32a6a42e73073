# SPDX-License-Identifier: Apache-2.0
"""Each scorer on examples of its benchmark's own definition, and with bad, empty and missing answers."""

from __future__ import annotations

import pytest

from moellava.eval.benchmarks import Question
from moellava.eval.choices import letter_of, scienceqa_letter
from moellava.eval.easy_vqa import score_exact
from moellava.eval.gqa import score_gqa
from moellava.eval.judged import one_score, pair_of_scores, score_llava_bench, score_mm_vet
from moellava.eval.mmbench import score_mmbench
from moellava.eval.mme import score_mme
from moellava.eval.mme import yes_or_no as mme_yes_or_no
from moellava.eval.pope import score_pope
from moellava.eval.pope import yes_or_no as pope_yes_or_no
from moellava.eval.scienceqa import score_scienceqa
from moellava.eval.seed_bench import score_seed
from moellava.eval.tally import f1
from moellava.eval.vqa import score_textvqa, score_vqa, words_of
from moellava.eval.vqa_text import evalai, official, soft_accuracy, textvqa_accuracy, vqa_accuracy

# -- VQA: processing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "processed"),
    [
        ("The Two dogs", "2 dogs"),  # articles, number words, case
        ("none", "0"),
        ("eleven", "eleven"),  # only up to ten
        ("dont know", "don't know"),  # contractions get their apostrophe
        ("couldnt've", "couldn't've"),
        ("red, white", "red white"),  # punctuation beside a space goes
        ("black/white", "black white"),  # elsewhere it becomes one
        ("1,000", "1000"),  # unless there is a number with a comma
        ("U.S.", "us"),  # periods go …
        ("3.5", "3.5"),  # … unless a digit follows
        ("yes!", "yes"),
        ("a\nb\tc ", "b c"),
        ("", ""),
        ("the", ""),
    ],
)
def test_official_processing(text, processed):
    assert official(text) == processed


@pytest.mark.parametrize(
    ("text", "processed"),
    [("Dog's", "dog 's"), ("What?", "what"), ("10,000", "10000"), ("RED,", "red"), ("It's", "it 's"), ("", "")],
)
def test_evalai_processing_splits_the_genitive_off(text, processed):
    assert evalai(text) == processed


# -- VQA: soft accuracy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("same", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_ten_people_and_how_many_of_them_agree(same, accuracy):
    assert soft_accuracy("cat", ["cat"] * same + ["dog"] * (10 - same)) == pytest.approx(accuracy)


def test_nobody_was_asked():
    assert soft_accuracy("cat", []) == 0


def test_where_all_agree_nothing_is_processed():
    """vqaEval.py processes answers only if people differ."""
    assert vqa_accuracy("the cat", ["cat"] * 10) == 0
    assert vqa_accuracy("the cat", ["cat"] * 9 + ["dog"]) == 1
    assert vqa_accuracy("CAT", ["cat"] * 10) == 1
    assert textvqa_accuracy("the cat", ["cat"] * 10) == 1


def vqa_question(*said: str, category: str = "other", image: str = "a.png") -> Question:
    return Question("?", [*said, *["none"] * (10 - len(said))], image, category)


@pytest.mark.parametrize("score", [score_vqa, score_textvqa])
def test_vqa_scores_are_means_by_type(score):
    questions = [
        vqa_question(*["red"] * 5),
        vqa_question(*["red"] * 2, image="b.png"),
        vqa_question("some", category="number"),
    ]
    scored = score(questions, ["Red.", "red", "0"])
    assert scored.tally.score == pytest.approx((1 + 0.6 + 1) / 3)
    assert scored.measures["by_category"]["other"] == {"accuracy": pytest.approx(0.8), "total": 2}
    assert scored.right == [True, True, True]


@pytest.mark.parametrize("said", [None, "", "a lengthy explanation of the red thing"])
def test_a_bad_answer_scores_nothing(said):
    assert score_vqa([vqa_question(*["red"] * 10)], [said]).tally.score == 0


@pytest.mark.parametrize(
    "prompt", ["who?\nReference OCR token: A\nAnswer", "Reference OCR token: A\nwho?\nAnswer", "who?\nAnswer"]
)
def test_the_question_of_a_textvqa_prompt(prompt):
    assert words_of(prompt) == "who?"


# -- POPE ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ("Yes", "yes"), ("No", "no"), ("No, there is not.", "no"), ("There is not any", "no"), ("Nothing", "yes"),
        ("Yes. There is no doubt", "yes"), ("a cat", "yes"), ("", None), ("  ", None), (None, None),
    ],
)  # fmt: skip
def test_pope_reads_answers_by_its_own_rule(said, heard):
    assert pope_yes_or_no(said) == heard


def test_pope_by_hand():
    """One split: tp 2, fn 1, fp 1, tn 2; in the other all are right."""
    labels = ["yes", "yes", "yes", "no", "no", "no"]
    said = ["Yes", "yes, it is", "No", "Yes", "no", "There is not"]
    questions = [Question("?", label, f"{place}.png", "random", place) for place, label in enumerate(labels)]
    other = [Question("?", label, f"{place}.png", "popular", place) for place, label in enumerate(labels)]
    scored = score_pope([*questions, *other], [*said, *labels])
    found = scored.measures["splits"]["random"]
    assert found == pytest.approx(
        {"accuracy": 4 / 6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 0.5, "total": 6}
    )
    assert scored.measures["splits"]["popular"]["f1"] == 1
    assert scored.tally.score == pytest.approx((2 / 3 + 1) / 2)


def test_where_pope_hears_nothing_that_is_wrong():
    questions = [Question("?", label, "a.png", "random") for label in ("yes", "no")]
    scored = score_pope(questions, [None, ""])
    assert scored.measures["splits"]["random"]["accuracy"] == 0
    assert scored.measures["splits"]["random"]["yes_ratio"] == 0
    assert scored.right == [False, False]


# -- MME -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "heard"),
    [("Yes", "yes"), ("no.", "no"), (" yes, it", "yes"), ("Oh no", None), ("I know", None), ("", None), (None, None)],
)
def test_mme_reads_the_first_four_letters(said, heard):
    assert mme_yes_or_no(said) == heard


def test_mme_by_hand():
    """Existence: 3 of 4 right, one of two images wholly: 75 + 50. Code: 1 of 2, no image: 50."""
    asked = [("existence", "1"), ("existence", "2"), ("code_reasoning", "3")]
    questions = [
        Question("?", answer, f"{unit}.png", subtask, about=f"{subtask}/{unit}", unit=f"{subtask}/{unit}")
        for subtask, unit in asked
        for answer in ("yes", "no")
    ]
    scored = score_mme(questions, ["Yes", "No", "Yes", "Yes", "No", "no"])
    assert scored.tally.score == pytest.approx(175)
    assert scored.measures["perception"] == pytest.approx(125)
    assert scored.measures["cognition"] == pytest.approx(50)
    existence = scored.measures["subtasks"]["existence"]
    assert existence == pytest.approx({"score": 125, "accuracy": 0.75, "accuracy_plus": 0.5, "total": 4})


def test_mme_with_all_right_is_200_a_subtask_and_with_none_0():
    questions = [Question("?", word, "1.png", "OCR", unit="1") for word in ("yes", "no")]
    assert score_mme(questions, ["yes", "no"]).tally.score == 200
    assert score_mme(questions, [None, "maybe"]).tally.score == 0


# -- multiple choice -----------------------------------------------------------------------------------------------

OPTIONS = {"A": "a dog", "B": "cats", "C": "7"}


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"), ("B.", "B"), ("(B)", "B"), ("B: cats", "B"), ("B) cats", "B"), (" C", "C"), ("B cats", "B"),
        ("The answer is B", "B"), ("the answer is (c).", "C"), ("Option A", "A"), ("cats", "B"), ("Cats.", "B"),
        ("7", "C"), ("A dog", "A"), ("A bird", None), ("D", None), ("Because", None), ("", None),
        ("answer is A or answer is B", None),
    ],
)  # fmt: skip
def test_the_option_that_is_meant(said, letter):
    assert letter_of(said, OPTIONS) == letter


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"), ("B. because", "B"), ("So. The answer is B.", "B"), ("B because", None), ("(B)", None), ("", None),
        ("The answer is B. The answer is C.", None), ("E", None), ("AB", None), ("The answer is E.", None),
    ],
)  # fmt: skip
def test_scienceqa_answers_as_llava_reads_them(said, letter):
    assert scienceqa_letter(said, "ABC") == letter


def problem(answer: int, subject: str, grade: int, hint: str = "", image: str | None = None) -> dict:
    return {
        "choices": ["x", "y"],
        "answer": answer,
        "subject": subject,
        "grade": f"grade{grade}",
        "hint": hint,
        "image": image,
    }


def test_scienceqa_columns():
    problems = [
        problem(0, "natural science", 1, "hint", "i.png"),
        problem(1, "social science", 7, "", "i.png"),
        problem(1, "language science", 12),
        problem(0, "language science", 6, "hint"),
    ]
    questions = [Question("?", one, one["image"], "default", place) for place, one in enumerate(problems)]
    scored = score_scienceqa(questions, ["A", "A", "B. y", None])
    shares = {name: (part["accuracy"], part["total"]) for name, part in scored.measures["by_category"].items()}
    assert shares == {
        "NAT": (1, 1), "SOC": (0, 1), "LAN": (0.5, 2), "TXT": (0.5, 2), "IMG": (0.5, 2), "NO": (1, 1),
        "G1-6": (0.5, 2), "G7-12": (0.5, 2),
    }  # fmt: skip
    assert scored.tally.score == 0.5
    assert scored.measures["image_accuracy"] == 0.5


def turn(number: int, options: list[str], answer: str, unit: str) -> Question:
    notes = {
        "round_id": number,
        "options": options,
        "option_char": list("AB"),
    }
    return Question("?", answer, "i.png", "c", unit, unit=unit, notes=notes)


def test_mmbench_counts_what_is_right_in_all_turns():
    questions = [turn(0, ["x", "y"], "A", "1"), turn(1, ["y", "x"], "B", "1")]
    questions += [turn(0, ["x", "y"], "A", "2"), turn(1, ["y", "x"], "B", "2")]
    scored = score_mmbench(questions, ["A", "B", "A", "A"])  # the second always says A
    assert scored.tally.score == 0.5
    assert scored.measures["vanilla"] == 1
    assert score_mmbench(questions, ["A", None, "", "B"]).tally.score == 0


def test_seed_bench_by_type_and_by_medium():
    notes = [{"choices": dict.fromkeys("ABCD", "x"), "data_type": medium} for medium in ("image", "image", "video")]
    questions = [Question("?", "B", f"{n}.png", f"type {n % 2}", n, notes=note) for n, note in enumerate(notes)]
    scored = score_seed(questions, ["B", "C", None])
    assert scored.tally.score == pytest.approx(1 / 3)
    assert scored.measures["by_data_type"]["image"]["accuracy"] == 0.5
    assert scored.measures["by_data_type"]["video"]["accuracy"] == 0


# -- one right word ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("said", "right"), [("Red.", 1), ("red", 1), ("red one", 0), ("", 0), (None, 0), ("r.ed", 0)])
def test_gqa_is_exact_but_for_case_and_period(said, right):
    question = Question("?", "red", "a.png", "open", notes={"structural": "query", "semantic": "attr"})
    scored = score_gqa([question], [said])
    assert scored.tally.score == right
    assert scored.measures["by_structural_type"] == {"query": {"accuracy": right, "total": 1}}


@pytest.mark.parametrize(("said", "right"), [("yes", 1), (" yes\n", 1), ("Yes", 0), ("yes.", 0), ("", 0), (None, 0)])
def test_easy_vqa_is_exact_but_for_white_space(said, right):
    assert score_exact([Question("?", "yes", "a.png", "yes/no")], [said]).tally.score == right


# -- judged --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "pair"),
    [
        ("8 7\nBecause", (8, 7)),
        ("8, 7.5", (8, 7.5)),
        ("8", None),
        ("11 2", None),
        ("none", None),
        ("", None),
        (None, None),
    ],
)
def test_two_scores_in_the_first_line(said, pair):
    assert pair_of_scores(said) == pair


def test_llava_bench_is_a_ratio_and_leaves_out_what_was_not_judged():
    questions = [Question("?", "", f"{n}.png", category, n) for n, category in enumerate(("conv", "conv", "detail"))]
    scored = score_llava_bench(questions, ["8 4\nx", "10 5", "sorry"])
    assert scored.tally.score == 0.5
    assert scored.measures["not_judged"] == 1
    assert scored.measures["mean_score"] == 4.5


@pytest.mark.parametrize(
    ("said", "score"), [("0.6", 0.6), ("1", 1), ("Score: 0.3", 0.3), ("2", None), ("0.5 or 0.6", None), ("", None)]
)
def test_one_score(said, score):
    assert one_score(said) == score


def test_mm_vet_by_capability():
    needs = [["math", "ocr"], ["ocr"], ["ocr"]]
    questions = [Question("?", "", f"{n}.png", ", ".join(c), n, notes={"capability": c}) for n, c in enumerate(needs)]
    scored = score_mm_vet(questions, ["1.0", "0.5", "?"])
    assert scored.tally.score == 0.75
    assert scored.measures["by_category"]["math"] == {"accuracy": 1, "total": 1}
    assert scored.measures["by_category"]["ocr"] == {"accuracy": 0.75, "total": 2}
    assert scored.measures["not_judged"] == 1


SCORERS = {
    score_exact: Question("?", "yes", "a.png", "c"),
    score_vqa: vqa_question("red"),
    score_textvqa: vqa_question("red"),
    score_gqa: Question("?", "red", "a.png", "open", notes={"structural": "query", "semantic": "attr"}),
    score_pope: Question("?", "yes", "a.png", "random"),
    score_mme: Question("?", "yes", "a.png", "OCR", unit="a"),
    score_scienceqa: Question("?", problem(0, "natural science", 1), None, "default"),
    score_mmbench: turn(0, ["x", "y"], "A", "1"),
    score_seed: Question("?", "A", "a.png", "t", notes={"choices": {"A": "x"}, "data_type": "image"}),
}


@pytest.mark.parametrize("score", SCORERS, ids=lambda score: score.__name__)
@pytest.mark.parametrize("said", [None, "", "\n", "\u2026", "<image>", "." * 50, "\ud800"])
def test_no_answer_breaks_a_scorer_or_counts_as_right(score, said):
    scored = score([SCORERS[score]], [said])
    if not (score is score_pope and said and said.strip()):  # whose rule hears a yes in whatever is no denial
        assert scored.tally.score == 0


@pytest.mark.parametrize("score", SCORERS, ids=lambda score: score.__name__)
def test_every_question_needs_an_answer(score):
    with pytest.raises(ValueError, match="shorter"):
        score([SCORERS[score]] * 2, ["yes"])


def test_f1_of_sums_is_that_of_precision_and_recall():
    import numpy as np

    precision, recall = 3 / 4, 3 / 5
    assert f1(np.array([3.0, 1.0, 2.0])) == pytest.approx(2 * precision * recall / (precision + recall))
