# SPDX-License-Identifier: Apache-2.0
"""The README of a folder: a model card for the hub, and how the folder is opened. All pages are written here.

A page that somebody has edited, or written, stays as it is. Ours end with a line that tells them apart.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from moellava.files import PAGE, written
from moellava.log import get_logger
from moellava.model.extended import extension_of
from moellava.model.origin import DATASETS, FILES, HUB_ID, MODELS
from moellava.model.section import Section, section_of

logger = get_logger(__name__)

TASK = "image-text-to-text"
"""The hub's name of what these models do."""

SIGNED = re.compile(r"\n<!-- moellava writes this page anew until somebody edits it: ([0-9a-f]{16}) -->\n\Z")


def signed(text: str) -> str:
    """A page with the line that says that nobody has edited it."""
    return f"{text}\n<!-- moellava writes this page anew until somebody edits it: {_digest(text)} -->\n"


def is_ours(page: str) -> bool:
    """Whether a page is as it was written here."""
    found = SIGNED.search(page)
    return found is not None and found[1] == _digest(page[: found.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_page(text: str, staging: Path, target: Path) -> None:
    """Writes a page into a folder that moves to `target`, unless a user's own lies there."""
    own = target / PAGE
    if own.is_file() and not is_ours(own.read_text(encoding="utf-8", errors="replace")):
        logger.info("%s is not as it was written here, and stays as it is.", own)
        return
    with written(staging / PAGE) as temporary:
        temporary.write_text(signed(text), encoding="utf-8")


def folder_page(config: Any) -> str:
    """The page of a folder that a stage, or a command, has left."""
    section = section_of(config) or Section()
    what = section.architecture or section.family or config.model_type
    why = extension_of(config).reasons
    name = config.architectures[0]
    lines = [
        f"# {section.stage or 'A composed'} model ({what}, template {section.version})",
        "",
        "    moellava chat --model-path . --image-file IMAGE",
        "",
        "`.` stands for this folder; on the hub, for the id of the repository.",
        "",
    ]
    if section.plugins:
        lines += [
            f"It was made with plug-ins, Python that runs with `--plugin` alone: {', '.join(section.plugins)}.",
            "",
        ]
    if why:
        lines += [f"This folder needs moellava: {'; '.join(why)}. Plain transformers refuses it, by design."]
        lines += ["`moellava export` writes it in a layout that opens without."]
    else:
        lines += ["It opens in plain transformers, without moellava."]
    lines += ["", "## In transformers", "", *opening_lines(config, needs_moellava=bool(why), name=name), ""]
    lines += ["## In moellava", "", *(f"    {line}" for line in IN_MOELLAVA), ""]
    return front_matter(config) + "\n".join([*lines, *origin_lines(section)]).rstrip() + "\n"


IN_MOELLAVA = (
    "from moellava.serve.answer import answer",
    "from moellava.serve.prompt import Request",
    "from moellava.vlm import open_vlm",
    'print(answer(open_vlm("."), [Request("What is this?", ["IMAGE"])])[0])',
)


def opening_lines(config: Any, needs_moellava: bool = False, name: str = "AutoModelForImageTextToText") -> list[str]:
    """The code that opens a folder in transformers.

    Args:
        config: of the folder.
        needs_moellava: whether our classes have to be known there.
        name: of the class that opens the model; an Auto class where code of the folder's own, or ours, runs.
    """
    auto_map = getattr(config, "auto_map", None) or {}
    code = ", trust_remote_code=True" if auto_map else ""
    autos = [auto for auto in auto_map if auto.startswith("AutoModelFor")]
    if needs_moellava or auto_map:
        name = autos[0] if autos else "AutoModelForImageTextToText"
    before = ["import moellava  # its classes join the Auto classes"] if needs_moellava else []
    lines = [
        *before,
        f"from transformers import AutoProcessor, {name}",
        f'model = {name}.from_pretrained("."{code})',
        f'processor = AutoProcessor.from_pretrained("."{code})',
    ]
    return [f"    {line}" for line in lines]


def front_matter(config: Any, extra_tags: Sequence[str] = (), library: str | None = None) -> str:
    """The hub's metadata of a model's folder.

    Args:
        config: of the folder.
        extra_tags: beside those that follow from it.
        library: what opens the folder; None: transformers, or moellava where that has to be there.
    """
    extension = extension_of(config)
    is_sparse = extension.moe is not None or "moe" in str(config.get_text_config().model_type)
    tags = [*(["mixture-of-experts"] if is_sparse else []), *extra_tags]
    library = library or ("moellava" if extension.reasons else "transformers")
    return metadata(section_of(config) or Section(), library, tags)


def metadata(section: Section, library: str, tags: Sequence[str]) -> str:
    """The hub's metadata in YAML, between lines of dashes.

    Args:
        section: says what a model was made of.
        library: what opens it.
        tags: beside those that all have.
    """
    origin = section.made_of or {}
    models: Mapping[str, Mapping[str, str]] = origin.get(MODELS, {})
    fields: dict[str, Any] = {
        "base_model": [name for name in sorted(models) if HUB_ID.fullmatch(name)] or None,
        "datasets": origin.get(DATASETS),
        "library_name": library,
        "pipeline_tag": TASK,
        "tags": ["moellava", "vision-language-model", *tags],
    }
    fields |= licence_of(models.values())
    return f"---\n{ModelCardData(**fields).to_yaml()}\n---\n\n"


def adapter_page(section: Section, base: str) -> str:
    """The page of an adapter's folder.

    Args:
        section: of the model that it has learnt on.
        base: the folder or id that its run started from.
    """
    name = base if HUB_ID.fullmatch(base) and not Path(base).exists() else Path(base).name
    lines = [
        f"# Low-rank adapter ({section.architecture or section.family or 'moellava'}, template {section.version})",
        "",
        f"In peft's format. It has learnt on `{name}` (BASE below); what its run trained in full is in it:",
        "",
        "    moellava merge-lora --model-path BASE --adapter . --output-dir MERGED",
        "",
        *origin_lines(section),
    ]
    return metadata(section, "peft", ["lora"]) + "\n".join(lines).rstrip() + "\n"


def licence_of(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The licence of a whole, in the hub's fields: the parts', or 'other' with all their names where they differ; {}
    where none of them is known."""
    known = [dict(part) for part in parts if part.get("license")]
    names = sorted({part.get("license_name") or part["license"] for part in known})
    if len(names) > 1:
        return {"license": "other", "license_name": "-and-".join(names)}
    return known[0] if known else {}


def origin_lines(section: Section) -> list[str]:
    """What the page says of what a model was made of."""
    origin = section.made_of or {}
    lines: list[str] = []
    if models := origin.get(MODELS):
        lines += ["## Made of", "", "| model | licence |", "|---|---|"]
        lines += [
            f"| {name} | {said.get('license_name') or said.get('license') or 'not known here'} |"
            for name, said in sorted(models.items())
        ]
        lines += [""]
    if names := [*origin.get(DATASETS, ()), *origin.get(FILES, ())]:
        lines += [f"Trained on: {', '.join(names)}.", ""]
    return lines
