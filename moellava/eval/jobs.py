# SPDX-License-Identifier: Apache-2.0
"""Tasks of `moellava eval`: read, checked, asked, scored and written."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moellava.errors import UserError
from moellava.eval.asking import Said, Share, ask, digest_of, questions_of, reviewed
from moellava.eval.benchmarks import Benchmark, Question, Scored, shuffle_images
from moellava.eval.checkpoint import checkpoint_digest
from moellava.eval.journal import Journal, claim
from moellava.eval.judge import Judge
from moellava.eval.launch import end_with_parent
from moellava.eval.scoring import RESULT, against, read_tally, report, texts_of, write_result
from moellava.eval.suite import BENCHMARKS
from moellava.eval.summary import summary
from moellava.processes import rank, world_size
from moellava.vlm import VLM, open_vlm


@dataclass(frozen=True)
class Job:
    """One task of a run.

    Args:
        benchmark: the task.
        questions: those that are asked.
        max_new_tokens: longest answer, in tokens.
        folder: for its files, or None.
        against: the result that its score is compared with, or None.
    """

    benchmark: Benchmark
    questions: list[Question]
    max_new_tokens: int
    folder: Path | None
    against: Path | None


def job_of(name: str, args: argparse.Namespace) -> Job:
    """A task with its questions, read. Raises UserError for data that is missing or damaged."""
    benchmark = BENCHMARKS[name](args.data_folder, args.split)
    questions = questions_of(benchmark, args.limit, args.seed)
    if args.shuffle_images:
        questions = shuffle_images(questions, args.seed)
    folder = None if args.output_dir is None else args.output_dir / name
    other = args.against
    if other is not None and other.is_dir():
        other = other / name / RESULT if (other / name / RESULT).is_file() else other / RESULT
    return Job(benchmark, questions, args.max_new_tokens or benchmark.max_new_tokens, folder, other)


def check_jobs(jobs: Sequence[Job], args: argparse.Namespace) -> None:
    """Raises UserError for tasks that would leave nothing, or whose --against is no result."""
    for job in jobs:
        name = job.benchmark.name
        is_judged = job.benchmark.review is not None
        scored_here = job.benchmark.score is not None and (not is_judged or (args.judge_url and args.judge_model))
        if is_judged and args.judge_url and not args.judge_model:
            raise UserError(f"--judge-url {args.judge_url} needs --judge-model, the judge's name there.")
        if not scored_here and job.folder is None:
            why = "needs --judge-url and --judge-model" if is_judged else "is scored by the benchmark's own server"
            raise UserError(f"--task {name} ({job.benchmark.split} split) {why}: give --output-dir for the answers.")
        if job.against is not None:
            if not scored_here:
                raise UserError(f"--against {job.against}: {name} is not scored here, so there is nothing to compare.")
            read_tally(job.against, name)


def identity_of(job: Job, digest: str) -> dict[str, Any]:
    """What decides the answers of a task."""
    return {
        "benchmark": job.benchmark.name,
        "split": job.benchmark.split,
        "questions": len(job.questions),
        "questions_digest": digest_of(job.questions),
        "checkpoint": digest,
        "max_new_tokens": job.max_new_tokens,
    }


def run_jobs(jobs: Sequence[Job], args: argparse.Namespace) -> Iterator[str]:
    """Opens the model, runs tasks that `check_jobs` has seen, and says what came of each.

    Args:
        jobs: in their order.
        args: of `moellava eval`.
    """
    judge = Judge(args.judge_url, args.judge_model) if args.judge_url and args.judge_model else None
    end_with_parent()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    digest = checkpoint_digest(args.model_path, "--model-path")
    for job in jobs:
        if job.folder is not None:
            claim(job.folder, identity_of(job, digest), rank() == 0)
    vlm = open_vlm(args.model_path)
    for job in jobs:
        said = run(job, vlm, judge, args, digest)
        if said is not None:
            yield said


def run(job: Job, vlm: VLM, judge: Judge | None, args: argparse.Namespace, digest: str) -> str | None:
    """Asks, scores and writes. Returns what is to be said; None on all processes but the first, which only ask."""
    started = time.monotonic()
    name = job.benchmark.name
    said = ask(
        vlm,
        job.questions,
        max_new_tokens=job.max_new_tokens,
        batch_size=args.batch_size,
        journal=None if job.folder is None else Journal(job.folder, rank=rank()),
        share=Share(rank(), world_size()),
        model_id=Path(args.model_path).name,
        title=name,
    )
    if said is None:
        return None
    scored = score_of(job, said, judge)
    result = report(job.benchmark, job.questions, said, scored, vlm=vlm, settings=settings(job, args, judge, digest))
    if job.against is not None and scored is not None:
        result["against"] = against(scored.tally, job.against, name)
    result["seconds"] = round(time.monotonic() - started, 1)
    files = write_files(job, said, result, args.output)
    return summary(result, files)


def score_of(job: Job, said: Sequence[Said], judge: Judge | None) -> Scored | None:
    """The score, by the judge's replies where a judge grades; None where it is not scored here."""
    benchmark = job.benchmark
    if benchmark.score is None or (benchmark.review is not None and judge is None):
        return None
    texts: Sequence[str | None] = texts_of(said)
    if benchmark.review is not None and judge is not None:
        journal = None if job.folder is None else Journal(job.folder, f"reviews-{judge.digest}")
        title = f"{benchmark.name}, reviews"
        texts = reviewed(
            benchmark.review, job.questions, said, judge, journal=journal, at_once=judge.at_once, title=title
        )
    return benchmark.score(job.questions, texts)


def settings(job: Job, args: argparse.Namespace, judge: Judge | None, digest: str) -> dict[str, Any]:
    """What decides the score, as it is written into the result."""
    graded = judge is not None and job.benchmark.review is not None
    return {
        "max_new_tokens": job.max_new_tokens,
        "model_path": args.model_path,
        "checkpoint": f"sha256:{digest}",
        "shuffle_images": args.shuffle_images,
        "seed": args.seed,
        "limit": args.limit,
        "batch_size": args.batch_size,
        "processes": world_size(),
        **({"judge": judge.model, "judge_url": judge.url} if graded and judge else {}),
    }


def write_files(job: Job, said: Sequence[Said], result: dict[str, Any], output: str | None) -> list[str]:
    """Writes result, answers and submissions; returns their paths, as they are told."""
    if output is not None:
        write_result(Path(output), result)
    if job.folder is None:
        return [] if output is None else [output]
    write_result(job.folder / RESULT, result)
    for submission in job.benchmark.submissions:
        submission.write(job.folder / submission.name, job.questions, texts_of(said))
    names = ["answers.jsonl", *(submission.name for submission in job.benchmark.submissions), RESULT]
    return [str(job.folder / name) for name in names]
