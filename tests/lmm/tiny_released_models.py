"""Every class of transformers for images and text as a tiny released model: the few fields that make it so, as data.

A model is its class's default config with small sizes, by the names that configs have for them, and a processor built
of its parts over a tokenizer that is trained here.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES as EXTRACTORS
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as IMAGE_PROCESSORS
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES as PROCESSORS

from moellava.lmm.processors import VIDEO, build_without_torchvision
from moellava.lmm.video_processors import UNKNOWN
from tests.model.tiny_language_models import COMMON as TEXT
from tests.model.tiny_language_models import OVERRIDES as TEXT_OVERRIDES

EOS = "<|endoftext|>"

SIDE, PATCH = 28, 14
"""Height and width of an image and of a patch, in pixels."""

VISION: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "hidden_dim", "width", "dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "n_layers", "layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads", "heads", "n_heads"), 2),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("intermediate_size", "mlp_dim", "ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "text_hidden_size", "output_dim", "vision_output_dim"), 32),
    **dict.fromkeys(("image_size", "img_size", "input_size"), SIDE),
    "patch_size": PATCH,
    "num_position_embeddings": 16,
    "head_dim": 16,
}
"""Sizes of a vision config."""

LARGEST = 10_000_000
"""Parameters of a model that is tiny."""

OVERRIDES: dict[str, dict[str, Any]] = {}
"""`model_type` -> fields of its config beside those; of a config inside it, by its name."""

TOKENS = {
    name: f"<{name}>"
    for name in (
        *("image_token", "video_token", "audio_token", "boi_token", "eoi_token", "boa_token", "eoa_token"),
        *("image_start_token", "image_end_token", "video_start_token", "video_end_token", "image_break_token"),
        *("vision_start_token", "vision_end_token", "start_image_token", "end_image_token", "context_image_token"),
        *("slice_start_token", "slice_end_token", "image_id_start_token", "image_id_end_token", "image_wrapper_token"),
        *("image_boundary_token", "eof_token", "img_line_break_token"),
    )
}
"""What processors ask their tokenizer for."""

MARKS = (
    "<image> <video> <img> </img> <imgpad> <|imgpad|> <|im_start|> <|im_end|> <|image_pad|> <|video_pad|> "
    "<|vision_start|> <|vision_end|> <|IMAGE_PAD|> <|VIDEO_PAD|> <|VISION_START|> <|VISION_END|> <|START_OF_IMG|> "
    "<|END_OF_IMG|> <|IMG_LINE_BREAK|> <|IMG_PATCH|> <|image|> <|video|> <|begin_of_image|> <|end_of_image|> "
    "<|begin_of_video|> <|end_of_video|> <fake_token_around_image> <global-img> <end_of_utterance> <row_1_col_1> "
    "<IMG_ATOM> <IMG_START> <IMG_END> <IMG_GRID> <IMG_COL> <IMG_ROW> <|image_start|> <|image_end|> <|img_thumbnail|> "
    "<|patch|> <|media_pad|> <eoss> <racm3:break> <|python_tag|> <|extra_201|> <TILE_GLOBAL> <im_patch> <im_start> "
    "<im_end> <patch_newline>"
)
"""Further special tokens, which processors know by their spelling."""


def released_models() -> list[str]:
    """The `model_type` of every class for images and text of the installed transformers."""
    return list(CLASSES)


def write_tokenizer(folder: Path) -> Path:
    """A byte-level BPE tokenizer that has all of these tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", EOS, "<unk>", *dict.fromkeys((*TOKENS.values(), *MARKS.split()))]
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + 16,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
    )
    backend.train_from_iterator(["user: what colour is the shape in the image? assistant: it is a red circle"], trainer)
    named = {"bos_token": "<s>", "eos_token": EOS, "pad_token": "<pad>", "unk_token": "<unk>"}
    hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, **named, extra_special_tokens=TOKENS, model_max_length=4096
    ).save_pretrained(folder)
    return folder


def chat_template(processor: Any) -> str:
    """One that ends turns with the end-of-sequence token and writes the processor's own placeholders."""
    shown = f"{{%- if part.type == 'image' %}}{{{{ {processor.image_token!r} }}}}"
    if getattr(processor, "video_token", None):
        shown += f"{{%- elif part.type == 'video' %}}{{{{ {processor.video_token!r} }}}}"
    return (
        "{%- for message in messages %}{{ message.role + ': ' }}{%- for part in message.content %}"
        + shown
        + "{%- else %}{{ part.text }}{%- endif %}{%- endfor %}{{ EOS }}{%- endfor %}".replace("EOS", repr(EOS))
        + "{%- if add_generation_prompt %}{{ 'assistant: ' }}{%- endif %}"
    )


