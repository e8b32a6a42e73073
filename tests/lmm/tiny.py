# SPDX-License-Identifier: Apache-2.0
"""One row for every released architecture: a tiny random model of its real class, with a processor to match.

A new architecture is one more `TinyArchitecture` here; the tests of this folder run over all rows.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from moellava.data.dataset import SupervisedDataset
from moellava.data.tokenizers import load_tokenizer
from moellava.lmm.architecture import ARCHITECTURES
from moellava.lmm.processors import build_without_torchvision
from moellava.model.manifest import Manifest
from moellava.vlm import VLM, collator_of, open_vlm

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
CLIP = {"model_type": "clip_vision_model", **VISION}
SIGLIP = {"model_type": "siglip_vision_model", **VISION}
HEADLESS = SIGLIP | {"vision_use_head": False}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GRIDS = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}

SQUARE = {"height": 28, "width": 28}
CROP = {"size": {"shortest_edge": 28}, "crop_size": SQUARE}
SELECT = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
AREA = {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}}

IMAGE = {"image_token": "<image>"}
PADS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
OLD_NAMES = {"image_token": "image_token_index", "video_token": "video_token_index"}
CHATML = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")

VICUNA = "<s>USER: <image>\nWhat is it? ASSISTANT: A fractal.</s>"
ONEVISION = "<|im_start|>user <image>\nWhat is it?<|im_end|><|im_start|>assistant\nA fractal.<|im_end|>"
ASKED = "<|im_start|>user\n{image}What is it?<|im_end|>\n<|im_start|>assistant\nA fractal.<|im_end|>\n"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SHOWN = "What is shown?<|im_end|>\n<|im_start|>assistant\nShapes.<|im_end|>\n"
SMOL = "<fake_token_around_image><global-img><image><fake_token_around_image>\n"


@dataclass(frozen=True)
class TinyArchitecture:
    """How an architecture is tested.

    Args:
        name: of the architecture.
        prompt: a question about an image and its answer, as the model's own page has it.
        end: what ends an answer.
        config: fields of a tiny config of its class.
        tokens: the tokens that its processor asks its tokenizer for.
        marks: further special tokens, of its template.
        processor: tokenizer -> its processor at the size of the tiny model, with no chat template of its own.
        vocabulary: the golden tokenizer that it is tested with, and the `--version` that opens it.
        bos: the beginning-of-sequence token, where it is not the vocabulary's.
        eos: the end-of-sequence token, where it is not what ends an answer.
        fields: token of `tokens` -> the config's field for its id.
        model_type: of its config, where no entry of `ARCHITECTURES` says it.
        video_prompt: three frames of a video of five seconds, as the model reads them; ×3 means three times the same
            token. None where another row says the same of the same processor.
        slow: whether its vocabulary makes it so.
        make: (golden tokenizers, folder) -> writes the folder, where the class is not one of transformers.
    """

    name: str
    prompt: str
    end: str
    config: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    marks: tuple[str, ...] = ()
    processor: Callable[[Any], Any] | None = None
    vocabulary: tuple[str, str] = ("mistral", "v1")
    bos: str | None = None
    eos: str | None = None
    fields: dict[str, str] = field(
        default_factory=lambda: {"image_token": "image_token_id", "video_token": "video_token_id"}
    )
    model_type: str | None = None
    video_prompt: str | None = None
    slow: bool = False
    make: Callable[[Path, Path], None] | None = None

    def tiny_config(self, vocab_size: int = 400, **token_ids: int) -> Any:
        """A tiny config of its class."""
        fields = copy.deepcopy(self.config)
        fields["text_config"] |= {"vocab_size": vocab_size, "pad_token_id": 0}
        cls = hf.CONFIG_MAPPING[self.model_type or ARCHITECTURES[self.name].model_type]
        return cls(**fields, **token_ids, tie_word_embeddings=False)

    def save(self, golden: Path, folder: Path) -> None:
        """Writes a tiny random model as the hub would hold it, without a chat template."""
        torch.manual_seed(0)
        if self.make:
            self.make(golden, folder)
            return
        tokenizer = self._tokenizer(golden, folder)
        ids = {
            name: tokenizer.convert_tokens_to_ids(self.tokens[token])
            for token, name in self.fields.items()
            if token in self.tokens
        }
        model = hf.AutoModelForImageTextToText.from_config(self.tiny_config(len(tokenizer), **ids))
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):  # Llama 3.2's, 0 in a new model: its cross-attention would not be seen
                torch.nn.init.constant_(parameter, 0.5)
        model.save_pretrained(folder)
        self.processor(tokenizer).save_pretrained(folder)

    def _tokenizer(self, golden: Path, folder: Path) -> Any:
        """A real vocabulary with the architecture's special tokens."""
        name, version = self.vocabulary
        tokenizer = load_tokenizer(str(golden / name), version)
        tokenizer.add_special_tokens({"additional_special_tokens": [*self.marks, *self.tokens.values()]})
        tokenizer.bos_token = self.bos or tokenizer.bos_token
        tokenizer.eos_token = self.eos or self.end
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
        tokenizer.save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text()) | {"extra_special_tokens": self.tokens}
        path.write_text(json.dumps(settings))
        return hf.AutoTokenizer.from_pretrained(folder)


