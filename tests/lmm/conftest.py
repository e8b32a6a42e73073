"""Tiny random models of the released architectures, opened, and data sets of them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moellava.data.media_reader import MediaReader
from moellava.data.records import load_records
from moellava.lmm.architecture import ARCHITECTURES, SUPPORTED_MODELS
from moellava.lmm.datasets import TO_LOAD_IMAGE, MediaDataset
from moellava.lmm.loaders import find_model, load_lmm
from tests.lmm.tiny import TINY


@pytest.fixture(scope="session")
def tiny_lmm(tmp_path_factory, golden_tokenizers) -> Callable[[str], Path]:
    """architecture -> the folder of a tiny random model of it, as the hub would hold it, without a chat template."""
    root = tmp_path_factory.mktemp("lmm")

    def make(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            TINY[name].save(golden_tokenizers, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def opened(tiny_lmm) -> Callable[[str], Any]:
    """architecture -> its tiny model, opened by our loader; shared, so tests leave it as it is."""

    @functools.cache
    def open_once(name: str) -> Any:
        folder, raw, architecture = find_model(None, str(tiny_lmm(name)))
        return load_lmm(folder, raw, architecture, dtype=torch.float32, trust_remote_code=architecture.remote_code)

    return open_once


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
def samples_of(opened, pictures, tmp_path) -> Callable[..., MediaDataset]:
    """(architecture, records, options) -> the data set of that architecture's tiny model."""

    def make(name: str, records: list[dict[str, Any]] = RECORDS, **options: Any) -> MediaDataset:
        released = options.pop("released", None) or opened(name)
        (tmp_path / "records.json").write_text(json.dumps(records))
        dataset = MediaDataset(
            load_records(tmp_path / "records.json"),
            MediaReader(released.processor),
            options.pop("template", released.processor.chat_template),
            to_load_image=options.pop("to_load_image", TO_LOAD_IMAGE[name]),
            image_folder=options.pop("image_folder", pictures[0].parent),
            **options,
        )
        dataset.family_id = name
        return dataset

    return make


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--model-id ID`: the conformance test of that model's architecture alone."""
    parser.addoption("--write-goldens", action="store_true", help="write tests/golden/released.jsonl anew")
    parser.addoption("--model-id", default=None, help="check the architecture of this released model only")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs the conformance test for every architecture, or for the one asked for."""
    if "conforming" in metafunc.fixturenames:
        asked = metafunc.config.getoption("--model-id", default=None)
        names = [SUPPORTED_MODELS[asked].family_id] if asked else list(ARCHITECTURES)
        marks = [[pytest.mark.slow] if TINY[name].slow else [] for name in names]
        metafunc.parametrize("conforming", [pytest.param(name, marks=mark) for name, mark in zip(names, marks)])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--model-id`, nothing but the conformance test."""
    if config.getoption("--model-id", default=None):
        items[:] = [item for item in items if "conforming" in getattr(item, "fixturenames", ())]
