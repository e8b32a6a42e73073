"""Records -> samples of a released model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

from PIL import Image

from moellava.constants import CHAT_TEMPLATE, IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX
from moellava.conversation import Kind
from moellava.data.dataset import SupervisedDataset
from moellava.data.masking import Encoded, engine_for
from moellava.data.media import with_frames
from moellava.data.media_reader import MediaReader
from moellava.data.preprocess import as_tensor, chat_turns
from moellava.data.records import Medium, Records, media_of
from moellava.data.video import Clip
from moellava.errors import DataError
from moellava.lmm.architecture import FieldView
from moellava.lmm.prompts import ChatTemplate, prompt_pieces
from moellava.lmm.remote import RemoteProcessor

TO_LOAD_IMAGE = FieldView("loads_images")
"""Architecture -> whether its collator gets images; False: their paths, which its tokenizer reads out of the prompt."""

PLACEHOLDERS = {"image": IMAGE_TOKEN_INDEX, "video": VIDEO_TOKEN_INDEX}
"""What stands for an image and for a video in `input_ids`."""


class MediaDataset(SupervisedDataset):
    """Samples of a released model, from validated records.

    A record may have a `system_prompt`, which opens its conversation. A video goes through the processor's way for
    videos; where it has none, the video's frames are images of the record.

    Args:
        records: of `load_records`.
        reader: of the model's processor.
        template: the chat template, in Jinja.
        to_load_image: whether samples hold images or their paths.
        options: `image_folder`, `video_folder`, `num_frames`, `max_length`, `overlong` and `bad_files`, as of
            `SupervisedDataset`.

    Raises:
        DataError: with one line for every problem of every record.
        UserError: the template cannot be masked.
    """

    def __init__(
        self, records: Records, reader: MediaReader, template: str, *, to_load_image: bool = True, **options: Any
    ):
        self.reader = reader
        self.to_load_image = to_load_image
        self.template_of = lru_cache(maxsize=64)(lambda system: ChatTemplate(reader.processor, template, system))
        super().__init__(
            records,
            reader.processor.tokenizer,
            version=CHAT_TEMPLATE,
            tokens_per_image=0,
            image_processor=reader.processor,
            **options,
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample: `input_ids` and `labels` LongTensors [L], -200 once per image and -201 once per video, `images` (or
        their paths), `videos` and `record`, its name.

        Raises:
            DataError: a file has become unreadable.
        """
        number = self._kept[index]
        record, name = self.records[number], self.records.name(number)
        encoded, _ = self._encode(record, name)
        shown = {kind: encoded.ids.count(placeholder) for kind, placeholder in PLACEHOLDERS.items()}
        try:
            images, videos = self._images(record, shown["image"]), self._videos(record, shown["video"])
        except DataError as error:
            raise DataError(f"{name}: {error} (`moellava check-data` lists all such files)") from error
        return {
            "input_ids": as_tensor(encoded.ids),
            "labels": as_tensor(encoded.labels),
            "images": images,
            "videos": videos,
            "record": name,
        }

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the samples show: images, videos, both or nothing."""
        seen = {kind for number in self._kept for kind, count in self._counts_of(self.records[number]).items() if count}
        return tuple(kind for kind in PLACEHOLDERS if kind in seen)

    @property
    def _as_frames(self) -> bool:
        """Whether a video is images to this model."""
        return "video" not in self.reader.kinds

    def _images(self, record: dict[str, Any], count: int) -> list[Any]:
        """The first `count` images of a record, or their paths."""
        media = [medium for medium in media_of(record) if medium.kind == "image" or self._as_frames]
        if not self.to_load_image:
            return [self.files.file_of(medium) for medium in media[:count]]
        images: list[Any] = []
        for medium in media:
            if len(images) == count:
                break
            images += self.files.pictures([medium])
        return images

    def _videos(self, record: dict[str, Any], count: int) -> list[Any]:
        """The first `count` videos of a record."""
        media = [medium for medium in media_of(record) if medium.kind == "video"]
        return [self.files.read(medium) for medium in media[:count]]

    def _encode(self, record: dict[str, Any], name: str) -> tuple[Encoded, bool]:
        """Ids, placeholders among them, and labels of a record; and whether they were cut to `max_length`."""
        system = record.get("system_prompt")
        if system is not None and not isinstance(system, str):
            raise DataError(f'{name} has a "system_prompt" that is no text: {str(system)[:80]}')
        media = media_of(record)
        clips = [self.files.clip(medium) for medium in media if medium.kind == "video"]
        if clips and not self.to_load_image:
            raise DataError(f"{name} has a video, but this model reads images by their paths, and a frame has none")
        if not self.to_load_image and isinstance(self.reader.processor, RemoteProcessor):
            for medium in media:
                self.reader.processor.check_path(self.files.file_of(medium), name)
        source = record["conversations"]
        turns = chat_turns(with_frames(source, self.files.num_frames) if self._as_frames else source, name)
        encoded = encode_turns(self.reader, self.template_of(system), turns, bool(media), name, clips=clips)
        for kind, given in self._counts_of(record).items():
            shown = encoded.ids.count(PLACEHOLDERS[kind])
            if shown != given:
                raise DataError(f"{name} has {given} {kind}s, but its chat template shows {shown}")
        if self.overlong != "truncate" or self.max_length is None:
            return encoded, False
        end = fitting_length(encoded.ids, self.max_length, self._groups(record))
        return Encoded(encoded.ids[:end], encoded.labels[:end]), end < len(encoded.ids)

    def _counts_of(self, record: dict[str, Any]) -> dict[str, int]:
        """How many images and videos a record is to the model."""
        kinds = [medium.kind for medium in media_of(record)]
        counts = {kind: kinds.count(kind) for kind in PLACEHOLDERS}
        if self._as_frames:
            counts = {"image": counts["image"] + counts["video"] * self.files.num_frames, "video": 0}
        return counts

    def _groups(self, record: dict[str, Any]) -> dict[int, list[list[int]]]:
        """Placeholder -> the tokens of each image or video that it stands for, in order; frames of one video are one
        group, because they are not parted."""
        images = self._counts_of(record)["image"]
        groups: dict[int, list[list[int]]] = {placeholder: [] for placeholder in PLACEHOLDERS.values()}
        for medium in media_of(record):
            if medium.kind == "video" and not self._as_frames:
                groups[VIDEO_TOKEN_INDEX].append([self.reader.clip_length(self.files.clip(medium))])
                continue
            count = 1 if medium.kind == "image" else self.files.num_frames
            groups[IMAGE_TOKEN_INDEX].append([self.reader.run_length(self._size(medium), images)] * count)
        return groups

    def _size(self, medium: Medium) -> tuple[int, int]:
        if medium.kind == "video":
            return self.files.clip(medium).size
        with Image.open(self.files.file_of(medium)) as image:
            return image.size

    def _shows(self, ids: Sequence[int]) -> bool:
        return any(placeholder in ids for placeholder in PLACEHOLDERS.values())

    def _length(self, ids: Sequence[int], record: dict[str, Any]) -> int:
        groups = self._groups(record)
        lengths = [chain.from_iterable(groups[index]) for index in groups]
        shown = [ids.count(index) for index in groups]
        return len(ids) + sum(length - 1 for row, count in zip(lengths, shown) for length in list(row)[:count])


def fitting_length(ids: Sequence[int], max_length: int, groups: Mapping[int, Sequence[Sequence[int]]]) -> int:
    """How many of the ids fit into `max_length` positions without ending inside an image or a video.

    Args:
        ids: with placeholders.
        max_length: positions.
        groups: placeholder -> the tokens of each that it stands for, in order, grouped by what is not parted.
    """
    remaining = {placeholder: iter(rows) for placeholder, rows in groups.items()}
    positions, index = 0, 0
    while index < len(ids):
        end, tokens = index + 1, 1
        if ids[index] in remaining:
            lengths = next(remaining[ids[index]])
            for _ in lengths[1:]:
                end = ids.index(ids[index], end) + 1
            tokens = end - index - len(lengths) + sum(lengths)
        positions += tokens
        if positions > max_length:
            return index
        index = end
    return index


def encode_turns(
    reader: MediaReader,
    template: ChatTemplate,
    turns: Sequence[tuple[str, str]],
    has_media: bool,
    name: str,
    opens: bool = False,
    clips: Sequence[Clip] = (),
) -> Encoded:
    """Ids, with -200 for each image and -201 for each video, and labels of a conversation.

    Args:
        reader: of the model's processor.
        clips: the conversation's videos, in order.
        template, turns, has_media, name, opens: and errors, as of `prompt_pieces`.
    """
    remaining = iter(clips)
    pieces, kinds = [], []
    for piece in prompt_pieces(template, turns, has_media, name, opens):
        if piece.kind is Kind.TEMPLATE:
            text, found = reader.carried(piece.text, remaining)
            piece = piece._replace(text=text)
            kinds += found
        pieces.append(piece)
    encoded = engine_for(reader.processor.tokenizer).encode(pieces)
    return Encoded(list(_marked(encoded.ids, reader.placeholder_id, kinds)), encoded.labels)


def _marked(ids: Sequence[int], carrier: int, kinds: Sequence[str]) -> Iterator[int]:
    """Ids with the placeholder of each medium in place of the token that carries it."""
    remaining = iter(kinds)
    return (PLACEHOLDERS[next(remaining)] if token == carrier else token for token in ids)
