# SPDX-License-Identifier: Apache-2.0
"""A sparse folder -> a smaller one, without the experts that carry little (`moellava prune`)."""

from __future__ import annotations

from pathlib import Path

from moellava.batches import batches_of
from moellava.convert.whole import build_whole
from moellava.data.media import MediaFiles
from moellava.data.records import Records
from moellava.errors import UserError
from moellava.model.manifest import Manifest
from moellava.moe.prune import Kept, carried, prune, require_keep
from moellava.vlm import VLM, describe


def opened(source: Manifest) -> VLM:
    """A sparse model in its own precision. Raises UserError for a dense one."""
    if not source.is_sparse:
        raise UserError(f"{source.called} is dense: it has no experts that could go.")
    source.require_start()
    return build_whole(describe(source), source.called)


def prune_folder(
    vlm: VLM, target: Path, records: Records, files: MediaFiles, count: int, keep: int, merge: bool
) -> dict[int, Kept]:
    """Measures what experts carry, leaves the heaviest, and writes the folder.

    Args:
        vlm: of `opened`; it is smaller afterwards.
        target: the new folder.
        records, files, count: what experts are measured on, and how many of them.
        keep, merge: see `moellava.moe.prune.prune`.

    Returns:
        Decoder layer -> what it keeps.
    """
    require_keep(vlm.model, keep)  # measuring takes a while
    spec, kept = prune(vlm.model, carried(vlm.model, batches_of(vlm, records, files, count)), keep, merge)
    vlm.sparse(spec)
    vlm.save(target, meta={"stage": "moe"})
    return kept
