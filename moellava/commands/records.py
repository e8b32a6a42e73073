"""What all commands that read records have in common: the flags for them."""

from __future__ import annotations

import argparse

from moellava.constants import ROLES

DATA_HELP = "JSON, JSON Lines, Parquet or Arrow files, folders of `datasets`, or YAML mixtures (docs/DATA.md)"


def add_role_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --user_key and --assistant_key, spelled as train.py has them, or with hyphens."""
    for flag, role, who in zip(("user", "assistant"), ROLES, ("user's", "model's"), strict=True):
        parser.add_argument(
            f"--{flag}_key", f"--{flag}-key", default=role, help=f"what the records call the {who} turns ({role})"
        )


def add_confine_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --confine_media, spelled as train.py has it, or with a hyphen."""
    parser.add_argument(
        "--confine_media",
        "--confine-media",
        action="store_true",
        help="refuse paths that lead out of the folder of images or videos, also by links",
    )


def roles_of(args: argparse.Namespace) -> tuple[str, str]:
    """What the records call the user and the model."""
    return args.user_key, args.assistant_key
