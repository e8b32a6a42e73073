# SPDX-License-Identifier: Apache-2.0
"""Today's dialects, as LLaVA writes them: parts, system turns, tools; and the layout that the user has typed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moellava.data.encoder import CountedImages, Encoder
from moellava.data.records import load_records, media_of
from moellava.data.render import TemplateRenderer
from moellava.data.render.chat import ChatRenderer, parts_of_text
from moellava.data.told import Speakers, tagged, told
from moellava.data.view import trained_texts
from moellava.errors import DataError
from tests.attacks.records import IN_PARTS


def llava(*said: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


A = {"type": "image", "image": "a.png"}
B = {"type": "image_url", "image_url": {"url": "b.png", "detail": "high"}}
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at": "é"}'}}

DIALECTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sharegpt": (
        {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
        {"conversations": llava("q", "a")},
    ),
    "messages": ({"messages": [user("q"), assistant("a")]}, {"conversations": llava("q", "a")}),
    "one part": (
        {"messages": [user([text("q")]), assistant([text("a"), text("b")])]},
        {"conversations": llava("q", "ab")},
    ),
    "image first": (
        {"messages": [user([A, text("q")]), assistant("a")]},
        {"conversations": llava("<image>\nq", "a"), "image": ["a.png"]},
    ),
    "image last": (
        {"messages": [user([text("q"), B]), assistant("a")]},
        {"conversations": llava("q\n<image>", "a"), "image": ["b.png"]},
    ),
    "image between": (
        {"messages": [user([text("q"), A, text("r")]), assistant("a")]},
        {"conversations": llava("q<image>r", "a"), "image": ["a.png"]},
    ),
    "images in turns": (
        {"messages": [user([A, B]), assistant("a"), user([text("r\n"), A]), assistant("b")]},
        {"conversations": llava("<image>\n<image>", "a", "r\n\n<image>", "b"), "image": ["a.png", "b.png", "a.png"]},
    ),
    "places, and a list": (
        {"messages": [user([{"type": "image"}, text("q")]), assistant("a")], "images": ["a.png"]},
        {"conversations": llava("<image>\nq", "a"), "image": ["a.png"]},
    ),
    "places of a table": (
        {"messages": [user([{"type": "image", "text": None}, text("q") | {"image": None}]), assistant("a")],
         "images": ["a"]},
        {"conversations": llava("<image>\nq", "a"), "image": ["a"]},
    ),
    "responses": (
        {"messages": [user([{"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "q"}]),
                      assistant([{"type": "output_text", "text": "a"}])]},
        {"conversations": llava("<image>\nq", "a"), "image": ["a.png"]},
    ),
    "video": (
        {"messages": [user([{"type": "video", "video": "c.mp4"}, A, text("q")]), assistant("a")]},
        {"conversations": llava("<video>\n<image>\nq", "a"), "image": ["a.png"], "video": ["c.mp4"]},
    ),
    "system turn": (
        {"messages": [{"role": "system", "content": "s"}, user("q"), assistant("a")]},
        {"conversations": llava("q", "a"), "system_prompt": "s"},
    ),
    "developer in parts": (
        {"messages": [{"role": "developer", "content": [text("s")]}, user("q"), assistant("a")]},
        {"conversations": llava("q", "a"), "system_prompt": "s"},
    ),
    "sharegpt system": (
        {"conversations": [{"from": "system", "value": "s"}, *llava("q", "a")]},
        {"conversations": llava("q", "a"), "system_prompt": "s"},
    ),
    "tools": (
        {"messages": [user("q"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "1"},
                      {"role": "tool", "content": "2", "tool_call_id": "c"}, assistant("a")]},
        {"conversations": llava("q", '{"name": "look", "arguments": {"at": "é"}}', "1\n2", "a")},
    ),
    "said and called": (
        {"messages": [user("q"), assistant("let me see", function_call={"name": "f", "arguments": "not JSON"})]},
        {"conversations": llava("q", 'let me see\n{"name": "f", "arguments": "not JSON"}')},
    ),
    "sharegpt tools": (
        {"conversations": [*llava("q"), {"from": "function_call", "value": "f()"},
                           {"from": "observation", "value": "1"}, {"from": "gpt", "value": "a"}]},
        {"conversations": llava("q", "f()", "1", "a")},
    ),
    "a tool shows": (
        {"messages": [user("q"), assistant("f()"), {"role": "tool", "content": [text("see"), A]}, assistant("a")]},
        {"conversations": llava("q", "f()", "see\n<image>", "a"), "image": ["a.png"]},
    ),
    "the Cauldron": (
        {"images": ["a.png"],
         "texts": [{"user": "q", "assistant": "a", "source": "x"}, {"user": "r", "assistant": "b"}]},
        {"conversations": llava("<image>\nq", "a", "r", "b"), "image": ["a.png"]},
    ),
    "empty texts": ({"messages": [user(""), assistant("")]}, {"conversations": llava("", "")}),
    "a leading answer": (
        {"messages": [assistant("hello"), user("q"), assistant("a")]},
        {"conversations": [{"from": "gpt", "value": "hello"}, *llava("q", "a")]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIALECTS)
def test_todays_dialects_are_read(name, data_file):
    given, expected = DIALECTS[name]
    assert load_records(data_file([{"id": name} | given]))[0] == {"id": name} | expected


REFUSALS: dict[str, tuple[list[Any], str]] = {
    "an image in an answer": ([user("q"), assistant([A])], "images or videos in turn 1, which is no question"),
    "an unknown part": ([user([{"type": "audio", "audio": "a.wav"}])], "a part that is neither text, image nor video"),
    "a part without text": ([user([{"type": "text"}])], "a part that is neither"),
    "a number": ([user([3])], "a part that is neither"),
    "frames a second": (
        [user([{"type": "video", "video": "a.mp4", "fps": 2.0}])],
        "'fps' in a part, which would not act",
    ),
    "two sources": ([user([A | {"url": "b.png"}])], "a part of several sources: image, url"),
    "some sources": ([user([A, {"type": "image"}])], "of which only some say where they lie"),
    "a late system turn": ([user("q"), {"role": "system", "content": "s"}, assistant("a")], "a system turn 1; only"),
    "two system turns": ([{"role": "system", "content": "s"}] * 2 + [user("q")], "a system turn 1; only"),
    "a nameless call": ([user("q"), assistant(None, tool_calls=[{"x": 1}])], "a call of a tool that has no name"),
    "more in a call": ([user("q"), assistant(None, tool_calls=[CALL | {"why": "x"}])], "'why' in a call, which would"),
    "nothing said": ([user("q"), assistant(None)], "a turn 1 that is not"),
    "two texts": ([user("q"), assistant("a", value="b")], "a turn 1 whose 'content' and 'value' differ"),
    "two speakers": ([user("q") | {"from": "gpt"}], "a turn 0 from 'user' and 'gpt'"),
    "half an answer": (
        [user("q"), assistant("f", loss=0), {"role": "function_call", "content": "g"}],
        "of which only a part is trained",
    ),
    "two questions": ([user("q"), user("r"), assistant("a")], "roles that do not alternate"),
    "a tag too many": ([user([text("the <image> tag"), A]), assistant("a")], "has 1 images but 2 <image> tags"),
    "reasoning": (
        [user("q"), assistant("a", reasoning_content="hm")],
        '"reasoning_content" in turn 1, which would not',
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_could_not_act_is_refused_by_name(name, data_file):
    turns, said = REFUSALS[name]
    with pytest.raises(DataError) as error:
        load_records(data_file([{"id": name, "messages": turns}]))
    assert f"Record {name} of" in str(error.value) and said in str(error.value)


def test_media_of_the_record_and_of_its_parts_agree(data_file):
    turns = [user([A, text("q")]), assistant("a")]
    assert load_records(data_file([{"messages": turns, "images": ["a.png"]}]))[0]["image"] == ["a.png"]
    with pytest.raises(DataError, match="its messages name other images"):
        load_records(data_file([{"messages": turns, "images": ["b.png"]}]))


def test_a_system_turn_and_a_system_key_agree(data_file):
    turns = [{"role": "system", "content": "s"}, user("q"), assistant("a")]
    assert load_records(data_file([{"messages": turns, "system": "s"}]))[0]["system_prompt"] == "s"
    with pytest.raises(DataError, match='"system" and a system turn, which differ'):
        load_records(data_file([{"messages": turns, "system": "t"}]))


PARTS = [
    ("<image>\nWhat?", ["image", "What?"]),
    ("<image>\n\nWhat?", ["image", "\nWhat?"]),
    ("<image> What?", ["image", " What?"]),
    ("What?\n<image>", ["What?", "image"]),
    ("What?\n\n<image>", ["What?\n", "image"]),
    ("Before:\n<image>\n\nAfter:", ["Before:\n", "image", "\n\nAfter:"]),
    ("<image> <image>", ["image", " ", "image"]),
    ("<image>\n<video>\nq", ["image", "video", "q"]),
    ("<image>\n\n<image>", ["image", "\n", "image"]),
    ("a <image>\t<image>\n b", ["a ", "image", "\t", "image", "\n b"]),
    ("q\n<image><image>", ["q", "image", "image"]),
    ("\n<image>", ["\n", "image"]),
    ("<image>\n", ["image"]),
    ("<image>", ["image"]),
    ("", [""]),
    (" \n ", [" \n "]),
]


@pytest.mark.parametrize(("typed", "parts"), PARTS)
def test_what_was_typed_around_a_tag_stays_but_for_llavas_own_line_break(typed, parts):
    found = [value or name for name, value in parts_of_text(typed, True)] if typed else [""]
    assert found == parts or (found == ["text"] and parts == [""])


PART = st.sampled_from(["image", "video"]).map(lambda name: (name, "")) | st.text("a\n \u2003<", max_size=3).map(
    lambda value: ("text", value)
)


@given(st.lists(PART, max_size=7))
def test_parts_come_back_from_text_as_they_were(parts):
    """A list of parts, as text with tags, in parts again: nothing is gained or lost, texts that touch joined."""
    joined: list[tuple[str, str]] = []
    for name, value in parts:
        if name == "text" and joined and joined[-1][0] == "text":
            joined[-1] = ("text", joined[-1][1] + value)
        elif (name, value) != ("text", ""):
            joined.append((name, value))
    assert parts_of_text(tagged(parts), True) == (joined or [("text", "")])


@pytest.mark.parametrize("typed", ["", "  ", "Before:\n<image>\n\nAfter: <image> <image>"])
def test_released_models_read_what_was_typed(typed, tokenizers):
    renderer = ChatRenderer(tokenizers["phi"], IN_PARTS, in_parts=True)
    pieces = renderer.pieces(llava(typed, "a"), has_media="<image>" in typed)
    shown = typed.replace("\n<image>", "\n[image]").replace("<image>", "[image]")
    assert "".join(piece.text for piece in pieces) == (
        f"<|im_start|>user\n{shown}<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    )


@pytest.mark.parametrize("version", ["v1", "mpt", "llama_2", "llava_v0", "chat_template"])
@pytest.mark.parametrize("silent", [(0,), (1,), (0, 2), (0, 1, 2), ()])
def test_an_answer_without_loss_has_no_label_and_the_same_ids(version, silent, tokenizers, data_file):
    tokenizer = tokenizers["phi"]
    renderer = ChatRenderer(tokenizer, IN_PARTS) if version == "chat_template" else TemplateRenderer(version)
    encoder = Encoder(tokenizer, renderer, CountedImages(4))
    said = ["one", "", "three </s> <image>"]
    turns = [
        turn
        for n, answer in enumerate(said)
        for turn in (user(f"q{n}"), assistant(answer, weight=int(n not in silent)))
    ]
    rows = [{"messages": [assistant("hello"), *turns]}, {"messages": [{**turn, "weight": None} for turn in turns]}]
    some, every = (encoder.encode(row) for row in load_records(data_file(rows)))
    assert some.ids == every.ids and some.is_trained == (len(silent) < 3)
    runs = trained_texts(tokenizer, some)
    assert len(runs) == 3 - len(silent)
    left = [answer for n, answer in enumerate(said) if n not in silent]
    assert all(answer in run for answer, run in zip(left, runs, strict=True))
    assert runs == [run for n, run in enumerate(trained_texts(tokenizer, every)) if n not in silent]


def test_a_system_prompt_acts_in_a_composed_model_or_is_refused(tokenizers, data_file):
    row = load_records(
        data_file([{"messages": [{"role": "system", "content": "In French."}, user("q"), assistant("a")]}])
    )[0]
    encoder = Encoder(tokenizers["phi"], TemplateRenderer("v1"), CountedImages(4))
    assert "".join(piece.text for piece in encoder.pieces(row)).startswith("In French. USER: q")
    assert "for which --version plain has no place" in str(TemplateRenderer("plain").problem(row))


def test_a_record_of_json_in_a_text(data_file):
    row = load_records(data_file([{"conversations": json.dumps(llava("<image>", "a")), "image": "a.png"}]))[0]
    assert len(media_of(row)) == 1


def test_turns_as_they_stand_are_read_as_all_others_are(monkeypatch):
    words = st.sampled_from(["human", "gpt", "user", "system", "", "tool"])
    rows = st.lists(
        st.dictionaries(st.sampled_from(["from", "value", "loss", "role"]), words | st.text(max_size=3) | st.none())
        | st.fixed_dictionaries({"value": st.text(max_size=3), "from": st.sampled_from(["human", "gpt"])}),
        max_size=4,
    )

    @given(rows, st.sampled_from([("human", "gpt"), ("gpt", "human"), ("user", "human")]))
    def both(rows, roles):
        assert outcome(rows, roles) == outcome(rows, roles, monkeypatch)

    def outcome(rows, roles, patch=None):
        speakers = Speakers(roles)
        with monkeypatch.context() as patched:
            if patch:
                patched.setattr("moellava.data.told._as_they_stand", lambda *_: None)
            try:
                found = told(rows, speakers)
                return found, [list(turn) for turn in found.turns], speakers.seen
            except DataError as error:
                return str(error)

    both()
