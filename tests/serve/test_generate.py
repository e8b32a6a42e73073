# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's generate with our processors and criteria: in batches, with beams, as a stream, dense and sparse."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from moellava.errors import UserError
from moellava.moe import MoESpec, moe_layers, upcycle
from moellava.moe.modes import evaluating
from moellava.serve.answer import Prompts
from moellava.serve.ending import Ending
from moellava.serve.generate import NoPlaceholders, Sampling, generate, stream
from moellava.serve.prompt import Request
from tests.older import CHUNKS

QUESTION = "what colour is it?"
GREEDY = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def models(composed):
    """A dense model, and sparse ones: with room for every token, and with room for half of them."""
    torch.manual_seed(0)
    dense = copy.deepcopy(composed.model)
    for weight in dense.model.language_model.layers.parameters():
        if weight.dim() == 2:  # as they come, what is said hangs on the last token alone
            torch.nn.init.normal_(weight, std=0.3)
    models = {"dense": dense.eval()}
    for name, dropping in {"sparse": {}, "dropping": {"drop_tokens": True, "eval_capacity_factor": 0.5}}.items():
        torch.manual_seed(1)
        models[name] = copy.deepcopy(dense)
        spec = MoESpec(moe_mode="dense", num_experts=[4], top_k_experts=2, init="noise", init_noise=1.0, **dropping)
        upcycle(models[name], spec)
        models[name].eval()
    return models


@pytest.fixture
def prompts(composed):
    return Prompts(composed)


def requests(pictures) -> list[Request]:
    """Text alone, one image, several; all lengths differ."""
    return [
        Request("hello"),
        Request(QUESTION, [pictures[0]]),
        Request("which of them is larger, and which one is darker at its border?", pictures),
        Request("look at <image> and then at <image>, and say what it is", [Image.open(pictures[2]), pictures[1]]),
        Request("a question without any picture that goes on for quite a while " * 3),
    ]


def said(model, prompts: Prompts, requests: Sequence[Request], sampling=GREEDY, **options) -> list[list[int]]:
    examples = [prompts.example(request) for request in requests]
    batch = prompts.batch(examples)
    return generate(model, batch, prompts.ending, sampling, **prompts.options(examples) | options)


