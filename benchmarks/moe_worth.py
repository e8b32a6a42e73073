# SPDX-License-Identifier: Apache-2.0
"""When do experts pay? Ways of upcycling beside dense controls, where the language model is too small for its task.

    python benchmarks/moe_worth.py --json moe_worth.json

The data, the language model and stage 2 are those of `moellava demo --task mixed` (docs/MOE.md, 'When upcycling pays').
From that one stage-2 folder `moellava compare` trains an MoE of four experts, its dense control, and a variant for each
row of `VARIANTS`; each dense one is a control that the MoE has to beat, too. What is complete is not made again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moellava.cli import main as moellava
from moellava.commands.compare import RESULT
from moellava.demo.mixed import DEFAULT, SMOKE, MixedDemo

DECODER = "wg mlp self_attn embed_tokens input_layernorm post_attention_layernorm norm"
"""All modules of the decoder; what trains in stage 3 is the routers and the experts alone."""

VARIANTS = {
    # what trains
    "decoder-trains": ("moe", f"--train_modules {DECODER}"),
    # how experts start
    "noise": ("moe", "--init noise --init_noise 0.1"),
    "drop": ("moe", "--init drop --init_drop_ratio 0.5"),
    # how many there are, and how many a token visits
    "8-experts": ("moe", "--num_experts 8"),
    "16-experts": ("moe", "--num_experts 16"),
    "top-1": ("moe", "--top_k_experts 1"),
    # how they are balanced
    "no-balance": ("moe", "--router_balance none"),
    # how fast they learn, and the dense model at the same rates
    "rate-5e-3": ("moe", "--learning_rate 5e-3"),
    "dense-rate-5e-3": ("dense", "--learning_rate 5e-3"),
    "rate-1e-2": ("moe", "--learning_rate 1e-2"),
    "dense-rate-1e-2": ("dense", "--learning_rate 1e-2"),
    "16-rate-5e-3": ("moe", "--num_experts 16 --learning_rate 5e-3"),
    # for how long
    "long": ("moe", "--max_steps 1200"),
    "dense-long": ("dense", "--max_steps 1200"),
}
"""Name -> (arm that it is like, flags in place of that arm's)."""


def compared(demo: MixedDemo, names: Sequence[str], seeds: Sequence[int], folder: Path) -> int:
    """Trains, asks and tells; the exit status of `moellava compare`."""
    variants = [word for name in names for word in ("--variant", name, *VARIANTS[name])]
    own = ["--arms", "dense", "--output-dir", str(folder), "--seeds", *map(str, seeds)]
    return moellava(demo.comparing(*own, *variants)[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("moe_worth"), help="of everything that is made")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help="variants")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each arm is trained once with each")
    parser.add_argument("--smoke", action="store_true", help="a few steps, but for `long`; scores mean nothing")
    parser.add_argument("--json", type=Path, help="file for the result of `moellava compare`")
    arguments = parser.parse_args()
    protocol = replace(SMOKE if arguments.smoke else DEFAULT, experts=4)
    demo = MixedDemo(protocol, arguments.folder.resolve())
    demo.make_stage2()
    output = demo.folder / "variants"
    status = compared(demo, arguments.only, arguments.seeds, output)
    if arguments.json and not status:
        shutil.copyfile(output / RESULT, arguments.json)
    return status


if __name__ == "__main__":
    sys.exit(main())
