"""Tiny random models of the real Hugging Face classes, with processors built from the golden tokenizers."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moellava.data.media_reader import MediaReader
from moellava.data.records import load_records
from moellava.data.tokenizers import load_tokenizer
from moellava.lmm.datasets import TO_LOAD_IMAGE, MediaDataset
from moellava.lmm.loaders import find_model, load_lmm
from moellava.lmm.processors import build_without_torchvision
from moellava.lmm.supported_models import LMM_FAMILIES, SUPPORTED_MODELS

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
GRIDS = [[28, 56], [56, 28], [56, 56]]


def qwen_vision(**extra: Any) -> dict[str, Any]:
    """The vision config of a Qwen-VL model; its merger joins 2 × 2 patches."""
    return {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 14, "out_hidden_size": 16, **extra}


def qwen_text(kind: str) -> dict[str, Any]:
    """Its text config."""
    return {"model_type": kind, **TEXT, "rope_parameters": QWEN_ROPE}


TINY: dict[str, dict[str, Any]] = {
    "llava-1.5": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "image_seq_length": 4,
    },
    "llava-1.6": {
        "text_config": {"model_type": "mistral", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "image_grid_pinpoints": GRIDS,
    },
    "llava-interleave": {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
        "image_seq_length": 4,
    },
    "llava-next-video": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "image_grid_pinpoints": GRIDS,
    },
    "llava-onevision": {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        "image_grid_pinpoints": GRIDS,
        "vision_feature_layer": -1,
    },
    "qwen2-vl": {
        "text_config": qwen_text("qwen2_vl_text"),
        "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 14},
    },
    "qwen2.5-vl": {
        "text_config": qwen_text("qwen2_5_vl_text"),
        "vision_config": qwen_vision(intermediate_size=24, fullatt_block_indexes=[1], window_size=56),
    },
    "qwen3-vl": {
        "text_config": qwen_text("qwen3_vl_text"),
        "vision_config": qwen_vision(intermediate_size=24, num_position_embeddings=16, deepstack_visual_indexes=[0]),
    },
    "internvl": {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {
            "model_type": "internvl_vision",
            **VISION,
            "image_size": [28, 28],
            "patch_size": [14, 14],
        },
        "image_seq_length": 1,
        "downsample_ratio": 0.5,
    },
    "smolvlm": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "smolvlm_vision", **VISION},
        "scale_factor": 2,
    },
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **TEXT, "sliding_window": 512},
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
        "mm_tokens_per_image": 4,
    },
    "paligemma": {
        "text_config": {"model_type": "gemma", **TEXT},
        "vision_config": {"model_type": "siglip_vision_model", **VISION, "projection_dim": 16},
        "projection_dim": 16,
    },
    "llama-3.2-vision": {
        "text_config": {
            "model_type": "mllama_text_model",
            **{name: value for name, value in TEXT.items() if name != "head_dim"},
            "num_hidden_layers": 3,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 4,
        },
    },
}
"""Family -> the fields of a tiny config of its class."""

NATIVE = [name for name, family in LMM_FAMILIES.items() if not family.remote_code]


def tiny_config(family_id: str, vocab_size: int = 400, **token_ids: int) -> Any:
    """A tiny config of a family's class."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = {name: dict(value) if isinstance(value, dict) else value for name, value in TINY[family_id].items()}
    fields["text_config"] |= {"vocab_size": vocab_size, "pad_token_id": 0}
    return CONFIG_MAPPING[LMM_FAMILIES[family_id].model_type](**fields, **token_ids, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tiny_lmm_config() -> Callable[..., Any]:
    """(family, vocab_size, token ids) -> a tiny config of that family's class."""
    return tiny_config


TOKENS: dict[str, dict[str, str]] = {
    "llava-1.5": {"image_token": "<image>"},
    "llava-1.6": {"image_token": "<image>"},
    "llava-next-video": {"image_token": "<image>", "video_token": "<video>"},
    "llava-interleave": {"image_token": "<image>"},
    "llava-onevision": {"image_token": "<image>", "video_token": "<video>"},
    "qwen2-vl": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "qwen2.5-vl": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "qwen3-vl": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "smolvlm": {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    },
    "paligemma": {"image_token": "<image>"},
    "llama-3.2-vision": {"image_token": "<|image|>"},
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
}
"""Family -> the tokens that its processor asks its tokenizer for."""

MARKS: dict[str, list[str]] = {
    "chatml": ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"],
    "gemma3": ["<start_of_turn>", "<end_of_turn>"],
    "paligemma": ["<bos>", "<eos>"],
    "smolvlm": ["<|im_start|>", *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))],
    "llama-3.2-vision": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"],
}
"""Further special tokens of the family's template."""

