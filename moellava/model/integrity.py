# SPDX-License-Identifier: Apache-2.0
"""Whether a folder's files are what they should be: looked at before anything is built from them.

What a folder holds comes from disks, from networks and from strangers. Three things make every fault of it a named one:
the files are looked at one by one (`check_files`); those that we wrote are compared with their digests where a damaged
one would be trained on or written out again (`check_digests`); and whatever a library makes of content that has a sound
form and no sense is an error of the folder (`opening`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from safetensors import SafetensorError, safe_open

from moellava.errors import UserError
from moellava.files import DIGESTS, digest_problems, file_problem, read_digests, read_object, refuse_pointer
from moellava.log import get_logger
from moellava.model.weights import shards_of

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
"""What is read of a folder besides weights; each holds a JSON object."""

TEXT_FILES = ("merges.txt", "*.jinja")
OTHER_FILES = ("*.tiktoken", "tokenizer.model", "pytorch_model*.bin", "mm_projector.bin")
SAFETENSORS = "model*.safetensors"
INDICES = ("*.safetensors.index.json", "pytorch_model.bin.index.json")

READ = (*JSON_FILES, *TEXT_FILES, *OTHER_FILES, SAFETENSORS, *INDICES)
"""Patterns of all files that opening a folder may read."""

logger = get_logger(__name__)


def check_files(folder: Path) -> None:
    """Raises UserError that names every file of a folder that cannot be what its name says.

    Weights are judged by their headers and sizes alone: which bytes they should hold, `check_digests` knows.
    """
    checks = {
        **dict.fromkeys(JSON_FILES, read_object),
        **dict.fromkeys(INDICES, shards_of),
        **dict.fromkeys(TEXT_FILES, _read_text),
        **dict.fromkeys(OTHER_FILES, refuse_pointer),
        SAFETENSORS: _read_header,
    }
    problems = []
    for pattern, check in checks.items():
        for path in sorted(folder.glob(pattern)):
            try:
                _require_file(path)
                check(path)
            except UserError as error:
                problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def _require_file(path: Path) -> None:
    problem = file_problem(path)
    if problem:
        raise UserError(f"{path}: {problem}")


def _read_text(path: Path) -> None:
    refuse_pointer(path)
    try:
        path.read_text(encoding="utf-8")
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is no text in UTF-8 ({error}).") from error


def _read_header(path: Path) -> None:
    refuse_pointer(path)
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut off: {error}. Fetch it anew.") from error


def check_digests(folder: Path) -> None:
    """Raises UserError if a folder of ours is not what was written: before a run starts from it, or before it is
    written out again, with new digests.

    One process of a machine looks; the others would read the same disk. A foreign folder carries no digests, and what
    it should hold cannot be known.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) > 0 or (recorded := read_digests(folder)) is None:
        return
    problems = digest_problems(folder, recorded)
    if problems:
        listed = "; ".join(f"{name} {problem}" for name, problem in problems.items())
        raise UserError(
            f"{folder} is not what was written ({DIGESTS}): {listed}. A file that is damaged has to be fetched or made "
            f"anew; if you have changed it on purpose, say so: `moellava verify --files --update {folder}`."
        )
    new = new_files(folder, recorded)
    if new:
        logger.warning("%s has files beside those that were written, which are read: %s", folder, ", ".join(new))


def new_files(folder: Path, recorded: dict[str, str]) -> list[str]:
    """Files that opening a folder reads and that its digests do not know."""
    found = {path.name for pattern in READ for path in folder.glob(pattern)}
    return sorted(found - recorded.keys())


@contextmanager
def opening(called: str) -> Iterator[None]:
    """Inside, whatever a library raises about a folder's content is a UserError that names the folder.

    Args:
        called: how messages name it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  # tokenizers raises Exception itself; transformers, whatever comes
        raise UserError(f"{called} cannot be opened: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What to say of an error: one line of it, and the way out."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return (
            "its files name Python code of their own (auto_map), which runs only with --trust_remote_code True, for "
            "architectures that need it, and without that code transformers has no class for it."
        )
    said = text[:SHOWN] + (" …" if len(text) > SHOWN else "")
    return (
        f"{type(error).__name__}: {said}. A file of it is damaged, or written for another version of transformers than "
        f"{transformers.__version__}: fetch it anew from where it comes from. `moellava verify --files` finds which, "
        "in a folder of ours."
    )


SHOWN = 300
"""Characters of a library's message that are passed on."""
