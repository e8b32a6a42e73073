# SPDX-License-Identifier: Apache-2.0
"""What `moellava plan` says of memory, beside what a run takes: at 1, 2 and 4 processes, on the CPU.

    python benchmarks/plan.py --json plan.json          # --only 'stage 3', --processes 1 2

Each run is the real `train.py` under `torchrun`: a random language model of 42 million parameters in fp32, records of
256 tokens, two optimizer steps (four under ZeRO-3, which has learnt the order of the model by the third). Measured is
the most memory of its own that a process had from the second step on (VmHWM, reset before it, less mapped files), less
what it had when everything was imported and no model was there. What is freed is given back at once, as the plan
reckons; a run on the CPU keeps it (`moellava.heap`), and with --kept so do these: free blocks between those in use are
then measured, too.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
import tempfile
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from real_runs import leave, run_of, words_of  # noqa: E402

MODEL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
MODEL |= {"num_key_value_heads": 8}
ROWS = 16_000
LENGTH = 256

COMMON = {"model_max_length": LENGTH, "max_steps": 2, "learning_rate": 1e-5, "save_strategy": "no", "report_to": "none"}
COMMON |= {"per_device_train_batch_size": 4, "activation_checkpointing": False, "skip_dry_save": True}
MOE = {"moe_enable": True, "moe_mode": "sparse", "num_experts": 4}

SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 704, "decoder_sparse_step": 2}
SPARSE |= {"shared_expert_intermediate_size": 704, "mlp_only_layers": []}
"""Of a language model that is sparse of itself."""

ALL = "all"
"""In place of a number of processes: those of the run."""

CASES: dict[str, dict[str, Any]] = {
    "stage 2, native": {},
    "stage 2, native, checkpoints": {"activation_checkpointing": True},
    "stage 2, ZeRO-1": {"deepspeed": "scripts/zero1.json"},
    "stage 2, ZeRO-2": {"deepspeed": "scripts/zero2.json"},
    "stage 2, ZeRO-3": {"deepspeed": "scripts/zero3.json", "max_steps": 4},
    "stage 2, FSDP2": {"fsdp_size": ALL},
    "sparse of itself, ZeRO-2": {"deepspeed": "scripts/zero2.json", "model_name_or_path": "sparse"},
    "sparse of itself, FSDP2": {"fsdp_size": ALL, "model_name_or_path": "sparse"},
    "sparse of itself, FSDP2, ep_size 2": {"fsdp_size": ALL, "ep_size": 2, "model_name_or_path": "sparse"},
    "stage 3, ZeRO-2": {"deepspeed": "scripts/zero2.json"} | MOE,
    "stage 3, ZeRO-2, ep_size 2": {"deepspeed": "scripts/zero2.json", "ep_size": 2} | MOE,
}


def write_inputs(folder: Path) -> dict[str, Path]:
    """A dense vision-language model, one that is sparse of itself, and their records."""
    import shutil

    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    from moellava.vlm import VLM
    from tests import tiny

    tokenizer = tiny.write_tokenizer(folder / "tokenizer")
    tiny.write_base(folder / "llm", "qwen", tokenizer, rows=ROWS, **MODEL)
    config = Qwen2MoeConfig(vocab_size=ROWS, tie_word_embeddings=False, **MODEL, **SPARSE)
    Qwen2MoeForCausalLM(config).save_pretrained(folder / "sparse-llm")
    shutil.copytree(tokenizer, folder / "sparse-llm", dirs_exist_ok=True)
    tower = tiny.write_clip(folder / "tower")
    for llm, name in (("llm", "model"), ("sparse-llm", "sparse")):
        vlm: VLM = tiny.compose_tiny(folder / llm, tower, "qwen")
        vlm.save(folder / name, meta={"stage": "finetune"})
    said = "it is a red circle " * LENGTH
    records = [tiny.record(number, "what is it?", f"{number} {said}") for number in range(128)]
    (folder / "data.json").write_text(json.dumps(records))
    return {"model_name_or_path": folder / "model", "data_path": folder / "data.json"}


def told(flags: dict[str, Any], processes: int) -> dict[str, float]:
    """Bytes of one process by `moellava plan`, by part, and in all."""
    from moellava.cli import main

    engine = {} if "deepspeed" in flags else {"engine": "native"}
    out = io.StringIO()
    with redirect_stdout(out):
        main(["plan", "--gpus", str(processes), "--device", "cpu", "--hbm", "1000", "--json", *words_of(flags)])
    rows = json.loads(out.getvalue())["rows"]
    rows = [row for row in rows if row["layout"]["deepspeed"] != bool(engine)]
    rows = [row for row in rows if (row["layout"]["fsdp"] > 1) == ("fsdp_size" in flags)]
    return rows[0]["memory"] | {"in all": rows[0]["total"]}


def measured(flags: dict[str, Any], processes: int, folder: Path, is_kept: bool) -> list[float]:
    """Bytes of each process of a run, which keeps what it frees, or gives it back."""
    environment = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}
    environment |= {"PLAN_KEEPS": "1"} if is_kept else {}
    return run_of(__file__, flags | {"overlong": "truncate"}, processes, folder, **environment)


def worker(words: list[str]) -> None:
    """One process of a run; leaves its number in a file."""
    from transformers import TrainerCallback

    from moellava import heap
    from moellava.train.arguments import parse_arguments
    from moellava.train.train import StageTrainer, train

    if "--deepspeed" in words:
        import deepspeed  # noqa: F401  (as the run will)

    class Meter(TrainerCallback):
        before = status("RssAnon")

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
            if state.global_step == state.max_steps:
                leave(status("VmHWM") - status("RssFile") - self.before)

    made = StageTrainer.__init__

    def watched(self, **kwargs):
        made(self, **kwargs)
        self.add_callback(Meter)

    StageTrainer.__init__ = watched
    if "PLAN_KEEPS" not in os.environ:
        heap.kept = nullcontext
    train(*parse_arguments(words))


def status(name: str) -> float:
    """Bytes, by a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    """Measures each case and prints a line for it."""
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--only", default="", help="cases whose names hold these words")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--kept", action="store_true", help="processes keep the memory that they free")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        inputs = write_inputs(Path(name))
        for case, own in CASES.items():
            for processes in args.processes:
                flags = COMMON | inputs | own
                if args.only not in case or processes % flags.get("ep_size", 1):
                    continue
                if flags.get("fsdp_size") == ALL:
                    flags["fsdp_size"] = processes
                if flags.get("fsdp_size") == 1:
                    continue
                if "model_name_or_path" in own:
                    flags["model_name_or_path"] = Path(name) / own["model_name_or_path"]
                plan, found = told(flags, processes), measured(flags, processes, Path(name), args.kept)
                ratio = plan["in all"] / max(found)
                rows.append({"case": case, "processes": processes, "told": plan, "measured": found, "ratio": ratio})
                shown = ", ".join(f"{part} {value / 1e6:.0f}" for part, value in plan.items())
                print(f"{case:32} {processes}  {ratio:.2f}  measured {max(found) / 1e6:.0f} MB; {shown}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": platform.platform(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