@contextmanager
def reciting(model, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Makes a model say the given tokens, row by row; gives the list of the batch sizes of its forwards.

    Each the more surely the later it comes: of a row's beams, all that differ early end with it at its end.
    """
    sizes: list[int] = []

    def recite(_, args, logits):
        copies = len(logits) // len(rows)
        for number, row in enumerate(rows):
            token = row[min(len(sizes), len(row) - 1)]
            logits[number * copies : (number + 1) * copies, -1, token] += 100.0 * (1 + len(sizes))
        sizes.append(len(logits))

    hook = model.lm_head.register_forward_hook(recite)
    try:
        yield sizes
    finally:
        hook.remove()


# -- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "sparse"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_says_what_its_rows_say_alone(name, beams, models, prompts, pictures):
    sampling = Sampling(max_new_tokens=6, num_beams=beams)
    single = [said(models[name], prompts, [request], sampling)[0] for request in requests(pictures)]
    assert said(models[name], prompts, requests(pictures), sampling) == single
    assert len({tuple(row) for row in single}) > 2, "answers that are all alike would show nothing"


@pytest.mark.parametrize(
    ("name", "chunk"), [("sparse", None), pytest.param("sparse", 7, marks=CHUNKS), ("dropping", None)]
)
def test_padding_takes_no_room(name, chunk, models, prompts, pictures, monkeypatch):
    """A row behind a lot of padding says what it says alone, tokens that are dropped for want of room included."""
    model, alone = models[name], [prompts.example(requests(pictures)[1])]
    batch = prompts.batch(alone)
    fill = {"input_ids": prompts.collator.pad_token_id, "attention_mask": 0}
    padded = dict(batch)
    for key, value in fill.items():
        padded[key] = torch.cat([torch.full((1, 60), value), batch[key]], dim=1)
    expected = generate(model, batch, prompts.ending, GREEDY, **prompts.options(alone))
    monkeypatch.setattr(model.generation_config, "prefill_chunk_size", chunk)
    assert generate(model, padded, prompts.ending, GREEDY, **prompts.options(alone)) == expected
    untold = model.generate(**padded, max_new_tokens=8, do_sample=False)[0, padded["input_ids"].shape[1] :].tolist()
    assert ([untold] == expected) == (name == "sparse"), "without telling the routers, padding takes room"
    assert all(layer.context.token_mask is None for _, layer in moe_layers(model))


def test_rows_end_at_their_own_limits(models, prompts, pictures):
    whole = said(models["dense"], prompts, requests(pictures)[:3])
    cut = said(models["dense"], prompts, requests(pictures)[:3], limits=[2, 20, 5])
    assert cut == [whole[0][:2], whole[1][:8], whole[2][:5]]
    beams = said(models["dense"], prompts, requests(pictures)[:3], Sampling(8, num_beams=2), limits=[2, 20, 5])
    assert [len(row) for row in beams] == [2, 8, 5]


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("terminator", ["###", "\n", "</s>"])
def test_every_row_ends_at_its_terminator(terminator, eos, beams, models, prompts, pictures):
    tokenizer = copy.deepcopy(prompts.vlm.tokenizer)
    if not eos:
        tokenizer.eos_token = None
    ending = Ending(tokenizer, terminator)
    answers = ["yes", "a longer answer, with # in it", "漢"]
    rows = [tokenizer(f"{text}{terminator}", add_special_tokens=False).input_ids for text in answers]
    chosen = [prompts.example(request) for request in requests(pictures)[:3]]
    batch, sampling = prompts.batch(chosen), Sampling(40, num_beams=beams)
    with reciting(models["dense"], rows) as sizes:
        tokens = generate(models["dense"], batch, ending, sampling, **prompts.options(chosen))
    assert [ending.text(row) for row in tokens] == answers
    assert tokens == [ending.cut(row) for row in rows]
    assert len(sizes) == max(map(len, rows)), "nothing is generated once all rows have ended"


def test_the_prompts_own_terminators_end_nothing(models, prompts):
    """The template's `###` stands right before the answer."""
    ending = Ending(prompts.vlm.tokenizer, "###")
    prompt = prompts.vlm.tokenizer("Human: what?###", return_tensors="pt")
    tokens = generate(models["dense"], prompt, ending, GREEDY, placeholders=[], pad_token_id=0)
    assert len(tokens[0]) == 8


# -- choosing tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(8, num_beams=2), Sampling(8, temperature=1, seed=0)])
def test_placeholders_are_never_answered(sampling, models, prompts, pictures):
    image = models["dense"].config.image_token_id
    with reciting(models["dense"], [[image]]):
        assert said(models["dense"], prompts, requests(pictures)[1:2], sampling, placeholders=[])[0] == [image] * 8
        (row,) = said(models["dense"], prompts, requests(pictures)[1:2], sampling)
    assert len(row) == 8 and image not in row
    assert prompts.vlm.placeholder_ids == [image]


def test_placeholders_beyond_the_logits_are_no_concern():
    scores = torch.zeros(2, 4)
    assert NoPlaceholders([1, 4, 9])(None, scores).tolist() == [[0.0, -math.inf, 0.0, 0.0]] * 2
    assert scores.count_nonzero() == 0


def test_a_beam_is_the_likeliest_of_those_followed(models, prompts, pictures):
    """Two tokens, three beams, three images: searched by hand. Each beam has to see its row's images in order."""
    model, request = models["dense"], Request("which?", pictures)
    batch = prompts.batch([prompts.example(request)])

    def log_odds(**inputs):
        with torch.no_grad():
            logits_V = model(**inputs).logits[0, -1].float()
        odds_V = logits_V.log_softmax(-1)
        odds_V[[*prompts.ending.stop_ids, model.config.image_token_id]] = -math.inf
        return odds_V

    found = []
    first_odds, first = log_odds(**batch).topk(3)
    for odds, token in zip(first_odds, first, strict=True):
        longer = torch.cat([batch["input_ids"], token[None, None]], dim=1)
        second = log_odds(**batch | {"input_ids": longer, "attention_mask": torch.ones_like(longer)}).max(-1)
        found.append((float(odds + second.values), [int(token), int(second.indices)]))
    swapped = batch | {"pixel_values": batch["pixel_values"][[0, 0, 1]]}
    assert not torch.allclose(log_odds(**batch), log_odds(**swapped)), "the images would not matter"
    assert said(model, prompts, [request], Sampling(2, num_beams=3)) == [max(found)[1]]


def test_sampling_is_bounded_by_top_k_and_top_p(models, prompts, pictures):
    greedy = said(models["dense"], prompts, requests(pictures))
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        assert said(models["dense"], prompts, requests(pictures), Sampling(8, temperature=2, **narrow)) == greedy
    wide = Sampling(8, temperature=2, seed=0)
    assert said(models["dense"], prompts, requests(pictures), wide) != greedy
    few = Sampling(1, temperature=50.0, top_k=3, seed=0)
    asked = [prompts.example(Request("hello"))] * 40
    batch = prompts.batch(asked)
    drawn = {row[0] for row in generate(models["dense"], batch, prompts.ending, few, **prompts.options(asked))}
    with torch.no_grad():
        likeliest = models["dense"](**prompts.batch(asked[:1])).logits[0, -1].topk(3).indices
    assert drawn == set(likeliest.tolist())


def test_what_a_folder_says_of_generation_does_not_act_where_it_is_given(models, prompts, pictures, monkeypatch):
    expected = said(models["dense"], prompts, requests(pictures))
    sampled = said(models["dense"], prompts, requests(pictures), Sampling(8, temperature=1.0, seed=5))
    folder = {"do_sample": True, "temperature": 0.01, "top_k": 1, "max_length": 3, "num_return_sequences": 2}
    for name, value in (folder | {"stop_strings": ["a"], "num_beams": 2, "use_cache": False}).items():
        monkeypatch.setattr(models["dense"].generation_config, name, value)
    assert said(models["dense"], prompts, requests(pictures)) == expected
    assert said(models["dense"], prompts, requests(pictures), Sampling(8, temperature=1.0, seed=5)) == sampled


def test_repetition_is_penalised_where_asked_or_where_the_folder_says_so(models, prompts, pictures, monkeypatch):
    chosen = requests(pictures)[:2]
    rows = [[1000, 1001] * 4] * 2
    with reciting(models["dense"], rows):
        plain = said(models["dense"], prompts, chosen)
    with reciting(models["dense"], rows):
        penalised = said(models["dense"], prompts, chosen, Sampling(8, repetition_penalty=1000.0))
    assert plain == rows and penalised != rows
    monkeypatch.setattr(models["dense"].generation_config, "repetition_penalty", 1000.0)
    with reciting(models["dense"], rows):
        assert said(models["dense"], prompts, chosen) == penalised
    with reciting(models["dense"], rows):
        assert said(models["dense"], prompts, chosen, Sampling(8, repetition_penalty=1.0)) == plain


def test_a_seed_repeats_and_leaves_the_generator_alone(models, prompts, pictures):
    def drawn(seed):
        return said(models["dense"], prompts, requests(pictures), Sampling(8, temperature=1.5, seed=seed))

    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = drawn(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    assert drawn(3) == first and drawn(4) != first
    assert drawn(None) != drawn(None)


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "max_new_tokens": [0, -1],
        "temperature": [-1.0, math.nan, math.inf],
        "top_p": [0.0, 1.5, math.nan],
        "top_k": [-1],
        "num_beams": [0],
        "repetition_penalty": [0.0, -1.0, math.nan, math.inf],
        "seed": [2**64],
    }.items(),
)
def test_sampling_refuses_what_means_nothing(name, values):
    for value in values:
        with pytest.raises(UserError, match=f"^{name} is {value}"):
            Sampling(**{name: value})


