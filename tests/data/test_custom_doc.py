# SPDX-License-Identifier: Apache-2.0
"""docs/CUSTOM.md: the worked example runs, and what the page names exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moellava.conversation import conv_templates
from moellava.data.tokenizers import TOKENIZERS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "CUSTOM.md").read_text(encoding="utf-8")


def test_the_worked_example_runs(page, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 7
    (tmp_path / "example.py").write_text("\n".join(blocks), encoding="utf-8")
    subprocess.run([sys.executable, "example.py"], cwd=tmp_path, check=True)
    row = json.loads((tmp_path / "row.jsonl").read_text(encoding="utf-8"))
    assert len(row["input_ids"]) == len(row["labels"]) > 30


def test_rows_that_the_page_shows_are_the_rows(page):
    codegen = TOKENIZERS["codegen"]
    shown = re.search(r'TokenizerSpec\(\n        "codegen".*?\n    \)', page, flags=re.DOTALL).group()
    for field in ("file", "eos", "unk", "pad"):
        assert f'{field}="{getattr(codegen, field)}"' in shown
    assert f"versions={codegen.versions}".replace("'", '"') in shown
    source = (ROOT / "moellava" / "conversation.py").read_text(encoding="utf-8")
    assert 'conv_qwen = _two("qwen", "<|endoftext|>")' in source, "the page shows a new template in this form"
    assert '"qwen": conv_qwen,' in source


def test_every_row_and_its_usual_template_is_on_the_page(page):
    for spec in TOKENIZERS.values():
        if spec.versions:
            assert spec.classes[0] in page or spec.name in page.lower()
            assert f"`--version {spec.versions[0]}`" in page or f"`{spec.versions[0]}`" in page


def test_every_template_goes_by_its_registered_name():
    assert all(template.version in conv_templates for template in conv_templates.values())
