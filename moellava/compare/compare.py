# SPDX-License-Identifier: Apache-2.0
"""Was the MoE worth it? Stage 3 and its dense controls, trained from one stage-2 folder and asked the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from moellava.batches import batches_of
from moellava.compare.arms import DENSE, SPARSE, Arm, Costs, overridden, without
from moellava.compare.flops import step_flops
from moellava.compare.result import ArmResult, Comparison, Lead
from moellava.compare.runs import Measured, Run, measured, train, weights_of
from moellava.compare.scores import Exam, by_category, difference, pictures_of
from moellava.data.media import MediaFiles
from moellava.data.records import load_records
from moellava.errors import UserError
from moellava.eval.checkpoint import checkpoint_digest
from moellava.eval.scoring import versions
from moellava.eval.tally import STATISTICS, Tally
from moellava.log import get_logger
from moellava.moe.interventions import INTERVENTIONS, intervened
from moellava.train.parsing import parse_arguments
from moellava.train.run_file import NAME as RUN_YAML
from moellava.train.run_file import read_run_file
from moellava.train.stages import stage_of
from moellava.vlm import VLM, open_vlm

logger = get_logger(__name__)

COUNTED_RECORDS = 8
"""Records whose FLOPs are counted: their mean stands for all."""

STAGE2 = "stage2"


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Args:
        stage2: the dense folder that all arms start from.
        data: data files that they train on.
        output: folder of everything that is made.
        arms: by name, in the order in which they run; `in_order` has those that others depend on first.
        seeds: of data order and routers; each arm runs with each.
        shared, sparse: flags of train.py for all arms, and for the sparse one alone.
        launcher: see `runs.launcher_of`.
        moe_runs: finished runs that are the sparse arm's with the first seeds; with the others it is trained.
    """

    stage2: str
    data: list[str]
    output: Path
    arms: dict[str, Arm]
    seeds: list[int]
    shared: list[str]
    sparse: list[str]
    launcher: list[str]
    moe_runs: Sequence[Path] = ()

    def require_moe_runs(self) -> None:
        """Raises UserError unless the runs that are given have started from the same folder, with the same data."""
        same = (("--stage2", "model_name_or_path", [self.stage2]), ("--data", "data_path", self.data))
        for folder in self.moe_runs:
            given = read_run_file(folder / RUN_YAML)
            for flag, name, own in same:
                theirs = given.get(name, [])
                theirs = theirs if isinstance(theirs, list) else [theirs]
                if [Path(one).resolve() for one in theirs] != [Path(one).resolve() for one in own]:
                    raise UserError(
                        f"--moe-run {folder} has --{name} {' '.join(map(str, theirs))}, but {flag} is "
                        f"{' '.join(own)}: arms that are compared start alike."
                    )

    def require_flags(self) -> None:
        """Raises UserError unless training takes the flags of every arm."""
        for name in self.arms:
            parse_arguments(self._words(name, self.seeds[0], self.output))

    def run(self, name: str, seed: int, costs: Costs) -> Run:
        """The training of an arm; `costs` are those of the arms before it."""
        folder = self.output / "runs" / f"{name}-seed{seed}"
        if name == SPARSE:
            folder = dict(zip(self.seeds, self.moe_runs, strict=False)).get(seed, folder)
        words, steps = self._words(name, seed, folder), self.arms[name].steps(costs)
        if steps is not None:
            words = [*without(words, "--max_steps", "--num_train_epochs"), "--max_steps", str(steps)]
        return Run(name, seed, folder, words)

    def _words(self, name: str, seed: int, folder: Path) -> list[str]:
        """Flags of train.py for an arm, as long as the flags say."""
        arm, start = self.arms[name], ["--model_name_or_path", self.stage2, "--data_path", *self.data]
        own = ["--moe_enable", "True", "--init_seed", str(seed)] if arm.is_sparse else []
        words = overridden([*self.shared, *(self.sparse if arm.is_sparse else [])], arm.flags)
        return [*words, *own, *start, "--output_dir", str(folder), "--seed", str(seed)]


