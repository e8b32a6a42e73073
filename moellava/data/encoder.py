# SPDX-License-Identifier: Apache-2.0
"""The one way from a record to what a model reads: renderer, mask engine and media reader together.

    record    <image>\\nWhat is it?  A cat.
    rendered  USER: <image>\\nWhat is it? ASSISTANT: A cat.</s>
    ids       1 3148 … -200 29871 …          319 6635 29889 2      (-200 once per image, -201 once per video)
    labels    …  -100 …                      319 6635 29889 2
    positions … 576 for the image …

Training, `check-data`, `inspect`, sample answers, chat, evaluation and certificates all go through `Encoder.encode`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from moellava.constants import (
    CHAT_TEMPLATE,
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    VIDEO_TOKEN_INDEX,
)
from moellava.conversation import Origin, Piece
from moellava.data.agreement import disagreement
from moellava.data.embedded import TO_FILES, is_embedded
from moellava.data.masking import engine_for
from moellava.data.media import MediaFiles, with_frames
from moellava.data.records import MODALITIES, Medium, media_of, paths_of, tags_of, trained_answers
from moellava.data.render import AnswersApartError, Renderer, up_to
from moellava.data.video import Clip
from moellava.errors import DataError, UserError

PLACEHOLDERS = {"image": IMAGE_TOKEN_INDEX, "video": VIDEO_TOKEN_INDEX}
"""What stands for an image and for a video in `input_ids`."""


class Reader(Protocol):
    """What the encoder asks about images and videos. See `MediaReader`."""

    loads_images: bool
    placeholder_id: int
    processor: Any

    @property
    def needs_sizes(self) -> bool: ...

    @property
    def reads_videos(self) -> bool: ...

    @property
    def run_length(self) -> Any: ...

    def clip_length(self, clip: Clip) -> int: ...

    def carried(self, text: str, clips: Any) -> tuple[str, list[str]]: ...


class CountedImages:
    """The media reader of a tokenizer without a model: every image takes the same number of positions.

    Args:
        tokens: positions of an image.
    """

    loads_images = True
    needs_sizes = False
    reads_videos = False
    placeholder_id = IMAGE_TOKEN_INDEX
    processor = None

    def __init__(self, tokens: int):
        self.tokens = tokens

    def run_length(self, size: tuple[int, int], count: int) -> int:
        """Positions of an image."""
        return self.tokens

    def clip_length(self, clip: Clip) -> int:
        """Not asked: a video is its frames here."""
        raise TypeError("a reader that only counts images has no way for videos")

    def carried(self, text: str, clips: Any) -> tuple[str, list[str]]:
        """Template text as it is: it holds no placeholders of a model."""
        return text, []


class MediaSpan(NamedTuple):
    """An image, or a video, in `input_ids`.

    Attributes:
        medium: what it is.
        placeholders: how many stand for it; a video in frames has one for each.
        length: positions that each placeholder becomes.
    """

    medium: Medium
    placeholders: int
    length: int


@dataclass
class Example:
    """A record as its model reads it.

    Attributes:
        ids: token ids, `IMAGE_TOKEN_INDEX` once per image or frame and `VIDEO_TOKEN_INDEX` once per video.
        labels: the id where it is trained on, else `IGNORE_INDEX`; as long as `ids`.
        media: what the placeholders show, in their order; a video in frames once.
        length: positions in the model, media included.
        cut: how many ids were cut off the end.
    """

    ids: list[int]
    labels: list[int]
    media: list[Medium] = field(default_factory=list)
    length: int = 0
    cut: int = 0

    @property
    def is_trained(self) -> bool:
        """Whether any position carries a label."""
        return self.labels.count(IGNORE_INDEX) < len(self.labels)


class Encoder:
    """Encodes records for one model.

    Args:
        tokenizer: a fast one.
        renderer: turns conversations into pieces.
        reader: knows what images and videos become.
        image_ids: what one image becomes in `ids`, where the renderer keeps its tags.
    """

    def __init__(
        self, tokenizer: Any, renderer: Renderer, reader: Reader, image_ids: Sequence[int] = (IMAGE_TOKEN_INDEX,)
    ):
        self.tokenizer = tokenizer
        self.renderer = renderer
        self.reader = reader
        self.image_ids = tuple(image_ids)
        self._is_agreed = renderer.version != CHAT_TEMPLATE  # a template of ours has no other reader to agree with

    @property
    def version(self) -> str:
        """The template's name."""
        return self.renderer.version

    @property
    def in_frames(self) -> bool:
        """Whether a video is shown as its frames, an image each."""
        return not (self.renderer.shows_videos and self.reader.reads_videos)

    def encode(
        self,
        record: dict[str, Any],
        name: str = "the record",
        files: MediaFiles | None = None,
        *,
        opens: bool = False,
        max_length: int | None = None,
        answer: int | None = None,
    ) -> Example:
        """Ids, labels and media of a record.

        Args:
            record: of `load_records`; its media may be open already (images, videos).
            name: for messages.
            files: where media lie, and the frames of a video; None: paths are as the record writes them.
            opens: whether what opens the next answer follows, the human having the last word.
            max_length: positions beyond which the end is cut, before an image or a video that does not fit whole.
            answer: number of the answer that the record is encoded up to, and that alone is trained; None: all of it.

        Raises:
            AnswersApartError: its template rewrites earlier turns, so that each answer is an example. See `examples`.
            DataError: the record cannot be rendered, or its template shows other media than it has.
            UserError: the template cannot be masked.
        """
        files = files or MediaFiles()
        self._require_agreement()
        record = record if answer is None else record_up_to(record, answer)
        media = media_of(record)
        pieces, modalities = self._rendered(record, media, name, files, opens, answer is not None)
        encoded = engine_for(self.tokenizer).encode(pieces, self.places_media(record), self.image_ids)
        if answer is None and not opens:
            encoded.silence(trained_answers(record["conversations"]))
        ids = marked(encoded.ids, self.reader.placeholder_id, modalities) if modalities else encoded.ids
        spans = self._spans(media, files)
        for modality, placeholder in PLACEHOLDERS.items():
            given, shown = sum(span.placeholders for span in spans[placeholder]), ids.count(placeholder)
            if given != shown:
                raise DataError(f"{name} has {given} {modality}s, but its chat template shows {shown}")
        end, length, shown_media = fitting(ids, spans, max_length, self._around)
        return Example(ids[:end], encoded.labels[:end], shown_media, length, len(ids) - end)

    def examples(
        self, record: dict[str, Any], name: str = "the record", files: MediaFiles | None = None, **options: Any
    ) -> list[tuple[int | None, Example]]:
        """All that a record trains: itself, or an example for each trained answer where the template rewrites earlier
        turns; with the number of that answer, None for the whole record. Arguments and errors: see `encode`."""
        try:
            return [(None, self.encode(record, name, files, **options))]
        except AnswersApartError:
            trained = trained_answers(record["conversations"])
            return [
                (number, self.encode(record, name, files, answer=number, **options))
                for number, is_trained in enumerate(trained)
                if is_trained
            ]

    def places_media(self, record: dict[str, Any]) -> bool:
        """Whether media tags in the questions of a record are placeholders, that the mask engine puts there."""
        return self.renderer.keeps_tags and self.renderer.places_media(bool(media_of(record)))

    def pieces(
        self,
        record: dict[str, Any],
        name: str = "the record",
        files: MediaFiles | None = None,
        opens: bool = False,
        answer: int | None = None,
    ) -> list[Piece]:
        """A record, rendered; the join of the pieces is the prompt as text. Arguments and errors: see `encode`."""
        record = record if answer is None else record_up_to(record, answer)
        return self._rendered(record, media_of(record), name, files or MediaFiles(), opens, answer is not None)[0]

    def _rendered(
        self,
        record: dict[str, Any],
        media: Sequence[Medium],
        name: str,
        files: MediaFiles,
        opens: bool,
        last_only: bool,
    ) -> tuple[list[Piece], list[str]]:
        """Pieces, and the modalities of the placeholders that the template itself has written, in order."""
        self._check(record, media, name, files)
        videos, source = [medium for medium in media if medium.modality == "video"], record["conversations"]
        if self.in_frames and videos:
            source = with_frames(source, [files.frames_of(video) for video in videos])
        pieces = self.renderer.pieces(
            source,
            has_media=bool(media),
            name=name,
            opens=opens,
            system=record.get("system_prompt"),
            last_only=last_only,
        )
        if self.renderer.keeps_tags:
            return pieces, []
        clips = iter(()) if self.in_frames else iter([files.clip(video) for video in videos])
        found: list[str] = []
        for number, piece in enumerate(pieces):
            if piece.origin is Origin.TEMPLATE:
                text, modalities = self.reader.carried(piece.text, clips)
                pieces[number] = piece._replace(text=text)
                found += modalities
        return pieces, found

    def _require_agreement(self) -> None:
        """Raises UserError where plain transformers would read other ids than are trained. See `disagreement`."""
        problem = None if self._is_agreed else disagreement(self.tokenizer, self.renderer)
        if problem:
            raise UserError(f"--version {self.version}: {problem}.")
        self._is_agreed = True

    def _check(self, record: dict[str, Any], media: Sequence[Medium], name: str, files: MediaFiles) -> None:
        """Raises DataError for what this model cannot be given."""
        system = record.get("system_prompt")
        if system is not None and not isinstance(system, str):
            raise DataError(f'{name} has a "system_prompt" that is no text: {str(system)[:80]}')
        if self.reader.loads_images:
            return
        if any(is_embedded(medium.path) for medium in media):
            raise DataError(f"{name} has an embedded image, but this model reads images by their paths: {TO_FILES}")
        if any(medium.modality == "video" for medium in media):
            raise DataError(f"{name} has a video, but this model reads images by their paths, and a frame has none")
        check_path = getattr(self.reader.processor, "check_path", None)  # some have a limit to what they read
        if check_path is not None:
            for medium in media:
                check_path(files.file_of(medium), name)

    def _spans(self, media: Sequence[Medium], files: MediaFiles) -> dict[int, list[MediaSpan]]:
        """Placeholder -> what it stands for, in order."""
        spans: dict[int, list[MediaSpan]] = {placeholder: [] for placeholder in PLACEHOLDERS.values()}
        images = sum(files.frames_of(medium) for medium in media if self._is_image(medium))
        for medium in media:
            if self._is_image(medium):
                size = files.size(medium) if self.looks_at(medium) else (0, 0)
                length = self.reader.run_length(size, images)
                spans[IMAGE_TOKEN_INDEX].append(MediaSpan(medium, files.frames_of(medium), length))
            else:
                spans[VIDEO_TOKEN_INDEX].append(MediaSpan(medium, 1, self.reader.clip_length(files.clip(medium))))
        return spans

    def looks_at(self, medium: Medium) -> bool:
        """Whether the file of an image or a video decides over the positions that it takes."""
        return self.reader.needs_sizes or not self._is_image(medium)

    def _is_image(self, medium: Medium) -> bool:
        """Whether a medium is images to the model."""
        return self.in_frames or medium.modality == "image"

    @property
    def _around(self) -> tuple[int, int]:
        """Ids that stand before and behind an image's placeholder and belong to it."""
        lead = self.image_ids.index(IMAGE_TOKEN_INDEX)
        return lead, len(self.image_ids) - lead - 1


