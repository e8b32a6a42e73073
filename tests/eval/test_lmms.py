# SPDX-License-Identifier: Apache-2.0
"""The face of lmms-eval, with a stand-in of the names that are used. (scripts/check_lmms_eval.sh: the real.)"""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from moellava.serve.prompt import Request
from tests.processes import ROOT


@dataclass
class GenerationResult:
    text: Any


@dataclass
class ModelManifest:
    model_id: str
    simple_class_path: str


class Lmms:
    """lmms_eval.api.model.lmms, as far as it is read."""

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}


@pytest.fixture
def face(monkeypatch) -> ModuleType:
    """The module, imported beside the stand-in."""
    names = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"GenerationResult": GenerationResult},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, content in names.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "moellava.eval.lmms", raising=False)
    module = importlib.import_module("moellava.eval.lmms")
    monkeypatch.delitem(sys.modules, "moellava.eval.lmms")
    return module


@pytest.fixture
def model(face, eval_model) -> Any:
    """A model with two documents: one with a picture, one without."""
    made = face.Moellava(str(eval_model), batch_size="2", device="cpu")
    made.task_dict = {"t": {"test": [{"image": Image.new("RGB", (28, 28), "red")}, {"image": None}]}}
    return made


def asked(*args: Any, doc: int = 0) -> Any:
    return SimpleNamespace(args=(*args, lambda row: [row["image"]], doc, "t", "test"))


def test_answers_are_ours_whatever_their_settings(model):
    from moellava.serve.answer import answer

    short, long = {"max_new_tokens": 2, "do_sample": False, "temperature": 1}, {"max_new_tokens": 6, "until": [" "]}
    requests = [asked("what?", short), asked("who?", long, doc=1), asked("when?", short, doc=1)]
    said = model.generate_until(requests)
    picture = model.task_dict["t"]["test"][0]["image"]
    own = [Request("what?", [picture]), Request("when?")]
    assert [said[0], said[2]] == answer(model.vlm, own, max_new_tokens=2)
    (whole,) = answer(model.vlm, [Request("who?")], max_new_tokens=6)
    assert said[1] == whole.split(" ")[0]


def test_likelihoods_are_those_of_the_answer_and_its_end(model):
    pairs = [one.text for one in model.loglikelihood([asked("what?", "a b"), asked("what?", " a b", doc=1)])]
    assert all(-math.inf < total < 0 and isinstance(is_greedy, bool) for total, is_greedy in pairs)
    tokenizer = model.vlm.tokenizer
    prompt = "".join(piece.text for piece in model.vlm.encoder.pieces(Request("what?").record, opens=True))
    ending = model.vlm.encoder.renderer.terminator
    begin = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(f"{prompt} a b{ending}")["input_ids"]])
    with torch.no_grad():
        logprobs = model.vlm.model(input_ids=ids).logits[0].log_softmax(-1)
    steps = range(begin, ids.shape[1])
    expected = sum(float(logprobs[place - 1, ids[0, place]]) for place in steps)
    assert pairs[1][0] == pytest.approx(expected, rel=1e-4)


def test_the_likeliest_answer_is_greedy(model, face):
    said = model.generate_until([asked("what?", {"max_new_tokens": 3}, doc=1)])[0]
    (one,) = model.loglikelihood([asked("what?", "quite another thing", doc=1)])
    assert said and one.text[1] is False


def test_the_entry_point_names_the_class(face):
    assert face.MANIFEST.model_id == "moellava"
    module, _, name = face.MANIFEST.simple_class_path.rpartition(".")
    assert module == "moellava.eval.lmms" and face.Moellava.__name__ == name and face.Moellava.is_simple
    assert '"lmms_eval.models": ["moellava=moellava.eval.lmms:MANIFEST"]' in (ROOT / "setup.py").read_text()


@pytest.mark.parametrize(
    ("given", "sampling"),
    [
        ({}, (128, 0, 1, 1)),
        ({"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 7}, (7, 0.5, 0.9, 1)),
        ({"temperature": 0.5, "top_p": 0.9, "do_sample": False, "num_beams": 3}, (128, 0, 1, 3)),
        ({"temperature": None, "top_p": None, "num_beams": None}, (128, 0, 1, 1)),
    ],
)
def test_settings_of_a_task(face, given, sampling):
    found = face.sampling_of(given)
    assert (found.max_new_tokens, found.temperature, found.top_p, found.num_beams) == sampling


def test_several_rounds_are_not_served(model):
    with pytest.raises(NotImplementedError, match="one round"):
        model.generate_until_multi_round([])
