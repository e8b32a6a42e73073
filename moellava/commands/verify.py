# SPDX-License-Identifier: Apache-2.0
"""`moellava verify DIR`: recomputes the golden.safetensors that lies in a folder; with --files, compares its files with
the digests that were noted when they were written."""

from __future__ import annotations

from pathlib import Path

from moellava.commands.given import Idle, refuse_idle
from moellava.commands.values import CommandParser
from moellava.errors import UserError
from moellava.files import DIGESTS, digest_problems, read_digests, write_digests
from moellava.log import printable
from moellava.startup import importing


def main(argv: list[str] | None = None) -> int:
    """The subcommand. Exit status: see `moellava.convert.verify.PASSED`; a tensor passes within `--atol`, a file if it
    is what was written."""
    parser = CommandParser(prog="moellava verify", description=" ".join((__doc__ or "").split()))
    parser.add_argument("dir", type=Path, metavar="DIR", help="a model folder")
    parser.add_argument("--atol", type=float, default=1e-4, help="largest |Δ| that passes (default: 1e-4)")
    parser.add_argument("--files", action="store_true", help=f"compare the files with {DIGESTS}; needs no golden file")
    parser.add_argument(
        "--update", action="store_true", help="with --files: the files are right as they are; note their digests anew"
    )
    args = parser.parse_args(argv)
    refuse_idle(parser, argv, [Idle(["atol"], args.files, "is about tensors, and --files compares files")])
    if args.update and not args.files:
        raise UserError("--update notes the digests of files: give --files with it.")
    return compare_files(args.dir, args.update) if args.files else compare_tensors(args.dir, args.atol)


def compare_files(folder: Path, update: bool) -> int:
    """Prints what became of each file. Raises UserError where the folder carries no digests, or damaged files."""
    with importing():
        from moellava.convert.verify import FAILED, PASSED
        from moellava.model.integrity import check_files, new_files
    if not folder.is_dir():
        raise UserError(f"DIR {folder}: there is no such folder.")
    check_files(folder)
    recorded = read_digests(folder)
    if recorded is None and not update:
        raise UserError(
            f"{folder} carries no {DIGESTS}: it was written by other code, or by an older version. What it should hold "
            f"cannot be known; `moellava verify --files --update {folder}` notes what it holds now."
        )
    problems, new = digest_problems(folder, recorded or {}), new_files(folder, recorded or {})
    for name in recorded or {}:
        print(printable(f"{name:40} {problems.get(name, 'ok')}"))
    for name in new:
        print(printable(f"{name:40} is new"))
    if update:
        write_digests(folder, {*(recorded or {}), *new} - {name for name in problems if problems[name] == "is missing"})
        print(printable(f"noted the digests of {folder} as it is"))
        return PASSED
    return FAILED if problems else PASSED


def compare_tensors(folder: Path, atol: float) -> int:
    """Prints how far each tensor of the golden file is from what the folder's model computes."""
    with importing():
        from moellava.convert.verify import FAILED, PASSED, UNDECIDED, verify
    result = verify(folder)
    wrong = 0
    for name, found in result.items():
        if isinstance(found, str):
            print(printable(f"{name:16} -           {found}"))
            continue
        wrong += not found <= atol
        print(printable(f"{name:16} {found:.3e}   {'ok' if found <= atol else f'above {atol:g}'}"))
    if wrong:
        return FAILED
    return UNDECIDED if any(isinstance(found, str) for found in result.values()) else PASSED
