# SPDX-License-Identifier: Apache-2.0
"""What a result holds, what is printed of it, and two results compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moellava.cli import main
from moellava.errors import UserError
from moellava.eval import asking, jobs
from moellava.eval.checkpoint import checkpoint_digest
from moellava.eval.progress import Progress
from moellava.eval.tally import QUANTILE
from moellava.serve.answer import Answer
from moellava.vlm import open_vlm

GQA = ["yes", "red", "table"]
"""The right answers of its miniature: one about image 0 and one more, one about image 1."""


@pytest.fixture
def score(monkeypatch, eval_model, eval_data, tmp_path) -> Callable[..., dict[str, Any]]:
    """(name, answers, task, flags) -> the result that the command writes to NAME.json."""
    vlm = open_vlm(eval_model, device="cpu")
    monkeypatch.setattr(jobs, "open_vlm", lambda path: vlm)

    def run(name: str, answers: list[str], task: str = "gqa", *flags: str, status: int = 0) -> dict[str, Any]:
        said = [text if isinstance(text, Answer) else Answer(text) for text in answers]
        monkeypatch.setattr(asking, "answer", lambda vlm, requests, **options: said)
        words = ["eval", "--model-path", str(eval_model), "--task", task, "--data-folder", str(eval_data)]
        assert main([*words, "--output", str(tmp_path / f"{name}.json"), *flags]) == status
        return {} if status else json.loads((tmp_path / f"{name}.json").read_text())

    return run


def test_a_result_says_how_it_was_taken(score, eval_model, tmp_path, capsys):
    result = score("a", ["Yes", "blue", "table."])
    assert result["score"] == pytest.approx(2 / 3) and result["accuracy"] == result["score"] and result["right"] == 2
    assert result["metric"] == "accuracy: exact match" and "jackknife" in result["interval_is"]
    # Two questions about image 0, of which one is right, and one about image 1: without each, 1 and 1/2.
    error = (0.5 * (0.25**2 + 0.25**2)) ** 0.5
    assert result["interval"] == pytest.approx([2 / 3 - QUANTILE * error, 1.0])
    assert result["settings"]["checkpoint"] == f"sha256:{checkpoint_digest(eval_model, '--model-path')}"
    assert result["settings"]["max_new_tokens"] == 128 and result["settings"]["decoding"] == "greedy"
    assert result["mistakes"] == [
        {"question": result["mistakes"][0]["question"], "image": "n0", "expected": "red", "answered": "blue"}
    ]
    assert list(result)[-1] == "items"
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert sum(line.lstrip().startswith('{"id"') for line in lines) == 3
    printed = capsys.readouterr().out
    assert "gqa (testdev_balanced split): 66.67% of 3 questions (95% interval " in printed
    assert "  open      50.00% of 2" in printed


def test_two_models_on_the_same_questions(score, tmp_path, capsys):
    score("before", ["no", "red", "table"])
    result = score("after", GQA, "gqa", "--against", str(tmp_path / "before.json"))
    other = result["against"]
    assert other["difference"] == pytest.approx(1 / 3) and other["score"] == pytest.approx(2 / 3)
    low, high = other["interval"]
    assert low < 1 / 3 < high
    assert "+33.33 points (95% interval " in capsys.readouterr().out
    same = score("same", GQA, "gqa", "--against", str(tmp_path / "after.json"))
    assert same["against"]["difference"] == 0 and same["against"]["interval"] == [0, 0]


def test_a_folder_of_results_is_compared_task_by_task(score, tmp_path):
    score("a", ["no"] * 3, "gqa", "--output-dir", str(tmp_path / "first"))
    result = score("b", GQA, "gqa", "--output-dir", str(tmp_path / "second"), "--against", str(tmp_path / "first"))
    assert result["against"]["difference"] == 1
    assert json.loads((tmp_path / "second" / "gqa" / "result.json").read_text())["against"] == result["against"]


def test_what_cannot_be_compared_is_refused(score, tmp_path, capsys):
    score("gqa", GQA)
    score("other", ["A", "B", "C"], "scienceqa", "--against", str(tmp_path / "gqa.json"), status=2)
    assert "a result of gqa, where one of scienceqa" in capsys.readouterr().err
    score("part", GQA[:2], "gqa", "--limit", "2")
    score("whole", GQA, "gqa", "--against", str(tmp_path / "part.json"), status=2)
    assert "of 2 questions, this one of 3" in capsys.readouterr().err
    (tmp_path / "broken.json").write_text('{"benchmark": "gqa", "items": [{"id": "1"}]}')
    score("broken2", GQA, "gqa", "--against", str(tmp_path / "broken.json"), status=2)
    assert "its items are damaged" in capsys.readouterr().err


def test_what_could_not_be_answered_is_told_and_wrong(score, monkeypatch, capsys):
    refused = Answer.refused(UserError("too long"))
    result = score("a", ["yes", refused, "table"])
    assert result["score"] == pytest.approx(2 / 3)
    (told,) = result["unanswered"]
    assert told["image"] == "n0" and told["error"] == "too long"
    assert "1 questions could not be answered, and count as wrong" in capsys.readouterr().out


def test_answers_of_another_model_are_not_gone_on_with(score, eval_model, eval_data, tmp_path, capsys):
    score("a", GQA, "gqa", "--output-dir", str(tmp_path / "out"))
    other = shutil.copytree(eval_model, tmp_path / "other")
    content = json.loads((other / "digests.json").read_text())
    content["sha256"]["model.safetensors"] = "0" * 64
    (other / "digests.json").write_text(json.dumps(content))
    words = ["eval", "--model-path", str(other), "--task", "gqa", "--data-folder", str(eval_data)]
    assert main([*words, "--output-dir", str(tmp_path / "out")]) == 2
    assert "holds answers of another run: checkpoint is" in capsys.readouterr().err


def test_a_model_is_told_by_its_weights_and_not_by_its_log(eval_model, tmp_path):
    copy = shutil.copytree(eval_model, tmp_path / "copy")
    (copy / "trainer_state.json").write_text("{}")
    digest = checkpoint_digest(eval_model, "--model-path")
    assert checkpoint_digest(copy, "--model-path") == digest
    (copy / "digests.json").unlink()
    (copy / "trainer_state.json").unlink()
    whole = checkpoint_digest(copy, "--model-path")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert checkpoint_digest(copy, "--model-path") != whole


def test_progress_counts_what_is_left():
    progress = Progress("pope", 100, done=40)
    assert progress.line(5) == "pope: 40 of 100, 5 s, no answer yet"
    progress.add(20)
    assert progress.line(10) == "pope: 60 of 100, 10 s, 20 s to go"


def test_a_prompt_is_shown_in_full(score):
    assert score("a", GQA)["prompt"]["example"].endswith("ASSISTANT:")
    assert Path(score("b", GQA)["settings"]["model_path"]).name == "tiny"
