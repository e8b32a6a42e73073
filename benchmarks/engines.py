# SPDX-License-Identifier: Apache-2.0
"""What an engine costs: a step of stage 2 by the native engine, DeepSpeed's ZeRO and FSDP2, in real runs of `train.py`.

    python benchmarks/engines.py --json engines.json          # --processes 1 2 4, --only ZeRO-2

A language model of 256 hidden units, 6 layers and a vocabulary of 32,000 trains on questions about an image, eight a
process and step, in fp32, one thread a process. A step is all of it: data, forward, backward, sums over processes and
optimizer. Engines take turns, each in a run of its own; a run's step is the median of those after the fourth, and of an
engine's runs the fastest counts, since what else the machine does only adds to it. *auto* is ZeRO-2 with transformers'
`"reduce_bucket_size": "auto"` (the hidden size squared) and `"overlap_comm": true`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from real_runs import leave, run_of, write_dense  # noqa: E402

MODEL = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8}
MODEL |= {"num_key_value_heads": 8}
ROWS, BATCH, SKIPPED = 32_000, 8, 4

NATIVE = "native"
AUTO = "auto.json"
"""In place of a name: a file beside the inputs."""

ALL = "all"
"""In place of a number of processes: those of the run."""

ENGINES: dict[str, dict[str, Any]] = {
    NATIVE: {},
    "ZeRO-1": {"deepspeed": "zero1"},
    "ZeRO-2": {"deepspeed": "zero2"},
    "ZeRO-2, auto": {"deepspeed": AUTO},
    "ZeRO-3": {"deepspeed": "zero3"},
    "FSDP2": {"fsdp_size": ALL},
}
COMMON = {"version": "v1", "learning_rate": 1e-3, "save_strategy": "no", "skip_dry_save": True, "report_to": "none"}
COMMON |= {"per_device_train_batch_size": BATCH, "use_cpu": True}


def write_inputs(folder: Path) -> dict[str, Path]:
    """A random dense vision-language model, its pictures and records, and the settings called *auto*."""
    import numpy as np
    from PIL import Image

    from moellava.train.deepspeed.named import settings_named
    from tests import tiny

    dense = write_dense(folder, ROWS, MODEL)
    random = np.random.default_rng(0)
    records = []
    for number in range(64):
        Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"{number}.png")
        asked, said = "<image>\nwhat is shown in this picture?", "a red circle " * (1 + number % 4)
        records.append(tiny.record(number, asked, said, image=f"{number}.png"))
    (folder / "data.json").write_text(json.dumps(records))
    settings = json.loads(Path(str(settings_named("zero2"))).read_text())
    settings["zero_optimization"] |= {"reduce_bucket_size": "auto", "overlap_comm": True}
    (folder / AUTO).write_text(json.dumps(settings))
    return {"model_name_or_path": dense, "data_path": folder / "data.json", "image_folder": folder}


def timed(flags: dict[str, Any], processes: int, steps: int, folder: Path) -> dict[str, float]:
    """Seconds of a step of the slowest process, by CPU and by the clock."""
    given = {ALL: processes, AUTO: folder / AUTO}
    flags = {name: given.get(value, value) for name, value in flags.items()}
    found = run_of(__file__, flags | {"max_steps": steps + SKIPPED}, processes, folder)
    return {name: max(one[name] for one in found) for name in ("cpu", "wall")}


def worker(words: list[str]) -> None:
    """One process of a run; leaves the medians of its steps in a file."""
    from transformers import TrainerCallback, trainer

    from moellava.train.parsing import parse_arguments
    from moellava.train.train import train

    ended: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ended.append((time.process_time(), time.perf_counter()))

    trainer.DEFAULT_CALLBACKS.append(Clock)
    train(*parse_arguments(words))
    columns = zip(*ended[SKIPPED - 1 :], strict=True)
    medians = [statistics.median(b - a for a, b in zip(one, one[1:], strict=False)) for one in columns]
    leave(dict(zip(("cpu", "wall"), medians, strict=True)))


def main() -> None:
    """Measures each engine and prints a line for it."""
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--only", default="", help="engines whose names hold these words, beside the native one")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    chosen = {name: flags for name, flags in ENGINES.items() if name == NATIVE or args.only in name}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = write_inputs(folder)
        for processes in args.processes:
            found: dict[str, list[dict[str, float]]] = {}
            for _ in range(args.rounds):
                for engine, own in chosen.items():
                    if "fsdp_size" not in own or processes > 1:
                        step = timed(COMMON | inputs | own, processes, args.steps, folder)
                        found.setdefault(engine, []).append(step)
            least = {engine: {key: min(one[key] for one in all_) for key in all_[0]} for engine, all_ in found.items()}
            for engine, step in least.items():
                ratios = {key: value / least[NATIVE][key] for key, value in step.items()}
                rows.append({"engine": engine, "processes": processes, "step": step, "of native": ratios})
                told = ", ".join(f"{key} {value:.3f} s ({ratios[key]:.2f})" for key, value in step.items())
                print(f"{engine:16} {processes}  {told}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": platform.platform(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
