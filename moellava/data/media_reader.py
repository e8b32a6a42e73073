# SPDX-License-Identifier: Apache-2.0
"""Images and videos -> tensors and the tokens that stand for them, by a model's own processor.

Every processor spells one placeholder out into a run of tokens: `<image>` into 576 of the same, or tiles with rows and
columns; `<video>` into frames, with times between them. It is asked with a text of nothing but placeholders between
separators, once for the images of a batch and once for its videos:

    text   </s><image></s><image></s>
    ids    1 2 I I I I 2 I I I I 2        runs: [I I I I], [I I I I]

So the text of a record never passes through a processor, which would take special tokens for real that are only typed.
Plain text at the ends of a run (Gemma 3's line breaks, the time of a video's first frame) goes into the prompt instead,
where it may join its neighbours. Where every image is the same run and pixels of one size (LLaVA-1.5, and what is
composed of a language model and a tower), the processor's text is asked for once, and from then on its image processor
alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from PIL import Image

from moellava.data.plain_pixels import plain_pixels
from moellava.data.records import MODALITIES
from moellava.data.remembered import Remembered
from moellava.data.tabled import with_table
from moellava.data.video import USUAL_FPS, Clip, Video
from moellava.errors import BadFileError, UserError

BLANK = (56, 56)
"""Width and height in pixels of what stands in where a batch shows nothing."""

WIDE = (168, 56)
"""Another shape, to find out whether a processor cares for it."""

SIZES_KEPT, CLIPS_KEPT = 65536, 16384
"""Sizes of images and shapes of videos whose tokens are remembered."""

WRAPPERS = (("image_start_token", "image_end_token"), ("boi_token", "eoi_token"))
"""What processors call two tokens that may have to stand around an image's placeholder (HunYuan-VL)."""

PER_TOKEN = "token_type_ids"
"""How the names of a processor's outputs end that hold a number for each token."""

Shown = Image.Image | Video


@dataclass
class Run:
    """The tokens of one image or video.

    Attributes:
        ids: token ids.
        extras: further numbers for each token, by the name of the model's input (`token_type_ids` …).
    """

    ids: list[int]
    extras: dict[str, list[int]]


@dataclass
class Media:
    """What a batch's images and videos are to the model.

    Attributes:
        runs: for each sample that shows something, one run for each image or video.
        tensors: inputs of the model, `pixel_values` or `pixel_values_videos` among them.
    """

    runs: list[list[Run]]
    tensors: dict[str, torch.Tensor]