CHATML = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "llava-onevision", "llava-interleave", "internvl")
"""Families whose turns are marked as in ChatML."""

BEGINNINGS = {"smolvlm": "<|im_start|>", "paligemma": "<bos>"}
ENDS = dict.fromkeys(CHATML, "<|im_end|>") | {
    "smolvlm": "<end_of_utterance>",
    "paligemma": "<eos>",
    "llama-3.2-vision": "<|eot_id|>",
}
"""Family -> its beginning- and end-of-sequence tokens, where they are not the vocabulary's."""

BYTE_LEVEL = {"qwen2-vl": "qwen", "smolvlm": "phi", "paligemma": "phi"}
"""Family -> the byte-level vocabulary that it is tested with; the others with a smaller one of SentencePiece's kind."""


PLACEHOLDER_FIELDS = {
    **dict.fromkeys(
        ("llava-1.5", "llava-1.6", "llava-interleave", "llava-next-video", "llava-onevision"),
        {"image_token": "image_token_index", "video_token": "video_token_index"},
    ),
    "internvl": {"context_image_token": "image_token_id"},
}
"""Family -> token of `TOKENS` -> the config's field for its id, if that is not `image_token_id` or `video_token_id`."""


def make_tokenizer(family_id: str, golden: Path, folder: Path) -> Any:
    """A real vocabulary with the family's special tokens."""
    from transformers import AutoTokenizer

    kind = BYTE_LEVEL.get(family_id, "mistral")
    tokenizer = load_tokenizer(str(golden / kind), BYTE_LEVEL.get(family_id, "v1"))
    marks = MARKS["chatml"] if family_id in CHATML else MARKS.get(family_id, [])
    tokenizer.add_special_tokens({"additional_special_tokens": [*marks, *TOKENS[family_id].values()]})
    tokenizer.bos_token = BEGINNINGS.get(family_id, tokenizer.bos_token)
    tokenizer.eos_token = ENDS.get(family_id, tokenizer.eos_token)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"extra_special_tokens": TOKENS[family_id]}
    path.write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(folder)


