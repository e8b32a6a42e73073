# SPDX-License-Identifier: Apache-2.0
"""Which experts read and wrote: counted for each row by itself, padding left out."""

from __future__ import annotations

import asyncio

import pytest
import torch

from moellava.moe import moe_layers
from moellava.serve.answer import Prompts
from moellava.serve.api.experts import PARTS, ExpertCounts
from moellava.serve.api.limits import ServerLimits
from moellava.serve.api.panel import panel
from moellava.serve.api.scheduler import Finished, Job, Scheduler
from moellava.serve.api.schema import Question
from moellava.serve.generate import Sampling
from moellava.serve.prompt import Request


def shares_of(vlm, *requests: Request) -> list:
    """What the scheduler tells of some requests, answered together."""
    scheduler = Scheduler(vlm, ServerLimits())

    async def ask(request: Request):
        question = Question(request, Sampling(max_new_tokens=5), counts_experts=True)
        job = Job(question, scheduler.example(question))
        scheduler._waiting.append(job)  # all wait before the first batch begins
        await asyncio.sleep(0)
        scheduler._worker.submit(scheduler._answer_some)
        return [event async for event in job.events() if isinstance(event, Finished)][0].experts

    async def ask_all():
        return await asyncio.gather(*map(ask, requests))

    said = asyncio.run(ask_all())
    assert scheduler.batches == 1
    scheduler.close()
    return said


def test_a_row_has_the_shares_that_it_has_alone(sparse, pictures):
    asked = [
        Request("what is it?", [pictures[0]]),
        Request("a longer question about red?"),
        Request("it", pictures[:2]),
    ]
    together = shares_of(sparse, *asked)
    for request, shares in zip(asked, together, strict=True):
        (alone,) = shares_of(sparse, request)
        assert shares == alone
        assert all(sum(part) == pytest.approx(1) for layer in shares.values() for part in layer.values())
        assert set(shares[0]) == set(PARTS if request.images else PARTS[1:])
    assert together[0] != together[2]
    assert list(together[0]) == [index for index, _ in moe_layers(sparse.model)]


def test_the_shares_are_those_of_the_largest_logits(sparse, pictures):
    prompts = Prompts(sparse)
    request = Request("what is it?", [pictures[0]])
    batch = prompts.batch([prompts.example(request)])
    (index, layer), *_ = moe_layers(sparse.model)
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    counts = ExpertCounts(sparse.model, 1, sparse.placeholder_ids)
    with torch.no_grad(), counts.counting(lambda: [False]):
        sparse.model(**batch)
    hook.remove()
    picked = (seen[0][0] @ layer.router.weight.T).topk(2).indices
    is_picture = batch["input_ids"][0] == sparse.placeholder_ids[0]
    for part, rows in (("pictures", is_picture), ("words", ~is_picture)):
        expected = torch.bincount(picked[rows].reshape(-1), minlength=4) / picked[rows].numel()
        assert counts.shares(0)[index][part] == pytest.approx(expected.tolist())
        assert rows.any()


def test_a_panel_has_a_table_for_each_part():
    shares = {0: {"words": [0.25, 0.75], "answer": [1.0, 0.0]}, 2: {"words": [0.5, 0.5], "answer": [0.0, 1.0]}}
    shown = panel(shares)
    assert shown.count("<table") == 2 and "pictures" not in shown
    assert [text in shown for text in ("75%", "<th>2</th>", "wrote the answer")] == [True] * 3
