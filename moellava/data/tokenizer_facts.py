# SPDX-License-Identifier: Apache-2.0
"""What has to be known about a tokenizer before training with it, found out by trying."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moellava.constants import CHAT_TEMPLATE, DEFAULT_IMAGE_TOKEN
from moellava.conversation import Origin, Piece, conv_templates
from moellava.data.agreement import disagreement
from moellava.data.masking import SPACES, Encoded, MaskEngine, engine_for
from moellava.data.render import Renderer, TemplateRenderer, renderer_for
from moellava.data.tokenizers import leading_ids, spec_for
from moellava.data.view import trained_texts
from moellava.errors import UserError
from moellava.files import CONFIG, read_json

PLAIN = "plain"
"""The template of stage 1, for captions; it fits every tokenizer and carries no conversation."""

PROBE = [
    {"from": "human", "value": f"{DEFAULT_IMAGE_TOKEN}\nWhat is this? ASSISTANT: </s>"},
    {"from": "gpt", "value": "A cat 🐱, or <|endoftext|> as some write."},
    {"from": "human", "value": "  And 3.14?\n"},
    {"from": "gpt", "value": "A number.\n\tπ, roughly"},
]
"""A conversation with what masks stumble over: separators and special tokens in messages, odd spaces, emoji."""


@dataclass
class Fit:
    """How a template and a tokenizer go together.

    Attributes:
        version: name of the template.
        terminator: what ends an answer.
        terminator_ids: the ids it becomes; a single one where it is a special token.
        is_exact: the mask is exact.
        fits: the terminator is one special token, and the mask is exact.
        verdict: the same in words.
    """

    version: str
    terminator: str
    terminator_ids: list[int]
    is_exact: bool
    fits: bool
    verdict: str


@dataclass
class Facts:
    """What a tokenizer does.

    Attributes:
        row: its row in `TOKENIZERS`.
        adds_bos: whether every sequence begins with BOS.
        special: name -> (text, id) of bos, eos, unk and pad; None where it has none.
        can_add_tokens: whether its own implementation takes new special tokens (ours always does).
        tokens: ids in use.
        image_token: the id of `<image>`, or None where the tokenizer has none yet; it would get the next id.
        embedding_rows: of the model in the same folder; None without a config.json.
        free_rows: rows that no token uses; `<image>` takes the first. Where there is none, the embedding grows.
        spaces_before_words: how it writes the first word of a text, and one that follows a special token.
        fits: one entry per template, those that fit first.
    """

    row: str
    adds_bos: bool
    special: dict[str, tuple[str, int] | None]
    can_add_tokens: bool
    tokens: int
    image_token: int | None
    embedding_rows: int | None
    free_rows: int | None
    spaces_before_words: str
    fits: list[Fit]

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1)


def facts_of(tokenizer: PreTrainedTokenizerBase, folder: str | Path | None = None) -> Facts:
    """Finds out what a tokenizer does.

    Args:
        tokenizer: of `load_tokenizer`.
        folder: where it came from; a config.json there tells the rows of the embedding.
    """
    spec = spec_for(tokenizer)
    rows = _embedding_rows(folder)
    names = ("bos", "eos", "unk", "pad")
    texts = {name: getattr(tokenizer, f"{name}_token") for name in names}
    return Facts(
        row=spec.name,
        adds_bos=bool(leading_ids(tokenizer)),
        special={name: (text, tokenizer.convert_tokens_to_ids(text)) if text else None for name, text in texts.items()},
        can_add_tokens=spec.can_add_tokens,
        tokens=len(tokenizer),
        image_token=tokenizer.added_tokens_encoder.get(DEFAULT_IMAGE_TOKEN),
        embedding_rows=rows,
        free_rows=None if rows is None else rows - len(tokenizer),
        spaces_before_words=_spaces(tokenizer),
        fits=_fits(tokenizer, spec.versions),
    )


def fit_of(tokenizer: PreTrainedTokenizerBase, version: str) -> Fit:
    """Tries a template on the probe conversation."""
    has_image = version != CHAT_TEMPLATE
    try:
        renderer = renderer_for(version, tokenizer)
        terminator = renderer.terminator
        texts = renderer.texts(PROBE[:2] if is_plain(renderer) else PROBE, has_media=has_image)
    except UserError as error:
        return Fit(version, "", [], False, False, str(error))
    ids = engine_for(tokenizer).encode([Piece(terminator)]).ids[len(leading_ids(tokenizer)) :]
    places = renderer.places_media(has_image)
    encoded = [(pieces, engine_for(tokenizer).encode(pieces, places)) for pieces, _ in texts]
    wrong = next(filter(None, (mask_problem(tokenizer, *pair) for pair in encoded)), None)
    if wrong is None and version == CHAT_TEMPLATE:
        wrong = disagreement(tokenizer, renderer)
    single = len(ids) == 1 and (ids[0] in tokenizer.all_special_ids or ids[0] in _special_ids(tokenizer))
    if wrong:
        return Fit(version, terminator, ids, False, False, wrong)
    if not single and not is_plain(renderer):
        return Fit(
            version, terminator, ids, True, False, f"exact mask, but {terminator!r} is text here, not one special token"
        )
    return Fit(version, terminator, ids, True, True, "the mask decodes to exactly the answers and their terminators")


def fitting_version(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that goes with a tokenizer: its own chat template where its answers can be told apart and end, or
    else the first of ours that fits.

    Raises:
        UserError: none does.
    """
    if tokenizer.chat_template and fit_of(tokenizer, CHAT_TEMPLATE).fits:
        return CHAT_TEMPLATE
    fits = _fits(tokenizer, spec_for(tokenizer).versions)
    fit = next(fit for fit in fits if fit.version != PLAIN)
    if not fit.fits:
        raise UserError(f"No template fits this tokenizer ({fit.version}: {fit.verdict}). Name one by --version.")
    return fit.version


