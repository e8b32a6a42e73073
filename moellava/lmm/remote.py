# SPDX-License-Identifier: Apache-2.0
"""Architectures whose code lies in their own repository.

An adapter of `RemoteProcessor` gives what reads images there the shape that `MediaReader` asks for. The Python files
beside the model run only where --trust_remote_code True was given, and are written beside every model that is saved.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

from moellava.errors import UserError
from moellava.files import read_json
from moellava.model.build import REPORT, check_loaded, quietly

RUNS_BADLY = (ImportError, AttributeError, TypeError, ValueError, OSError, KeyError)
"""What code written for another version of transformers fails with."""


class RemoteProcessor:
    """A processor in the shape that `MediaReader` asks.

    Args:
        tokenizer: a fast one, for offsets.
        source: the folder that it came from; what belongs to the model's own code is saved from there.
        image_token: the special token that stands for an image.
        chat_template: in Jinja; None where the folder has none.
    """

    image_processor: Any = None

    def __init__(self, tokenizer: Any, source: Path, image_token: str, chat_template: str | None = None):
        self.tokenizer = tokenizer
        self.source = source
        self.image_token = image_token
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(image_token)
        self.chat_template = chat_template

    def apply_chat_template(self, conversation: Sequence[dict[str, Any]], **options: Any) -> str:
        """Text of messages. See transformers' processors."""
        return self.tokenizer.apply_chat_template(conversation, **options)

    def __call__(
        self, text: Sequence[str], images: Sequence[Sequence[Any]], padding: bool = True, return_tensors: str = "pt"
    ) -> dict[str, torch.Tensor]:
        """Ids [B, L] of texts with a run of tokens for each image, and what else the model takes of images."""
        runs, tensors = self.runs(images)
        remaining = iter(runs)
        rows = [self._row(words, remaining) for words in text]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        attended = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": attended, **tensors}

    def runs(self, images: Sequence[Sequence[Any]]) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
        """The tokens of every image, in order, and the model's inputs for all of them."""
        raise NotImplementedError

    def check_path(self, path: str | Path, name: str) -> None:
        """Raises DataError for the path of an image that cannot be read here; `name` is of its record."""

    def _row(self, text: str, runs: Any) -> torch.Tensor:
        ids: list[int] = []
        for number, piece in enumerate(text.split(self.image_token)):
            ids += next(runs) if number else []
            ids += self.tokenizer(piece, add_special_tokens=False).input_ids
        return torch.tensor(ids)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Writes what such a folder has beside the weights: code, settings, chat template."""
        folder = Path(folder)
        kept = [path for pattern in ("*.py", "*preprocessor_config.json") for path in self.source.glob(pattern)]
        for path in kept:
            if path.resolve().parent != folder.resolve():
                shutil.copyfile(path, folder / path.name)
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


def saved_template(folder: Path) -> str | None:
    """The chat template that was saved beside a trained model; the hub's are for texts alone and are left."""
    path = folder / "chat_template.jinja"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def load_remote_config(folder: Path, raw: Mapping[str, Any]) -> Any:
    """The config of a model by the code in its folder; `raw` is its config.json.

    Raises:
        UserError: the folder has no code, or the code does not run.
    """
    if "AutoModelForCausalLM" not in (raw.get("auto_map") or {}):
        raise UserError(f"{folder} has no code for its model: its config.json names none under auto_map.")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=True)
    except RUNS_BADLY as error:
        raise refusal(folder, "config", error) from error


def load_remote_model(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    """A model by the code in its folder.

    Raises:
        UserError: the code does not run, or the weights do not fit.
    """
    try:
        with quietly():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, config=config, trust_remote_code=True, dtype=dtype, **REPORT
            )
    except RUNS_BADLY as error:
        raise refusal(folder, "model", error) from error
    check_loaded(info, str(folder))
    return model.eval()


def refusal(folder: Path, what: str, error: Exception) -> UserError:
    """What to say when a repository's code does not run."""
    return UserError(
        f"The code in {folder} cannot make its {what} with transformers {transformers.__version__}: "
        f"{type(error).__name__}: {error}. Such code is written for the version of transformers of its day; "
        f"config.json names {written_for(folder)}."
    )


def written_for(folder: Path) -> str:
    """The version of transformers that a folder was written with."""
    return str(read_json(folder / "config.json").get("transformers_version", "none"))
