# SPDX-License-Identifier: Apache-2.0
"""What has been fetched, kept up to a limit."""

from __future__ import annotations

import os

import pytest

from moellava.data.fetched import FETCHED, FOLDERS, LIMIT, LOOKED_AFTER, is_kept, keep_content, kept_content
from moellava.errors import UserError


def test_what_is_kept_is_found_again(empty_cache, monkeypatch):
    keep_content(7, b"seven")
    assert kept_content(7) == b"seven" and is_kept(7) and kept_content(8) is None and not is_kept(8)
    keep_content(0, b"nothing is known of it")
    assert kept_content(0) is None
    monkeypatch.setenv(LIMIT, "0")
    assert kept_content(7) is None and not is_kept(7)
    monkeypatch.setenv(LIMIT, "much")
    with pytest.raises(UserError, match=f"{LIMIT}=much: a number of GB"):
        kept_content(7)


def test_half_of_a_file_is_none(empty_cache):
    keep_content(7, b"seven")
    (file,) = (empty_cache / FETCHED).glob("*/*")
    file.write_bytes(file.read_bytes()[:-1])
    assert kept_content(7) is None
    keep_content(7, b"seven")
    assert kept_content(7) == b"seven"


def test_the_oldest_goes_first(empty_cache, monkeypatch):
    monkeypatch.setenv(LIMIT, str(FOLDERS * 1000 / 1e9))  # 1,000 bytes a folder
    keys = [1 + FOLDERS * number for number in range(1, LOOKED_AFTER + 1)]  # all of one folder; the last one counts
    for age, key in enumerate(keys[:-1]):
        keep_content(key, bytes(300))
        (path,) = (empty_cache / FETCHED).glob(f"*/{key:016x}")
        os.utime(path, (1000 + age, 1000 + age))
    keep_content(keys[-1], bytes(300))
    assert [is_kept(key) for key in keys] == [False] * (len(keys) - 3) + [True] * 3


def test_a_cache_that_cannot_be_written_keeps_nothing(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOELLAVA_CACHE", str(tmp_path / "file" / "cache"))
    keep_content(7, b"seven")
    assert kept_content(7) is None
