# SPDX-License-Identifier: Apache-2.0
"""One worker answers what waits, in batches; clients read their answers in the event loop.

    client --> Job --> waiting --> worker: a batch of jobs with equal options --> pieces --> Job --> client

A batch begins with the job that has waited longest. A job that comes while a batch runs waits for its end.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

from moellava.data.encoder import Example
from moellava.data.media import MediaFiles
from moellava.errors import UserError
from moellava.log import get_logger
from moellava.serve.answer import Prompts
from moellava.serve.api.experts import ExpertCounts, Shares
from moellava.serve.api.growing import Growing, Likelihoods, Piece, Rows
from moellava.serve.api.limits import ServerLimits
from moellava.serve.api.refusals import UNEXPECTED, Refusal
from moellava.serve.api.schema import Question
from moellava.serve.generate import Sampling, generate
from moellava.vlm import VLM

logger = get_logger(__name__)


@dataclass
class Finished:
    """The end of an answer.

    Attributes:
        reason: 'stop' or 'length'.
        prompt_tokens, completion_tokens: what was read, pictures included, and said.
        experts: see `Shares`; None where nobody asked.
    """

    reason: str
    prompt_tokens: int
    completion_tokens: int
    experts: Shares | None = None


class Job:
    """One question on its way to an answer. Made in the event loop that reads the answer.

    Args:
        question: what is asked.
        example: the same as the model reads it.
    """

    def __init__(self, question: Question, example: Example):
        self.question, self.example = question, example
        self.left = threading.Event()
        self.is_over = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Piece | Finished | UserError] = asyncio.Queue()

    def tell(self, event: Piece | Finished | UserError) -> None:
        """Hands something to the client, from any thread."""
        self.is_over = self.is_over or not isinstance(event, Piece)
        with suppress(RuntimeError):  # the loop has closed, and nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncGenerator[Piece | Finished, None]:
        """The answer as it grows; the last is `Finished`. Raises UserError if it cannot be given. Whoever stops reading
        ends the answer."""
        try:
            while True:
                event = await self._events.get()
                if isinstance(event, UserError):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self.left.set()


class Scheduler:
    """Answers questions about one model. Raises UserError for a model that cannot be asked here.

    Args:
        vlm: of `open_vlm`.
        limits: of the server.
    """

    def __init__(self, vlm: VLM, limits: ServerLimits):
        self.vlm, self.limits = vlm, limits
        self.prompts = Prompts(vlm, MediaFiles(limits=limits.image))
        self.batches = 0
        self._encoding = threading.Lock()
        self._taking = threading.Lock()
        self._waiting: deque[Job] = deque()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")

    def example(self, question: Question) -> Example:
        """A question as the model reads it; not to be called in the event loop. Raises UserError: see
        `Prompts.example`."""
        with self._encoding:
            return self.prompts.example(question.request)

    def put(self, job: Job) -> None:
        """Has a job answered; its `events` tell of it."""
        with self._taking:
            self._waiting.append(job)
        self._worker.submit(self._answer_some).add_done_callback(_log_failure)

    def waiting(self) -> int:
        """How many jobs wait."""
        with self._taking:
            return sum(not job.left.is_set() for job in self._waiting)

    def close(self) -> None:
        """Ends all answers at their next token, and the worker."""
        with self._taking:
            for job in self._waiting:
                job.left.set()
        self._worker.shutdown(cancel_futures=True)

    def _taken(self) -> list[Job]:
        """The job that has waited longest, and others with the same options; those whose clients left are dropped."""
        with self._taking:
            waiting = [job for job in self._waiting if not job.left.is_set()]
            taken = [job for job in waiting if shares_batch(waiting[0], job)][: self.limits.batch_size]
            self._waiting = deque(job for job in waiting if job not in taken)
        return taken

    def _answer_some(self) -> None:
        """Answers a batch, if anything waits: whoever came first may have been answered with one before."""
        jobs = self._taken()
        try:
            self._answer(jobs)
        finally:
            for job in jobs:
                if not job.is_over:
                    job.tell(Refusal(UNEXPECTED, 500))

    def _answer(self, jobs: Sequence[Job]) -> None:
        shown = {job: media for job in jobs if (media := self._opened(job)) is not None}
        if not shown:
            return
        self.batches += 1
        examples = [job.example for job in shown]
        batch = self.prompts.batch(examples, list(shown.values()))
        options = self.prompts.options(examples)
        wanted = [job.question.sampling.max_new_tokens for job in shown]
        options["limits"] = [min(pair) for pair in zip(options["limits"], wanted, strict=True)]
        likelihoods = Likelihoods() if any(job.question.top_logprobs is not None for job in shown) else None
        rows = Rows([self._row(job, limit) for job, limit in zip(shown, options["limits"], strict=True)], likelihoods)
        counts = None
        if any(job.question.counts_experts for job in shown):
            counts = ExpertCounts(self.vlm.model, len(shown), self.vlm.placeholder_ids)
        with nullcontext() if counts is None else counts.counting(lambda: rows.over):
            sampling = replace(next(iter(shown)).question.sampling, max_new_tokens=max(wanted))
            processors = [] if likelihoods is None else [likelihoods]
            generate(
                self.vlm.model,
                batch,
                self.prompts.ending,
                sampling,
                criteria=[rows],
                processors=processors,
                **options,
            )
        for number, (job, row) in enumerate(zip(shown, rows.rows, strict=True)):
            experts = counts.shares(number) if counts is not None and job.question.counts_experts else None
            job.tell(Finished(row.reason or "stop", job.example.length, len(row.ids), experts))

    def _opened(self, job: Job) -> list[Any] | None:
        """What a job shows; None where it cannot be read, which its client is told."""
        try:
            return self.prompts.opened(job.example)
        except UserError as error:
            job.tell(error)
            return None

    def _row(self, job: Job, limit: int) -> Growing:
        question = job.question
        return Growing(self.prompts.ending, question.stops, limit, question.top_logprobs, job.tell, job.left.is_set)


def shares_batch(first: Job, other: Job) -> bool:
    """Whether two jobs may be answered together: their tokens are chosen alike, and no seed asks for draws of its
    own."""
    return first is other or (
        _options(first.question.sampling) == _options(other.question.sampling)
        and first.question.sampling.temperature * int(first.question.sampling.seed is not None) == 0
    )


def _options(sampling: Sampling) -> Sampling:
    """What must be equal in a batch: all but the length, which each row has for itself, and a seed of no draws."""
    return replace(sampling, max_new_tokens=1, seed=sampling.seed if sampling.temperature else None)


def _log_failure(run: Future[None]) -> None:
    """A batch that failed is a fault of ours; its clients have been told, and the next ones are answered."""
    error = None if run.cancelled() else run.exception()
    if error is not None:
        logger.error("A batch has failed.", exc_info=error)
