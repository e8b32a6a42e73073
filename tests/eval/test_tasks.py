# SPDX-License-Identifier: Apache-2.0
"""Every task's miniature, by the command itself: read, answered, gone on with after a kill, scored, and written."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from moellava.cli import main
from moellava.compare.scores import Exam
from moellava.errors import UserError
from moellava.eval import asking, jobs
from moellava.eval.suite import BENCHMARKS
from moellava.serve.answer import Answer
from moellava.vlm import open_vlm
from tests.eval.miniatures import MINIATURES

LAYOUT = {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
"""Fields of an answer, as LLaVA's scripts read them."""

RIGHT: dict[str, tuple[str | None, list[str], float | None]] = {
    "vqav2": (None, ["Red.", "two", ""], None),
    "vqav2 val2014": ("val2014", ["Red", "red.", "blue"], 2 / 3),
    "vizwiz": (None, ["Soup", "a can", ""], None),
    "vizwiz val": ("val", ["unanswerable", "soup", "cat"], (1 + 0.3) / 3),
    "textvqa": (None, ["ACME", "the 1999", ""], (1 + 0.3) / 3),
    "gqa": (None, ["Yes", "red.", "chair"], 2 / 3),
    "scienceqa": (None, ["A", "B. a cat", "A"], 2 / 3),
    "pope": (None, ["Yes", "No"] * 6, 1.0),
    "mme": (None, ["yes", "no"] * 5 + ["no", "no"], 200 + 200 + 75 + 50),
    "mmbench": (None, ["B", "A", "A", "C", "B", "A", "A"], 2 / 3),
    "mmbench test": ("mmbench_test_20230712", ["B", "A", "A", "C", "B", "A", "A"], None),
    "mmbench turned": ("turned", ["B", "A"], 1.0),
    "mmbench-cn": (None, ["B", "A", "A", "B", "B", "A", "A"], 1 / 3),
    "seed-bench": (None, ["A", "B. green", "D"], 2 / 3),
    "llava-bench": (None, ["It", "is", "so"], None),
    "mm-vet": (None, ["-1", ""], None),
    "own": (None, ["red\n", "red", "bern"], 2 / 3),
}
"""Task, with a word that tells two of its cases apart -> split, what is said, and the score of that. (The table of
MMBench has three questions: two, three and two turns; the third is about the first one's image.)"""


@pytest.fixture(scope="module")
def opened(eval_model) -> Any:
    """The tiny model, opened once."""
    return open_vlm(eval_model, device="cpu")


@pytest.fixture
def asked(monkeypatch, opened) -> Callable[[list[str]], list[str]]:
    """(answers) -> the questions that were put, once the command has run; the answers are said in that order."""
    monkeypatch.setattr(jobs, "open_vlm", lambda path: opened)

    def say(answers: list[str]) -> list[str]:
        seen: list[str] = []

        def answer(vlm: Any, requests: list[Any], **options: Any) -> list[Answer]:
            first = len(seen)
            seen.extend(request.messages[-1]["value"] for request in requests)
            return [Answer(text) for text in answers[first : len(seen)]]

        monkeypatch.setattr(asking, "answer", answer)
        return seen

    return say


def words(model: Path, data: Path, case: str, split: str | None, *more: str) -> list[str]:
    """The command's words for one case of `RIGHT`."""
    named = ["--split", split] if split else []
    return ["eval", "--model-path", str(model), "--task", case.split()[0], "--data-folder", str(data), *named, *more]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_task_has_a_miniature():
    assert {*MINIATURES, "mmbench-cn", "easy-vqa"} == set(BENCHMARKS)
    assert {case.split()[0] for case in RIGHT} == set(BENCHMARKS) - {"easy-vqa"}


@pytest.mark.parametrize("case", RIGHT)
def test_a_task_is_answered_scored_and_gone_on_with(case, eval_model, eval_data, asked, tmp_path):
    split, answers, score = RIGHT[case]
    task = case.split()[0]
    folder = tmp_path / task
    run = words(eval_model, eval_data, case, split, "--output-dir", str(tmp_path))
    seen = asked(answers)
    assert main(run) == 0
    assert len(seen) == len(answers)
    found = lines(folder / "answers.jsonl")
    assert all(row.keys() >= LAYOUT for row in found)
    assert [row["text"] for row in found] == answers
    assert [row["model_id"] for row in found] == ["tiny"] * len(answers)
    assert len({row["answer_id"] for row in found}) == len(answers)
    result = json.loads((folder / "result.json").read_text())
    assert result.get("score") == (score if score is None else pytest.approx(score))
    assert result["questions"] == len(answers)

    # As a kill leaves it: two lines, and a part of the third.
    text = (folder / "answers.jsonl").read_text()
    first = "".join(text.splitlines(keepends=True)[:2])
    (folder / "answers.jsonl").unlink()
    (folder / "answers.part-0.jsonl").write_text(text[: len(first) + 20])
    again = asked(answers[2:])
    assert main(run) == 0
    assert again == seen[2:], "what was answered is asked again, or what was not is left out"
    assert lines(folder / "answers.jsonl") == found
    assert not list(folder.glob("*.part-*"))
    whole = asked([])
    assert main(run) == 0
    assert whole == []


