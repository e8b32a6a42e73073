# SPDX-License-Identifier: Apache-2.0
"""How a step is split over processes and passes, and how a run goes on when their number is another one.

A run is told by how many samples a step holds, not by how they are split: which samples these are depends on nothing
else (see `GroupedSampler`). So a run may lose a host, or gain one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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
        f"{ways_to_keep(samples, now)} Another run takes another folder."
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


class Dependence(NamedTuple):
    """What a run computes from how its steps are split.

    Args:
        applies: whether a run does, by its `StageTrainer`.
        counts: what of a split it is computed from.
        keep: the flags that keep it.
        why: what is computed, a sentence.
    """

    applies: Callable[[Any], bool]
    counts: Callable[[Split], Any]
    keep: str
    why: str


def routing(trainer: Any, option: str) -> Any:
    """An option of a sparse model's routing; None of a dense one's."""
    return getattr(trainer.vlm.spec, option) if trainer.is_moe else None


DEPENDENCES = (
    Dependence(
        lambda trainer: bool(routing(trainer, "drop_tokens")),
        lambda split: split.batch,
        f"--{BATCH}",
        "experts drop what exceeds their capacity, which is counted over the samples of a pass.",
    ),
    Dependence(
        lambda trainer: routing(trainer, "router_balance") == "first_choice",
        lambda split: split.batch,
        f"--{BATCH}",
        "--router_balance first_choice counts the padding of a pass.",
    ),
    Dependence(
        lambda trainer: trainer.own_routers is not None,
        lambda split: split.batch,
        f"--{BATCH}",
        "the balancing loss of the language model's own experts is taken over the samples of a pass.",
    ),
    Dependence(
        lambda trainer: routing(trainer, "router_balance") == "batch",
        lambda split: split.accumulation,
        f"--{ACCUMULATION}, with another --{BATCH}",
        "--router_balance batch is taken over a pass of all processes.",
    ),
    Dependence(
        lambda trainer: not trainer.args.average_tokens_across_devices,
        lambda split: split,
        "the number of processes, and both flags",
        "--average_tokens_across_devices False takes the mean of each process.",
    ),
)


def require_same_numbers(trainer: Any, checkpoint: Path) -> None:
    """Raises UserError where a run that goes on with another split would compute something else.

    Args:
        trainer: a `StageTrainer` that is about to go on.
        checkpoint: from which.
    """
    stored = stored_run(Path(trainer.args.output_dir))
    if stored is None or "split" not in stored:
        return
    before, now = Split(*stored["split"]), split_of(trainer.args)
    for one in DEPENDENCES:
        if one.applies(trainer) and one.counts(before) != one.counts(now):
            raise UserError(
                f"{checkpoint} was trained with {before}, and now these are {now}: {one.why} Keep {one.keep}."
            )


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
    logger.info("Random numbers of each process follow from --seed %d, step %d and its rank.", seed, step)
    (drawn,) = numpy.random.SeedSequence((seed, step, rank)).generate_state(1)
    set_seed(int(drawn))
