"""Records -> samples of a released model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from PIL import Image

from moellava.constants import IMAGE_TOKEN_INDEX
from moellava.conversation import Kind, Piece
from moellava.data.chat_spans import CHAT_TEMPLATE
from moellava.data.dataset import SupervisedDataset
from moellava.data.images import open_image
from moellava.data.masking import Encoded, engine_for
from moellava.data.preprocess import as_tensor, chat_turns
from moellava.data.records import Records, images_of
from moellava.errors import DataError
from moellava.lmm.media import MediaReader
from moellava.lmm.prompts import ChatTemplate, prompt_pieces
from moellava.lmm.supported_models import LMM_FAMILIES

TO_LOAD_IMAGE: dict[str, bool] = dict.fromkeys(LMM_FAMILIES, True) | {"qwen-vl": False}
"""Family -> whether its collator gets images; False: their paths, which its tokenizer reads out of the prompt."""


class MediaDataset(SupervisedDataset):
    """Samples of a released model, from validated records.

    A record may have a `system_prompt`, which opens its conversation.

    Args:
        records: of `load_records`.
        reader: of the model's processor.
        template: the chat template, in Jinja.
        to_load_image: whether samples hold images or their paths.
        options: `image_folder`, `max_length`, `overlong` and `bad_files`, as of `SupervisedDataset`.

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
            image_processor=reader.processor.image_processor,
            **options,
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample: `input_ids` and `labels` LongTensors [L], -200 once per image, `images` (or their paths), and
        `record`, its name.

        Raises:
            DataError: an image file has become unreadable.
        """
        number = self._kept[index]
        record, name = self.records[number], self.records.name(number)
        encoded, _ = self._encode(record, name)
        paths = images_of(record)[: encoded.ids.count(IMAGE_TOKEN_INDEX)]
        images: list[Any] = [self.files.image_folder / path for path in paths]
        if self.to_load_image:
            try:
                images = [open_image(path) for path in images]
            except DataError as error:
                raise DataError(f"{name}: {error} (`moellava check-data` lists all such files)") from error
        return {
            "input_ids": as_tensor(encoded.ids),
            "labels": as_tensor(encoded.labels),
            "images": images,
            "record": name,
        }

    def _encode(self, record: dict[str, Any], name: str) -> tuple[Encoded, bool]:
        """Ids, -200 for each placeholder, and labels of a record; and whether they were cut to `max_length`."""
        system = record.get("system_prompt")
        if system is not None and not isinstance(system, str):
            raise DataError(f'{name} has a "system_prompt" that is no text: {str(system)[:80]}')
        has_media = bool(images_of(record))
        turns = chat_turns(record["conversations"], name)
        encoded = encode_turns(self.reader, self.template_of(system), turns, has_media, name)
        marked = encoded.ids
        if marked.count(IMAGE_TOKEN_INDEX) != len(images_of(record)):
            raise DataError(
                f"{name} has {len(images_of(record))} images, but its chat template shows "
                f"{marked.count(IMAGE_TOKEN_INDEX)}"
            )
        if self.overlong != "truncate" or self.max_length is None or self._length(marked, record) <= self.max_length:
            return encoded, False
        end = self._fitting(marked, record)
        return Encoded(marked[:end], encoded.labels[:end]), True

    def _run_lengths(self, record: dict[str, Any]) -> list[int]:
        paths = images_of(record)
        return [self.reader.run_length(self._size(path), len(paths)) for path in paths]

    def _size(self, path: str) -> tuple[int, int]:
        with Image.open(self.files.image_folder / path) as image:
            return image.size

    def _length(self, ids: Sequence[int], record: dict[str, Any]) -> int:
        shown = ids.count(IMAGE_TOKEN_INDEX)
        return len(ids) + sum(length - 1 for length in self._run_lengths(record)[:shown])

    def _fitting(self, ids: list[int], record: dict[str, Any]) -> int:
        """How many ids fit into `max_length` positions; the end never lies inside an image."""
        assert self.max_length is not None
        lengths = iter(self._run_lengths(record))
        positions = 0
        for index, token in enumerate(ids):
            positions += next(lengths) if token == IMAGE_TOKEN_INDEX else 1
            if positions > self.max_length:
                return index
        return len(ids)


def encode_turns(
    reader: MediaReader,
    template: ChatTemplate,
    turns: Sequence[tuple[str, str]],
    has_media: bool,
    name: str,
    opens: bool = False,
) -> Encoded:
    """Ids, -200 for each placeholder, and labels of a conversation. Arguments and errors as of `prompt_pieces`."""
    pieces = [_spelled(piece, reader) for piece in prompt_pieces(template, turns, has_media, name, opens)]
    encoded = engine_for(reader.processor.tokenizer).encode(pieces)
    marked = [IMAGE_TOKEN_INDEX if token == reader.placeholder_id else token for token in encoded.ids]
    return Encoded(marked, encoded.labels)


def _spelled(piece: Piece, reader: MediaReader) -> Piece:
    """A piece of the template with plain text around its placeholders, where the processor puts some."""
    if piece.kind is not Kind.TEMPLATE or reader.spelled == reader.placeholder:
        return piece
    return piece._replace(text=piece.text.replace(reader.placeholder, reader.spelled))
