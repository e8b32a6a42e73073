# SPDX-License-Identifier: Apache-2.0
"""A step of decoding, and a picture that is asked about again: ours beside a dense model and transformers' own MoE.

    python benchmarks/generate.py --json generate.json

All models are Hugging Face's LLaVA with random weights and answer by `moellava.serve.generate`. Of the same active
parameters: a dense Qwen2 of k × units; ours, sparse in every layer; transformers' Qwen2-MoE with the weights of ours
and the shared expert that it cannot do without, of 8 units. 'Products' calls as many experts with as many rows as an
even load has, and nothing else.

The models take turns within one run, and ratios are those of the same turn: what else the machine does falls on all of
them. The median of the turns counts. CPU time is the sturdier of the two clocks where others use the machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, Qwen2MoeConfig

from moellava.model.features import FeatureCache
from moellava.moe import MoESpec, moe_layers, upcycle
from moellava.serve.ending import Ending
from moellava.serve.generate import Sampling, generate

SIZES = {
    "small": {"hidden": 256, "layers": 6, "heads": 4, "units": 344, "experts": 4, "k": 2},
    "as SmolLM2-135M": {"hidden": 576, "layers": 10, "heads": 9, "units": 768, "experts": 4, "k": 2},
    "wide": {"hidden": 1024, "layers": 6, "heads": 8, "units": 1408, "experts": 4, "k": 2},
    "8 experts": {"hidden": 576, "layers": 10, "heads": 9, "units": 768, "experts": 8, "k": 2},
}
"""Language models; `units` are those of an expert."""

VOCABULARY = 8192
IMAGE_TOKEN = 5
PROMPT = 16
"""Tokens of each prompt, of text alone where steps are measured."""

DENSE, THEIRS, OURS, PRODUCTS = "dense, k × units", "transformers' Qwen2-MoE", "ours", "products"

TOWER = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
TOWER |= {"image_size": 224, "patch_size": 16}
"""Of the model that is asked about a picture: CLIP ViT-B/16, 196 patches."""

ASKED = 8


class Products(nn.Module):
    """The matrix products of a sparse MLP at an even load; what comes out means nothing."""

    def __init__(self, experts: list[nn.Module], k: int):
        super().__init__()
        self.experts, self.k = experts, k  # a plain list: they are another module's

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        rows = len(x_TD) * self.k
        share = max(rows // len(self.experts), 1)
        for expert in self.experts[: min(rows, len(self.experts))]:
            expert(x_TD[:share])
        return x


def llava(text: Any, tower: dict[str, int] | None = None) -> Any:
    """A random LLaVA of a text config."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    vision = CLIPVisionConfig(**(tower or small | {"image_size": 28, "patch_size": 14}))
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config).eval()


def with_weights_of(theirs: Any, ours: Any) -> Any:
    """Qwen2-MoE with the weights of ours, and a shared expert of zeros: it routes alike, and says the same."""
    state = {
        name: value for name, value in ours.state_dict().items() if "language_model" not in name or ".mlp." not in name
    }
    for index, layer in moe_layers(ours):
        place = f"model.language_model.layers.{index}.mlp."
        inputs = [torch.cat([expert.gate_proj.weight, expert.up_proj.weight]) for expert in layer.experts]
        state[f"{place}gate.weight"] = layer.router.weight
        state[f"{place}experts.gate_up_proj"] = torch.stack(inputs)
        state[f"{place}experts.down_proj"] = torch.stack([expert.down_proj.weight for expert in layer.experts])
    lacking, unknown = theirs.load_state_dict(state, strict=False)
    assert not unknown and all(".shared_expert" in name for name in lacking)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".shared_expert" in name:
                parameter.zero_()
        ids = prompts(2)["input_ids"]
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-4, rtol=1e-4)
    return theirs


def models_of(size: dict[str, int]) -> dict[str, Any]:
    """What is compared, by name."""
    torch.manual_seed(0)
    experts, k, units = size["experts"], size["k"], size["units"]
    shape = {"hidden_size": size["hidden"], "num_hidden_layers": size["layers"], "vocab_size": VOCABULARY}
    shape |= {"num_attention_heads": size["heads"], "num_key_value_heads": size["heads"]}
    routed = {"num_experts": experts, "num_experts_per_tok": k, "moe_intermediate_size": units}
    routed |= {"shared_expert_intermediate_size": 8, "norm_topk_prob": True}
    spec = MoESpec(moe_mode="dense", num_experts=[experts], top_k_experts=k, init="noise")
    ours = upcycle(llava(Qwen2Config(intermediate_size=units, **shape)), spec).eval()
    products = copy.deepcopy(ours)
    for index, layer in moe_layers(products):
        products.get_decoder().layers[index].mlp = Products(list(layer.experts), k)
    return {
        DENSE: llava(Qwen2Config(intermediate_size=k * units, **shape)),
        THEIRS: with_weights_of(llava(Qwen2MoeConfig(intermediate_size=units, **routed, **shape)), ours),
        OURS: ours,
        PRODUCTS: products,
    }


