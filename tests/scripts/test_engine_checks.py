# SPDX-License-Identifier: Apache-2.0
"""The checks of engines: what they take for equal, and what an engine is told. The engines themselves run by hand."""

from __future__ import annotations

import copy
import json
import sys

import compare
import pytest
from asked import adapter_settings, messages, vllm_settings
from compare import compared, table

OWN = [
    {
        "question": "what color is the circle?",
        "image": "pictures/7.png",
        "text": "teal",
        "length": 2,
        "prompt": [432, 432, 5],
        "tokens": [351, 0],
        "logprobs": [{"351": -0.5, "12": -1.5}, {"0": -0.001, "351": -7.0}],
    }
]


def theirs(**changes):
    """The same answer, but for some of it."""
    return [{**copy.deepcopy({name: OWN[0][name] for name in (*compare.EXACT, "logprobs")}), **changes}]


def test_equal_answers_are_equal():
    result = compared(OWN, theirs(logprobs=[{"351": -0.50001, "9": -1.0}, {"0": -0.001}]))
    assert (result["equal"], result["answers"]) == (1, 1)
    assert result["largest_logprob_difference"] == pytest.approx(1e-5)
    assert result["compared"] == ["length", "logprobs", "prompt", "text", "tokens"]
    assert "1 of 1 equal" in table("title", result)


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"text": "red"}, ["text"]),
        ({"length": 3}, ["length"]),
        ({"prompt": [432, 5]}, ["prompt"]),
        ({"tokens": [350, 0]}, ["tokens"]),
        ({"logprobs": [{"351": -0.6}, {"0": -0.001}]}, ["logprobs"]),
        ({"logprobs": [{"351": -0.5, "12": -1.6}, {"0": -0.001}]}, ["logprobs"]),
        ({"logprobs": [{"351": float("nan")}, {"0": -0.001}]}, ["logprobs"]),
    ],
)
def test_what_differs_is_named(changes, differs):
    result = compared(OWN, theirs(**changes))
    assert (result["equal"], result["rows"][0]["differs"]) == (0, differs)
    assert f"DIFFERS: {differs[0]}" in table("title", result)


def test_a_server_that_tells_texts_is_compared_by_them():
    result = compared(OWN, [{"text": "teal", "length": 2}])
    assert (result["equal"], result["compared"]) == (1, ["length", "text"])
    assert result["largest_logprob_difference"] is None


@pytest.mark.parametrize(("own", "others"), [([], []), (OWN, []), (OWN, [{"tokens": [351, 0]}])])
def test_nothing_to_compare_is_no_success(own, others):
    with pytest.raises(ValueError, match="compare"):
        compared(own, others)


@pytest.fixture
def status_of(tmp_path, monkeypatch):
    """(engine's answers, base's answers or None) -> the exit status of `compare.py`, which leaves `result`."""

    def run(answers, base=None) -> int:
        for name, told in (("own", OWN), ("engine", answers), ("base", base)):
            side = {"engine": name, "model": "m", "versions": {}, "answers": told}
            (tmp_path / name).write_text(json.dumps(side))
        flags = {"title": "t", "own": tmp_path / "own", "theirs": tmp_path / "engine", "output": tmp_path / "result"}
        flags |= {"unlike": tmp_path / "base"} if base else {}
        words = [str(word) for key in flags for word in (f"--{key}", flags[key])]
        monkeypatch.setattr(sys, "argv", ["compare", *words])
        return compare.main()

    return run


@pytest.mark.parametrize(("text", "status"), [("teal", 0), ("red", 1)])
def test_the_exit_status_tells(text, status, status_of, tmp_path):
    assert status_of(theirs(text=text)) == status
    assert json.loads((tmp_path / "result").read_text())["equal"] == 1 - status


def test_an_adapter_that_changes_nothing_fails(status_of):
    other = [{**OWN[0], "logprobs": [{"351": -0.7}, {"0": -0.001}]}]
    assert status_of(theirs(), base=other) == 0
    assert status_of(theirs(), base=OWN) == 1


def test_a_question_carries_its_picture(tmp_path):
    (tmp_path / "7.png").write_bytes(b"picture")
    (turn,) = messages({"image": tmp_path / "7.png", "question": "what?"})
    assert turn["content"][0]["image_url"]["url"] == "data:image/png;base64,cGljdHVyZQ=="
    assert turn["content"][1] == {"type": "text", "text": "what?"}


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({"projector_hidden_act": "gelu"}, {}),
        (
            {"projector_hidden_act": "linear"},
            {"hf_overrides": {"projector_hidden_act": "torch.nn.modules.linear.Identity"}},
        ),
        (
            {"projector_hidden_act": "linear", "auto_map": {}},
            {"model_impl": "transformers", "trust_remote_code": True},
        ),
    ],
)
def test_what_vllm_is_told_of_a_folder(config, settings, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert vllm_settings(tmp_path) == settings


@pytest.mark.parametrize(("rank", "largest"), [(8, 8), (9, 16)])
def test_what_vllm_is_told_of_an_adapter(rank, largest, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank}))
    settings = adapter_settings(tmp_path)
    assert (settings["enable_lora"], settings["max_lora_rank"]) == (True, largest)