class MediaReader:
    """Asks a processor for runs and tensors.

    Args:
        processor: a Hugging Face processor with an image processor and a tokenizer.
        loads_images: False where the processor takes the paths of images.

    Attributes:
        placeholder, placeholder_id: what stands for an image in the text that the processor reads.
        placeholders: the same for every modality that it reads; where videos are not among them, their frames are
            shown as images.
        fixed_run: the run of every image, where all are alike; else None.
        nests: modality -> whether the processor takes a list of them for each text; else all of them in one list.

    Raises:
        UserError: it has no placeholder, or one that is no special token, or no end-of-sequence token.
    """

    def __init__(self, processor: Any, loads_images: bool = True):
        self.processor = processor
        self._fast = processor
        self.loads_images = loads_images
        self.fixed_run: Run | None = None
        self.nests = {"image": True, "video": False}
        self._wrapper = ("", "")
        names = getattr(processor, "model_input_names", ())
        # Not every processor says by itself which token is of which modality, where its model wants to know.
        self._asks = {"return_mm_token_type_ids": True} if f"mm_{PER_TOKEN}" in names else {}
        tokenizer = processor.tokenizer
        self.placeholder: str = placeholder_of(processor)
        special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        if self.placeholder not in special or tokenizer.eos_token_id is None:
            raise UserError(
                f"The tokenizer of {type(processor).__name__} has no special token {self.placeholder!r} or no "
                "end-of-sequence token: its folder is incomplete."
            )
        self.placeholder_id: int = special[self.placeholder]
        self.separator: str = tokenizer.eos_token
        self.separator_id: int = tokenizer.eos_token_id
        self.special_ids = frozenset(special.values()) - {tokenizer.bos_token_id}  # PaliGemma adds one behind images
        self.placeholders = {"image": self.placeholder}
        if reads_videos(processor):
            self.placeholders["video"] = processor.video_token
        self._places = re.compile(
            "|".join(f"(?P<{modality}>{re.escape(text)})" for modality, text in self.placeholders.items())
        )
        self.run_length = Remembered(self._run_length, SIZES_KEPT)
        self._clip_run = Remembered(self._run_of_clip, CLIPS_KEPT)
        blank_run, self.fixed_run = self._probed()
        self._plain = plain_pixels(processor.image_processor) if self.fixed_run else None
        if loads_images and self._plain is None:
            self._fast = with_table(processor)
        self.spelled = self._spelled(blank_run)
        """The placeholder with the plain text that the processor puts around it."""
        self.is_timed, self.gives_times = self._tell_times() if "video" in self.placeholders else (False, False)
        """Whether a video's tokens tell the times of its frames, and whether its tensors do."""
        self.is_one_input = "video" in self.placeholders and "pixel_values" in self.read([[blank("video")]]).tensors
        """Whether the model reads images and videos as one input, in one pass through its vision encoder."""

    def read(self, samples: Sequence[Sequence[Shown]], name: str = "the batch") -> Media:
        """Runs and tensors of the images and videos of several samples, none of them without any.

        Raises:
            BadFileError: the processor cannot take an image or a video.
        """
        runs: dict[str, Iterator[Run]] = {}
        tensors: list[dict[str, torch.Tensor]] = []
        try:
            for modality in MODALITIES:
                rows = [[shown for shown in sample if modality_of(shown) == modality] for sample in samples]
                if any(rows):
                    found, inputs = self._asked(modality, [row for row in rows if row])
                    runs[modality] = iter([run for row in found for run in row])
                    tensors.append(inputs)
            joined = self._joined(samples, tensors)
        except BadFileError as error:
            raise BadFileError(f"{name}: {error}") from error
        return Media(
            [[self._trimmed(next(runs[modality_of(shown)])) for shown in sample] for sample in samples], joined
        )

    @property
    def needs_sizes(self) -> bool:
        """Whether the size of an image decides over its tokens."""
        return self.fixed_run is None

    @property
    def reads_videos(self) -> bool:
        """Whether it has a way for videos; otherwise they are their frames."""
        return "video" in self.placeholders

    def clip_length(self, clip: Clip) -> int:
        """Tokens of a video."""
        return len(self._trimmed(self._clip_run(self._essence(clip))).ids)

    def carried(self, text: str, clips: Iterator[Clip]) -> tuple[str, list[str]]:
        """Text of a template with its placeholders spelled out, and their modalities in order.

        An image's placeholder stands for a video as well, for not every tokenizer knows the one for videos.

        Args:
            text: of the template.
            clips: of the conversation's videos, in order; those of this text are taken.
        """
        modalities = [str(place.lastgroup) for place in self._places.finditer(text)]
        spelled = iter(
            [self.spelled if modality == "image" else self._spelled_clip(next(clips, None)) for modality in modalities]
        )
        return self._places.sub(lambda _: next(spelled), text), modalities

    def _spelled_clip(self, clip: Clip | None) -> str:
        """As `_spelled`, for a video; None where the template shows more of them than there are."""
        return self.placeholder if clip is None else self._spelled(self._clip_run(self._essence(clip)))

    def _spelled(self, run: Run) -> str:
        """The placeholder with the plain text of a run around it."""
        begin, end = self._marked(run.ids)
        decode = self.processor.tokenizer.decode
        return self.placeholder.join(decode(ids, skip_special_tokens=True) for ids in (run.ids[:begin], run.ids[end:]))

    def _asked(
        self, modality: str, samples: Sequence[Sequence[Any]]
    ) -> tuple[list[list[Run]], dict[str, torch.Tensor]]:
        """What the processor makes of images, or of videos. Raises BadFileError: see `read`; without a name."""
        if modality == "image" and self.fixed_run is not None:
            return self._pixels(samples, self.fixed_run)
        before, behind = self._wrapper if modality == "image" else ("", "")
        shown = before + self.placeholders[modality] + behind + self.separator
        texts = [self.separator + shown * len(row) for row in samples]
        nests = self.nests[modality]
        given = {"images": arranged(samples, nests)} if modality == "image" else video_arguments(samples, nests)
        try:
            output = self._fast(text=texts, padding=True, return_tensors="pt", **given, **self._asks)
        except (ValueError, ZeroDivisionError, IndexError) as error:
            raise BadFileError(
                f"the processor cannot take {modality}s of {sizes_of(samples)} pixels: {error}"
            ) from error
        for name in ("labels", "cross_attention_mask"):  # of this text, not of a record's
            output.pop(name, None)
        ids, attended = output.pop("input_ids"), output.pop("attention_mask").bool()
        per_token = {key: output.pop(key) for key in list(output) if key.endswith(PER_TOKEN)}
        runs = []
        for number, row in enumerate(samples):
            kept = attended[number]
            extras = {key: value[number][kept].tolist() for key, value in per_token.items()}
            runs.append(self._cut(ids[number][kept].tolist(), extras, len(row), bool(before)))
        return runs, dict(output)

    def _probed(self) -> tuple[Run, Run | None]:
        """The run of a blank image, and that of every image where shape changes neither it nor the tensors."""
        images = [[[Image.new("RGB", size)]] for size in (BLANK, WIDE)]
        asked = self._first_that_is_taken("image", images, wrappers_of(self.processor))
        (first, tensors), (second, others) = asked
        run = first[0][0]
        is_fixed = (
            not run.extras
            and run == second[0][0]
            and set(tensors) == {"pixel_values"}
            and tensors["pixel_values"].shape == others["pixel_values"].shape
        )
        return run, run if is_fixed else None

    def _first_that_is_taken(self, modality: str, asked: list[Any], wrappers: list[tuple[str, str]]) -> list[Any]:
        """What the processor makes of samples in the first way to ask it that it takes. Raises BadFileError: in none,
        as it said of the usual one."""
        refused, usual = None, self.nests[modality]
        for wrapper, nests in product(wrappers, (usual, not usual)):
            self._wrapper, self.nests[modality] = wrapper, nests
            try:
                return [self._asked(modality, samples) for samples in asked]
            except BadFileError as error:
                refused = refused or error
        assert refused is not None
        raise refused

    def _pixels(
        self, samples: Sequence[Sequence[Image.Image]], run: Run
    ) -> tuple[list[list[Run]], dict[str, torch.Tensor]]:
        """The same as `_asked`, where every image is one run."""
        images = [image for row in samples for image in row]
        try:
            if self._plain is not None:
                return [[run] * len(row) for row in samples], {"pixel_values": self._plain(images)}
            pixels = self._fast.image_processor(images, return_tensors="pt")
        except (ValueError, ZeroDivisionError, IndexError) as error:
            raise BadFileError(f"the processor cannot take images of {sizes_of(samples)} pixels: {error}") from error
        return [[run] * len(row) for row in samples], {"pixel_values": pixels["pixel_values"]}

    def _joined(
        self, samples: Sequence[Sequence[Shown]], tensors: Sequence[dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """The inputs of images and of videos together. Where both are pixels of the same name, they go in order."""
        joined = {key: value for inputs in tensors for key, value in inputs.items()}
        if sum(map(len, tensors)) == len(joined):
            return joined
        alone = [self._asked(modality_of(shown), [[shown]])[1] for sample in samples for shown in sample]
        axis = alone[0]["pixel_values"].ndim - 4  # SmolVLM has an axis for samples before the one for images
        return {key: torch.cat([inputs[key] for inputs in alone], dim=axis) for key in joined}

    def _marked(self, ids: Sequence[int]) -> tuple[int, int]:
        """The range from the first to the last special token."""
        where = [index for index, token in enumerate(ids) if token in self.special_ids]
        return where[0], where[-1] + 1

    def _trimmed(self, run: Run) -> Run:
        begin, end = self._marked(run.ids)
        return Run(run.ids[begin:end], {key: value[begin:end] for key, value in run.extras.items()})

    def _cut(self, ids: list[int], extras: dict[str, list[int]], count: int, wrapped: bool) -> list[Run]:
        """The runs between separators, without what they are wrapped in, which the template itself writes."""
        borders = [index for index, token in enumerate(ids) if token == self.separator_id]
        if len(borders) < count + 1:
            raise UserError(f"{type(self.processor).__name__} gave {len(borders) - 1} images where {count} were shown.")
        spans = zip(borders[-count - 1 :], borders[-count:], strict=False)
        inside = [slice(begin + 1 + wrapped, end - wrapped) for begin, end in spans]
        return [Run(ids[span], {key: value[span] for key, value in extras.items()}) for span in inside]

    def _run_length(self, size: tuple[int, int], count: int) -> int:
        """Tokens of one image. Cheap, and the same for all sizes, where there is a `fixed_run`.

        Args:
            size: its width and height in pixels.
            count: images of its record; some processors cut an image into tiles only if it is alone.
        """
        if self.fixed_run is not None:
            return len(self._trimmed(self.fixed_run).ids)
        return len(self.read([[Image.new("RGB", size)] * count]).runs[0][0].ids)

    def _run_of_clip(self, clip: Clip) -> Run:
        return self._asked("video", [[of_blanks(clip)]])[0][0][0]

    def _essence(self, clip: Clip) -> Clip:
        """What of a clip decides over its tokens."""
        if self.is_timed:
            return Clip(clip.size, clip.total, clip.fps, clip.indices)
        return Clip(clip.size, len(clip.indices), USUAL_FPS, tuple(range(len(clip.indices))))

    def _tell_times(self) -> tuple[bool, bool]:
        clips = Clip(BLANK, 9000, 1.0, (0, 1)), Clip(BLANK, 9000, 2.0, (7000, 8999))
        shown = [[[of_blanks(clip)]] for clip in clips]
        (early, tensors), (late, others) = self._first_that_is_taken("video", shown, [self._wrapper])
        given = any(not np.array_equal(value, others[name]) for name, value in tensors.items())
        return early[0][0].ids != late[0][0].ids, given


def wrappers_of(processor: Any) -> list[tuple[str, str]]:
    """What may have to stand right before and behind a placeholder: nothing, or special tokens by `WRAPPERS`."""
    special = {token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
    named: list[Any] = [tuple(getattr(processor, name, None) for name in pair) for pair in WRAPPERS]
    return [("", ""), *(pair for pair in named if special.issuperset(pair))]


def placeholder_of(processor: Any) -> str:
    """What stands for an image in the text that a processor reads. Raises UserError: nothing does."""
    found = getattr(processor, "image_placeholder_token", None) or getattr(processor, "image_token", None)
    if found is None:
        raise UserError(
            f"{type(processor).__name__} reads no text with a place for an image in it, so no conversation about "
            "images can be written for the model."
        )
    return str(found)


def blank(modality: str) -> Shown:
    """A black image, or a video of two black frames: the least that every processor takes."""
    image = Image.new("RGB", BLANK)
    return image if modality == "image" else Video(Clip(BLANK, 2, USUAL_FPS, (0, 1)), (image, image))


def of_blanks(clip: Clip) -> Video:
    """A video of black frames."""
    return Video(clip, (Image.new("RGB", clip.size),) * len(clip.indices))


def reads_videos(processor: Any) -> bool:
    """Whether a processor has a way for videos."""
    video_processor = getattr(processor, "video_processor", None)
    if video_processor is None or getattr(processor, "video_token", None) is None:
        return False
    return getattr(video_processor, "reads_videos", True)  # a stand-in for a video processor may know no way


def modality_of(shown: Shown) -> str:
    """'image' or 'video'."""
    return "video" if isinstance(shown, Video) else "image"


def sizes_of(samples: Sequence[Sequence[Any]]) -> list[Any]:
    """Width and height in pixels of images and videos; the path of an image that is not opened."""
    return [
        shown.clip.size if isinstance(shown, Video) else getattr(shown, "size", shown)
        for row in samples
        for shown in row
    ]


def arranged(samples: Sequence[Sequence[Any]], nests: bool) -> list[Any]:
    """What samples show, a list for each of them or all in one list."""
    return [list(row) for row in samples] if nests else [shown for row in samples for shown in row]


def video_arguments(samples: Sequence[Sequence[Video]], nests: bool = False) -> dict[str, Any]:
    """How a processor is given videos whose frames are chosen already."""
    metadata = [
        {
            "total_num_frames": clip.total,
            "fps": clip.fps,
            "duration": clip.seconds,
            "frames_indices": list(clip.indices),
            "width": clip.size[0],
            "height": clip.size[1],
        }
        for clip in (video.clip for row in samples for video in row)
    ]
    return {
        "videos": arranged([[list(video.frames) for video in row] for row in samples], nests),
        "videos_kwargs": {"video_metadata": metadata, "do_sample_frames": False},
    }
