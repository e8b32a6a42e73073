# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the released architectures, opened, and data sets of them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moellava.data.dataset import SupervisedDataset
from moellava.data.encoder import Encoder
from moellava.data.media import MediaFiles
from moellava.data.media_reader import MediaReader
from moellava.data.records import load_records
from moellava.data.render import ChatRenderer
from moellava.lmm.architecture import ARCHITECTURES, SUPPORTED_MODELS
from moellava.vlm import VLM
from tests.lmm.tiny import TINY, reopen
from tests.processes import train_here


@pytest.fixture(scope="session")
def tiny_lmm(tmp_path_factory, golden_tokenizers) -> Callable[[str], Path]:
    """architecture -> the folder of a tiny random model of it, as the hub would hold it, without a chat template."""
    return folders(tmp_path_factory.mktemp("lmm"), golden_tokenizers)


@pytest.fixture(scope="session")
def small_lmm(tmp_path_factory, small_tokenizers) -> Callable[[str], Path]:
    """The same with a small vocabulary, where no id is asked for: such a folder opens in a tenth of the time."""
    return folders(tmp_path_factory.mktemp("small_lmm"), small_tokenizers)


def folders(root: Path, tokenizers: Path) -> Callable[[str], Path]:
    """architecture -> the folder of a tiny model below `root`, written when it is first asked for."""

    def make(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            TINY[name].save(tokenizers, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def opened(tiny_lmm) -> Callable[[str], VLM]:
    """architecture -> its tiny model; shared, so tests leave it as it is."""
    return opener(tiny_lmm)


@pytest.fixture(scope="session")
def small_opened(small_lmm) -> Callable[[str], VLM]:
    """The same with a small vocabulary. See `small_lmm`."""
    return opener(small_lmm)


def opener(folder_of: Callable[[str], Path]) -> Callable[[str], VLM]:
    """architecture -> its tiny model, opened once."""
    return functools.cache(lambda name: reopen(folder_of(name), ARCHITECTURES[name].remote_code))


@pytest.fixture
def architectures(monkeypatch) -> Any:
    """The registry as a copy: what a test registers or changes is gone after it."""
    for registry in (ARCHITECTURES, SUPPORTED_MODELS):
        monkeypatch.setattr(registry, "_entries", dict(registry))
    return ARCHITECTURES


RECORDS = [
    {
        "id": "two turns",
        "image": "0.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A fractal."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes, no </s> and no <image>."},
        ],
    },
    {
        "id": "interleaved",
        "image": ["1.png", "2.png"],
        "system_prompt": "Be brief.",
        "conversations": [
            {"from": "human", "value": "First <image> then <image> which is larger?"},
            {"from": "gpt", "value": "The second."},
        ],
    },
    {"id": "text", "conversations": [{"from": "human", "value": "Hi <|im_end|>"}, {"from": "gpt", "value": "Hello."}]},
]


@pytest.fixture
def samples_of(opened, pictures, tmp_path) -> Callable[..., SupervisedDataset]:
    """(architecture, records, vlm=, template=, loads_images=, options) -> the data set of that architecture's tiny
    model, or of another `vlm`; options are those of `MediaFiles` and `SupervisedDataset`."""

    def make(
        name: str,
        records: list[dict[str, Any]] = RECORDS,
        *,
        vlm: VLM | None = None,
        template: str | None = None,
        loads_images: bool = True,
        image_folder: Path | None = None,
        video_folder: Path | None = None,
        num_frames: int = 8,
        **options: Any,
    ) -> SupervisedDataset:
        vlm = vlm or opened(name)
        encoder = vlm.encoder
        if template is not None:
            encoder = Encoder(vlm.tokenizer, ChatRenderer(vlm.processor, template, in_parts=True), vlm.reader)
        if not loads_images:
            encoder = Encoder(vlm.tokenizer, encoder.renderer, MediaReader(vlm.processor, loads_images=False))
        (tmp_path / "records.json").write_text(json.dumps(records))
        folder = pictures[0].parent if image_folder is None else image_folder
        files = MediaFiles(folder, video_folder, num_frames)
        return SupervisedDataset(load_records(tmp_path / "records.json"), encoder, files, **options)

    return make


@pytest.fixture
def run(small_lmm, released_flags) -> Callable[..., Path]:
    """(architecture or folder, name of the run, flags) -> the folder that a short run leaves, in this process."""

    def start(model: str | Path, name: str = "run", **flags: object) -> Path:
        folder = model if isinstance(model, Path) else small_lmm(model)
        return train_here(released_flags(folder, name, **flags))

    return start


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--model-id ID`: the conformance test of that model's architecture alone."""
    parser.addoption("--write-goldens", action="store_true", help="write tests/golden/released.jsonl anew")
    parser.addoption("--model-id", default=None, help="check the architecture of this released model only")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs the conformance test for every architecture, or for the one asked for."""
    if "conforming" in metafunc.fixturenames:
        asked = metafunc.config.getoption("--model-id", default=None)
        names = [SUPPORTED_MODELS[asked].family_id] if asked else list(ARCHITECTURES)
        if missing := [name for name in names if name not in TINY]:
            raise pytest.UsageError(
                f"{', '.join(missing)}: add a row to tests/lmm/tiny.py, which says how it is tested"
            )
        marks = [[pytest.mark.slow] if TINY[name].slow else [] for name in names]
        metafunc.parametrize("conforming", [pytest.param(name, marks=mark) for name, mark in zip(names, marks)])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--model-id`, nothing but the conformance test."""
    if config.getoption("--model-id", default=None):
        items[:] = [item for item in items if "conforming" in getattr(item, "fixturenames", ())]
