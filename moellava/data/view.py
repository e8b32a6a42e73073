"""A sample as the model sees it: every token with its text and whether it is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

from transformers import PreTrainedTokenizerBase

from moellava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX
from moellava.conversation import Piece
from moellava.data.encoder import Encoder
from moellava.data.masking import MaskEngine, Stretch, engine_for, labels_of
from moellava.data.media import MediaFiles

GREEN, DIM, CYAN, RESET = "\033[32m", "\033[2m", "\033[36m", "\033[0m"


@dataclass
class Token:
    """One id of a sample.

    Attributes:
        id: the token id; `IMAGE_TOKEN_INDEX` for an image.
        text: the characters it stands for. Where several tokens share a character, the first has it.
        trained: whether it carries a label.
        special: whether it is a special token or an image, not text.
    """

    id: int
    text: str
    trained: bool
    special: bool = False


def tokens_of(
    tokenizer: PreTrainedTokenizerBase,
    pieces: Iterable[Piece],
    has_image: bool = False,
    image_ids: Sequence[int] = (IMAGE_TOKEN_INDEX,),
) -> list[Token]:
    """The tokens of a rendered conversation; ids and flags are those of `MaskEngine.encode` with the same arguments."""
    engine, pieces = engine_for(tokenizer), list(pieces)
    found = [token for stretch in engine.stretches(pieces, has_image, image_ids) for token in _of(engine, stretch)]
    leading = engine.encode(pieces, has_image, image_ids).ids[: len(engine.leading)]
    if [token.id for token in found[: len(leading)]] == leading:
        return found
    return [*(Token(index, tokenizer.decode([index]), False, True) for index in leading), *found]


def _of(engine: MaskEngine, stretch: Stretch) -> Iterable[Token]:
    if stretch.ids is not None:
        for number, index in enumerate(stretch.ids):
            shown = number == len(stretch.ids) // 2
            yield Token(index, stretch.text if shown else "", bool(stretch.trained), True)
        return
    ids, offsets = engine.tokenize(stretch)
    labels = labels_of(ids, offsets, stretch.trained)
    position = 0
    for index, label, (_, end) in zip(ids, labels, offsets, strict=True):
        yield Token(index, stretch.text[position:end], label == index)
        position = max(position, end)


def colored(tokens: Sequence[Token], color: bool) -> str:
    """The text: trained tokens green, special ones cyan, the rest dim; without colour, trained runs stand in «…»."""
    shades = ((_shade(token, color), token.text) for token in tokens if token.text)
    runs = ((shade, "".join(text for _, text in run)) for shade, run in groupby(shades, key=itemgetter(0)))
    return "".join(f"{shade[0]}{text}{shade[1]}" for shade, text in runs)


def _shade(token: Token, color: bool) -> tuple[str, str]:
    """What is printed before and after a token's text."""
    if not color:
        return ("«", "»") if token.trained else ("", "")
    return (GREEN if token.trained else CYAN if token.special else DIM, RESET)


@dataclass
class View:
    """A record as its model reads it.

    Attributes:
        record: its name.
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


def view_of(
    encoder: Encoder, record: dict[str, Any], name: str, files: MediaFiles, max_length: int | None = None
) -> View:
    """A record's view, cut to `max_length` positions as `--overlong truncate` does. Raises: see `Encoder.encode`."""
    whole = encoder.encode(record, name, files)
    kept = whole if max_length is None else encoder.encode(record, name, files, max_length=max_length)
    pieces, places = encoder.pieces(record, name, files), encoder.places_media(record)
    spelled = tokens_of(encoder.tokenizer, pieces, places, encoder.image_ids)
    tokens = [
        replace(token, id=index, trained=label != IGNORE_INDEX)
        for token, index, label in zip(spelled, kept.ids, kept.labels)  # what is cut has no token
    ]
    counts = counts_of(kept.ids, kept.labels, kept.length)
    cut = None
    if kept.cut:
        end = len(kept.ids)
        cut = counts_of(whole.ids[end:], whole.labels[end:], whole.length - kept.length)
    return View(name, encoder.version, tokens, counts, cut)


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


def trained_texts(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[Piece], has_image: bool = False) -> list[str]:
    """What the labels decode to, by the tokenizer's own decoder: one text per unbroken trained run.

    The first word of a run keeps the space in front of it, which a decoder would drop: a run is decoded together with
    the tokens before it, and theirs is taken away.
    """
    runs = [""]
    for stretch in engine_for(tokenizer).stretches(pieces, has_image):
        for text, trained in _decoded(tokenizer, stretch):
            if trained:
                runs[-1] += text
            elif runs[-1]:
                runs.append("")
    return [run for run in runs if run]


def _decoded(tokenizer: PreTrainedTokenizerBase, stretch: Stretch) -> list[tuple[str, bool]]:
    """(decoded text, trained) of the runs of a stretch."""
    if stretch.ids is not None:
        return [
            (stretch.text if IMAGE_TOKEN_INDEX in stretch.ids else tokenizer.decode(stretch.ids), bool(stretch.trained))
        ]
    tokens = list(_of(engine_for(tokenizer), stretch))
    borders = [n for n in range(1, len(tokens)) if tokens[n].trained != tokens[n - 1].trained]
    begins, ends = [0, *borders], [*borders, len(tokens)]
    texts = [""] + [tokenizer.decode([token.id for token in tokens[:end]]) for end in ends]
    return [(texts[n + 1][len(texts[n]) :], tokens[begin].trained) for n, begin in enumerate(begins)]