@pytest.mark.parametrize("values", [{"top_p": 0.9}, {"top_k": 3}])
def test_sampling_refuses_what_would_not_act(values):
    (name,) = values
    with pytest.raises(UserError, match=f"{name} is .*temperature 0.*leave {name} out"):
        Sampling(**values)
    assert Sampling(**values, temperature=0.1).options()[name] == values[name]


# -- streams -------------------------------------------------------------------------------------------------------


def pieces(model, prompts: Prompts, request: Request, sampling=GREEDY, **options) -> Iterator[str]:
    asked = [prompts.example(request)]
    return stream(model, prompts.batch(asked), prompts.ending, sampling, **prompts.options(asked) | options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "sparse", "dropping"])
def test_a_stream_joins_to_the_answer(name, models, prompts, pictures):
    samplings = [GREEDY, Sampling(8, num_beams=2), Sampling(8, temperature=1.0, top_k=5, seed=2)]
    for request in requests(pictures):
        for sampling in samplings:
            shown = list(pieces(models[name], prompts, request, sampling))
            assert "".join(shown) == prompts.ending.text(said(models[name], prompts, [request], sampling)[0])
            assert len(shown) > 1 or sampling.num_beams > 1


def test_pieces_come_while_the_answer_grows(models, prompts):
    text = "one 漢字 # two ### three"
    rows = [prompts.vlm.tokenizer(text, add_special_tokens=False).input_ids]
    prompts.ending = Ending(prompts.vlm.tokenizer, "###")
    with reciting(models["dense"], rows):
        shown = list(pieces(models["dense"], prompts, Request("hello"), Sampling(40)))
    assert shown == ["one", " 漢", "字", " # two"] or shown == ["one", " 漢", "字", " #", " two"]


