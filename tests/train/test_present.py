# SPDX-License-Identifier: Apache-2.0
"""What flags of data name is looked for before anything loads."""

from __future__ import annotations

import json

import pytest

from moellava.errors import DataError, UserError
from moellava.train import train as training
from moellava.train.arguments import DataArguments
from moellava.train.parsing import parse_arguments
from moellava.train.present import require_present
from tests.tiny import record

ABSENT = {
    "data_path": (["nope.json"], "nope.json: no such data file"),
    "eval_data_path": (["held/nope.jsonl"], "held/nope.jsonl: no such data file"),
    "image_folder": ("nowhere", "--image_folder nowhere: no such folder"),
    "video_folder": ("a.json", "--video_folder a.json: no such folder"),
    "skip_list": ("bad.txt", "bad.txt: the skip list cannot be read: no such file"),
}
"""Flag of data that names something to read -> a value that names nothing, and what is said of it."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with one data file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps([record("0", "q", "a")]))
    return tmp_path


@pytest.mark.parametrize("flag", ABSENT)
def test_what_a_flag_names_is_missed(flag, here):
    value, said = ABSENT[flag]
    with pytest.raises(UserError) as caught:
        require_present(DataArguments(**{"data_path": ["a.json"], flag: value}))
    assert str(caught.value) == said


def test_all_is_told_at_once(here):
    (here / "mixed.yaml").write_text("datasets: [{json_path: gone.json}, {json_path: a.json}]")
    data = DataArguments(["a.json", "b*.json", "mixed.yaml", "nope.json"], ["held.json"], "nowhere", "away")
    with pytest.raises(DataError) as caught:
        require_present(data)
    told = ["b*.json: no data file fits this pattern", "gone.json: no such data file", "nope.json: no such data file"]
    told += ["held.json: no such data file", "--image_folder nowhere: no such folder"]
    assert caught.value.problems == [*told, "--video_folder away: no such folder"]


def test_what_lies_elsewhere_is_not_asked_for(here):
    require_present(DataArguments(["memory://no/one.json", "memory://no/*.json"], [], "memory://no/images"))


@pytest.mark.parametrize("flag", ABSENT)
def test_a_run_looks_before_weights_are_read(flag, here, flags_for, monkeypatch):
    flags = flags_for(here / "run", "pretrain") | {flag: ABSENT[flag][0]}
    if flag == "eval_data_path":
        flags |= {"eval_strategy": "epoch"}
    monkeypatch.setattr(training, "assemble", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(UserError, match="no such"):
        training.train(*parse_arguments([str(word) for name, value in flags.items() for word in words(name, value)]))
    assert not (here / "run" / "run.json").exists()


def words(name: str, value: object) -> list[object]:
    """A flag as the command line has it."""
    return [f"--{name}", *(value if isinstance(value, list) else [value])]
