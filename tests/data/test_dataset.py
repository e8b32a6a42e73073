# SPDX-License-Identifier: Apache-2.0
"""The data set: samples, lengths, truncation, and all problems before training."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from moellava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moellava.data.collate import MediaCollator
from moellava.data.tokenizers import load_tokenizer, place_image_token
from moellava.errors import DataError

PATCHES = 4


def test_samples(make, make_record):
    data = make(
        [
            make_record("one", "<image>\nwhat?", "red", image="a.png"),
            make_record("text", "hi", "ho"),
            make_record("two", "<image> or", "a", "<image>?", "b", image=["a.png", "sub/b.jpg"]),
        ]
    )
    assert len(data) == 3 and data.shows_media == [True, False, True]
    assert data.modalities == ("image",)
    for index, images in enumerate([1, 0, 2]):
        sample = data[index]
        ids = sample["input_ids"].tolist()
        assert ids.count(IMAGE_TOKEN_INDEX) == len(sample["media"]) == images
        assert len(sample["labels"]) == len(ids)
        assert data.lengths[index] == len(ids) + images * (PATCHES - 1)
    assert [image.size for image in data[2]["media"]] == [(64, 40)] * 2
    assert data[2]["record"].startswith("Record two of ")
    assert data.report() == {
        "records": 3,
        "skip_listed": 0,
        "bad_files": 0,
        "dropped": 0,
        "truncated": 0,
        "samples": 3,
    }


def test_all_problems_are_named_before_training(make, make_record):
    rows = [
        make_record("good", "<image>", "a", image="a.png"),
        make_record("gone", "<image>", "a", image="missing.png"),
        make_record("cut", "<image><image>", "a", image=["a.png", "cut.jpg"]),
        make_record("open", "only a question"),
    ]
    with pytest.raises(DataError) as error:
        make(rows)
    assert len(error.value.problems) == 3
    for name, words in [("gone", "no such image file"), ("cut", "cannot be read"), ("open", "no answer to train on")]:
        assert any(f"Record {name} of" in line and words in line for line in error.value.problems)


def test_bad_files_are_skipped_and_counted_on_request(make, make_record):
    rows = [make_record(name, "<image>", "a", image=name) for name in ("a.png", "missing.png", "cut.png", "sub/b.jpg")]
    data = make(rows, bad_files="skip")
    assert [data[index]["record"].split()[1] for index in range(2)] == ["a.png", "sub/b.jpg"]
    assert data.report()["bad_files"] == 2 and data.report()["samples"] == 2
    with pytest.raises(DataError, match="no sample remains of 2 records: 2 have bad files .--bad_files skip"):
        make(rows[1:3], bad_files="skip")


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_where_every_record_is_too_long_the_flags_are_named(make, make_record, overlong):
    rows = [make_record(str(number), "q " * 50, "a") for number in range(3)]
    with pytest.raises(DataError, match="no sample remains of 3 records: 3 .*--model_max_length 20, or .*--overlong"):
        make(rows, max_length=20, overlong=overlong)


def test_a_file_that_breaks_later_is_named(make, make_record, image_tree, tmp_path):
    content = (image_tree / "a.png").read_bytes()
    (tmp_path / "x.png").write_bytes(content)
    data = make([make_record("x", "<image>", "a", image="x.png")], image_folder=tmp_path)
    assert len(data[0]["media"]) == 1
    (tmp_path / "x.png").write_bytes(content[:100])
    with pytest.raises(DataError, match="Record x of .*x.png.*check-data"):
        data[0]


def test_overlong_samples(make, make_record):
    rows = [make_record("long", "<image> count", " ".join("abcdefgh"), image="a.png"), make_record("short", "q", "a")]
    longest, short = make(rows).lengths
    assert make(rows, max_length=longest, overlong="error").lengths == [longest, short]
    with pytest.raises(DataError, match=f"Record long of .* takes {longest} positions .* {longest - 1}"):
        make(rows, max_length=longest - 1)
    dropped = make(rows, max_length=longest - 1, overlong="drop")
    assert len(dropped) == 1 and dropped.report()["dropped"] == 1
    cut = make(rows, max_length=longest - 1, overlong="truncate")
    assert cut.lengths == [longest - 1, short] and cut.report()["truncated"] == 1
    assert torch.equal(cut[0]["input_ids"], make(rows)[0]["input_ids"][:-1])


def test_an_image_is_never_cut(make, make_record):
    rows = [make_record("two", "<image> q", "a", "<image> r", "b", image=["a.png", "sub/b.jpg"])]
    ids = make(rows)[0]["input_ids"].tolist()
    second = len(ids) - 1 - ids[::-1].index(IMAGE_TOKEN_INDEX)
    before = second + PATCHES - 1
    for max_length in range(before, before + PATCHES):
        data = make(rows, max_length=max_length, overlong="truncate")
        sample = data[0]
        assert len(sample["input_ids"]) == second and data.lengths == [before]
        assert sample["input_ids"].tolist().count(IMAGE_TOKEN_INDEX) == len(sample["media"]) == 1
    whole = make(rows, max_length=before + PATCHES, overlong="truncate")[0]
    assert len(whole["input_ids"]) == second + 1 and len(whole["media"]) == 2


def test_a_sample_with_nothing_left_is_dropped_and_counted(make, make_record):
    rows = [make_record("long", "word " * 50, "a"), make_record("short", "q", "a")]
    data = make(rows, max_length=make(rows).lengths[1], overlong="truncate")
    assert data.report()["dropped"] == 1 and data.report()["truncated"] == 0 and len(data) == 1


def test_start_and_end_tokens(golden_tokenizers, make, make_record):
    tokenizer = load_tokenizer(golden_tokenizers / "phi")
    rows = [make_record("x", "<image>\nq", "a", image="a.png")]
    with pytest.raises(ValueError, match="place_image_token"):
        make(rows, tokenizer=tokenizer, enclosed=True)
    _, start, end = place_image_token(tokenizer, 51200, ("<image>", "<im_start>", "<im_end>"))
    ids = make(rows, tokenizer=tokenizer, version="phi", enclosed=True)[0]["input_ids"].tolist()
    where = ids.index(IMAGE_TOKEN_INDEX)
    assert ids[where - 1] == start and ids[where + 1] == end


def test_plain_takes_one_caption_of_an_image(make, make_record):
    data = make([make_record("ok", "<image>\nwhat?", "a cat", image="a.png")], version="plain")
    assert data[0]["labels"].tolist()[:1] == [IGNORE_INDEX] and data[0]["labels"][1] != IGNORE_INDEX
    rows = [make_record("text", "q", "a"), make_record("long", "<image>", "a", "q", "b", image="a.png")]
    with pytest.raises(DataError) as error:
        make(rows, version="plain")
    assert "2 turns and 0 images" in error.value.problems[0] and "4 turns and 1 images" in error.value.problems[1]


def test_media_can_be_refused(make, make_record):
    with pytest.raises(DataError, match="1 images and 0 videos .* --is_multimodal False"):
        make([make_record("x", "<image>", "a", image="a.png")], takes_media=False)
    assert len(make([make_record("x", "q", "a")], takes_media=False)) == 1


def test_a_chat_template_that_rewrites_is_reported_by_record(make, make_record, tokenizers, monkeypatch):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.content | replace('cat', 'dog') + '<|im_end|>' }}{% endfor %}"
    )
    tokenizer = tokenizers["qwen"]
    monkeypatch.setattr(tokenizer, "chat_template", template)
    rows = [make_record("fine", "q", "a bird"), make_record("bad", "q", "a cat")]
    with pytest.raises(DataError, match="Record bad of .*rewrites") as error:
        make(rows, tokenizer=tokenizer, version="chat_template")
    assert len(error.value.problems) == 1


def test_workers_see_the_same_samples(make, make_record, reader):
    rows = [make_record(number, "<image>\nq", "a " * number, image="a.png") for number in range(1, 7)]
    data = make(rows)
    collator = MediaCollator(reader, pad_token_id=0)
    alone = list(DataLoader(data, batch_size=2, collate_fn=collator))
    shared = list(DataLoader(data, batch_size=2, collate_fn=collator, num_workers=2))
    for one, other in zip(alone, shared, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_workers_find_what_one_process_finds(make, make_record):
    rows = [make_record(number, "q", "word " * (1 + number % 40)) for number in range(150)]
    rows[70] = make_record(70, "<image>\nq", "gone", image="none-such.png")
    alone, together = (make(rows, max_length=40, overlong="drop", bad_files="skip", workers=n) for n in (0, 2))
    assert alone.report() == together.report()
    assert alone.report()["dropped"] > 0 and alone.report()["bad_files"] == 1
    assert alone.lengths == together.lengths
    errors = []
    for workers in (0, 2):
        with pytest.raises(DataError) as caught:
            make(rows, max_length=40, overlong="error", workers=workers)
        errors.append(caught.value.problems)
    assert errors[0] == errors[1]
