# SPDX-License-Identifier: Apache-2.0
"""`moellava chat` as people type it: one shot, interactive, several images, mistakes, and no deepspeed."""

from __future__ import annotations

import io
import sys

import pytest
from PIL import Image

from moellava.cli import main as moellava
from moellava.commands import chat as command
from moellava.commands.chat import Chat
from moellava.errors import BadFileError
from moellava.serve.generate import Sampling
from tests.processes import ROOT, Finished, launched, run

QUESTION = "what colour is it?"


def ask(*words: object, code: str | None = None, **options) -> Finished:
    """A fresh Python process: `-m moellava.serve.cli WORDS`, or `code` with them as sys.argv."""
    start = ["-c", code] if code else ["-m", "moellava.serve.cli"]
    return run([sys.executable, *start, *map(str, words)], timeout=120, **options)


@pytest.mark.slow
def test_one_question_without_deepspeed(taught_folder, pictures):
    code = (
        "import sys; from moellava.cli import main; status = main(['chat', *sys.argv[1:]]); "
        "loaded = [name for name in sys.modules if name.split('.')[0] == 'deepspeed']; "
        "print(loaded, file=sys.stderr); sys.exit(status)"
    )
    words = ["--model-path", taught_folder, "--image-file", pictures[1], "--question", QUESTION]
    done = ask(*words, code=code, fresh=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "green\n"
    assert done.stderr.splitlines()[-1] == "[]", "deepspeed was imported"


@pytest.mark.slow
def test_the_module_converses(taught_folder, pictures):
    lines = [
        QUESTION,
        "/reset",
        f"/image {pictures[2]}",
        QUESTION,
        "/reset",
        "/image missing.png",
        QUESTION,
        "/reset",
        "and the sky?",
        "/quit",
    ]
    done = ask("--model-path", taught_folder, "--image-file", pictures[0], input="\n".join(lines))
    assert done.returncode == 0, done.stderr
    answers = [line.removeprefix("> ") for line in done.stdout.splitlines() if line.startswith("> ")]
    assert answers[0] == "red"
    assert any(line.endswith("blue") for line in answers)
    assert "missing.png" in done.stdout
    assert "blue it is" in done.stdout


def test_a_mistake_is_one_message(capsys, tmp_path):
    assert moellava(["chat", "--model-path", str(tmp_path / "nothing"), "--question", "what?"]) == 2
    message = capsys.readouterr().err
    assert "--model-path" in message and "nothing" in message
    assert moellava(["chat", "--model-path", str(tmp_path), "--question", "what?", "--temperature", "-1"]) == 2
    assert "temperature" in capsys.readouterr().err


def test_a_conversation_remembers_turns_and_images(composed, pictures):
    chat = Chat(composed, Sampling(max_new_tokens=3))
    chat.show([str(pictures[0])])
    first = "".join(chat.ask("what is it?"))
    chat.show([str(pictures[1]), str(pictures[2])])
    second = "".join(chat.ask("and these?"))
    assert [turn["value"] for turn in chat.messages] == [
        "<image>\nwhat is it?",
        first,
        "<image>\n<image>\nand these?",
        second,
    ]
    assert [image.size for image in chat.images] == [Image.open(path).size for path in pictures]
    chat.reset()
    assert chat.messages == [] and chat.images == []


def test_several_images_and_an_end_of_input(composed, pictures, monkeypatch, capsys):
    monkeypatch.setattr("moellava.vlm.open_vlm", lambda *_, **__: composed)
    monkeypatch.setattr("sys.stdin", io.StringIO("compare them\n/help\n"))
    words = ["--model-path", "x", "--image-file", *map(str, pictures), "--max-new-tokens", "2"]
    assert command.main(words) == 0
    assert capsys.readouterr().out.count("/reset") == 2  # the greeting and /help


def test_a_bad_file_leaves_the_conversation_as_it_was(composed, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("moellava.vlm.open_vlm", lambda *_, **__: composed)
    named = tmp_path / "a picture.png"
    named.write_bytes(pictures[0].read_bytes())
    lines = ["/image missing.png", "hello", f"/image {named}", f"/image '{named}' {pictures[1]}", "these?"]
    lines += ["/image 'open", "/image", "and now?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert command.main(["--model-path", "x", "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("no such image file") == 1 and "No closing quotation" in said and "No file is named" in said
    assert "Traceback" not in said and "tags" not in said


@pytest.mark.parametrize("shown", [{"images": ["https://x.y/z.png"]}, {"videos": ["s3://bucket/clip.mp4"]}], ids=str)
def test_an_address_is_named_as_it_was_given(shown, composed):
    chat = Chat(composed, Sampling(max_new_tokens=2))
    with pytest.raises(BadFileError, match=rf"{next(iter(shown.values()))[0]}: files of a question are not downloaded"):
        chat.show(**shown)


def test_an_answer_that_is_stopped_is_forgotten_and_the_chat_goes_on(composed, monkeypatch, capsys):
    def stopped(*_):
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr("moellava.serve.answer.stream", stopped)
    chat = Chat(composed, Sampling())
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    command.converse(chat)
    assert "stopped" in capsys.readouterr().out and chat.messages == []


@pytest.mark.parametrize(
    "words, named",
    [
        (["--device", "gpu"], "--device gpu: "),
        (["--device", "cuda:7"], "--device cuda:7: "),
        (["--temperature", "nan"], "temperature is nan"),
        (["--seed", str(2**64)], "seed is"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
    ],
)
def test_a_wrong_value_is_named_before_the_model_is_read(words, named, capsys):
    assert moellava(["chat", "--model-path", "no such folder", *words]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.slow
def test_the_way_in_which_moe_llava_is_asked(taught_folder, pictures):
    words = ["--model-path", str(taught_folder), "--image-file", str(pictures[0]), "--question", "what colour is it?"]
    script = str(ROOT / "moellava" / "serve" / "cli.py")
    alone = run([*launched(1, fresh=True), script, *words])
    assert alone.returncode == 0 and "red" in alone.stdout, alone.stderr[-2000:]
    both = run([*launched(2, fresh=True), script, *words])
    assert both.returncode != 0 and "one process answers" in both.stderr and "Traceback" not in both.stderr
