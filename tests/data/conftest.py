"""Golden rows, tokenizers and data files that the tests of this room share."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from moellava.data.tokenizers import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS = ("mistral", "qwen", "phi", "stablelm")


@pytest.fixture(scope="session")
def golden_rows() -> list[dict]:
    """What the reference implementation computed (labels.jsonl.xz), and the rows of ours for what it has none of."""
    given = lzma.decompress((GOLDEN / "labels.jsonl.xz").read_bytes()).decode().splitlines()
    ours = (GOLDEN / "more_labels.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in [*given, *ours]]


@pytest.fixture(scope="session")
def tokenizers(golden_tokenizers) -> dict[str, PreTrainedTokenizerFast]:
    """The golden tokenizers by name; not to be changed by a test."""
    return {name: load_tokenizer(golden_tokenizers / name) for name in KINDS}


@pytest.fixture
def data_file(tmp_path) -> Callable[..., Path]:
    """Writes records as JSON (or a text as it is) to a file of a name, and returns its path."""

    def write(content: object, name: str = "data.json") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def image_processor():
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory) -> Path:
    """A folder with good images a.png and sub/b.jpg, and bad ones: cut.png, cut.jpg, text.png, empty.png."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    (folder / "sub").mkdir()
    picture = Image.effect_mandelbrot((64, 40), (-3, -2.5, 2, 2.5), 40).convert("RGB")
    picture.save(folder / "a.png")
    picture.save(folder / "sub" / "b.jpg")
    for name in ("a.png", "sub/b.jpg"):
        content = (folder / name).read_bytes()
        (folder / f"cut{Path(name).suffix}").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    return folder


def record(identity: object, *said: str, **shown: object) -> dict:
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(said)]
    return {"id": identity, "conversations": turns, **shown}


@pytest.fixture
def make_record() -> Callable[..., dict]:
    """(id, question, answer, …, image=, video=) -> a record."""
    return record
