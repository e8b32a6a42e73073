# SPDX-License-Identifier: Apache-2.0
"""Opens an exported folder as anybody would, and notes what its model computes. Run as a script, without moellava.

python -I reopened.py FOLDER PROBES OUTPUT [--code] [--adapter DIR]
"""

import argparse
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

GREEDY = 32
"""Tokens that are decoded greedily."""

Tensors = dict[str, torch.Tensor]


def by_probe(tensors: Tensors) -> dict[str, Tensors]:
    """probe/input -> tensor, as probe -> input -> tensor."""
    probes: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        probe, _, key = name.partition("/")
        probes.setdefault(probe, {})[key] = tensor
    return probes


@torch.no_grad()
def computed(model: torch.nn.Module, probes: dict[str, Tensors]) -> Tensors:
    """probe/logits [B, L, V] and probe/tokens [B, `GREEDY`], greedily decoded, of a model."""
    found = {}
    for name, probe in probes.items():
        found[f"{name}/logits"] = model(**probe, use_cache=False).logits.float()
        options = {"do_sample": False, "num_beams": 1, "max_new_tokens": GREEDY, "min_new_tokens": GREEDY}
        said = model.generate(**probe, **options)
        found[f"{name}/tokens"] = said[:, -GREEDY:].contiguous()
    return found


def open_plainly(folder: str, with_code: bool = False, adapter: str | None = None) -> torch.nn.Module:
    """The model of a folder, in fp32 and evaluation mode, with an adapter of peft's or without. Raises ValueError where
    weights and class do not agree."""
    model, told = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=with_code, output_loading_info=True
    )
    left = {name: sorted(map(str, keys)) for name, keys in told.items() if keys}
    if left:
        raise ValueError(f"{folder} does not fit its class: {left}")
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("folder", "probes", "output", "--adapter"):
        parser.add_argument(name)
    parser.add_argument("--code", action="store_true")
    args = parser.parse_args()
    model = open_plainly(args.folder, args.code, args.adapter)
    save_file(computed(model, by_probe(load_file(args.probes))), args.output)
    if "moellava" in sys.modules:
        raise SystemExit("moellava took part in opening the folder")
