# SPDX-License-Identifier: Apache-2.0
"""How a step is split over processes and passes, and how a run goes on when their number is another one.

A run is told by how many samples a step holds, not by how they are split: which samples these are depends on nothing
else (see `GroupedSampler`). So a run may lose a host, or gain one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from transformers import set_seed

from moellava.errors import UserError
from moellava.log import get_logger
from moellava.train.checkpoint import RUN_FILE, last_checkpoint, read_run
from moellava.train.identity import SAMPLES

logger = get_logger(__name__)

BATCH, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
_RANDOM = re.compile(r"rng_state(_\d+)?\.pth")


class Split(NamedTuple):
    """How a step is split.

    Args:
        batch: samples of one process in one pass.
        accumulation: passes of a step.
        processes: that train together.
    """

    batch: int
    accumulation: int
    processes: int

    @property
    def samples(self) -> int:
        """Of a step."""
        return self.batch * self.accumulation * self.processes

    def __str__(self) -> str:
        return f"--{BATCH} {self.batch} × --{ACCUMULATION} {self.accumulation} × {in_words(self.processes)}"


def in_words(processes: int) -> str:
    """How many they are."""
    return "1 process" if processes == 1 else f"{processes} processes"


def split_of(args: Any) -> Split:
    """How a run splits its steps. `args`: its TrainingArguments."""
    return Split(args.train_batch_size, args.gradient_accumulation_steps, args.world_size)


def asked_split(args: Any) -> Split:
    """As its flags ask for, before `keep_samples` has changed them."""
    accumulation = args.given.get(ACCUMULATION, type(args).gradient_accumulation_steps)
    return split_of(args)._replace(accumulation=accumulation)


def stored_run(output_dir: Path) -> dict[str, Any] | None:
    """What run.json says of a run that has come to a checkpoint or to its end; None: there is none."""
    if not (output_dir / RUN_FILE).exists():
        return None
    stored = read_run(output_dir)
    return stored if stored["finished"] or last_checkpoint(output_dir) else None


def keep_samples(flags: Mapping[str, Any], default: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """The flags of a run, with the passes of a step that keep its samples where the number of processes has changed.

    The same command is started again on fewer or more devices; where its batch was changed as well, it stays as it is
    given, and `require_same_step` judges it.

    Args:
        flags: that are given, by name.
        default: of all flags.
        processes: of this run.
    """
    kept, stored = dict(flags), stored_run(Path(flags["output_dir"])) if "output_dir" in flags else None
    batch, accumulation = (flags.get(name, default[name]) for name in (BATCH, ACCUMULATION))
    if stored is None or SAMPLES not in stored["identity"] or min(batch, accumulation) < 1:
        return kept
    samples, asked = stored["identity"][SAMPLES], stored.get("asked")
    passes, rest = divmod(samples, batch * processes)
    if passes == accumulation or rest or asked is None or [batch, accumulation] != asked[:2]:
        return kept
    logger.warning(
        "%s: steps of %d samples, by %s now: --%s %d keeps them, in place of %d.",
        flags["output_dir"], samples, in_words(processes), ACCUMULATION, passes, accumulation,
    )  # fmt: skip
    return kept | {ACCUMULATION: passes}


def require_same_step(output_dir: Path, now: Split) -> None:
    """Raises UserError unless a step holds as many samples as those of the run that is in a folder; says which flag
    would keep them."""
    stored = stored_run(output_dir)
    samples = now.samples if stored is None else stored["identity"].get(SAMPLES, now.samples)
    if samples == now.samples:
        return
    raise UserError(
        f"--output_dir {output_dir} holds a run with {samples} samples in a step, but {now} are {now.samples}. "
        f"{ways_to_keep(samples, now)}"
    )


def ways_to_keep(samples: int, now: Split) -> str:
    """Which flags give steps of so many samples."""
    share, rest = divmod(samples, now.processes)
    if rest:
        numbers = ", ".join(str(number) for number in range(1, samples + 1) if samples % number == 0)
        return f"{now.processes} processes cannot share {samples} samples evenly: go on with {numbers}."
    ways = [f"--{ACCUMULATION} {share // now.batch}"] if share % now.batch == 0 else []
    ways += [f"--{BATCH} {share // now.accumulation}"] if share % now.accumulation == 0 else []
    return f"Give {' or '.join(ways) or f'--{BATCH} {share} --{ACCUMULATION} 1'}, which keeps them."


def require_same_numbers(trainer: Any, checkpoint: Path) -> None:
    """Raises UserError where a run that goes on with another split would compute something else.

    Args:
        trainer: a `StageTrainer` that is about to go on.
        checkpoint: from which.
    """
    stored = stored_run(Path(trainer.args.output_dir))
    before, now = Split(*stored["split"]) if stored and "split" in stored else None, split_of(trainer.args)
    if before is None or before == now:
        return
    for counts, depends in DEPENDS:
        why = depends(trainer)
        if why and counts(before) != counts(now):
            raise UserError(
                f"{checkpoint} was trained with {before}, and now these are {now}: {why} Keep {KEPT[counts]}."
            )


def _of_a_pass(split: Split) -> int:
    return split.batch


def _of_all_passes(split: Split) -> int:
    return split.batch * split.processes


def _all(split: Split) -> Split:
    return split


KEPT = {
    _of_a_pass: f"--{BATCH}",
    _of_all_passes: f"--{ACCUMULATION}, with another --{BATCH}",
    _all: "the number of processes, and both flags",
}


def _by_capacity(trainer: Any) -> str:
    spec = trainer.vlm.spec if trainer.is_moe else None
    drops = spec is not None and spec.drop_tokens
    return "experts drop what exceeds their capacity, which is counted over the samples of a pass." if drops else ""


def _by_first_choice(trainer: Any) -> str:
    spec = trainer.vlm.spec if trainer.is_moe else None
    counts = spec is not None and spec.router_balance == "first_choice"
    return "--router_balance first_choice counts the padding of a pass." if counts else ""


def _by_batch(trainer: Any) -> str:
    spec = trainer.vlm.spec if trainer.is_moe else None
    counts = spec is not None and spec.router_balance == "batch"
    return "--router_balance batch is taken over a pass of all processes." if counts else ""


def _by_own_routers(trainer: Any) -> str:
    own = trainer.own_routers is not None
    return "the balancing loss of the language model's own experts is taken over the samples of a pass." if own else ""


def _by_own_mean(trainer: Any) -> str:
    own = not trainer.args.average_tokens_across_devices
    return "--average_tokens_across_devices False takes the mean of each process." if own else ""


DEPENDS = (
    (_of_a_pass, _by_capacity),
    (_of_a_pass, _by_first_choice),
    (_of_a_pass, _by_own_routers),
    (_of_all_passes, _by_batch),
    (_all, _by_own_mean),
)
"""What of a split counts, and why it does in a run ('' where it does not)."""


def processes_of(checkpoint: Path) -> int:
    """How many processes have written a checkpoint: each has left its random numbers."""
    return sum(bool(_RANDOM.fullmatch(path.name)) for path in checkpoint.iterdir())


def begin_random(seed: int, step: int, rank: int) -> None:
    """Random numbers of a process whose own are not known, since others wrote the checkpoint.

    Args:
        seed: of the run.
        step: from which it goes on.
        rank: of the process.
    """
    (drawn,) = numpy.random.SeedSequence((seed, step, rank)).generate_state(1)
    set_seed(int(drawn))
