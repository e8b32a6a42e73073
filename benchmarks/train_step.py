# SPDX-License-Identifier: Apache-2.0
"""A step of each stage beside its peers: transformers' Trainer with full logits, TRL's SFTTrainer, DeepSpeed's own MoE
layer, Qwen2-MoE.

    python benchmarks/train_step.py --json train_step.json

All of them train a LLaVA of the same sizes on the same samples: questions about an image with short answers. A step is
a Trainer's `training_step`, the optimizer's step and the clearing of gradients, in fp32, in one process. The variants
take turns within one run and ratios are of the medians of CPU time, so that what else the machine does falls on all of
them. Loading, logging and saving are not in it; neither is DeepSpeed's engine.

Each variant trains in a process of its own, with what its run would do to it: ours keeps the memory that a step
frees, Hugging Face's Trainer leaves that to the C library. `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000`
before the command gives both the same.

The floor of a step is measured too: the products that our own makes are noted as they are called, forward and backward,
and called again with the same tensors and nothing in between. The fused attention counts as one.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)
from trl_peer import sft_trainer

from moellava import heap
from moellava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moellava.data.collate import MediaCollator
from moellava.data.media_reader import Media, MediaReader, Run
from moellava.data.packing import Batches, joined
from moellava.moe import MoESpec, upcycle
from moellava.moe.activations import use_kernels
from moellava.train.arguments import TrainingArguments
from moellava.train.packing import settle_rows
from moellava.train.trainer import StageTrainer

IMAGE_TOKEN, PATCHES, SIDE = 5, 16, 56
VOCABULARY, HIDDEN, LAYERS, UNITS, HEADS = 32_000, 256, 6, 768, 4
BATCH, SHORTEST, LONGEST, ANSWER = 8, 24, 160, (2, 12)
"""Samples of a step, text tokens of a sample, and how many of them are its answer."""
EXPERTS, CHOICES, CAPACITY = 4, 2, 1.5
"""Of stage 3, in every second layer; the capacity is that of DeepSpeed's own layer."""
SPEC = MoESpec(moe_mode="sparse", num_experts=[EXPERTS], top_k_experts=CHOICES)

TEXT = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
TEXT |= {"num_key_value_heads": HEADS, "intermediate_size": UNITS, "pad_token_id": 0, "tie_word_embeddings": False}


OURS, PADDED, HF, TRL = "moellava", "padded", "transformers", "trl"
"""What trains a variant: our trainer, also with padded rows, and others."""
PRODUCTS = "the matrix products of moellava's step alone"

MULTIPLY = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "convolution", "convolution_backward", "_grouped_mm")
ATTEND = "_scaled_dot_product"
"""Operations of torch that are matrix products, and what the names of those begin with that are an attention's."""


class Products(TorchDispatchMode):
    """Notes the matrix products that are called inside, with their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in MULTIPLY or name.startswith(ATTEND):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **kwargs or {})

    @torch.no_grad()
    def replay(self) -> None:
        """Calls them again."""
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


class Pixels(MediaReader):
    """A reader without a processor: every image is 16 patches, of noise by its number in the batch."""

    is_one_input = True

    def __init__(self) -> None:
        pass

    def read(self, samples: Any, name: str = "the batch") -> Media:
        runs = [[Run([IMAGE_TOKEN] * PATCHES, {}) for _ in row] for row in samples]
        noise = torch.randn(sum(map(len, samples)), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        return Media(runs, {"pixel_values": noise})


class Samples(Batches, list):
    """As a trainer wants its data set; nothing of it is unreadable."""

    positions = property(lambda self: np.array([len(one["input_ids"]) + PATCHES - 1 for one in self]))
    with_media = property(lambda self: np.ones(len(self), dtype=bool))

    def leave_out(self, unreadable: dict) -> None:
        assert not unreadable


def samples(steps: int, seed: int = 0) -> Samples:
    """Questions with an image and their answers, of random lengths and words."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: E731
    made = Samples()
    for number in range(steps * BATCH):
        ids = torch.randint(6, VOCABULARY, (draw(SHORTEST, LONGEST),), generator=generator)
        ids[1] = IMAGE_TOKEN_INDEX
        labels = torch.full_like(ids, IGNORE_INDEX)
        answer = draw(*ANSWER)
        labels[-answer:] = ids[-answer:]
        made.append({"input_ids": ids, "labels": labels, "media": [None], "record": f"Record {number}"})
    return made


