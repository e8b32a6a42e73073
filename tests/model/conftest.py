"""Tiny random parts: one base language model per family in that family's own format, towers, and a small tokenizer."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import moellava.model  # noqa: F401  (registers the families)
from moellava.convert.export import flat_rope
from moellava.model.families import FAMILIES
from moellava.model.loading import text_config

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints.tar.xz"

VOCABULARY = 280
"""Tokens of the test tokenizer."""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    """Folders that the reference implementation saved, with what they must compute: FAMILY/KIND, openai/clip-tiny."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer of 280 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["what colour is the shape in the picture? it is a red circle"] * 20, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end).save_pretrained(folder)
    return folder


@dataclass
class Base:
    """A language model's folder, and the Hugging Face model that it must equal."""

    folder: Path
    oracle: torch.nn.Module


@pytest.fixture(scope="session")
def make_base(tmp_path_factory, tokenizer_folder) -> Callable[..., Base]:
    """(family, rows, tied) -> a base of that family with `rows` embeddings, in the family's own config and names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made: dict[tuple, Base] = {}

    def make(name: str, rows: int = VOCABULARY, tied: bool = False) -> Base:
        if (name, rows, tied) in made:
            return made[name, rows, tied]
        family = FAMILIES[name]
        torch.manual_seed(1)
        config = AutoConfig.for_model(
            family.text_model_type,
            vocab_size=rows,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
        )
        fields = family.their_config(flat_rope(config.to_dict()))
        raw = json.loads(json.dumps({**fields, "model_type": family.base_model_types[0]}, default=str))
        config = text_config(family, family.text_config(raw))
        oracle = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in oracle.parameters():  # norms and biases too, which start as ones and zeros
                parameter.add_(0.1 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp(name)
        state = {key: value for key, value in oracle.state_dict().items() if not (tied and key == "lm_head.weight")}
        tensors = {key: value.clone().contiguous() for key, value in family.to_theirs(state, raw).items()}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(raw))
        for file in tokenizer_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        made[name, rows, tied] = Base(folder, oracle)
        return made[name, rows, tied]

    return make


TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.fixture(scope="session")
def clip_tower(tmp_path_factory) -> Path:
    """A CLIP tower of 28 × 28 pixels, 4 patches, with its image processor."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(2)
    CLIPVisionModel(CLIPVisionConfig(image_size=28, patch_size=14, **TOWER)).save_pretrained(folder)
    crop = {"height": 28, "width": 28}
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=crop).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def siglip_tower(tmp_path_factory) -> Path:
    """A SigLIP tower of 28 × 28 pixels, 4 patches, without an image processor beside it."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(3)
    SiglipVisionModel(SiglipVisionConfig(image_size=28, patch_size=14, **TOWER)).save_pretrained(folder)
    return folder


@pytest.fixture
def inputs() -> Callable[..., dict[str, torch.Tensor]]:
    """(model) -> one question with an image, and one that is shorter and padded, as a batch for the model."""

    def make(model) -> dict[str, torch.Tensor]:
        torch.manual_seed(4)
        n, image = model.config.image_seq_length, model.config.image_token_index
        side = model.config.vision_config.image_size
        texts = [torch.randint(1, 200, (6,)).tolist(), torch.randint(1, 200, (3,)).tolist()]
        ids = [[1, *[image] * n, *texts[0]], [1, *[image] * n, *texts[1], 0, 0, 0]]
        mask = [[1] * len(ids[0]), [1] * (len(ids[0]) - 3) + [0] * 3]
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(mask),
            "pixel_values": torch.randn(2, 3, side, side),
        }

    return make
