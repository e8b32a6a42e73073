# SPDX-License-Identifier: Apache-2.0
"""One way to answer: Hugging Face's `generate`, with what is ours as processors and criteria.

Shapes: B rows, L prompt tokens (image patches counted), V vocabulary. With beams every row stands several times in a
run, its copies one behind the other.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from numbers import Integral, Real
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from moellava.errors import UserError
from moellava.model.features import FeatureCache
from moellava.moe import moe_layers, set_routing_context
from moellava.moe.modes import evaluating
from moellava.serve.ending import Ending, SaysTerminator

FIXED = {
    "max_length": None,  # `max_new_tokens` is given; both together are a warning
    "stop_strings": None,  # `Ending` says where an answer ends
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "use_cache": True,
}
"""What a folder's generation_config.json must not decide, for what comes back would be another thing."""

RANGES: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "max_new_tokens": (Integral, lambda value: value >= 1, "an answer has a whole number of tokens, at least one"),
    "temperature": (Real, lambda value: 0 <= value < math.inf, "use 0 for the likeliest token, or more to sample"),
    "top_p": (Real, lambda value: 0 < value <= 1, "use a share of probability above 0, at most 1"),
    "seed": (Integral, lambda value: -(2**63) <= value < 2**64, "use an integer of 64 bits"),
    "top_k": (Integral, lambda value: value >= 0, "use a whole number of tokens, or 0 for all"),
    "num_beams": (Integral, lambda value: value >= 1, "use 1 for no beam search, or a larger whole number"),
    "repetition_penalty": (
        Real,
        lambda value: 0 < value < math.inf,
        "use 1 for none, more than 1 against repetition",
    ),
}
"""Field of `Sampling` -> its type, whether a value means something (NaN never does), and what does."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the fields are `generate`'s arguments of these names.

    Args:
        max_new_tokens: longest answer, in tokens.
        temperature: what logits are divided by before sampling; 0 takes the likeliest token, or with beams the
            likeliest answer found.
        top_p: sampling keeps the smallest set of tokens whose probability reaches this (1: all).
        seed: of the sampling; None takes torch's generator as it stands.
        top_k: sampling keeps so many of the likeliest tokens (0: all).
        num_beams: answers that are followed at once, of which the likeliest is given.
        repetition_penalty: makes tokens less likely that were read or said (1: not at all); None takes what the
            model's generation_config.json says.

    Raises:
        UserError: a value that means nothing, or that would not act.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = 0
    num_beams: int = 1
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        optional = {option.name for option in fields(self) if option.default is None}
        for name, (number, means_something, advice) in RANGES.items():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, number) or not means_something(value):
                raise UserError(f"{name} is {value!r}: {advice}.")
        for name, idle in {"top_p": 1, "top_k": 0}.items():
            if self.temperature == 0 and getattr(self, name) != idle:
                raise UserError(
                    f"{name} is {getattr(self, name)}, but nothing is sampled at temperature 0: give a temperature "
                    f"above 0, or leave {name} out."
                )

    def options(self) -> dict[str, Any]:
        """Arguments of `generate`. Given in full, for a folder's generation_config.json fills in what is not."""
        chosen: dict[str, Any] = {"do_sample": self.temperature > 0, "num_beams": self.num_beams}
        if self.temperature > 0:  # floats: Hugging Face's processors refuse integers
            chosen |= {"temperature": float(self.temperature), "top_p": float(self.top_p), "top_k": self.top_k}
        if self.repetition_penalty is not None:
            chosen["repetition_penalty"] = float(self.repetition_penalty)
        return chosen


