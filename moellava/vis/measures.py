# SPDX-License-Identifier: Apache-2.0
"""Numbers of routing: load, entropy, drops, specialisation and pathways.

Legend: T tokens, L sparse layers, E experts of a layer, k choices, F values of a factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moellava.vis.collect import Collected
from moellava.vis.words import WORD_CLASSES

PARTS: dict[str, Callable[[Collected], np.ndarray]] = {
    "all": lambda seen: np.ones(len(seen.image_T), dtype=bool),
    "image": lambda seen: seen.image_T,
    "text": lambda seen: ~seen.image_T,
}
"""Tokens that are looked at apart -> which of the T they are."""

POSITIONS = 8
"""Parts of equal length that a sample is cut into, for the factor `position`."""

PATHWAYS = 10
"""Most frequent pathways that are kept."""


class Factor(NamedTuple):
    """Something that an expert may be chosen by.

    Attributes:
        label: in words.
        values: (routing) -> a code of each token; -1: it has none, and is left out.
        names: of the codes.
    """

    label: str
    values: Callable[[Collected], np.ndarray]
    names: tuple[str, ...]


def _position(seen: Collected) -> np.ndarray:
    lengths = np.bincount(seen.sample_T)[seen.sample_T]
    return seen.position_T * POSITIONS // lengths


FACTORS: dict[str, Factor] = {
    "modality": Factor("image or text", lambda seen: seen.image_T.astype(int), ("text", "image")),
    "position": Factor(
        "position in the sample", _position, tuple(f"{number + 1}/{POSITIONS}" for number in range(POSITIONS))
    ),
    "word_class": Factor("class of the word", lambda seen: seen.word_T, WORD_CLASSES),
    "answer": Factor(
        "text of answer or prompt",
        lambda seen: np.where(seen.image_T, -1, seen.trained_T.astype(int)),
        ("prompt", "answer"),
    ),
}


class Pathway(NamedTuple):
    """The first choices of tokens through all sparse layers.

    Attributes:
        experts: one a layer.
        share: of the tokens that were looked at.
    """

    experts: list[int]
    share: float


@dataclass
class Summary:
    """Numbers of a `Collected`.

    Attributes:
        load: part of `PARTS` -> for each layer the share of choices of each expert.
        tokens: part -> number of tokens.
        entropy: part -> for each layer the mean entropy of the router in nats; NaN: not known.
        dropped: for each layer the share of choices that found their expert full.
        information: factor -> for each layer the mutual information of expert and factor, in bits.
        bound: factor -> entropy of the factor in bits, the most that an expert can tell of it.
        by_value: factor -> for each layer [F, E], the share of each expert among the choices of tokens of a value.
        pathways: part -> the most frequent ones.
        distinct: part -> how many different pathways there are.
    """

    load: dict[str, list[np.ndarray]]
    tokens: dict[str, int]
    entropy: dict[str, list[float]]
    dropped: list[float]
    information: dict[str, list[float]]
    bound: dict[str, float]
    by_value: dict[str, list[np.ndarray]]
    pathways: dict[str, list[Pathway]]
    distinct: dict[str, int]


def summarise(seen: Collected) -> Summary:
    """The numbers of what was collected."""
    masks = {name: mask(seen) for name, mask in PARTS.items()}
    codes = {name: factor.values(seen) for name, factor in FACTORS.items()}
    counts = {
        name: [_counts(seen, number, codes[name], len(factor.names)) for number in range(len(seen.layers))]
        for name, factor in FACTORS.items()
    }
    numbers = range(len(seen.layers))
    paths = {name: pathways_of(seen.expert_TLk[mask, :, 0]) for name, mask in masks.items()}
    return Summary(
        load={name: [_load(seen, number, mask) for number in numbers] for name, mask in masks.items()},
        tokens={name: int(mask.sum()) for name, mask in masks.items()},
        entropy={name: [_mean(seen.entropy_TL[mask, number]) for number in numbers] for name, mask in masks.items()},
        dropped=[_share(~seen.kept_TLk[:, number], seen.expert_TLk[:, number] >= 0) for number in numbers],
        information={
            name: [information(table, int((codes[name] >= 0).sum())) for table in tables]
            for name, tables in counts.items()
        },
        bound={name: _bits(np.bincount(code[code >= 0], minlength=1)) for name, code in codes.items()},
        by_value={name: [_rows(table) for table in tables] for name, tables in counts.items()},
        pathways={name: found for name, (found, _) in paths.items()},
        distinct={name: distinct for name, (_, distinct) in paths.items()},
    )


def information(count_FE: np.ndarray, tokens: int) -> float:
    """Mutual information of rows and columns of a table of counts, in bits, at least 0.

    Few tokens seem to tell more than they do: what chance alone would give, (F - 1)(E - 1) / (2 N ln 2), is taken off
    (Miller, 1955; F and E count rows and columns that occur, N is `tokens`).
    """
    total = count_FE.sum()
    if not total:
        return 0.0
    joint = count_FE / total
    row, column = joint.sum(1, keepdims=True), joint.sum(0, keepdims=True)
    known = joint > 0
    bits = float((joint[known] * np.log2(joint[known] / (row * column)[known])).sum())
    chance = ((row > 0).sum() - 1) * ((column > 0).sum() - 1) / (2 * max(tokens, 1) * math.log(2))
    return max(bits - float(chance), 0.0)


def pathways_of(first_TL: np.ndarray) -> tuple[list[Pathway], int]:
    """The most frequent pathways, and how many different ones there are.

    Args:
        first_TL: the first expert of each token in each layer.
    """
    if not len(first_TL):
        return [], 0
    paths, counts = np.unique(first_TL, axis=0, return_counts=True)
    order = sorted(range(len(paths)), key=lambda place: -counts[place])[:PATHWAYS]
    return [Pathway(paths[place].tolist(), float(counts[place] / counts.sum())) for place in order], len(paths)


def _load(seen: Collected, layer: int, mask: np.ndarray) -> np.ndarray:
    chosen = seen.expert_TLk[mask, layer].reshape(-1)
    counts = np.bincount(chosen[chosen >= 0], minlength=seen.experts[layer])
    return counts / max(counts.sum(), 1)


def _counts(seen: Collected, layer: int, code_T: np.ndarray, values: int) -> np.ndarray:
    """Choices [F, E] by value of a factor."""
    table = np.zeros((values, seen.experts[layer]))
    expert_Tk = seen.expert_TLk[:, layer]
    for choice in range(expert_Tk.shape[1]):
        known = (code_T >= 0) & (expert_Tk[:, choice] >= 0)
        np.add.at(table, (code_T[known], expert_Tk[known, choice]), 1)
    return table


def _rows(table: np.ndarray) -> np.ndarray:
    return table / np.maximum(table.sum(1, keepdims=True), 1)


def _bits(counts: np.ndarray) -> float:
    share = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(share * np.log2(share)).sum())


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _share(dropped: np.ndarray, chosen: np.ndarray) -> float:
    return float((dropped & chosen).sum() / max(chosen.sum(), 1))
