# SPDX-License-Identifier: Apache-2.0
"""How a causal language model is put together, found out by trying, so that none has to be listed.

Hugging Face's LLaVA takes a *body* (ids or embeddings -> hidden states) and gives it a plain linear head of its own. So
four things are tried on a few random tokens:

    body(ids) == body(embeddings)       else images, which come as embeddings, would be read another way than words
    hidden states look back only        else it is no decoder
    a cached step == the whole          else `generate` fails, or says something else
    logits as a function of head(body)  as it is · × a constant · + a bias · through a softcap

For the last the body's output is scaled before it reaches the head: to zero, which leaves a bias alone, and far up,
where a softcap bends what looks straight at the size of common logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache
from transformers.models.llava.modeling_llava import LlavaModel

from moellava.errors import UserError

TOKENS = 9
"""Tokens of the probe; the last two of them are read with a cache."""

LOUD = 64.0
"""The largest logit of the probe that looks for a softcap. Those in use cap at 15 to 50."""

ROUNDING = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""What rounding may change, as a fraction of the tensor's norm."""

KEPT_TIE = "embed_tokens.weight"
"""Where a body has the embedding that LLaVA's head can share."""

CACHE = next(name for name in ("cache", "past_key_values") if name in signature(LlavaModel.forward).parameters)
"""The name under which LLaVA hands the cache on: the second before transformers 5.24."""

FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError, ImportError)
"""What a class raises that does not take what LLaVA gives it. Foreign code runs in a probe, so these are answers."""


class CannotComposeError(UserError):
    """A language model that Hugging Face's LLaVA cannot hold; the message ends with the reason that a probe found."""


@dataclass(frozen=True)
class Head:
    """logits = cap(scale × weight · hidden + bias).

    Args:
        weight: [V, D].
        scale: the constant that is folded into the weights.
        bias: [V], or None.
        softcap: s of s · tanh(logits / s), or None.
    """

    weight: Tensor
    scale: float = 1.0
    bias: Tensor | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Anatomy:
    """The parts of a causal language model.

    Args:
        body: what `AutoModel` builds for its config.
        head: how its logits come about.
        ties_head: whether the head is the embedding, in a way that a composed model keeps.
        unties_head: whether the head is the embedding, and a composed model needs it apart.
        embedding_scale: the constant that words are multiplied by and embeddings are not; it is folded into the
            embedding.
    """

    body: nn.Module
    head: Head
    ties_head: bool
    unties_head: bool
    embedding_scale: float = 1.0

    @property
    def verdict(self) -> str:
        """How it is composed, in a word or two."""
        if self.head.softcap is not None:
            return "softcap"
        if self.head.bias is not None:
            return "head bias"
        if self.head.scale != 1.0 or self.embedding_scale != 1.0:
            return "folded"
        return "untied" if self.unties_head else "as is"


def anatomy_of(model: Any) -> Anatomy:
    """The parts of a causal language model with its weights, in evaluation mode.

    Raises:
        CannotComposeError: LLaVA cannot hold it. The reason is the first that was found.
    """
    body = body_of(model)
    ids = probe_ids(model)
    with torch.no_grad():
        embedding_scale = check_body(body, model.get_input_embeddings(), ids)
        head = head_of(model, body, ids)
    embedding = model.get_input_embeddings().weight
    is_tied = head.weight is embedding
    keeps = dict(body.named_parameters()).get(KEPT_TIE) is embedding and head.scale == embedding_scale == 1.0
    return Anatomy(body, head, is_tied and keeps, is_tied and not keeps, embedding_scale)


def body_of(model: Any) -> nn.Module:
    """The submodule that `AutoModel` would build for the model's config. Raises CannotComposeError: there is none."""
    try:
        with torch.device("meta"):
            wanted = type(AutoModel.from_config(model.config, trust_remote_code=False))
    except FAILURES as error:
        raise CannotComposeError(f"AutoModel builds no body for it: {first_line(error)}") from error
    found = [module for module in model.modules() if type(module) is wanted]
    if len(found) != 1 or found[0] is model:
        raise CannotComposeError(
            f"LLaVA would take a {wanted.__name__} for its body, of which {type(model).__name__} has {len(found)}"
        )
    return found[0]


