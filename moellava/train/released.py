"""The parts of a run that differ for released models: opening and records."""

from __future__ import annotations

from typing import Any

import torch

from moellava.data.media_reader import MediaReader
from moellava.data.records import Records
from moellava.errors import UserError
from moellava.lmm.architecture import Architecture, refuse_upcycling
from moellava.lmm.datasets import TO_LOAD_IMAGE, MediaDataset
from moellava.lmm.folders import mark_released
from moellava.lmm.loaders import ReleasedModel, find_model, load_lmm
from moellava.train.arguments import DataArguments, ModelArguments, MoEArguments, TrainingArguments


def open_released(model_args: ModelArguments, moe_args: MoEArguments, dtype: torch.dtype) -> tuple[ReleasedModel, str]:
    """The model that --model_id and --model_local_path mean, and its kind: 'dense' or 'moe'.

    Raises:
        UserError: as of `find_model` and `load_lmm`; or a sparse folder without --moe_enable.
    """
    folder, raw, family = find_model(
        model_args.model_id, model_args.model_local_path, trust_remote_code=model_args.trust_remote_code
    )
    if moe_args.moe_enable:
        refuse_upcycling(family, "--moe_enable True")
    kind = "moe" if raw.get("moe") else "dense"
    if kind == "moe" and not moe_args.moe_enable:
        raise UserError(f"{folder} is a Mixture of Experts: add --moe_enable True to train it.")
    released = load_lmm(folder, raw, family, dtype=dtype, trust_remote_code=model_args.trust_remote_code)
    mark_released(released.model.config, family)
    return released, kind


def released_dataset(
    records: Records, processor: Any, family: Architecture, data_args: DataArguments, args: TrainingArguments
) -> MediaDataset:
    """Checks every record. Raises DataError with all problems of them."""
    return MediaDataset(
        records,
        MediaReader(processor),
        processor.chat_template,
        to_load_image=TO_LOAD_IMAGE[family.name],
        image_folder=data_args.image_folder,
        video_folder=data_args.video_folder,
        num_frames=data_args.num_frames,
        max_length=args.model_max_length,
        overlong=data_args.overlong,
        bad_files=data_args.bad_files,
        workers=args.dataloader_num_workers,
    )
