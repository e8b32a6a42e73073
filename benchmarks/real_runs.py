# SPDX-License-Identifier: Apache-2.0
"""What benchmarks of real runs share: a random dense model, and a run in processes that each leave what they measured.

A script that calls `run_of` is started again with `--worker` and the flags of `train.py`; there it calls `leave`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "tests" / "golden" / "tokenizers" / "mistral.tar.xz"

PLACE = "BENCHMARK_RUN"
"""Environment variable: the folder in which processes leave what they measured."""


def write_dense(folder: Path, rows: int, sizes: Mapping[str, int]) -> Path:
    """A random dense vision-language model with a tokenizer of 32,000 entries.

    Args:
        rows: of its embedding.
        sizes: of its language model, a Llama.
    """
    from tests import tiny
    from tests.archives import unpack

    unpack(TOKENIZER, folder)
    tokenizer = folder / TOKENIZER.name.removesuffix(".tar.xz")
    tiny.write_base(folder / "llm", "llama", tokenizer, rows=rows, **sizes)
    tiny.compose_tiny(folder / "llm", tiny.write_clip(folder / "tower"), "v1").save(folder / "dense")
    return folder / "dense"


def words_of(flags: Mapping[str, Any]) -> list[str]:
    """Flags as they stand on a command line."""
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def run_of(script: str, flags: Mapping[str, Any], processes: int, folder: Path, **environment: str) -> list[Any]:
    """What each process of a run has left; one thread each. Ends the program where the run fails."""
    run = folder / "run"
    run.mkdir()
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(several if processes > 1 else []), script, "--worker"]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), PLACE: str(run)}
    words = words_of({**flags, "output_dir": run / "out"})
    done = subprocess.run([*command, *words], env=os.environ | own | environment, cwd=ROOT, capture_output=True)
    if done.returncode:
        sys.exit(done.stderr.decode()[-4000:])
    found = [json.loads((run / f"rank-{rank}").read_text()) for rank in range(processes)]
    shutil.rmtree(run)
    return found


def leave(measured: Any) -> None:
    """Leaves what this process of a run measured, for `run_of`."""
    (Path(os.environ[PLACE]) / f"rank-{os.environ.get('RANK', 0)}").write_text(json.dumps(measured))
