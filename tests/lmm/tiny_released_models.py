# SPDX-License-Identifier: Apache-2.0
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
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES as VIDEO_PROCESSORS
from transformers.utils.import_utils import is_torchvision_available

from moellava.data.frame_processors import UNKNOWN
from moellava.data.media_reader import placeholder_of
from moellava.errors import UserError
from moellava.lmm.architecture import ARCHITECTURES
from moellava.lmm.processors import VIDEO, build_without_torchvision
from moellava.model.shaped import PixtralProcessor, processor_class
from tests.lmm.tiny import NATIVE, TINY
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

TILES = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
SQUARE = {"height": SIDE, "width": SIDE}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}}
DAVIT = {"depths": [1] * 4, "embed_dim": [32] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4}

GEMMA4_VISION = {"model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
GEMMA4_VISION |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "patch_size": PATCH}

OVERRIDES: dict[str, dict[str, Any]] = {
    "aya_vision": {"downsample_factor": 2, "vision_feature_layer": -1},
    "chameleon": {"vocabulary_map": {"<image>": 4} | {f"IMGIMG{'A' * n}Z": 10 + n for n in range(1, 9)}}
    | {"vq_config": {"base_channels": 32, "resolution": SIDE, "num_embeddings": 8, "embed_dim": 32}},
    **dict.fromkeys(("cosmos3_edge", "glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl"), {"text_config": MROPE}),
    "glm4v_moe": {"text_config": MROPE | {"head_dim": 16}},
    "hunyuan_vl": {"text_config": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 1, 1]}}},
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "qk_rope_head_dim": 0}},
    "got_ocr2": {"vision_config": {"image_size": 1024, "patch_size": 16, "global_attn_indexes": []}},
    "ernie4_5_vl_moe": {
        "text_config": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}, "moe_intermediate_size": [24, 24]}
    },
    "deepseek_ocr2": {"vision_config": {"sam_config": {"downsample_channels": [32, 32], "global_attn_indexes": [1]}}}
    | {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_key_value_heads": 4, "moe_intermediate_size": 24}},
    "deepseek_vl_hybrid": {"high_res_vision_config": {"image_size": 1024, "patch_size": 16, "global_attn_indexes": []}},
    "diffusion_gemma": {"text_config": {"top_k_experts": 2, "vocab_size_per_layer_input": 512}},
    "dots3_note": {"text_config": {"head_dim": 16, "swa_head_dim": 16}},
    "emu3": {
        "vocabulary_map": {"<|extra_200|>": 5, "<image>": 4} | {f"<|visual token {n:06}|>": 10 + n for n in range(8)}
    }
    | {"vq_config": {"base_channels": 32, "codebook_size": 8, "embed_dim": 4, "z_channels": 4}},
    "gemma4": {"text_config": {"vocab_size_per_layer_input": 512}, "vision_config": GEMMA4_VISION},
    "llama4": {"vision_config": {"projector_input_dim": 32, "projector_output_dim": 32} | {"intermediate_size": 128}},
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 4}},
    "florence2": {"vision_config": DAVIT | {"projection_dim": 32}},
    "gemma3n": {"text_config": {"intermediate_size": [48, 48], "activation_sparsity_pattern": [0.0, 0.0]}},
    "granite4_vision": TILES
    | {"vision_config": {"hidden_size": 64}}
    | {"downsample_rate": "1/2", "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1, 2, 3, 4]}
    | {"text_config": {"num_hidden_layers": 6}},
    "granite_docling": {"vision_config": {"image_size": 56, "deepstack_visual_indexes": [0]}},
    "idefics3": {"scale_factor": 2},
    "janus": {"vq_config": {"base_channels": 32, "num_embeddings": 8, "embed_dim": 8, "projection_dim": 32}},
    "minicpmv4_6": {"insert_layer_id": 0},
    "minicpmv4_7": {"insert_layer_id": 0},
    "ovis2": {"vision_config": {"vocab_size": 32, "num_visual_indicator_tokens": 5, "hidden_stride": 1}},
    "qianfan_ocr": {"downsample_ratio": 0.5},
    "vipllava": {"vision_feature_layers": [-2, -1]},
}
"""`model_type` -> fields of its config beside those; of a config inside it, by its name."""