@pytest.mark.parametrize("task", sorted(set(BENCHMARKS) - {"easy-vqa", "mmbench-cn"}))
def test_a_real_model_answers_every_task(task, eval_model, eval_data, opened, monkeypatch, tmp_path):
    monkeypatch.setattr(jobs, "open_vlm", lambda path: opened)
    run = words(eval_model, eval_data, task, None, "--output-dir", str(tmp_path), "--max-new-tokens", "2")
    assert main([*run, "--limit", "2"]) == 0
    result = json.loads((tmp_path / task / "result.json").read_text())
    assert result["unanswered"] == []
    assert result["prompt"]["version"] == "qwen"
    assert ("<image>" in result["prompt"]["example"]) == (task != "scienceqa" or "problem 0" in str(result["items"]))


def submitted(case: str, name: str, eval_model: Path, eval_data: Path, asked: Any, folder: Path) -> Path:
    """The file that one case leaves for the benchmark's own server."""
    split, answers, _ = RIGHT[case]
    asked(answers)
    assert main(words(eval_model, eval_data, case, split, "--output-dir", str(folder))) == 0
    return folder / case.split()[0] / name


@pytest.mark.parametrize(
    ("case", "name", "content"),
    [
        (
            "vqav2",
            "vqav2_submission.json",
            [{"question_id": n, "answer": text} for n, text in ((1, "red"), (11, "2"), (21, ""), (999, ""))],
        ),
        (
            "vizwiz",
            "vizwiz_submission.json",
            [
                {"image": f"VizWiz_test_{number:08d}.jpg", "answer": text}
                for number, text in enumerate(("soup", "can", ""))
            ],
        ),
        (
            "gqa",
            "testdev_balanced_predictions.json",
            [{"questionId": f"20{n}", "prediction": text} for n, text in enumerate(("yes", "red", "chair"))],
        ),
        ("mm-vet", "mm-vet_results.json", {"v1_0": "-1", "v1_1": ""}),
    ],
)
def test_what_a_server_takes(case, name, content, eval_model, eval_data, asked, tmp_path):
    assert json.loads(submitted(case, name, eval_model, eval_data, asked, tmp_path).read_text()) == content


def test_what_seed_benchs_leaderboard_takes(eval_model, eval_data, asked, tmp_path):
    path = submitted("seed-bench", "seed_bench_submission.jsonl", eval_model, eval_data, asked, tmp_path)
    assert lines(path)[1] == {"question_id": "1_0", "prediction": "B. green"}


