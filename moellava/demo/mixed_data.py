# SPDX-License-Identifier: Apache-2.0
"""Several skills for one small language model: to see, to know, and to know of what it sees.

The pictures and their questions are easy-VQA's. Beside them there is a table of facts that has no rule, so that nothing
but room in the weights helps: what each invented person calls each good ('Bako, molu?' 'teri'), and what each calls a
shape of a colour, which has to be seen ('Bako, this?' 'nosa'). How many facts there are is how much has to be kept.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from moellava.conversation import conv_templates
from moellava.demo.easy_vqa_data import COLORS, SHAPES, Facts, TrainImage, conversation
from moellava.eval.easy_vqa import test_questions

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"

Turn = tuple[str, str]
"""A question and the right answer."""

VERSION = "qwen"
"""The template."""

KNOW, LOOK, SEE = "know", "look up", "see"
"""The skills: a fact; a fact about what is seen; a question of easy-VQA."""


@dataclass(frozen=True)
class Sizes:
    """How much there is to learn.

    Args:
        people, goods: every person has a word for every good.
        lookers: people who have a word for every shape of every colour, too.
        words: that they choose from; a fact is log2(words) bits.
        turns: questions of a record about no picture; one about a picture has half of them of each skill.
        seed: of names and facts.
    """

    people: int = 56
    goods: int = 56
    lookers: int = 8
    words: int = 64
    turns: int = 16
    seed: int = 0


@dataclass(frozen=True)
class World:
    """The facts.

    Args:
        people, goods: names.
        known: (person, good) -> word.
        seen: (person, color, shape) -> word.
    """

    people: list[str]
    goods: list[str]
    known: dict[tuple[str, str], str]
    seen: dict[tuple[str, str, str], str]

    @classmethod
    def of(cls, sizes: Sizes) -> World:
        """Draws names and facts."""
        chance = random.Random(sizes.seed)
        syllables = ["".join(pair) for pair in product(CONSONANTS, VOWELS)]
        names = chance.sample(["".join(pair) for pair in product(syllables, syllables)], sum(counts(sizes)))
        people = [name.capitalize() for name in names[: sizes.people]]
        goods, words = names[sizes.people : -sizes.words], names[-sizes.words :]
        known = {pair: chance.choice(words) for pair in product(people, goods)}
        seen = {triple: chance.choice(words) for triple in product(people[: sizes.lookers], COLORS, SHAPES)}
        return cls(people, goods, known, seen)

    def about(self, facts: Facts) -> list[tuple[str, str]]:
        """What is asked of a picture, with the right answers; nothing where colour or shape is not known."""
        if facts.color is None or facts.shape is None:
            return []
        asked = (key for key in self.seen if key[1:] == (facts.color, facts.shape))
        return [(f"{key[0]}, this?", self.seen[key]) for key in asked]

    def facts(self) -> list[tuple[str, str]]:
        """What is asked about no picture, with the right answers."""
        return [(f"{person}, {good}?", word) for (person, good), word in self.known.items()]


def counts(sizes: Sizes) -> tuple[int, int, int]:
    """How many names of each sort."""
    return sizes.people, sizes.goods, sizes.words


def records(world: World, images: list[TrainImage], sizes: Sizes, copies: int, seed: int) -> list[dict[str, Any]]:
    """Each fact in `copies` conversations about no picture, and as many conversations again about pictures."""
    chance = random.Random(seed)
    told = [
        {"id": f"facts-{number}", "conversations": conversation(turns, has_image=False)}
        for number, turns in enumerate(_dealt(world.facts(), copies, sizes.turns, chance))
    ]
    pictures = [chance.choice(images) for _ in told]
    return told + [
        {
            "id": f"picture-{number}",
            "image": image.path.name,
            "conversations": conversation(_mixed(world, image, sizes.turns // 2, chance), has_image=True),
        }
        for number, image in enumerate(pictures)
    ]


def _dealt(
    facts: list[tuple[str, str]], copies: int, turns: int, chance: random.Random
) -> Iterator[list[tuple[str, str]]]:
    """All facts in a new order for each copy, so many a conversation."""
    for _ in range(copies):
        order = chance.sample(facts, len(facts))
        yield from (order[start : start + turns] for start in range(0, len(order), turns))


def _mixed(world: World, image: TrainImage, most: int, chance: random.Random) -> list[tuple[str, str]]:
    """Questions of both skills about one picture, in any order."""
    own, about = list(image.turns), world.about(image.facts)
    turns = chance.sample(own, min(most, len(own))) + chance.sample(about, min(most, len(about)))
    return chance.sample(turns, len(turns))


def questions(world: World, images: list[TrainImage], each: int, seed: int) -> list[dict[str, Any]]:
    """So many questions of each skill as rows of the task `own`: facts that were learnt, about pictures that were not.

    Args:
        world: the facts.
        images: of the test split.
        each: questions a skill; fewer where there are fewer.
        seed: which.
    """
    chance = random.Random(seed)
    asked: dict[str, list[tuple[TrainImage | None, tuple[str, str]]]] = {
        KNOW: [(None, turn) for turn in world.facts()],
        LOOK: [(image, turn) for image in images for turn in world.about(image.facts)],
        SEE: [(image, turn) for image in images for turn in image.turns],
    }
    drawn = [
        {"text": text, "answer": word, "category": skill, **({"image": str(image.path)} if image else {})}
        for skill, pairs in asked.items()
        for image, (text, word) in chance.sample(pairs, min(each, len(pairs)))
    ]
    return [{"question_id": number, **row} for number, row in enumerate(drawn)]


def texts(world: World, images: list[TrainImage]) -> Iterator[str]:
    """What a tokenizer should have a token for each word of."""
    shown = [(f"{person}, this?", word) for (person, _, _), word in world.seen.items()]
    asked = [turn for image in images for turn in image.turns]
    for question, answer in [*world.facts(), *shown, *asked]:
        yield " ".join([conv_templates[VERSION].system, f"USER: {question} ASSISTANT: {answer}"])


def unseen_images() -> list[TrainImage]:
    """The test split with its questions, as `train_images` has the training split."""
    turns: dict[Path, list[tuple[str, str]]] = {}
    for question in test_questions():
        assert question.image is not None  # every question of easy-VQA is about a picture
        turns.setdefault(Path(question.image), []).append((question.text, question.answer))
    return [TrainImage(int(path.stem), path, tuple(turns[path])) for path in sorted(turns)]
