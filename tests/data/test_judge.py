# SPDX-License-Identifier: Apache-2.0
"""What was found out about records and files is found again, and only what changed is looked at."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moellava.data import findings
from moellava.data.dataset import SupervisedDataset
from moellava.data.encoder import CountedImages, Encoder
from moellava.data.findings import KEY, Findings
from moellava.data.fingerprint import fingerprint
from moellava.data.media import MediaFiles
from moellava.data.records import Medium, load_records
from moellava.data.render import TemplateRenderer
from moellava.data.scan import with_progress, workers_for
from moellava.data.shown import Shown, states_of
from moellava.errors import DataError
from tests.tiny import record


@pytest.fixture
def looked_at(monkeypatch) -> list[str]:
    """The records that are encoded and the files that are checked, by name."""
    seen: list[str] = []
    encode, problem = Encoder.examples, MediaFiles.problem

    def examples(self, row, name="", *args, **options):
        seen.extend(name.split()[1:2])  # a fingerprint's talks have no name
        return encode(self, row, name, *args, **options)

    monkeypatch.setattr(Encoder, "examples", examples)
    monkeypatch.setattr(MediaFiles, "problem", lambda self, m, *a: seen.append(m.path) or problem(self, m, *a))
    return seen


@pytest.fixture
def pictures(image_tree, tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "abc":
        shutil.copy(image_tree / "a.png", folder / f"{name}.png")
    return folder


class Sized(CountedImages):
    """As Qwen2-VL's: an image's size decides over its positions."""

    needs_sizes = True

    def run_length(self, size, count):
        return size[0] // 10


ROWS = [
    record("one", "<image>\nq", "an answer", image="a.png"),
    record("two", "<image> or <image>", "a", image=["b.png", "a.png"]),
    record("text", "q", "a"),
    record("long", "q", "word " * 40),
    record("last", "<image>", "c", image="c.png"),
]


def made(rows, data_file, pictures, tokenizer, **options):
    return made_of(data_file(rows, "data.json"), pictures, tokenizer, **options)


def made_of(file, pictures, tokenizer, version="phi", reader=None, **options):
    encoder = Encoder(tokenizer, TemplateRenderer(version), reader or CountedImages(4))
    options = {"max_length": 60, "overlong": "drop"} | options
    return SupervisedDataset(load_records(file), encoder, MediaFiles(pictures), **options)


def summary(data) -> list:
    samples = [(int(n), int(a)) for n, a in zip(data._kept, data._answers, strict=True)]
    return [samples, data.lengths, data.shows_media, data.modalities, data.report()]


def test_a_second_start_looks_at_nothing(kept, looked_at, data_file, pictures, tokenizers):
    first = made(ROWS, data_file, pictures, tokenizers["phi"])
    assert sorted(looked_at) == sorted(["a.png", "b.png", "c.png", "one", "two", "text", "long", "last"])
    assert first.report()["dropped"] == 1 and first.modalities == ("image",)
    looked_at.clear()
    tokenizers["phi"](["a", "b c"], padding=True, truncation=True, max_length=4)  # which leaves its traces in it
    again = made(ROWS, data_file, pictures, tokenizers["phi"])
    assert looked_at == [] and summary(again) == summary(first)
    assert made_of(data_file(ROWS, "moved.json"), pictures, tokenizers["phi"]).lengths == first.lengths
    assert looked_at == []


def test_only_what_changed_is_looked_at(kept, looked_at, data_file, pictures, tokenizers):
    made(ROWS, data_file, pictures, tokenizers["phi"])
    looked_at.clear()
    new = record("new", "q", "a")
    rows = [ROWS[4], new, ROWS[0], ROWS[2], ROWS[2], new]
    (pictures / "c.png").write_bytes((pictures / "a.png").read_bytes() + b"\0")
    data = made(rows, data_file, pictures, tokenizers["phi"])
    assert looked_at == ["c.png", "new", "new"] and len(data) == 6
    assert [data[n]["record"].split()[1] for n in range(6)] == ["last", "new", "one", "text", "text", "new"]
    assert summary(made(rows, data_file, pictures, tokenizers["phi"])) == summary(data)


def test_the_size_of_an_image_counts_where_it_decides(kept, looked_at, data_file, image_tree, pictures, tokenizers):
    first = made(ROWS, data_file, pictures, tokenizers["phi"], reader=Sized(0))
    looked_at.clear()
    from PIL import Image

    Image.new("RGB", (100, 40)).save(pictures / "b.png")
    second = made(ROWS, data_file, pictures, tokenizers["phi"], reader=Sized(0))
    assert looked_at == ["b.png", "two"]
    assert [new - old for old, new in zip(first.lengths, second.lengths, strict=True)] == [0, 4, 0, 0]


@pytest.mark.parametrize("change", ["version", "max_length", "overlong", "folder", "tokens", "tokenizer"])
def test_what_decides_over_lengths_makes_them_new(change, kept, looked_at, data_file, pictures, tokenizers, tmp_path):
    made(ROWS, data_file, pictures, tokenizers["phi"])
    looked_at.clear()
    options = {"version": {"version": "v1"}, "max_length": {"max_length": 61}, "overlong": {"overlong": "truncate"}}
    options |= {"tokens": {"reader": CountedImages(5)}}
    folder = pictures.rename(tmp_path / "other") if change == "folder" else pictures
    tokenizer = copy.deepcopy(tokenizers["phi"])
    if change == "tokenizer":
        tokenizer.add_tokens(["cat"])
    made(ROWS, data_file, folder, tokenizer, **options.get(change, {}))
    assert {"one", "two", "text", "long", "last"} <= set(looked_at)


def one_of_two(rank: int, meeting: str, make) -> None:
    """One of two processes that make a data set together; what it has looked at, and what it knows in the end."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}/meeting", rank=rank, world_size=2)
    data, seen = make()
    Path(f"{meeting}/{rank}.json").write_text(json.dumps([summary(data), seen]))
    dist.destroy_process_group()


