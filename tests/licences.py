# SPDX-License-Identifier: Apache-2.0
"""The licence's line at the top of every file of code (spdx.dev). `python -m tests.licences` writes missing ones."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINE = "# SPDX-License-Identifier: Apache-2.0\n"
FOLDERS = ("moellava", "tests", "scripts", "benchmarks", ".ci")
ENDINGS = (".py", ".sh")
SCRIPTS = (ROOT / ".ci" / "run",)
"""Code whose name has no ending."""


def files_of_code() -> list[Path]:
    """Every Python and shell file of the repository."""
    found = [*ROOT.glob("*.py"), *SCRIPTS]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.suffix in ENDINGS and not path.is_symlink()]
    return sorted(set(found))


def has_line(path: Path) -> bool:
    """Whether the line stands first, or after a script's `#!`."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:2]
    return bool(lines) and (lines[0] == LINE or (lines[0].startswith("#!") and lines[-1] == LINE))


def write_line(path: Path) -> None:
    """Puts the line there."""
    text = path.read_text(encoding="utf-8")
    first, rest = text.split("\n", 1) if text.startswith("#!") else ("", text)
    path.write_text((f"{first}\n" if first else "") + LINE + rest, encoding="utf-8")


if __name__ == "__main__":
    for lacking in files_of_code():
        if not has_line(lacking):
            write_line(lacking)
