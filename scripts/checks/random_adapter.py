# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter of random matrices on a sparse model, and the model that it makes: what an engine is tried with.

    python scripts/checks/random_adapter.py --model-path STAGE3 --adapter DIR --merged DIR

It is beside the linears of attention: those of experts vLLM serves on GPUs alone. The matrices move log probabilities
by tenths: an engine that leaves them out answers otherwise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig

from moellava.adapters.folder import merged, write_adapter
from moellava.adapters.lora import Adapter, attach, lora_layers, pattern_of, target_names
from moellava.model.saving import save_pretrained_folder
from moellava.vlm import open_vlm

RANK, SIZE = 8, 0.05
"""Of the matrices, and the standard deviation of what B holds; peft draws A."""


def main() -> None:
    """Writes the adapter and the merged model."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model-path", required=True, help="a sparse folder of stage 3")
    flags.add_argument("--adapter", type=Path, required=True, help="where the adapter goes, in peft's format")
    flags.add_argument("--merged", type=Path, required=True, help="where the merged model goes")
    args = flags.parse_args()
    torch.manual_seed(0)
    vlm = open_vlm(args.model_path, device="cpu")
    targets = [name for name in target_names(vlm, only_experts=False) if ".self_attn." in name]
    pattern = pattern_of(targets, (name for name, _ in vlm.model.named_modules()))
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=pattern, base_model_name_or_path=args.model_path)
    attach(vlm.model, config, targets)
    for _, layer in lora_layers(vlm.model):
        for matrix in layer.lora_B.values():
            torch.nn.init.normal_(matrix.weight, std=SIZE)
    adapter = Adapter(config, {}, vlm.keywords)
    state = vlm.model.state_dict()
    write_adapter(state, adapter, args.adapter)
    save_pretrained_folder(
        vlm.model, vlm.tokenizer, vlm.processor, args.merged, state_dict=merged(state, adapter.scaling)
    )


if __name__ == "__main__":
    main()
