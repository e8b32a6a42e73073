# SPDX-License-Identifier: Apache-2.0
"""Qwen-VL-Chat: code of its own, without a processor.

Its tokenizer reads `Picture 1: <img>PATH</img>`, and its model opens the file, in its forward pass.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from moellava.data.collate import MediaCollator
from moellava.data.media_reader import Shown
from moellava.data.tokenizers import load_tokenizer
from moellava.errors import DataError, UserError
from moellava.lmm.architecture import Architecture, register_architecture
from moellava.lmm.remote import RemoteProcessor, load_remote_model, saved_template
from moellava.model.parts import Keywords

_TEMPLATE = (
    "{%- set seen = namespace(images=0) %}"
    "{%- if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- for part in message['content'] %}{%- if part['type'] == 'image' %}{% set seen.images = seen.images + 1 %}"
    "{{ 'Picture ' ~ seen.images ~ ': <img>' ~ part.get('image', '') ~ '</img>\n' }}"
    "{%- else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A part `{"type": "image", "image": PATH}` shows its path, as the model's own tokenizer wants it."""


class PathTokenizer(PreTrainedTokenizerFast):
    """Qwen-VL's vocabulary as a fast tokenizer; saved as the files that it was read from, which its own class reads."""

    source: Path

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> tuple[str, ...]:
        """Copies `qwen.tiktoken` and the settings beside it."""
        names = [name for name in ("qwen.tiktoken", "tokenizer_config.json") if (self.source / name).is_file()]
        for name in names:
            shutil.copyfile(self.source / name, Path(save_directory) / name)
        return tuple(str(Path(save_directory) / name) for name in names)


class PathProcessor(RemoteProcessor):
    """An image is its path, one byte a token, between `<img>` and `</img>`, filled up to 256 tokens.

    `</img>` is the template's text, so a run is 257 tokens long.
    """

    SPAN = 256
    SPECIAL = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>")
    LONGEST = SPAN - 2
    """Bytes: the model looks for the first filler before the last of the 256 tokens."""

    def check_path(self, path: str | Path, name: str) -> None:
        """See `RemoteProcessor`; a path has to fit between the tokens."""
        length = len(str(path).encode())
        if length > self.LONGEST:
            raise DataError(
                f"{name}: the path {path} is {length} bytes long, and Qwen-VL reads paths of at most {self.LONGEST}: "
                "give a shorter --image_folder"
            )

    def runs(self, images: Sequence[Sequence[Any]]) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
        """See `RemoteProcessor`. An image instead of a path, whose tokens are only counted, has an empty path."""
        begin, filler = self.tokenizer.convert_tokens_to_ids(["<img>", "<imgpad>"])
        paths = [str(path) if isinstance(path, str | Path) else "" for row in images for path in row]
        return [[begin, *path.encode(), *[filler] * (self.SPAN - len(path.encode()))] for path in paths], {}


def load_path_processor(folder: Path, raw: dict[str, Any]) -> PathProcessor:
    """Its processor. Raises UserError where the tokens of its vocabulary are not where the model looks for them."""
    plain = load_tokenizer(folder, "qwen")
    tokenizer = PathTokenizer(
        tokenizer_object=plain.backend_tokenizer,
        model_max_length=plain.model_max_length,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(PathProcessor.SPECIAL)})
    tokenizer.source = folder
    found, wanted = tokenizer.convert_tokens_to_ids("<img>"), raw["visual"].get("image_start_id")
    if found != wanted:
        raise UserError(f"{folder}: <img> is token {found}, but config.json says visual.image_start_id {wanted}.")
    return PathProcessor(tokenizer, folder, "<img>", saved_template(folder))


class PathCollator(MediaCollator):
    """Images are paths among the ids. Without any, its model runs its tower on a blank image by itself."""

    def _blanks(self, shown: Sequence[Sequence[Shown]]) -> list[Shown]:
        return []


QWEN_VL = register_architecture(
    Architecture(
        name="qwen-vl",
        model_type="qwen",
        needs=("visual",),
        keywords=Keywords(
            vision_encoder=tuple(
                f"transformer.visual.{part}"
                for part in ("conv1", "positional_embedding", "ln_pre", "transformer", "ln_post")
            ),
            vision_projector=("transformer.visual.attn_pool", "transformer.visual.proj"),
            language_model=("transformer.wte", "transformer.h", "transformer.ln_f", "lm_head"),
        ),
        template=_TEMPLATE,
        loads_images=False,
        load=load_remote_model,
        remote_processor=load_path_processor,
        collator=PathCollator,
        models={"qwen-vl-chat": "Qwen/Qwen-VL-Chat"},
    )
)