TOKENS = {
    name: f"<{name}>"
    for name in (
        *("image_token", "video_token", "audio_token", "boi_token", "eoi_token", "boa_token", "eoa_token"),
        *("image_start_token", "image_end_token", "video_start_token", "video_end_token", "image_break_token"),
        *("vision_start_token", "vision_end_token", "start_image_token", "end_image_token", "context_image_token"),
        *("slice_start_token", "slice_end_token", "image_id_start_token", "image_id_end_token", "image_wrapper_token"),
        *("image_boundary_token", "eof_token", "img_line_break_token"),
        *("vision_bos_token", "vision_eos_token", "audio_bos_token", "audio_eos_token"),
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
    "<im_end> <patch_newline> |SPEAKER| |NEWLINE| [IMG] [IMG_BREAK] [IMG_END]"
)
"""Further special tokens, which processors know by their spelling."""


def needs_torchvision(model_type: str) -> bool:
    """Whether there is no processor of the class without torchvision."""
    return set(IMAGE_PROCESSORS.get(model_type) or ()) == {"torchvision"}


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


WRAPPED = ("HunYuanVLProcessor",)
"""Processors that want tokens around an image's placeholder, which their templates write."""


def chat_template(processor: Any) -> str:
    """One that ends turns with the end-of-sequence token and writes the processor's own placeholders."""
    placeholder = placeholder_of(processor)
    if type(processor).__name__ in WRAPPED:
        placeholder = processor.image_start_token + placeholder + processor.image_end_token
    shown = f"{{%- if part.type == 'image' %}}{{{{ {placeholder!r} }}}}"
    if getattr(processor, "video_token", None):
        shown += f"{{%- elif part.type == 'video' %}}{{{{ {processor.video_token!r} }}}}"
    return (
        "{%- for message in messages %}{{ message.role + ': ' }}{%- for part in message.content %}"
        + shown
        + "{%- else %}{{ part.text }}{%- endif %}{%- endfor %}{{ EOS }}{%- endfor %}".replace("EOS", repr(EOS))
        + "{%- if add_generation_prompt %}{{ 'assistant: ' }}{%- endif %}"
    )


def tiny_config(model_type: str, processor: Any) -> Any:
    """A tiny config of the class, whose tokens are those of a processor."""
    config_class, tokenizer = hf.CONFIG_MAPPING[model_type], processor.tokenizer
    if model_type in REGISTERED:
        row = REGISTERED[model_type]
        ids = {name: tokenizer.convert_tokens_to_ids(getattr(tokenizer, token)) for token, name in row.fields.items()}
        return row.tiny_config(len(tokenizer), **ids)
    raw = config_class().to_dict()
    shrink(raw, "", len(tokenizer))
    update(raw, OVERRIDES.get(model_type, {}))
    for name, text in TOKEN_OF.get(model_type, {}).items():
        raw[name] = tokenizer.convert_tokens_to_ids(text)
    for name in raw.keys() - TOKEN_OF.get(model_type, {}).keys():
        stem = name.removesuffix("_id").removesuffix("_index")
        if stem in TOKENS and name != stem:
            shown = getattr(processor, f"{stem}_id", None) or getattr(tokenizer, f"{stem}_id", None)
            raw[name] = shown or tokenizer.convert_tokens_to_ids(TOKENS[stem])
    return config_class.from_dict(raw)


TOKEN_OF: dict[str, dict[str, Any]] = {
    "ovis2": {
        "image_token_id": "<IMG_ATOM>",
        "visual_indicator_token_ids": ["<IMG_START>", "<IMG_END>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>"],
    },
    "got_ocr2": {"image_token_id": "<imgpad>"},
}
"""`model_type` -> fields of its config for tokens that its processor has no name for."""

TOKENS_OF: dict[str, dict[str, str]] = {
    "apertus1p5": {"eol_token": "<row>", "image_wrapper_token": "<wrap>", "boa_token": "<boa>", "eoa_token": "<eoa>"},
    "cohere_compass": {
        "image_token": "<|IMAGE_PAD|>",
        "video_token": "<|VIDEO_PAD|>",
        "vision_start_token": "<|VISION_START|>",
        "vision_end_token": "<|VISION_END|>",
    },
}
"""`model_type` -> what its tokenizer calls tokens whose spelling its processor knows."""

REGISTERED = {ARCHITECTURES[name].model_type: TINY[name] for name in NATIVE}
"""Types that have entries: their tests' own rows."""


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
    own = TEXT_OVERRIDES.get(raw.get("model_type") or "", {})
    update(raw, {field: value for field, value in own.items() if field in raw})
    if "unpadded_vocab_size" in raw:  # rows of the head, one for each token
        raw["unpadded_vocab_size"] = rows
    if "mrope_section" in (raw.get("rope_parameters") or {}):
        raw["rope_parameters"] |= {"mrope_section": [2, 1, 1]}
    raw.pop("per_layer_config", None)
    layers = raw.get("num_hidden_layers")
    for field in ("layer_types", "mlp_layer_types"):
        if isinstance(layers, int) and isinstance(raw.get(field), list):
            raw[field] = raw[field][-layers:] if len(raw[field]) >= layers else None
    for field, value in raw.items():
        if isinstance(value, dict) and (field.endswith("config") or "model_type" in value):
            shrink(value, field, rows)


def tiny_processor(model_type: str, folder: Path) -> Any:
    """A processor of the class, of parts and with a chat template, over the tokenizer of a folder."""
    named = TOKENS | TOKENS_OF.get(model_type, {})
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, extra_special_tokens=named)
    if model_type in PLAIN_TOKENS:
        tokenizer = hf.AutoTokenizer.from_pretrained(folder, extra_special_tokens={})
    processor = (
        REGISTERED[model_type].processor(tokenizer) if model_type in REGISTERED else of_parts(model_type, tokenizer)
    )
    processor.chat_template = chat_template(processor)
    return processor


