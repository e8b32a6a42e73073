# SPDX-License-Identifier: Apache-2.0
"""Which ways to lay a run over its processes there are, what each takes, and how fast it can be at best.

A bound is the time that the hardware needs for what cannot be left out: matrix products at the vendor's rate; weights,
activations and optimizer states once through memory; gradients and rows once over the links. A real run is slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

import torch
from torch import nn

from moellava.moe import moe_layers, routed_expert_parameters
from moellava.moe.own_routers import choices_of
from moellava.plan.devices import Device
from moellava.plan.samples import Batch, Samples
from moellava.plan.trace import StepTrace, Traced
from moellava.plan.zero3 import usual, visits_of, whole_in_the_backward
from moellava.train.deepspeed.named import settings_named
from moellava.train.fsdp import spread_experts
from moellava.train.memory import FP32_BYTES, Layout, estimate, layout_of
from moellava.vlm import VLM

BATCHES = (1, 2, 4, 8, 16, 32)
"""Samples of a process that are tried where no flag gives them."""

PASSES = {False: 2, True: 3}
"""How often a step reads the weights: forward, backward, and the forward again with checkpointing."""

HOST = 25.0
"""GB/s between a device and its host (PCIe 4.0 × 16, as reached), and of a device's share of the host's memory."""

OFFLOADED = 2 + 2 + 2 * 12
"""Bytes that a trained number moves in a step whose optimizer is the host's: its gradient there, its weight back, and
weight and two moments in fp32 read and written."""

EQUAL = 0.97
"""Of the fastest way's tokens per second: what has as many is as fast, for all that bounds say."""

PARTS = 32
"""Samples of a row that are traced one by one; of more the line of one row and two says what they take."""


@dataclass(frozen=True)
class Asked:
    """What a plan is asked for.

    Args:
        gpus: processes, each with a device of its own.
        memory: of a device, in GB.
        device: its speeds.
        per_host: devices of a host.
        data: the samples, or rows that hold several.
        layouts: ways to lay the run out that are looked at.
        samples: of a process and forward.
        checkpointing: values of --activation_checkpointing.
        accumulation: forwards of an optimizer step.
        is_packed: whether a row of a batch holds several samples; `samples` are then rows.
        longest: positions that a sample may have.
        eval_samples: of a process and forward, in evaluation.
        joins: (model, samples of a process and forward) -> whether these lie end to end in one row.
    """

    gpus: int
    memory: float
    device: Device
    per_host: int
    data: Samples
    layouts: tuple[Layout, ...]
    samples: tuple[int, ...] = BATCHES
    checkpointing: tuple[bool, ...] = (False, True)
    accumulation: int = 1
    is_packed: bool = False
    longest: int = 0
    eval_samples: int = 0
    joins: Callable[[VLM, int], bool] = lambda vlm, samples: False


@dataclass(frozen=True)
class Row:
    """One way to run.

    Args:
        layout, samples, checkpointing: of the run.
        memory: part -> bytes of one process at the peak of a step.
        flops_bound, bandwidth_bound: tokens per second of all processes together, at most.
        in_one_row: whether the samples of a forward lie end to end, without padding.
    """

    layout: Layout
    samples: int
    checkpointing: bool
    memory: dict[str, float]
    flops_bound: float
    bandwidth_bound: float
    in_one_row: bool = False

    @property
    def total(self) -> float:
        """Bytes of one process."""
        return sum(self.memory.values())

    @property
    def bound(self) -> float:
        """Tokens per second of all processes together, at most."""
        return min(self.flops_bound, self.bandwidth_bound)

    def to_json(self) -> dict:
        """Everything in plain numbers."""
        return asdict(self) | {"total": self.total, "bound": self.bound}


@dataclass(frozen=True)
class Held:
    """What one process holds of a model, whatever its batch is.

    Args:
        fixed: weights, gradients, optimizer states, bytes.
        trained, weights: bytes of the weights that train, and of those that a process computes with.
        widest: bytes of the largest tensor that trains, which is copied before its gradient is summed.
        whole: bytes that ZeRO-3 has gathered when a step is fullest.
        expert_share: of the trained weights, that of routed experts.
        expert_weights: of the weights, those of experts that FSDP2 spreads: this process's.
        rows: bytes of the rows that travel for one token and one way, over all sparse layers.
        element: bytes of a number.
    """

    fixed: dict[str, float]
    trained: float
    weights: float
    expert_share: float
    rows: float
    element: int
    expert_weights: float = 0.0
    widest: float = 0.0
    whole: float = 0.0


