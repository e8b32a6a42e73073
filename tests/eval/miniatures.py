# SPDX-License-Identifier: Apache-2.0
"""A miniature of each benchmark's folder, in the layout in which it is published: a few questions, random pictures.

Each function writes one into a root, as LLaVA's `eval.zip` unpacks with the benchmark's own files beside it.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from moellava.eval.benchmarks import LETTER, SINGLE_WORD

COLOURS = ("red", "green", "blue", "yellow")


def picture(number: int) -> Image.Image:
    """One of four plain pictures."""
    return Image.new("RGB", (32, 28), COLOURS[number % len(COLOURS)])


def save(path: Path, number: int = 0) -> str:
    """Writes a picture; its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number).save(path)
    return path.name


def embedded(number: int) -> str:
    """A picture as MMBench's tables hold it."""
    content = io.BytesIO()
    picture(number).save(content, "JPEG")
    return base64.b64encode(content.getvalue()).decode()


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A JSON Lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """A JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def asked(number: object, image: str, text: str, category: str = "default") -> dict[str, Any]:
    """A line of one of LLaVA's question files."""
    return {"question_id": number, "image": image, "text": f"{text}\n{SINGLE_WORD}", "category": category}


def people(*said: str) -> list[dict[str, Any]]:
    """Ten people's answers: the first says what is not filled."""
    filled = [*said, *[said[0]] * (10 - len(said))]
    return [{"answer": text, "answer_id": place, "answer_confidence": "yes"} for place, text in enumerate(filled, 1)]


def vqav2(root: Path) -> None:
    """The test splits, and val2014 with its annotations."""
    folder = root / "vqav2"
    names = [save(folder / "test2015" / f"COCO_test2015_{number:012d}.jpg", number) for number in range(3)]
    rows = [asked(10 * place + 1, name, f"What colour is number {place}?") for place, name in enumerate(names)]
    write_lines(folder / "llava_vqav2_mscoco_test2015.jsonl", [*rows, asked(999, names[0], "And now?")])
    write_lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", rows)
    for number in range(2):
        save(folder / "val2014" / f"COCO_val2014_{number:012d}.jpg", number)
    questions = [{"image_id": place % 2, "question": "What colour?", "question_id": 100 + place} for place in range(3)]
    write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    types = ("other", "yes/no", "number")
    annotations = [
        {
            "question_id": 100 + place,
            "image_id": place % 2,
            "answer_type": types[place],
            "answers": people("red", "two"),
        }
        for place in range(3)
    ]
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})


def vizwiz(root: Path) -> None:
    """The test split as LLaVA lists it, and val as VizWiz publishes it."""
    folder = root / "vizwiz"
    names = [save(folder / "test" / f"VizWiz_test_{number:08d}.jpg", number) for number in range(3)]
    write_lines(folder / "llava_test.jsonl", [asked(name, name, "What is this?") for name in names])
    rows = []
    for number in range(3):
        name = save(folder / "val" / f"VizWiz_val_{number:08d}.jpg", number)
        said = people("unanswerable", "soup")
        rows.append({"image": name, "question": "What is this?", "answers": said, "answer_type": "other"})
    write_json(folder / "val.json", rows)


