# SPDX-License-Identifier: Apache-2.0
"""The face of lmms-eval (0.7): `lmms-eval --model moellava --model_args pretrained=DIR` drives any folder.

lmms-eval finds `MANIFEST` by the entry point `lmms_eval.models` of this package, and alone imports this module.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from moellava.constants import IGNORE_INDEX
from moellava.data.dataset import sample_of
from moellava.moe.modes import evaluating
from moellava.serve.answer import Prompts, answer
from moellava.serve.generate import Sampling
from moellava.serve.prompt import Request
from moellava.vlm import open_vlm

MANIFEST = ModelManifest(model_id="moellava", simple_class_path="moellava.eval.lmms.Moellava")

TOKENS = 128
"""Longest answer, where a task does not say it."""


class Moellava(lmms):
    """A vision-language model as lmms-eval asks it.

    Args:
        pretrained: any folder that `open_vlm` opens.
        batch_size: questions that run together.
        device, version: see `open_vlm`.
        max_batch_size: lmms-eval names it always; nothing reads it.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        version: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self.vlm = open_vlm(pretrained, device=device, version=version, flag="--model_args pretrained=")
        self.batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer to each request, in their order; those with the same settings together."""
        said: dict[int, str] = {}
        settings = {place: request.args[1] for place, request in enumerate(requests)}
        by_settings = sorted(settings, key=lambda place: (repr(settings[place]), place))
        for _, group in itertools.groupby(by_settings, key=lambda place: repr(settings[place])):
            places = list(group)
            asked = [self._request(requests[place].args[0], *requests[place].args[2:]) for place in places]
            given = settings[places[0]]
            texts = answer(self.vlm, asked, sampling_of(given), batch_size=self.batch_size)
            said |= {place: cut(text, given.get("until") or ()) for place, text in zip(places, texts, strict=True)}
        return [said[place] for place in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """(log probability of a continuation and of the end of the answer behind it, whether it is the likeliest).

        In a `GenerationResult`: the bare pair, which lmms-eval's own models return, 0.7.3 turns into a text.
        """
        prompts, found = Prompts(self.vlm), []
        for text, continuation, *shown in (request.args for request in requests):
            pair = self._likelihood(prompts, self._request(text, *shown), continuation)
            found.append(GenerationResult(pair))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not served: the tasks of several rounds bring code for each model."""
        raise NotImplementedError("moellava answers tasks of one round: generate_until, multiple_choice, loglikelihood")

    def _request(self, text: str, doc_to_visual: Any, doc: Any, task: str, split: str) -> Request:
        shown = doc_to_visual(self.task_dict[task][split][doc])
        return Request(question=text, images=[one for one in shown or () if one is not None])

    @torch.no_grad()
    def _likelihood(self, prompts: Prompts, request: Request, continuation: str) -> tuple[float, bool]:
        record = request.record
        record["conversations"] = [*record["conversations"], {"from": "gpt", "value": continuation.strip()}]
        example = self.vlm.encoder.encode(record, "the request", prompts.files)
        batch = self.vlm.collator()([sample_of(example, prompts.opened(example), "the request")])
        labels = batch.pop("labels")[0, 1:]
        inputs = {name: moved(value, self.vlm.model) for name, value in batch.items()}
        with evaluating(self.vlm.model):
            logits_LV = self.vlm.model(**inputs).logits[0, :-1].float().cpu()
        is_said = labels != IGNORE_INDEX
        logprobs = logits_LV[is_said].log_softmax(-1)
        chosen = labels[is_said]
        total = logprobs.gather(1, chosen[:, None]).sum()
        return float(total), bool((logprobs.argmax(-1) == chosen).all())


def moved(value: Any, model: Any) -> Any:
    """A tensor where the model is, in its precision."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


def sampling_of(given: Mapping[str, Any]) -> Sampling:
    """A task's `generation_kwargs` as ours; without `do_sample` the likeliest token is taken."""
    temperature = float(given.get("temperature") or 0) if given.get("do_sample", True) else 0.0
    return Sampling(
        max_new_tokens=int(given.get("max_new_tokens") or TOKENS),
        temperature=temperature,
        top_p=float(given.get("top_p") or 1) if temperature else 1.0,
        num_beams=int(given.get("num_beams") or 1),
    )


def cut(text: str, until: str | Sequence[str]) -> str:
    """A text up to the first of some stops."""
    for stop in [until] if isinstance(until, str) else until:
        text = text.split(stop, 1)[0] if stop else text
    return text.strip()
