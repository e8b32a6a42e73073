"""Nothing is lost: checkpoints appear whole or not at all, and a folder belongs to one run.

A checkpoint is written to `OUTPUT/.saving/checkpoint-N`, flushed to disk, and renamed to `OUTPUT/checkpoint-N`; only
then do older ones go. A run that is killed, or whose disk is full, leaves the last complete one.
`OUTPUT/run.json` says which run the folder belongs to and whether it is finished.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from moellava.errors import UserError
from moellava.files import flush_tree, read_json, write_json
from moellava.log import get_logger

logger = get_logger(__name__)

STAGING = ".saving"
RUN_FILE = "run.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoints of a run, oldest first. The rename made each of them complete."""
    found = ((_NAME.fullmatch(path.name), path) for path in Path(output_dir).glob("checkpoint-*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    checkpoints = complete_checkpoints(output_dir)
    return checkpoints[-1] if checkpoints else None


def put_in_place(staged: Path, output_dir: Path, keep: int | None) -> Path:
    """Moves a finished checkpoint to its place in one step, then removes all but the newest `keep`."""
    final = output_dir / staged.name
    flush_tree(staged)
    if final.exists():  # a run that was resumed from an older checkpoint reaches the same step again
        shutil.rmtree(final)
    os.replace(staged, final)
    staged.parent.rmdir()
    if keep:
        for old in complete_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    return final


def clear_staging(output_dir: Path) -> None:
    """Removes what an interrupted save has left."""
    shutil.rmtree(output_dir / STAGING, ignore_errors=True)


def check_folder(output_dir: Path, identity: dict[str, Any]) -> bool:
    """Makes sure that a folder holds this run or none. Returns True if this run has finished there.

    A claim without a complete checkpoint protects nothing, so a first attempt that failed may be started anew with
    other flags.

    Args:
        output_dir: the run's folder; may be missing.
        identity: what must be equal for a run to go on: stage, model, data, seed, batch sizes.

    Raises:
        UserError: another run's folder; the message shows each difference.
    """
    path = output_dir / RUN_FILE
    if not path.exists():
        if (output_dir / "config.json").exists():
            raise UserError(
                f"--output_dir {output_dir} already holds a model (config.json, but no {RUN_FILE}): "
                "no run of train.py has left it there. Choose another folder."
            )
        return False
    stored = read_json(path)
    if not stored["finished"] and last_checkpoint(output_dir) is None:
        return False
    before, now = stored["identity"], json.loads(json.dumps(identity))
    different = [
        f"  {key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if different:
        raise UserError(
            f"--output_dir {output_dir} holds another run:\n" + "\n".join(different) + "\n"
            "Choose another folder, or remove this one to start anew."
        )
    return bool(stored["finished"])


def claim_folder(output_dir: Path, identity: dict[str, Any]) -> None:
    """Notes whose folder this is. Called once the data and the model are known to be good."""
    output_dir.mkdir(parents=True, exist_ok=True)
    clear_staging(output_dir)
    write_json(output_dir / RUN_FILE, {"identity": identity, "finished": False})


def mark_finished(output_dir: Path) -> None:
    """Notes that the folder holds the run's result; the same command then has nothing left to do."""
    path = output_dir / RUN_FILE
    stored = read_json(path)
    write_json(path, stored | {"finished": True})