def layouts_for(
    gpus: int,
    spec_counts: Iterable[int] | None,
    is_moe: bool,
    own_counts: Iterable[int] = (),
    per_host: int = 8,
    is_gpu: bool = True,
) -> tuple[Layout, ...]:
    """Every way that training serves, DeepSpeed by the settings of this package.

    Args:
        gpus: processes.
        spec_counts: experts of each sparse layer; None: the model is dense.
        is_moe: whether the stage is 3, which several processes run under DeepSpeed alone, without ZeRO-3.
        own_counts: numbers of experts of a language model that is sparse of itself.
        per_host: devices of a host, which FSDP2 may keep a copy of the model on.
        is_gpu: see `layout_of`.
    """

    def named(name: str, size: int = 1) -> Layout:
        return layout_of(settings_named(name), gpus, size, is_gpu=is_gpu)

    sizes = _divisors(gpus, spec_counts or ()) if spec_counts else [1]
    native = [Layout(gpus, deepspeed=False)] if gpus == 1 or not is_moe else []
    spread = [named(name, size) for name in ("zero1", "zero2") for size in sizes]
    offloaded = [named("zero2_offload", size) for size in sizes]
    together = {gpus, per_host} if gpus % per_host == 0 else {gpus}
    split = [
        Layout(gpus, deepspeed=False, ep_size=size, fsdp=count)
        for count in sorted(together - {1})
        for size in (_divisors(count, own_counts) if own_counts else [1])
    ]
    return (*native, *spread, *([] if is_moe else [named("zero3"), *split]), *offloaded)


def _divisors(processes: int, counts: Iterable[int]) -> list[int]:
    """Numbers of processes that experts can be dealt out to."""
    counts = list(counts)
    return [n for n in range(1, processes + 1) if processes % n == 0 and all(count % n == 0 for count in counts)]


def held_by(vlm: VLM, layout: Layout) -> Held:
    """Sizes of one process."""
    model = vlm.model
    own = list(spread_experts(model)) if layout.fsdp > 1 else []
    own_experts = [parameter for module in own for parameter in module.parameters()]
    experts = {id(parameter) for parameter in [*routed_expert_parameters(model), *own_experts]}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    of_experts = sum(parameter.nbytes for parameter in trained if id(parameter) in experts)
    all_trained = sum(parameter.nbytes for parameter in trained)
    hidden, element = model.config.get_text_config().hidden_size, model.dtype.itemsize
    layers = moe_layers(model)
    chosen = sum(layer.spec.top_k_experts for _, layer in layers) + len(own) * visited_of(model)
    choices = chosen if layout.ep_size > 1 else 0
    fixed = estimate(model, layout)
    if layout.fsdp > 1:
        fixed["gathered"] = gathered(model, own, layout, element)
    if layout.deepspeed:
        fixed["buckets"] = float(layout.buffers * (layout.bucket or hidden**2) * element)
    whole = whole_in_the_backward(visits_of(model), usual(hidden)) if layout.zero >= 3 else 0
    every, spread = (sum(p.nbytes for p in some) for some in (model.parameters(), own_experts))
    return Held(
        fixed,
        all_trained,
        every - spread + spread / layout.ep_size,
        of_experts / max(all_trained, 1),
        float(choices * hidden * element),
        element,
        spread / layout.ep_size,
        max((parameter.nbytes for parameter in trained), default=0.0),
        float(whole * element),
    )


def rows_of(asked: Asked, make: Callable[[int], VLM]) -> list[Row]:
    """Every way to run, in no order. What does not fit even without activations is not traced.

    Args:
        asked: the question.
        make: see `model_maker`.
    """
    rows: list[Row] = []
    limit = asked.memory * 1e9
    for ep_size in sorted({_traced(layout) for layout in asked.layouts}):
        vlm = make(ep_size)
        layouts = [layout for layout in asked.layouts if _traced(layout) == ep_size]
        held = {layout: held_by(vlm, layout) for layout in layouts}
        empty = [layout for layout in layouts if sum(held[layout].fixed.values()) > limit]
        rows += [Row(layout, 0, False, held[layout].fixed, 0.0, 0.0) for layout in empty]
        kept = [layout for layout in layouts if layout not in empty]
        if kept:
            joined = {samples: asked.joins(vlm, samples) for samples in {1, 2, *asked.samples}}
            lines = Lines(StepTrace(vlm.model, asked.device.is_gpu), asked, joined)
            rows += [
                replace(
                    row_of(asked, layout, held[layout], samples, checkpointing, lines.at(samples, checkpointing)),
                    in_one_row=joined[samples],
                )
                for layout in kept
                for samples in asked.samples
                for checkpointing in asked.checkpointing
            ]
    return rows