def textvqa(root: Path) -> None:
    """Two questions about one image, which share a question_id in LLaVA's file."""
    folder = root / "textvqa"
    rows, data = [], []
    for place, (image, question) in enumerate([("0a", "what brand?"), ("0a", "What year is it?"), ("0b", "who?")]):
        save(folder / "train_images" / f"{image}.jpg", place)
        text = f"{question}\nReference OCR token: ACME, 1999"
        rows.append(asked(image, f"{image}.jpg", text))
        answers = [one["answer"] for one in people("acme", "1999")]
        data.append({"question_id": 34602 + place, "image_id": image, "question": question, "answers": answers})
    write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", rows)
    write_json(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": data})


def gqa(root: Path) -> None:
    """A binary question and two open ones about two images."""
    folder = root / "gqa"
    rows, truth = [], {}
    for place, (structural, answer) in enumerate([("verify", "yes"), ("query", "red"), ("query", "table")]):
        image = f"n{place // 2}"
        save(folder / "data" / "images" / f"{image}.jpg", place)
        rows.append(asked(f"20{place}", f"{image}.jpg", f"Is it {place}?"))
        types = {"structural": structural, "semantic": "attr"}
        truth[f"20{place}"] = {"imageId": image, "question": f"Is it {place}?", "answer": answer, "types": types}
    write_lines(folder / "llava_gqa_testdev_balanced.jsonl", rows)
    write_json(folder / "data" / "testdev_balanced_questions.json", truth)


def scienceqa(root: Path) -> None:
    """A problem with an image and a hint, one with a hint, one with neither."""
    folder = root / "scienceqa"
    problems, rows = {}, []
    for number, (image, hint, subject, grade) in enumerate(
        [
            ("image.png", "Look.", "natural science", 2),
            (None, "Read.", "social science", 8),
            (None, "", "language science", 7),
        ]
    ):
        problems[str(number)] = {
            "question": "Which?", "choices": ["a dog", "a cat", "a cow"], "answer": number, "hint": hint,
            "image": image, "subject": subject, "grade": f"grade{grade}", "split": "test",
        }  # fmt: skip
        text = "Which?\nA. a dog\nB. a cat\nC. a cow"
        row = {"id": str(number), "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "A"}]}
        if image:
            save(folder / "images" / "test" / str(number) / image)
            row |= {"image": f"{number}/{image}"}
            row["conversations"][0]["value"] = f"<image>\n{text}"
        rows.append(row)
    write_json(folder / "llava_test_CQM-A.json", rows)
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"test": list(problems), "train": []})


def pope(root: Path) -> None:
    """Two images, two questions each in every split."""
    folder = root / "pope"
    names = [save(folder / "val2014" / f"COCO_val2014_{number:012d}.jpg", number) for number in range(2)]
    rows: list[dict[str, Any]] = []
    for split in ("random", "popular", "adversarial"):
        labels = []
        for name in names:
            for thing, label in (("snowboard", "yes"), ("dog", "no")):
                text = f"Is there a {thing} in the image?"
                rows.append(asked(len(rows), name, text, split))
                labels.append({"question_id": len(labels) + 1, "image": name, "text": text, "label": label})
        write_lines(folder / "coco" / f"coco_pope_{split}.json", labels)
    write_lines(folder / "llava_pope_test.jsonl", rows)


def mme(root: Path) -> None:
    """Three subtasks, one of them with its images and texts in folders of their own."""
    folder = root / "MME"
    release, rows = folder / "MME_Benchmark_release_version", []
    for subtask, nested in (("existence", False), ("artwork", True), ("code_reasoning", False)):
        for number in range(2):
            name = f"{number:04d}.png"
            save(release / subtask / ("images" if nested else "") / name, number)
            pairs = [
                (f"Is this {thing}? Please answer yes or no.", said) for thing, said in (("it", "Yes"), ("no", "No"))
            ]
            text = release / subtask / ("questions_answers_YN" if nested else "") / f"{number:04d}.txt"
            text.parent.mkdir(exist_ok=True)
            text.write_text("".join(f"{question}\t{answer}\n" for question, answer in pairs))
            rows += [asked(f"{subtask}/{name}", f"{subtask}/{name}", question, subtask) for question, _ in pairs]
    write_lines(folder / "llava_mme.jsonl", rows)


def mmbench(root: Path) -> None:
    """The dev table in both languages, one without right answers, and one with turned options of its own."""
    columns = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category")
    rows = [
        (241, "Which?", "Look at it.", "a dog", "a cat", "", "", "B", "identity", embedded(0), "web", "perception"),
        (252, "What colour?", "nan", "red", "green", "blue", "", "A", "attribute", embedded(1), "web", "perception"),
        (263, "Again?", "", "one", "two", "", "", "A", "identity", "241", "web", "perception"),
    ]
    table(root / "mmbench" / "mmbench_dev_20230712.tsv", columns, rows)
    table(root / "mmbench" / "mmbench_dev_cn_20231003.tsv", columns, rows)
    blank = [(*row[:7], "", *row[8:]) for row in rows]
    table(root / "mmbench" / "mmbench_test_20230712.tsv", columns, blank)
    turned = (1_000_241, "Which?", "", "a cat", "a dog", "", "", "A", "identity", embedded(0), "web", "perception")
    table(root / "mmbench" / "turned.tsv", columns, [rows[0], turned])


