"""`moellava models`: the released models that are known by an id, and the language model families."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from moellava.lmm.supported_models import LMM_FAMILIES, SUPPORTED_MODELS, SupportedModel
from moellava.model.families import FAMILIES

HEADER = ("model id", "family", "on the hub", "parts: vision encoder, projector")

PAGE_TOP = """# Supported models

Written by `moellava models --markdown`; a test compares the two. docs/ADD_A_MODEL.md says how a model joins.

    python train.py --model_id qwen2-vl-2b-instruct …              # from the hub
    python train.py --model_local_path FOLDER …                    # any folder of a family below; needs no registration

The code of some families lies in their own repository, and runs only with `--trust_remote_code True`;
docs/ADD_A_MODEL.md says what was checked of them here.
"""

BASES_TOP = """
## Language models that `--model_name_or_path` composes with a vision tower

"""


def row_of(model: SupportedModel) -> tuple[str, str, str, str]:
    """What the table says of a model."""
    keywords = model.family.keywords
    note = " (needs --trust_remote_code)" if model.family.remote_code else ""
    parts = ", ".join(keywords.vision_encoder + keywords.vision_projector)
    return model.model_id, model.family.family_id + note, model.model_hf_path, parts


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of aligned text."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown() -> str:
    """The page docs/SUPPORTED_MODELS.md."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for model in SUPPORTED_MODELS.values():
        model_id, family, path, parts = row_of(model)
        words = ", ".join(f"`{word}`" for word in parts.split(", "))
        lines.append(f"| `{model_id}` | {family} | [{path}](https://huggingface.co/{path}) | {words} |")
    bases = ["| family | reads model types | template |", "|---|---|---|"]
    for name, base in FAMILIES.items():
        kinds = ", ".join(f"`{kind}`" for kind in base.base_model_types)
        bases.append(f"| {name} | {kinds} | `--version {base.version}` |")
    return f"{PAGE_TOP}\n" + "\n".join(lines) + f"\n{BASES_TOP}" + "\n".join(bases) + "\n"


def text(family: str | None = None) -> str:
    """The same for a terminal; of one family only, if asked."""
    wanted = LMM_FAMILIES[family] if family else None
    rows = [row_of(model) for model in SUPPORTED_MODELS.values() if wanted in (None, model.family)]
    bases = [("language model", "model types", "template")]
    bases += [(name, ", ".join(base.base_model_types), base.version) for name, base in FAMILIES.items()]
    return "\n".join([*table([HEADER, *rows]), *([] if wanted else ["", *table(bases)])])


def main(argv: list[str] | None = None) -> int:
    """The subcommand."""
    parser = argparse.ArgumentParser(prog="moellava models", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", help="of one family only")
    parser.add_argument("--markdown", action="store_true", help="as docs/SUPPORTED_MODELS.md")
    args = parser.parse_args(argv)
    print(markdown() if args.markdown else text(args.family), end="" if args.markdown else "\n")
    return 0