class Comparing:
    """Runs a plan.

    Args:
        plan: what is compared.
        exam: what all are asked.

    Attributes:
        found: the comparison, as far as it has come.
    """

    def __init__(self, plan: Plan, exam: Exam):
        self.plan, self.exam = plan, exam
        self.tallies: dict[str, list[Tally]] = {}
        self.changed: dict[str, list[Tally]] = {}  # of the sparse arm, by intervention
        self.costs = Costs(steps=0)
        self.records = load_records(plan.data)
        self.found = Comparison(exam.benchmark.name, len(exam.questions), pictures_of(exam.questions))
        self.found.settings = {
            "stage2": plan.stage2,
            "data": plan.data,
            "seeds": plan.seeds,
            "flags": plan.shared,
            "moe_flags": plan.sparse,
            "arm_flags": {name: list(arm.flags) for name, arm in plan.arms.items() if arm.flags},
            "versions": versions(exam.benchmark),
        }

    def run(self) -> Comparison:
        """Trains, asks and compares. Raises UserError."""
        self.plan.require_flags()
        self.plan.require_moe_runs()
        stage2 = open_vlm(self.plan.stage2, flag="--stage2")
        if stage2.spec is not None:
            raise UserError(f"--stage2 {self.plan.stage2} is sparse already; stage 3 starts from a dense folder.")
        self._ask(STAGE2, stage2, Path(self.plan.stage2), STAGE2)
        self.found.arms[STAGE2] = ArmResult(
            "stage 2", self._scores(STAGE2), self._parts(STAGE2), bytes=weights_of(Path(self.plan.stage2))
        )
        self.found.scale = STATISTICS[self.tallies[STAGE2][0].statistic].scale
        del stage2
        for arm in self.plan.arms:
            self._arm(arm)
        self._conclude()
        return self.found

    def _arm(self, arm: str) -> None:
        read: list[Measured] = []
        per_record: float | None = None
        for run in (self.plan.run(arm, seed, self.costs) for seed in self.plan.seeds):
            if run.folder not in self.plan.moe_runs:
                train(run, self.plan.launcher, self.plan.output / "logs" / f"{run.name}.log")
            read.append(measured(run.folder))
            vlm = open_vlm(run.folder, flag="--output-dir")
            self._ask(arm, vlm, run.folder, run.name)
            if arm == SPARSE:
                self._intervene(vlm, run)
            if len(read) == 1:  # seeds cost the same
                per_record = self._flops(vlm, run)
        steps = round(fmean(one.steps for one in read))
        self.costs.speed[arm] = fmean(one.tokens_per_second for one in read)
        if arm == SPARSE:
            self.costs.steps = steps
        if per_record is not None:
            self.costs.flops[arm] = per_record
        self.found.arms[arm] = ArmResult(
            self.plan.arms[arm].title,
            self._scores(arm),
            self._parts(arm),
            steps=steps,
            flops=None if per_record is None else per_record * fmean(one.records for one in read),
            seconds=fmean(one.seconds for one in read),
            bytes=read[0].bytes,
            trained=read[0].trained,
            gain=difference(self.tallies[arm], self.tallies[STAGE2]),
        )

    def _intervene(self, vlm: VLM, run: Run) -> None:
        """Asks a sparse model without what routing gives it."""
        assert vlm.spec is not None
        for name, entry in INTERVENTIONS.items():
            if reason := entry.refuses(vlm.spec):
                logger.info("%s (%s) is left out: %s", name, entry.says, reason)
                continue
            with intervened(vlm.model, name, run.seed):
                tally = self._tally(vlm, run.folder, f"{run.name}-{name}", changed=name)
                self.changed.setdefault(name, []).append(tally)

    def _ask(self, name: str, vlm: VLM, folder: Path, where: str) -> None:
        self.tallies.setdefault(name, []).append(self._tally(vlm, folder, where))

    def _tally(self, vlm: VLM, folder: Path, where: str, changed: str = "") -> Tally:
        return self.exam.tally(vlm, where, checkpoint_digest(folder, "--model-path"), changed)

    def _flops(self, vlm: VLM, run: Run) -> float | None:
        """FLOPs of a record of a run, forward and backward; None where an adapter trains."""
        model_args, data_args, moe_args, args = parse_arguments(run.flags)
        if args.lora_enable:
            return None
        files = MediaFiles(data_args.image_folder, data_args.video_folder, data_args.num_frames)
        (batch,) = batches_of(vlm, self.records, files, COUNTED_RECORDS, COUNTED_RECORDS)
        chosen = stage_of(model_args, moe_args).selects(vlm, model_args, moe_args)
        return step_flops(vlm, chosen, batch) / len(batch["input_ids"])

    def _conclude(self) -> None:
        for name, arm in self.plan.arms.items():
            if name != SPARSE:
                one, other = (name, DENSE) if arm.is_sparse else (SPARSE, name)
                self.found.leads.append(Lead(one, other, difference(self.tallies[one], self.tallies[other])))
        for name, entry in INTERVENTIONS.items():
            if name in self.changed:
                lost = difference(self.changed[name], self.tallies[SPARSE])
                self.found.routing[name] = (entry.says, [one.score for one in self.changed[name]], lost)

    def _scores(self, name: str) -> list[float]:
        return [tally.score for tally in self.tallies[name]]

    def _parts(self, name: str) -> dict[str, float]:
        return by_category(self.exam.questions, self.tallies[name])