class Limits(StoppingCriteria):
    """Ends each row at its own length.

    Args:
        limits: the longest answer of each row, in tokens.
        prompt_length: L.
    """

    def __init__(self, limits: Sequence[int], prompt_length: int):
        self.limits = torch.tensor(limits)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        limits = self.limits.repeat_interleave(len(input_ids) // len(self.limits))  # beams, and candidates for them
        return (input_ids.shape[1] - self.prompt_length >= limits).to(input_ids.device)


class Abandoned(StoppingCriteria):
    """Ends all rows once nobody reads them any more."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class NoPlaceholders(LogitsProcessor):
    """Rules out tokens that stand for patches: as an answer they mean nothing.

    Args:
        placeholders: ids of image and video tokens; some models have them beyond the vocabulary of their logits.
    """

    def __init__(self, placeholders: Sequence[int]):
        self.placeholders = sorted(set(placeholders))

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        known = [token for token in self.placeholders if token < scores.shape[-1]]
        return scores.index_fill(-1, torch.tensor(known, dtype=torch.long, device=scores.device), -math.inf)


class TokenQueue(BaseStreamer):
    """Hands the tokens of one row from the thread that generates to the one that iterates."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[int | None] = SimpleQueue()
        self.is_prompt = True

    def put(self, value: Tensor) -> None:
        """Takes the prompt, and then one token at a time."""
        if not self.is_prompt:
            self.queue.put(int(value))
        self.is_prompt = False

    def end(self) -> None:
        """Ends the iteration."""
        self.queue.put(None)

    def __iter__(self) -> Iterator[int]:
        while (token := self.queue.get()) is not None:
            yield token


@contextmanager
def routing_told(model: nn.Module) -> Iterator[None]:
    """Tells the routers of a sparse model which tokens of a forward are padding, before each; then nothing again.

    Where capacity is limited, padding must not take the room that tokens need. Tokens that are being said all count.
    """

    is_told = True  # of whatever there was before

    def tell(_: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        nonlocal is_told
        mask_BL, length = inputs.get("attention_mask"), inputs["input_ids"].shape[1]
        if mask_BL is not None and length > 1:  # the mask begins with what the cache holds; its last columns count
            set_routing_context(model, token_mask=mask_BL[:, -length:].bool())
            is_told = True
        elif is_told:  # once an answer, for looking for the layers takes as long as one of them
            set_routing_context(model)
            is_told = False

    hook = model.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        set_routing_context(model)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """torch's generators begin at `seed`, and are afterwards what they were before; None leaves them alone.

    `generate` draws from torch's global generators: what else draws meanwhile, in another thread, disturbs it.
    """
    if seed is None:
        yield
        return
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def generate(
    model: Any,
    batch: Mapping[str, Any],
    ending: Ending,
    sampling: Sampling,
    *,
    placeholders: Sequence[int],
    pad_token_id: int | None,
    limits: Sequence[int] | None = None,
    features: FeatureCache | None = None,
    synced: bool = False,
    criteria: Sequence[StoppingCriteria] = (),
    processors: Sequence[LogitsProcessor] = (),
) -> list[list[int]]:
    """The tokens of each row's answer, with the one that ended it, if any did. `ending.text` makes them text.

    Args:
        model: a Hugging Face model; it generates in evaluation mode and goes back to the mode that it was in.
        batch: what the model takes: `input_ids` and `attention_mask` [B, L], left-padded, `pixel_values` … Tensors are
            moved to the model's device, and those of floats to its dtype.
        ending: where answers end.
        sampling: how tokens are chosen.
        placeholders: tokens that are never answers: those of images and videos.
        pad_token_id: fills rows that have ended; None takes a stop token.
        limits: the longest answer of each row, in tokens, where the context has not room for `max_new_tokens`.
        features: what images and videos became when they were shown before; None encodes them anew.
        synced: go on with dummy steps until all processes have ended, for a forward that is a common effort.
        criteria: further ones that end rows; each sees every token as it is said.
        processors: further ones, which see the model's logits before ours do.
    """
    arguments = (model, batch, ending, sampling, placeholders, pad_token_id, limits, features)
    return _generate(*arguments, *criteria, processors=processors, synced_gpus=synced)


def stream(
    model: Any,
    batch: Mapping[str, Any],
    ending: Ending,
    sampling: Sampling,
    *,
    placeholders: Sequence[int],
    pad_token_id: int | None,
    limits: Sequence[int] | None = None,
    features: FeatureCache | None = None,
) -> Iterator[str]:
    """The text of one row's answer in pieces, as they are certain; their join is the text of what `generate` gives.

    A thread generates and ends when the iteration does, at its next token at the latest; its error is raised here.
    Beams are certain at the end: they come in one piece. Arguments: see `generate`.
    """
    if len(batch["input_ids"]) != 1:
        raise ValueError(f"a stream is of one row, and this batch has {len(batch['input_ids'])}")
    arguments = (model, batch, ending, sampling, placeholders, pad_token_id, limits, features)
    shown, said = "", list[int]()
    if sampling.num_beams > 1:
        (said,) = _generate(*arguments)
    else:
        tokens, abandoned = TokenQueue(), threading.Event()
        with ThreadPoolExecutor(max_workers=1) as pool:
            run = pool.submit(_generate, *arguments, Abandoned(abandoned), streamer=tokens)
            run.add_done_callback(lambda _: tokens.end())  # an error in the thread must not leave us waiting
            try:
                for token in tokens:
                    said.append(token)
                    certain = ending.certain(said)
                    if certain.startswith(shown) and len(certain) > len(shown):
                        yield certain[len(shown) :]
                        shown = certain
                (said,) = run.result()
            finally:
                abandoned.set()
    if rest := ending.text(said)[len(shown) :]:
        yield rest


def _generate(
    model: Any,
    batch: Mapping[str, Any],
    ending: Ending,
    sampling: Sampling,
    placeholders: Sequence[int],
    pad_token_id: int | None,
    limits: Sequence[int] | None,
    features: FeatureCache | None,
    *criteria: StoppingCriteria,
    processors: Sequence[LogitsProcessor] = (),
    **options: Any,
) -> list[list[int]]:
    """See `generate`; further criteria and options go to Hugging Face's."""
    inputs = {name: _moved(value, model) for name, value in batch.items()}
    rows, prompt_length = inputs["input_ids"].shape
    longest = [min(limit, sampling.max_new_tokens) for limit in limits or [sampling.max_new_tokens] * rows]
    stops: list[StoppingCriteria] = [Limits(longest, prompt_length), *criteria]
    if ending.plain:
        stops.append(SaysTerminator(ending, prompt_length))
    sparse = bool(moe_layers(model))
    if sparse:  # a static cache hands its layers a mask [B, 1, L, K], which does not tell what is padding
        options["cache_implementation"] = None
    with evaluating(model), seeded(sampling.seed), routing_told(model) if sparse else nullcontext():
        if features is not None:
            inputs = features.encoded(model, inputs, batch)
        output_BL = model.generate(
            **inputs,
            **FIXED,
            **sampling.options(),
            **options,
            max_new_tokens=max(longest),
            eos_token_id=ending.stop_ids or None,
            pad_token_id=pad_token_id,
            logits_processor=LogitsProcessorList([*processors, NoPlaceholders(placeholders)]),
            stopping_criteria=StoppingCriteriaList(stops),
        )
    said = output_BL[:, prompt_length:].tolist()
    return [ending.cut(row[:limit]) for row, limit in zip(said, longest, strict=True)]


def _moved(value: Any, model: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)
