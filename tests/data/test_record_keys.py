# SPDX-License-Identifier: Apache-2.0
"""Every key of the tables acts, is refused by name, or is known to mean nothing; an unknown one is told or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from moellava.data.record_keys import KEYS, TURN_KEYS, Meaning, TurnMeaning
from moellava.data.records import load_records, media_of, read_records
from moellava.errors import DataError
from tests.tiny import record

TURNS = record(1, "<image>\nq", "a")["conversations"]
TEXT = record(1, "q", "a")["conversations"]


def keys(meaning: Any) -> list[str]:
    table: dict[str, Any] = TURN_KEYS if isinstance(meaning, TurnMeaning) else KEYS
    return [key for key, value in table.items() if value is meaning]


@pytest.fixture
def read(data_file):
    """record -> the record as it is read; raises DataError."""
    return lambda entry, **options: load_records(data_file([entry]), **options)[0]


@pytest.fixture
def refusal(data_file):
    """record -> what is said against it."""

    def refuse(entry: dict[str, Any]) -> str:
        with pytest.raises(DataError) as error:
            load_records(data_file([entry]))
        assert f"Record {entry.get('id', 0)} of" in str(error.value)
        return str(error.value)

    return refuse


@pytest.mark.parametrize("key", keys(Meaning.IMAGE))
@pytest.mark.parametrize("value", ["a.png", ["a.png"], {"path": "a.png", "bytes": None}, [{"url": "a.png"}]])
def test_images_are_shown_under_every_name(key, value, read):
    found = read({key: value, "conversations": TURNS})
    assert [tuple(medium) for medium in media_of(found)] == [("image", "a.png")]
    assert found.keys() == {"image", "conversations"}


@pytest.mark.parametrize("key", keys(Meaning.VIDEO))
def test_videos_are_shown_under_every_name(key, read):
    found = read({key: "a.mp4", "conversations": record(1, "<video>", "a")["conversations"]})
    assert [tuple(medium) for medium in media_of(found)] == [("video", "a.mp4")]


@pytest.mark.parametrize("key", [*keys(Meaning.IMAGE), *keys(Meaning.VIDEO)])
def test_media_without_a_tag_are_refused(key, refusal):
    modality = KEYS[key].value
    assert f"has 1 {modality}s but 0 <{modality}> tags" in refusal({"id": 5, key: "a.x", "conversations": TEXT})


@pytest.mark.parametrize("key", keys(Meaning.TURNS))
def test_turns_are_read_under_every_name(key, read):
    assert read({key: TEXT}) == {"conversations": TEXT}


@pytest.mark.parametrize("key", keys(Meaning.SYSTEM))
def test_a_system_prompt_acts_under_every_name(key, read, refusal):
    assert read({key: "Be brief.", "conversations": TEXT})["system_prompt"] == "Be brief."
    assert "system_prompt" not in read({key: "", "conversations": TEXT})
    assert f'"{key}" that is no text: 3' in refusal({key: 3, "conversations": TEXT})


@pytest.mark.parametrize("key", keys(Meaning.WEIGHT))
def test_a_weight_of_a_record_is_refused_unless_it_changes_nothing(key, read, refusal):
    for value in (1, 1.0, True, None):
        assert read({key: value, "conversations": TEXT}) == {"conversations": TEXT}
    for value in (0, 0.5, 2, False, "high"):
        assert f'has "{key}" {value!r}, but records all count the same' in refusal({key: value, "conversations": TEXT})


@pytest.mark.parametrize("key", keys(Meaning.REFUSED))
def test_what_would_not_act_is_refused_by_name_unless_it_is_empty(key, read, refusal):
    for value in (None, [], "", {}):
        assert read({key: value, "conversations": TEXT}) == {"conversations": TEXT}
    assert f'has "{key}", which would not act here' in refusal({key: ["x"], "conversations": TEXT})


@pytest.mark.parametrize("key", keys(Meaning.NOTE))
@pytest.mark.parametrize("value", ["see a.png", ["b.jpg"], 3, None])
def test_notes_stay_and_say_nothing(key, value, data_file):
    records, problems = read_records(data_file([{key: value, "conversations": TEXT}]))
    assert not problems and not records.notices and records[0] == {key: value, "conversations": TEXT}


def test_the_keys_of_one_meaning_agree(read, refusal):
    same = {"image": "a.png", "images": ["a.png"], "conversations": TURNS, "messages": TURNS}
    assert read(same)["image"] == "a.png"
    assert "has 'image' and 'images', which mean the same and differ" in refusal(same | {"images": ["b.png"]})
    assert "has 'conversations' and 'messages', which" in refusal(same | {"messages": TEXT})
    assert "has 'system' and 'system_prompt', which" in refusal({"system": "x", "system_prompt": "y", "messages": TEXT})


@pytest.mark.parametrize(
    "value",
    [
        "a/b.JPEG", "my photo.png", "clip.mp4", "sound.wav", "https://x.org/a.webp", "data:image/png;base64,iVBO",
        ["a.png"], [["a.png"]], {"path": "a.png", "bytes": None}, [{"url": "https://x.org/b.gif"}],
    ],
)  # fmt: skip
def test_an_unknown_key_with_a_path_is_refused(value, refusal):
    assert 'has "photo", which looks like a path of a file' in refusal({"photo": value, "conversations": TEXT})


@pytest.mark.parametrize("turns", [TEXT, [{"role": "user", "content": []}]])
def test_an_unknown_key_with_turns_is_refused(turns, refusal):
    assert 'has "chat_log", which looks like turns' in refusal({"chat_log": turns, "conversations": TEXT})


@pytest.mark.parametrize("value", ["a text. With a point", 3, [1, 2], {"x": {"y": "z"}}, ["x"], "https://x.org/page"])
def test_another_unknown_key_stays_and_is_reported_once_a_file(value, data_file, caplog):
    rows = [{"note": value, "conversations": TEXT}] * 3 + [{"note": None, "conversations": TEXT}]
    files = [data_file(rows, "a.json"), data_file(rows[:1], "b.json")]
    records = load_records(files)
    assert records[0]["note"] == value
    assert records.notices == [line.getMessage() for line in caplog.records]
    assert records.notices == [
        f"{files[0]}: keys that mean nothing here are ignored: 'note' in 3 records",
        f"{files[1]}: keys that mean nothing here are ignored: 'note' in 1 records",
    ]


def with_turn(number: int, **keys: Any) -> dict[str, Any]:
    turns = copy.deepcopy(TEXT)
    turns[number] |= keys
    return {"id": "x", "conversations": turns}


@pytest.mark.parametrize("key", keys(TurnMeaning.TRAINED))
def test_an_answer_is_left_out_of_training_under_every_name(key, read, refusal):
    for value in (0, 0.0, False):
        assert read(with_turn(1, **{key: value}))["conversations"][1] == TEXT[1] | {"train": False}
    for value in (1, 1.0, True, None):
        assert read(with_turn(1, **{key: value}))["conversations"] == TEXT
    for value in (0.5, 2, -1, "0"):
        assert f'has "{key}" {value!r} in turn 1; it may be 0 or 1' in refusal(with_turn(1, **{key: value}))
    assert read(with_turn(0, **{key: 0}))["conversations"] == TEXT, "a question is not trained anyway"
    assert f'has "{key}" in turn 0, but only answers are trained on' in refusal(with_turn(0, **{key: 1}))


@pytest.mark.parametrize("key", keys(TurnMeaning.UNTRAINED))
def test_and_under_names_of_the_opposite(key, read, refusal):
    assert read(with_turn(1, **{key: True}))["conversations"][1]["train"] is False
    assert read(with_turn(0, **{key: True}))["conversations"] == TEXT
    assert "contradict each other" in refusal(with_turn(1, **{key: True, "train": True}))


@pytest.mark.parametrize("key", keys(TurnMeaning.REFUSED))
def test_what_would_not_act_in_a_turn_is_refused_by_name(key, read, refusal):
    assert read(with_turn(1, **{key: None}))["conversations"] == TEXT
    assert f'has "{key}" in turn 1, which would not act here' in refusal(with_turn(1, **{key: "x"}))


@pytest.mark.parametrize("key", keys(TurnMeaning.NOTE))
def test_notes_of_turns_say_nothing(key, data_file):
    records, problems = read_records(data_file([with_turn(1, **{key: "x.png"})]))
    assert not problems and not records.notices and records[0]["conversations"] == TEXT


def test_an_unknown_key_of_a_turn_is_told_or_refused(data_file, refusal):
    (notice,) = read_records(data_file([with_turn(1, mood="merry")]))[0].notices
    assert "'mood' in 1 records" in notice
    assert 'has "photo" in turn 0, which looks like a path' in refusal(with_turn(0, photo="a.png"))


@pytest.mark.parametrize("who", keys(TurnMeaning.WHO))
@pytest.mark.parametrize("text", keys(TurnMeaning.TEXT))
def test_turns_under_every_pair_of_names(who, text, read):
    rows = [{who: turn["from"], text: turn["value"]} for turn in TEXT]
    assert read({"messages": rows})["conversations"] == TEXT


def test_the_tables_know_no_key_twice():
    assert not {key for key in KEYS if not key.islower()} and set(TurnMeaning) == set(TURN_KEYS.values())
    assert set(Meaning) == set(KEYS.values())


def test_tags_in_a_record_without_media_are_text_and_told(data_file):
    rows = [record(1, "How do I use the <video> tag, or <image>?", "Like <video>."), record(2, "q", "<image>")]
    path = data_file(rows)
    records, problems = read_records(path)
    assert not problems and media_of(records[0]) == [] and list(records) == rows
    assert records.notices == [f"{path}: tags of images or videos are text in 1 records, which have none"]


@pytest.mark.parametrize("url", ["https://x.org/a.png", "s3://bucket/a.png", "http://x/a.png"])
def test_nothing_is_downloaded(url, refusal):
    said = refusal({"image": url, "conversations": TURNS})
    assert 'has an entry of "image" that is a URL, and nothing is downloaded' in said


def test_a_file_url_is_a_path(read):
    assert read({"image": "file:///tmp/a%20b.png", "conversations": TURNS})["image"] == "/tmp/a b.png"


@pytest.mark.parametrize(
    "value", [{"path": "a.png", "url": "b.png"}, {"crop": 3}, {"path": "a.png", "crop": 3}, {}, [{}], [3], 3, [[]]]
)
def test_what_is_no_path_is_refused(value, data_file):
    (problem,) = read_records(data_file([{"image": value, "conversations": TURNS}]))[1] or [None]
    if value == {}:
        assert problem is None, "an empty object is what a table has in a row without an image"
    else:
        assert "path" in problem.text and "image" in problem.text


def test_roles_that_are_named_act_beside_the_usual_ones(data_file):
    rows = [
        {"conversations": [{"from": "Ann", "value": "q"}, {"from": "Bob", "value": "a"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ]
    path = data_file(rows)
    assert [row["conversations"] for row in load_records(path, roles=("Ann", "Bob"))] == [TEXT, TEXT]
    with pytest.raises(DataError, match="no turn is from 'Eve', as --user_key or --assistant_key says; there are Bob"):
        turns = [{"role": "user", "content": "q"}, {"role": "Bob", "content": ""}]
        load_records(data_file([{"messages": turns}]), roles=("Eve", "Bob"))


def test_roles_may_be_swapped(data_file):
    path = data_file([{"conversations": [{"from": "gpt", "value": "q"}, {"from": "human", "value": "a"}]}])
    assert load_records(path, roles=("gpt", "human"))[0]["conversations"] == TEXT


def test_messages_are_short_whatever_they_show(data_file):
    turns = [{"from": ["y" * 9000], "value": "z"}]
    rows = [{"id": "x" * 9000, "conversations": turns}, {"id": 2, "photo": "q" * 900 + ".png"}]
    problems = read_records(data_file(rows))[1]
    assert len(problems) == 2 and all(len(problem.text) < 900 for problem in problems)


def test_control_characters_of_records_do_not_reach_a_terminal(data_file):
    rows = [{"id": "\x1b[31m\ud83d", "conversations": []}, {"photo": "\x1b[2J.png", "\x07": 1, "conversations": TEXT}]
    problems = read_records(data_file(rows))[1]
    assert len(problems) == 2 and all(problem.text.isprintable() for problem in problems)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (
            {"instruction": "add", "input": "1 and 2", "output": "3"},
            '{"from": "human", "value": instruction and input}, {"from": "gpt", "value": output}',
        ),
        ({"prompt": "hi", "completion": "ho"}, '{"from": "human", "value": prompt}'),
        ({"question": "hi", "answer": "ho", "image": "a.png"}, '{"from": "gpt", "value": answer}'),
    ],
)
def test_one_question_and_answer_of_another_format_are_told_where_they_go(entry, said, refusal):
    assert 'has no "conversations"' in refusal(entry) and said in refusal(entry)
    assert "which go into" not in refusal({"text": "hi"})