def record_up_to(record: dict[str, Any], answer: int) -> dict[str, Any]:
    """A record that ends with one of its answers, counted from 0, and shows what its questions up to there show."""
    source = up_to(record["conversations"], answer)
    if not media_of(record):
        return record | {"conversations": source}
    tags = tags_of(source)
    shown = {name: paths_of(record, name)[: tags.count(name)] for name in MODALITIES if record.get(name)}
    return record | {"conversations": source} | shown


def marked(ids: Iterable[int], carrier: int, modalities: Sequence[str]) -> list[int]:
    """Ids with the placeholder of each medium in place of the token that carries it."""
    remaining = iter(modalities)
    return [PLACEHOLDERS[next(remaining)] if token == carrier else token for token in ids]


def fitting(
    ids: Sequence[int],
    spans: Mapping[int, Sequence[MediaSpan]],
    max_length: int | None,
    around: tuple[int, int] = (0, 0),
) -> tuple[int, int, list[Medium]]:
    """How much of a sample fits, never ending inside an image, what belongs to it, or a video.

    Args:
        ids: with placeholders.
        spans: placeholder -> what it stands for, in order.
        max_length: positions; None: all fits.
        around: ids before and behind an image's placeholder that belong to it.

    Returns:
        The number of ids, the positions that they take, and the media among them, in the order of their placeholders.
    """
    every = [span for row in spans.values() for span in row]
    total = len(ids) + sum(span.placeholders * (span.length - 1) for span in every)
    if (max_length is None or total <= max_length) and sum(map(bool, spans.values())) < 2:
        return len(ids), total, [span.medium for span in every]
    remaining = {placeholder: iter(row) for placeholder, row in spans.items()}
    lead, trail = around
    media: list[Medium] = []
    positions, index = 0, 0
    while index < len(ids):
        end, taken, medium = index + 1, 1, None
        token = ids[index + lead] if index + lead < len(ids) else IGNORE_INDEX
        if token in remaining:
            span = next(remaining[token])
            end, medium = index + lead, span.medium
            for _ in range(span.placeholders):
                end = ids.index(token, end) + 1
            end += trail
            taken = end - index + span.placeholders * (span.length - 1)
        if max_length is not None and positions + taken > max_length:
            break
        positions, index = positions + taken, end
        if medium is not None:
            media.append(medium)
    return index, positions, media


def image_tokens(enclosed: bool) -> tuple[str, ...]:
    """The special tokens that a composed model adds to its tokenizer: `<image>`, and those that enclose it."""
    return (DEFAULT_IMAGE_TOKEN, *((DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN) if enclosed else ()))


def image_ids_of(tokenizer: Any, enclosed: bool) -> tuple[int, ...]:
    """What one image becomes in `input_ids`: its placeholder, between `<im_start>` and `<im_end>` where asked for.

    Raises:
        ValueError: the tokenizer lacks those two (`place_image_token` adds them).
    """
    if not enclosed:
        return (IMAGE_TOKEN_INDEX,)
    known = tokenizer.added_tokens_encoder
    for text in (DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN):
        if text not in known:
            raise ValueError(f"the tokenizer has no {text}: call place_image_token with it first")
    return known[DEFAULT_IM_START_TOKEN], IMAGE_TOKEN_INDEX, known[DEFAULT_IM_END_TOKEN]
