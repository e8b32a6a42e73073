# SPDX-License-Identifier: Apache-2.0
"""A dense folder -> a sparse one, with its certificate, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moellava.convert.streaming import convert_files, copy_others, sparse_config, streamed
from moellava.convert.whole import build_whole
from moellava.errors import UserError
from moellava.lmm.architecture import registered
from moellava.model.description import Description
from moellava.model.integrity import READ
from moellava.model.manifest import Manifest
from moellava.model.offload import let_go, run_from_disk, without_weights
from moellava.model.weights import require_sizes, shapes_in
from moellava.moe import MoESpec
from moellava.moe.certificate import Certificate, compare, dense_logits, forward_of, upcycle_certified
from moellava.vlm import collator_of, describe, encoder_of, probes_of


def upcycle_folder(source: Manifest, target: Path, spec: MoESpec, shard_bytes: int) -> Certificate:
    """Writes the sparse folder of a dense one. Neither model is ever whole in memory where its folder is laid out as
    its class is; a published one is opened, converted and written as a whole.

    Args:
        source: a dense vision-language model.
        target: the new folder.
        spec: options.
        shard_bytes: largest file of the new folder.

    Raises:
        UserError: no dense vision-language model, or one whose decoder cannot be cut into experts.
    """
    if source.is_sparse:
        raise UserError(f"{source.called} is sparse already. `moellava train --moe_enable True` trains it further.")
    architecture = registered(source)
    if architecture is not None:  # first: of those that are refused, the code would have to run to describe the folder
        architecture.refuse_upcycling(source.called)
    source.require_start()
    description = describe(source)
    dense = streamed(description)
    if dense is None:
        return in_memory(description, target, spec, source.called, shard_bytes)
    return stream(description, dense, target, spec, shard_bytes)


def stream(description: Description, dense: Any, target: Path, spec: MoESpec, shard_bytes: int) -> Certificate:
    """Converts and certifies file by file. Raises NotExactError: see `Certificate.check`; nothing is left then."""
    config, architecture = description.config, description.architecture
    require_sizes(config, shapes_in(description.folder), str(description.folder))
    dtype = config.dtype or torch.float32
    # first: a decoder that cannot be cut into experts says so before anything is computed
    sparse = without_weights(sparse_config(config, spec))
    encoder = encoder_of(*description.inputs(), config, architecture)
    probes: dict[str, Any] = probes_of(config, encoder, collator_of(encoder, architecture), dtype)
    run_from_disk(description.folder, dense, dtype)
    wanted = dense_logits(forward_of(dense), probes)
    let_go(dense)
    certificates: list[Certificate] = []

    def certify(folder: Path) -> None:
        run_from_disk(folder, sparse, dtype)
        certificates.append(compare(forward_of(sparse), probes, wanted, spec, dtype).check())
        certificates[0].save(folder)

    convert_files(description.folder, target, dense, sparse, spec, shard_bytes, certify)
    return certificates[0]


def in_memory(description: Description, target: Path, spec: MoESpec, source: str, shard_bytes: int) -> Certificate:
    """The same as a whole. What opening reads is written anew; other files come along."""
    vlm = build_whole(description, source)
    certificate = upcycle_certified(vlm.model, spec, vlm.probes())
    vlm.sparse(spec)

    def beside(folder: Path) -> None:
        copy_others(description.folder, folder, READ)
        certificate.save(folder)

    vlm.save(target, meta={"stage": "moe"}, shard_bytes=shard_bytes, beside=beside)
    return certificate
