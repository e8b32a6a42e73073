"""Tiny random parts that the stages are run with: real classes, real files, a few thousand parameters."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

SHAPES = {"red circle": (200, 30, 30), "green square": (30, 200, 30), "blue shape": (30, 30, 200)}


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> Path:
    """A folder with a tiny random language model (`lm`), tower (`tower`), images and LLaVA records."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM

    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    vocabulary = write_tokenizer(root / "lm")
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary + 8,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=0,
        )
    ).save_pretrained(root / "lm")
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
    ).save_pretrained(root / "tower")
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(root / "tower")
    write_records(root)
    return root


def write_tokenizer(folder: Path) -> int:
    """A byte-level BPE of the Qwen2 kind, trained on the records' few words; returns its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["USER: what is in the image? ASSISTANT: a red circle"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast.save_pretrained(folder)
    return len(fast)


def write_records(root: Path) -> None:
    """24 captions and 24 conversations over three images; every fourth conversation has no image."""
    (root / "images").mkdir()
    captions, conversations = [], []
    for index, colour in enumerate(SHAPES.values()):
        Image.new("RGB", (40, 24 + 8 * index), colour).save(root / "images" / f"{index}.png")
    for number in range(24):
        name, image = list(SHAPES)[number % 3], f"{number % 3}.png"
        answer = {"from": "gpt", "value": f"a {name}" + " here" * (number % 5)}
        captions.append({"id": f"c{number}", "image": image, "conversations": [human("<image>"), answer]})
        if number % 4:
            turns = [human("<image>\nwhat is in the image?"), answer, human("is it red?"), gpt("no")]
            conversations.append({"id": f"s{number}", "image": image, "conversations": turns})
        else:
            conversations.append({"id": f"s{number}", "conversations": [human("what is red?"), gpt("a shape")]})
    (root / "captions.json").write_text(json.dumps(captions))
    (root / "sft.json").write_text(json.dumps(conversations))


def human(text: str) -> dict:
    """A user's turn."""
    return {"from": "human", "value": text}


def gpt(text: str) -> dict:
    """The model's turn."""
    return {"from": "gpt", "value": text}


COMMON = {
    "max_steps": 6,
    "save_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": "2e-3",
    "lr_scheduler_type": "constant",
    "image_aspect_ratio": "pad",
    "model_max_length": 256,
    "report_to": "none",
}
"""Flags that all runs of the tests share."""


def stage_flags(parts: Path, runs: Path, stage: str) -> dict[str, object]:
    """The flags of one stage; stages 2 and 3 start from the folders of the stages before, in `runs`."""
    new_model = {
        "model_name_or_path": parts / "lm",
        "image_tower": parts / "tower",
        "image_projector_type": "mlp2x_gelu",
    }
    sft = {"version": "qwen", "data_path": parts / "sft.json"}
    own = {
        "pretrain": new_model | {"version": "plain", "tune_mm_mlp_adapter": True, "data_path": parts / "captions.json"},
        "finetune": new_model | sft | {"pretrain_mm_mlp_adapter": runs / "pretrain"},
        "moe": sft
        | {
            "model_name_or_path": runs / "finetune",
            "moe_enable": True,
            "moe_mode": "sparse",
            "num_experts": 4,
            "top_k_experts": 2,
        },
    }[stage]
    return COMMON | own | {"image_folder": parts / "images", "output_dir": runs / stage}


@pytest.fixture(scope="session")
def flags_for(parts):
    """(folder of the runs, stage) -> the flags of that stage."""
    return lambda runs, stage: stage_flags(parts, runs, stage)