def _traced(layout: Layout) -> int:
    """The `ep_size` of the model that is traced: a process gets as many rows for its own experts as it sends away from
    those of a model that is sparse of itself."""
    return 1 if layout.fsdp > 1 else layout.ep_size


def visited_of(model: Any) -> int:
    """Experts that a token visits in a layer of a language model that is sparse of itself."""
    named = choices_of(model.config.get_text_config())
    return named if isinstance(named, int) and named else 1


def gathered(model: Any, experts: list[nn.Module], layout: Layout, element: int) -> float:
    """Bytes that FSDP2 has whole at a step's peak: a layer and the next one, what belongs to no layer from the forward
    on, and gradients before they are split, which are summed as fp32.

    Args:
        model: see `held_by`.
        experts: its modules that have several; a process gathers its own.
        element: bytes of a number.
    """
    shared = {id(parameter) for module in experts for parameter in module.parameters()}

    def numbers(parameters: Iterable[nn.Parameter], only_trained: bool) -> float:
        kept = [p for p in parameters if p.requires_grad or not only_trained]
        return sum(p.numel() / (layout.ep_size if id(p) in shared else 1) for p in kept)

    layers = [list(layer.parameters()) for layer in model.get_decoder().layers]
    inner = {id(parameter) for layer in layers for parameter in layer}
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is not words.weight:  # an embedding of its own is gathered like a layer
        inner.add(id(words.weight))
    outer = [parameter for parameter in model.parameters() if id(parameter) not in inner]
    largest, largest_trained = (max(numbers(layer, trained) for layer in layers) for trained in (False, True))
    weights = element * (2 * largest + numbers(outer, False))
    return weights + element * numbers(outer, True) + (element + FP32_BYTES) * largest_trained


class Lines:
    """What a step takes by its number of samples: traced for one and two of the longest, and a line through them says
    what the largest micro-batch takes; what it multiplies is that of a typical one.

    Args:
        trace: of the model.
        asked: the question.
        joined: samples -> whether they lie in one row.
    """

    def __init__(self, trace: StepTrace, asked: Asked, joined: Mapping[int, bool]):
        self.trace, self.asked, self.joined = trace, asked, joined
        self._traced: dict[tuple[Batch, bool, bool], Traced] = {}

    def at(self, samples: int, checkpointing: bool) -> Traced:
        """A step of so many samples."""
        data, in_one_row = self.asked.data, self.joined[samples]
        options = (checkpointing, self.trace.head.may_chunk(max(samples, self.asked.eval_samples), self.asked.longest))
        typical, largest = data.typical(samples, in_one_row), data.largest(samples, in_one_row)
        flops = samples * self._exact(typical, *options).flops
        if len(self.asked.samples) == 1 and len(largest.parts) <= PARTS:
            most = self._exact(largest, *options)
        else:
            one, two = (self._exact(data.uniform.largest(n, self.joined[n]), *options) for n in (1, 2))
            more = data.times(samples, in_one_row) - 1
            most = Traced(*(a + more * (b - a) for a, b in zip(astuple(one), astuple(two), strict=True)))
        return replace(most, flops=flops, moved=most.activations * samples * typical.length / largest.positions)

    def _exact(self, batch: Batch, checkpointing: bool, chunked: bool) -> Traced:
        key = (batch, checkpointing, chunked)
        if key not in self._traced:
            self._traced[key] = self.trace.step(batch, checkpointing, chunked)
        return self._traced[key]


