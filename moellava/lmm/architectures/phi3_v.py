# SPDX-License-Identifier: Apache-2.0
"""Phi-3-Vision: code of its own, whose processor takes one text at a time.

Images are numbered in the prompt, `<|image_1|>`, and their tokens are the ids -1, -2 ….
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from moellava.data.collate import MediaCollator
from moellava.data.media_reader import Run
from moellava.data.tokenizers import leading_ids
from moellava.lmm.architecture import Architecture, register_architecture
from moellava.lmm.remote import RUNS_BADLY, RemoteProcessor, load_remote_model, refusal, saved_template
from moellava.model.parts import Keywords

_TEMPLATE = (
    "{%- set seen = namespace(images=0) %}"
    "{%- for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{%- for part in message['content'] %}{%- if part['type'] == 'image' %}{% set seen.images = seen.images + 1 %}"
    "{{ '<|image_' ~ seen.images ~ '|>\n' }}"
    "{%- else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|end|>\n' }}{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


class NumberedProcessor(RemoteProcessor):
    """Its own processor, for several texts.

    Args:
        theirs: the processor of the model's own code.
        options: of `RemoteProcessor`.
    """

    numbered = re.compile(r"<\|image_\d+\|>")
    """How its prompts spell what `image_token` stands for."""

    def __init__(self, theirs: Any, **options: Any):
        super().__init__(theirs.tokenizer, **options)
        self.image_processor = theirs.image_processor
        self.leading = leading_ids(theirs.tokenizer)
        """What the model reads behind each image: its processor tokenizes the text between images apart, and the
        tokenizer begins every text so."""

    def runs(self, images: Sequence[Sequence[Any]]) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
        """See `RemoteProcessor`; with `image_token` for the ids that the collator writes."""
        inputs = dict(self.image_processor([image for row in images for image in row], return_tensors="pt"))
        counts = torch.as_tensor(inputs.pop("num_img_tokens")).flatten().tolist()
        return [[self.image_token_id] * (count + len(self.leading)) for count in counts], inputs


def load_numbered_processor(folder: Path, raw: dict[str, Any]) -> NumberedProcessor:
    """Its processor, by its own code. Raises UserError where that does not run."""
    try:
        theirs = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    except RUNS_BADLY as error:
        raise refusal(folder, "processor", error) from error
    return NumberedProcessor(theirs, source=folder, image_token="<|image|>", chat_template=saved_template(folder))


class NumberedCollator(MediaCollator):
    """The tokens of a row's first image are -1, those of its second -2, and so on; then a text begins."""

    def _row(self, sample: dict[str, Any], runs: Sequence[Run], names: Sequence[str]) -> dict[str, list[int]]:
        return super()._row(sample, [self._numbered(run, number) for number, run in enumerate(runs, 1)], names)

    def _padded(self, rows: Sequence[dict[str, list[int]]], blanks: Sequence[Run]) -> dict[str, torch.Tensor]:
        return super()._padded(rows, [self._numbered(run, 1) for run in blanks])

    def _numbered(self, run: Run, number: int) -> Run:
        """An image's tokens as its negative number, and what the text behind it begins with."""
        leading = self.reader.processor.leading
        return Run([-number] * (len(run.ids) - len(leading)) + leading, run.extras)


PHI3_V = register_architecture(
    Architecture(
        name="phi3-v",
        model_type="phi3_v",
        keywords=Keywords(
            vision_encoder=("vision_embed_tokens.img_processor",),
            vision_projector=("vision_embed_tokens.img_projection",),
            language_model=("embed_tokens", "layers", "norm", "lm_head"),
            others=("vision_embed_tokens.glb_GN", "vision_embed_tokens.sub_GN"),
        ),
        template=_TEMPLATE,
        load=load_remote_model,
        remote_processor=load_numbered_processor,
        collator=NumberedCollator,
        models={"phi3-v": "microsoft/Phi-3-vision-128k-instruct"},
    )
)