def test_a_reader_that_stops_leaves_no_thread(models, prompts):
    before = threading.active_count()
    with reciting(models["sparse"], [[1000]]) as sizes:
        reader = pieces(models["sparse"], prompts, Request("hello"), Sampling(400), limits=[400])
        assert next(reader)
        assert threading.active_count() == before + 1
        reader.close()
        assert threading.active_count() == before
        assert len(sizes) < 300
    assert not models["sparse"]._forward_pre_hooks, "the hook on the model is gone too"


def test_an_error_in_the_thread_is_the_readers(models, prompts):
    before = threading.active_count()
    forwards = []

    def fail(_, args, kwargs):
        forwards.append(1)
        if len(forwards) == 5:
            raise RuntimeError("out of memory")

    hook = models["dense"].register_forward_pre_hook(fail, with_kwargs=True)
    shown = []
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            shown.extend(pieces(models["dense"], prompts, Request("hello"), Sampling(40)))
    finally:
        hook.remove()
    assert len(forwards) == 5 and threading.active_count() == before


def test_a_stream_is_of_one_row(models, prompts):
    asked = [prompts.example(Request("hello"))] * 2
    batch = prompts.batch(asked)
    with pytest.raises(ValueError, match="one row, and this batch has 2"):
        next(stream(models["dense"], batch, prompts.ending, GREEDY, **prompts.options(asked)))


# -- around it -----------------------------------------------------------------------------------------------------


def test_every_module_returns_to_its_own_mode(composed):
    model = copy.deepcopy(composed.model).train()
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes


def test_a_taught_model_answers_with_beams_and_as_a_stream(taught, pictures):
    prompts = Prompts(taught)
    asked = [Request(QUESTION, [path]) for path in pictures] + [Request("and the sky?")]
    expected = ["red", "green", "blue", "blue it is"]
    for sampling in (Sampling(50), Sampling(50, num_beams=3)):
        assert [prompts.ending.text(row) for row in said(taught.model, prompts, asked, sampling)] == expected
        assert ["".join(pieces(taught.model, prompts, request, sampling)) for request in asked] == expected