def table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table with tabs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([columns, *rows])


def seed_bench(root: Path) -> None:
    """Two questions about images and one about a video's middle frame."""
    folder = root / "seed_bench"
    rows, questions = [], []
    for place, (data_type, answer) in enumerate([("image", "A"), ("image", "B"), ("video", "C")]):
        part = "SEED-Bench-image" if data_type == "image" else "SEED-Bench-video-image"
        image = f"{part}/{place}.png"
        save(folder / image, place)
        choices = dict(zip(("choice_a", "choice_b", "choice_c", "choice_d"), COLOURS, strict=True))
        lines = [f"{key[-1].upper()}. {text}" for key, text in choices.items()]
        text = "\n".join(["What colour?", *lines, LETTER])
        rows.append({"question_id": f"{place}_0", "image": image, "text": text, "category": data_type})
        questions.append(
            {"question_id": f"{place}_0", "question_type_id": 1 + (data_type == "video"), "data_type": data_type,
             "answer": answer, "data_id": image, "question": "What colour?", **choices}
        )  # fmt: skip
    write_lines(folder / "llava-seed-bench.jsonl", rows)
    types = {"Scene Understanding": 1, "Action Recognition": 2}
    write_json(folder / "SEED-Bench.json", {"questions": questions, "question_type": types})


def llava_bench(root: Path) -> None:
    """A question of each category about two images."""
    folder = root / "llava-bench-in-the-wild"
    names = [save(folder / "images" / f"{number:03d}.jpg", number) for number in range(2)]
    rows = [
        {"question_id": place, "image": names[place % 2], "category": category, "text": f"Tell me {place}."}
        for place, category in enumerate(("conv", "detail", "complex"))
    ]
    write_lines(folder / "questions.jsonl", rows)
    write_lines(
        folder / "context.jsonl", [{"id": n, "image": name, "caption": f"plain {n}"} for n, name in enumerate(names)]
    )
    answers = [{"question_id": place, "text": f"It is {place}.", "model_id": "gpt-4"} for place in range(3)]
    write_lines(folder / "answers_gpt4.jsonl", answers)


def mm_vet(root: Path) -> None:
    """Two questions of one and of two capabilities."""
    folder = root / "mm-vet"
    rows, truth = [], {}
    for place, needs in enumerate((["ocr", "math"], ["ocr"])):
        name = save(folder / "images" / f"v1_{place}.png", place)
        rows.append({"question_id": place, "image": name, "text": "What is x?"})
        truth[f"v1_{place}"] = {
            "imagename": name,
            "question": "What is x?",
            "answer": "-1 <AND> -5",
            "capability": needs,
        }
    write_lines(folder / "llava-mm-vet.jsonl", rows)
    write_json(folder / "mm-vet.json", truth)


def own(root: Path) -> None:
    """Two questions about a picture and one about none; only the first says all that may be said."""
    folder = root / "own"
    image = save(folder / "images" / "a.png")
    rows: list[dict[str, Any]] = [
        {
            "question_id": "q1",
            "image": f"images/{image}",
            "text": "What colour?",
            "answer": "red",
            "category": "colour",
        },
        {"image": str(folder / "images" / image), "text": "And now?", "answer": " red "},
        {"text": "What is the capital?", "answer": "Bern"},
    ]
    write_lines(folder / "questions.jsonl", rows)


MINIATURES: dict[str, Callable[[Path], None]] = {
    "vqav2": vqav2,
    "vizwiz": vizwiz,
    "textvqa": textvqa,
    "gqa": gqa,
    "scienceqa": scienceqa,
    "pope": pope,
    "mme": mme,
    "mmbench": mmbench,
    "seed-bench": seed_bench,
    "llava-bench": llava_bench,
    "mm-vet": mm_vet,
    "own": own,
}
"""Task -> what writes its miniature; that of mmbench-cn is beside mmbench's."""


def write_all(root: Path) -> Path:
    """All of them in one root."""
    for write in MINIATURES.values():
        write(root)
    return root