def test_two_processes_look_at_half_each_and_keep_all(kept, looked_at, data_file, pictures, tokenizers, tmp_path):
    file = data_file(ROWS, "data.json")

    def make():
        return made_of(file, pictures, tokenizers["phi"]), looked_at

    rounds = []
    for number in range(2):
        meeting = tmp_path / f"round{number}"
        meeting.mkdir()
        torch.multiprocessing.start_processes(one_of_two, (str(meeting), make), nprocs=2, start_method="fork")
        rounds.append([json.loads((meeting / f"{rank}.json").read_text()) for rank in range(2)])
    (first, other), again = rounds
    assert first[0] == other[0] == again[0][0] == again[1][0]
    assert sorted(first[1] + other[1]) == sorted(["a.png", "b.png", "c.png", "one", "two", "text", "long", "last"])
    assert again[0][1] == again[1][1] == [] and len(other[1]) > 2
    alone = json.loads(json.dumps(summary(make()[0])))
    assert looked_at == [] and alone == first[0]


def test_problems_are_told_at_every_start(kept, data_file, pictures, tokenizers):
    rows = [*ROWS, record("gone", "<image>", "a", image="gone.png"), record("open", "q")]
    for _ in range(2):
        with pytest.raises(DataError) as error:
            made(rows, data_file, pictures, tokenizers["phi"])
        texts = error.value.problems
        assert ["Record gone of" in texts[0], "Record open of" in texts[1], len(texts)] == [True, True, 2]
    for _ in range(2):
        data = made(rows[:-1], data_file, pictures, tokenizers["phi"], bad_files="skip")
        assert data.report()["bad_files"] == 1 and len(data) == 4
    shutil.copy(pictures / "a.png", pictures / "gone.png")
    assert len(made(rows[:-1], data_file, pictures, tokenizers["phi"], bad_files="skip")) == 5
    (pictures / "a.png").unlink()
    with pytest.raises(DataError, match="Record one of .*no such image file"):
        made(ROWS, data_file, pictures, tokenizers["phi"])


def test_a_fingerprint_is_the_same_in_another_process(tokenizers):
    encoder = Encoder(tokenizers["phi"], TemplateRenderer("phi"), CountedImages(4))
    assert fingerprint(encoder) == fingerprint(pickle.loads(pickle.dumps(encoder)))


