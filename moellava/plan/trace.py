# SPDX-License-Identifier: Apache-2.0
"""One training step on tensors without numbers: what it keeps for the backward, and what it multiplies.

The step is the real one: the model's own forward, our sparse layers, the head on supervised rows, checkpointing that
replays routing; it is told of its batch as a step of training is. Legend: B rows, L positions, N supervised ones, D
hidden.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlavaConfig

from moellava.data.places import Places
from moellava.errors import UserError
from moellava.moe import (
    checkpoint_contexts,
    disable_gradient_checkpointing,
    enable_gradient_checkpointing,
    moe_layers,
    router_losses,
    set_routing_context,
)
from moellava.moe.experts import kernel_for
from moellava.moe.kernels import AUTO
from moellava.moe.weights import tensors_of
from moellava.plan.counting import Counting, EvenLoad
from moellava.plan.samples import Batch
from moellava.train.loss import SupervisedHead, supervised_positions
from moellava.train.rows import NeededRows
from moellava.train.sample_attention import ATTENTION, SampleAttention


@dataclass(frozen=True)
class Traced:
    """What a step takes beside weights, gradients and optimizer states.

    Args:
        activations: most bytes at one time.
        with_gradients: most bytes at one time if every gradient stays until the step's end.
        flops: of forward and backward; a multiplication and an addition are two.
        moved: bytes of activations that go through memory once a way.
    """

    activations: float
    with_gradients: float
    flops: float
    moved: float = 0.0


AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings of models that do more to logits than their head: those are not computed in chunks."""


class StepTrace:
    """Traces steps of one model.

    Args:
        model: on the meta device, in the dtype that it computes in, with `requires_grad` set. It is moved to fake
            tensors, and of no further use to anybody else.
        on_gpu: whether the experts run as on a GPU.
    """

    def __init__(self, model: Any, on_gpu: bool):
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            model.to_empty(device="cpu")
        self.model, self.on_gpu = model.train(), on_gpu
        text = model.config.get_text_config()
        self.head = SupervisedHead(model.get_output_embeddings(), text.vocab_size)
        self.rows, self.attention = NeededRows(model), SampleAttention(model)
        self.attention.is_on = True  # where a batch says that its samples share a row
        self.ends_in_head = not any(getattr(text, name, None) for name in AFTER_THE_HEAD)
        self.has_checkpoints = False
        with self.fake, EvenLoad(0, on_gpu):
            for _, layer in moe_layers(model):
                layer.is_together = True  # a fake weight has no place that it could be moved to
                experts = list(layer.local_experts().values())
                tensors_of(experts)  # a module is looked at once, not in each step
                if on_gpu:
                    layer.context.kernel = kernel_for(experts, AUTO, torch.device("cuda"), model.dtype)

    @property
    def shows_images(self) -> bool:
        """Whether the way from pixels to embeddings is traced: where every image has one size and one place."""
        config = self.model.config
        return isinstance(config, LlavaConfig) and isinstance(getattr(config.vision_config, "image_size", None), int)

    def step(self, batch: Batch, checkpointing: bool, chunked: bool = True) -> Traced:
        """A forward and a backward.

        Args:
            chunked: the run is one in which logits may be too many to be held at once.
        """
        self.head.is_last = chunked and self.ends_in_head
        gc.collect()  # cycles of this step's graph are then collected where those of any other are
        if checkpointing:
            enable_gradient_checkpointing(self.model, self._contexts)
        elif self.has_checkpoints:
            disable_gradient_checkpointing(self.model)
            self.model.disable_input_require_grads()
        self.has_checkpoints = checkpointing
        counting = Counting([*self.model.parameters(), *self.model.buffers()])
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        hooks = [parameter.register_post_accumulate_grad_hook(counting.keep_gradient) for parameter in trained]
        self.even = EvenLoad(batch.samples * batch.supervised, self.on_gpu)
        told = batch.told()
        with self.fake, counting, self.attention, self.rows.only_within(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # by grouped products: 0
            with self.even:
                loss = self._loss(batch, *told)
            loss.backward()
        for hook in hooks:
            hook.remove()
        set_routing_context(self.model)
        for _, layer in moe_layers(self.model):
            layer.record = layer.choices_E = None
            layer.stats.reset()
        return Traced(counting.peak, counting.peak_with_gradients, counting.flops)

    def _contexts(self) -> tuple[Any, Any]:
        """As `checkpoint_contexts`; `backward` sets modes aside, and layers that are computed again need theirs."""
        first, again = checkpoint_contexts()
        return first, _both(again, self.even)

    def _loss(self, batch: Batch, labels: Tensor, places: Places, position_ids: Tensor | None) -> Tensor:
        supervised = supervised_positions(labels, places.supervised)
        token_mask = torch.ones(labels.shape, dtype=torch.bool)  # `places` say which ones are
        sequences = (places.sequence, places.n_sequences)
        set_routing_context(self.model, token_mask, torch.zeros_like(token_mask), places.real, sequences)
        self.rows.tell(places, supervised)
        inputs: dict[str, Any] = {"inputs_embeds": self._embeddings(batch)}
        if places.is_packed:
            self.attention.tell(places.lengths)
            inputs["position_ids"] = position_ids
        elif batch.samples == 1 and not batch.padding and self.attention.suits(batch.length):
            # Hugging Face's forward would make a mask, for which a run with numbers sees no need.
            self.attention.config._attn_implementation_internal = ATTENTION
        with self.head.only(supervised):
            logits = self.model(**inputs, use_cache=False).logits
        del inputs
        loss = self.head.loss_sum(logits, supervised.target_N)
        del logits
        if moe_layers(self.model):
            loss = loss + router_losses(self.model, total_tokens=len(places.real)).total
        return loss

    def _embeddings(self, batch: Batch) -> Tensor:
        """[B, L, D], with image features in their places. Raises UserError: they are more than there are positions."""
        ids = torch.zeros(batch.samples, batch.length, dtype=torch.long)
        words = self.model.get_input_embeddings()(ids)
        if not batch.images or not self.shows_images:
            return words
        side = self.model.config.vision_config.image_size
        pixels = torch.zeros(batch.images, 3, side, side, dtype=words.dtype)
        found = self.model.get_image_features(pixel_values=pixels)
        features = found if isinstance(found, (tuple, list)) else found.pooler_output
        flat = torch.cat(list(features)) if isinstance(features, (tuple, list)) else features
        if len(flat) > batch.positions:
            taken = f"{batch.images} images take {len(flat)} positions"
            raise UserError(f"--images, --tokens: {taken} of a batch that has {batch.positions} in all.")
        places = (ids == 0).unsqueeze(-1).expand_as(words)
        return words.masked_scatter(places, flat.to(words.dtype))


@contextmanager
def _both(first: Any, second: Any) -> Iterator[None]:
    with first, second:
        yield