def llava(text: Any) -> Any:
    """A LLaVA with a small tower around a language model."""
    torch.manual_seed(0)
    tower = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=SIDE, patch_size=14),
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.requires_grad_(False)
    return model


def dense(family: str) -> Any:
    """Of a family of language models."""
    text = PhiConfig(**TEXT | {"intermediate_size": 4 * HIDDEN}) if family == "phi" else Qwen2Config(**TEXT)
    return llava(text)


class StockMLP(nn.Module):
    """DeepSpeed's own layer in the place of an MLP."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        from deepspeed.moe.layer import MoE

        options = {"min_capacity": 0, "use_rts": False, "top2_2nd_expert_sampling": False}
        self.moe = MoE(HIDDEN, mlp, EXPERTS, k=CHOICES, capacity_factor=CAPACITY, **options)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.moe(hidden)[0]


def sparse() -> Any:
    """Ours."""
    return upcycle(dense("qwen2"), SPEC)


def stock() -> Any:
    """DeepSpeed's."""
    model = dense("qwen2")
    for layer in model.get_decoder().layers[::2]:
        layer.mlp = StockMLP(layer.mlp)
    return model


def qwen2_moe() -> Any:
    """transformers' own, with grouped products; its shared expert is as narrow as it may be."""
    sizes = {"num_experts": EXPERTS, "num_experts_per_tok": CHOICES, "decoder_sparse_step": 2}
    widths = {"moe_intermediate_size": UNITS, "shared_expert_intermediate_size": 8}
    return llava(Qwen2MoeConfig(**TEXT, **sizes, **widths))


def stage_1(model: Any) -> Any:
    """The projector alone trains."""
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def trainer_of(model: Any, sort: str, data: Samples, folder: str) -> Any:
    """A trainer of a model, a name of `OURS` to `TRL`: `StageTrainer` and what a run prepares, or another one as it is.
    Raises ImportError: TRL cannot be had."""
    collator = MediaCollator(Pixels(), 0)  # type: ignore[arg-type]
    collator.is_told = sort in (OURS, PADDED)
    options = {"output_dir": folder, "report_to": "none", "use_cpu": True, "per_device_train_batch_size": BATCH}
    if sort == TRL:
        return sft_trainer(model, collator, options)
    if sort == HF:
        args = transformers.TrainingArguments(**options)
        return transformers.Trainer(model=model, args=args, data_collator=collator, train_dataset=data)
    use_kernels(model)
    projector = {"projector": model.model.multi_modal_projector}
    vlm = SimpleNamespace(model=model, placeholder_ids=[IMAGE_TOKEN], architecture=None, parts=projector, spec=SPEC)
    args = TrainingArguments(**options, model_max_length=LONGEST + PATCHES)
    trainer = StageTrainer(
        vlm=vlm,  # type: ignore[arg-type]
        folder=None,  # type: ignore[arg-type]
        args=args,
        data_collator=collator,
        train_dataset=data,
    )
    settle_rows(trainer)
    assert data.in_one_row
    trainer.begin_interval()
    return trainer


def step_of(trainer: Any, batches: list[dict[str, Any]]) -> Callable[[int], None]:
    """(number) -> runs that step."""
    optimizer = trainer.create_optimizer()

    def step(number: int) -> None:
        batch = copy.copy(batches[number])
        taken, count = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        trainer.training_step(trainer.model, taken[0], count)
        if isinstance(trainer, StageTrainer):
            state = SimpleNamespace(global_step=number)
            trainer.watch.on_pre_optimizer_step(trainer.args, state, None)
        optimizer.step()
        trainer.model.zero_grad(set_to_none=True)

    return step


VARIANTS: dict[str, dict[str, tuple[Callable[[], Any], str]]] = {
    "stage 1": {
        OURS: (lambda: stage_1(dense("qwen2")), OURS),
        "moellava, padded rows": (lambda: stage_1(dense("qwen2")), PADDED),
        "HF Trainer, full logits": (lambda: stage_1(dense("qwen2")), HF),
        "TRL SFTTrainer": (lambda: stage_1(dense("qwen2")), TRL),
    },
    "stage 2": {
        OURS: (lambda: dense("qwen2"), OURS),
        "moellava, padded rows": (lambda: dense("qwen2"), PADDED),
        "HF Trainer, full logits": (lambda: dense("qwen2"), HF),
        "TRL SFTTrainer": (lambda: dense("qwen2"), TRL),
    },
    "stage 2, phi": {
        OURS: (lambda: dense("phi"), OURS),
        "moellava, padded rows": (lambda: dense("phi"), PADDED),
        "HF Trainer, full logits": (lambda: dense("phi"), HF),
        "TRL SFTTrainer": (lambda: dense("phi"), TRL),
    },
    "stage 3": {
        OURS: (sparse, OURS),
        "moellava, padded rows": (sparse, PADDED),
        "stock DeepSpeed layer, capacity 1.5, full logits": (stock, HF),
        "HF Qwen2-MoE, grouped_mm, full logits": (qwen2_moe, HF),
    },
}
"""Stage -> name -> (model, what trains it). TRL asks a sparse model for its routers' logits, which transformers' LLaVA
does not hand on."""


