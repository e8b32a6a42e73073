# SPDX-License-Identifier: Apache-2.0
"""`moellava models`, and the page that it writes."""

import json
from pathlib import Path

import pytest

from moellava.cli import main
from moellava.commands.models import KNOWN, markdown, registered, rows_of
from moellava.lmm.supported_models import SUPPORTED_MODELS
from moellava.model.families import FAMILIES
from tests.lmm.any_released_model import EVERY

PAGE = Path(__file__).parents[2] / "docs" / "SUPPORTED_MODELS.md"


def test_the_page_begins_with_what_the_registry_says():
    page = PAGE.read_text(encoding="utf-8")
    assert page.startswith(markdown() + EVERY), "run: python -m tests.lmm.any_released_model --page"


def test_what_is_told_without_torch_is_what_the_registries_say():
    kept = json.loads(KNOWN.read_text(encoding="utf-8"))
    assert kept == registered(), "run: moellava models --json > moellava/commands/models.json"
    assert len(rows_of(kept)) == len(SUPPORTED_MODELS)


def test_the_table_names_every_model_and_language_model_family(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first_words = {line.split()[0] for line in lines if line}
    assert set(SUPPORTED_MODELS) | set(FAMILIES) <= first_words


@pytest.mark.parametrize(("family", "status"), [("qwen2-vl", 0), ("qwen9", 2)])
def test_one_architecture_alone(family, status, capsys):
    assert main(["models", "--family", family]) == status
    output = capsys.readouterr()
    if status:
        assert "Unknown architecture 'qwen9'" in output.err
    else:
        assert "qwen2-vl-72b-instruct" in output.out and "llava" not in output.out