def is_plain(renderer: Renderer) -> bool:
    """Whether a template is that of stage 1, which takes one caption."""
    return isinstance(renderer, TemplateRenderer) and renderer.is_plain


def mask_problem(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece], encoded: Encoded) -> str | None:
    """What is wrong with the labels of a rendered conversation; None if they decode to exactly the trained pieces.

    Args:
        pieces: the conversation.
        encoded: the ids and labels that `MaskEngine.encode` has made of them, as training gets them.
    """
    expected = [_comparable(text) for text in _trained_runs(engine_for(tokenizer), pieces)]
    found = [_comparable(text) for text in trained_texts(tokenizer, encoded)]
    if found == expected:
        return None
    for number, (one, other) in enumerate(zip(expected, found, strict=False)):
        if one != other:
            return f"answer {number} should be trained as {one!r}, but the labels decode to {other!r}"
    return f"{len(expected)} answers should be trained, but the labels decode to {len(found)}"


def _trained_runs(engine: MaskEngine, pieces: Sequence[Piece]) -> list[str]:
    """The unbroken trained stretches of a rendering, without the spaces that special tokens of its template swallow."""
    chars = [(char, piece.trained, piece.origin is Origin.TEMPLATE) for piece in pieces for char in piece.text]
    text = "".join(char for char, _, _ in chars)
    dropped: set[int] = set()
    for content, token in engine.rules.items():
        left, right = (f"[{SPACES}]*" if swallows else "" for swallows in (token.lstrip, token.rstrip))
        spaces = f"{left}({re.escape(content)}){right}"
        for match in re.finditer(spaces, text):
            begin, end = match.span(1)
            if all(is_template for _, _, is_template in chars[begin:end]):
                dropped |= {*range(match.start(), begin), *range(end, match.end())}
    kept = [(char, trained) for number, (char, trained, _) in enumerate(chars) if number not in dropped]
    runs = groupby(kept, key=itemgetter(1))
    return ["".join(char for char, _ in run) for trained, run in runs if trained]


def _comparable(text: str) -> str:
    """Text up to what tokenizers do not keep: the form of composed characters."""
    return unicodedata.normalize("NFC", text)


def _fits(tokenizer: PreTrainedTokenizerBase, usual: Sequence[str]) -> list[Fit]:
    """All templates, those that fit first; among them those made for it, then those that end with its eos."""
    names = list(dict.fromkeys(conv_templates[name].version for name in conv_templates))
    fits = [fit_of(tokenizer, name) for name in [*names, *([CHAT_TEMPLATE] if tokenizer.chat_template else [])]]
    order = {name: place for place, name in enumerate(usual)}
    return sorted(
        fits,
        key=lambda fit: (not fit.fits, order.get(fit.version, len(order)), fit.terminator != tokenizer.eos_token),
    )


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return set(engine_for(tokenizer).special.values())


def _spaces(tokenizer: PreTrainedTokenizerBase) -> str:
    """Whether a space is put before the first word of a text, and before one that follows a special token."""
    if tokenizer.eos_token is None:
        return "unknown: no special token"
    opening = [Piece("x"), Piece(tokenizer.eos_token)]
    spaced = _ids_after([Piece("x")], Piece(" word", origin=Origin.ANSWER), tokenizer)
    plain = _ids_after([], Piece("word", origin=Origin.ANSWER), tokenizer)
    after = _ids_after(opening, Piece("word", origin=Origin.ANSWER), tokenizer)
    first, later = ("added" if ids == spaced else "none" for ids in (plain, after))
    return f"{first} before the first word, {later} after a special token"


def _ids_after(before: list[Piece], piece: Piece, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that a piece adds to the prompt before it."""
    engine = engine_for(tokenizer)
    return engine.encode([*before, piece]).ids[len(engine.encode(before).ids) :]


def model_config(folder: str | Path | None) -> dict[str, Any]:
    """The config.json in a folder; empty where there is none."""
    return {} if folder is None else read_json(Path(folder) / CONFIG)


def _embedding_rows(folder: str | Path | None) -> int | None:
    """Rows of the embedding of the model in a folder, from its config.json."""
    config = model_config(folder)
    rows = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return int(rows) if rows else None
