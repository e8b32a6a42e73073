# SPDX-License-Identifier: Apache-2.0
"""`moellava check-data`."""

from __future__ import annotations

import json
import shutil

import pytest

from moellava.cli import main
from moellava.data.records import load_records
from moellava.data.skip_lists import read_skip_list
from moellava.vlm import open_encoder
from tests.records import place_of


@pytest.fixture
def files(data_file, make_record) -> list[str]:
    rows = [
        make_record("good", "<image>\nq", "a", image="a.png"),
        make_record("cut", "<image>\nq", "a", image="cut.jpg"),
        make_record("tags", "<image><image>\nq", "a", image="a.png"),
        make_record("text", "q", "a"),
    ]
    lines = json.dumps(make_record("late", "q", "a")) + '\n{"id": "no turns"}\n{broken'
    return [str(data_file(rows, "one.json")), str(data_file(lines, "two.jsonl"))]


def test_all_problems_in_one_pass(files, image_tree, capsys):
    assert main(["check-data", *files, "gone.json", "--image-folder", str(image_tree)]) == 1
    lines = capsys.readouterr().out.splitlines()
    for words in ["Record tags", "Record no turns", "two.jsonl is not valid", "gone.json: no such", "cut.jpg"]:
        assert sum(words in line for line in lines) == 1, words
    assert lines[-1] == "5 problems"
    assert "3 files, 7 records" in lines[-2] and "2 with image, 0 with video, 2 text only" in lines[-2]


def test_sound_data(data_file, make_record, image_tree, capsys):
    path = data_file([make_record(1, "<image>", "a", image="sub/b.jpg")])
    assert main(["check-data", str(path), "--image-folder", str(image_tree)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no problem found"


def test_the_skip_list_makes_the_rest_trainable(files, image_tree, tmp_path, capsys):
    skip = tmp_path / "skip.txt"
    main(["check-data", *files, "--image-folder", str(image_tree), "--skip-list", str(skip)])
    keys = [line.split("\t")[0] for line in skip.read_text(encoding="utf-8").splitlines()]
    assert sorted(map(place_of, keys)) == [("one.json", 1), ("one.json", 2), ("two.jsonl", 1), ("two.jsonl", 2)]
    assert [record["id"] for record in load_records(files, read_skip_list(skip))] == ["good", "text", "late"]
    again = ["check-data", *files, "--image-folder", str(image_tree), "--known", str(skip)]
    capsys.readouterr()
    assert main(again) == 0
    assert "4 skip listed" in capsys.readouterr().out


def test_quick_decodes_nothing(data_file, make_record, image_tree, tmp_path, capsys):
    (tmp_path / "hole.png").write_bytes(hole := (image_tree / "a.png").read_bytes())
    (tmp_path / "hole.png").write_bytes(hole[:60] + bytes(8) + hole[68:])
    shutil.copy(image_tree / "cut.jpg", tmp_path)
    rows = [make_record(n, "<image>\nq", "a", image=name) for n, name in enumerate(["hole.png", "cut.jpg"])]
    asked = ["check-data", str(data_file(rows)), "--image-folder", str(tmp_path)]
    for flags, problems in ((["--quick"], 1), ([], 2)):
        assert main([*asked, *flags]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == f"{problems} problems" and "Record 1 of" in lines[problems - 1]


def test_workers_find_what_one_process_finds(files, image_tree, capsys, monkeypatch):
    monkeypatch.setattr("moellava.data.check.FILES", 1)
    reports = []
    for workers in (["--workers", "2"], []):
        assert main(["check-data", *files, "--image-folder", str(image_tree), *workers]) == 1
        reports.append(capsys.readouterr().out)
    assert reports[0] == reports[1] and "Record cut" in reports[0]


def test_findings_as_json(files, image_tree, capsys):
    main(["check-data", *files, "--image-folder", str(image_tree), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["counts"]["records"] == 7 and len(found["problems"]) == 4
    assert ("one.json", 1) in {place_of(problem["key"]) for problem in found["problems"]}


def lengths_of(report: str) -> str:
    return next(line for line in report.splitlines() if line.startswith("positions in the model"))


@pytest.mark.slow
def test_a_models_folder_says_how_long_records_are(
    folder_without_weights, published_folder, golden_tokenizers, data_file, make_record, image_tree, capsys
):
    """Of a stage and of LLaVA's code, both without weights: each by its own template and its own tokens of an image."""
    shutil.copytree(golden_tokenizers / "mistral", published_folder, dirs_exist_ok=True)
    path = data_file([make_record(1, "<image>\nq", "a", image="a.png")])
    asked = ["check-data", str(path), "--image-folder", str(image_tree), "--model-path"]
    for folder, version, tokens in ((folder_without_weights, "phi", 5), (published_folder, "v1", 16)):
        assert main([*asked, str(folder)]) == 0
        report = capsys.readouterr().out
        length = len(open_encoder(folder, flag="test").encode(load_records(path)[0]).ids) - 1 + tokens
        assert lengths_of(report) == f"positions in the model: {length} to {length}, median {length}"
        assert main([*asked, str(folder), "--max-length", str(length - 1)]) == 1
        assert f"takes {length} positions, more than {length - 1}" in capsys.readouterr().out
        named = [*asked, str(folder), "--version", version]
        assert main(named) == 0
        assert lengths_of(capsys.readouterr().out) == lengths_of(report)


def test_a_tokenizer_alone_needs_a_template(golden_tokenizers, data_file, make_record, capsys):
    asked = ["check-data", str(data_file([make_record(1, "q", "a")])), "--tokenizer", str(golden_tokenizers / "phi")]
    assert main(asked) == 2
    assert "--version names the template, which --tokenizer" in capsys.readouterr().err
    assert main([*asked, "--version", "phi"]) == 0


def test_a_template_without_a_tokenizer_is_refused(data_file, make_record, capsys):
    assert main(["check-data", str(data_file([make_record(1, "q", "a")])), "--version", "phi"]) == 2
    assert "--version phi: is read with --tokenizer alone" in capsys.readouterr().err
