# SPDX-License-Identifier: Apache-2.0
"""The API, asked by OpenAI's own client over real sockets."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from openai import BadRequestError, NotFoundError

from moellava.serve.answer import Prompts, answer
from moellava.serve.api import scheduler as scheduling
from moellava.serve.prompt import Request
from tests.serve.api.serving import NAME, SECONDS, asking

QUESTION = "what colour is it?"


def test_models_are_listed(server):
    client = server.client
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(NotFoundError, match="'other'"):
        client.models.retrieve("other")


def test_an_answer_is_that_of_answer(server, sparse, pictures):
    requests = [Request(QUESTION, [pictures[0]]), Request(QUESTION, pictures[:2]), Request("what is red?")]
    expected = answer(sparse, requests, max_new_tokens=8)
    assert len(set(expected)) == 3
    for shown, request, said in zip((pictures[:1], pictures[:2], []), requests, expected, strict=True):
        reply = server.client.chat.completions.create(**asking(request.question, *shown))
        assert reply.choices[0].message.content == said
        length = Prompts(sparse).example(request).length
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (length, 8)
        assert reply.choices[0].finish_reason == "length"


def test_a_conversation_and_a_system_prompt_are_read(server, sparse):
    turns = [("user", "what is red?"), ("assistant", "a shape"), ("user", "is it blue?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    spoken = [{"from": "gpt" if role == "assistant" else "human", "value": text} for role, text in turns]
    (expected,) = answer(sparse, [Request(messages=spoken, system_prompt="be brief")], max_new_tokens=8)
    system = {"role": "system", "content": [{"type": "text", "text": "be brief"}]}
    reply = server.client.chat.completions.create(**asking() | {"messages": [system, *messages]})
    assert reply.choices[0].message.content == expected


def test_a_stream_is_the_same_in_pieces(server, pictures):
    body = asking(QUESTION, pictures[0], max_tokens=12)
    whole = server.client.chat.completions.create(**body)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = server.client.chat.completions.create(**body, **options)
    said = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(said) == whole.choices[0].message.content
    assert sum(map(bool, said)) > 2
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage == whole.usage


@pytest.mark.parametrize("stream", [False, True])
def test_likelihoods_are_the_models_own(server, sparse, stream):
    body = asking(QUESTION, logprobs=True, top_logprobs=3, max_tokens=4)
    replies = server.client.chat.completions.create(**body, stream=stream)
    choices = [part.choices[0] for part in (replies if stream else [replies])]
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    prompts = Prompts(sparse)
    with torch.no_grad():
        logits = sparse.model(**prompts.batch([prompts.example(Request(QUESTION))])).logits[0, -1]
    top = logits.float().log_softmax(-1).topk(3).values.tolist()
    assert [one.logprob for one in tokens[0].top_logprobs] == pytest.approx(top, abs=1e-4)
    assert tokens[0].logprob == tokens[0].top_logprobs[0].logprob
    assert len(tokens) == 4
    spelled = "".join(token.token for token in tokens).strip()
    said = "".join((choice.delta if stream else choice.message).content or "" for choice in choices)
    assert spelled == said


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_stops_an_answer_and_is_no_part_of_it(server, stream):
    client = server.client
    whole = client.chat.completions.create(**asking(max_tokens=12)).choices[0].message.content
    stop = whole[4:7]
    replies = client.chat.completions.create(**asking(max_tokens=12), stop=["never", stop], stream=stream)
    choices = [part.choices[0] for part in (replies if stream else [replies])]
    said = "".join((choice.delta if stream else choice.message).content or "" for choice in choices)
    assert said == whole[: whole.index(stop)].rstrip()
    assert choices[-1].finish_reason == "stop"


def test_a_seed_repeats_an_answer(server):
    create = server.client.chat.completions.create
    said = [create(**asking(), temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def held(monkeypatch) -> tuple[threading.Event, threading.Event]:
    """(the first batch has begun, let it go on): batches wait for the second."""
    begun, go_on, plain = threading.Event(), threading.Event(), scheduling.generate

    def waiting(*args, **options):
        begun.set()
        assert go_on.wait(SECONDS)
        return plain(*args, **options)

    monkeypatch.setattr(scheduling, "generate", waiting)
    return begun, go_on


def test_what_waits_is_answered_together(server, monkeypatch):
    questions = [f"what is {name}?" for name in ("red", "green", "a circle", "it")]
    create, service = server.client.chat.completions.create, server.service
    alone = [create(**asking(text)).choices[0].message.content for text in questions]
    before = service.scheduler.batches
    begun, go_on = held(monkeypatch)
    with ThreadPoolExecutor(len(questions)) as pool:
        first = pool.submit(create, **asking(questions[0]))
        assert begun.wait(SECONDS)
        others = [pool.submit(create, **asking(text, max_tokens=8 - n)) for n, text in enumerate(questions[1:], 1)]
        while service.scheduler.waiting() < len(others):
            time.sleep(0.01)
        go_on.set()
        said = [run.result().choices[0].message.content for run in [first, *others]]
    assert service.scheduler.batches == before + 2
    for text, full in zip(said, alone, strict=True):
        assert full.startswith(text)
    assert said[0] == alone[0] and said[1] == alone[1][: len(said[1])] != alone[1]
    server.settled()


def test_other_options_and_seeds_have_batches_of_their_own(server, monkeypatch):
    drawn = {"temperature": 1.5, "seed": 1}
    options: list[dict] = [{}, drawn, {"seed": 5}, drawn, {"temperature": 1.5}, {"stop": "never", "logprobs": True}]
    create, service = server.client.chat.completions.create, server.service
    alone = [create(**asking(), **given).choices[0].message.content for given in options]
    before = service.scheduler.batches
    begun, go_on = held(monkeypatch)
    with ThreadPoolExecutor(len(options) + 1) as pool:
        first = pool.submit(create, **asking())
        assert begun.wait(SECONDS)
        others = [pool.submit(create, **asking(), **given) for given in options]
        while service.scheduler.waiting() < len(options):
            time.sleep(0.01)
        go_on.set()
        said = [run.result().choices[0].message.content for run in others]
    first.result()
    assert service.scheduler.batches == before + 1 + 4  # the first; three that take the likeliest; each of the others
    assert [one for one, given in zip(said, options, strict=True) if given != {"temperature": 1.5}] == [
        one for one, given in zip(alone, options, strict=True) if given != {"temperature": 1.5}
    ]
    server.settled()


def test_more_requests_than_slots_are_refused(server, monkeypatch):
    begun, go_on = held(monkeypatch)
    monkeypatch.setattr(server.service.slots, "limit", 1)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(server.send, body=asking())
        assert begun.wait(SECONDS)
        status, said = server.send(body=asking())
        go_on.set()
        assert run.result()[0] == 200
    assert (status, said["error"]["type"]) == (429, "rate_limit_error")
    server.settled()


def test_a_batch_that_fails_is_told_and_the_next_one_is_answered(server, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("cannot allocate 0x7f00deadbeef of /root/secret")

    with monkeypatch.context() as patched:
        patched.setattr(scheduling, "generate", fails)
        status, said = server.send(body=asking())
    assert (status, said["error"]["type"]) == (500, "server_error")
    assert "secret" not in str(said) and "0x7f" not in str(said)
    assert server.send(body=asking())[0] == 200
    server.settled()


def test_official_errors_are_raised(server):
    with pytest.raises(BadRequestError, match="n: Input should be 1"):
        server.client.chat.completions.create(**asking(), n=2)
