"""What DeepSpeed's operator for CPU processes would leave behind: locks of killed builds, and shared memory.

DeepSpeed loads its C++ operator through torch, which guards the build by a file named `lock` and holds it open. A run
that is killed at that moment leaves the file, and every later run would wait for it without end and without a word.

The operator lets processes read each other's buffers through files in shared memory, 66 MB each, which it never
removes: memory that is gone until the machine starts anew. A later run on the same port would also begin with what a
killed one has left in them.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

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


def unlink_shared_buffer(folder: Path = Path("/dev/shm")) -> None:
    """Takes this process's buffer off the file system; those that have mapped it keep it until they end, however.

    Collective: afterwards nobody could map it any more. The name is the operator's own (`csrc/cpu/comm/shm.cpp`).
    """
    dist.barrier()
    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{dist.get_rank()}"
    (folder / name).unlink(missing_ok=True)


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
