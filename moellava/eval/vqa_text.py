# SPDX-License-Identifier: Apache-2.0
"""VQA's comparison of short answers: how they are brought to one form, and the soft accuracy (arXiv:1505.00468).

The official processing (`vqaEval.py` of GT-Vision-Lab/VQA) takes punctuation away, number words to digits, articles
out, and puts the apostrophe into contractions that lack it. TextVQA's evaluator, EvalAI's, makes lower case and splits
off "'s" before it does the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ENOUGH = 3
"""People who have to agree with an answer for it to count in full."""

ARTICLES = frozenset({"a", "an", "the"})

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
"""A period that no digit follows. The official pattern means to look at the digit before it too, but has a slip in it:
what it does is this."""

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
"""Contractions as they are spelled right."""


def _without_one(word: str) -> list[str]:
    """A contraction with each of its apostrophes left out in turn."""
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {lacking: word for word in _CONTRACTED.split() for lacking in _without_one(word)} | {
    "somebody'd": "somebodyd"
}
"""What lacks an apostrophe -> the contraction. The last row is as the official table has it."""


def bare(text: str) -> str:
    """A text in one line, without white space around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def without_punctuation(text: str) -> str:
    """Punctuation gone where a space is beside it somewhere, or the text has a number with a comma; else a space.

    Examples:
        'red, white' -> 'red white'; '1,000' -> '1000'; 'black/white' -> 'black white'; 'U.S.' -> 'US'; '3.5' -> '3.5'
    """
    said = text
    has_number = COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        is_beside_space = mark + " " in text or " " + mark in text
        said = said.replace(mark, "" if is_beside_space or has_number else " ")
    return PERIOD.sub("", said)


def plain_words(text: str) -> str:
    """Lower case, number words as digits, no articles, contractions with their apostrophe.

    Examples:
        'The Two dogs' -> '2 dogs'; 'dont know' -> "don't know"
    """
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def official(text: str) -> str:
    """The processing of VQA's own evaluation."""
    return plain_words(without_punctuation(bare(text)))


def evalai(text: str) -> str:
    """The processing of TextVQA's evaluation, and of what LLaVA hands in to EvalAI's servers."""
    return official(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def soft_accuracy(said: str, answers: Sequence[str]) -> float:
    """How far people agree with an answer: the mean over all of them of min(1, others who say the same / 3).

    For ten people: 0 for what nobody says, 0.3 for one of them, 0.6 for two, 0.9 for three, 1 from four on.
    """
    same = sum(answer == said for answer in answers)
    if not answers:
        return 0.0
    by_those = same * min(1.0, (same - 1) / ENOUGH) if same else 0.0
    by_others = (len(answers) - same) * min(1.0, same / ENOUGH)
    return (by_those + by_others) / len(answers)


def vqa_accuracy(said: str, answers: Sequence[str]) -> float:
    """VQA's: where people agree word for word nothing is processed, and case alone does not count."""
    answers = [bare(answer) for answer in answers]
    said = bare(said)
    if len(set(answers)) > 1:
        said, answers = official(said), [official(answer) for answer in answers]
    return soft_accuracy(said.lower(), [answer.lower() for answer in answers])


def textvqa_accuracy(said: str, answers: Sequence[str]) -> float:
    """TextVQA's: everything is processed."""
    return soft_accuracy(evalai(said), [evalai(answer) for answer in answers])
