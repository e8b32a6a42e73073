# SPDX-License-Identifier: Apache-2.0
"""The check of a data set: what it finds with a tokenizer, and that it finds what training would stop at."""

from __future__ import annotations

import pytest

from moellava.data.check import check
from moellava.data.encoder import CountedImages, Encoder
from moellava.data.media import MediaFiles
from moellava.data.records import load_records
from moellava.data.render import TemplateRenderer
from moellava.data.skip_lists import read_skip_list, write_skip_list
from tests.records import place_of


@pytest.fixture
def path(data_file, make_record) -> str:
    rows = [
        make_record("good", "<image>\nq", "a", image="a.png"),
        make_record("tags", "<image><image>\nq", "a", image="a.png"),
        make_record("text", "q", "a"),
        make_record("cut", "<image>\nq", "a", image="cut.jpg"),
        make_record("long", "q", "word " * 90),
        make_record("open", "q"),
    ]
    return str(data_file(rows))


def test_with_a_tokenizer_lengths_and_masks_are_checked(path, image_tree, tokenizers):
    encoder = Encoder(tokenizers["phi"], TemplateRenderer("phi"), CountedImages(20))
    findings = check([path], MediaFiles(image_tree), encoder, max_length=80)
    texts = [problem.text for problem in findings.problems]
    assert any("Record long" in text and "positions, more than 80" in text for text in texts)
    assert any("Record open" in text and "no answer to train on" in text for text in texts)
    assert findings.lengths == [60, 38, 60, 128, 33]


def test_without_one_records_and_files_are(path, image_tree):
    findings = check([path], MediaFiles(image_tree))
    assert {place_of(problem.key) for problem in findings.problems} == {("data.json", place) for place in (1, 3, 5)}
    assert findings.counts["records"] == 6 and findings.lengths == []


def test_a_record_without_an_answer_to_train_on_is_told_with_a_tokenizer_or_without(data_file, make_record, tokenizers):
    untrained = make_record("untrained", "q", "a")
    untrained["conversations"][1]["train"] = False
    path = str(data_file([make_record("good", "q", "a"), make_record("open", "q"), untrained]))
    for encoder in (None, Encoder(tokenizers["phi"], TemplateRenderer("phi"), CountedImages(20))):
        texts = [problem.text for problem in check([path], MediaFiles(), encoder).problems]
        assert texts == [f'Record {name} of {path} has no answer to train on: "q"' for name in ("open", "untrained")]


def test_the_skip_list_leaves_out_what_was_found(path, image_tree, tmp_path):
    findings = check([path], MediaFiles(image_tree))
    assert write_skip_list(tmp_path / "skip.txt", findings.problems) == 3
    assert [record["id"] for record in load_records(path, read_skip_list(tmp_path / "skip.txt"))] == [
        "good",
        "text",
        "long",
    ]
