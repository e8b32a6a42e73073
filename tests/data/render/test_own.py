# SPDX-License-Identifier: Apache-2.0
"""A folder's own chat template: one of several, with the day on which a run began, for messages in parts as well."""

from __future__ import annotations

import datetime
import json
import shutil

import pytest
from transformers import AutoProcessor

from moellava.data.render import own
from moellava.data.render.jinja import saved_chat_template
from moellava.data.tokenizers import load_tokenizer
from moellava.errors import UserError
from moellava.train.checkpoint import check_folder, claim_folder
from tests.tiny import compose_tiny, record, reopen

CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
DATED = "{{ '[' + strftime_now('%Y') + strftime_now(\"-%d\") + ']' }}" + CHATML


@pytest.fixture(autouse=True)
def this_day(monkeypatch):
    monkeypatch.setattr(own, "_day", datetime.date(2026, 11, 27))


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("x", "x"),
        (None, None),
        ({"default": "x", "rag": "y"}, "x"),
        ({"chat": "x"}, "x"),
        ({"rag": "x", "tool_use": "y"}, None),
        ([{"name": "tool_use", "template": "y"}, {"name": "default", "template": "x"}], "x"),
    ],
)
def test_of_several_templates_the_default_is_taken(given, taken):
    assert own.own_template(given) == taken


def test_the_day_is_that_on_which_the_run_began(tmp_path):
    assert own.own_template(DATED).startswith("{{ '[' + '2026' + '-27' + ']' }}")
    claim_folder(tmp_path, {"stage": "x"})
    (tmp_path / "checkpoint-1").mkdir()
    own.begin_on("2027-01-01")
    assert "'2027'" in own.own_template(DATED)
    check_folder(tmp_path, {"stage": "x"})
    assert own.own_template(DATED).startswith("{{ '[' + '2026' + '-27' + ']' }}")


def test_a_folder_trained_with_it_takes_messages_in_parts_and_keeps_the_day(parts, tmp_path):
    base = shutil.copytree(parts / "lm", tmp_path / "lm")
    path = base / "tokenizer_config.json"
    several = [{"name": "default", "template": DATED}, {"name": "tool_use", "template": "x"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": several}))
    for round_trip in ("once", "again"):
        vlm = (
            compose_tiny(base, parts / "tower", "chat_template") if round_trip == "once" else reopen(tmp_path / "once")
        )
        vlm.save(tmp_path / round_trip)
    own.begin_on("2027-01-01")
    asked = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    plain = AutoProcessor.from_pretrained(tmp_path / "again")
    prompt = plain.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True)
    assert prompt == "[2026-27]<|im_start|>user\n<image>\nwhat is it?<|im_end|>\n<|im_start|>assistant\n"
    shown = record("r", "<image>\nwhat is it?", "a cat", image="x.png")
    pieces = reopen(tmp_path / "again").encoder.pieces(shown, opens=False)
    assert "".join(piece.text for piece in pieces) == prompt + "a cat<|im_end|>\n"


def test_a_tokenizer_without_a_template_has_none_to_save(tokenizer_folder):
    with pytest.raises(UserError, match="--version chat_template needs a tokenizer with a chat template"):
        saved_chat_template("chat_template", load_tokenizer(tokenizer_folder))
