# SPDX-License-Identifier: Apache-2.0
"""Two tasks of lmms-eval over local data, and its scores of them beside ours.

    python scripts/checks/lmms_tasks.py write --output FOLDER --questions 40
    python scripts/checks/lmms_tasks.py compare --own RESULT.json --theirs FOLDER --output FILE

The tasks ask the questions of easy-VQA's test split that `moellava eval --limit N` draws: as free answers, and as a
choice of all answers, which takes log likelihoods.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

FREE, CHOICE = "moellava_easy_vqa", "moellava_easy_vqa_choice"

COMMON = """\
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_visual: !function pictures.doc_to_visual
doc_to_text: question
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: ""
"""

TASKS = {
    FREE: """\
task: {name}
output_type: generate_until
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
  do_sample: false
process_results: !function pictures.process_results
metric_list:
  - metric: is_right
    aggregation: mean
    higher_is_better: true
""",
    CHOICE: """\
task: {name}
output_type: multiple_choice
doc_to_target: target
doc_to_choice: choices
target_delimiter: ""
process_results: !function pictures.process_choice
metric_list:
  - metric: is_right
    aggregation: mean
    higher_is_better: true
""",
}
"""Task -> its file, as docs/task_guide.md of lmms-eval has it."""

PICTURES = '''\
"""The picture of a question, and whether an answer is right."""

from PIL import Image


def doc_to_visual(doc):
    """A list of one picture."""
    return [Image.open(doc["image"]).convert("RGB")]


def process_results(doc, results):
    """Exact match, as the benchmark has it."""
    return {"is_right": float(results[0].strip() == doc["answer"])}


def process_choice(doc, results):
    """Whether the right answer is the likeliest of all."""
    likelihoods = [result[0] for result in results]
    return {"is_right": float(likelihoods.index(max(likelihoods)) == doc["target"])}
'''


def write(folder: Path, count: int) -> None:
    """The tasks, the code that they name, and the questions."""
    from moellava.eval.asking import limited
    from moellava.eval.easy_vqa import test_questions

    questions = test_questions()
    choices = sorted({question.answer for question in questions})
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "questions.jsonl"
    with open(data, "w", encoding="utf-8") as file:
        for question in limited(questions, count, seed=0):
            row = {"question": question.text, "answer": question.answer, "image": str(question.image)}
            file.write(json.dumps(row | {"choices": choices, "target": choices.index(question.answer)}) + "\n")
    (folder / "pictures.py").write_text(PICTURES, encoding="utf-8")
    for name, text in TASKS.items():
        content = text.format(name=name) + COMMON.format(data=data.resolve())
        (folder / f"{name}.yaml").write_text(content, encoding="utf-8")


def compare(own: Path, theirs: Path, output: Path) -> int:
    """Prints the scores; 1 if that of the free answers differs from ours."""
    (path,) = theirs.rglob("*_results.json")
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    accuracy = json.loads(own.read_text(encoding="utf-8"))["accuracy"]
    found: dict[str, Any] = {
        "moellava eval": accuracy,
        "lmms-eval, free answers": results[FREE]["is_right,none"],
        "lmms-eval, choice by log likelihood": results[CHOICE]["is_right,none"],
    }
    output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for name, value in found.items():
        print(f"{name:38}{100 * value:7.2f}%")
    return int(abs(accuracy - found["lmms-eval, free answers"]) > 1e-9)


def main() -> int:
    """Runs one of the two."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("action", choices=["write", "compare"])
    flags.add_argument("--output", type=Path, required=True, help="folder of the tasks, or JSON file of the scores")
    flags.add_argument("--questions", type=int, default=40, help="of the test split (default 40)")
    flags.add_argument("--own", type=Path, help="what `moellava eval --output` has written")
    flags.add_argument("--theirs", type=Path, help="lmms-eval's --output_path")
    args = flags.parse_args()
    if args.action == "write":
        write(args.output, args.questions)
        return 0
    return compare(args.own, args.theirs, args.output)


if __name__ == "__main__":
    sys.exit(main())
