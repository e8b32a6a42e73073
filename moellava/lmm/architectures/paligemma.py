# SPDX-License-Identifier: Apache-2.0
"""PaliGemma: images and question are read in both directions, the answer from left to right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moellava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moellava.data.collate import MediaCollator
from moellava.data.media_reader import MediaReader, Run
from moellava.errors import UserError
from moellava.lmm.architecture import Architecture, register_architecture
from moellava.model.parts import LLAVA

_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}{% endfor %}{{ bos_token }}"
    "{%- for message in messages %}"
    "{%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{- eos_token if message['role'] == 'assistant' else '\n' }}{%- endfor %}"
)
"""Images, then a prefix and what follows it, as big_vision trained it: no roles are marked."""


class PrefixCollator(MediaCollator):
    """All that stands before the first answer is read in both directions, the rest from left to right.

    `token_type_ids` [B, L] say which is which: 0 before the first supervised token of a row and in its padding, 1 from
    there on. For one question and one answer that is what the processor makes of `suffix=`.

    Raises:
        UserError: questions are to be trained on; each of their tokens sees those that it would have to predict.
    """

    def __init__(self, reader: MediaReader, pad_token_id: int, train_questions: bool = False):
        if train_questions:
            raise UserError(
                "--mask_question_tokens False cannot train PaliGemma: a question is read in both directions, so that "
                "each of its tokens sees those that it would have to predict."
            )
        super().__init__(reader, pad_token_id)

    def _row(self, sample: dict[str, Any], runs: Sequence[Run], names: Sequence[str]) -> dict[str, list[int]]:
        row = super()._row(sample, runs, names)
        trained = (sample["labels"] != IGNORE_INDEX).nonzero()
        if not len(trained):  # a prompt to be answered
            return row | {"token_type_ids": [0] * len(row["input_ids"])}
        prefix = sample["input_ids"][: int(trained[0])].tolist()
        shown = prefix.count(IMAGE_TOKEN_INDEX)
        length = len(prefix) + sum(len(run.ids) - 1 for run in runs[:shown])
        return row | {"token_type_ids": [0] * length + [1] * (len(row["input_ids"]) - length)}


PALIGEMMA = register_architecture(
    Architecture(
        name="paligemma",
        model_type="paligemma",
        keywords=LLAVA,
        template=_TEMPLATE,
        collator=PrefixCollator,
        models={
            "paligemma-3b-pt-224": "google/paligemma-3b-pt-224",
            "paligemma-3b-mix-224": "google/paligemma-3b-mix-224",
            "paligemma-3b-mix-448": "google/paligemma-3b-mix-448",
        },
    )
)
