# SPDX-License-Identifier: Apache-2.0
"""What a terminal is shown: text, never commands."""

from __future__ import annotations

import ast
import json
import logging
import re
from pathlib import Path

import pytest

from moellava.cli import COMMANDS, main
from moellava.commands import chat, check_data, convert_data, inspect, verify
from moellava.errors import UserError
from moellava.log import PrintableFormatter, printable

PACKAGE = Path(__file__).resolve().parents[1] / "moellava"

HARM = "\x1b]0;owned\x07\x1b[2J\r\x08\x9b31m\x7f\u202e\u2066"
"""Sets a window's title, clears the screen, writes over a line, turns the direction of writing."""

HARMFUL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_control_characters_become_escapes_and_text_stays():
    assert printable(f"a{HARM}b") == r"a\u001b]0;owned\u0007\u001b[2J\u000d\u0008\u009b31m\u007f\u202e\u2066b"
    assert printable("Grüße,\n\t日本 🐱 «…»") == "Grüße,\n\t日本 🐱 «…»"
    assert printable("\ud800") == r"\ud800" and printable(UserError("no")) == "no"
    assert json.loads(printable(json.dumps({"a": "\x9b\x7f\u202e"}, ensure_ascii=False))) == {"a": "\x9b\x7f\u202e"}


def test_the_log_escapes_messages_and_tracebacks():
    try:
        raise ValueError(HARM)
    except ValueError as error:
        told = (type(error), error, error.__traceback__)
    record = logging.LogRecord("moellava", logging.ERROR, "", 0, "record %s", (HARM,), told)
    assert not HARMFUL.search(PrintableFormatter("%(message)s").format(record))


PLAIN = {"HELP", "STOPPED", "view_text(view, color, args.ids)", "usage()", "", "'' if said else if_empty"}
"""What commands print besides: texts of their own, and one that has its colours between texts that are escaped."""


def test_every_print_of_a_command_escapes_what_it_prints():
    """Numbers alone are printed as they are; a new print of user's text has to go through `printable`."""
    found, wrong = 0, []
    for path in [*(PACKAGE / "commands").glob("*.py"), PACKAGE / "cli.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                found += 1
                said = ast.unparse(node.args[0]) if node.args else ""
                if not said.startswith("printable(") and said not in PLAIN:
                    wrong.append(f"{path.name}:{node.lineno}: {said}")
    assert found >= len(COMMANDS) and not wrong


@pytest.fixture
def data(tmp_path) -> Path:
    """A record whose every text is hostile, in a file of a hostile name."""
    path = tmp_path / f"a{HARM}.json".replace("/", "")
    turns = [{"from": "human", "value": f"<image>\nq{HARM}"}, {"from": "gpt", "value": f"a{HARM}"}]
    path.write_text(json.dumps([{"id": HARM, "image": f"x{HARM}.png", "conversations": turns}]))
    return path


def test_commands_that_show_records_show_no_commands(data, tokenizer_folder, tmp_path, capsys):
    inspect.main([str(data), "--tokenizer", str(tokenizer_folder), "--version", "v1"])
    shown = capsys.readouterr().out
    assert r"q\u001b]0;owned" in shown and not HARMFUL.search(shown)
    inspect.main([str(data), "--tokenizer", str(tokenizer_folder), "--version", "v1", "--json"])
    shown = capsys.readouterr().out
    assert HARM in json.loads(shown)["text"] and not HARMFUL.search(shown)
    inspect.main([str(data), "--tokenizer", str(tokenizer_folder), "--version", "v1", "--color", "always"])
    assert not HARMFUL.search(re.sub("\x1b\\[[0-9]*m", "", capsys.readouterr().out))
    for flags in ([], ["--json"]):
        assert check_data.main([str(data), "--image-folder", str(tmp_path), *flags]) == 1
        assert not HARMFUL.search(capsys.readouterr().out)
    out = tmp_path / f"out{HARM}.jsonl"
    convert_data.main([str(data), "--output", str(out)])
    shown = capsys.readouterr().out
    assert "out" in shown and not HARMFUL.search(shown)


def test_answers_and_errors_show_no_commands(capsys, tmp_path):
    chat.say(iter([f"line\n{HARM}", "end"]))
    shown = capsys.readouterr().out
    assert shown.startswith("line\n") and not HARMFUL.search(shown)
    assert main(["inspect", "--tokenizer", f"none{HARM}"]) == 2
    assert not HARMFUL.search(capsys.readouterr().err)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / f"model{HARM}.safetensors").write_bytes(b"")
    with pytest.raises(UserError):
        verify.main([str(folder), "--files"])
