# SPDX-License-Identifier: Apache-2.0
"""What tests of data share: an encoder over LLaVA's processor, whose images are 4 tokens each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlavaProcessor

from moellava.data import cache, findings
from moellava.data.dataset import SupervisedDataset
from moellava.data.encoder import Encoder, image_ids_of
from moellava.data.media import MediaFiles
from moellava.data.media_reader import MediaReader
from moellava.data.records import load_records
from moellava.data.render import renderer_for
from moellava.data.tokenizers import load_tokenizer, place_image_token

ROWS = 151936
"""Of Qwen's embedding, the free ones included."""

FILES = ("image_folder", "video_folder", "num_frames")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    """A cache of a test's own, which is made when it is needed."""
    monkeypatch.setenv(cache.PLACE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def kept(empty_cache, monkeypatch) -> Path:
    """An empty cache, in which everything is kept that is found."""
    monkeypatch.setattr(findings, "KEPT_FROM", 1)
    return empty_cache


@pytest.fixture(scope="session")
def processor(golden_tokenizers, image_processor) -> LlavaProcessor:
    """LLaVA's, of CLIP's image processor for 32 × 32 pixels, 4 patches, and Qwen's tokenizer."""
    tokenizer = load_tokenizer(golden_tokenizers / "qwen")
    place_image_token(tokenizer, ROWS, ("<image>",))
    patches = {"patch_size": 16, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    return LlavaProcessor(image_processor, tokenizer, **patches)


@pytest.fixture(scope="session")
def reader(processor) -> MediaReader:
    """Of that processor."""
    return MediaReader(processor)


@pytest.fixture(scope="session")
def encoder(reader) -> Callable[..., Encoder]:
    """(version, tokenizer, reader, use_im_start_end) -> an encoder, by default over Qwen's tokenizer."""

    def make(version: str = "qwen", tokenizer: Any = None, reader: Any = reader, enclosed: bool = False) -> Encoder:
        tokenizer = tokenizer or reader.processor.tokenizer
        return Encoder(tokenizer, renderer_for(version, tokenizer), reader, image_ids_of(tokenizer, enclosed))

    return make


@pytest.fixture
def make(encoder, image_tree: Path, clips: Path, data_file) -> Callable[..., SupervisedDataset]:
    """(records, options of the encoder, of the files and of the data set) -> a data set on the good and bad files;
    videos are 3 frames."""

    def build(rows: list[dict], **options: Any) -> SupervisedDataset:
        folders = {"image_folder": image_tree, "video_folder": clips, "num_frames": 3}
        files = {name: options.pop(name, folders[name]) for name in FILES}
        asked = {name: options.pop(name) for name in ("version", "tokenizer", "enclosed") if name in options}
        return SupervisedDataset(load_records(data_file(rows)), encoder(**asked), MediaFiles(**files), **options)

    return build
