# SPDX-License-Identifier: Apache-2.0
"""Flags that are about records act in every command that reads them."""

from __future__ import annotations

import pytest

from moellava.cli import main
from tests.tiny import record


@pytest.fixture
def words(data_file, tokenizer_folder, tmp_path) -> dict[str, list[str]]:
    """command -> its words for a file whose roles are Ann and Bob."""
    data = str(data_file([record(1, "q", "a", roles=("Ann", "Bob"))]))
    return {
        "check-data": [data],
        "inspect": [data, "--tokenizer", str(tokenizer_folder), "--version", "qwen"],
        "convert-data": [data, "--output", str(tmp_path / "out.jsonl")],
    }


@pytest.mark.parametrize("command", ["check-data", "inspect", "convert-data"])
@pytest.mark.parametrize("flags", [("--user_key", "--assistant_key"), ("--user-key", "--assistant-key")])
def test_roles(command, flags, words, capsys):
    roles = [flags[0], "Ann", flags[1], "Bob"]
    assert main([command, *words[command]]) in (1, 2)
    printed = capsys.readouterr()
    assert "from 'Ann'" in printed.out + printed.err
    assert main([command, *words[command], *roles]) == 0
    assert main([command, *words[command], *roles[:1], "Eve"]) in (1, 2)


@pytest.mark.parametrize("command", ["check-data", "inspect"])
def test_notices_are_shown(command, data_file, tokenizer_folder, capsys, caplog):
    path = str(data_file([{"mood": "merry"} | record(1, "a <video> tag", "a")]))
    more = ["--tokenizer", str(tokenizer_folder), "--version", "qwen"] if command == "inspect" else []
    assert main([command, path, *more]) == 0
    said = capsys.readouterr().out + caplog.text
    assert "'mood' in 1 records" in said and "are text in 1 records" in said