def with_video(name: str, cls: Any, images: Callable[[], Any], settings: dict[str, Any], **options: Any) -> Any:
    """tokenizer -> a processor that has a video processor, in these settings."""

    def make(tokenizer: Any) -> Any:
        parts = {"image_processor": images(), "tokenizer": tokenizer, "video_settings": settings, **options}
        return build_without_torchvision(cls, ARCHITECTURES[name].video, **parts)

    return make


def qwen_text(model_type: str) -> dict[str, Any]:
    return {"model_type": model_type, **TEXT, "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}


def qwen_vision(**extra: Any) -> dict[str, Any]:
    """Its merger joins 2 × 2 patches."""
    return {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 14, "out_hidden_size": 16, **extra}


def qwen_images() -> Any:
    """At most 4 tokens an image."""
    return hf.Qwen2VLImageProcessorPil(**AREA, patch_size=14)


def copy_double(name: str, folder: Path) -> None:
    """Our stand-in for the Python files of a repository."""
    shutil.copytree(Path(__file__).parent / "doubles" / name, folder)


def save_double(folder: Path, module: str, start: str, end: str) -> None:
    """Random weights by the code in a folder: `start` and `end` are those of the names of its classes."""
    from safetensors.torch import save_file
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    places = {"AutoConfig": f"configuration_{module}.{start}Config"}
    places["AutoModelForCausalLM"] = f"modeling_{module}.{start}{end}"
    model_class = get_class_from_dynamic_module(places["AutoModelForCausalLM"], folder)
    model = model_class(model_class.config_class(tie_word_embeddings=False))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_diff_dict() | {"auto_map": places}))


def make_qwen_vl(golden: Path, folder: Path) -> None:
    copy_double("qwen_vl", folder)
    for file in ("qwen.tiktoken", "tokenizer_config.json"):
        shutil.copyfile(golden / "qwen" / file, folder / file)
    save_double(folder, "qwen", "QWen", "LMHeadModel")


def make_phi3_v(golden: Path, folder: Path) -> None:
    copy_double("phi3_v", folder)
    tokenizer = load_tokenizer(str(golden / "mistral"), "v1")
    marks = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|image|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.save_pretrained(folder)
    code = {"AutoProcessor": "Phi3VProcessor", "AutoImageProcessor": "Phi3VImageProcessor"}
    settings = {"auto_map": {auto: f"processing_phi3_v.{name}" for auto, name in code.items()}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"processor_class": "Phi3VProcessor"}))
    save_double(folder, "phi3_v", "Phi3V", "ForCausalLM")


