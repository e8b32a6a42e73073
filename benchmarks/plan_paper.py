# SPDX-License-Identifier: Apache-2.0
"""What `moellava plan` says of models that no machine here could hold: the table 'On paper' of docs/SCALE.md.

    python benchmarks/plan_paper.py --json plan_paper.json      # --only "64 experts, stage 3"

LLaVA-1.5-7B, dense and with experts in every second layer, and the same over a language model of the sizes of
Qwen3-30B-A3B. Samples of 2,048 positions of which 512 are trained on, four a process, checkpoints, bf16, H100. Weights
are neither made nor read.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from transformers import LlavaConfig, Qwen3MoeConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moellava.cli import main as moellava  # noqa: E402
from moellava.plan.report import called  # noqa: E402
from moellava.train.memory import Layout  # noqa: E402
from tests import tiny  # noqa: E402

COMMON = ["--tokens", "2048", "--supervised", "512", "--per_device_train_batch_size", "4", "--bf16", "True"]
COMMON += ["--activation_checkpointing", "True", "--device", "h100", "--json"]

WIDE = {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48}
WIDE |= {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151_936}
WIDE |= {"num_experts": 128, "num_experts_per_tok": 8, "max_position_embeddings": 40_960}
"""Qwen3-30B-A3B."""

CONFIGS = {"7B": LlavaConfig, "30B": lambda: LlavaConfig(text_config=Qwen3MoeConfig(**WIDE))}

CASES: dict[str, tuple[str, list[int], list[str]]] = {
    "dense, stage 2": ("7B", [8], []),
    "4 experts, stage 3": ("7B", [8], ["--moe_enable", "True", "--num_experts", "4"]),
    "64 experts, stage 3": ("7B", [64, 1024], ["--moe_enable", "True", "--num_experts", "64"]),
    "30B, stage 2": ("30B", [8, 64], []),
}
"""Row -> model, numbers of GPUs, flags."""

PARTS = ("weights", "gradients", "optimizer", "activations", "gathered")


def line_of(case: str, row: dict[str, Any], is_chosen: bool) -> str:
    """A row of the table: GB of one process, thousands of tokens per second of all."""
    layout, memory = row["layout"], row["memory"]
    parts = [f"{memory[part] / 1e9:.1f}" if memory.get(part) else "–" for part in PARTS]
    total = f"{row['total'] / 1e9:.1f}"
    bounds = [f"{row[bound] / 1e3:,.0f}" if row["samples"] else "–" for bound in ("flops_bound", "bandwidth_bound")]
    total = f"**{total}**" if is_chosen else total if row["samples"] else f"over {total}"
    cells = [case, f"{layout['processes']:,}", called(Layout(**layout)), str(layout["ep_size"]), *parts, total, *bounds]
    return f"| {' | '.join(cells)} |"


def planned(folder: Path, gpus: int, flags: list[str]) -> dict[str, Any]:
    """What the command says."""
    out = io.StringIO()
    with redirect_stdout(out):
        moellava(["plan", "--model", str(folder), "--gpus", str(gpus), *COMMON, *flags])
    return json.loads(out.getvalue())


def main() -> None:
    """Prints rows of the table, and the seconds that each plan took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for all rows")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    arguments = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as name:
        for case in arguments.only:
            model, numbers, flags = CASES[case]
            folder = Path(name) / model
            CONFIGS[model]().save_pretrained(folder)
            tiny.write_tokenizer(folder)  # of which nothing is read
            for gpus in numbers:
                began = time.process_time()
                told = planned(folder, gpus, flags)
                seconds = time.process_time() - began
                for row in told["rows"]:
                    print(line_of(case, row, row == told["cheapest"]))
                print(f"{case}, {gpus} GPUs: {seconds:.0f} CPU seconds", flush=True)
                found.append({"case": case, "gpus": gpus, "cpu_seconds": seconds} | told)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
