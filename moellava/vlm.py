# SPDX-License-Identifier: Apache-2.0
"""One type for every vision-language model, and the one way to open any folder.

A folder is opened in three steps: it is *read* (`Manifest`), *described* as data (`Description`), and *built* (`VLM`).
Composed, released and published models, dense or sparse, differ in their descriptions alone: nobody who holds a `VLM`
asks which of them it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from moellava.constants import CHAT_TEMPLATE, DEFAULT_IMAGE_TOKEN
from moellava.data.collate import MediaCollator
from moellava.data.dataset import sample_of
from moellava.data.encoder import CountedImages, Encoder, image_ids_of
from moellava.data.media_reader import MediaReader
from moellava.data.render import ChatRenderer, Renderer, renderer_for
from moellava.data.render.jinja import saved_chat_template
from moellava.data.tokenizers import load_tokenizer
from moellava.errors import UserError
from moellava.files import CONFIG, model_files, resolve_folder
from moellava.lmm.architecture import Architecture, architecture_of, holds_vlm
from moellava.lmm.loaders import describe_released
from moellava.log import get_logger
from moellava.model.compose import Composition, describe_composed, describe_parts, make_processor
from moellava.model.description import Description
from moellava.model.devices import default_device, default_dtype, device_named
from moellava.model.extended import extend_in_place
from moellava.model.features import FeatureCache
from moellava.model.integrity import check_files, opening
from moellava.model.manifest import Manifest, read_folder
from moellava.model.origin import note_origin
from moellava.model.parts import Keywords, parts_of
from moellava.model.published import describe_published
from moellava.model.saving import save_pretrained_folder
from moellava.model.section import Section, note, note_plugins, plugins_of, section_of
from moellava.model.tiles import require_same_layout, with_ratio
from moellava.model.weights import require_sizes, shapes_in
from moellava.moe import MoESpec, convert_engine
from moellava.plugins import require_plugins

PROBE_TOKENS = 12
PROBE_PIXELS = 56
"""Random tokens of a question and of its answer, and the image's sides in pixels, that two models are compared on."""

CONTEXT_FIELDS = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "seq_length")
"""What configs call the longest sequence. Where positions are relative (Bloom), none does."""

UNLIMITED = 1_000_000
"""Tokens of a context that no config limits."""

Probes = dict[str, dict[str, Any]]
"""'text', and 'image' where there is one, -> inputs of the model."""


