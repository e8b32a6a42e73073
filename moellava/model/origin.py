# SPDX-License-Identifier: Apache-2.0
"""What a model was made of, for its page: models with their licences, and data sets. It is names, never paths.

A folder that the hub gave has its id in its path, and its licence in the page beside it. A folder of ours carries on
what it was made of itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import metadata_load
from yaml import YAMLError

from moellava.files import CONFIG, PAGE, read_json
from moellava.model.manifest import Manifest
from moellava.model.section import Section, note, section_of

CACHED = re.compile(r"/(models|datasets)--([^/]+)/snapshots/")
"""A file or folder in the hub's cache: `models--ORGANISATION--NAME/snapshots/REVISION`."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

LICENCE = ("license", "license_name", "license_link")
"""Fields of a page's front matter that say on which terms a model may be used."""

MODELS, DATASETS, FILES = "models", "datasets", "files"


def hub_id(path: str | Path, of: str = MODELS) -> str | None:
    """The hub's id of what lies in its cache, 'models' or 'datasets'; None for what lies elsewhere.

    >>> hub_id("/cache/models--lmsys--vicuna-7b-v1.5/snapshots/3321f76e3f52")
    'lmsys/vicuna-7b-v1.5'
    """
    found = CACHED.search(f"{Path(path).absolute().as_posix()}/")
    return found[2].replace("--", "/") if found and found[1] == of else None


def licence_in(folder: Path) -> dict[str, str]:
    """What the page of a folder says of the licence; {} where there is no page, or none that can be read."""
    try:
        fields = metadata_load(folder / PAGE) or {}
    except (OSError, ValueError, YAMLError):
        return {}
    return {name: str(fields[name]) for name in LICENCE if fields.get(name)}


def made_of(manifests: Iterable[Manifest]) -> dict[str, Any]:
    """What a model made of these folders was made of."""
    found: dict[str, Any] = {}
    for manifest in manifests:
        said = manifest.section.made_of if manifest.section is not None else None
        found = joined(found, said or {MODELS: {_name(manifest): licence_in(manifest.folder)}})
    return found


def _name(manifest: Manifest) -> str:
    """A folder's id on the hub, or its own name."""
    if known := hub_id(manifest.folder):
        return known
    is_id = HUB_ID.fullmatch(manifest.name) and not manifest.folder.as_posix().endswith(manifest.name)
    return manifest.name if is_id else manifest.folder.absolute().name


def joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both, each name once."""
    both: dict[str, Any] = {MODELS: {**first.get(MODELS, {}), **second.get(MODELS, {})}}
    for key in (DATASETS, FILES):
        if names := sorted({*first.get(key, ()), *second.get(key, ())}):
            both[key] = names
    return both


def note_origin(config: Any, manifest: Manifest) -> None:
    """Notes in the config of a folder's model what it was made of, unless it says so."""
    if (section_of(config) or Section()).made_of is None:
        parts = (manifest, manifest.base, manifest.tower)
        note(config, made_of=made_of([part for part in parts if part is not None]))


def note_data(config: Any, paths: Sequence[str]) -> None:
    """Notes in the config of a model the data that it learns from: ids on the hub, and names of other files."""
    ids = {path: hub_id(path, DATASETS) for path in paths}
    named = {
        DATASETS: [name for name in ids.values() if name],
        FILES: [Path(p).name for p, name in ids.items() if not name],
    }
    note(config, made_of=joined((section_of(config) or Section()).made_of or {}, named))


def note_projector(config: Any, path: str | Path) -> None:
    """Notes in the config of a model the data that its projector has learnt from, where that is a stage's."""
    said = section_of(read_json(Path(path) / CONFIG)) if Path(path).is_dir() else None
    own, learnt = (section_of(config) or Section()).made_of or {}, (said and said.made_of) or {}
    note(config, made_of=joined(own, {key: learnt[key] for key in (DATASETS, FILES) if key in learnt}))
