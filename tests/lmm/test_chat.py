# SPDX-License-Identifier: Apache-2.0
"""Chat with released models: training's prompt, Hugging Face's generate, batches, streams, one command."""

from __future__ import annotations

import pytest
import torch

from moellava.cli import main as moellava
from moellava.constants import IGNORE_INDEX
from moellava.data.video import read_video
from moellava.errors import UserError
from moellava.moe import MoESpec, expert_parameters, router_parameters, upcycle
from moellava.serve.answer import Prompts, answer, stream
from moellava.serve.generate import Sampling
from moellava.serve.prompt import Request
from tests.lmm.tiny import NATIVE, WITH_VIDEO, batch_of, reopen

QUESTION = "<image>\nWhat colour is it?"
FRAMES = 3


def inputs_of(vlm, *requests):
    """The batch that `answer` gives to generate."""
    prompts = Prompts(vlm)
    return prompts.batch([prompts.example(request) for request in requests])


@pytest.mark.slow
@pytest.mark.parametrize("family_id", NATIVE)
def test_training_the_encoder_and_chat_read_the_same(family_id, opened, pictures, samples_of):
    """The prompt is the beginning of the training sample, with placeholders and with a model's own tokens."""
    vlm = opened(family_id)
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "red"}]
    dataset = samples_of(family_id, [{"id": "a", "image": pictures[0].name, "conversations": turns}])
    sample, trained = dataset[0], batch_of(family_id, dataset, 0)
    request = Request(messages=turns[:1], images=[pictures[0]])

    prompt = vlm.encoder.encode(request.record, opens=True)
    assert sample["input_ids"][: len(prompt.ids)].tolist() == prompt.ids
    assert (sample["labels"] == IGNORE_INDEX).long().cumprod(0).sum() == len(prompt.ids) and not prompt.is_trained

    inputs = inputs_of(vlm, request)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(inputs["input_ids"][0], trained["input_ids"][0, :length]) and length == prompt.length
    assert (trained["labels"][0] == IGNORE_INDEX).long().cumprod(0).sum() == length
    assert all(torch.equal(value, trained[name]) for name, value in inputs.items() if "pixel" in name or "grid" in name)


@pytest.mark.parametrize("family_id", NATIVE)
def test_a_stream_is_what_generate_gives(family_id, small_opened, pictures):
    vlm = small_opened(family_id)
    for request in (Request(QUESTION, [pictures[0]]), Request("and without a picture?"), Request("two", pictures[:2])):
        said = "".join(stream(vlm, request, Sampling(max_new_tokens=5)))
        inputs = inputs_of(vlm, request)
        tokens = vlm.model.generate(**inputs, max_new_tokens=5, do_sample=False)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        assert said == vlm.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.fixture
def lively(small_lmm):
    """architecture -> its tiny model with larger weights, so that what is read decides what is said."""

    def make(family_id):
        vlm = reopen(small_lmm(family_id))
        torch.manual_seed(0)
        for parameter in vlm.model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        return vlm

    return make


def sparse(vlm):
    """The same model with different experts and routers that choose among them."""
    spec = MoESpec(moe_mode="dense", num_experts=[4], top_k_experts=2)
    upcycle(vlm.model, spec)
    vlm.sparse(spec)
    for parameter in (*router_parameters(vlm.model), *expert_parameters(vlm.model)):
        parameter.data += 0.1 * torch.randn_like(parameter)
    return vlm


@pytest.mark.parametrize("family_id", [*NATIVE, "sparse gemma3", "sparse llama-3.2-vision"])
def test_a_batch_answers_as_its_requests_do_alone(family_id, lively, pictures, clips):
    """One image, two or a video, and text alone; of three lengths, so that two of them are padded on the left."""
    experts, _, family_id = family_id.rpartition(" ")
    vlm = sparse(lively(family_id)) if experts else lively(family_id)
    shown = {"images": pictures[:2]}
    if family_id in WITH_VIDEO:
        shown = {"videos": [read_video(clips / "shapes.mp4", FRAMES)]}
    requests = [
        Request(QUESTION, [pictures[0]]),
        Request("Which of them moves?", **shown),
        Request("Hello, are you there?"),
    ]
    padding = (inputs_of(vlm, *requests)["attention_mask"] == 0).sum(dim=1)
    assert len(set(padding.tolist())) == 3 and padding.min() == 0
    alone = [answer(vlm, [request], max_new_tokens=8)[0] for request in requests]
    assert answer(vlm, requests, max_new_tokens=8) == alone
    assert len(set(alone)) == 3, "answers that are all alike would show nothing"


@pytest.mark.parametrize("family_id", ["qwen3-vl", "llama-3.2-vision"])
def test_a_stream_joins_to_the_answer(family_id, small_opened, pictures):
    vlm = small_opened(family_id)
    for request in (Request(QUESTION, [pictures[0]]), Request("What are they?", pictures[1:]), Request("Hello?")):
        pieces = list(stream(vlm, request, Sampling(max_new_tokens=12)))
        assert "".join(pieces) == answer(vlm, [request], max_new_tokens=12)[0] and len(pieces) > 1


def test_an_error_while_generating_reaches_the_asker(small_opened, monkeypatch):
    vlm = small_opened("llava-1.5")

    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(vlm.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream(vlm, Request("hello"), Sampling()))


def test_the_command_opens_a_released_model(small_lmm, pictures, capsys):
    folder = str(small_lmm("qwen2-vl"))
    words = ["--model-path", folder, "--image-file", *map(str, pictures[:2]), "--question", "What are these?"]
    assert moellava(["chat", *words, "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize("family_id", ["phi3-v", pytest.param("qwen-vl", marks=pytest.mark.slow)])
def test_an_architecture_with_code_of_its_own_is_refused(family_id, small_opened, small_lmm, capsys):
    with pytest.raises(UserError, match=f"{family_id} models chat with the code of their repository"):
        answer(small_opened(family_id), [Request("Hello?")])
    assert moellava(["chat", "--model-path", str(small_lmm(family_id)), "--question", "Hello?"]) == 2
    assert f"{family_id} models need the Python code of their own" in capsys.readouterr().err
