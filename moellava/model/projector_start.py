# SPDX-License-Identifier: Apache-2.0
"""A projector that has learnt already, from `mm_projector.bin` or a folder of any stage, into a composed model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moellava.errors import UserError
from moellava.files import read_config
from moellava.model.integrity import check_digests, check_files
from moellava.model.published import EMBEDDINGS, STAGE_1_FILE, projector_tensors
from moellava.model.section import Section, section_of
from moellava.model.tiles import IMAGE_NEWLINE
from moellava.model.weights import read_file, read_tensors


def load_projector(model: Any, path: str | Path) -> None:
    """Copies a projector into a composed model, and with it what `<im_start>` and `<im_end>`, and the ends of rows of
    tiles, have learnt.

    Args:
        model: the model.
        path: an `mm_projector.bin` of LLaVA or MoE-LLaVA, or a folder of any stage, ours or theirs.

    Raises:
        UserError: there is no projector, it has another shape than the model's, or only one of the two uses the tokens.
    """
    path, projector = Path(path), model.model.multi_modal_projector
    if path.is_dir() and (path / STAGE_1_FILE).is_file():
        path = path / STAGE_1_FILE
    if path.is_dir():
        check_files(path)
        check_digests(path)
    tensors = read_tensors(path) if path.is_dir() else dict(read_file(path))
    found = projector_tensors(tensors)
    if not found:
        raise UserError(f"--pretrain_mm_mlp_adapter {path} holds no projector.")
    fixed = dict(projector.named_buffers())
    wanted = {name: tuple(tensor.shape) for name, tensor in projector.named_parameters()}
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in found.items()
        if name not in fixed or not torch.equal(tensor.to(fixed[name]), fixed[name])
    }
    if shapes != wanted:
        raise UserError(
            f"--pretrain_mm_mlp_adapter {path} does not fit --image_projector_type: "
            f"it holds {shapes}, but the model's projector is {wanted}."
        )
    projector.load_state_dict(found, strict=False)
    newline = next((tensor for name, tensor in tensors.items() if name.endswith(IMAGE_NEWLINE)), None)
    if newline is not None and hasattr(model.model, IMAGE_NEWLINE):
        with torch.no_grad():
            model.model.image_newline.copy_(newline)
    copy_image_tokens(model, learnt_image_tokens(path, tensors), path)


def learnt_image_tokens(path: Path, tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Embeddings [2, D] of `<im_start>` and `<im_end>` beside a projector, or None.

    LLaVA stores them (or the whole table, which they end) in `mm_projector.bin`; our config names their ids.
    """
    tables = [tensor for name, tensor in tensors.items() if name.endswith(EMBEDDINGS)]
    if not tables:
        return None
    if not path.is_dir():
        return tables[0][-2:]
    section = section_of(read_config(path, "--pretrain_mm_mlp_adapter")) or Section()
    ids = section.image_token_ids or []
    return tables[0][ids[1:]] if ids[1:] else None


def copy_image_tokens(model: Any, embeddings: torch.Tensor | None, path: Path) -> None:
    """Writes embeddings [2, D] to the rows of `<im_start>` and `<im_end>`. Raises UserError if one side lacks them."""
    ids = ((section_of(model.config) or Section()).image_token_ids or [])[1:]
    if bool(ids) != (embeddings is not None):
        there, here = ("with", "without") if embeddings is not None else ("without", "with")
        raise UserError(
            f"--pretrain_mm_mlp_adapter {path} was trained {there} <im_start> and <im_end>, but this run is {here} "
            f"them: set --mm_use_im_start_end {embeddings is not None}."
        )
    if embeddings is not None:
        with torch.no_grad():
            model.get_input_embeddings().weight[ids] = embeddings.to(model.get_input_embeddings().weight)
