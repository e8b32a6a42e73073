# SPDX-License-Identifier: Apache-2.0
"""What a run shows of its data: counts and the first sample before it starts, and answers to a few records of the
evaluation data beside the evaluation's loss (`--eval_samples N`).

A prompt is a sample of the data set up to its first supervised token, so that it is exactly what training has shown the
model; the reference is the run of labels that follows. Answers take the likeliest token each step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from moellava.constants import (
    DEFAULT_IMAGE_TOKEN,
    DEFAULT_VIDEO_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    VIDEO_TOKEN_INDEX,
)
from moellava.data.collate import PLACEHOLDERS, UNREADABLE
from moellava.data.dataset import SupervisedDataset
from moellava.data.view import listed, view_text, views_of
from moellava.log import get_logger, is_rank_zero
from moellava.moe import moe_layers
from moellava.serve.ending import Ending
from moellava.serve.generate import Sampling, generate
from moellava.train.folder import is_sharded
from moellava.train.run_log import RunLog

logger = get_logger(__name__)

MARKS = {IMAGE_TOKEN_INDEX: DEFAULT_IMAGE_TOKEN, VIDEO_TOKEN_INDEX: DEFAULT_VIDEO_TOKEN}
"""What stands for placeholders in text."""

ANSWER_TOKENS = 64
"""Longest sample answer, in tokens."""


@dataclass
class Answered:
    """A record of the evaluation data with what the model says to its first question.

    Attributes:
        record: its name.
        prompt: all that the model reads, special tokens and a mark for each image or video among it.
        answer, reference: texts, without special tokens.
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
        run_log: keeps them, too.
    """

    def __init__(self, trainer: Any, count: int, run_log: RunLog | None = None):
        self.trainer = trainer
        self.run_log = run_log
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
        question = prompt_text(vlm.tokenizer, prompt["input_ids"].tolist())
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
            if self.run_log is not None:
                self.run_log.add("sample", step, asdict(one))
            text = f"**{one.record}**\n\n{one.prompt}\n\n*answer:* {one.answer}\n\n*reference:* {one.reference}"
            for writer in self._writers():
                writer.add_text(f"eval/sample_{number}", text, step)

    def _writers(self) -> Iterator[Any]:
        """TensorBoard's, if the run has one."""
        callbacks = self.trainer.callback_handler.callbacks
        writers = (callback.tb_writer for callback in callbacks if isinstance(callback, TensorBoardCallback))
        return (writer for writer in writers if writer is not None)


def prompt_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Ids as text, special tokens included; <image> and <video> where placeholders stand."""
    groups = groupby(ids, key=lambda token: token if token in PLACEHOLDERS else None)
    parts = (
        tokenizer.decode(list(group)) if token is None else MARKS[token] * len(list(group)) for token, group in groups
    )
    return "".join(parts)


def counts_text(called: str, dataset: SupervisedDataset) -> str:
    """What a data set holds, in a line: what became of its records, media, and lengths."""
    lengths, shows = np.sort(dataset.positions), int(dataset.with_media.sum())
    return (
        f"{called}: {listed(dataset.report())}, {shows} of them with images or videos; positions {lengths[0]} to "
        f"{lengths[-1]}, median {lengths[len(lengths) // 2]}, {int(lengths.sum(dtype=np.int64)):,} in all"
    )


def first_sample(dataset: SupervisedDataset, trains_questions: bool = False) -> str:
    """The first sample as `moellava inspect` shows it: what is trained on stands in «…». Lines begin with a bar.

    Args:
        trains_questions: whether every token is trained on but media (`--mask_question_tokens False`).
    """
    record, name, answer = dataset.record_of(0)
    limit = dataset.max_length if dataset.overlong == "truncate" else None
    views = views_of(dataset.encoder, record, name, dataset.files, limit)
    view = next(one for one in views if answer is None or one.record.endswith(f", answer {answer}"))
    if trains_questions:
        for token in view.tokens:
            token.label = token.id if token.id not in PLACEHOLDERS else IGNORE_INDEX
        view.counts["supervised_tokens"] = sum(token.trained for token in view.tokens)
    lines = view_text(view, color=False).splitlines()
    return "\n".join(["The first sample; «…» is what is trained on:", *(f"  | {line}" for line in lines)])


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