def probe_ids(model: Any) -> Tensor:
    """[2, `TOKENS`] random ids from the middle of the vocabulary, where no special tokens are."""
    rows = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(rows // 8, rows // 2, (2, TOKENS), generator=generator).to(model.device)


def check_body(body: nn.Module, embedding: nn.Module, ids: Tensor) -> float:
    """The factor that the body puts on words alone, see `Anatomy`.

    Raises:
        CannotComposeError: embeddings are not as good as ids, the body looks ahead, or it has no cache.
    """
    width = body.config.hidden_size
    if embedding.weight.shape[1] != width:
        raise CannotComposeError(f"its embeddings are {embedding.weight.shape[1]} wide, its hidden states {width}")
    whole = run(body, "ids", input_ids=ids)
    embeds, scale = embedding(ids), 1.0
    given = run(body, "embeddings", inputs_embeds=embeds)
    if not alike(given, whole):
        scale = embedding_scale(body, ids, embeds)
        embeds = embeds * scale
        given = run(body, "embeddings", inputs_embeds=embeds)
    if not alike(given, whole):
        raise CannotComposeError(
            f"it computes something else from embeddings than from ids ({difference(given, whole):.1%} off), "
            "and images come as embeddings"
        )
    # The last embedding becomes one that is no word's, as a patch of an image is.
    changed = torch.cat((embeds[:, :-1], embeds.mean(1, keepdim=True)), 1)
    if not alike(run(body, "embeddings of no word", inputs_embeds=changed)[:, :-1], whole[:, :-1]):
        raise CannotComposeError("its hidden states depend on later tokens, so it is no decoder")
    stepped = read_on(body, input_ids=ids)
    given = read_on(body, inputs_embeds=embeds)
    if not alike(given, stepped):
        raise CannotComposeError(
            f"with a cache it computes something else from embeddings than from ids ({difference(given, stepped):.1%} "
            "off)"
        )
    return scale


def embedding_scale(body: nn.Module, ids: Tensor, embeds: Tensor) -> float:
    """The constant that explains what comes before the first layer of ids and of embeddings; 1 where none does."""
    seen = []
    for given in ({"input_ids": ids}, {"inputs_embeds": embeds.clone()}):
        try:
            output = body(**given, use_cache=False, output_hidden_states=True)
        except FAILURES:
            return 1.0
        if not getattr(output, "hidden_states", None):
            return 1.0
        seen.append(output.hidden_states[0].double())
    return float((seen[0] * seen[1]).sum() / seen[1].square().sum())


def read_on(body: nn.Module, **inputs: Tensor) -> Tensor:
    """The hidden states [B, D] of the last token, which is read with a cache of those before, as the one before it is.

    Raises:
        CannotComposeError: the body keeps no cache, or does not take it back.
    """
    ((name, tokens),) = inputs.items()
    attention = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    past: Any = DynamicCache(config=body.config)  # what `generate` begins with
    for start, stop in ((0, TOKENS - 2), (TOKENS - 2, TOKENS - 1), (TOKENS - 1, TOKENS)):
        given = {name: tokens[:, start:stop].clone(), "attention_mask": attention[:, :stop], CACHE: past}
        try:
            output = body(**given, use_cache=True)
        except FAILURES as error:
            raise CannotComposeError(f"its body does not read on from a cache: {first_line(error)}") from error
        past = getattr(output, CACHE, None)
        if past is None:
            raise CannotComposeError("it keeps no key-value cache, which LLaVA hands on from token to token")
    return output[0][:, -1]


def head_of(model: Any, body: nn.Module, ids: Tensor) -> Head:
    """How logits come from hidden states. Raises CannotComposeError where a linear head cannot say it."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or weight.dim() != 2:
        raise CannotComposeError(f"its head is a {type(head).__name__}, no linear layer")
    if weight.shape != (model.config.vocab_size, body.config.hidden_size):
        raise CannotComposeError(
            f"its head is {tuple(weight.shape)}, but its config says {model.config.vocab_size} tokens and "
            f"{body.config.hidden_size} hidden units"
        )
    source = source_of(model, body, ids)
    hidden, logits = logits_at(model, source, ids, 1.0)
    largest = float(linear(hidden, weight).abs().max())
    _, nothing = logits_at(model, source, ids, 0.0)
    loud, above = logits_at(model, source, ids, LOUD / max(largest, 1e-6))
    return fit_head(weight, nothing, [(hidden, logits), (loud, above)], ROUNDING[weight.dtype])


def fit_head(weight: Tensor, nothing: Tensor, seen: list[tuple[Tensor, Tensor]], rounding: float) -> Head:
    """The head that explains all logits.

    Args:
        weight: [V, D].
        nothing: [N, V] logits of hidden states that are zero.
        seen: hidden states [N, D] and their logits [N, V], the loudest last.
        rounding: see `ROUNDING`.

    Raises:
        CannotComposeError: there is none.
    """
    bias = nothing[0] if nothing.abs().max() > 0 else None
    offset = 0.0 if bias is None else bias
    raw, logits = linear(seen[-1][0], weight), seen[-1][1] - offset
    scale = float((raw.double() * logits.double()).sum() / raw.double().square().sum())
    scale = 1.0 if abs(scale - 1.0) < rounding / 10 else scale
    softcap = None
    if difference(raw * scale, logits) > rounding:
        scale, softcap = 1.0, softcap_of(raw, logits)
    head = Head(weight, scale, bias, softcap)
    for hidden, wanted in seen:
        found = logits_of(head, hidden)
        if difference(found, wanted) > rounding or (softcap is not None and bias is not None):
            raise CannotComposeError(
                "its logits are no linear function of its body's output, nor a softcap of one "
                f"({difference(found, wanted):.1%} off the nearest)"
            )
    return head


def softcap_of(raw: Tensor, logits: Tensor) -> float | None:
    """s of s · tanh(raw / s) = logits, by bisection on the largest entry; None where the logit is not the smaller."""
    place = raw.abs().argmax()
    x, y = float(raw.flatten()[place].abs()), float(logits.flatten()[place].abs())
    if not 0 < y < x:
        return None
    low, high = 1e-3, 100 * x  # s · tanh(x / s) grows with s
    for _ in range(100):
        middle = (low + high) / 2
        is_low = middle * float(torch.tanh(torch.tensor(x / middle, dtype=torch.float64))) < y
        low, high = (middle, high) if is_low else (low, middle)
    return float(f"{low:.4g}")  # a cap is a round number in a config; the rest is rounding


def logits_of(head: Head, hidden: Tensor) -> Tensor:
    """What a head says of hidden states [N, D]: logits [N, V] in fp32."""
    logits = linear(hidden, head.weight) * head.scale
    if head.bias is not None:
        logits = logits + head.bias
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def linear(hidden: Tensor, weight: Tensor) -> Tensor:
    """[N, D] and [V, D] -> [N, V], in fp32."""
    return hidden.float() @ weight.float().T


def source_of(model: Any, body: nn.Module, ids: Tensor) -> nn.Module:
    """What the model calls for its hidden states: the body, or the child of it that does the body's work (OPT's
    decoder). Raises CannotComposeError: neither."""
    whole = run(body, "ids", input_ids=ids)
    for candidate in (body, *body.children()):
        with scaled(candidate, 1.0) as seen:
            logits_of_ids(model, ids)
        if seen and seen[-1].shape == whole.shape and alike(seen[-1], whole):
            return candidate
    raise CannotComposeError("its logits do not come from what its body gives")


def logits_at(model: Any, source: nn.Module, ids: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Hidden states [N, D] of `source`, scaled by `factor`, and what the model's logits [N, V] then are.

    N counts the positions that the model gives logits of: all, or the last of each row.
    """
    with scaled(source, factor) as seen:
        logits = logits_of_ids(model, ids)
    return seen[-1][:, -logits.shape[1] :].flatten(0, 1).float(), logits.flatten(0, 1).float()


