# SPDX-License-Identifier: Apache-2.0
"""Memory of a step with a large vocabulary: full logits, the rows that are trained in one piece, and those in chunks.

    python benchmarks/loss_memory.py --json loss_memory.json

A language model as wide as Qwen2-0.5B, of one layer, with a tied head, runs a forward and a backward over 2,048
positions of which a share is trained. Each case is a process of its own: what counts is the most memory that it ever
had, less what it had before the step and the gradients that the step leaves.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from moellava.constants import IGNORE_INDEX
from moellava.train.loss import SupervisedHead, supervised_positions

FULL = "full logits (transformers)"
WAYS = (FULL, "trained rows in one piece", "trained rows in chunks")
SHARES = (0.05, 0.5, 1.0)
MIB = 2**20


def step(way: str, share: float, length: int, vocabulary: int) -> dict[str, float]:
    """A forward and a backward in this process: MiB above weights and gradients, CPU seconds, the loss."""
    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 1, "num_attention_heads": 14}
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=vocabulary, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    model = Qwen2ForCausalLM(config).train()
    ids = torch.randint(0, vocabulary, (1, length))
    labels = torch.where(torch.arange(length) > length - 1 - share * (length - 1), ids, IGNORE_INDEX)
    head = SupervisedHead(model.lm_head, vocabulary)
    supervised = supervised_positions(labels)
    head.is_last = way == WAYS[2]
    before, began = psutil.Process().memory_info().rss, time.process_time()
    if way == FULL:
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    else:
        with head.only(supervised):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = head.loss_sum(logits, supervised.target_N) / len(supervised.target_N)
    loss.backward()
    seconds = time.process_time() - began
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    grown = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before - gradients
    return {"mib": round(grown / MIB), "cpu_seconds": round(seconds, 2), "loss": round(float(loss.detach()), 6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--length", type=int, default=2048, help="positions")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        way, share = arguments.case
        print(json.dumps(step(way, float(share), arguments.length, arguments.vocabulary)))
        return
    rows = []
    for share in SHARES:
        for way in WAYS:
            words = ["--case", way, str(share), "--length", arguments.length, "--vocabulary", arguments.vocabulary]
            command = [sys.executable, __file__, *map(str, words)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"supervised": share, "way": way} | json.loads(done.stdout.splitlines()[-1]))
            of_full = rows[-1]["mib"] / next(row["mib"] for row in rows if row["way"] == FULL)
            rows[-1]["of_full_logits"] = round(of_full, 3)
            print(
                "{supervised:5.0%}  {way:28} {mib:6} MiB  {of_full_logits:5.2f}  {cpu_seconds:6.2f} s".format(
                    **rows[-1]
                )
            )
    if arguments.json:
        machine = {"torch": torch.__version__, "length": arguments.length, "vocabulary": arguments.vocabulary}
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