def never_ends() -> Ending:
    """An ending that no token is."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    return Ending(tokenizer, "")


def timed(model: Any, batch: dict[str, Tensor], tokens: int, features: FeatureCache | None = None) -> tuple:
    """CPU and wall seconds of an answer of so many tokens."""
    options = {"placeholders": [IMAGE_TOKEN], "pad_token_id": 0, "features": features}
    cpu, wall = time.process_time(), time.perf_counter()
    generate(model, batch, never_ends(), Sampling(max_new_tokens=tokens), **options)
    return time.process_time() - cpu, time.perf_counter() - wall


def prompts(batch_size: int) -> dict[str, Tensor]:
    """Random words."""
    ids = torch.randint(IMAGE_TOKEN + 1, VOCABULARY, (batch_size, PROMPT))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def steps(name: str, size: dict[str, int], batches: list[int], rounds: int, tokens: int) -> list[dict]:
    """One row per model and batch: milliseconds of a step, as multiples of the dense model's, tokens a second."""
    compared, rows = models_of(size), []
    for batch_size in batches:
        batch, took = prompts(batch_size), {model: [] for model in compared}
        for turn in range(rounds + 1):
            for model in compared:
                short, long = (timed(compared[model], batch, length) for length in (1, tokens + 1))
                if turn:  # the first one finds memory and caches cold
                    took[model].append([(after - before) / tokens for before, after in zip(short, long, strict=True)])
        for model, turns in took.items():
            row: dict[str, Any] = {"size": name, **size, "batch": batch_size, "model": model}
            for clock, place in (("cpu", 0), ("wall", 1)):
                ratios = [one[place] / dense[place] for one, dense in zip(turns, took[DENSE], strict=True)]
                row[f"{clock}_ms"] = round(1e3 * median(one[place] for one in turns), 2)
                row[f"{clock}_times_dense"] = round(median(ratios), 2)
            row["tokens_per_cpu_second"] = round(1e3 * batch_size / row["cpu_ms"], 1)
            rows.append(row)
    return rows


def asked_again(rounds: int) -> list[dict]:
    """One row with and one without what is kept: seconds until the first tokens of a picture asked `ASKED` times."""
    text = Qwen2Config(hidden_size=256, intermediate_size=688, num_hidden_layers=4, vocab_size=VOCABULARY)
    model = llava(text, TOWER)
    patches = (TOWER["image_size"] // TOWER["patch_size"]) ** 2
    batch = prompts(1)
    ids = torch.cat([torch.full((1, patches), IMAGE_TOKEN), batch["input_ids"]], dim=1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["pixel_values"] = torch.randn(1, 3, TOWER["image_size"], TOWER["image_size"])
    calls: list[int] = []
    model.model.vision_tower.register_forward_pre_hook(lambda *_: calls.append(1))
    rows = []
    for name, make in (("encoded each time", lambda: None), ("kept", FeatureCache)):
        took, calls[:] = [], []
        for _ in range(rounds):
            features = make()
            took.append([sum(times) for times in zip(*(timed(model, batch, 1, features) for _ in range(ASKED)))])
        cpu, wall = (round(1e3 * median(one[place] for one in took), 1) for place in (0, 1))
        rows.append({"features": name, "tower_calls": len(calls) // rounds, "cpu_ms": cpu, "wall_ms": wall})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7, help="turns of every model (7)")
    parser.add_argument("--tokens", type=int, default=24, help="steps of a turn (24)")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    rows = []
    for name in arguments.sizes:
        found = steps(name, SIZES[name], arguments.batches, arguments.rounds, arguments.tokens)
        rows += found
        print(name, SIZES[name])
        for row in found:
            print(
                f"  batch {row['batch']}  {row['model']:23} CPU {row['cpu_ms']:5.1f} ms, {row['cpu_times_dense']:.2f} "
                f"× dense; wall {row['wall_ms']:6.1f} ms, {row['wall_times_dense']:.2f} ×; "
                f"{row['tokens_per_cpu_second']:7.1f} tokens a CPU second",
                flush=True,
            )
    pictures = asked_again(arguments.rounds)
    for row in pictures:
        print(f"asked {ASKED} times, {row['features']:18} {row['tower_calls']} tower calls, CPU {row['cpu_ms']} ms")
    if arguments.json:
        machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
        machine |= {"transformers": transformers.__version__, "rounds": arguments.rounds, "threads": arguments.threads}
        content = {"machine": machine, "steps": rows, "pictures": pictures}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
