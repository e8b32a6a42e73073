# SPDX-License-Identifier: Apache-2.0
"""Files and folders: what is read, what is written whole or not at all, and where a name leads. Nobody else does this.

A write goes beside its target, on the same disk, is flushed, and moves to its place in one step. So a full disk or a
kill leaves the old content or the new one, never half of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moellava.errors import UserError

PAGE = "README.md"
"""What tells people, and the hub, what a folder is."""

MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.tiktoken", "*.txt", "*.jinja", PAGE)
"""What is fetched from the hub of a model: weights, configs, tokenizers, and the page, which says the licence; code
only where that was allowed."""

CODE_FILES = ("*.py",)

NOT_OF_THE_MODEL = {
    *("digests.json", "run.json", "trainer_state.json", "parameters.json", "moe_certificate.json", "training_args.bin"),
    PAGE,
}
"""Files in a model's folder that say how it was made, not what it is."""

CONFIG = "config.json"
"""The file that makes a folder a model's; it is moved last."""

STAGING = ".saving-model"
"""The folder inside a model's folder that its files are written to before they move up; a kill leaves it behind."""

LEVELS_ABOVE = 3
"""How far up from a folder a relative name in its config is looked for."""


def model_files(with_code: bool) -> tuple[str, ...]:
    """What is fetched from the hub of a model, with the Python code beside it or without."""
    return MODEL_FILES + (CODE_FILES if with_code else ())


def resolve_folder(
    name: str | Path, flag: str, near: Path | None = None, patterns: Sequence[str] = MODEL_FILES
) -> Path:
    """A local folder as it is; any other name is fetched from the hub.

    Args:
        name: a folder or a hub id.
        flag: what the user called it by, for the message.
        near: a folder in whose surroundings a relative `name` is looked for as well.
        patterns: files that are fetched.

    Raises:
        UserError: neither a folder nor something that the hub gives.
    """
    for parent in [Path(), *([] if near is None else [near.resolve(), *near.resolve().parents[:LEVELS_ABOVE]])]:
        if (parent / name).is_dir():
            return parent / name
    if Path(name).is_file():
        raise UserError(f"{flag} {name} is a file: a folder, or an id of the hub, is expected.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{flag} {name}: there is no such folder, and the hub did not give it ({reason})") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds; {} if there is no such file. Raises UserError if it is not JSON."""
    problem = file_problem(path)
    if problem == NO_FILE:
        return {}
    if problem:
        raise UserError(f"{path}: {problem}")
    refuse_pointer(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path} is not valid JSON: it is nested too deeply.") from error


def read_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds that has to be an object; {} if there is no such file. Raises UserError otherwise."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {_JSON_NAMES[type(content)]} where a JSON object, {{…}}, is expected.")
    return content


_JSON_NAMES = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "a truth value"}
_JSON_NAMES[type(None)] = "null"

LFS_HEAD = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    """Raises UserError for what Git leaves in the place of a large file until Git-LFS has fetched it."""
    with open(path, "rb") as file:
        if file.read(len(LFS_HEAD)) == LFS_HEAD:
            raise UserError(
                f"{path} is a Git-LFS pointer, not the file itself: run `git lfs pull` in {path.parent}, or fetch the "
                "folder with `huggingface-cli download`."
            )


def read_config(folder: Path, flag: str) -> dict[str, Any]:
    """The `config.json` of a model folder. Raises UserError if it is missing or no JSON object."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(f"{flag} {folder} holds no config.json, so it is not a model folder.{_way_out(Path(folder))}")
    return read_object(path)


def _way_out(folder: Path) -> str:
    """What a folder is that holds no model, and what to do with it, as a sentence; '' where that is not known."""
    if (folder / "adapter_config.json").is_file():
        merge = f"moellava merge-lora --model-path BASE --adapter {folder} --output-dir MERGED"
        return f" It is an adapter: `{merge}` makes a model of it and its base."
    checkpoints = [path.parent for path in folder.glob(f"checkpoint-*/{CONFIG}")]
    if not checkpoints:
        return ""
    latest = max(checkpoints, key=lambda path: (len(path.name), path.name))  # their numbers have no leading zeros
    return f" Its run has not ended: go on with it, or name its last checkpoint, {latest}."


PROTOCOLS = "[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*"
"""How an address begins: `s3`, `simplecache::https`."""

_ADDRESS = re.compile(f"(?![a-z]:){PROTOCOLS}:/", re.IGNORECASE)
"""An address, also where `pathlib` has taken one of its slashes; no letter of a drive."""


def is_address(name: str | Path) -> bool:
    """Whether a name is an address."""
    return bool(_ADDRESS.match(str(name)))


def address_problem(name: str | Path, flag: str) -> str | None:
    """What is said where an address is given for a place on this machine: a folder of that name would be made."""
    if not is_address(name):
        return None
    return (
        f"{flag} {name}: a place on this machine is needed here, and that is an address. Data and pictures alone are "
        "read from elsewhere (docs/DATA.md); what is written can be copied there."
    )


def refuse_address(name: str | Path, flag: str) -> None:
    """Raises UserError where an address is given for a place on this machine."""
    if problem := address_problem(name, flag):
        raise UserError(problem)


NO_FILE = "no such file"
IS_FOLDER = "is a folder, not a file"