def tiny_config(model_type: str, tokenizer: Any) -> Any:
    """A tiny config of the class."""
    config_class = hf.CONFIG_MAPPING[model_type]
    raw = config_class().to_dict()
    shrink(raw, "", len(tokenizer))
    own = OVERRIDES.get(model_type, {})
    update(raw, own)
    for name in raw:
        stem = name.removesuffix("_id").removesuffix("_index")
        if stem in TOKENS and name != stem:
            raw[name] = tokenizer.convert_tokens_to_ids(TOKENS[stem])
    return config_class.from_dict(raw)


def update(raw: dict[str, Any], own: dict[str, Any]) -> None:
    """Takes fields over, those of inner configs one by one."""
    for name, value in own.items():
        if isinstance(value, dict) and isinstance(raw.get(name), dict):
            update(raw[name], value)
        else:
            raw[name] = value


def shrink(raw: dict[str, Any], name: str, rows: int) -> None:
    """Gives a config as a dict small sizes, and those inside it."""
    is_vision = any(word in name for word in ("vision", "visual", "vit", "image"))
    sizes = VISION if is_vision else TEXT
    for field, value in sizes.items():
        if field in raw and not isinstance(raw[field], (list, dict)):
            raw[field] = value
    if "vocab_size" in raw and not is_vision:
        raw["vocab_size"] = rows
    own = TEXT_OVERRIDES.get(raw.get("model_type", ""), {})
    update(raw, {field: value for field, value in own.items() if field in raw})
    layers = raw.get("num_hidden_layers")
    if isinstance(layers, int) and isinstance(raw.get("layer_types"), list):
        raw["layer_types"] = raw["layer_types"][:layers] if len(raw["layer_types"]) >= layers else None
    for field, value in raw.items():
        if isinstance(value, dict) and field.endswith("config"):
            shrink(value, field, rows)


def tiny_processor(model_type: str, tokenizer: Any) -> Any:
    """A processor of the class, of parts."""
    name = PROCESSORS.get(model_type) or PROCESSOR_OF[model_type]
    cls = getattr(hf, name)
    known = inspect.signature(cls.__init__).parameters
    parts: dict[str, Any] = {"tokenizer": tokenizer}
    if "image_processor" in known:
        parts["image_processor"] = image_processor(model_type)
    if "feature_extractor" in known:
        parts["feature_extractor"] = getattr(hf, EXTRACTORS[model_type])()
    parts |= PROCESSOR_OPTIONS.get(model_type, {})
    if VIDEO in known:
        processor = build_without_torchvision(cls, UNKNOWN, video_settings={}, **parts)
    else:
        processor = cls(**parts)
    processor.chat_template = chat_template(processor)
    return processor


PROCESSOR_OF: dict[str, str] = {}
"""`model_type` -> its processor's class, where transformers' table has none."""

PROCESSOR_OPTIONS: dict[str, dict[str, Any]] = {}
"""`model_type` -> further arguments of its processor."""

IMAGE_OPTIONS: dict[str, dict[str, Any]] = {}
"""`model_type` -> further arguments of its image processor."""


def image_processor(model_type: str) -> Any:
    """Its image processor for Pillow, in small sizes. Raises ImportError where there is none."""
    names = IMAGE_PROCESSORS.get(model_type) or {}
    if "pil" not in names:
        raise ImportError(f"{names.get('torchvision')} needs torchvision")
    cls = getattr(hf, names["pil"])
    default = cls()
    options: dict[str, Any] = {}
    size, crop = getattr(default, "size", None), getattr(default, "crop_size", None)
    if size is not None:
        options["size"] = small(dict(size), crop is not None)
    if crop is not None:
        options["crop_size"] = {"height": SIDE, "width": SIDE}
    if isinstance(getattr(default, "patch_size", None), int):
        options["patch_size"] = PATCH
    if getattr(default, "max_image_size", None) is not None:
        options["max_image_size"] = {"longest_edge": SIDE}
    return cls(**options | IMAGE_OPTIONS.get(model_type, {}))


def small(size: dict[str, int], is_cropped: bool) -> dict[str, int]:
    """A size of an image processor, made small."""
    size = {name: value for name, value in size.items() if value is not None}
    if set(size) == {"shortest_edge", "longest_edge"}:
        return {"shortest_edge": SIDE * SIDE, "longest_edge": 4 * SIDE * SIDE}  # areas
    return dict.fromkeys(size, 2 * SIDE if set(size) == {"longest_edge"} else SIDE)


def tiny_released_model(model_type: str, tokenizer: Any) -> torch.nn.Module:
    """A random one, every parameter moved, so that norms and biases are not all ones and zeros."""
    torch.manual_seed(1)
    config, cls = tiny_config(model_type, tokenizer), getattr(hf, CLASSES[model_type])
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"its default config has sizes that are not made small here: {size / 1e6:.0f}M parameters")
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model
