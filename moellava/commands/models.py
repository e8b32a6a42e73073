# SPDX-License-Identifier: Apache-2.0
"""`moellava models`: the released models that are known by an id, and the language model families."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moellava.commands.given import Idle, refuse_idle
from moellava.commands.values import CommandParser
from moellava.errors import UnknownNameError
from moellava.log import printable
from moellava.plugins import PLUGINS
from moellava.startup import importing

KNOWN = Path(__file__).with_suffix(".json")
"""What `--json` prints, as it was when this version was made: the registries themselves load torch. Written by

    moellava models --json > moellava/commands/models.json

and compared with them by a test."""

HEADER = ("model id", "architecture", "on the hub", "parts: vision encoder, projector")

PAGE_TOP = """# Supported models

Any class of transformers for images and text trains that passes the doctor, with an entry of ours or without:

    moellava inspect --model-path DIR                              # what can be done with it, and why not
    python train.py --model_local_path DIR …                       # a folder, or an id of the hub

Its parts are found by probes, its template is its processor's own. The table at the end of this page has every class.
The models below have an id, since their architecture has an entry: a chat template on record, a way for videos where
torchvision is missing, or what probes cannot see. docs/ADD_A_MODEL.md says how one joins.

    python train.py --model_id qwen2-vl-2b-instruct …              # from the hub
    python train.py --model_local_path FOLDER …                    # any folder of one below, with an id or not

The code of some architectures lies in their own repository, and runs only with `--trust_remote_code True`;
docs/ADD_A_MODEL.md says what was checked of them here.

This page is written by the first of these commands, where torchvision is installed, its first tables alone by the
second, and the third prints those. Tests compare them.

    python -m tests.lmm.any_released_model --all
    python -m tests.lmm.any_released_model --page
    moellava models --markdown
"""

BASES_TOP = """
## Language models that `--model_name_or_path` composes with a vision tower

"""


def registered() -> dict[str, list[dict[str, Any]]]:
    """What the registries hold: `models`, `architectures` and `families`, each a list of entries."""
    with importing():
        from moellava.lmm.architecture import ARCHITECTURES, SUPPORTED_MODELS
        from moellava.model.families import FAMILIES

    def parts_of(name: str) -> str:
        keywords = ARCHITECTURES[name].keywords
        return ", ".join(keywords.vision_encoder + keywords.vision_projector) if keywords else "found by probes"

    return {
        "models": [
            {"id": model.model_id, "architecture": model.architecture.name, "hub": model.model_hf_path}
            for model in SUPPORTED_MODELS.values()
        ],
        "architectures": [
            {"name": entry.name, "parts": parts_of(name), "remote_code": entry.remote_code}
            for name, entry in ARCHITECTURES.items()
        ],
        "families": [
            {"name": name, "model_types": list(base.base_model_types), "version": base.version}
            for name, base in FAMILIES.items()
        ],
    }


def known() -> dict[str, list[dict[str, Any]]]:
    """The same, without torch where nothing can have been added: no plug-in has run, and no program is behind this."""
    if PLUGINS or "moellava.lmm" in sys.modules:
        return registered()
    return json.loads(KNOWN.read_text(encoding="utf-8"))


def rows_of(entries: dict[str, list[dict[str, Any]]], architecture: str | None = None) -> list[tuple[str, ...]]:
    """What the table says of each model, or of those of one architecture."""
    told = {entry["name"]: entry for entry in entries["architectures"]}
    if architecture is not None and architecture not in told:
        raise UnknownNameError(f"Unknown architecture {architecture!r}. Known: {', '.join(told)}")
    rows: list[tuple[str, ...]] = []
    for model in entries["models"]:
        entry = told[model["architecture"]]
        if architecture in (None, entry["name"]):
            note = " (needs --trust_remote_code)" if entry["remote_code"] else ""
            rows.append((model["id"], entry["name"] + note, model["hub"], entry["parts"]))
    return rows


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of aligned text."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown() -> str:
    """The page docs/SUPPORTED_MODELS.md, up to its table of all classes."""
    entries = registered()
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for model_id, architecture, path, parts in rows_of(entries):
        words = ", ".join(f"`{word}`" for word in parts.split(", "))
        lines.append(f"| `{model_id}` | {architecture} | [{path}](https://huggingface.co/{path}) | {words} |")
    bases = ["| family | reads model types | template |", "|---|---|---|"]
    for base in entries["families"]:
        types = ", ".join(f"`{model_type}`" for model_type in base["model_types"])
        bases.append(f"| {base['name']} | {types} | `--version {base['version']}` |")
    return f"{PAGE_TOP}\n" + "\n".join(lines) + f"\n{BASES_TOP}" + "\n".join(bases) + "\n"


def text(family: str | None = None) -> str:
    """The same for a terminal; of one architecture only, if asked."""
    entries = known()
    bases = [("language model", "model types", "template")]
    bases += [(base["name"], ", ".join(base["model_types"]), base["version"]) for base in entries["families"]]
    rows = [HEADER, *rows_of(entries, family)]
    return "\n".join([*table(rows), *([] if family else ["", *table(bases)])])


def main(argv: list[str] | None = None) -> int:
    """The subcommand."""
    parser = CommandParser(prog="moellava models", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", help="of one architecture only")
    parser.add_argument("--json", action="store_true", help="everything that is registered, as JSON")
    parser.add_argument("--markdown", action="store_true", help="as in docs/SUPPORTED_MODELS.md")
    args = parser.parse_args(argv)
    whole = args.markdown or args.json
    idle = [Idle(["family"], whole, "--markdown and --json write all of it")]
    refuse_idle(parser, argv, [*idle, Idle(["json"], args.markdown, "--markdown has a form of its own")])
    if args.json:
        print(printable(json.dumps(registered(), indent=1)))
    else:
        print(printable(markdown() if args.markdown else text(args.family)), end="" if args.markdown else "\n")
    return 0