def row_of(asked: Asked, layout: Layout, held: Held, samples: int, checkpointing: bool, traced: Traced) -> Row:
    """One way to run, with its memory and its bounds."""
    memory = dict(held.fixed)
    memory["activations"] = beside_gradients(asked, layout, held, traced)
    if layout.zero >= 3:
        memory["gathered"] = held.whole + 2 * held.widest
    # When the optimizer steps, the activations are gone; DeepSpeed copies a process's gradients as fp32 then.
    if layout.zero in (1, 2):
        copied = memory["optimizer"] / 3 if not layout.offload else 0.0
        memory["activations"] = max(memory["activations"], copied)
    tokens = asked.gpus * samples * asked.data.mean_length * asked.accumulation
    rate = asked.device.tflops if held.element < FP32_BYTES else asked.device.tflops_fp32
    flops = traced.flops * asked.accumulation
    seconds = moved_seconds(asked, layout, held, samples, checkpointing, traced)
    return Row(layout, samples, checkpointing, memory, tokens / (flops / rate / 1e12), tokens / seconds)


def beside_gradients(asked: Asked, layout: Layout, held: Held, traced: Traced) -> float:
    """Bytes of activations at a step's peak. In the only backward of a step, gradients fill up while activations go, so
    that not all of both are there at one time; of split gradients a process keeps its share."""
    if asked.accumulation > 1:
        return traced.activations
    whole = held.trained if layout.deepspeed else held.trained / held.element * FP32_BYTES
    share = held.fixed["gradients"] / whole if layout.zero >= 2 or layout.fsdp > 1 else 1.0
    # Traced in the dtype that the model computes in; what trains in fp32 has gradients of twice the size.
    peak = traced.activations + (traced.with_gradients - traced.activations) * whole / held.trained * share
    return max(peak - whole * share, 0.0)


def moved_seconds(asked: Asked, layout: Layout, held: Held, samples: int, checkpointing: bool, traced: Traced) -> float:
    """Seconds of an optimizer step for what memory and links have to move, the slower of the two."""
    steps = asked.accumulation
    weights = held.weights * PASSES[checkpointing] * steps
    states = 2 * held.fixed["optimizer"]
    inner = weights + 2 * traced.moved * steps + states
    link = asked.device.link if asked.gpus <= asked.per_host else asked.device.network
    rows = 2 * PASSES[checkpointing] * held.rows * samples * asked.data.mean_length * steps
    near = asked.device.link if layout.ep_size <= asked.per_host else asked.device.network
    others = (asked.gpus - 1) / asked.gpus
    experts = layout.processes // layout.ep_size
    dense = 2 * held.trained * (1 - held.expert_share) * others
    spread = 2 * held.trained * held.expert_share * (experts - 1) / experts
    fetched = PASSES[checkpointing] * held.weights * others * steps if layout.zero >= 3 else 0.0
    if layout.fsdp > 1:  # gradients go to those who keep them, and do not come back; experts come from who has the same
        dense, spread = dense / 2, spread / 2 / layout.ep_size
        same = layout.fsdp // layout.ep_size
        some = (held.weights - held.expert_weights) * (layout.fsdp - 1) / layout.fsdp
        fetched = 2 * (some + held.expert_weights * (same - 1) / same) * steps
    outer = (dense + spread + fetched) / link + rows * (layout.ep_size - 1) / layout.ep_size / near
    own = held.trained * ((1 - held.expert_share) / asked.gpus + held.expert_share / experts)
    host = own / held.element * OFFLOADED if layout.offload else 0.0
    return max(inner / asked.device.bandwidth, outer, host / HOST) / 1e9


def cheapest(rows: Iterable[Row], memory: float) -> Row | None:
    """The fastest one that fits into so many GB, and of equally fast ones the simplest; None: none fits."""
    fitting = [row for row in rows if row.samples and row.total <= memory * 1e9]
    fastest = max((row.bound for row in fitting), default=0.0)
    return min((row for row in fitting if row.bound >= EQUAL * fastest), key=_order, default=None)


def _order(row: Row) -> tuple:
    layout = row.layout
    return (
        layout.offload,
        row.checkpointing,
        layout.ep_size,
        layout.fsdp,
        layout.zero,
        -row.samples,
    )


def dtype_of(args: object, device: Device) -> torch.dtype:
    """What weights are held in: as the flags say, or bf16 on a GPU and fp32 on a CPU."""
    if getattr(args, "fp16", False):
        return torch.float16
    return torch.bfloat16 if device.is_gpu or getattr(args, "bf16", False) else torch.float32
