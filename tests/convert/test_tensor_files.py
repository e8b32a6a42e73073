# SPDX-License-Identifier: Apache-2.0
"""Files that are filled tensor by tensor, and their digests."""

from __future__ import annotations

import hashlib
import threading

import pytest
import torch
from safetensors.torch import load_file

from moellava.convert import tensor_files
from moellava.convert.tensor_files import TensorFiles
from moellava.errors import UserError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(8).view(4, 2), "c": torch.ones(5, dtype=torch.bfloat16)}


def empty() -> dict[str, torch.Tensor]:
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in TENSORS.items()}


def test_files_hold_what_was_written_and_so_do_their_digests(tmp_path):
    files = TensorFiles(tmp_path, empty(), shard_bytes=80, digested=True)
    for name, tensor in TENSORS.items():
        files.write(name, tensor)
    assert not files.missing
    written = sorted(tmp_path.glob("*.safetensors"))
    assert len(written) == 2
    found = {name: tensor for path in written for name, tensor in load_file(path).items()}
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert files.digests == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in written}


def test_another_order_has_no_digest(tmp_path):
    files = TensorFiles(tmp_path, empty(), digested=True)
    for name in ("b", "a", "c"):
        files.write(name, TENSORS[name])
    assert not files.missing and files.digests == {}
    assert torch.equal(load_file(tmp_path / "model.safetensors")["b"], TENSORS["b"])


def test_a_tensor_without_a_place_is_refused(tmp_path):
    files = TensorFiles(tmp_path, empty())
    with pytest.raises(UserError, match=r"a is \[3, 2\] in the weights, but its config.json says \[2, 3\]"):
        files.write("a", TENSORS["a"].t())
    with pytest.raises(UserError, match="says no such tensor"):
        files.write("d", TENSORS["a"])


def test_digests_are_made_beside_the_writing_thread(tmp_path, monkeypatch):
    sha256 = hashlib.sha256

    class Watched:
        """SHA-256 that notes who feeds it."""

        threads: set[int] = set()

        def __init__(self, start: bytes):
            self.digest = sha256(start)

        def update(self, content: memoryview) -> None:
            self.threads.add(threading.get_ident())
            self.digest.update(content)

    monkeypatch.setattr(tensor_files.hashlib, "sha256", Watched)
    for digested in (False, True):
        assert not Watched.threads, "nobody has asked for them"
        files = TensorFiles(tmp_path, empty(), digested=digested)
        for name, tensor in TENSORS.items():
            files.write(name, tensor)
    assert len(Watched.threads) == 1 and threading.get_ident() not in Watched.threads
