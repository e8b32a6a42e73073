"""`moellava verify DIR`: recomputes the golden.safetensors that lies in a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from moellava.convert.verify import FAILED, PASSED, UNDECIDED, verify


def main(argv: list[str] | None = None) -> int:
    """The subcommand. Exit status: see `PASSED`, `FAILED`, `UNDECIDED`; a tensor passes within `--atol`."""
    parser = argparse.ArgumentParser(prog="moellava verify", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dir", type=Path, metavar="DIR", help="a model folder that holds golden.safetensors")
    parser.add_argument("--atol", type=float, default=1e-4, help="largest |Δ| that passes (default: 1e-4)")
    args = parser.parse_args(argv)
    result = verify(args.dir)
    wrong = 0
    for name, found in result.items():
        if isinstance(found, str):
            print(f"{name:16} -           {found}")
            continue
        wrong += not found <= args.atol
        print(f"{name:16} {found:.3e}   {'ok' if found <= args.atol else f'above {args.atol:g}'}")
    if wrong:
        return FAILED
    return UNDECIDED if any(isinstance(found, str) for found in result.values()) else PASSED