def make_processor(family_id: str, tokenizer: Any) -> Any:
    """The family's processor at the size of the tiny models, with no chat template of its own."""
    import transformers as hf

    square = {"height": 28, "width": 28}
    clip = {"size": {"shortest_edge": 28}, "crop_size": square}
    select = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    tiles = {"image_grid_pinpoints": GRIDS}
    if family_id == "llava-1.5":
        return hf.LlavaProcessor(hf.CLIPImageProcessorPil(**clip), tokenizer, **select)
    if family_id == "llava-1.6":
        return hf.LlavaNextProcessor(hf.LlavaNextImageProcessorPil(**clip, **tiles), tokenizer, **select)
    if family_id == "llava-interleave":
        select |= {"vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
        return hf.LlavaProcessor(hf.SiglipImageProcessorPil(size=square), tokenizer, **select)
    if family_id == "gemma3":
        return hf.Gemma3Processor(hf.Gemma3ImageProcessorPil(size=square), tokenizer, image_seq_length=4)
    if family_id == "paligemma":
        return hf.PaliGemmaProcessor(hf.SiglipImageProcessorPil(size=square, image_seq_length=4), tokenizer)
    if family_id == "llama-3.2-vision":
        return hf.MllamaProcessor(hf.MllamaImageProcessorPil(size=square, max_image_tiles=4), tokenizer)
    with_video = {
        "smolvlm": (
            hf.SmolVLMProcessor,
            lambda: hf.SmolVLMImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28}),
            {"image_seq_len": 1},
        ),
        "llava-next-video": (
            hf.LlavaNextVideoProcessor,
            lambda: hf.LlavaNextImageProcessorPil(**clip, **tiles),
            select,
        ),
        "llava-onevision": (
            hf.LlavaOnevisionProcessor,
            lambda: hf.LlavaOnevisionImageProcessorPil(size=square, **tiles),
            {"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        ),
        "qwen2-vl": (hf.Qwen2VLProcessor, qwen_images, {}),
        "qwen2.5-vl": (hf.Qwen2_5_VLProcessor, qwen_images, {}),
        "qwen3-vl": (hf.Qwen3VLProcessor, qwen_images, {}),
        "internvl": (
            hf.InternVLProcessor,
            lambda: hf.GotOcr2ImageProcessorPil(size=square, max_patches=2),
            {"image_seq_length": 1},
        ),
    }
    cls, images, options = with_video[family_id]
    settings = VIDEO_SETTINGS.get(family_id, {"size": square})
    return build_without_torchvision(
        cls, image_processor=images(), tokenizer=tokenizer, video_settings=settings, **options
    )


VIDEO_SETTINGS: dict[str, dict[str, Any]] = {
    "llava-next-video": {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}},
    "smolvlm": {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}},
    "qwen2-vl": {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}},
    "qwen2.5-vl": {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}},
    "qwen3-vl": {"size": {"shortest_edge": 28 * 28, "longest_edge": 4 * 56 * 56}, "patch_size": 14},
}
"""Family -> its video processor's settings at the size of the tiny models, where one square does not do."""


def qwen_images() -> Any:
    """Qwen's image processor, with at most 4 tokens an image."""
    from transformers import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56}, patch_size=14)


def token_ids_of(family_id: str, tokenizer: Any) -> dict[str, int]:
    """The ids of placeholders, by the config's fields for them."""
    fields = PLACEHOLDER_FIELDS.get(family_id, {"image_token": "image_token_id", "video_token": "video_token_id"})
    return {
        field: tokenizer.convert_tokens_to_ids(TOKENS[family_id][name])
        for name, field in fields.items()
        if name in TOKENS[family_id]
    }


DOUBLES = {"qwen-vl": ("modeling_qwen", "QWen", "LMHeadModel"), "phi3-v": ("modeling_phi3_v", "Phi3V", "ForCausalLM")}
"""Family -> the module of its stand-in for remote code, and the beginning and end of its classes' names."""


def make_remote(family_id: str, golden: Path, folder: Path) -> None:
    """A folder with code of its own, as the hub would hold it: `tests/lmm/doubles` beside random weights."""
    from safetensors.torch import save_file
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    module, start, end = DOUBLES[family_id]
    shutil.copytree(Path(__file__).parent / "doubles" / family_id.replace("-", "_"), folder)
    places = {"AutoConfig": f"{module.replace('modeling', 'configuration')}.{start}Config"}
    places["AutoModelForCausalLM"] = f"{module}.{start}{end}"
    if family_id == "qwen-vl":
        shutil.copytree(golden / "qwen", folder, dirs_exist_ok=True)
    else:
        tokenizer = load_tokenizer(str(golden / "mistral"), "v1")
        marks = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|image|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
        tokenizer.pad_token = tokenizer.unk_token
        tokenizer.save_pretrained(folder)
        code = {"AutoProcessor": "Phi3VProcessor", "AutoImageProcessor": "Phi3VImageProcessor"}
        settings = {"auto_map": {auto: f"processing_phi3_v.{name}" for auto, name in code.items()}}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"processor_class": "Phi3VProcessor"}))
    model_class = get_class_from_dynamic_module(places["AutoModelForCausalLM"], folder)
    model = model_class(model_class.config_class(tie_word_embeddings=False))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_diff_dict() | {"auto_map": places}))


