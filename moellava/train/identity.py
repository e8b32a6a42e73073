# SPDX-License-Identifier: Apache-2.0
"""Which run a folder belongs to: all that changes its numbers, data and weights by content, so that they may move."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from moellava.data.findings import KEY, Findings, findings
from moellava.data.media import MediaFiles, threaded
from moellava.data.records import Medium, Records
from moellava.data.remote import RemoteFile
from moellava.data.scan import shared, slices_of
from moellava.data.shown import SLICE, Shown, looked_up
from moellava.files import MODEL_FILES, NOT_OF_THE_MODEL, file_digest, read_json
from moellava.model.manifest import Manifest
from moellava.train.deepspeed.settings import differences

_LOGGED = "what is logged and shown, and where"
_SAVED = "what is saved when, and where it is sent"
_LOADED = "how samples are brought, not which"
_CONTENT = "compared by content"
_UNREAD = "nothing reads it"
_SETTLED = "written into flags that count"

WITHOUT_EFFECT: dict[str, str] = {
    **dict.fromkeys(
        (
            *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
            *("include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm", "report_to"),
            *("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
            *("skip_memory_metrics", "report_html"),
        ),
        _LOGGED,
    ),
    **dict.fromkeys(
        (
            *("output_dir", "save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit"),
            *("enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"),
            *("hub_always_push", "hub_revision", "skip_dry_save"),
        ),
        _SAVED,
    ),
    **dict.fromkeys(
        (
            *("lazy_preprocess", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
            *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "torch_empty_cache_steps"),
            *("cache_dir", "cache_features", "cache_pixels"),
        ),
        _LOADED,
    ),
    **dict.fromkeys(
        (
            *("model_name_or_path", "model_local_path", "image_tower", "pretrain_mm_mlp_adapter", "data_path"),
            *("eval_data_path", "image_folder", "video_folder", "skip_list", "user_key", "assistant_key", "deepspeed"),
            "plugin",
        ),
        _CONTENT,
    ),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _UNREAD),
    **dict.fromkeys(("use_lora", "q_lora", "train_vision_projector"), _SETTLED),
    "fsdp_size": "another split of the same numbers: a checkpoint is read by parameter",
    "ep_size": "another split of the same experts: a checkpoint is read by parameter",
    "resume_from_checkpoint": "which checkpoint of the same run it goes on from",
    "local_rank": "which process this is",
    **dict.fromkeys(
        ("per_device_train_batch_size", "gradient_accumulation_steps"),
        "how a step is split: with the number of processes they make its samples, and these count",
    ),
    "ddp_timeout": "how long processes wait for each other",
}
"""Flags that may differ between a run and its continuation -> why. Every other one counts."""

ENDS = 4096
"""Bytes at each end of an image or a video that stand for its content, beside its size: reading 600,000 files whole
would take hours, and a file's head is read anyway when it is checked."""


SAMPLES = "samples of a step"
"""What counts in place of the number of processes, and of how much each of them does."""

UNREADABLE = b"unreadable"

ENDS_ROW = np.dtype([(KEY, "<u8"), ("ends", "S96")])
"""What `ends_digest` has found."""


def run_identity(stage: str, groups: Sequence[Any], samples: int) -> dict[str, Any]:
    """What flags say of a run, by name, without those in `WITHOUT_EFFECT`.

    Args:
        stage: its name.
        groups: the four groups of flags.
        samples: of a step, of all processes together.
    """
    flags = {
        f"--{field.name}": getattr(group, field.name)
        for group in groups
        for field in fields(group)
        if field.name not in WITHOUT_EFFECT
    }
    return json.loads(json.dumps({"stage": stage, SAMPLES: samples} | flags, default=str))


def renewed(stored: dict[str, Any]) -> dict[str, Any]:
    """What run.json holds, as it is written today, of a run that an earlier version has begun: there the number of
    processes counted, and grouped samples had another order where a step was of several passes."""
    identity = dict(stored["identity"])
    parts = [identity.pop(name, None) for name in OF_BEFORE]
    if None in parts:
        return stored
    if parts[1] > 1 and identity.get("--group_by_modality_length"):
        identity["order of the samples"] = "that of an earlier version of moellava"
    identity[SAMPLES] = math.prod(parts)
    return stored | {"identity": identity, "split": parts, "asked": parts}


OF_BEFORE = ("--per_device_train_batch_size", "--gradient_accumulation_steps", "processes")


