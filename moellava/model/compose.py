# SPDX-License-Identifier: Apache-2.0
"""Language model + vision tower + projector -> Hugging Face's LLaVA, with its tokenizer and processor.

`describe_parts` says what is composed of a language model and a tower; `describe_composed`, what a folder holds that a
stage of ours has left, or other code that writes Hugging Face's LLaVA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    GenerationConfig,
    LlavaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from moellava.auto_classes import PREFIX
from moellava.constants import CHAT_TEMPLATE, DEFAULT_VIDEO_TOKEN, TILED
from moellava.data.encoder import image_tokens
from moellava.data.render.jinja import saved_chat_template
from moellava.data.tokenizer_facts import fitting_version
from moellava.data.tokenizers import load_tokenizer, place_image_token
from moellava.errors import UserError
from moellava.model.any_language_model import own_config, own_tensors
from moellava.model.build import build, open_config, read, text_config
from moellava.model.description import Description
from moellava.model.families import Family, registered_family
from moellava.model.integrity import opening
from moellava.model.joined_towers import JoinedTowersConfig
from moellava.model.manifest import Manifest
from moellava.model.origin import made_of
from moellava.model.projectors import ProjectorSpec, parse_projector
from moellava.model.projectors.layers import initial_weights
from moellava.model.section import Section, note, section_of
from moellava.model.shaped import NATIVE, PixtralProcessor, processor_class, shaped_processor
from moellava.model.stored import resized
from moellava.model.tiles import (
    LAYOUTS,
    NEWLINE,
    Layout,
    around,
    layout_of,
    new_newline,
    tiled_config,
    tiling_image_processor,
)
from moellava.model.tower_images import (
    JoinedImageProcessor,
    composed_image_processor,
    joined,
    tower_image_processor,
)
from moellava.model.towers import (
    check_select_layer,
    complete_processor,
    composed_tower,
    projector_sizes,
    select_strategy,
    tower_config,
    tower_tensors,
)
from moellava.model.weights import read_tensors

OLD_BUFFERS = ("rotary_emb.inv_freq", "position_ids", ".masked_bias", ".attn.bias")
"""Endings of tensors that older checkpoints store although they follow from the config."""

VIDEO = (DEFAULT_VIDEO_TOKEN,)
"""The special token that LLaVA-OneVision's processor knows beside `<image>`."""

PROJECTOR_OF = {"gelu": "mlp2x_gelu"}
"""Hugging Face's `projector_hidden_act` -> the projector that its class then has."""


@dataclass(frozen=True)
class Composition:
    """How a language model and a tower are put together.

    Args:
        version: the conversation template that the folder will name.
        image_projector_type: a name by one of the patterns in `PROJECTORS`.
        mm_vision_select_layer: index of the tower's hidden states (-1: the last layer's, before any final norm).
        mm_vision_select_feature: patch, cls_patch to keep the class token, or full to keep all tokens.
        image_aspect_ratio: square; pad to pad images to a square first; anyres to cut them into tiles; anyres_max_N
            with a bound, see `tiles.py`; or native to keep their shape, see `shaped.py`.
        image_grid_pinpoints: grids of tiles, see `parse_pinpoints`; None: those of LLaVA-1.6 or LLaVA-OneVision.
        use_im_start_end: also add tokens that stand before and after an image.
    """

    version: str
    image_projector_type: str = "linear"
    mm_vision_select_layer: int = -1
    mm_vision_select_feature: str = "patch"
    image_aspect_ratio: str = "square"
    image_grid_pinpoints: str | None = None
    use_im_start_end: bool = False


def describe_parts(llm: Manifest, towers: Sequence[Manifest], options: Composition) -> Description:
    """A vision-language model whose projector has learnt nothing yet.

    Args:
        llm: the language model's folder.
        towers: folders of vision models. Of several, the features are joined patch by patch.
        options: how they are put together.

    Raises:
        UserError: a folder of the wrong sort, an unknown name (the known ones are listed), or parts that do not fit.
    """
    projector = parse_projector(options.image_projector_type)
    family = registered_family(llm.config)
    configs = []
    for tower in towers:
        with opening(tower.called):
            configs.append(tower_config(tower.config, tower.called))
    vision = composed_tower(configs, options.mm_vision_select_feature, projector)
    check_select_layer(vision, options.mm_vision_select_layer)
    strategy = select_strategy(vision, options.mm_vision_select_feature)
    with opening(llm.called):
        text = own_config(llm) if family is None else text_config(family, family.text_config(llm.config))
    config: Any = llava_config(vision, text, projector, strategy, options.mm_vision_select_layer)
    if TILED.fullmatch(options.image_aspect_ratio):
        config = tiled_config(config, projector, options.image_aspect_ratio, options.image_grid_pinpoints)
    Section(
        version=options.version,
        family=None if family is None else family.name,
        image_aspect_ratio=options.image_aspect_ratio,
        image_projector_type=options.image_projector_type,
        image_tower=" + ".join(tower.name for tower in towers),
        use_im_start_end=options.use_im_start_end,
        made_of=made_of([llm, *towers]),
    ).put(config)

    def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        drawn = initial_weights(projector, projector_sizes(vision, text.hidden_size, strategy))
        words = own_tensors(llm, config, dtype) if family is None else language_model_tensors(llm, family)
        if layout_of(config).grids:
            words[NEWLINE] = new_newline(config, dtype)
        return words | {
            **vision_tensors(towers, vision, configs, dtype),
            **under("model.multi_modal_projector", drawn),
        }

    with opening(llm.called):
        tokenizer = load_tokenizer(llm.folder, options.version)
    note(config, chat_template=tokenizer.chat_template)
    return describe_new(llm, towers, config, tokenizer, text.vocab_size, tensors)