def file_problem(path: str | Path) -> str | None:
    """Why a path cannot be read as a file, or None. A pipe is refused: who opens it may wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return NO_FILE
    except OSError as error:
        return str(error.strerror)
    except ValueError as error:  # a null character
        return str(error)
    if stat.S_ISDIR(mode):
        return IS_FOLDER
    if not stat.S_ISREG(mode):
        return "is a pipe or a device, not a file"
    return None if os.access(path, os.R_OK) else "permission denied"


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    digest, block = hashlib.sha256(), memoryview(bytearray(2**18))  # which stays in a core's cache
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def require_output(path: str | Path, flag: str) -> Path:
    """A path that a file can be written to, which is found out before the work. Raises UserError, naming the flag."""
    problem = file_problem(path) if str(path) else "no file is named"
    if problem in (None, NO_FILE):
        problem = problem_of_writing(Path(path).parent)
    if problem:
        raise UserError(f"{flag} {path} cannot be written: {problem}")
    return Path(path)


def require_new_folder(name: str | Path, flag: str) -> Path:
    """A folder that is not there yet, or empty, and can be written, which is found out before the work. What a kill has
    left of an earlier try counts for nothing: `staged` begins anew.

    Raises:
        UserError: it holds something, or cannot be written; the message names the flag.
    """
    folder, problem = Path(name), file_problem(name) if str(name) else "no folder is named"
    if problem == IS_FOLDER and (held := sorted(set(os.listdir(folder)) - {STAGING})):
        what = "a model" if CONFIG in held else f"files ({', '.join(held[:3])}{', …' * (len(held) > 3)})"
        raise UserError(f"{flag} {folder} already holds {what}. Choose another folder, or remove it.")
    if problem is None:
        problem = "is a file, not a folder"
    elif problem in (IS_FOLDER, NO_FILE):
        problem = problem_of_writing(next(place for place in (folder, *folder.absolute().parents) if place.exists()))
    if problem:
        raise UserError(f"{flag} {folder} cannot be written: {problem}")
    return folder


def problem_of_writing(folder: Path) -> str | None:
    """Why no file can be made in a folder, found out by making one; None if it can."""
    problem = file_problem(folder)
    if problem != IS_FOLDER:
        return f"there is no folder {folder}" if problem == NO_FILE else f"{folder} is not a folder"
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            return None
    except OSError as error:
        return str(error.strerror)


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A path to write to instead of `path`, which it replaces when the block ends without an error."""
    temporary = path.with_name(path.name + ".new")
    try:
        yield temporary
        flush(temporary)
        temporary.chmod(0o644)  # safetensors writes through a private temporary file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it."""
    with written(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def staged(folder: Path, name: str, known: Mapping[str, str] = {}) -> Iterator[Path]:
    """An empty folder `name` inside `folder` to write to; its files move up, `config.json` last, when the block ends
    without an error, and with them their digests. Files of the same names are replaced, others stay. Nothing of it is
    left after an error.

    Args:
        known: digests of files that whoever writes them has by then, so that they are not read again.
    """
    staging, is_new = folder / name, not folder.exists()
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        (staging / DIGESTS).write_text(digests_of(staging, known=known), encoding="utf-8")
        flush_tree(staging)
        for file in sorted(staging.iterdir(), key=lambda file: (file.name == CONFIG, file.name)):
            os.replace(file, folder / file.name)
        flush(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Waits until every file below a folder, and the names of them, are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


DIGESTS = "digests.json"
"""SHA-256 of every file of a folder that we wrote, so that damage is seen."""

NOT_DIGESTED = {DIGESTS, PAGE}
"""Beside these nothing may be changed without a word."""


def digests_of(folder: Path, names: Collection[str] | None = None, known: Mapping[str, str] = {}) -> str:
    """The content of `DIGESTS` for all files of a folder, or for those of these names; `known` is taken as it is."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name not in NOT_DIGESTED]
    chosen = [file for file in files if names is None or file.name in names]
    digests = {file.name: known.get(file.name) or file_digest(file) for file in chosen}
    return json.dumps({"sha256": digests}, indent=2) + "\n"


def write_digests(folder: Path, names: Collection[str]) -> None:
    """Notes the digests of files of these names, in a folder that is written already."""
    with written(folder / DIGESTS) as temporary:
        temporary.write_text(digests_of(folder, names), encoding="utf-8")


def read_digests(folder: Path) -> dict[str, str] | None:
    """The digests that a folder carries; None where it has none. Raises UserError where they are damaged."""
    if not (folder / DIGESTS).is_file():
        return None
    recorded = read_object(folder / DIGESTS).get("sha256")
    if not isinstance(recorded, dict) or not all(isinstance(value, str) for value in recorded.values()):
        raise UserError(f"{folder / DIGESTS} is damaged: it holds no digests under 'sha256'.")
    return recorded


def digest_problems(folder: Path, recorded: Mapping[str, str]) -> dict[str, str]:
    """name -> 'differs' or 'is missing', of the files that are not what they were when they were written."""
    problems = {}
    for name, digest in recorded.items():
        if not (folder / name).is_file():
            problems[name] = "is missing"
        elif file_digest(folder / name) != digest:
            problems[name] = "differs"
    return problems