def test_a_fingerprint_of_a_processor_knows_its_settings(encoder, processor):
    first = fingerprint(encoder())
    assert first == fingerprint(encoder()) != fingerprint(encoder(version="v1"))
    processor.image_processor.do_resize = not processor.image_processor.do_resize
    changed = fingerprint(encoder())
    processor.image_processor.do_resize = not processor.image_processor.do_resize
    assert changed != first == fingerprint(encoder())


def test_rows_are_found_by_their_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(findings, "KEPT_FROM", 1)
    dtype = np.dtype([(KEY, "<u8"), ("value", "<i4")])
    rows = np.array([(9, 1), (2, 2), (9, 3), (2**64 - 1, 4)], dtype)
    one, other = (Findings("about", dtype, tmp_path) for _ in range(2))
    one.add(rows)
    other.add(np.array([(2, 7), (5, 5)], dtype))  # what is known stays
    counts, found = Findings("about", dtype, tmp_path).known(np.array([9, 1, 5, 2, 9], np.uint64))
    assert counts.tolist() == [2, 0, 1, 1, 2] and found["value"].tolist() == [1, 3, 5, 2, 1, 3]
    assert len(Findings("about", np.dtype([(KEY, "<u8")]), tmp_path).known(np.array([9], np.uint64))[1]) == 0
    nowhere = Findings("about", dtype, None)
    nowhere.add(rows)
    assert nowhere.known(np.array([9], np.uint64))[0].tolist() == [0]


def test_findings_that_cannot_be_written_are_no_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    warned = []
    monkeypatch.setattr("moellava.log.logging.Logger.warning", lambda _, *said: warned.append(said[0] % said[1:]))
    monkeypatch.setattr(findings, "KEPT_FROM", 1)
    monkeypatch.setattr(findings.np, "save", full)
    Findings("about", np.dtype([(KEY, "<u8")]), tmp_path).add(np.array([(9,)], [(KEY, "<u8")]))
    assert "No space left on device" in warned[0] and [path.name for path in tmp_path.rglob("*.npy*")] == []


def test_media_of_records_each_once(data_file, make_record):
    rows = [ROWS[1], ROWS[2], make_record(1, "<video><image>", "a", image="a.png", video="ü.mp4"), ROWS[0]]
    rows += [make_record(2, "<image>", "a", image="data:image/png;base64,AAAA")]
    shown = Shown(load_records(data_file(rows)))
    assert list(shown.files()) == [Medium("image", "b.png"), Medium("image", "a.png"), Medium("video", "ü.mp4")]
    assert shown.counts.tolist() == [2, 0, 2, 1, 1] and shown.which.tolist() == [0, 1, 2, 1, 1, 3]
    assert shown.modality.tolist() == [0, 0, 1, 0] and shown.in_file.tolist() == [True, True, True, False]
    assert shown.any_of(np.array([False, False, True, False])).tolist() == [False, False, True, False, False]
    mixed = shown.mixed(np.array([5, 6, 7, 8], np.uint64))
    assert mixed[1] == 0 and len(set(mixed.tolist())) == 5
    assert shown.mixed(np.array([6, 5, 7, 8], np.uint64))[0] != mixed[0]


def test_the_state_of_a_file(pictures):
    files, media = MediaFiles(pictures), [Medium("image", "a.png"), Medium("image", "gone.png"), Medium("image", "\0")]
    first = states_of(media, files)
    assert first[0] != 0 and first[1:].tolist() == [0, 0]
    assert first[0] != states_of([Medium("image", "b.png")], files)[0]
    os.utime(pictures / "a.png", ns=(0, 12345))
    assert states_of(media, files)[0] != first[0]


def test_workers_and_progress(monkeypatch, caplog):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [workers_for(n) for n in (0, 3999, 4000, 10**6)] == [0, 0, 2, 4] and workers_for(10, least=3) == 3
    monkeypatch.setattr("moellava.data.scan.SECONDS", -1.0)
    monkeypatch.setattr("moellava.log.logging.Logger.info", lambda _, *said: caplog.records.append(said[0] % said[1:]))
    assert list(with_progress("abcd", 4, "Looking")) == list("abcd")
    assert caplog.records[:2] == ["Looking: 25 % of them, about 0 s left", "Looking: 50 % of them, about 0 s left"]
