# SPDX-License-Identifier: Apache-2.0
"""easy-VQA as LLaVA records, and what its answers say about each image.

easy-VQA (Victor Zhou, MIT; PyPI `easy-vqa`) is a published benchmark: 64×64 images of one coloured shape, 13 answers,
an official split into 4,000 training and 1,000 test images. Everything here reads the training split alone.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import easy_vqa

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")


@dataclass(frozen=True)
class Facts:
    """What the training answers tell about one image; None where they do not tell."""

    color: str | None = None
    shape: str | None = None

    @property
    def caption(self) -> str | None:
        """'a red circle', 'a red shape' or 'a circle'; None if nothing is known."""
        if not (self.color or self.shape):
            return None
        return " ".join(word for word in ("a", self.color, self.shape or "shape") if word)


@dataclass(frozen=True)
class TrainImage:
    """One training image with all its questions."""

    index: int
    path: Path
    turns: tuple[tuple[str, str], ...]
    """(question, answer), in the order of the data set."""

    @property
    def facts(self) -> Facts:
        """Derived from the answers, never from the pixels or from the generator's parameters."""
        words = set().union(*(true_words(question, answer) for question, answer in self.turns))
        return Facts(_only(words.intersection(COLORS)), _only(words.intersection(SHAPES)))


def true_words(question: str, answer: str) -> set[str]:
    """The words of a question-answer pair that are true of the image.

    'is there a red shape?' 'yes' says red; 'is there no red shape?' 'yes' says nothing for certain but what it is not.
    """
    asked = set(question.rstrip("?").split())
    if answer not in ("yes", "no"):
        return asked | {answer}
    negated = bool(asked & {"no", "not"})
    return asked if (answer == "yes") != negated else set()


def _only(words: set[str]) -> str | None:
    if len(words) > 1:
        raise ValueError(f"answers of one image contradict each other: {sorted(words)}")
    return next(iter(words), None)


def images_folder() -> Path:
    """Where the images of the training split lie."""
    return Path(easy_vqa.get_train_image_paths()[0]).parent


def train_images() -> list[TrainImage]:
    """The official training split, 4,000 images, ordered by index."""
    turns = defaultdict(list)
    for question, answer, index in zip(*easy_vqa.get_train_questions(), strict=True):
        turns[index].append((question, answer))
    paths = easy_vqa.get_train_image_paths()
    return [TrainImage(index, Path(paths[index]), tuple(turns[index])) for index in sorted(turns)]


def caption_records(images: list[TrainImage], copies: int) -> list[dict]:
    """Stage 1: the image, then its caption. Images of which the answers tell nothing are left out."""
    records = [
        {
            "id": f"caption-{image.index}-{copy}",
            "image": image.path.name,
            "conversations": [_turn("human", "<image>"), _turn("gpt", image.facts.caption)],
        }
        for copy in range(copies)
        for image in images
        if image.facts.caption
    ]
    return records


def conversation_records(images: list[TrainImage], copies: int, seed: int) -> list[dict]:
    """Stages 2 and 3: all questions of an image in one conversation, in a new order in each copy."""
    shuffler = random.Random(seed)
    return [
        {
            "id": f"questions-{image.index}-{copy}",
            "image": image.path.name,
            "conversations": conversation(shuffler.sample(image.turns, len(image.turns))),
        }
        for copy in range(copies)
        for image in images
    ]


def conversation(turns: list[tuple[str, str]], has_image: bool = True) -> list[dict]:
    """Questions and answers as a record has them; a picture stands before the first question."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        lead = "<image>\n" if has_image and not number else ""
        messages += [_turn("human", lead + question), _turn("gpt", answer)]
    return messages


def _turn(speaker: str, text: str) -> dict:
    return {"from": speaker, "value": text}


def write_records(records: list[dict], path: Path) -> None:
    """One JSON list, as LLaVA's data files are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
