# SPDX-License-Identifier: Apache-2.0
"""Makes the demo's base models from the easy-VQA training split: `base/lm` and `base/tower`.

    python -m moellava.demo.make_base [--output-dir DIR] [--lm-steps N] [--tower-steps N] [--only lm|tower]

What it makes is kept in the package, so that the demo need not; `moellava demo --make-base` runs it again.
About 10 minutes on two cores. The test split is never opened. The last images of the training split are kept back
from the tower to report an accuracy.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moellava.demo.base_lm import make_tokenizer, save_lm, train_lm
from moellava.demo.base_tower import save_tower, train_tower
from moellava.demo.easy_vqa_data import train_images

HELD_OUT_IMAGES = 400


def main(argv: list[str] | None = None) -> int:
    """Runs the recipe."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "base")
    flags.add_argument("--lm-steps", type=int, default=400, help="batches of 192 questions")
    flags.add_argument("--tower-steps", type=int, default=3000, help="batches of 64 images")
    flags.add_argument("--only", choices=("lm", "tower"), help="make one of the two")
    args = flags.parse_args(argv)

    images = train_images()
    tokenizer = make_tokenizer(images)
    if args.only != "tower":
        save_lm(train_lm(images, tokenizer, steps=args.lm_steps), tokenizer, args.output_dir / "lm")
    if args.only != "lm":
        tower = train_tower(images, tokenizer, steps=args.tower_steps, held_out=HELD_OUT_IMAGES)
        save_tower(tower, args.output_dir / "tower")
    return 0


if __name__ == "__main__":
    sys.exit(main())
