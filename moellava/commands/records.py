# SPDX-License-Identifier: Apache-2.0
"""What all commands that read records have in common: the flags for them."""

from __future__ import annotations

import argparse

from moellava.commands.values import amount, count
from moellava.constants import ROLES
from moellava.data.images import USUAL_LIMITS, Limits

LIMITS: tuple[tuple[str, int | float, str], ...] = (
    ("--max-image-pixels", USUAL_LIMITS.pixels, "width × height of the largest image, or frame of a video"),
    ("--max-image-side", USUAL_LIMITS.side, "longest side of an image or frame, in pixels"),
    ("--max-aspect-ratio", USUAL_LIMITS.aspect_ratio, "longer side of an image or frame by its shorter one"),
)
"""Flags of `Limits`: name, default, help."""

MEDIA_LIMITS = ("max_image_pixels", "max_image_side", "max_aspect_ratio")
"""The same, as `argparse` keeps their values."""

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


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `LIMITS`, spelled with hyphens, or as train.py has them."""
    for name, default, text in LIMITS:
        spellings = (name, "--" + name[2:].replace("-", "_"))
        number = amount if isinstance(default, float) else count
        parser.add_argument(*spellings, type=number, default=default, help=f"{text} (default: {default})")


def limits_of(args: argparse.Namespace) -> Limits:
    """How large an image may be. Raises UserError for values out of range."""
    return Limits(*(getattr(args, name) for name in MEDIA_LIMITS))


def roles_of(args: argparse.Namespace) -> tuple[str, str]:
    """What the records call the user and the model."""
    return args.user_key, args.assistant_key
