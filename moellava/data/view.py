# SPDX-License-Identifier: Apache-2.0
"""A sample as the model sees it: every token with its text and whether it is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

from transformers import PreTrainedTokenizerBase

from moellava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX
from moellava.conversation import Piece
from moellava.data.encoder import Encoder, Example
from moellava.data.masking import Encoded, MaskEngine, Stretch, engine_for
from moellava.data.media import MediaFiles
from moellava.log import printable

GREEN, DIM, CYAN, RESET = "\033[32m", "\033[2m", "\033[36m", "\033[0m"


@dataclass
class Token:
    """One id of a sample.

    Attributes:
        id: the token id; `IMAGE_TOKEN_INDEX` for an image.
        label: what is trained here; `IGNORE_INDEX` for nothing.
        text: the characters it stands for. Where several tokens share a character, the first has it.
        special: whether it is a special token or an image, not text.
    """

    id: int
    label: int
    text: str
    special: bool = False

    @property
    def trained(self) -> bool:
        """Whether it carries a label."""
        return self.label != IGNORE_INDEX


def tokens_of(
    tokenizer: PreTrainedTokenizerBase,
    pieces: Iterable[Piece],
    has_image: bool = False,
    image_ids: Sequence[int] = (IMAGE_TOKEN_INDEX,),
) -> list[Token]:
    """The tokens of a rendered conversation: ids and labels of `MaskEngine.encode`, and the text that each stands for.

    The arguments are those of `encode`, which alone decides what is trained.
    """
    engine, pieces = engine_for(tokenizer), list(pieces)
    encoded = engine.encode(pieces, has_image, image_ids)
    stretches = engine.stretches(pieces, has_image, image_ids)
    shown = [part for stretch in stretches for part in _texts(engine, stretch)]
    leading = [(tokenizer.decode([index]), True) for index in encoded.ids[: len(encoded.ids) - len(shown)]]
    return [
        Token(index, label, text, special)
        for index, label, (text, special) in zip(encoded.ids, encoded.labels, [*leading, *shown], strict=True)
    ]


def _texts(engine: MaskEngine, stretch: Stretch) -> Iterable[tuple[str, bool]]:
    """(its text, whether it is special) of each token of a stretch."""
    if stretch.ids is not None:
        middle = len(stretch.ids) // 2
        yield from ((stretch.text if number == middle else "", True) for number in range(len(stretch.ids)))
        return
    position = 0
    for _, end in engine.tokenize(stretch)[1]:
        yield stretch.text[position:end], False
        position = max(position, end)


def colored(tokens: Sequence[Token], color: bool) -> str:
    """The text: trained tokens green, special ones cyan, the rest dim; without colour, trained runs stand in «…».
    What a terminal would take for a command is an escape."""
    shades = ((_shade(token, color), token.text) for token in tokens if token.text)
    runs = ((shade, "".join(text for _, text in run)) for shade, run in groupby(shades, key=itemgetter(0)))
    return "".join(f"{shade[0]}{printable(text)}{shade[1]}" for shade, text in runs)


def _shade(token: Token, color: bool) -> tuple[str, str]:
    """What is printed before and after a token's text."""
    if not color:
        return ("«", "»") if token.trained else ("", "")
    return (GREEN if token.trained else CYAN if token.special else DIM, RESET)


@dataclass
class View:
    """A record as its model reads it.

    Attributes:
        record: its name, and the answer that is trained where each is a sample of its own.
        version: the template.
        tokens: what stays, in order.
        counts: text tokens, images, videos, the tokens of both, supervised tokens, and positions in the model.
        cut: the same of what is cut off; None where nothing is.
    """

    record: str
    version: str
    tokens: list[Token]
    counts: dict[str, int]
    cut: dict[str, int] | None = None


def views_of(
    encoder: Encoder, record: dict[str, Any], name: str, files: MediaFiles, max_length: int | None = None
) -> list[View]:
    """The views of a record's samples, mostly one, cut to `max_length` positions as `--overlong truncate` does. Raises:
    see `Encoder.examples`."""
    wholes = encoder.examples(record, name, files)
    cut = wholes if max_length is None else encoder.examples(record, name, files, max_length=max_length)
    return [
        _view_of(encoder, record, name, files, answer, whole, kept)
        for (answer, whole), (_, kept) in zip(wholes, cut, strict=True)
    ]