def of_parts(model_type: str, tokenizer: Any) -> Any:
    """A processor of the class, of parts."""
    if model_type in NONE_BUILT:
        raise UserError(NONE_BUILT[model_type])
    name = PROCESSORS.get(model_type) or PROCESSOR_OF[model_type]
    cls = processor_class() if name == PixtralProcessor.__name__ else getattr(hf, name)
    known = inspect.signature(cls.__init__).parameters
    parts: dict[str, Any] = {"tokenizer": tokenizer}
    if "image_processor" in known:
        parts["image_processor"] = image_processor(model_type)
    if "feature_extractor" in known:
        parts["feature_extractor"] = getattr(hf, EXTRACTORS.get(model_type) or EXTRACTOR_OF[model_type])()
    if "qformer_tokenizer" in known:
        parts["qformer_tokenizer"] = copy.deepcopy(tokenizer)
    parts |= PROCESSOR_OPTIONS.get(model_type, {})
    if VIDEO not in known:
        return cls(**parts)
    settings = VIDEO_OPTIONS.get(model_type, {})
    if not is_torchvision_available():
        return build_without_torchvision(cls, UNKNOWN, video_settings=settings, **parts)
    video = VIDEO_PROCESSOR_OF.get(model_type) or VIDEO_PROCESSORS[model_type]["torchvision"]
    return cls(**parts, video_processor=getattr(hf, video)(**settings))


NONE_BUILT = {
    "evolla": "It sees proteins, and no images.",
    "mistral4": "It is a language model: transformers has no processor for it.",
    "vision-encoder-decoder": "It is put together of two other models: transformers has no processor for it.",
}
"""Types that no processor for images and text is built for, and why."""

PLAIN_TOKENS = ("instructblip", "instructblipvideo")
"""Types whose processors add a token of their own to a tokenizer that has no name for it."""

PROCESSOR_OF = {
    "cosmos3_omni": "Qwen3VLProcessor",
    "fast_vlm": "LlavaProcessor",
    "kosmos-2": "Kosmos2Processor",
    "kosmos-2.5": "Kosmos2_5Processor",
    "glm_ocr": "Glm46VProcessor",
    "glmga": "Glm46VProcessor",
    "qwen2_5_omni_thinker": "Qwen2_5OmniProcessor",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeProcessor",
}
"""`model_type` -> its processor's class, where transformers' table has none."""

