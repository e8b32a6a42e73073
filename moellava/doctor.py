# SPDX-License-Identifier: Apache-2.0
"""What can be done with a model folder, found out before anything trains: parts, template, media, adapters, experts.

No weights are read. The class runs on paper (`moellava.model.vision_probes.on_paper`), its processor on blank images,
and a random copy of its decoder's MLPs as experts would run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

from moellava.adapters.lora import target_names, vision_target_names
from moellava.convert.export.export_folder import written_as
from moellava.data.encoder import Encoder
from moellava.data.masking import engine_for
from moellava.data.media_reader import blank
from moellava.data.tokenizer_facts import PROBE, is_plain, mask_problem
from moellava.data.video import USUAL_FPS, Clip
from moellava.errors import UserError
from moellava.model.build import on_meta
from moellava.model.description import Description
from moellava.model.extended import extension_of
from moellava.model.integrity import opening
from moellava.model.manifest import Manifest
from moellava.model.vision_probes import on_paper
from moellava.moe.decoder import at_hand, decoder_layers, mlp_names
from moellava.moe.mlp import check_slices
from moellava.vlm import VLM, describe, encoder_of

SIZES = ((224, 224), (640, 480), (1024, 1024))
"""Width and height in pixels of the images whose tokens are told."""

FRAMES = 8
"""Of the video whose tokens are told, in the middle one of these sizes."""

RECIPES = {"copies": 1, "slices": 2}
"""Ways to make experts of an MLP -> into how many it is cut."""

EXACT = "exact"

Found = TypeVar("Found")


@dataclass
class Diagnosis:
    """What was found out about a folder.

    Attributes:
        called: how the folder was named.
        model: the class that opens it.
        model_type: of its config.json.
        architecture: the registered one, 'composed', or the `model_type`.
        by_probes: whether probes have found its parts.
        parts: part -> its parameters; empty where they cannot be told apart.
        covered: whether every parameter is in exactly one part.
        version: the template.
        masks: whether its answers can be told apart, each to its end.
        ending: what ends an answer.
        ends: whether that is a special token, so that a model learns to stop.
        images: size in pixels -> tokens of an image.
        videos: tokens of `FRAMES` frames; None where a video is shown as its frames, as images.
        lora: part -> names of the linears that take an adapter, without where they stand, and how many there are.
        upcycles: 'copies' and 'slices' -> 'exact', or why not.
        plain: whether plain transformers opens it.
        plain_reason: why not.
        exports: what `moellava export` writes it as, or why it does not.
        problems: why it cannot be trained; empty where it can.
    """

    called: str = ""
    model: str = ""
    model_type: str = ""
    architecture: str = ""
    by_probes: bool = False
    parts: dict[str, int] = field(default_factory=dict)
    covered: bool = False
    version: str = ""
    masks: bool = False
    ending: str = ""
    ends: bool = False
    images: dict[str, int] = field(default_factory=dict)
    videos: int | None = None
    lora: dict[str, dict[str, int]] = field(default_factory=dict)
    upcycles: dict[str, str] = field(default_factory=dict)
    plain: bool = False
    plain_reason: str = ""
    exports: str = ""
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """All of it as one JSON object."""
        return json.dumps(asdict(self) | {"trains": not self.problems}, ensure_ascii=False, indent=1)

    def tried(self, make: Callable[[], Found]) -> Found | None:
        """What a function gives; None where it refuses, and the reason among the problems."""
        try:
            with opening(self.called):
                return make()
        except UserError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return None


def diagnose(manifest: Manifest) -> Diagnosis:
    """What can be done with a vision-language model's folder.

    Args:
        manifest: of the folder: released, composed, or published by LLaVA.
    """
    found = Diagnosis(called=manifest.called, model_type=str(manifest.config.get("model_type")))
    found.tried(manifest.require_start)
    description = found.tried(lambda: describe(manifest))
    if description is None:
        return found
    config, architecture = description.config, description.architecture
    found.architecture = "composed" if architecture is None else architecture.name
    found.by_probes = architecture is not None and architecture.keywords is None
    _open_elsewhere(found, manifest, config)
    made = found.tried(description.inputs)
    keywords = found.tried(lambda: description.keywords)
    if made is not None:
        _read(found, description, *made)
    model = None if keywords is None else found.tried(lambda: on_paper(config))
    if model is not None and keywords is not None:
        found.model = type(model).__name__
        _take_apart(found, VLM(model, None, None, keywords, architecture, manifest.called))
    _upcycle(found, config)
    try:
        found.exports = written_as(description, manifest.called)
    except UserError as error:
        found.exports = str(error)
    return found


def _open_elsewhere(found: Diagnosis, manifest: Manifest, config: Any) -> None:
    """Whether plain transformers opens the folder."""
    reasons = ["its files are laid out as LLaVA's code wants them"] if manifest.is_published else []
    reasons += extension_of(config).reasons
    found.plain, found.plain_reason = not reasons, "; ".join(reasons)


def _read(found: Diagnosis, description: Description, tokenizer: Any, processor: Any) -> None:
    """Template and media."""
    if tokenizer is None:
        found.problems.append(
            f"{description.folder} holds no tokenizer: copy the files of its language model's into it."
        )
        return
    config, architecture = description.config, description.architecture
    encoder = found.tried(lambda: encoder_of(tokenizer, processor, config, architecture))
    if encoder is None:
        return
    found.version = encoder.version
    found.tried(lambda: _mask(found, encoder))
    reader = encoder.reader
    if not reader.needs_sizes:
        found.images = {"any size": reader.run_length(SIZES[0], 1)}
    else:
        lengths = {size: found.tried(partial(reader.run_length, size, 1)) for size in SIZES}
        found.images = {f"{size[0]}x{size[1]}": length for size, length in lengths.items() if length is not None}
    if not encoder.in_frames:
        found.videos = found.tried(lambda: reader.clip_length(Clip(SIZES[1], FRAMES, USUAL_FPS, tuple(range(FRAMES)))))


def _mask(found: Diagnosis, encoder: Encoder) -> None:
    """Whether answers train from their first token to what ends them. Raises UserError: they cannot be told apart."""
    tokenizer, renderer = encoder.tokenizer, encoder.renderer
    said = PROBE[:2] if is_plain(renderer) else PROBE
    record = {"conversations": said, "image": [blank("image")]}
    found.ending = renderer.terminator
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    found.ends = any(token in found.ending for token in special)
    for answer, _ in encoder.examples(record, "the probe"):
        pieces = encoder.pieces(record, "the probe", answer=answer)
        encoded = engine_for(tokenizer).encode(pieces, encoder.places_media(record), encoder.image_ids)
        problem = mask_problem(tokenizer, pieces, encoded)
        if problem:
            raise UserError(f"--version {encoder.version}: {problem}.")
    found.masks = True


def _take_apart(found: Diagnosis, vlm: VLM) -> None:
    """Parts and their linears."""
    parts = found.tried(lambda: vlm.parts)
    if parts is None:
        return
    held = {part: {id(one): one.numel() for one in modules.parameters()} for part, modules in parts.items()}
    tied = held["lm_head"].keys() & held["language_model"].keys()
    found.parts = {part: sum(sizes.values()) for part, sizes in held.items()}
    found.parts["lm_head"] -= sum(held["lm_head"][one] for one in tied)
    every = {id(one) for one in vlm.model.parameters()}
    placed = [one for part, sizes in held.items() for one in sizes if part != "lm_head" or one not in tied]
    found.covered = sorted(placed) == sorted(every)
    linears = {"language_model": target_names(vlm, only_experts=False), "vision_tower": vision_target_names(vlm)}
    found.lora = {part: dict(Counter(name.rpartition(".")[2] for name in names)) for part, names in linears.items()}


def _upcycle(found: Diagnosis, config: Any) -> None:
    """Whether experts that are copies, and experts that are slices, start as the dense model."""
    if getattr(config, "moe", None):
        found.upcycles = dict.fromkeys(RECIPES, "sparse already")
        return
    model = found.tried(lambda: on_meta(config))
    if model is None:
        return
    for name, slices in RECIPES.items():
        try:
            layers = decoder_layers(model)
            mlps = [getattr(layers[index], mlp) for index, mlp in mlp_names(model, range(len(layers))).items()]
            for mlp in {_shape(mlp): mlp for mlp in mlps}.values() if slices > 1 else ():
                check_slices(at_hand(mlp), slices)
            found.upcycles[name] = EXACT
        except UserError as error:
            found.upcycles[name] = str(error)


def _shape(module: Any) -> tuple[Any, ...]:
    """What modules that are cut in the same way have in common."""
    return type(module), *(parameter.shape for parameter in module.parameters())
