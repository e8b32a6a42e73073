# SPDX-License-Identifier: Apache-2.0
"""Questions, options, chat lines and outputs that are wrong: each is named, and what else was asked is answered.

python -m tests.attacks --only answers --all
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from peft import LoraConfig
from PIL import Image
from transformers.utils import logging

from moellava.adapters.folder import write_adapter
from moellava.adapters.lora import Adapter, attach
from moellava.cli import CLOSED_PIPE, main
from moellava.commands import chat
from moellava.errors import UserError
from moellava.model.parts import LLAVA
from moellava.serve.answer import answer
from moellava.serve.generate import Sampling
from moellava.serve.prompt import Request
from moellava.train.trial import FAULTS
from moellava.vlm import VLM
from tests import tiny
from tests.attacks.outcome import Outcome

HALF = "\ud83d"
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hi"}

REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({}, "either a question or messages"),
    ({"question": "a", "messages": [HUMAN]}, "either a question or messages"),
    ({"question": 5}, "are texts; this is 5"),
    ({"question": b"a"}, "are texts; this is b'a'"),
    ({"question": HALF}, "half a character"),
    ({"question": "a", "system_prompt": HALF}, "half a character"),
    ({"question": "a", "system_prompt": ["b"]}, "are texts; this is ['b']"),
    ({"question": "a", "images": "cat.png"}, "images are a list of paths"),
    ({"question": "a", "images": None}, "images are a list of paths"),
    ({"question": "a", "images": [None]}, "images are a list of paths"),
    ({"question": "a", "images": [b"\x89PNG"]}, "images are a list of paths"),
    ({"question": "a", "videos": "clip.mp4"}, "videos are a list of paths"),
    ({"question": "a", "videos": [3]}, "videos are a list of paths"),
    ({"question": "<image> a"}, "0 images but 1 <image> tags"),
    ({"question": "<image> <image> a", "images": ["x.png"]}, "1 images but 2 <image> tags"),
    ({"question": "<video> a"}, "0 videos but 1 <video> tags"),
    ({"messages": "hi"}, "messages are a list of turns"),
    ({"messages": ["hi"]}, "messages are a list of turns"),
    ({"messages": [{"role": "user", "content": "hi"}]}, "messages are a list of turns"),
    ({"messages": [{"from": "human", "value": None}]}, "messages are a list of turns"),
    ({"messages": [GPT]}, "end with human; these are gpt"),
    ({"messages": [HUMAN, GPT]}, "end with human"),
    ({"messages": [HUMAN, HUMAN]}, "end with human"),
    ({"messages": [{"from": "system", "value": "a"}, HUMAN]}, "end with human"),
]
"""Arguments of a request, and words of the error."""

ASKED: list[tuple[Any, str]] = [
    (None, "None is a NoneType, not a Request"),
    ("what is it?", "is a str, not a Request"),
    ({"question": "a"}, "is a dict, not a Request"),
    (Request("a", ["missing.png"]), "no such image file"),
    (Request("a", [Path("/")]), "is a folder, not a file"),
    (Request("a", ["\0"]), "null"),
    (Request("a", ["a" * 5000]), "File name too long"),
    (Request("a", [Image.new("RGB", (1, 10_000))]), "aspect"),
    (Request("a", videos=["missing.mp4"]), "no such video file"),
    (Request("many words " * 5000), "tokens, images included"),
]
"""One request among good ones, and words of its error."""

OPTIONS: list[tuple[dict[str, Any], str]] = [
    *(({"max_new_tokens": value}, "max_new_tokens is") for value in (0, -1, 1.5, None, "a", True, math.nan)),
    *(({"temperature": value}, "temperature is") for value in (-1, math.nan, math.inf, None, "a", [])),
    *(({"temperature": 1, "top_p": value}, "top_p is") for value in (0, 1.1, -1, math.nan, None, "a")),
    *(({"temperature": 1, "top_k": value}, "top_k is") for value in (-1, 0.5, None, "a")),
    *(({"temperature": 1, "seed": value}, "seed is") for value in (2**64, 0.5, "a", math.nan)),
    *(({"num_beams": value}, "num_beams is") for value in (0, -2, 1.5, None, "a")),
    *(({"repetition_penalty": value}, "repetition_penalty is") for value in (0, -1, math.inf, math.nan, "a")),
    ({"top_p": 0.5}, "nothing is sampled at temperature 0"),
    ({"top_k": 5}, "nothing is sampled at temperature 0"),
    *(({"batch_size": value}, "batch_size is") for value in (0, -1, 2.5, "a", None, True)),
    ({"max_tokens": 5}, "max_tokens: no option of Sampling"),
    ({"sampling": Sampling(), "max_new_tokens": 5}, "max_new_tokens: given beside sampling"),
]
"""Options of `answer`, and words of the error."""

LISTS: list[Any] = [None, "what is it?", {"question": "a"}, 5, Request("a")]
"""What is no list of requests."""

LINES: list[tuple[str, str]] = [
    ("/image missing.png", "no such image file"),
    ("/image", "No file is named"),
    ("/image 'open", "No closing quotation"),
    ("/image " + "a" * 5000, "File name too long"),
    ("/image ~nobody/x.png", "no such image file"),
    ("/image \0", "null"),
    ("/image /", "is a folder, not a file"),
    ("/image good.png missing.png", "no such image file"),
    ("/video missing.mp4", "no such video file"),
    ("/video good.png", "the video"),
    ("/nonsense", "/reset"),
    ("/", "/reset"),
    (HALF, "half a character"),
    ("<image> what?", "0 images but 1 <image> tags"),
    ("many words " * 5000, "tokens, images included"),
]
"""Lines of a chat, and what it must say. The question after each is answered."""

EVERY = 4
"""The share that is quick takes one of so many."""

QUESTION = "what colour is it?"


def attacks(everything: bool, folder: Path) -> dict[str, Outcome]:
    """Each input of the tables above, and each subcommand with an output that fails."""
    step = 1 if everything else EVERY
    logging.set_verbosity_error()
    parts = tiny.write_base(folder / "lm", "llama", tiny.write_tokenizer(folder / "tokenizer")), folder / "clip"
    vlm = tiny.compose_tiny(folder / "lm", tiny.write_clip(parts[1]), "v1")
    tries = [(f"Request({given})", words, lambda given=given: refused_by(Request, given)) for given, words in REQUESTS]
    tries += [(f"answer({asked!r:.60})", words, lambda asked=asked: answered(vlm, asked)) for asked, words in ASKED]
    tries += [(str(given), words, lambda given=given: refused_by(ask(vlm), given)) for given, words in OPTIONS]
    for given in LISTS:
        tries.append((f"answer(vlm, {given!r})", "give a list", lambda given=given: refused_by(answer, (vlm, given))))
    return {
        "requests and options": outcome_of(tries[::step]),
        "lines of a chat": outcome_of(list(chat_tries(vlm, folder))[::step]),
        "outputs that fail": outcome_of(list(output_tries(vlm, folder))[::step]),
    }


Try = tuple[str, str, Callable[[], str]]
"""A name, words that must be said, and what says them."""


def outcome_of(tries: Iterable[Try]) -> Outcome:
    """Counts what was named; keeps what was not, or ended in a traceback."""
    outcome = Outcome()
    for name, words, attempt in tries:
        try:
            said = attempt()
        except FAULTS:
            outcome.failures.append(f"{name}: {traceback.format_exc()}")
            continue
        if words in said and "Traceback" not in said:
            outcome.counts["named"] += 1
        else:
            outcome.failures.append(f"{name}: {words!r} is not in {said[-2000:]!r}")
    return outcome


def refused_by(function: Callable[..., Any], given: dict[str, Any] | tuple[Any, ...]) -> str:
    """The message of the error that a call ends in; '' if it ends well."""
    try:
        function(**given) if isinstance(given, dict) else function(*given)
    except UserError as error:
        return str(error)
    return ""


def ask(vlm: VLM) -> Callable[..., Any]:
    """`answer` to one good request."""
    return lambda **options: answer(vlm, [Request(QUESTION)], **options)


def answered(vlm: VLM, asked: Any) -> str:
    """The error of one request; '' where another one beside it is not answered as it is alone."""
    good = Request(QUESTION)
    alone, (first, bad, last) = ask(vlm)(max_new_tokens=3), answer(vlm, [good, asked, good], max_new_tokens=3)
    return str(bad.error) if [first, last] == alone * 2 and first.error is last.error is None else ""


def chat_tries(vlm: VLM, folder: Path) -> Iterator[Try]:
    """Each line, followed by a question that is answered as if the line had not been."""
    Image.new("RGB", (32, 32), "red").save(folder / "good.png")
    plain = conversation(vlm, folder, [QUESTION])
    for line, words in LINES:

        def attempt(line: str = line) -> str:
            said = conversation(vlm, folder, [line, QUESTION])
            return said if said.endswith(plain.removeprefix(chat.HELP)) else f"the next answer differs: {said!r:.300}"

        yield line[:40], words, attempt


def conversation(vlm: VLM, folder: Path, lines: list[str]) -> str:
    """What a chat prints of lines typed."""
    printed, typed = io.StringIO(), iter(lines)

    def line(_: str) -> str:
        with contextlib.suppress(StopIteration):
            return next(typed)
        raise EOFError

    with contextlib.redirect_stdout(printed), patch("builtins.input", line), pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        chat.converse(chat.Chat(vlm, Sampling(max_new_tokens=3)))
    return printed.getvalue()


def output_tries(vlm: VLM, folder: Path) -> Iterator[Try]:
    """Each subcommand at its work, with an output that is full, or whose reader has gone."""
    vlm.save(folder / "model", meta={"stage": "finetune"})
    (folder / "bad.json").write_text('[{"id": "é", "conversations": []}]', encoding="utf-8")
    (folder / "good.json").write_text(json.dumps([{"id": "é", "conversations": [HUMAN, GPT]}]), encoding="utf-8")
    adapter = Adapter(LoraConfig(r=2, target_modules=["q_proj"]), {"base": "model"}, LLAVA)
    attach(vlm.model, adapter.config)
    write_adapter(vlm.model.state_dict(), adapter, folder / "adapter")
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(WORK["upcycle"].format(at=folder).replace("new/upcycled", "sparse").split()) == 0
    works = {name: words.format(at=folder) for name, words in WORK.items()}
    for name in works:
        for output, words in OUTPUTS.items():
            yield f"moellava {works[name]} > {output}", words, lambda w=works[name], o=output: printing(w, o, folder)
        for flag, target in TARGETS.get(name, {}).items():
            for place, words in PLACES.items():
                wrong = works[name].replace(f"{flag} {target.format(at=folder)}", "").split()
                yield f"moellava {name} {flag} {place!r}", words, lambda w=wrong, f=flag, p=place: said(w, f, p, folder)


WORK = {
    "chat": "chat --model-path {at}/model --question hi --max-new-tokens 3",
    "serve": "serve --model-path {at}/model --port 0 --api-only",
    "inspect": "inspect {at}/good.json --tokenizer {at}/model",
    "check-data": "check-data {at}/bad.json --skip-list {at}/new/skip.json",
    "convert-data": "convert-data {at}/good.json --output {at}/new/data.jsonl",
    "verify": "verify --files {at}/model",
    "upcycle": "upcycle --model-path {at}/model --num_experts 3 --output-dir {at}/new/upcycled",
    "export": "export --model-path {at}/model --output-dir {at}/new/exported",
    "merge-lora": "merge-lora --model-path {at}/model --adapter {at}/adapter --output-dir {at}/new/merged",
    "models": "models",
    "env": "env",
    "recipe": "recipe qwen3 pretrain --print",
    "plan": "plan --model {at}/model --tokens 9 --gpus 1 --device cpu",
    "prune": "prune --model-path {at}/sparse --data {at}/good.json --keep 2 --output-dir {at}/new/small",
    "routing": "routing --model-path {at}/sparse --data {at}/good.json --output {at}/new/routing",
    "eval": "eval --model-path {at}/model --limit 1 --output {at}/new/score.json",
}
"""Each subcommand at its work."""

ELSEWHERE = {"train", "demo", "compare", "report"}
"""Subcommands that train, or look at a run: `runs.py` attacks runs."""

OUTPUTS = {"/dev/full": "No space left on device", "a closed pipe": f"status {CLOSED_PIPE}"}
"""Where it prints to, and what is said."""

TARGETS = {
    "check-data": {"--skip-list": "{at}/new/skip.json"},
    "convert-data": {"--output": "{at}/new/data.jsonl"},
    "upcycle": {"--output-dir": "{at}/new/upcycled"},
    "export": {"--output-dir": "{at}/new/exported"},
    "merge-lora": {"--output-dir": "{at}/new/merged"},
    "eval": {"--output": "{at}/new/score.json"},
    "prune": {"--output-dir": "{at}/new/small"},
    "routing": {"--output": "{at}/new/routing"},
}
"""Flags that say where files are written, with what `WORK` gives them."""

PLACES = {
    "": "is named",
    "a\0b": "null",
    "{at}/good.json/below": "good.json",
    "{at}/model": "model",
    "/proc/nothing": "/proc/nothing",
    "a" * 300: "File name too long",
}
"""Where nothing can be written, and words that the message must contain beside the flag."""


def printing(words: str, output: str, folder: Path) -> str:
    """What a command says on stderr, and its status, if it prints to such an output."""
    shutil.rmtree(folder / "new", ignore_errors=True)
    (folder / "new").mkdir()
    errors = io.StringIO()
    with contextlib.redirect_stdout(opened(output)) as out, contextlib.redirect_stderr(errors):
        status = main(words.split())
        with contextlib.suppress(OSError):
            out.close()
    return f"{errors.getvalue()} status {status}"


def opened(output: str) -> io.TextIOWrapper:
    """An output that fails as soon as it is flushed."""
    if output == "/dev/full":
        return open(output, "w")  # noqa: SIM115  (closed by who prints to it)
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


def said(words: list[str], flag: str, place: str, folder: Path) -> str:
    """What a command says if it is to write to such a place; '' if it does not refuse, or names no flag."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = main([*words, flag, place.format(at=folder)])
    return errors.getvalue() if status == 2 and flag in errors.getvalue() else ""