def test_what_mmes_calculation_takes(eval_model, eval_data, asked, tmp_path):
    folder = submitted("mme", "mme_results", eval_model, eval_data, asked, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["artwork.txt", "code_reasoning.txt", "existence.txt"]
    first = (folder / "code_reasoning.txt").read_text().splitlines()[2].split("\t")
    assert first == ["0001.png", "Is this it? Please answer yes or no.", "Yes", "no"]


def test_what_mmbenchs_server_takes(eval_model, eval_data, asked, tmp_path):
    path = submitted("mmbench test", "mmbench_submission.xlsx", eval_model, eval_data, asked, tmp_path)
    with zipfile.ZipFile(path) as archive:
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    name = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    rows = [["".join(cell.itertext()) for cell in row] for row in sheet.iter(f"{name}row")]
    assert rows[0] == ["index", "question", "A", "B", "C", "D", "prediction"]
    assert rows[1] == ["241", "Look at it.\nWhich?", "a dog", "a cat", "", "", "B"]
    assert [row[-1] for row in rows[1:]] == ["B", "A", "A"]


def test_mmbench_asks_every_turn_of_the_options(eval_model, eval_data, asked, tmp_path):
    seen = asked(RIGHT["mmbench"][1])
    assert main(words(eval_model, eval_data, "mmbench", None, "--output-dir", str(tmp_path))) == 0
    assert seen[3].splitlines()[1:5] == ["What colour?", "A. green", "B. blue", "C. red"]
    rows = lines(tmp_path / "mmbench" / "answers.jsonl")
    assert [row["round_id"] for row in rows] == [0, 1, 0, 1, 2, 0, 1]
    assert rows[3]["options"] == ["green", "blue", "red"] and rows[3]["option_char"] == ["A", "B", "C"]


def test_a_limit_draws_whole_units(eval_model, eval_data, asked, tmp_path):
    asked(["A"] * 9)
    run = words(eval_model, eval_data, "mme", None, "--output-dir", str(tmp_path), "--limit", "3", "--seed", "1")
    assert main(run) == 0
    assert json.loads((tmp_path / "mme" / "result.json").read_text())["questions"] == 6


@pytest.mark.parametrize("task", sorted(set(BENCHMARKS) - {"easy-vqa"}))
def test_a_missing_folder_is_one_message_that_names_the_file(task, tmp_path, capsys):
    assert main(["eval", "--model-path", "/nowhere", "--task", task, "--data-folder", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"--task {task}: {tmp_path}" in said and "no such file. --data-folder" in said


DAMAGE: dict[str, tuple[str, str, str, str]] = {
    "half a line": ("gqa", "gqa/llava_gqa_testdev_balanced.jsonl", '"text"', "line 1 is not valid JSON"),
    "another key": ("vizwiz", "vizwiz/llava_test.jsonl", '"image": ', "has no 'image'"),
    "another label": ("pope", "pope/coco/coco_pope_random.json", "snowboard", "labels 'Is there a "),
    "no answer": ("mme", "MME/MME_Benchmark_release_version/existence/0000.txt", "\tYes", "has no answer, yes or no"),
    "no problem": ("scienceqa", "scienceqa/problems.json", '"0": ', "has no problem 0"),
    "no annotation": ("textvqa", "textvqa/TextVQA_0.5.1_val.json", "what brand?", "has no question 'what brand?'"),
    "no question": ("seed-bench", "seed_bench/SEED-Bench.json", '"0_0"', "has no question 0_0"),
    "no right answer": ("own", "own/questions.jsonl", '"answer": "Bern"', "line 3 has no 'answer'; it has text, reply"),
    "no caption": ("llava-bench", "llava-bench-in-the-wild/context.jsonl", "001.jpg", "lacks question 1 or 001.jpg"),
    "an answer that is no option": ("mmbench", "mmbench/mmbench_dev_20230712.tsv", "\tB\t", "the answer is 'E'"),
}
"""Name -> task, file, what is taken out of it, and words of the message."""

IN_ITS_PLACE = {
    "another key": '"picture": ',
    "no problem": '"9": ',
    "no question": '"9_9"',
    "no right answer": '"reply": "Bern"',
}
IN_ITS_PLACE |= {"an answer that is no option": "\tE\t", "no caption": "002.jpg", "no right answer": '"reply": "Bern"'}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_data_is_named(name, eval_data, tmp_path, capsys):
    task, file, gone, message = DAMAGE[name]
    shutil.copytree(eval_data, tmp_path / "data")
    path = tmp_path / "data" / file
    content = path.read_text()
    assert gone in content
    path.write_text(content.replace(gone, IN_ITS_PLACE.get(name, "")))
    run = ["eval", "--model-path", "/nowhere", "--task", task, "--data-folder", str(tmp_path / "data")]
    assert main([*run, "--output-dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and Path(file).name in said and "Traceback" not in said


def test_images_that_are_not_there_are_told_before_the_model_loads(eval_data, tmp_path, capsys):
    shutil.copytree(eval_data, tmp_path / "data")
    (tmp_path / "data" / "gqa" / "data" / "images" / "n0.jpg").unlink()
    assert main(words(Path("/nowhere"), tmp_path / "data", "gqa", None)) == 2
    assert "--task gqa: 1 of 2 images are not there, such as" in capsys.readouterr().err


def emptied(content: str, name: str) -> str:
    """A file of questions without any."""
    return {".jsonl": "", ".json": "[]", ".tsv": content.partition("\n")[0]}[Path(name).suffix]


ASKED = {
    "gqa": "gqa/llava_gqa_testdev_balanced.jsonl",
    "llava-bench": "llava-bench-in-the-wild/questions.jsonl",
    "mm-vet": "mm-vet/llava-mm-vet.jsonl",
    "mmbench": "mmbench/mmbench_dev_20230712.tsv",
    "mmbench-cn": "mmbench/mmbench_dev_cn_20231003.tsv",
    "mme": "MME/llava_mme.jsonl",
    "own": "own/questions.jsonl",
    "pope": "pope/llava_pope_test.jsonl",
    "scienceqa": "scienceqa/llava_test_CQM-A.json",
    "seed-bench": "seed_bench/llava-seed-bench.jsonl",
    "textvqa": "textvqa/llava_textvqa_val_v051_ocr.jsonl",
    "vizwiz": "vizwiz/llava_test.jsonl",
    "vqav2": "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl",
}
"""Task -> the file of its questions."""


def test_every_task_with_a_file_of_questions_is_here():
    assert {*ASKED, "easy-vqa"} == set(BENCHMARKS)  # whose questions are a package's


@pytest.mark.parametrize("task", ASKED)
def test_a_task_without_questions_is_refused_before_the_model_loads(task, eval_data, tmp_path, capsys):
    shutil.copytree(eval_data, tmp_path / "data")
    file = tmp_path / "data" / ASKED[task]
    file.write_text(emptied(file.read_text(), file.name))
    run = ["eval", "--model-path", "/nowhere", "--task", task, "--data-folder", str(tmp_path / "data")]
    assert main([*run, "--output-dir", str(tmp_path / "out")]) == 2
    told = {"pope": "other numbers of questions", "scienceqa": "has no question about 3 problems"}  # by other files
    assert told.get(task, f"--task {task}: ") in (said := capsys.readouterr().err), said
    assert task in told or "holds no question" in said


def test_a_comparison_misses_images_before_it_trains(eval_data, tmp_path):
    shutil.copytree(eval_data, tmp_path / "data")
    (tmp_path / "data" / "gqa" / "data" / "images" / "n0.jpg").unlink()
    with pytest.raises(UserError, match="--task gqa: 1 of 2 images are not there"):
        Exam.of("gqa", tmp_path / "data", None, tmp_path / "answers", 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "vqav2"], "is scored by the benchmark's own server: give --output-dir"),
        (["--task", "mm-vet"], "needs --judge-url and --judge-model: give --output-dir"),
        (["--task", "mm-vet", "--judge-url", "http://127.0.0.1:9"], "needs --judge-model"),
        (["--task", "mm-vet", "--judge-url", "nowhere", "--judge-model", "m"], "begins with http"),
        (["--task", "vqav2", "--split", "dev"], "--split dev: vqav2 has test-dev2015, test2015, val2014"),
        (["--task", "gqa", "pope", "--output", "a.json"], "there are 2 tasks: --output-dir"),
        (["--task", "gqa", "--against", "/nowhere.json"], "--against /nowhere.json: no such file"),
    ],
)
def test_flags_that_lead_nowhere_are_refused_before_the_model_loads(flags, message, eval_data, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert main(["eval", "--model-path", "/nowhere", "--data-folder", str(eval_data), *flags]) == 2
    assert message in capsys.readouterr().err


def test_two_ranks_share_the_questions(eval_model, eval_data, asked, monkeypatch, tmp_path, capsys):
    """As torchrun starts them, here one after the other: the first one waits for the answers of all."""
    run = words(eval_model, eval_data, "gqa", None, "--output-dir", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = {}
    for rank, answers in ((1, ["red"]), (0, ["yes", "table"])):
        monkeypatch.setenv("RANK", str(rank))
        said[rank] = asked(answers)
        assert main(run) == 0
        assert (tmp_path / "gqa" / "answers.jsonl").exists() == (rank == 0)
        assert ("100.00% of 3 questions" in capsys.readouterr().out) == (rank == 0)
    assert len(said[1]) == 1 and len(said[0]) == 2 and not set(said[0]) & set(said[1])


def test_several_tasks_in_one_go(eval_model, eval_data, asked, tmp_path, capsys):
    asked([*RIGHT["gqa"][1], *RIGHT["pope"][1]])
    run = ["eval", "--model-path", str(eval_model), "--data-folder", str(eval_data), "--task", "gqa", "pope"]
    assert main([*run, "--output-dir", str(tmp_path)]) == 0
    scores = {task: json.loads((tmp_path / task / "result.json").read_text())["score"] for task in ("gqa", "pope")}
    assert scores == pytest.approx({"gqa": 2 / 3, "pope": 1})
    printed = capsys.readouterr().out
    assert printed.index("gqa (") < printed.index("pope (") and "  random " in printed


def test_processes_need_a_folder_to_meet_in(eval_model, eval_data, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words(eval_model, eval_data, "gqa", None)) == 2
    assert "Several processes need --output-dir" in capsys.readouterr().err


def test_keys_of_ones_own_questions_that_are_not_read_are_named(tmp_path, caplog):
    folder = tmp_path / "own"
    folder.mkdir()
    rows = [{"text": "what?", "answer": "red", "categry": "colour"}, {"text": "who?", "answer": "he", "category": "x"}]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [one.category for one in BENCHMARKS["own"](tmp_path, None).questions()] == ["default", "x"]
    assert "'categry' of 1 lines is not used; known are text, answer, image, category" in caplog.text
