# SPDX-License-Identifier: Apache-2.0
"""Where the parts of a released vision-language model are, found out by a forward, so that no class has to be listed.

What is known of any class is its decoder, its embedding and its head: these are the **language model**. An image then
goes through the model up to the decoder, and the graph that autograd draws on the way says what had a hand in it:

    pixels -> patch_embed -> blocks -> merger -> image_newline -> decoder

Vision is every parameter that the decoder's inputs lead back to. What of it lies beside the class's image encoder is
the **projector**; where all lies inside, what is still reached when the encoder's blocks give constants. The rest is
the **tower**.

The encoder keeps what is in it and is not reached (a last norm that LLaVA does not read), and norms beside its blocks.
What neither the language model nor vision claims is *left over*, by name.

No weights are needed: on paper, every parameter is one zero, spread out over its shape.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PretrainedConfig

from moellava.errors import UserError
from moellava.model.build import class_of, quietly
from moellava.model.parts import Keywords, covering
from moellava.model.probes import FAILURES, first_line


class PartsError(UserError):
    """A model whose parts cannot be told apart; the message ends with the reason that a probe found."""


class _Arrived(Exception):
    """Ends a forward where the decoder begins."""


def on_paper(config: PretrainedConfig) -> Any:
    """The structure of a config's model that runs and takes no memory: all weights are zero.

    Raises:
        PartsError: the class is not built of it.
    """
    try:
        with quietly(), init_empty_weights(include_buffers=False):
            model = class_of(config)(config)
    except FAILURES as error:
        raise PartsError(f"its class is not built: {first_line(error)}") from error
    spread: dict[int, nn.Parameter] = {}  # what is shared stays shared
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
            module._parameters[name] = spread.setdefault(id(parameter), nn.Parameter(zeros))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return model.float().eval()


def find_parts(model: Any, batch: Mapping[str, Tensor]) -> Keywords:
    """Where the parts of a model are.

    Args:
        model: of any class for images and text; no more of it runs than comes before its decoder.
        batch: its inputs for a text with an image.

    Raises:
        PartsError: it has no decoder of its own, the image does not reach it, or parameters are left over.
    """
    decoder = decoder_of(model)
    encoder = encoder_of_images(model, decoder)
    language = _held(decoder, model.get_input_embeddings(), model.get_output_embeddings())
    reached, called = _reached(model, decoder, batch)
    vision = reached - language
    inside = _held(encoder) if encoder is not None else set()
    beside = vision - inside
    by_id = {id(parameter): parameter for parameter in model.parameters()}
    if not vision:
        raise PartsError("no parameter outside its decoder has a hand in what the decoder is given of an image")
    if encoder is None or all(by_id[parameter].dim() < 2 for parameter in beside):
        beside |= _behind_blocks(model, decoder, encoder, batch, called) & vision
    tower = (vision | inside) - beside - language
    left = set(by_id) - language - tower - beside
    if left:
        names = ", ".join(covering(model, [by_id[one] for one in left]))
        raise PartsError(f"no part of what turns an image and a text into an answer are its {names}")
    found = {"vision_encoder": tower, "vision_projector": beside, "language_model": language}
    return Keywords(
        **{
            field: tuple(name.removeprefix("model.") for name in covering(model, [by_id[one] for one in parameters]))
            for field, parameters in found.items()
        }
    )


def decoder_of(model: Any) -> nn.Module:
    """What turns embeddings into hidden states. Raises PartsError: it is the whole model."""
    decoder = model.get_decoder()
    if decoder is None or decoder is model or decoder is model.base_model or model.get_input_embeddings() is None:
        raise PartsError("it has no decoder of its own beside what sees images")
    return decoder


def encoder_of_images(model: Any, decoder: nn.Module) -> nn.Module | None:
    """What the class itself calls its image encoder; None where it does not say."""
    encoder = model.get_encoder(modality="image")
    is_part = isinstance(encoder, nn.Module) and decoder not in encoder.modules()
    return encoder if is_part and any(True for _ in encoder.parameters()) else None


def _held(*modules: nn.Module | None) -> set[int]:
    """The parameters of some modules."""
    return {id(parameter) for module in modules if module is not None for parameter in module.parameters()}


def _reached(model: Any, decoder: nn.Module, batch: Mapping[str, Tensor]) -> tuple[set[int], set[int]]:
    """The parameters that the decoder's inputs lead back to, and the modules that were called on the way.

    Raises:
        PartsError: the class does not run on the batch, or never calls its decoder.
    """
    called: set[int] = set()
    given: list[Any] = []

    def arrive(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.extend((args, kwargs))
        raise _Arrived

    hooks = [decoder.register_forward_pre_hook(arrive, with_kwargs=True)]
    hooks += [
        module.register_forward_pre_hook(lambda module, args: called.add(id(module))) for module in model.modules()
    ]
    try:
        with torch.enable_grad(), quietly():
            model(**copy.deepcopy(dict(batch)), use_cache=False)
    except _Arrived:
        return _leaves(_tensors(given)), called
    except FAILURES as error:
        raise PartsError(f"it does not run on a text with an image: {first_line(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
    raise PartsError(f"it never calls its {type(decoder).__name__}, which should be its decoder")


def _tensors(given: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, Mapping):
        yield from _tensors(list(given.values()))
    elif isinstance(given, (list, tuple)):
        for value in given:
            yield from _tensors(value)


def _leaves(tensors: Iterable[Tensor]) -> set[int]:
    """The parameters that tensors were computed of, by their graphs."""
    found, waiting, seen = set(), [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None], set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [below for below, _ in node.next_functions if below is not None]
    return found


def _behind_blocks(
    model: Any, decoder: nn.Module, encoder: nn.Module | None, batch: Mapping[str, Tensor], called: set[int]
) -> set[int]:
    """What is reached when the encoder's blocks give constants, but for norms beside them.

    Of several lists of modules the blocks are those through which most goes: behind them, least is reached.
    """
    outcomes = []
    for parent, blocks in _lists(model if encoder is None else encoder, called):
        if _held(blocks).isdisjoint(_held(decoder)):
            with _constant(blocks):
                outcomes.append((_reached(model, decoder, batch)[0], parent))
    reached, parent = min(outcomes, key=lambda outcome: len(outcome[0]), default=(set(), nn.Module()))
    norms = {
        id(parameter)
        for child in parent.children()
        if all(parameter.dim() < 2 for parameter in child.parameters())
        for parameter in child.parameters()
    }
    return reached - norms


def _lists(module: nn.Module, called: set[int]) -> Iterator[tuple[nn.Module, nn.ModuleList]]:
    """(module, list of modules in it) of every such list whose modules were all called, and that is in no other."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) and all(id(block) in called for block in child):
            yield module, child
        else:
            yield from _lists(child, called)


@contextmanager
def _constant(blocks: nn.ModuleList) -> Iterator[None]:
    """Inside, gradients end at what these modules give."""
    hooks = [block.register_forward_hook(lambda module, args, output: _detached(output)) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, (list, tuple)):
        return type(output)(_detached(value) for value in output)
    return output
