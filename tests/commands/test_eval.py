# SPDX-License-Identifier: Apache-2.0
"""`moellava eval` on a small composed model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moellava.cli import main
from moellava.commands.eval import main as evaluate
from tests.processes import ROOT
from tests.tiny import compose_tiny

BASE = ROOT / "playground" / "base"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The demo's base models, composed and not trained together."""
    path = tmp_path_factory.mktemp("model") / "composed"
    compose_tiny(BASE / "lm", BASE / "tower", "qwen").save(path, meta={"version": "qwen"})
    return path


def scored(folder: Path, output: Path, *flags: str) -> dict:
    assert evaluate(["--model-path", str(folder), "--limit", "24", "--output", str(output), *flags]) == 0
    return json.loads(output.read_text())


def test_the_report_says_how_the_score_was_taken(folder, tmp_path, capsys):
    report = scored(folder, tmp_path / "new" / "score.json")
    assert report["questions"] == 24
    assert report["accuracy"] == report["right"] / 24
    assert sum(category["total"] for category in report["by_category"].values()) == 24
    assert report["prompt"]["version"] == "qwen"
    assert "USER: <image>\n" in report["prompt"]["example"]
    assert report["settings"]["decoding"] == "greedy"
    assert report["settings"]["model_path"] == str(folder)
    assert {"python", "moellava", "torch", "transformers", "data"} <= report["versions"].keys()
    assert len(report["mistakes"]) == min(20, 24 - report["right"])
    assert f"{100 * report['accuracy']:.2f}% of 24 questions" in capsys.readouterr().out


def test_the_batch_size_does_not_change_the_answers(folder, tmp_path):
    whole = scored(folder, tmp_path / "a.json")
    single = scored(folder, tmp_path / "b.json", "--batch-size", "1")
    assert whole["mistakes"] == single["mistakes"]
    assert whole["right"] == single["right"]


def test_shuffling_changes_the_images_and_is_written_down(folder, tmp_path, capsys):
    report = scored(folder, tmp_path / "a.json", "--shuffle-images")
    assert report["settings"]["shuffle_images"]
    assert "images shuffled between questions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--benchmark", "vqa"], "easy-vqa"),
        (["--limit", "0"], "--limit: 0: a whole number from 1 on"),
        (["--batch-size", "0"], "--batch-size: 0: a whole number from 1 on"),
        (["--output", "/"], "--output / cannot be written: is a folder"),
    ],
)
def test_wrong_flags_are_named_before_the_model_loads(flags, message, capsys):
    try:
        status = main(["eval", "--model-path", "/nowhere", *flags])
    except SystemExit as leaving:  # of argparse
        status = leaving.code
    assert status == 2 and message in capsys.readouterr().err


def test_a_missing_folder_is_one_message(capsys):
    assert main(["eval", "--model-path", "/nowhere/at/all"]) == 2
    assert "/nowhere/at/all" in capsys.readouterr().err