@pytest.fixture(scope="session")
def tiny_lmm(tmp_path_factory, golden_tokenizers) -> Callable[[str], Path]:
    """family -> the folder of a tiny random model of it, as the hub would hold it, without a chat template."""
    root = tmp_path_factory.mktemp("lmm")

    def make(family_id: str) -> Path:
        from transformers import AutoModelForImageTextToText

        folder = root / family_id
        if not folder.exists():
            torch.manual_seed(0)
        if family_id in DOUBLES and not folder.exists():
            make_remote(family_id, golden_tokenizers, folder)
        if not folder.exists():
            tokenizer = make_tokenizer(family_id, golden_tokenizers, folder)
            ids = token_ids_of(family_id, tokenizer)
            model = AutoModelForImageTextToText.from_config(tiny_config(family_id, len(tokenizer), **ids))
            model.generation_config.eos_token_id = tokenizer.eos_token_id
            for name, parameter in model.named_parameters():
                if name.endswith("_gate"):  # Llama 3.2's, 0 in a new model: its cross-attention would not be seen
                    torch.nn.init.constant_(parameter, 0.5)
            model.save_pretrained(folder)
            make_processor(family_id, tokenizer).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def opened(tiny_lmm) -> Callable[[str], Any]:
    """family -> its tiny model, opened by our loader; shared, so tests leave it as it is."""

    @functools.cache
    def open_once(family_id: str) -> Any:
        folder, raw, family = find_model(None, str(tiny_lmm(family_id)))
        return load_lmm(folder, raw, family, dtype=torch.float32, trust_remote_code=family.remote_code)

    return open_once


RECORDS = [
    {
        "id": "two turns",
        "image": "0.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A fractal."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes, no </s> and no <image>."},
        ],
    },
    {
        "id": "interleaved",
        "image": ["1.png", "2.png"],
        "system_prompt": "Be brief.",
        "conversations": [
            {"from": "human", "value": "First <image> then <image> which is larger?"},
            {"from": "gpt", "value": "The second."},
        ],
    },
    {"id": "text", "conversations": [{"from": "human", "value": "Hi <|im_end|>"}, {"from": "gpt", "value": "Hello."}]},
]


@pytest.fixture
def samples_of(opened, pictures, tmp_path) -> Callable[..., MediaDataset]:
    """(family, records, options) -> the data set of that family's tiny model."""

    def make(family_id: str, records: list[dict[str, Any]] = RECORDS, **options: Any) -> MediaDataset:
        released = options.pop("released", None) or opened(family_id)
        (tmp_path / "records.json").write_text(json.dumps(records))
        dataset = MediaDataset(
            load_records(tmp_path / "records.json"),
            MediaReader(released.processor),
            options.pop("template", released.processor.chat_template),
            to_load_image=options.pop("to_load_image", TO_LOAD_IMAGE[family_id]),
            image_folder=options.pop("image_folder", pictures[0].parent),
            **options,
        )
        dataset.family_id = family_id
        return dataset

    return make


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--model-id ID`: the conformance test of that model's family alone."""
    parser.addoption("--write-goldens", action="store_true", help="write tests/golden/released.jsonl anew")
    parser.addoption("--model-id", default=None, help="check the family of this released model only")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs the conformance test for every family, or for the one asked for."""
    if "conforming_family" in metafunc.fixturenames:
        asked = metafunc.config.getoption("--model-id", default=None)
        families = [SUPPORTED_MODELS[asked].family.family_id] if asked else list(LMM_FAMILIES)
        marks = {name: [pytest.mark.slow] for name in ("qwen2-vl", "qwen-vl")}  # their vocabulary
        metafunc.parametrize("conforming_family", [pytest.param(name, marks=marks.get(name, ())) for name in families])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--model-id`, nothing but the conformance test."""
    if config.getoption("--model-id", default=None):
        items[:] = [item for item in items if "conforming_family" in getattr(item, "fixturenames", ())]
