# SPDX-License-Identifier: Apache-2.0
"""The language model of `moellava demo --task mixed` before it has read anything, and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2ForCausalLM

from moellava.demo.base_lm import lm_config, save_lm, tokenizer_of
from moellava.demo.easy_vqa_data import TrainImage
from moellava.demo.mixed import VOCAB_ROWS, Protocol
from moellava.demo.mixed_data import World, texts

HEAD = 16
"""Width of an attention head."""


def write_base(world: World, images: list[TrainImage], protocol: Protocol, path: Path) -> None:
    """A folder that `--model_name_or_path` takes.

    Args:
        world, images: what the tokenizer is to know the words of.
        protocol: says how large the model is.
        path: of the folder.
    """
    tokenizer = tokenizer_of(texts(world, images), VOCAB_ROWS)
    config = lm_config(
        tokenizer,
        rows=VOCAB_ROWS,
        width=protocol.hidden,
        units=protocol.units,
        layers=protocol.layers,
        heads=protocol.hidden // HEAD,
    )
    torch.manual_seed(protocol.sizes.seed)
    save_lm(Qwen2ForCausalLM(config), tokenizer, path)
