# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed compiles for itself: locks of builds that were killed, and an operator that training does without.

DeepSpeed loads its C++ operators through torch, which guards a build by a file named `lock` and holds it open. A run
that is killed at that moment leaves the file, and every later run would wait for it without end and without a word.
"""

from __future__ import annotations

import os
from pathlib import Path

from moellava.log import get_logger

logger = get_logger(__name__)


def extension_root() -> Path:
    """Where torch keeps the extensions that it builds."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named:
        return Path(named)
    from torch.utils.cpp_extension import get_default_build_root

    return Path(get_default_build_root())


def remove_abandoned_locks(root: Path, processes: Path = Path("/proc")) -> list[Path]:
    """Removes lock files that no living process holds open; returns them.

    Args:
        root: where extensions are built.
        processes: Linux's process file system; where there is none, nothing can be told, and nothing is removed.
    """
    locks = [path for path in root.rglob("lock") if path.is_file()] if root.is_dir() else []
    if not locks or not processes.is_dir():
        return []
    held = open_files(processes)
    abandoned = [lock for lock in locks if str(lock.resolve()) not in held]
    for lock in abandoned:
        logger.warning("Removing %s: a run that was killed while it loaded an operator has left it.", lock)
        lock.unlink(missing_ok=True)
    return abandoned


def leave_out_shared_memory() -> None:
    """Keeps DeepSpeed from loading its operator for shared memory. To be called before process groups are made.

    Only DeepSpeed's inference would use it (`inference_all_reduce`). In return every CPU process of a run has to wait
    for its lock, a first run has to compile it, and its buffers, 66 MB a process, stay in /dev/shm until the machine
    starts anew.
    """
    from deepspeed import ops
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:
        ops.__compatible_ops__[builder.NAME] = False


def open_files(processes: Path) -> set[str]:
    """Paths of the files that this user's processes have open."""
    found = set()
    for folder in processes.glob("[0-9]*/fd"):
        try:
            links = list(folder.iterdir())
        except OSError:  # the process has ended, or is another user's
            continue
        for link in links:
            try:
                found.add(os.readlink(link))
            except OSError:  # closed meanwhile
                continue
    return found
