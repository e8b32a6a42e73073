# SPDX-License-Identifier: Apache-2.0
"""The one masking engine: rendered pieces in, token ids and labels out.

A prompt is cut at the template's special tokens and at images, each stretch of text between two cuts is tokenized once,
with character offsets, and a token carries its id as label if it begins in a trained piece:

    text    | … USER: what is it? ASSISTANT:| a cat|</s>|        | = a cut or the border of a trained piece
    trained |                               |######|####|
    ids     | … 3148 1001 …            1254 | 263 7 |  2 |
    labels  | … -100 -100 …            -100 | 263 7 |  2 |

Special tokens exist only in the template's own text. Spelled in a message they are text like any other, because
messages are tokenized by a twin of the tokenizer that knows no special tokens. Some tokens swallow the spaces beside
them (`lstrip`, `rstrip`, as Phi-3's do), or stand only between words (`single_word`): they do so here as they do in
the tokenizer. There is no counting of tokens, and so nothing that could be off by one.
"""

from __future__ import annotations

import json
import re
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from itertools import groupby
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from moellava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moellava.conversation import Origin, Piece
from moellava.data.tokenizers import leading_ids
from moellava.errors import DataError, UserError

CACHED_TEXTS = 256
"""Stretches of text without an answer that are kept tokenized: above all, the system text that opens every prompt."""


