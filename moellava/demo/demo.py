# SPDX-License-Identifier: Apache-2.0
"""The demo: from base models to a sparse vision-language model that answers questions about pictures.

Run it as `moellava demo`, or in a clone as `bash scripts/demo.sh`, which makes the environment first. Each step is one
command, printed before it runs, that can be repeated by hand. Started again, the demo goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from moellava.demo.recipes import COMMON_FLAGS, STAGE_FLAGS, Recipe
from moellava.demo.runner import Journal, StepFailed, run, run_side_by_side, say, show_file
from moellava.errors import UserError

BASE = Path(__file__).parent / "base"
STAGES = {
    "stage1": "Stage 1, plain: the projector learns to turn a picture into words the language model knows.",
    "stage2": "Stage 2, SFT: projector and language model learn to answer all questions about a picture.",
    "stage3": "Stage 3, MoE: layers 0 and 2 become 4 experts with a router; experts and routers learn.",
}
SCORED = {"stage2": "stage 2, dense", "stage3": "stage 3, 4 experts, top-2"}
CONDITIONS = {"accuracy": (), "accuracy_shuffled_images": ("--shuffle-images",)}
"""Key in scores.json -> flags of `moellava eval`."""

SET_BY_COMPARE = {"--output_dir", "--model_name_or_path", "--data_path", "--seed", "--moe_enable"}
"""Flags of a stage that `moellava compare` gives each run."""

COMPARED = 3000
"""Questions that the arms of the comparison are asked."""

SCORE_LINE = re.compile(r"easy-vqa |  \S+ +[\d.]+%")
QUESTION = "what color is the shape?"


class Demo:
    """One run of the demo.

    Args:
        recipe: how long each stage trains.
        folder: where `scores.json` goes, and in a folder named as the recipe, data, stages and logs.
        processes: training processes, one a core or an accelerator.
    """

    def __init__(self, recipe: Recipe, folder: Path, processes: int):
        self.recipe = recipe
        self.folder = folder / recipe.name
        self.scores_file = folder / "scores.json"
        self.processes = processes
        self.cores = os.cpu_count() or 1
        self.base = BASE
        self.journal = Journal(self.folder / "journal.json")

    def run(self, make_base: bool) -> dict[str, dict[str, float]]:
        """All steps in order; the scores of stages 2 and 3."""
        if make_base:
            say("Base models, made anew from the training split:")
            self.base = self.folder / "base"
            made = [sys.executable, "-m", "moellava.demo.make_base", "--output-dir", str(self.base)]
            run(made, self.log("base"), self.cores)
        base = fingerprint(self.base)
        for stage, purpose in STAGES.items():
            say(f"\n{purpose}")
            flags = self.flags(stage)
            settings = [base, getattr(self.recipe, stage), flags]
            self.journal.step(stage, settings, partial(self.train, stage, flags), self.clear(stage))
        scores = {}
        for stage in SCORED:
            say(f"\nScores of {stage} on the test split, with the right images and with images of other questions")
            commands = self.scoring(stage)
            self.journal.step(f"{stage}-scores", list(commands.values()), partial(self.score, commands), lambda: None)
            scores[stage] = {key: self.result(stage, key)["accuracy"] for key in CONDITIONS}
        say("\nWhere the tokens of stage 3 go, and its run as a page")
        for name, command in self.looking().items():
            self.journal.step(name, command, partial(self.look, name, command), lambda: None)
        say("\nWas it worth it? The same steps, operations and seconds without experts; and what routing contributes")
        compared = self.comparing()
        clear = partial(shutil.rmtree, self.comparison, ignore_errors=True)
        self.journal.step("compare", compared, partial(self.compare, compared), clear)
        return scores

    def log(self, name: str) -> Path:
        """Where a command's output is kept."""
        return self.folder / "logs" / f"{name}.log"

    def clear(self, name: str) -> Callable[[], None]:
        """A function that removes what an earlier run with other settings has left in a subfolder."""
        return partial(shutil.rmtree, self.folder / name, ignore_errors=True)

    def data(self, stage: str) -> Path:
        """The data file of a stage."""
        return self.folder / "data" / f"{stage}.json"

    def write_data(self, stage: str) -> None:
        """The training split in LLaVA's JSON format: captions for stage 1, conversations for stages 2 and 3."""
        from moellava.demo.easy_vqa_data import caption_records, conversation_records, train_images, write_records

        images, copies = train_images(), getattr(self.recipe, stage).copies
        if stage == "stage1":
            records = caption_records(images, copies)
        else:
            records = conversation_records(images, copies, seed=int(stage.removeprefix("stage")))
        write_records(records, self.data(stage))
        say(f"   {short(self.data(stage))}: {len(records)} records of easy-VQA's training split, such as")
        say(f"     {json.dumps({**records[0], 'conversations': records[0]['conversations'][:4]})}")

    def flags(self, stage: str) -> list[str]:
        """The flags of training for a stage."""
        from moellava.demo.easy_vqa_data import images_folder

        recipe = getattr(self.recipe, stage)
        number = list(STAGES).index(stage)
        start = [self.base / "lm", self.folder / "stage1", self.folder / "stage2"][number]
        flags = {
            "deepspeed": "zero2",
            "model_name_or_path": start,
            **({"image_tower": self.base / "tower"} if stage == "stage1" else {}),
            "data_path": self.data(stage),
            "image_folder": images_folder(),
            "output_dir": self.folder / stage,
            **STAGE_FLAGS[stage],
            "per_device_train_batch_size": recipe.batch_size // self.processes,
            "learning_rate": recipe.learning_rate,
            "max_steps": recipe.max_steps,
            **COMMON_FLAGS,
        }
        return [word for name, value in flags.items() for word in (f"--{name}", short(value))]

    def train(self, stage: str, flags: list[str]) -> None:
        """Writes a stage's data and runs it through the deepspeed launcher."""
        self.write_data(stage)
        launcher = ["deepspeed", "--num_accelerators", str(self.processes), "--master_port", str(free_port())]
        run([*launcher, "--module", "moellava.train", *flags], self.log(stage), max(1, self.cores // self.processes))

    def report(self, stage: str, key: str) -> Path:
        """Where `moellava eval` writes one score with its prompt, settings and versions."""
        return self.folder / "scores" / f"{stage}-{key}.json"

    def result(self, stage: str, key: str) -> dict:
        """One score, as `moellava eval` has written it."""
        return json.loads(self.report(stage, key).read_text(encoding="utf-8"))

    def scoring(self, stage: str) -> dict[Path, list[str]]:
        """The two commands that score a stage, by log file."""
        limit = ["--limit", str(self.recipe.limit)] if self.recipe.limit else []
        model = ["--model-path", short(self.folder / stage), *limit]
        return {
            self.log(f"{stage}-{key}"): [
                *("moellava", "eval", "--benchmark", "easy-vqa", *model, *flags),
                *("--output", short(self.report(stage, key))),
            ]
            for key, flags in CONDITIONS.items()
        }

    def score(self, commands: dict[Path, list[str]]) -> None:
        """Runs the two commands at once, each on half of the cores."""
        for said in run_side_by_side(commands, max(1, self.cores // len(commands))).values():
            say("\n".join(f"     {line}" for line in said.splitlines() if SCORE_LINE.match(line)))

    def looking(self) -> dict[str, list[str]]:
        """The commands that look at stage 3, by the folder beside the scores that they write."""
        from moellava.demo.easy_vqa_data import images_folder

        model, data = short(self.folder / "stage3"), ["--data", short(self.data("stage3"))]
        where = {name: ["--output", short(self.scores_file.parent / name)] for name in ("routing", "report")}
        images = ["--image-folder", str(images_folder())]
        return {
            "routing": ["moellava", "routing", "--model-path", model, *data, *images, *where["routing"]],
            "report": ["moellava", "report", model, *where["report"]],
        }

    def look(self, name: str, command: list[str]) -> None:
        """Runs one of them, into an empty folder."""
        shutil.rmtree(self.scores_file.parent / name, ignore_errors=True)
        said = run(command, self.log(name), self.cores, show=None).strip().splitlines()
        say("\n".join(f"     {line}" for line in said[-4:]))

    @property
    def comparison(self) -> Path:
        """Where the comparison is, beside the scores."""
        return self.scores_file.parent / "compare"

    def comparing(self) -> list[str]:
        """The command that compares stage 3 with dense controls."""
        words = self.flags("stage3")
        pairs = zip(words[::2], words[1::2], strict=True)
        shared = [word for pair in pairs if pair[0] not in SET_BY_COMPARE for word in pair]
        threads = max(1, self.cores // self.processes)
        launcher = f"env OMP_NUM_THREADS={threads} deepspeed --num_accelerators {self.processes}"
        return [
            *("moellava", "compare", "--stage2", short(self.folder / "stage2"), "--data", short(self.data("stage3"))),
            *("--moe-run", short(self.folder / "stage3"), "--output-dir", short(self.comparison)),
            *("--seeds", *map(str, self.recipe.seeds)),
            *("--limit", str(min(COMPARED, self.recipe.limit or COMPARED)), "--launcher", launcher, "--", *shared),
        ]

    def compare(self, command: list[str]) -> None:
        """Runs it, and shows its table."""
        run(command, self.log("compare"), self.cores, show=None)
        show_file(self.comparison / "compare.txt")

    def chat(self) -> None:
        """Asks the last stage a question of the test split, and shows the right answer beside what it says."""
        image, right = asked_of(QUESTION)
        model = short(self.folder / "stage3")
        command = ["moellava", "chat", "--model-path", model, "--image-file", str(image), "--question", QUESTION]
        said = run(command, self.log("chat"), self.cores, show=None).strip().splitlines()
        say(f"   {said[-1] if said else '(nothing)'}   (right: {right})")


def asked_of(question: str) -> tuple[Path, str]:
    """The first test image that a question is asked about, and the right answer."""
    import easy_vqa

    texts, answers, images = easy_vqa.get_test_questions()
    place = texts.index(question)
    return Path(easy_vqa.get_test_image_paths()[images[place]]), answers[place]


def short(value: object) -> str:
    """A flag's value; paths inside the folder that commands run in are given relative to it."""
    if isinstance(value, Path) and value.is_relative_to(Path.cwd()):
        return str(value.relative_to(Path.cwd()))
    return str(value)


def fingerprint(folder: Path) -> str:
    """A hash of all files in a folder."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def free_port() -> int:
    """A port for the launcher, so that two runs on one machine do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def default_processes() -> int:
    """Two on a machine without accelerators, which `deepspeed` has to be told of; else one an accelerator."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 2
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    return torch.cuda.device_count() or 2


NEEDS = {"easy_vqa": "demo", "deepspeed": "train"}
"""Package -> the extra of ours that brings it."""


def require_packages() -> None:
    """Raises UserError for what is not installed."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        extras = ",".join(NEEDS[name] for name in missing)
        raise UserError(f"The demo needs {', '.join(missing)}: pip install 'moellava[{extras}]'")


def table(scores: dict[str, dict[str, float]]) -> str:
    """The scores as text."""
    lines = [f"{'':28}{'right images':>14}{'shuffled images':>18}"]
    for stage, title in SCORED.items():
        right, shuffled = (f"{100 * scores[stage][key]:.2f}%" for key in CONDITIONS)
        lines.append(f"{title:28}{right:>14}{shuffled:>18}")
    return "\n".join(lines)


def run_demo(recipe: Recipe, folder: Path, processes: int, make_base: bool, started: float) -> int:
    """Runs the demo; 1 if a step failed or the scores miss what the recipe promises. Raises UserError for packages that
    are not installed.

    Args:
        recipe: how long each stage trains.
        folder: where everything goes.
        processes: that train together.
        make_base: make the base models anew first.
        started: when the clock started, in Unix seconds.
    """
    require_packages()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that stopping the demo stops the step it is at
    demo = Demo(recipe, folder.resolve(), processes)
    say(f"moellava demo, {recipe.name} recipe: {recipe.duration} on 2 cores. Everything it makes is in {demo.folder}")
    try:
        scores = demo.run(make_base)
        say(f"\nOne question in chat: {QUESTION}")
        demo.chat()
    except StepFailed as failure:
        say(f"\n{failure}\nThe demo has stopped. Started again, it goes on from here.")
        return 1
    seconds = round(time.time() - started)
    demo.scores_file.write_text(json.dumps({"seconds": seconds, "recipe": recipe.name, **scores}, indent=1) + "\n")
    say(f"\neasy-VQA, {demo.result('stage3', 'accuracy')['questions']} questions of the official test split\n")
    say(f"{table(scores)}\n\n{seconds} s in all. Scores: {demo.scores_file}")
    missed = recipe.missed(scores)
    for promise in missed:
        say(f"MISSED: {promise}")
    return 1 if missed else 0