def run_contents(
    folders: dict[str, Path],
    data: dict[str, Records | None],
    files: MediaFiles,
    deepspeed: str | dict | None,
    stored: Mapping[str, Any] = {},
) -> dict[str, Any]:
    """What a run reads, by content. Collective: processes share the reading.

    Args:
        folders: flag -> a model's folder, or a file of weights.
        data: flag -> records.
        files: the records' images and videos.
        deepspeed: DeepSpeed's JSON file, or what is in it.
        stored: what is said here of the run that is there, perhaps by an earlier version.

    Returns:
        "content of FLAG" -> a digest in words.
    """
    found: dict[str, Any] = {flag: weights_content(path) for flag, path in folders.items()}
    for flag, records in data.items():
        if records is not None:
            found[flag] = data_content(records, stored.get(f"content of {flag}"))
            found[f"{flag}'s images and videos"] = media_content(records, files)
    settings = read_json(Path(deepspeed)) if isinstance(deepspeed, str) else deepspeed
    found["--deepspeed"] = settings_content(settings, stored.get("content of --deepspeed"))
    return {f"content of {flag}": content for flag, content in found.items()}


def settings_content(settings: dict[str, Any] | None, stored: Any) -> Any:
    """What DeepSpeed's settings say; what is stored, where that says the same of all that a run's numbers depend on."""
    if isinstance(settings, dict) and isinstance(stored, dict) and not differences(stored, settings):
        return stored
    return settings


def data_content(records: Records, stored: str | None) -> str:
    """The content of records; of records in shards as earlier versions told it, where that is what is stored."""
    found = f"{len(records)} records, {records.content()}"
    if stored in (None, found) or records.lie_elsewhere:
        return found
    before = f"{len(records)} records, {records.content(whole=True)}"
    return before if before == stored else found


def folders_of(flag: str, manifest: Manifest) -> dict[str, Path]:
    """The folders that a model is read from: its own, and those of the language model and tower that it names."""
    parts = {"": manifest, " (its language model)": manifest.base, " (its tower)": manifest.tower}
    return {flag + suffix: part.folder for suffix, part in parts.items() if part is not None}


def weights_content(path: Path) -> str:
    """The content of a model's folder, or of one file of weights; '' where there is none."""
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if is_model_file(file))
    digests = shared(files, lambda share: threaded(file_digest, share))
    names = [""] if len(files) == 1 else [file.name for file in files]  # a single file may have another name
    return combined(f"{name} {digest}" for name, digest in zip(names, digests, strict=True))


def is_model_file(path: Path) -> bool:
    """Whether a file of a model's folder is part of the model."""
    return path.is_file() and path.name not in NOT_OF_THE_MODEL and any(fnmatch(path.name, p) for p in MODEL_FILES)


def media_content(records: Records, files: MediaFiles) -> str:
    """The content of all images and videos that lie in files, each once, by its size and its ends."""
    shown = Shown(records)
    numbers = np.flatnonzero(shown.in_file)
    slices = slices_of(numbers, SLICE)
    digests = shared(slices, lambda part: ends_of(shown, part, files))
    return f"{len(numbers)} files, {combined(chain.from_iterable(digests))}"


def ends_of(shown: Shown, slices: Sequence[np.ndarray], files: MediaFiles) -> list[list[str]]:
    """The `ends_digest` of the files of media, which is found out again where a file's state has changed (see
    `states_of`). `slices`: numbers of media, some at a time."""
    kept = findings("ends", list, ENDS_ROW, len(shown))
    fresh: dict[int, bytes] = {}
    found = [_ends(media, files, kept, fresh) for numbers in slices for _, media in shown.slices(numbers)]
    kept.add(np.array([row for row in fresh.items() if row[0] and row[1] != UNREADABLE], ENDS_ROW))
    return found if len(found) == len(slices) else [[]]


def _ends(media: Sequence[Medium], files: MediaFiles, kept: Findings, fresh: dict[int, bytes]) -> list[str]:
    """Of a few media; `fresh` gets those that were not kept, by their states."""
    states, ends, new = looked_up(media, files, kept, "ends", lambda path: ends_digest(path).encode())
    fresh.update(zip(states[new].tolist(), ends[new].tolist(), strict=True))
    return [one.decode() for one in ends.tolist()]


def ends_digest(path: Path | RemoteFile) -> str:
    """Size and ends of a file; 'unreadable' where it cannot be read: whoever checks the data says why. Of one that lies
    elsewhere, what the other side says of its content."""
    if isinstance(path, RemoteFile):
        return UNREADABLE.decode() if path.state is None else f"elsewhere {path.state}"
    try:
        with open(path, "rb") as file:
            head, size = file.read(ENDS), file.seek(0, 2)
            file.seek(max(size - ENDS, 0))
            return f"{size} {hashlib.sha256(head + file.read(ENDS)).hexdigest()}"
    except (OSError, ValueError):
        return UNREADABLE.decode()


def combined(digests: Iterable[str]) -> str:
    """One digest of many, in their order."""
    return "sha256 " + hashlib.sha256("\n".join(digests).encode()).hexdigest()[:32]
