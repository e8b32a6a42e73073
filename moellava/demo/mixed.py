# SPDX-License-Identifier: Apache-2.0
"""`moellava demo --task mixed`: was the MoE worth it, where the language model is too small for what there is to know?

A dense model learns the skills of `mixed_data.py` until more steps help little, and `moellava compare` goes on from it
with experts and without, with several seeds. docs/MOE.md, 'When upcycling pays', has what came of it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from moellava.demo.mixed_data import Sizes
from moellava.demo.runner import Journal, StepFailed, run, say, show_file
from moellava.recipes import words_of

TOWER = Path(__file__).parent / "base" / "tower"

VOCAB_ROWS = 1024
"""Rows of the embedding; the tokenizer fills fewer."""

FLAGS = {
    "version": "qwen",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "max_grad_norm": 1.0,
    "model_max_length": 512,
    "overlong": "error",
    "logging_steps": 100,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}
"""Flags of train.py that all runs share."""


@dataclass(frozen=True)
class Protocol:
    """One comparison, stated before it runs.

    Args:
        name: of its folder.
        sizes: how much there is to learn.
        hidden, units, layers: of the language model: width, intermediate units, decoder layers.
        copies: of each fact in the data file.
        epochs: of stage 2 over it.
        learning_rate: of stage 2; its peak, cosine afterwards.
        steps, further_rate: of the arms.
        experts: of each layer; a token visits two of them.
        batch_size: records a step.
        each: questions a skill.
        seeds: of data order and routers; each arm runs with each.
    """

    name: str
    sizes: Sizes = field(default_factory=Sizes)
    hidden: int = 32
    units: int = 32
    layers: int = 2
    copies: int = 20
    epochs: float = 7
    learning_rate: float = 5e-3
    steps: int = 400
    further_rate: float = 2e-3
    experts: int = 16
    batch_size: int = 32
    each: int = 500
    seeds: tuple[int, ...] = (1, 2)


DEFAULT = Protocol("mixed")
FULL = Protocol("mixed-full", seeds=(0, 1, 2))
SMOKE = Protocol(
    "mixed-smoke",
    sizes=Sizes(people=8, goods=8, words=8),
    copies=2,
    epochs=1,
    steps=2,
    experts=4,
    batch_size=4,
    each=8,
    seeds=(0,),
)

PROTOCOLS = {None: DEFAULT, "full": FULL, "smoke": SMOKE}
"""Flag of `moellava demo` -> what it runs."""


class MixedDemo:
    """One run of a protocol.

    Args:
        protocol: what is done.
        folder: of everything that it makes.
    """

    def __init__(self, protocol: Protocol, folder: Path):
        self.protocol, self.folder = protocol, folder
        self.journal = Journal(folder / "journal.json")

    def run(self) -> None:
        """All steps in order. Raises StepFailed."""
        self.make_stage2()
        say("\nWas it worth it? The same steps, operations and seconds without experts; and what routing contributes")
        command = self.comparing()
        self.journal.step("compare", command, partial(self.compare, command), self.clear("compare"))

    def make_stage2(self) -> None:
        """The first two steps. Raises StepFailed."""
        say("\nData, and a language model that has read nothing:")
        self.journal.step("base", asdict(self.protocol), self.prepare, self.clear("base"))
        say("\nStage 2: projector and language model learn all skills at once.")
        self.journal.step("stage2", self.stage2(), self.train, self.clear("stage2"))

    def clear(self, name: str) -> Callable[[], None]:
        """A function that removes what an earlier run with other settings has left."""
        return partial(shutil.rmtree, self.folder / name, ignore_errors=True)

    @property
    def stage2_folder(self) -> Path:
        """What all arms start from."""
        return self.folder / "stage2"

    @property
    def comparison(self) -> Path:
        """Runs, answers, table and picture of the comparison."""
        return self.folder / "compare"

    def data(self, name: str) -> Path:
        """A data file."""
        return self.folder / "base" / f"{name}.json"

    def prepare(self) -> None:
        """Writes the data, the questions, the tokenizer and the language model with random weights."""
        from moellava.demo.easy_vqa_data import train_images, write_records
        from moellava.demo.mixed_base import write_base
        from moellava.demo.mixed_data import World, questions, records, unseen_images

        protocol, images = self.protocol, train_images()
        world = World.of(protocol.sizes)
        for seed, name in enumerate(("stage2", "stage3")):
            written = records(world, images, protocol.sizes, protocol.copies, seed)
            write_records(written, self.data(name))
        for record in (written[0], written[-1]):
            say(f"     {json.dumps({**record, 'conversations': record['conversations'][:4]})}")
        asked = questions(world, unseen_images(), protocol.each, seed=0)
        path = self.folder / "base" / "own" / "questions.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
        write_base(world, images, protocol, self.folder / "base" / "lm")

    def common(self) -> dict[str, Any]:
        """Flags of all runs."""
        from moellava.demo.easy_vqa_data import images_folder

        batch = {"per_device_train_batch_size": self.protocol.batch_size}
        return {"image_folder": images_folder(), **FLAGS, **batch}

    def stage2(self) -> list[str]:
        """The command of stage 2."""
        protocol = self.protocol
        flags = {
            "model_name_or_path": self.folder / "base" / "lm",
            "image_tower": TOWER,
            "untrained_projector": True,
            "data_path": self.data("stage2"),
            "output_dir": self.stage2_folder,
            "num_train_epochs": protocol.epochs,
            "learning_rate": protocol.learning_rate,
            "seed": 0,
        }
        return [sys.executable, "-m", "moellava.train", *words_of(flags | self.common())]

    def comparing(self, *more: str) -> list[str]:
        """The command that compares, with further flags of `moellava compare`."""
        return [
            *("moellava", "compare", "--stage2", str(self.stage2_folder), "--data", str(self.data("stage3"))),
            *("--task", "own", "--data-folder", str(self.folder / "base"), "--output-dir", str(self.comparison)),
            *("--seeds", *map(str, self.protocol.seeds), *more),
            *("--", *words_of(self.further() | self.sparse())),
        ]

    def further(self) -> dict[str, Any]:
        """Flags of all arms."""
        return {"max_steps": self.protocol.steps, "learning_rate": self.protocol.further_rate, **self.common()}

    def sparse(self) -> dict[str, Any]:
        """Flags of the sparse arm."""
        return {"moe_mode": "dense", "num_experts": self.protocol.experts, "top_k_experts": 2}

    def train(self) -> None:
        """Stage 2."""
        run(self.stage2(), self.folder / "logs" / "stage2.log", os.cpu_count() or 1)

    def compare(self, command: list[str]) -> None:
        """Runs the comparison, and shows its table."""
        run(command, self.folder / "logs" / "compare.log", os.cpu_count() or 1, show=None)
        show_file(self.comparison / "compare.txt")


def run_mixed(protocol: Protocol, folder: Path, started: float) -> int:
    """Runs a protocol; 1 if a step failed.

    Args:
        protocol: what is done.
        folder: where everything goes, in a folder named as the protocol.
        started: when the clock started, in Unix seconds.
    """
    demo = MixedDemo(protocol, folder.resolve() / protocol.name)
    say(f"moellava demo --task mixed. Everything it makes is in {demo.folder}")
    try:
        demo.run()
    except StepFailed as failure:
        say(f"\n{failure}\nThe demo has stopped. Started again, it goes on from here.")
        return 1
    say(f"\n{round(time.time() - started)} s in all. Table, picture and numbers: {demo.comparison}")
    return 0
