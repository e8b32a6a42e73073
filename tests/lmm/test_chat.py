"""Chat with released models: training's prompt, Hugging Face's generate, one command."""

from __future__ import annotations

import pytest

from moellava.cli import main as moellava
from moellava.errors import UserError
from moellava.serve.generate import Sampling
from moellava.serve.prompt import Request
from moellava.serve.released import inputs_of, is_released, open_released, stream_released
from tests.lmm.tiny import NATIVE

QUESTION = "<image>\nWhat colour is it?"


@pytest.mark.parametrize("family", NATIVE)
def test_a_released_model_reads_what_training_shows_it(family, opened, pictures, samples_of):
    released = opened(family)
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "red"}]
    sample = samples_of(family, [{"id": "a", "image": pictures[0].name, "conversations": turns}])[0]
    inputs = inputs_of(released, Request(messages=turns[:1], images=[pictures[0]]))
    prompt = int((sample["labels"] == -100).long().cumprod(0).sum())
    images = inputs["input_ids"].shape[1] - prompt + 1  # the placeholder became so many tokens
    head = int((sample["input_ids"] == -200).nonzero()[0])
    assert inputs["input_ids"][0, :head].tolist() == sample["input_ids"][:head].tolist()
    assert inputs["input_ids"][0, head + images :].tolist() == sample["input_ids"][head + 1 : prompt].tolist()


@pytest.mark.parametrize("family", NATIVE)
def test_a_stream_is_what_generate_gives(family, opened, pictures):
    released = opened(family)
    for request in (Request(QUESTION, [pictures[0]]), Request("and without a picture?"), Request("two", pictures[:2])):
        said = "".join(stream_released(released, request, Sampling(max_new_tokens=5)))
        inputs = inputs_of(released, request)
        tokens = released.model.generate(**inputs, max_new_tokens=5, do_sample=False)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        assert said == released.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_an_error_while_generating_reaches_the_asker(opened, monkeypatch):
    released = opened("llava-1.5")

    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(released.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream_released(released, Request("hello"), Sampling()))


def test_the_command_opens_either_kind(tiny_lmm, pictures, capsys):
    folder = str(tiny_lmm("qwen2-vl"))
    assert is_released(folder)
    words = ["--model-path", folder, "--image-file", *map(str, pictures[:2]), "--question", "What are these?"]
    assert moellava(["chat", *words, "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_an_architecture_with_code_of_its_own_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "phi3_v"}')
    with pytest.raises(UserError, match="phi3-v"):
        open_released(str(tmp_path))