@dataclass(slots=True)
class Encoded:
    """A tokenized prompt.

    Attributes:
        ids: token ids, `IMAGE_TOKEN_INDEX` once per image.
        labels: the id where it is trained on, else `IGNORE_INDEX`; as long as `ids`.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    @property
    def is_trained(self) -> bool:
        """Whether any position carries a label."""
        return self.labels.count(IGNORE_INDEX) < len(self.labels)

    def silence(self, trained: Sequence[bool]) -> None:
        """Takes the labels from some of the answers, which are the unbroken runs of labels. The ids stay what they are,
        as they will be when the model answers.

        Args:
            trained: for each answer, whether it keeps its labels.

        Raises:
            DataError: the template writes answers of which one cannot be told from the next.
        """
        if all(trained):
            return
        runs = [(is_answer, list(run)) for is_answer, run in groupby(self.labels, lambda label: label != IGNORE_INDEX)]
        if sum(is_answer for is_answer, _ in runs) != len(trained):
            raise DataError('some answers have "train": false, but this template does not set answers apart')
        kept = iter(trained)
        self.labels = [
            label if not is_answer or keeps else IGNORE_INDEX
            for is_answer, run in runs
            for keeps in [is_answer and next(kept)]
            for label in run
        ]

    def add(self, ids: Sequence[int], labels: Sequence[int]) -> None:
        """Appends ids and as many labels."""
        self.ids.extend(ids)
        self.labels.extend(labels)


_UNTYPABLE = "\uffff"
"""Leads the names of hidden entries; a noncharacter, so that no text spells them."""

Part = tuple[str, Sequence[int] | None]
"""Text, and the fixed ids it stands for; None where it is to be tokenized."""

SPACES = "".join(map(chr, (*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B)))) + (
    "\u2028\u2029\u202f\u205f\u3000"
)
"""What tokenizers take for spaces beside a token (Unicode's White_Space)."""

Span = tuple[int, int]
"""A range of characters (begin, end)."""


class Start(IntEnum):
    """What stands before a stretch of text; some tokenizers put a space in front of the first word, depending on it."""

    OPENING = 0
    """Nothing, or an image: the text is the start of a sentence."""
    INNER = 1
    """A special token."""
    JOINED = 2
    """Other text: no start of anything."""


@dataclass(slots=True)
class Stretch:
    """What lies between two cuts: text, or the fixed ids of a special token or an image.

    Attributes:
        text: the text, or how the fixed ids are spelled.
        trained: trained character ranges `(begin, end)` of the text, in order; never empty ones.
        ids: the fixed ids; None for text.
        start: what stands before the text.
    """

    text: str
    trained: list[Span] = field(default_factory=list)
    ids: Sequence[int] | None = None
    start: Start = Start.INNER

    def append(self, text: str, trained: bool, joins: bool) -> None:
        """Adds text.

        Args:
            text: not empty.
            trained: whether it is trained.
            joins: whether it goes on with the trained range before it.
        """
        begin = len(self.text)
        self.text += text
        if trained:
            first = self.trained.pop()[0] if joins and self.trained else begin
            self.trained.append((first, len(self.text)))

    def without_trailing_spaces(self) -> Stretch:
        """The stretch without the spaces at its end."""
        text = self.text.rstrip(SPACES)
        trained = [(begin, min(end, len(text))) for begin, end in self.trained if begin < len(text)]
        return Stretch(text, trained, self.ids, self.start)

    def cut(self, border: int) -> tuple[Stretch, Stretch]:
        """The stretch in two, at a character that is strictly inside."""
        left = [(begin, min(end, border)) for begin, end in self.trained if begin < border]
        right = [(max(begin, border) - border, end - border) for begin, end in self.trained if end > border]
        return Stretch(self.text[:border], left, None, self.start), Stretch(
            self.text[border:], right, None, Start.JOINED
        )


class MaskEngine:
    """Tokenizes prompts of one tokenizer. Get one from `engine_for`, which keeps it.

    Args:
        tokenizer: any fast tokenizer.

    Raises:
        UserError: a slow one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.is_fast:
            raise UserError(f"{type(tokenizer).__name__} is a slow tokenizer and gives no offsets; use load_tokenizer")
        self.leading = leading_ids(tokenizer)
        added = tokenizer.added_tokens_decoder
        self.special = {token.content: index for index, token in added.items() if token.special}
        self.rules = {token.content: token for token in added.values() if token.special}
        spelled = sorted(self.special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, spelled))) if spelled else None
        self._twins = _plain_twins(tokenizer.backend_tokenizer.to_str())
        self._template_cuts = lru_cache(maxsize=CACHED_TEXTS)(self._cut_template)
        self._untrained = lru_cache(maxsize=CACHED_TEXTS)(self._tokenize_ids)
        inside = [self._tokenize_ids("a", start) for start in (Start.INNER, Start.JOINED)]
        self.guard = inside[1] if inside[0] == inside[1] else []
        """Ids to decode in front of a text that follows a special token, lest the space that it begins with be taken
        for one that this tokenizer has put there; none where it puts one."""

    def encode(
        self, pieces: Iterable[Piece], has_image: bool = False, image_ids: Sequence[int] = (IMAGE_TOKEN_INDEX,)
    ) -> Encoded:
        """Token ids and labels of a prompt, led by BOS where the tokenizer adds it and the prompt does not spell it.

        Args:
            pieces: the prompt, as `Conversation.pieces` gives it.
            has_image: whether `<image>` in questions stands for images; else it is text.
            image_ids: what one image becomes.
        """
        stretches = self.stretches(pieces, has_image, image_ids)
        spelled = bool(stretches) and stretches[0].ids is not None and list(stretches[0].ids) == self.leading
        leading = [] if spelled else self.leading
        encoded = Encoded(list(leading), [IGNORE_INDEX] * len(leading))
        for stretch in stretches:
            self._add(encoded, stretch)
        return encoded

    def stretches(
        self, pieces: Iterable[Piece], has_image: bool = False, image_ids: Sequence[int] = (IMAGE_TOKEN_INDEX,)
    ) -> list[Stretch]:
        """The prompt cut at special tokens and images, adjacent text joined; arguments: see `encode`."""
        found: list[Stretch] = []
        current = Stretch("", start=Start.OPENING)
        unbroken = swallows = False
        for piece_text, trained, origin in pieces:
            for text, fixed in self._parts(piece_text, origin, has_image, image_ids):
                if fixed is None:
                    text = text.lstrip(SPACES) if swallows else text
                    if text:
                        current.append(text, trained, joins=unbroken)
                        swallows = False
                    continue
                rule = None if fixed is image_ids else self.rules[text]
                if rule is not None and rule.lstrip:
                    current = current.without_trailing_spaces()
                if current.text:
                    found.append(current)
                found.append(Stretch(text, [(0, len(text))] if trained else [], fixed))
                current = Stretch("", start=Start.OPENING if rule is None else Start.INNER)
                swallows = rule is not None and rule.rstrip
            unbroken = trained
        if current.text:
            found.append(current)
        return found

    def _parts(self, text: str, origin: Origin, has_image: bool, image_ids: Sequence[int]) -> Sequence[Part]:
        """The text of a piece, cut at the special tokens of the template or the images of a question."""
        if origin is Origin.TEMPLATE:
            return self._template_cuts(text)
        if has_image and origin is Origin.QUESTION and DEFAULT_IMAGE_TOKEN in text:
            return _image_cuts(text, image_ids)
        return ((text, None),)

    def tokenize(self, stretch: Stretch) -> tuple[list[int], list[Span]]:
        """The ids of a stretch of text and the characters (begin, end) that each stands for.

        Should a token straddle the border of a trained range, the text is cut there, too. That happens where a template
        marks its turns with text that the tokenizer has no special token for.
        """
        encoding = self._twins[stretch.start].encode(stretch.text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        border = _straddled(offsets, stretch.trained)
        if border is None:
            return ids, offsets
        left, right = stretch.cut(border)
        (ids, offsets), (more_ids, more) = self.tokenize(left), self.tokenize(right)
        return ids + more_ids, offsets + [(begin + border, end + border) for begin, end in more]

    def _add(self, encoded: Encoded, stretch: Stretch) -> None:
        if stretch.ids is not None:
            encoded.add(stretch.ids, stretch.ids if stretch.trained else [IGNORE_INDEX] * len(stretch.ids))
        elif not stretch.trained:
            ids = self._untrained(stretch.text, stretch.start)
            encoded.add(ids, [IGNORE_INDEX] * len(ids))
        else:
            ids, offsets = self.tokenize(stretch)
            encoded.add(ids, labels_of(ids, offsets, stretch.trained))

    def _tokenize_ids(self, text: str, start: Start) -> list[int]:
        return self.tokenize(Stretch(text, start=start))[0]

    def _cut_template(self, text: str) -> tuple[Part, ...]:
        """Template text cut at the special tokens that it spells."""
        parts: list[Part] = []
        begin = 0
        for match in self._special.finditer(text) if self._special else ():
            if not _may_stand(self.rules[match.group()], text, match.span()):
                continue
            parts += [(text[begin : match.start()], None), (match.group(), (self.special[match.group()],))]
            begin = match.end()
        parts.append((text[begin:], None))
        return tuple(part for part in parts if part[0])


_engines: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, MaskEngine]] = weakref.WeakKeyDictionary()


def engine_for(tokenizer: PreTrainedTokenizerBase) -> MaskEngine:
    """The tokenizer's engine: made once, and anew when the tokenizer has gained tokens."""
    size, engine = _engines.get(tokenizer, (0, None))
    if engine is None or size != len(tokenizer):
        engine = MaskEngine(tokenizer)
        _engines[tokenizer] = (len(tokenizer), engine)
    return engine


def _may_stand(token: AddedToken, text: str, span: Span) -> bool:
    """Whether a special token is one where it is spelled: one for single words is none inside of a word."""
    if not token.single_word:
        return True
    beside = text[: span[0]][-1:], text[span[1] :][:1]
    return not any(re.fullmatch(r"\w", char) for char in beside)


def labels_of(ids: list[int], offsets: list[Span], trained: list[Span]) -> list[int]:
    """A label per token: its id if it begins in one of the trained character ranges.

    Args:
        ids: the tokens.
        offsets: their (begin, end) in characters, in order.
        trained: ranges (begin, end) in characters, in order.
    """
    labels = [IGNORE_INDEX] * len(ids)
    for begin, end in trained:
        first, last = bisect_left(offsets, (begin,)), bisect_left(offsets, (end,))
        labels[first:last] = ids[first:last]
    return labels


def _image_cuts(text: str, image_ids: Sequence[int]) -> list[Part]:
    """A question cut at its image tags."""
    parts: list[Part] = []
    for part in text.split(DEFAULT_IMAGE_TOKEN):
        parts += [(DEFAULT_IMAGE_TOKEN, image_ids), (part, None)]
    return parts[1:]


def _straddled(offsets: list[Span], trained: list[Span]) -> int | None:
    """The first border of a trained range that lies inside a token; None if tokens respect all borders."""
    for span in trained:
        for border in span:
            before = bisect_left(offsets, (border,)) - 1
            if before >= 0 and offsets[before][1] > border:
                return border
    return None


@lru_cache(maxsize=1)  # a process opens one model's tokenizer several times: for its processor, for an encoder, again
def _plain_twins(serialized: str) -> tuple[Tokenizer, Tokenizer, Tokenizer]:
    """Three copies of a tokenizer for plain text, by `Start`. They differ in where they put a space before a word.

    Special tokens, and `<image>` however it was added, get names that no text spells. None is left out: the ids of the
    tokens behind it would move. Left out is the post-processor, which would trim the spaces off the offsets, so that a
    token of spaces alone would seem to begin where the next piece does.
    """
    state = json.loads(serialized)
    hidden = {token["content"] for token in state["added_tokens"] if token["special"]} | {DEFAULT_IMAGE_TOKEN}
    _hide(state["model"], hidden)
    for token in state["added_tokens"]:
        if token["content"] in hidden:
            token |= {"content": f"{_UNTYPABLE}{token['content']}", "normalized": False}
    state["post_processor"] = state["truncation"] = state["padding"] = None
    opening = Tokenizer.from_str(json.dumps(state))
    changed = _without_prefix(state, first_only=True)
    inner = Tokenizer.from_str(json.dumps(state)) if changed else opening
    changed = _without_prefix(state, first_only=False)
    return opening, inner, Tokenizer.from_str(json.dumps(state)) if changed else inner


def _hide(model: dict[str, Any], special: set[str]) -> None:
    """Takes from a serialized model (BPE, Unigram, WordPiece, WordLevel) all that makes a special token out of
    characters, in place.

    Special tokens are often entries of the vocabulary as well, and some converted files hold merges that end in one.
    An entry is renamed, not removed: ids must have no holes, and the unknown token is looked up by its name.
    """
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram's [entry, score], numbered as they stand; its unknown token is a number
        model["vocab"] = [[f"{_UNTYPABLE}{text}" if text in special else text, score] for text, score in vocab]
        return
    names = {text: f"{_UNTYPABLE}{text}" for text in special & vocab.keys()}
    for text, name in names.items():
        vocab[name] = vocab.pop(text)
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if names and "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if "".join(merge) not in names]


def _without_prefix(state: dict[str, Any], first_only: bool) -> bool:
    """Takes from a serialized tokenizer the space that it puts before a text. Returns whether there was one.

    Args:
        state: changed in place.
        first_only: take only what stands before the first word of a whole text and not after a special token.
    """
    changed = False
    for key in ("normalizer", "pre_tokenizer"):
        step = state[key] or {}
        for part in [step, *step.get("normalizers", []), *step.get("pretokenizers", [])]:
            if part.get("prepend_scheme") in ({"first"} if first_only else {"first", "always"}):
                part["prepend_scheme"], changed = "never", True
            elif part.get("add_prefix_space") and not first_only:
                part["add_prefix_space"], changed = False, True
            elif part.get("type") == "Prepend" and not first_only:
                part["prepend"], changed = "", True
    return changed
