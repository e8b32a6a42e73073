# SPDX-License-Identifier: Apache-2.0
"""Answers to a few records of the evaluation data, shown beside the evaluation's loss (`--eval_samples N`).

A prompt is a sample of the data set up to its first supervised token, so that it is exactly what training has shown the
model; the reference is the run of labels that follows. Answers take the likeliest token each step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from moellava.constants import IGNORE_INDEX
from moellava.data.collate import PLACEHOLDERS, UNREADABLE
from moellava.log import get_logger, is_rank_zero
from moellava.moe import moe_layers
from moellava.serve.ending import Ending
from moellava.serve.generate import Sampling, generate
from moellava.train.folder import is_sharded

logger = get_logger(__name__)

ANSWER_TOKENS = 64
"""Longest sample answer, in tokens."""


@dataclass
class Answered:
    """A record of the evaluation data with what the model says to its first question.

    Attributes:
        record: its name.
        prompt, answer, reference: texts, without special tokens.
    """

    record: str
    prompt: str
    answer: str
    reference: str


class SampleAnswers(TrainerCallback):
    """Logs answers after each evaluation, and writes them for TensorBoard where that is asked for.

    Where parameters are split over processes (ZeRO-3) or experts are (`--ep_size`), a forward is a common effort: all
    processes then answer the same records together. Otherwise the first one answers, and the others go on.

    Args:
        trainer: whose model and evaluation data they are.
        count: how many records, spread evenly over the data.
    """

    def __init__(self, trainer: Any, count: int):
        self.trainer = trainer
        total = len(trainer.eval_dataset)
        self.chosen = [place * total // min(count, total) for place in range(min(count, total))]

    def on_evaluate(self, args, state, control, **kwargs):
        """Answers, on every process that has to take part, and shows them on the first."""
        model = self.trainer.model
        together = is_common_effort(model)
        if not (together or is_rank_zero()):
            return
        samples = map(self.trainer.eval_dataset.__getitem__, self.chosen)
        answered = [self._answer(model, sample, together) for sample in samples if UNREADABLE not in sample]
        if is_rank_zero():
            self._show(answered, state.global_step)

    def _answer(self, model: Any, sample: dict[str, Any], together: bool) -> Answered:
        vlm = self.trainer.vlm
        prompt, reference = split_at_answer(sample)
        (said,) = generate(
            model,
            self.trainer.data_collator.of_prompts()([prompt]),
            self.ending,
            Sampling(ANSWER_TOKENS),
            placeholders=vlm.placeholder_ids,
            pad_token_id=vlm.tokenizer.pad_token_id,
            synced=together,
        )
        shown = [token for token in prompt["input_ids"].tolist() if token not in PLACEHOLDERS]
        question = vlm.tokenizer.decode(shown, skip_special_tokens=True).strip()
        return Answered(prompt["record"], question, self.ending.text(said), self.ending.text(reference))

    @cached_property
    def ending(self) -> Ending:
        """Where an answer ends."""
        vlm = self.trainer.vlm
        return Ending(vlm.tokenizer, vlm.encoder.renderer.terminator, vlm.model.generation_config)

    def _show(self, answered: Sequence[Answered], step: int) -> None:
        for number, one in enumerate(answered):
            logger.info(
                "Sample answer at step %d, %s\n  prompt    %r\n  answer    %r\n  reference %r",
                step, one.record, one.prompt, one.answer, one.reference,
            )  # fmt: skip
            text = f"**{one.record}**\n\n{one.prompt}\n\n*answer:* {one.answer}\n\n*reference:* {one.reference}"
            for writer in self._writers():
                writer.add_text(f"eval/sample_{number}", text, step)

    def _writers(self) -> Iterator[Any]:
        """TensorBoard's, if the run has one."""
        callbacks = self.trainer.callback_handler.callbacks
        writers = (callback.tb_writer for callback in callbacks if isinstance(callback, TensorBoardCallback))
        return (writer for writer in writers if writer is not None)


def is_common_effort(model: nn.Module) -> bool:
    """Whether a forward needs all processes: split parameters, or experts spread over processes."""
    return is_sharded(model) or any(getattr(layer, "ep_size", 1) > 1 for _, layer in moe_layers(model))


def split_at_answer(sample: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """A sample up to its first answer, with the media shown until there; and that answer's ids."""
    trained = sample["labels"] != IGNORE_INDEX
    begin = int(trained.long().argmax())
    length = int(trained[begin:].long().cumprod(0).sum())
    ids = sample["input_ids"][:begin]
    shown = sum(token in PLACEHOLDERS for token in ids.tolist())
    prompt = sample | {"input_ids": ids, "labels": torch.full_like(ids, IGNORE_INDEX), "media": sample["media"][:shown]}
    return prompt, sample["labels"][begin : begin + length].tolist()
