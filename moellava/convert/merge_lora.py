"""Base folder + adapter -> merged folder, with proof that both compute the same.

The logits of a probe batch are computed three times: with the adapter beside the frozen weights, with the merged
weights, and by the folder that was written. The arithmetic is fp32, whatever the weights are stored in, so the first
two differ by rounding only; a folder in 16 bits is compared with the merged model in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moellava.adapters.folder import check_base, load_adapter, merged, read_adapter
from moellava.adapters.lora import attach, lora_layers, target_names
from moellava.data.tokenizers import load_tokenizer
from moellava.errors import UserError
from moellava.files import CODE_FILES, MODEL_FILES, resolve_folder, staged
from moellava.lmm.folders import OpenFolder, Probes, open_folder
from moellava.model.builder import save_pretrained_folder
from moellava.model.compose import make_processor
from moellava.model.extended import extend_in_place
from moellava.model.probe import probe_batches
from moellava.moe import MoESpec, moe_layers, set_routing_context, upcycle

STAGING = ".merging"

ROUNDING = 1e-4
"""Largest |Δ| of an fp32 logit that passes, as a fraction of the largest logit."""

PROBE_NAMES = {"text": "without an image", "image": "with an image"}


def probe_logits(model: Any, probes: Probes | None = None) -> dict[str, torch.Tensor]:
    """fp32 logits [1, L, V] of random tokens, alone and around a random image; the same for equal models.

    Args:
        model: in evaluation mode.
        probes: inputs; None: those of a composed model.
    """
    set_routing_context(model)
    found = {}
    for name, probe in (probes or probe_batches(model.config)).items():
        inputs = {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in probe.items()}
        with torch.inference_mode():
            found[PROBE_NAMES[name]] = model(**inputs, use_cache=False).logits.float()
    return found


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    """max |Δ| of each probe; infinite where a number is none."""
    return {
        name: float((one[name] - other[name]).abs().max().nan_to_num(float("inf"), float("inf"), float("inf")))
        for name in one
    }


def rebuild(model: Any, origin: dict[str, Any]) -> None:
    """Makes of the base what the adapter has learnt on: its sparse layers, its quantised weights (dense again)."""
    if origin.get("moe") and not moe_layers(model):
        upcycle(model, MoESpec.from_config(origin["moe"]))
        model.config.moe = origin["moe"]
        extend_in_place(model)
    quantised = origin.get("quantised", {"bits": 16})
    if quantised["bits"] < 16:
        from moellava.adapters.quantize import round_trip

        round_trip(model, target_names(model, only_experts=False), **quantised)


def detach(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Takes the adapters off, in place, and loads a merged state dict."""
    for name, layer in list(lora_layers(model)):
        model.set_submodule(name, layer.base_layer)
    model.load_state_dict(state)


def every_tensor(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name; some buffers are fp32 whatever the weights are."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def merge(
    base: str, adapter_dir: Path, output_dir: Path, trust_remote_code: bool = False
) -> dict[str, dict[str, float]]:
    """Writes the merged folder.

    Args:
        base: the folder that the run with adapters started from.
        adapter_dir: the `adapter/` of that run, or one that peft wrote.
        output_dir: must not hold a model.
        trust_remote_code: run the Python code in the base's folder, for families that need it.

    Returns:
        What was compared -> probe -> max |Δ logit|: `adapter` (how far it moves the base), `merging`, `folder`.

    Raises:
        UserError: base and adapter do not belong together, or merging changes logits by more than rounding. Nothing
            is left in `output_dir` then.
    """
    adapter, tensors = read_adapter(adapter_dir)
    dtype = getattr(torch, adapter.origin.get("dtype", "float32"))
    opened = open_folder(
        resolve_folder(base, "--model-path", patterns=MODEL_FILES + (CODE_FILES if trust_remote_code else ())),
        dtype,
        trust_remote_code,
    )
    model = opened.model
    rebuild(model, adapter.origin)
    settle_template(opened, base, adapter.origin)
    stored = {name: tensor.dtype for name, tensor in every_tensor(model)}
    model.float()
    probes = opened.probes()
    without = probe_logits(model, probes)
    attach(model, adapter.config)
    load_adapter(model, adapter, tensors, adapter_dir)
    model.eval()
    check_base(model.state_dict(), adapter.origin, f"--model-path {base}")
    before = probe_logits(model, probes)
    detach(model, merged(model.state_dict(), adapter.scaling))
    after = probe_logits(model, probes)
    found = {"adapter": largest_difference(before, without), "merging": largest_difference(before, after)}
    refuse_if_above(found["merging"], ROUNDING, before, "Merging")
    for name, tensor in every_tensor(model):
        tensor.data = tensor.data.to(stored[name])
    found["folder"] = write_compared(opened, probes, output_dir, trust_remote_code)
    return found


def settle_template(opened: OpenFolder, base: str, origin: dict[str, Any]) -> None:
    """Brings config, tokenizer and processor up to the template that the adapter's run has used."""
    extras = opened.model.config.moellava = opened.model.config.moellava | origin.get("moellava", {})
    if opened.family is None:
        opened.tokenizer = load_tokenizer(base, extras["version"])
        opened.processor = make_processor(opened.processor.image_processor, opened.tokenizer, opened.model.config)


def write_compared(
    opened: OpenFolder, probes: Probes, output_dir: Path, trust_remote_code: bool = False
) -> dict[str, float]:
    """Writes the folder aside, opens it, and moves it to its place if it computes what the model does: max |Δ|.

    Raises:
        UserError: it computes something else. Nothing is left then.
    """
    with staged(output_dir, STAGING) as staging:
        save_pretrained_folder(opened.model, opened.tokenizer, opened.processor, staging)
        logits = probe_logits(opened.model, probes)
        reopened = open_folder(staging, opened.model.dtype, trust_remote_code).model
        difference = largest_difference(logits, probe_logits(reopened, probes))
        refuse_if_above(difference, ROUNDING, logits, "Writing and reopening the folder")
    return difference


def refuse_if_above(found: dict[str, float], fraction: float, logits: dict[str, torch.Tensor], what: str) -> None:
    """Raises UserError where a difference is more than rounding."""
    for probe, difference in found.items():
        limit = fraction * max(1.0, float(logits[probe].abs().max()))
        if not difference <= limit:
            raise UserError(
                f"{what} changes a logit {probe} by {difference:.3e}, more than rounding ({limit:.3e}). "
                "Nothing was written."
            )