def _view_of(
    encoder: Encoder,
    record: dict[str, Any],
    name: str,
    files: MediaFiles,
    answer: int | None,
    whole: Example,
    kept: Example,
) -> View:
    """The view of a sample.

    Args:
        answer: number of the answer that it trains; None: all of them.
        whole, kept: the sample, and what is kept of it.
    """
    pieces, places = encoder.pieces(record, name, files, answer=answer), encoder.places_media(record)
    spelled = tokens_of(encoder.tokenizer, pieces, places, encoder.image_ids)
    tokens = [
        Token(index, label, token.text, token.special)
        for token, index, label in zip(spelled, kept.ids, kept.labels)  # what is cut has no token
    ]
    counts = counts_of(kept.ids, kept.labels, kept.length)
    cut = None
    if kept.cut:
        end = len(kept.ids)
        cut = counts_of(whole.ids[end:], whole.labels[end:], whole.length - kept.length)
    called = name if answer is None else f"{name}, answer {answer}"
    return View(called, encoder.version, tokens, counts, cut)


def counts_of(ids: Sequence[int], labels: Sequence[int], positions: int) -> dict[str, int]:
    """The `counts` of a `View`."""
    images, videos = ids.count(IMAGE_TOKEN_INDEX), ids.count(VIDEO_TOKEN_INDEX)
    text = len(ids) - images - videos
    return {
        "text_tokens": text,
        "images": images,
        **({"videos": videos} if videos else {}),
        ("media_tokens" if videos else "image_tokens"): positions - text,
        "supervised_tokens": sum(label != IGNORE_INDEX for label in labels),
        "positions": positions,
    }


def view_text(view: View, color: bool, show_ids: bool = False) -> str:
    """A view as text: its record, the text with what is trained on, the ids where they are wanted, and the counts."""
    lines = [printable(f"== {view.record} (--version {view.version})"), colored(view.tokens, color)]
    if show_ids:
        ids = " ".join(f"«{token.id}»" if token.trained else str(token.id) for token in view.tokens)
        lines.append(f"ids ({IMAGE_TOKEN_INDEX} is an image, {VIDEO_TOKEN_INDEX} a video): {ids}")
    lines.append(listed(view.counts))
    if view.cut:
        lines.append(f"cut: {listed(view.cut)}")
    if not view.counts["supervised_tokens"]:
        lines.append("NOTHING IS TRAINED: training stops at such a sample, or drops and counts it if it was cut")
    return "\n".join(lines)


def listed(counts: Mapping[str, int]) -> str:
    """Counts in words: '34 text tokens, 1 images'."""
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())


def trained_texts(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[str]:
    """What the labels of a sample decode to, by the tokenizer's own decoder: one text per unbroken trained run.

    The first word of a run keeps the space in front of it, which a decoder would drop: a run is decoded together with
    the text before it, and theirs is taken away.
    """
    engine, added = engine_for(tokenizer), set(tokenizer.added_tokens_decoder)  # special or not, they cut a text
    runs, before = [""], list(engine.leading)
    pairs = zip(encoded.ids, encoded.labels, strict=True)
    for is_text, group in groupby(pairs, key=lambda pair: pair[0] >= 0 and pair[0] not in added):
        part = list(group)
        inside = before[-1:] not in ([], engine.leading) and before[-1] >= 0
        guard = engine.guard if inside else []
        for text, trained in _decoded(tokenizer, part, guard) if is_text else _named(tokenizer, part):
            if trained:
                runs[-1] += text
            elif runs[-1]:
                runs.append("")
        before = [index for index, _ in part]
    return [run for run in runs if run]


def _named(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[int, int]]) -> list[tuple[str, bool]]:
    """(text, trained) of each (id, label) of special tokens and images."""
    found = [(index if label == IGNORE_INDEX else label, label != IGNORE_INDEX) for index, label in pairs]
    return [(DEFAULT_IMAGE_TOKEN if index < 0 else tokenizer.decode([index]), trained) for index, trained in found]


def _decoded(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[int, int]], guard: Sequence[int]
) -> list[tuple[str, bool]]:
    """(decoded text, trained) of each run of (id, label) in text that nothing cuts; a label goes before its id. For
    `guard` see `MaskEngine.guard`."""
    ids = [index if label == IGNORE_INDEX else label for index, label in pairs]
    trained = [label != IGNORE_INDEX for _, label in pairs]
    borders = [n for n in range(1, len(pairs)) if trained[n] != trained[n - 1]]
    texts = [tokenizer.decode([*guard, *ids[:end]]) for end in [0, *borders, len(ids)]]
    return [(texts[n + 1][len(texts[n]) :], trained[begin]) for n, begin in enumerate([0, *borders])]