def vision_tensors(
    towers: Sequence[Manifest], vision: PretrainedConfig, configs: Sequence[PretrainedConfig], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The weights of all towers under the composed model's names.

    Args:
        vision: the composed model's vision config.
        configs: of each tower.
    """
    state: dict[str, torch.Tensor] = {}
    for number, (tower, config) in enumerate(zip(towers, configs, strict=True)):
        inside = f".towers.{number}" if isinstance(vision, JoinedTowersConfig) else ""
        state |= under(f"model.vision_tower{inside}", tower_tensors(tower.folder, config, dtype))
    return state


def version_for(llm: Manifest) -> str:
    """The template of a language model: its family's, or what its tokenizer's probe says. Raises UserError: none."""
    family = registered_family(llm.config)
    return fitting_version(load_tokenizer(llm.folder)) if family is None else family.version


def describe_new(
    source: Manifest,
    towers: Sequence[Manifest],
    config: LlavaConfig,
    tokenizer: PreTrainedTokenizerFast | None,
    rows: int,
    tensors: Callable[[torch.dtype], dict[str, torch.Tensor]],
) -> Description:
    """What is not in Hugging Face's layout yet, with its image tokens placed.

    Args:
        source: the folder of the language model.
        towers: where the image processors lie.
        config: its section gains the ids of the image tokens now, and what is particular to the head with the tensors.
        tokenizer: gains the image tokens; None: there is none.
        rows: of the embedding, below which no image token is placed.
        tensors: gives all of them, under the composed model's names.
    """
    section = section_of(config) or Section()
    layout, token_ids = layout_of(config), [rows]
    if tokenizer is not None:
        token_ids = place_image_token(tokenizer, rows, image_tokens(section.use_im_start_end))
        note(config, image_token_ids=token_ids)
    config.image_token_index = token_ids[0]
    if layout.frames is not None:
        last = [rows + 1] if tokenizer is None else place_image_token(tokenizer, rows + len(token_ids), VIDEO)
        config.video_token_index, token_ids = last[0], token_ids + last

    def load(dtype: torch.dtype) -> Any:
        state = tensors(dtype)
        note(config, head_bias="lm_head.bias" in state)
        model = build(config, state, dtype, source.name)
        grow_embeddings(model, max(token_ids) + 1)
        if tokenizer is not None:
            model.generation_config = generation_config(tokenizer)
        return model

    def inputs() -> tuple[Any, Any]:
        if tokenizer is None:
            return None, None
        vision = config.vision_config
        configs = vision.configs if isinstance(vision, JoinedTowersConfig) else [vision]
        pairs = zip(towers, configs, strict=True)
        image_processor = joined([tower_image_processor(tower.folder, one) for tower, one in pairs])
        return tokenizer, make_processor(image_processor, tokenizer, config)

    return Description(source.folder, config, layout.keywords, inputs, load, streams=False)


def describe_composed(manifest: Manifest) -> Description:
    """A folder in Hugging Face's LLaVA layout, extended or not.

    Raises:
        UserError: another class, a projector that none of our names describes, or no tokenizer or processor.
    """
    model_type = str(manifest.config.get("model_type", "")).removeprefix(PREFIX)
    if model_type not in LAYOUTS:
        raise UserError(f"{manifest.folder} is a {model_type!r} model, which no stage of ours writes.")
    config = open_config(manifest.folder, manifest.config)
    layout = layout_of(config)
    if manifest.section is None:
        adopted(config, manifest).put(config)

    def inputs() -> tuple[Any, Any]:
        section = section_of(config)
        tokenizer = load_tokenizer(manifest.folder, section.version if section else None)
        if section is not None and section.chat_template and section.version != CHAT_TEMPLATE:
            tokenizer.chat_template = section.chat_template  # the file beside it is the stage's own template
        try:
            processor = open_processor(manifest.folder, tokenizer, layout)
        except OSError as error:
            raise UserError(
                f"{manifest.called} holds no processor: copy processor_config.json (of older folders, "
                "preprocessor_config.json) from where the model comes from."
            ) from error
        complete_processor(processor, config)
        return tokenizer, processor

    def load(dtype: torch.dtype) -> Any:
        return read(manifest.folder, config, dtype)

    return Description(manifest.folder, config, layout.keywords, inputs, load)


def open_processor(folder: Path, tokenizer: Any, layout: Layout) -> Any:
    """The processor of a folder, around a tokenizer that is open: its `from_pretrained` would open another one first,
    which takes longer than all the rest."""
    settings, _ = layout.processor.get_processor_dict(folder)
    named = processor_class() if settings.get("processor_class") == PixtralProcessor.__name__ else layout.processor
    own = (settings.get("image_processor") or {}).get("image_processor_type")
    cls: Any = JoinedImageProcessor if own == JoinedImageProcessor.__name__ else AutoImageProcessor
    image_processor = cls.from_pretrained(folder, trust_remote_code=False)
    parts = around(layout, image_processor, tokenizer, settings.get("video_processor"))
    return named.from_args_and_dict(parts, settings)


def adopted(config: PretrainedConfig, manifest: Manifest) -> Section:
    """The section of a folder that other code composed: what its config implies, and the template that fits.

    Raises:
        UserError: a projector that none of our names describes.
    """
    if config.projector_hidden_act not in PROJECTOR_OF:
        known = ", ".join(PROJECTOR_OF)
        raise UserError(f"Its projector's activation is {config.projector_hidden_act!r}. Known: {known}")
    family = registered_family(config.text_config.to_dict())
    return Section(
        version=family.version if family is not None else fitting_version(load_tokenizer(manifest.folder)),
        family=None if family is None else family.name,
        image_projector_type=PROJECTOR_OF[config.projector_hidden_act],
        image_tower=config.vision_config.name_or_path or None,
    )


def llava_config(
    vision: PretrainedConfig,
    text: PretrainedConfig,
    projector: ProjectorSpec,
    strategy: str,
    select_layer: int,
) -> LlavaConfig:
    """Hugging Face's config of a composed model, from its parts and from how features are taken out of the tower.

    Its image token is placed later, by `describe_new`. Raises UserError where the projector does not fit the parts.
    """
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=text.vocab_size - 1,
        image_seq_length=projector.tokens(projector_sizes(vision, text.hidden_size, strategy)),
        projector_hidden_act=projector.activation,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=select_layer,
    )


def language_model_tensors(llm: Manifest, family: Family) -> dict[str, torch.Tensor]:
    """A base checkpoint's tensors under the composed model's names."""
    state: dict[str, torch.Tensor] = {}
    for key, tensor in read_tensors(llm.folder).items():
        if not key.endswith(OLD_BUFFERS):
            state |= {composed_name(name): value for name, value in family.to_ours(key, tensor, llm.config).items()}
    if "model.language_model.embed_tokens.weight" not in state:
        raise UserError(
            f"{llm.called} has no embeddings under the names of the family {family.name!r}: "
            f"it holds {', '.join(list(state)[:3])} …"
        )
    return state


def under(part: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A part's tensors by their names in the composed model."""
    return {f"{part}.{name}": tensor for name, tensor in tensors.items()}


def composed_name(name: str) -> str:
    """A causal language model's tensor name -> the composed model's (`model.norm.weight` gets `language_model.`)."""
    return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


def grow_embeddings(model: Any, rows: int) -> None:
    """Adds rows to the embedding and the head, each the mean of the old ones; the old rows stay as they are.

    Args:
        rows: how many are needed. Fewer than there are change nothing.
    """
    old = model.get_input_embeddings().weight.shape[0]
    if rows <= old:
        return
    with resized(model):
        model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
            for tensor in (module.weight, getattr(module, "bias", None)):
                if tensor is not None:
                    tensor[old:] = tensor[:old].mean(dim=0)


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Greedy decoding that ends at the tokenizer's end token."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )


def make_processor(
    image_processor: BaseImageProcessor, tokenizer: PreTrainedTokenizerFast, config: PretrainedConfig
) -> Any:
    """The processor of the composed class, which makes of images and prompts just what training reads.

    Args:
        image_processor: the tower's own, or that of a composed model.
        config: the composed model's; its section names the template and the aspect ratio.
    """
    section = section_of(config) or Section()
    vision, strategy = config.vision_config, config.vision_feature_select_strategy
    projector = parse_projector(section.image_projector_type or "mlp2x_gelu")
    sizes = projector_sizes(vision, config.text_config.hidden_size, strategy)
    layout, template = layout_of(config), saved_chat_template(section.version, tokenizer)
    if section.image_aspect_ratio == NATIVE:
        return shaped_processor(image_processor, tokenizer, config, template)
    if layout.images is not None:
        images: Any = tiling_image_processor(image_processor, config)
    else:
        images = composed_image_processor(image_processor, section.image_aspect_ratio)
    return layout.processor(
        *around(layout, images, tokenizer, None),
        **layout.counted(config, projector.tokens(sizes)),
        chat_template=template,
    )