def logits_of_ids(model: Any, ids: Tensor) -> Tensor:
    """[B, L, V]. Raises CannotComposeError where the class does not run."""
    try:
        return model(input_ids=ids, use_cache=False).logits
    except FAILURES as error:
        raise CannotComposeError(f"it does not run on a few tokens: {first_line(error)}") from error


@contextmanager
def scaled(module: nn.Module, factor: float) -> Iterator[list[Tensor]]:
    """Inside, the first of what a module gives is scaled; what came out is in the list."""
    seen: list[Tensor] = []

    def scale(called: nn.Module, inputs: Any, output: Any) -> Any:
        first = output if isinstance(output, Tensor) else output[0]
        if not isinstance(first, Tensor) or not first.is_floating_point():
            return output
        seen.append(first * factor)
        if isinstance(output, Tensor):
            return seen[-1]
        if isinstance(output, tuple):
            return (seen[-1], *output[1:])
        output["last_hidden_state"] = seen[-1]
        return output

    handle = module.register_forward_hook(scale)
    try:
        yield seen
    finally:
        handle.remove()


def run(body: nn.Module, name: str, **inputs: Tensor) -> Tensor:
    """The body's hidden states [B, L, D] of ids or embeddings. Raises CannotComposeError where it takes none."""
    ((key, given),) = inputs.items()
    shape = given.shape[:2]
    attention = torch.ones(shape, dtype=torch.long, device=given.device)
    try:  # on a copy: some scale the embeddings in place
        hidden = body(**{key: given.clone()}, attention_mask=attention, use_cache=False)[0]
    except FAILURES as error:
        raise CannotComposeError(f"its body does not run on {name}: {first_line(error)}") from error
    if hidden.shape[:2] != shape:
        raise CannotComposeError(f"its body makes {tuple(hidden.shape)} of {tuple(shape)} {name}")
    return hidden


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to rounding."""
    return difference(one, other) <= ROUNDING[other.dtype]


def difference(one: Tensor, other: Tensor) -> float:
    """The norm of their difference as a fraction of the second's norm; infinite where one is not a number."""
    one, other = one.detach().float(), other.detach().float()
    off = float((one - other).norm() / other.norm().clamp_min(1e-30))
    return off if off == off else float("inf")


def first_line(error: BaseException) -> str:
    """What a class says of its own failure, in one line."""
    text = str(error).strip() or "nothing is said of why"
    return f"{type(error).__name__}: {text.splitlines()[0].rstrip('.')}"
