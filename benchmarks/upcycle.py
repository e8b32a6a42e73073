# SPDX-License-Identifier: Apache-2.0
"""`moellava upcycle` beside reading its input and writing its output by safetensors alone.

    python benchmarks/upcycle.py --json upcycle.json [--model-path DIR] [--rounds 3]

Four experts in every second layer. Without --model-path: random weights of SmolLM2-135M's sizes, and a tokenizer of
32,000 entries (a tiny one would make the certificate's text three times as long). Each side is a fresh Python, so that
imports count; they take turns, and the smallest CPU time of each counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from real_runs import write_dense  # noqa: E402

SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
SIZES |= {"num_key_value_heads": 3, "tie_word_embeddings": True}
ROWS = 49_152

BASELINE = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
for path in Path(sys.argv[1]).glob("*.safetensors"):
    load_file(path)
for path in Path(sys.argv[2]).glob("*.safetensors"):
    save_file(load_file(path), Path(sys.argv[3]) / path.name)
"""


def timed(*words: object) -> dict[str, float]:
    """CPU and wall seconds of a fresh Python, and its largest memory in bytes."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *map(str, words)], env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu": cpu, "wall": time.perf_counter() - began}


def main() -> None:
    """Measures both sides in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--model-path", type=Path, help="a dense vision-language model")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as name:
        dense, sparse, copied = (
            args.model_path or write_dense(Path(name), ROWS, SIZES),
            Path(name) / "sparse",
            Path(name) / "copied",
        )
        for _ in range(args.rounds):
            shutil.rmtree(sparse, ignore_errors=True)
            flags = ("--num_experts", 4, "--moe_mode", "sparse")
            ours = timed("-m", "moellava.cli", "upcycle", "--model-path", dense, "--output-dir", sparse, *flags)
            shutil.rmtree(copied, ignore_errors=True)
            copied.mkdir()
            rounds.append({"ours": ours, "safetensors": timed("-c", BASELINE, dense, sparse, copied)})
        sizes = {
            side: sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            for side, folder in (("input", dense), ("output", sparse))
        }
    best = {side: {clock: min(each[side][clock] for each in rounds) for clock in ("cpu", "wall")} for side in rounds[0]}
    ratio = {clock: best["ours"][clock] / best["safetensors"][clock] for clock in ("cpu", "wall")}
    for side, clocks in best.items():
        print(f"{side:12} CPU {clocks['cpu']:.2f} s, wall {clocks['wall']:.2f} s")
    print(f"ratio        CPU {ratio['cpu']:.2f}, wall {ratio['wall']:.2f}")
    if args.json:
        content = {"machine": platform.platform(), "bytes": sizes, "rounds": rounds, "best": best, "ratio": ratio}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
