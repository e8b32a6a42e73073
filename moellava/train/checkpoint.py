# SPDX-License-Identifier: Apache-2.0
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moellava.data.render.own import begin_on, day
from moellava.errors import UserError
from moellava.files import flush_tree, read_json, write_json
from moellava.log import get_logger
from moellava.train.deepspeed.settings import differences
from moellava.train.identity import renewed
from moellava.train.intact import write_digests

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
    write_digests(staged)
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
        identity: the flags that must be equal for a run to go on. See `identity.run_identity`.

    Raises:
        UserError: another run's folder; the message shows each difference.
    """
    path = output_dir / RUN_FILE
    if not path.exists():
        if (output_dir / "config.json").exists():
            raise UserError(
                f"--output_dir {output_dir} already holds a model (config.json, but no {RUN_FILE}): "
                "no run of training has left it there. Choose another folder."
            )
        if last_checkpoint(output_dir):
            raise UserError(
                f"--output_dir {output_dir} holds checkpoints, but no {RUN_FILE}, which says of which run they are. "
                "Put it back, choose another folder, or remove the checkpoints to start anew."
            )
        return False
    stored = read_run(output_dir)
    if not stored["finished"] and last_checkpoint(output_dir) is None:
        return False
    require_same(output_dir, stored, "identity", identity)
    begin_on(stored.get("day", day()))
    return bool(stored["finished"])


def stored_contents(output_dir: Path) -> dict[str, Any]:
    """What the run that is there has read; {} where there is none. See `check_contents`."""
    return (read_run(output_dir).get("contents") or {}) if (output_dir / RUN_FILE).exists() else {}


def check_contents(output_dir: Path, contents: dict[str, Any]) -> None:
    """Makes sure that a run which is there has read the same weights, data and files.

    Args:
        output_dir: the run's folder; may hold no run.
        contents: what the run reads. See `identity.run_contents`.

    Raises:
        UserError: they have changed; the message names which.
    """
    if not (output_dir / RUN_FILE).exists():
        return
    stored = read_run(output_dir)
    if stored["finished"] or last_checkpoint(output_dir) is not None:
        require_same(output_dir, stored, "contents", contents)


def require_same(output_dir: Path, stored: dict[str, Any], part: str, now: dict[str, Any]) -> None:
    """Raises UserError, with each difference, unless a part of run.json is equal to what it would be now; also for a
    run.json that is too old to tell."""
    if not isinstance(stored.get("contents"), dict):
        raise UserError(
            f"{output_dir / RUN_FILE} does not say which data and weights the run has read: an earlier version of "
            "moellava wrote it. Go on with that version, or choose another --output_dir."
        )
    before, now = stored[part], json.loads(json.dumps(now))
    different = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if different:
        lines = [f"  {line}" for key in different for line in told(key, before.get(key), now.get(key))]
        longer = LONGER.format(folder=output_dir) if stored["finished"] and set(different) <= set(LENGTH) else ""
        raise UserError(
            f"--output_dir {output_dir} holds another run:\n" + "\n".join(lines) + "\n"
            f"{longer}Choose another folder, or remove this one to start anew."
        )


def told(key: str, before: Any, now: Any) -> list[str]:
    """How something differs, in lines: DeepSpeed's settings by their own keys."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [f"{key}, {name}: {old!r} there, {new!r} now" for name, old, new in differences(before, now)]
    return [f"{key}: {before!r} there, {now!r} now"]


LENGTH = ("--num_train_epochs", "--max_steps")
"""What says how long a run is."""

LONGER = (
    "It has finished, and its learning rate was laid over its own steps. To train longer, start from its model: "
    "--model_name_or_path {folder}, without --image_tower, --image_projector_type and --pretrain_mm_mlp_adapter, "
    "for the further steps or epochs, in an --output_dir of its own. "
)


def read_run(output_dir: Path) -> dict[str, Any]:
    """What run.json says: {"identity", "contents", "split", "asked", "finished"}. Raises UserError where it is
    damaged."""
    path = output_dir / RUN_FILE
    stored = read_json(path)
    if not isinstance(stored, dict) or not isinstance(stored.get("identity"), dict) or "finished" not in stored:
        raise UserError(
            f"{path} is damaged: it does not say which run this is. Put it back, or choose another --output_dir."
        )
    return renewed(stored)


def claim_folder(
    output_dir: Path, identity: dict[str, Any], contents: Mapping[str, Any] = {}, **how: Sequence[int]
) -> None:
    """Notes whose folder this is. Called once the data and the model are known to be good. `how`: the `Split` of its
    steps, and the one that was asked for."""
    output_dir.mkdir(parents=True, exist_ok=True)
    clear_staging(output_dir)
    claim = {"identity": identity, "contents": contents, **how, "day": day(), "finished": False}
    write_json(output_dir / RUN_FILE, claim)


def mark_finished(output_dir: Path) -> None:
    """Notes that the folder holds the run's result; the same command then has nothing left to do."""
    write_json(output_dir / RUN_FILE, read_run(output_dir) | {"finished": True})


def chosen_checkpoint(output_dir: Path, flag: str | None) -> Path | None:
    """The checkpoint that a run goes on from: the newest, or the one that --resume_from_checkpoint names.

    Args:
        output_dir: the run's folder.
        flag: a checkpoint in it, 'True' for the newest, or None: the newest, if there is one.

    Raises:
        UserError: there is no such checkpoint, it lies elsewhere, or it is not whole (see `require_intact`).
    """
    newest = last_checkpoint(output_dir)
    if flag is None:
        return newest
    named = f"--resume_from_checkpoint {flag}"
    if flag.lower() == "true":
        if newest is None:
            raise UserError(f"{named}, but --output_dir {output_dir} holds no checkpoint. Leave the flag out to start.")
        return newest
    if flag.lower() == "false":
        if newest is not None:
            raise UserError(f"{named}, but a run goes on from {newest}. Remove the checkpoints to start anew.")
        return None
    found = [path for path in complete_checkpoints(output_dir) if path.resolve() == Path(flag).resolve()]
    if not found:
        there = ", ".join(path.name for path in complete_checkpoints(output_dir)) or "none"
        raise UserError(
            f"{named} is no checkpoint of --output_dir {output_dir} (there: {there}). A run goes on in its own folder; "
            "to start another one from those weights, give them as --model_name_or_path."
        )
    return found[0]