PROCESSOR_OPTIONS: dict[str, dict[str, Any]] = {
    "aya_vision": {"patch_size": PATCH, "img_size": SIDE, "downsample_factor": 2},
    "chameleon": {"image_seq_length": 4},
    "deepseek_vl": {"num_image_tokens": 4},
    "deepseek_vl_hybrid": {"num_image_tokens": 4},
    "granite4_vision": {"patch_size": PATCH, "vision_feature_select_strategy": "default", "downsample_rate": "1/2"}
    | {"num_additional_image_tokens": 1},
    "granite_docling": {"image_seq_len": 1},
    "t5gemma2": {"image_seq_length": 4},
    "idefics2": {"image_seq_len": 64},
    "idefics3": {"image_seq_len": 1},
    "janus": {"num_image_tokens": 4},
    "ovis2": {"image_seq_length": 4},
    "mistral3": {"patch_size": PATCH, "spatial_merge_size": 2},
    "qianfan_ocr": {"image_seq_length": 1},
    "vipllava": {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    "video_llava": {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
}
"""`model_type` -> further arguments of its processor."""

IMAGE_OPTIONS: dict[str, dict[str, Any]] = {
    "aya_vision": {"max_patches": 2},
    "deepseek_ocr2": {"size": {"height": 1024, "width": 1024}, "tile_size": 768},
    "got_ocr2": {"size": {"height": 1024, "width": 1024}},
    "lfm2_vl": {"encoder_patch_size": PATCH, "tile_size": 2 * SIDE, "min_image_tokens": 1, "max_image_tokens": 4},
    "granite4_vision": TILES,
    "granite_docling": {"size": {"height": 56, "width": 56}},
    "ovis2": {"max_patches": 2},
    "qianfan_ocr": {"max_patches": 2},
}
"""`model_type` -> further arguments of its image processor."""

IMAGE_PROCESSOR_OF = {
    "diffusion_gemma": "Gemma4ImageProcessorPil",
    "fast_vlm": "CLIPImageProcessorPil",
    "glm4v_moe": "Glm4vImageProcessorPil",
    "glm_ocr": "Glm46VImageProcessorPil",
    "qwen2_5_omni_thinker": "Qwen2VLImageProcessorPil",
    "qwen3_omni_moe_thinker": "Qwen2VLImageProcessorPil",
    "qwen3_vl_moe": "Qwen2VLImageProcessorPil",
}
"""`model_type` -> the class of its image processor, where transformers' table has none."""

VIDEO_PROCESSOR_OF = {
    "diffusion_gemma": "Gemma4VideoProcessor",
    "glm4v_moe": "Glm4vVideoProcessor",
    "glm_ocr": "Glm46VVideoProcessor",
    "qwen2_5_omni_thinker": "Qwen2VLVideoProcessor",
    "qwen3_omni_moe_thinker": "Qwen2VLVideoProcessor",
}
"""`model_type` -> the class of its video processor, where transformers' table has none."""

EXTRACTOR_OF = {
    "nemotron_h_omni": "ParakeetFeatureExtractor",
    "diffusion_gemma": "Gemma4AudioFeatureExtractor",
    "qwen2_5_omni_thinker": "WhisperFeatureExtractor",
    "qwen3_omni_moe_thinker": "WhisperFeatureExtractor",
}
"""`model_type` -> the class of what hears for it, where transformers' table has none."""

VIDEO_OPTIONS: dict[str, dict[str, Any]] = {
    "ernie4_5_vl_moe": {"font": "none", "draw_on_frames": False},
    "minicpmv4_6": {"slice_mode": False, "downsample_mode": "16x"},
    "minicpmv4_7": {"slice_mode": False, "downsample_mode": "16x"},
}
"""`model_type` -> settings of its video processor."""


def image_processor(model_type: str) -> Any:
    """Its image processor for Pillow, in small sizes. Raises UserError where there is none."""
    names = IMAGE_PROCESSORS.get(model_type) or {"pil": IMAGE_PROCESSOR_OF.get(model_type)}
    if "pil" not in names and not is_torchvision_available():
        raise UserError(f"Its {names['torchvision']} needs torchvision: pip install torchvision")
    cls = getattr(hf, names.get("pil") or names["torchvision"])
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


def tiny_released_model(model_type: str, processor: Any) -> torch.nn.Module:
    """A random one, every parameter moved, so that norms and biases are not all ones and zeros."""
    torch.manual_seed(1)
    config, cls = tiny_config(model_type, processor), getattr(hf, CLASSES[model_type])
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