@dataclass
class VLM:
    """A vision-language model and what makes its inputs.

    Args:
        model: of its Hugging Face class, or of that class extended.
        tokenizer, processor: None where a published folder came without a tokenizer.
        keywords: where its parts are.
        architecture: of a released model, its entry; None for what is composed here.
        source: what the user called it.
        features: what images and videos became that it was asked about.
    """

    model: Any
    tokenizer: Any
    processor: Any
    keywords: Keywords
    architecture: Architecture | None = None
    source: str = "this model"
    features: FeatureCache = field(default_factory=FeatureCache, init=False, repr=False, compare=False)

    @property
    def section(self) -> Section:
        """What the model's config says of it. To change it, use `note`."""
        return section_of(self.model.config) or Section()

    @property
    def parts(self) -> dict[str, nn.ModuleList]:
        """See `parts_of`."""
        return parts_of(self.model, self.keywords)

    @property
    def spec(self) -> MoESpec | None:
        """Options of a sparse model; None for a dense one."""
        moe = getattr(self.model.config, "moe", None)
        return MoESpec.from_config(moe) if moe else None

    @property
    def context_length(self) -> int:
        """The longest sequence, in tokens."""
        text = self.model.config.get_text_config()
        named = [getattr(text, name, None) for name in CONTEXT_FIELDS]
        return next((length for length in named if isinstance(length, int)), UNLIMITED)

    @property
    def trains_projector(self) -> bool:
        """Whether fine-tuning trains the projector unless a flag says otherwise. That of a released model has learnt
        on more than a user's data will tell it."""
        return self.architecture is None

    @property
    def placeholder_ids(self) -> list[int]:
        """Token ids that stand for images and videos in the model's input."""
        config = self.model.config
        named = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
        return [index for index in named if isinstance(index, int)]

    @cached_property
    def encoder(self) -> Encoder:
        """What every sample and every prompt goes through. Raises UserError where there is no tokenizer."""
        self.require_tokenizer()
        return encoder_of(self.tokenizer, self.processor, self.model.config, self.architecture)

    @property
    def reader(self) -> Any:
        """What images and videos become."""
        return self.encoder.reader

    def require_tokenizer(self) -> None:
        """Raises UserError if the folder came without a tokenizer, for those who cannot go on without one."""
        if self.tokenizer is None:
            raise UserError(
                f"{self.source} holds no tokenizer. Copy the files of the language model's tokenizer into it, "
                "or give the language model as --model-base."
            )

    def require_answers(self) -> None:
        """Raises UserError for a model that only the code of its own repository can ask."""
        self.require_tokenizer()
        if self.architecture is not None and (self.architecture.remote_code or not self.architecture.loads_images):
            raise UserError(f"{self.source}: {self.architecture.name} models chat with the code of their repository.")

    def collator(self, train_questions: bool = False) -> MediaCollator:
        """The collator of its samples. For `train_questions` see `MediaCollator`."""
        return collator_of(self.encoder, self.architecture, train_questions)

    def probes(self) -> Probes:
        """What it is compared with another model on."""
        return probes_of(self.model.config, self.encoder, self.collator(), self.model.dtype)

    def settle(self, version: str | None = None, image_aspect_ratio: str | None = None) -> None:
        """Gives it another conversation template, or another way to bring images to the tower's shape.

        Raises:
            UserError: no tokenizer, or an aspect ratio for a model whose processor brings its own.
        """
        self.require_tokenizer()
        section = self.section
        version = version or section.version
        if self.architecture is not None:
            if image_aspect_ratio not in (None, section.image_aspect_ratio):
                raise UserError(
                    f"--image_aspect_ratio {image_aspect_ratio}: {self.source} is a released model, whose "
                    "processor says how images are cut. Leave the flag out."
                )
            if version != CHAT_TEMPLATE:
                self.processor.chat_template = saved_chat_template(version, self.tokenizer)
            note(self.model.config, version=version)
        else:
            ratio = image_aspect_ratio or section.image_aspect_ratio
            require_same_layout(ratio, section.image_aspect_ratio, self.source)
            note(with_ratio(self.model.config, ratio), version=version, image_aspect_ratio=ratio)
            self.processor = make_processor(self.processor.image_processor, self.tokenizer, self.model.config)
        self.__dict__.pop("encoder", None)

    def sparse(self, spec: MoESpec) -> None:
        """Notes that its MLPs have been upcycled."""
        self.model.config.moe = spec.to_config()
        extend_in_place(self.model)

    def save(self, path: str | Path, **options: Any) -> None:
        """Writes one complete folder. For the options see `save_pretrained_folder`."""
        save_pretrained_folder(self.model, self.tokenizer, self.processor, path, **options)


def encoder_of(tokenizer: Any, processor: Any, config: Any, architecture: Architecture | None) -> Encoder:
    """The encoder of a model. Raises UserError where its processor or its template cannot be used."""
    section = section_of(config) or Section()
    if architecture is not None and section.version != CHAT_TEMPLATE and processor.image_token != DEFAULT_IMAGE_TOKEN:
        raise UserError(
            f"--version {section.version} writes {DEFAULT_IMAGE_TOKEN} where an image stands, but {architecture.name} "
            f"models read {processor.image_token}: leave the flag out, or give --version {CHAT_TEMPLATE}."
        )
    reader = MediaReader(processor, architecture is None or architecture.loads_images)
    in_parts = architecture is not None and section.version == CHAT_TEMPLATE
    renderer: Renderer = renderer_for(section.version, tokenizer)
    if in_parts:  # the processor's template writes placeholders of its own
        renderer = ChatRenderer(processor, processor.chat_template, in_parts=True)
    return Encoder(tokenizer, renderer, reader, image_ids_of(tokenizer, section.use_im_start_end))


