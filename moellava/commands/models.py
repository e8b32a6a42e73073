"""`moellava models`: the released models that are known by an id, and the language model families."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from moellava.commands.given import Idle, refuse_idle
from moellava.lmm.architecture import ARCHITECTURES, SUPPORTED_MODELS, SupportedModel
from moellava.log import printable
from moellava.model.families import FAMILIES

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


def row_of(model: SupportedModel) -> tuple[str, str, str, str]:
    """What the table says of a model."""
    architecture = model.architecture
    note = " (needs --trust_remote_code)" if architecture.remote_code else ""
    keywords = architecture.keywords
    parts = ", ".join(keywords.vision_encoder + keywords.vision_projector) if keywords else "found by probes"
    return model.model_id, architecture.name + note, model.model_hf_path, parts


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of aligned text."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown() -> str:
    """The page docs/SUPPORTED_MODELS.md, up to its table of all classes."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for model in SUPPORTED_MODELS.values():
        model_id, architecture, path, parts = row_of(model)
        words = ", ".join(f"`{word}`" for word in parts.split(", "))
        lines.append(f"| `{model_id}` | {architecture} | [{path}](https://huggingface.co/{path}) | {words} |")
    bases = ["| family | reads model types | template |", "|---|---|---|"]
    for name, base in FAMILIES.items():
        types = ", ".join(f"`{model_type}`" for model_type in base.base_model_types)
        bases.append(f"| {name} | {types} | `--version {base.version}` |")
    return f"{PAGE_TOP}\n" + "\n".join(lines) + f"\n{BASES_TOP}" + "\n".join(bases) + "\n"


def text(family: str | None = None) -> str:
    """The same for a terminal; of one architecture only, if asked."""
    wanted = ARCHITECTURES[family].name if family else None
    rows = [row_of(model) for model in SUPPORTED_MODELS.values() if wanted in (None, model.family_id)]
    bases = [("language model", "model types", "template")]
    bases += [(name, ", ".join(base.base_model_types), base.version) for name, base in FAMILIES.items()]
    return "\n".join([*table([HEADER, *rows]), *([] if wanted else ["", *table(bases)])])


def main(argv: list[str] | None = None) -> int:
    """The subcommand."""
    parser = argparse.ArgumentParser(prog="moellava models", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", help="of one architecture only")
    parser.add_argument("--markdown", action="store_true", help="as in docs/SUPPORTED_MODELS.md")
    args = parser.parse_args(argv)
    refuse_idle(parser, argv, [Idle(["family"], args.markdown, "--markdown writes the whole page")])
    print(printable(markdown() if args.markdown else text(args.family)), end="" if args.markdown else "\n")
    return 0