ROWS = (
    TinyArchitecture(
        name="llava-1.5",
        prompt=VICUNA,
        end="</s>",
        config={"text_config": {"model_type": "llama", **TEXT}, "vision_config": CLIP, "image_seq_length": 4},
        tokens=IMAGE,
        fields=OLD_NAMES,
        processor=lambda tokenizer: hf.LlavaProcessor(hf.CLIPImageProcessorPil(**CROP), tokenizer, **SELECT),
        video_prompt="<s>USER: <image>×4\n<image>×4\n<image>×4\nWhat is shown? ASSISTANT: Shapes.</s>",
    ),
    TinyArchitecture(
        name="llava-1.6",
        prompt="<s>[INST] <image>\nWhat is it? [/INST] A fractal.</s>",
        end="</s>",
        config={"text_config": {"model_type": "mistral", **TEXT}, "vision_config": CLIP, **GRIDS},
        tokens=IMAGE,
        fields=OLD_NAMES,
        processor=lambda tokenizer: hf.LlavaNextProcessor(
            hf.LlavaNextImageProcessorPil(**CROP, **GRIDS), tokenizer, **SELECT
        ),
    ),
    TinyArchitecture(
        name="llava-interleave",
        prompt=ONEVISION,
        end="<|im_end|>",
        config={
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": HEADLESS,
            "vision_feature_select_strategy": "full",
            "vision_feature_layer": -1,
            "image_seq_length": 4,
        },
        tokens=IMAGE,
        marks=CHATML,
        fields=OLD_NAMES,
        processor=lambda tokenizer: hf.LlavaProcessor(
            hf.SiglipImageProcessorPil(size=SQUARE),
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="full",
            num_additional_image_tokens=0,
        ),
    ),
    TinyArchitecture(
        name="llava-next-video",
        prompt=VICUNA,
        end="</s>",
        config={"text_config": {"model_type": "llama", **TEXT}, "vision_config": CLIP, **GRIDS},
        tokens=IMAGE | {"video_token": "<video>"},
        fields=OLD_NAMES,
        processor=with_video(
            "llava-next-video",
            hf.LlavaNextVideoProcessor,
            lambda: hf.LlavaNextImageProcessorPil(**CROP, **GRIDS),
            CROP,
            **SELECT,
        ),
        video_prompt="<s>USER: <video>×3\nWhat is shown? ASSISTANT: Shapes.</s>",
    ),
    TinyArchitecture(
        name="llava-onevision",
        prompt=ONEVISION,
        end="<|im_end|>",
        config={
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": HEADLESS,
            "vision_feature_layer": -1,
            **GRIDS,
        },
        tokens=IMAGE | {"video_token": "<video>"},
        marks=CHATML,
        fields=OLD_NAMES,
        processor=with_video(
            "llava-onevision",
            hf.LlavaOnevisionProcessor,
            lambda: hf.LlavaOnevisionImageProcessorPil(size=SQUARE, **GRIDS),
            {"size": SQUARE},
            num_image_tokens=4,
            vision_feature_select_strategy="full",
        ),
    ),
    TinyArchitecture(
        name="qwen2-vl",
        prompt=SYSTEM + ASKED.format(image=QWEN_IMAGE),
        end="<|im_end|>",
        config={
            "text_config": qwen_text("qwen2_vl_text"),
            "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 14},
        },
        tokens=PADS,
        marks=CHATML,
        vocabulary=("qwen", "qwen"),
        processor=with_video("qwen2-vl", hf.Qwen2VLProcessor, qwen_images, AREA),
        video_prompt=f"{SYSTEM}<|im_start|>user\n<|vision_start|><|video_pad|>×8<|vision_end|>{SHOWN}",
        slow=True,
    ),
    TinyArchitecture(
        name="qwen2.5-vl",
        prompt=SYSTEM + ASKED.format(image=QWEN_IMAGE),
        end="<|im_end|>",
        config={
            "text_config": qwen_text("qwen2_5_vl_text"),
            "vision_config": qwen_vision(intermediate_size=24, fullatt_block_indexes=[1], window_size=56),
        },
        tokens=PADS,
        marks=CHATML,
        processor=with_video("qwen2.5-vl", hf.Qwen2_5_VLProcessor, qwen_images, AREA),
    ),
    TinyArchitecture(
        name="qwen3-vl",
        prompt=ASKED.format(image=QWEN_IMAGE),
        end="<|im_end|>",
        config={
            "text_config": qwen_text("qwen3_vl_text"),
            "vision_config": qwen_vision(
                intermediate_size=24, num_position_embeddings=16, deepstack_visual_indexes=[0]
            ),
        },
        tokens=PADS,
        marks=CHATML,
        processor=with_video(
            "qwen3-vl",
            hf.Qwen3VLProcessor,
            qwen_images,
            {"size": {"shortest_edge": 28 * 28, "longest_edge": 4 * 56 * 56}, "patch_size": 14},
        ),
        video_prompt=(
            "<s><|im_start|>user\n<|vision_start|>"
            "<1.1 seconds><|vision_start|><|video_pad|>×4<|vision_end|>"
            f"<4.8 seconds><|vision_start|><|video_pad|>×4<|vision_end|>×2{SHOWN}"
        ),
    ),
    TinyArchitecture(
        name="internvl",
        prompt=ASKED.format(image="<IMG_CONTEXT>\n"),
        end="<|im_end|>",
        config={
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": VISION | {"model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [14, 14]},
            "image_seq_length": 1,
            "downsample_ratio": 0.5,
        },
        tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        marks=CHATML,
        fields={"context_image_token": "image_token_id"},
        processor=with_video(
            "internvl",
            hf.InternVLProcessor,
            lambda: hf.GotOcr2ImageProcessorPil(size=SQUARE, max_patches=2),
            {"size": SQUARE},
            image_seq_length=1,
        ),
        video_prompt=(
            "<s><|im_start|>user\nFrame1: <img><IMG_CONTEXT></img>\nFrame2: <img><IMG_CONTEXT></img>\n"
            f"Frame3: <img><IMG_CONTEXT></img>\n{SHOWN}"
        ),
    ),
    TinyArchitecture(
        name="smolvlm",
        prompt="<|im_start|>User:<image>What is it?<end_of_utterance>\nAssistant: A fractal.<end_of_utterance>\n",
        end="<end_of_utterance>",
        config={
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "smolvlm_vision", **VISION},
            "scale_factor": 2,
        },
        tokens=IMAGE
        | {
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
        marks=("<|im_start|>", *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))),
        vocabulary=("phi", "phi"),
        bos="<|im_start|>",
        processor=with_video(
            "smolvlm",
            hf.SmolVLMProcessor,
            lambda: hf.SmolVLMImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28}),
            {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}},
            image_seq_len=1,
        ),
        video_prompt=(
            "<|im_start|>User: You are provided the following series of three frames from a 0:00:05 [H:MM:SS] video."
            f"\n\nFrame from 00:00:{SMOL}Frame from 00:02:{SMOL}Frame from 00:04:{SMOL}\n"
            "What is shown?<end_of_utterance>\nAssistant: Shapes.<end_of_utterance>\n"
        ),
    ),
    TinyArchitecture(
        name="gemma3",
        prompt=(
            "<s><start_of_turn>user\n<start_of_image>What is it?<end_of_turn>\n"
            "<start_of_turn>model\nA fractal.<end_of_turn>\n"
        ),
        end="<end_of_turn>",
        eos="</s>",
        config={
            "text_config": {"model_type": "gemma3_text", **TEXT, "sliding_window": 512},
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
        },
        tokens={"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        marks=("<start_of_turn>", "<end_of_turn>"),
        processor=lambda tokenizer: hf.Gemma3Processor(
            hf.Gemma3ImageProcessorPil(size=SQUARE), tokenizer, image_seq_length=4
        ),
    ),
    TinyArchitecture(
        name="paligemma",
        prompt="<image><bos>What is it?\nA fractal.<eos>",
        end="<eos>",
        config={
            "text_config": {"model_type": "gemma", **TEXT},
            "vision_config": SIGLIP | {"projection_dim": 16},
            "projection_dim": 16,
        },
        tokens=IMAGE,
        marks=("<bos>", "<eos>"),
        vocabulary=("phi", "phi"),
        bos="<bos>",
        processor=lambda tokenizer: hf.PaliGemmaProcessor(
            hf.SiglipImageProcessorPil(size=SQUARE, image_seq_length=4), tokenizer
        ),
    ),
    TinyArchitecture(
        name="llama-3.2-vision",
        prompt=(
            "<s><|start_header_id|>user<|end_header_id|>\n\n<|image|>What is it?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA fractal.<|eot_id|>"
        ),
        end="<|eot_id|>",
        config={
            "text_config": {name: value for name, value in TEXT.items() if name != "head_dim"}
            | {
                "model_type": "mllama_text_model",
                "num_hidden_layers": 3,
                "cross_attention_layers": [1],
                "rope_parameters": ROPE,
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
        tokens={"image_token": "<|image|>"},
        marks=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"),
        processor=lambda tokenizer: hf.MllamaProcessor(
            hf.MllamaImageProcessorPil(size=SQUARE, max_image_tiles=4), tokenizer
        ),
    ),
    TinyArchitecture(
        name="phi3-v",
        # <|image|> stands for its <|image_1|> here.
        prompt="<|user|>\n<|image|>\nWhat is it?<|end|>\n<|assistant|>\nA fractal.<|end|>\n",
        end="<|end|>",
        make=make_phi3_v,
    ),
    TinyArchitecture(
        name="qwen-vl",
        prompt=SYSTEM + ASKED.format(image="Picture 1: <img></img>\n"),
        end="<|im_end|>",
        make=make_qwen_vl,
        slow=True,
    ),
)

TINY = {row.name: row for row in ROWS}
"""Architecture -> its row."""

NATIVE = [name for name in TINY if not ARCHITECTURES[name].remote_code]
"""Those that have a class in transformers."""

WITH_VIDEO = [name for name in TINY if ARCHITECTURES[name].video]
"""Those whose processor has a way for videos."""


def reopen(folder: Path, trust_remote_code: bool = False) -> VLM:
    """A folder, opened as fp32 on the CPU."""
    return open_vlm(folder, device="cpu", dtype=torch.float32, trust_remote_code=trust_remote_code)


def manifest_of(raw: dict[str, Any], name: str = "FOLDER") -> Manifest:
    """A folder that is not there, with that config.json."""
    return Manifest(Path(name), name, "--model-path", raw)


def batch_of(name: str, dataset: SupervisedDataset, *numbers: int, **options: bool) -> dict[str, torch.Tensor]:
    """Samples of a data set as a batch of that architecture; for options see `collator_of`."""
    collate = collator_of(dataset.encoder, ARCHITECTURES[name], **options)
    return collate([dataset[number] for number in numbers])
