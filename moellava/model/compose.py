"""Language model + vision tower + projector -> Hugging Face's LLaVA, with its tokenizer and processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BaseImageProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from moellava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from moellava.data.render.jinja import saved_chat_template
from moellava.data.tokenizers import load_tokenizer, place_image_token
from moellava.errors import UserError
from moellava.files import read_config, resolve_folder
from moellava.model.families import Family, base_family
from moellava.model.loading import build, text_config
from moellava.model.projector import ProjectorKind, initial_weights, parse_projector
from moellava.model.towers import (
    TOWERS,
    check_select_layer,
    composed_image_processor,
    load_tower,
    select_strategy,
    tower_tokens,
)
from moellava.model.weights import read_tensors

FORMAT = 1
"""Version of the `moellava` section of a composed model's config.json."""

OLD_BUFFERS = ("rotary_emb.inv_freq", "position_ids", ".masked_bias", ".attn.bias")
"""Endings of tensors that older checkpoints store although they follow from the config."""


@dataclass
class Composed:
    """A composed model and what makes its inputs."""

    model: Any
    tokenizer: PreTrainedTokenizerFast
    processor: LlavaProcessor


def compose(
    model_name_or_path: str,
    image_tower: str,
    *,
    version: str,
    image_projector_type: str = "linear",
    mm_vision_select_layer: int = -1,
    mm_vision_select_feature: str = "patch",
    image_aspect_ratio: str = "square",
    use_im_start_end: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Composed:
    """Builds a vision-language model whose projector has learnt nothing yet.

    Args:
        model_name_or_path: the language model, a folder or a hub id.
        image_tower: CLIP or SigLIP, a folder or a hub id.
        version: the conversation template that its folder will name.
        image_projector_type: linear, identity or mlpNx_gelu.
        mm_vision_select_layer: index of the tower's hidden states (-1: the last layer's, before any final norm).
        mm_vision_select_feature: patch, or cls_patch to keep the class token.
        image_aspect_ratio: square, or pad to pad images to a square first.
        use_im_start_end: also add tokens that stand before and after an image.
        dtype: of all weights.

    Raises:
        UserError: a folder of the wrong kind, an unknown name (the known ones are listed), or parts that do not fit.
    """
    kind = parse_projector(image_projector_type)
    folder = resolve_folder(model_name_or_path, "--model_name_or_path")
    raw = read_config(folder, "--model_name_or_path")
    family = base_family(raw)
    tower = load_tower(image_tower, dtype)
    vision = tower.model.config
    check_select_layer(vision, mm_vision_select_layer)
    strategy = select_strategy(vision, mm_vision_select_feature)

    state = language_model_tensors(folder, family, raw)
    tokenizer = load_tokenizer(str(folder), version)
    rows = state["model.language_model.embed_tokens.weight"].shape[0]
    token_ids = place_image_token(tokenizer, rows, image_tokens(use_im_start_end))

    text = text_config(family, family.text_config(raw))
    config = llava_config(vision, text, kind, strategy, mm_vision_select_layer, token_ids[0])
    config.moellava = section(
        family,
        version=version,
        image_aspect_ratio=image_aspect_ratio,
        image_projector_type=image_projector_type,
        image_tower=str(image_tower),
        use_im_start_end=use_im_start_end,
        image_token_ids=token_ids,
        head_bias="lm_head.bias" in state,
    )
    projector = initial_weights(kind, vision.hidden_size, text.hidden_size)
    state |= {f"model.vision_tower.{name}": tensor for name, tensor in tower.model.state_dict().items()}
    state |= {f"model.multi_modal_projector.{name}": tensor for name, tensor in projector.items()}
    model = build(config, state, dtype, str(model_name_or_path))
    grow_embeddings(model, max(token_ids) + 1)
    model.generation_config = generation_config(tokenizer)
    return Composed(model, tokenizer, make_processor(tower.image_processor, tokenizer, config))


def llava_config(
    vision: PretrainedConfig,
    text: PretrainedConfig,
    projector: ProjectorKind,
    strategy: str,
    select_layer: int,
    image_token: int,
) -> LlavaConfig:
    """Hugging Face's config of a composed model, from its parts and from how features are taken out of the tower."""
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=tower_tokens(vision, strategy),
        projector_hidden_act=projector.activation,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=select_layer,
    )


def section(
    family: Family,
    *,
    image_aspect_ratio: str,
    image_projector_type: str,
    image_tower: str | None,
    version: str | None = None,
    use_im_start_end: bool = False,
    image_token_ids: list[int] | None = None,
    head_bias: bool = False,
) -> dict[str, Any]:
    """The `moellava` section of a composed model's config: what Hugging Face's config has no word for.

    Args:
        version: the conversation template; default: the family's.
        image_token_ids: ids of `<image>` and, if they are used, `<im_start>` and `<im_end>`.
        head_bias: whether the language-model head has a bias.
    """
    return {
        "format": FORMAT,
        "family": family.name,
        "version": version or family.version,
        "stage": None,
        "image_aspect_ratio": image_aspect_ratio,
        "image_projector_type": image_projector_type,
        "image_tower": image_tower,
        "use_im_start_end": use_im_start_end,
        "image_token_ids": image_token_ids,
        "head_bias": head_bias,
    }


def image_tokens(use_im_start_end: bool) -> tuple[str, ...]:
    """The special tokens that a composed model adds to its tokenizer."""
    return (DEFAULT_IMAGE_TOKEN, *((DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN) if use_im_start_end else ()))


def language_model_tensors(folder: Path, family: Family, raw: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A base checkpoint's tensors under the composed model's names."""
    state: dict[str, torch.Tensor] = {}
    for key, tensor in read_tensors(folder).items():
        if not key.endswith(OLD_BUFFERS):
            state |= {composed_name(name): value for name, value in family.to_ours(key, tensor, raw).items()}
    if "model.language_model.embed_tokens.weight" not in state:
        raise UserError(
            f"--model_name_or_path {folder} has no embeddings under the names of the family {family.name!r}: "
            f"it holds {', '.join(list(state)[:3])} …"
        )
    return state


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
) -> LlavaProcessor:
    """Hugging Face's LLaVA processor, which makes of images and prompts just what our own preprocessing does.

    Args:
        image_processor: the tower's own, or that of a composed model.
        config: the composed model's; its `moellava` section names the template and the aspect ratio.
    """
    return LlavaProcessor(
        image_processor=composed_image_processor(
            image_processor, config.moellava["image_aspect_ratio"], config.vision_config
        ),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=TOWERS[config.vision_config.model_type].class_tokens,
        chat_template=saved_chat_template(config.moellava["version"], tokenizer),
    )
