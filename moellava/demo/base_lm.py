# SPDX-License-Identifier: Apache-2.0
"""A tiny Qwen2-architecture language model and its tokenizer, which have read the training split's text and no picture.

What it reads is laid out as the `qwen` template lays out a conversation, with the caption where the image will stand:
the model learns what the questions mean, and the three stages are left with what they are for.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from moellava.conversation import Piece, conv_templates
from moellava.demo.easy_vqa_data import TrainImage
from moellava.log import get_logger

log = get_logger("moellava.playground")

END = "<|endoftext|>"
VOCAB_ROWS = 512
"""Rows of the embedding: the tokenizer fills fewer, and `<|extra_0|>` and `<image>` take free ones."""

FREE_ROWS = 16
MAX_LENGTH = 2048
"""Tokens of the longest text that the model takes."""

MAX_TURNS = 8
"""Questions in a conversation that the language model reads; the stages go on to all of an image's."""

ANSWER_WEIGHT = 10.0
"""Weight of an answer's tokens in the loss. Questions follow each other at random, and with equal weights what can be
learnt, the answers, drowned in what cannot: after 300 steps the model still guessed."""


def conversation_pieces(image: TrainImage, turns: int, shuffler: random.Random) -> list[Piece]:
    """Some of an image's questions and answers in the `qwen` template, its caption in the image's place."""
    conversation = conv_templates["qwen"].start()
    asker, answerer = conversation.roles
    asked = shuffler.sample(image.turns, min(turns, len(image.turns)))
    for number, (question, answer) in enumerate(asked):
        lead = f"{image.facts.caption}\n" if image.facts.caption and not number else ""
        conversation.append_message(asker, lead + question)
        conversation.append_message(answerer, answer)
    return conversation.pieces()


def caption_pieces(image: TrainImage) -> list[Piece]:
    """A caption as stage 1 will ask for it."""
    return [Piece(f"{image.facts.caption or 'a shape'}\n")]


def joined(pieces: list[Piece]) -> list[tuple[bool, str]]:
    """(trained, text) of neighbouring pieces with one flag: a separator's space belongs to the word that follows it."""
    return [(flag, "".join(p.text for p in group)) for flag, group in groupby(pieces, key=attrgetter("trained"))]


def make_tokenizer(images: list[TrainImage]) -> Qwen2Tokenizer:
    """Byte-level BPE over the training text: its words become one token each, every other text stays possible."""
    shuffler = random.Random(0)
    texts = (
        text.removesuffix(END)
        for image in images
        for _, text in joined(conversation_pieces(image, len(image.turns), shuffler)) + joined(caption_pieces(image))
    )
    return tokenizer_of(texts, VOCAB_ROWS)


def tokenizer_of(texts: Iterable[str], rows: int) -> Qwen2Tokenizer:
    """Byte-level BPE over some texts, for an embedding of so many rows."""
    return Qwen2Tokenizer(model_max_length=MAX_LENGTH).train_new_from_iterator(
        texts,
        vocab_size=rows - FREE_ROWS,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )


def lm_config(
    tokenizer: Qwen2Tokenizer,
    *,
    rows: int = VOCAB_ROWS,
    width: int = 128,
    units: int = 352,
    layers: int = 4,
    heads: int = 4,
) -> Qwen2Config:
    """By default about 0.9 M parameters.

    Args:
        tokenizer: whose special tokens the config names.
        rows: of the embedding.
        width: of the hidden states.
        units: of an MLP.
        layers, heads: how many.
    """
    return Qwen2Config(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=units,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        # Five times the usual width: at this size the usual one is so near zero that attention takes long to form.
        initializer_range=0.1,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def encode(pieces: list[Piece], tokenizer: Qwen2Tokenizer) -> tuple[list[int], list[float]]:
    """Token ids and their weights in the loss."""
    ids: list[int] = []
    weights: list[float] = []
    for trained, text in joined(pieces):
        tokens = tokenizer(text).input_ids
        ids += tokens
        weights += [ANSWER_WEIGHT if trained else 1.0] * len(tokens)
    return ids, weights


def pad_batch(rows: list[tuple[list[int], list[float]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights [B, L], filled with weight 0 on the right: causal attention never looks there."""
    ids = [torch.tensor(row) for row, _ in rows]
    weights = [torch.tensor(row) for _, row in rows]
    return pad_sequence(ids, batch_first=True), pad_sequence(weights, batch_first=True)


def weighted_loss(logits_BLV: torch.Tensor, ids_BL: torch.Tensor, weights_BL: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy, averaged by weight."""
    losses_BL = F.cross_entropy(logits_BLV[:, :-1].transpose(1, 2), ids_BL[:, 1:], reduction="none")
    return (losses_BL * weights_BL[:, 1:]).sum() / weights_BL[:, 1:].sum()


def reading(
    images: list[TrainImage], *, single_turn: bool, questions: int, shuffler: random.Random
) -> list[list[Piece]]:
    """One batch of texts: conversations, and a few captions as stage 1 will ask for them.

    Single questions, without the template's system text, come first: a question about a colour finds it in the caption
    alone, not in earlier questions too, and what takes many steps in conversations is learnt in few.
    """
    turns = 1 if single_turn else shuffler.randint(1, MAX_TURNS)
    texts = [conversation_pieces(image, turns, shuffler) for image in shuffler.sample(images, questions // turns)]
    if single_turn:
        texts = [pieces[1:] for pieces in texts]
    return texts + [caption_pieces(image) for image in shuffler.sample(images, len(texts) // 8)]


def train_lm(
    images: list[TrainImage],
    tokenizer: Qwen2Tokenizer,
    *,
    steps: int,
    questions: int = 192,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> Qwen2ForCausalLM:
    """Next-token prediction on `questions` questions a step: single ones at first, then conversations."""
    torch.manual_seed(seed)
    shuffler = random.Random(seed)
    model = Qwen2ForCausalLM(lm_config(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(1, steps + 1):
        texts = reading(images, single_turn=step <= steps // 2, questions=questions, shuffler=shuffler)
        ids, weights = pad_batch([encode(pieces, tokenizer) for pieces in texts])
        logits = model(input_ids=ids).logits
        loss = weighted_loss(logits, ids, weights)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps:
            answers = (weights[:, 1:] == ANSWER_WEIGHT) & (ids[:, 1:] != tokenizer.eos_token_id)
            right = (logits[:, :-1].argmax(-1) == ids[:, 1:])[answers].float().mean()
            seconds = time.monotonic() - started
            log.info(
                "LM step %d of %d: loss %.4f, %.1f%% of the answers right (%.0f s)",
                step,
                steps,
                loss,
                100 * right,
                seconds,
            )
    return model.eval()


def save_lm(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, path: Path) -> None:
    """A folder that `--model_name_or_path` takes."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