def collator_of(encoder: Encoder, architecture: Architecture | None, train_questions: bool = False) -> MediaCollator:
    """The collator of a model's samples."""
    collator = (architecture and architecture.collator) or MediaCollator
    pad, end = encoder.tokenizer.pad_token_id, encoder.tokenizer.eos_token_id
    reader: Any = encoder.reader
    return collator(reader, end if pad is None else pad, train_questions)


def probes_of(config: Any, encoder: Encoder, collator: MediaCollator, dtype: torch.dtype, seed: int = 0) -> Probes:
    """A conversation of random words, and the same about a random image, as inputs of a model; without an image where
    the model opens image files itself.

    Args:
        config, encoder, collator: of the model and of its samples.
        dtype: of the pixels.
        seed: of words and pixels.
    """
    generator, tokenizer = torch.Generator().manual_seed(seed), encoder.tokenizer
    words = min(tokenizer.vocab_size, config.get_text_config().vocab_size)
    ids = torch.randint(words // 2, words, (2, PROBE_TOKENS), generator=generator)
    asked, said = (tokenizer.decode(row, skip_special_tokens=True) for row in ids)
    pixels = torch.randint(0, 256, (PROBE_PIXELS, PROBE_PIXELS, 3), generator=generator, dtype=torch.uint8)
    shows: dict[str, list[Any]] = {"text": []}
    if collator.reader.loads_images:
        shows["image"] = [Image.fromarray(pixels.numpy())]
    probes: Probes = {}
    for name, shown in shows.items():
        turns = [{"from": "human", "value": f"{DEFAULT_IMAGE_TOKEN}\n" * len(shown) + asked}]
        record = {"conversations": [*turns, {"from": "gpt", "value": said}], "image": shown}
        batch = collator.of_prompts()([sample_of(encoder.encode(record, "the probe"), shown, "the probe")])
        probes[name] = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    return probes


def describe(
    manifest: Manifest, trust_remote_code: bool = False, architecture: Architecture | None = None
) -> Description:
    """A folder as data.

    Args:
        manifest: of the folder.
        trust_remote_code: run the Python code in it, for architectures that need it.
        architecture: what a registered id says that it is; None: by its config.

    Raises:
        UserError: no vision-language model, one of a class that is not known, or a folder that lacks files.
    """
    if architecture is None and not holds_vlm(manifest):
        raise UserError(
            f"{manifest.called} is {manifest.holds}, no vision-language model. Stage 1 composes one of a "
            "language model and a vision tower: train.py --model_name_or_path LLM --image_tower TOWER --version plain"
        )
    manifest.refuse_exported_code()
    require_plugins(plugins_of(manifest.config), manifest.folder, trust_remote_code)
    with opening(manifest.called):
        description = _describe(manifest, trust_remote_code, architecture)
        note_origin(description.config, manifest)
        return description


def _describe(manifest: Manifest, trust_remote_code: bool, architecture: Architecture | None) -> Description:
    if manifest.is_published:
        return describe_published(manifest)
    known = architecture or architecture_of(manifest)
    return describe_composed(manifest) if known is None else describe_released(manifest, known, trust_remote_code)


def build(description: Description, dtype: torch.dtype, source: str = "this model") -> VLM:
    """The model of a description, in evaluation mode on the CPU. Raises UserError: see `describe`."""
    tokenizer, processor = description.inputs()  # first: a file that is missing is told before gigabytes are read
    require_sizes(description.config, shapes_in(description.folder), source)
    keywords = description.keywords  # so is what cannot be taken apart; and the config learns of it
    model = description.load(dtype)
    note_plugins(model.config)
    return VLM(model, tokenizer, processor, keywords, description.architecture, source)


def open_vlm(
    path: str | Path,
    *,
    base: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    engine: str = "native",
    version: str | None = None,
    trust_remote_code: bool = False,
    flag: str = "--model-path",
) -> VLM:
    """Opens any folder: ours of any stage, a released model's, or one that LLaVA or MoE-LLaVA published.

    Args:
        path: folder or hub id.
        base: the language model, where a published folder holds no more than an `mm_projector.bin` and its config; or
            where its tokenizer lies elsewhere.
        device: default: a GPU where there is one.
        dtype: default: what the device computes in well.
        engine: what runs a sparse model's experts, 'native' or 'deepspeed'.
        version: conversation template in place of the one that the folder names.
        trust_remote_code: run the Python code in the folder, for architectures that need it.
        flag: what named the folder, for messages.

    Raises:
        UserError: the folder holds something else, lacks files or weights, or its parts do not belong together.
    """
    where = device_named(device) if device is not None else default_device()
    manifest = read_folder(path, flag, base=base, patterns=model_files(trust_remote_code))
    if base is not None and not manifest.is_published:
        raise UserError(
            f"--model-base {base} belongs to published projectors and adapters, but {flag} {path} is complete by "
            "itself. Leave the flag out."
        )
    vlm = build(describe(manifest, trust_remote_code), dtype or default_dtype(where), f"{flag} {path}")
    if version is not None:
        vlm.settle(version)
    if engine != "native":
        convert_engine(vlm.model, engine)
    vlm.model.to(where)
    return vlm


TOKENS_PER_IMAGE = 576
"""Positions of an image where no model says it: those of CLIP ViT-L/14 at 336 pixels."""


def open_encoder(
    path: str | Path, *, version: str | None = None, tokens_per_image: int | None = None, flag: str
) -> Encoder:
    """What encodes records for a folder, without its weights: as its model reads them, or as a tokenizer alone would.

    Args:
        path: a vision-language model, or a language model or tokenizer that one is to be made of.
        version: conversation template; None: the one that the folder names.
        tokens_per_image: positions of an image, where the folder is no vision-language model; None: 576.
        flag: what named the folder.

    Raises:
        UserError: no tokenizer there, or no template is named.
    """
    folder = resolve_folder(path, flag)
    check_files(folder)
    manifest = read_folder(path, flag) if (folder / CONFIG).is_file() else None
    if manifest is not None and holds_vlm(manifest):
        if tokens_per_image is not None:
            raise UserError(
                f"--tokens-per-image {tokens_per_image}: the model in {flag} {path} says itself how many positions an "
                "image takes. Leave the flag out."
            )
        description = describe(manifest)
        tokenizer, processor = description.inputs()
        if tokenizer is None:
            raise UserError(f"{flag} {path} holds no tokenizer. Copy the files of the language model's into it.")
        if version is not None:
            note(description.config, version=version)
        return encoder_of(tokenizer, processor, description.config, description.architecture)
    if version is None:
        raise UserError(
            f"--version names the template, which {flag} {path} does not: `moellava inspect --tokenizer {path}` alone "
            "says which fit"
        )
    with opening(f"{flag} {path}"):
        tokenizer = load_tokenizer(folder, version)
    if tokens_per_image is None:
        tokens_per_image = TOKENS_PER_IMAGE
        get_logger().info(
            "No vision tower is known here: an image counts as %d positions (--tokens-per-image)", tokens_per_image
        )
    return Encoder(tokenizer, renderer_for(version, tokenizer), CountedImages(tokens_per_image))


def compose(
    llm: str | Path, image_tower: str | Sequence[str], options: Composition, dtype: torch.dtype = torch.float32
) -> VLM:
    """A vision-language model of a language model and a tower, whose projector has learnt nothing yet.

    Args:
        llm, image_tower: folders or hub ids; of several towers, the features are joined.
        options: how they are put together.
        dtype: of all weights.

    Raises:
        UserError: see `describe_parts`.
    """
    names = [image_tower] if isinstance(image_tower, str) else image_tower
    manifest, towers = read_folder(llm, "--model_name_or_path"), [read_folder(name, "--image_tower") for name in names]
    return build(describe_parts(manifest, towers, options), dtype, str(llm))