def batches_of(collator: MediaCollator, data: Samples, in_one_row: bool, steps: int) -> list[dict[str, Any]]:
    """The batches of all steps: the same samples in each way."""
    made = []
    for number in range(steps):
        taken = data[number * BATCH : (number + 1) * BATCH]
        made.append(collator([joined(taken)] if in_one_row else taken))
    return made


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """CPU and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


def train_variant(stage: str, name: str, steps: int, threads: int, asked: Connection) -> None:
    """What the process of a variant does: it says which share of its batches is padding, or why it cannot be measured,
    and then runs a step whenever it is asked for one, whose seconds it says."""
    torch.set_num_threads(threads)
    make, sort = VARIANTS[stage][OURS if name == PRODUCTS else name]
    data = samples(steps)
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = trainer_of(make(), sort, data, folder)
        except ImportError as error:
            asked.send(str(error))
            return
        batches = batches_of(trainer.data_collator, data, sort == OURS, steps)
        masks = [batch["attention_mask"] for batch in batches]
        step = step_of(trainer, batches)
        asked.send(1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks))
        with heap.kept() if sort in (OURS, PADDED) else nullcontext():  # as a run of ours does
            for number in range(steps):
                asked.recv()
                asked.send(products_of(step, number) if name == PRODUCTS else timed(lambda: step(number)))  # noqa: B023


def products_of(step: Callable[[int], None], number: int) -> tuple[float, float]:
    """CPU and wall seconds of the products of a step alone."""
    with Products() as products:
        step(number)
    return timed(products.replay)


def measure(stage: str, steps: int, threads: int) -> list[dict[str, Any]]:
    """One row per variant of a stage: CPU and wall seconds of a step, padding, and the ratio to ours; or why not.

    Each trains in a process of its own, as it would without the others, and they take turns step by step.
    """
    forked = multiprocessing.get_context("fork")  # what is imported is there; nothing of torch has run here
    asked, seconds, padding = {}, {}, {}
    missing: list[dict[str, Any]] = []
    for name in (*VARIANTS[stage], PRODUCTS):
        ours, theirs = forked.Pipe()
        forked.Process(target=train_variant, args=(stage, name, steps, threads, theirs), daemon=True).start()
        theirs.close()  # so that its end is heard
        told = ours.recv()
        if isinstance(told, str):
            missing.append({"stage": stage, "variant": name, "missing": told})
            continue
        asked[name], padding[name], seconds[name] = ours, told, []
    for number in range(steps):
        for name, link in asked.items():
            link.send(number)
            seconds[name].append(link.recv())
    rows: list[dict[str, Any]] = []
    for name, each in seconds.items():
        cpu, wall = (statistics.median(part) for part in zip(*each[1:], strict=True))
        row = {"stage": stage, "variant": name, "cpu_seconds": round(cpu, 4), "wall_seconds": round(wall, 4)}
        first = rows[0]["cpu_seconds"] if rows else cpu
        rows.append(row | {"padding": round(padding[name], 3), "times_ours": round(cpu / first, 2)})
    return rows + missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--steps", type=int, default=8, help="of each variant; the first does not count")
    parser.add_argument("--stages", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    rows = []
    for stage in arguments.stages:
        print(stage)
        for row in measure(stage, arguments.steps, arguments.threads):
            rows.append(row)
            if "missing" in row:
                print("  {variant:50} not measured: {missing}".format(**row))
                continue
            line = "  {variant:50} {cpu_seconds:7.3f} s CPU  {wall_seconds:7.3f} s  padding {padding:4.0%}"
            print((line + "  {times_ours:5.2f} × ours").format(**row))
    if arguments.json:
        machine = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": arguments.threads}
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
