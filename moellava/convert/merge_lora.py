# SPDX-License-Identifier: Apache-2.0
"""Base folder + adapter -> merged folder, with proof that both compute the same.

The logits of a probe batch are computed three times: with the adapter beside the frozen weights, with the merged
weights, and by the folder that was written. The arithmetic is fp32, whatever the weights are stored in, so the first
two differ by rounding only; a folder in 16 bits is compared with the merged model in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moellava.adapters.folder import check_base, load_adapter, merged, read_adapter
from moellava.adapters.lora import Adapter, attach, lora_layers, target_names
from moellava.errors import UserError
from moellava.files import STAGING, model_files, staged
from moellava.model.manifest import Manifest, read_folder
from moellava.model.section import note, section_of
from moellava.moe import MoESpec, moe_layers, set_routing_context, upcycle
from moellava.vlm import VLM, Probes, build, describe, open_vlm

ROUNDING = 1e-4
"""Largest |Δ| of an fp32 logit that passes, as a fraction of the largest logit."""

PROBE_NAMES = {"text": "without an image", "image": "with an image"}


def probe_logits(vlm: VLM, probes: Probes) -> dict[str, torch.Tensor]:
    """fp32 logits [1, L, V] of random tokens, alone and around a random image; the same for equal models.

    Args:
        vlm: in evaluation mode.
        probes: inputs.
    """
    model, found = vlm.model, {}
    set_routing_context(model)
    for name, probe in probes.items():
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


def rebuild(vlm: VLM, origin: dict[str, Any]) -> None:
    """Makes of the base what the adapter has learnt on: its sparse layers, its quantised weights (dense again)."""
    if origin.get("moe") and not moe_layers(vlm.model):
        spec = MoESpec.from_config(origin["moe"])
        upcycle(vlm.model, spec)
        vlm.sparse(spec)
    quantised = origin.get("quantised", {"bits": 16})
    if quantised["bits"] < 16:
        from moellava.adapters.quantize import round_trip

        round_trip(vlm.model, target_names(vlm, only_experts=False), **quantised)


def detach(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Takes the adapters off, in place, and loads a merged state dict."""
    for name, layer in list(lora_layers(model)):
        model.set_submodule(name, layer.base_layer)
    model.load_state_dict(state)


def every_tensor(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name; some buffers are fp32 whatever the weights are."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


@dataclass
class AdaptedBase:
    """What an adapter has learnt on, in fp32, and the adapter.

    Args:
        vlm: as the adapter's run found it: sparse, quantised and dense again, with its template.
        adapter: its description.
        tensors: its tensors.
        source: its folder.
        stored: tensor of the model -> the precision that it is stored in; routers are fp32 in any model.
    """

    vlm: VLM
    adapter: Adapter
    tensors: dict[str, torch.Tensor]
    source: Path
    stored: dict[str, torch.dtype]

    def put_on(self) -> None:
        """Puts the adapter beside the weights. Raises UserError where it has learnt on others."""
        attach(self.vlm.model, self.adapter.config)
        load_adapter(self.vlm.model, self.adapter, self.tensors, self.source)
        self.vlm.model.eval()
        check_base(self.vlm.model.state_dict(), self.adapter.origin, self.vlm.source)

    def restore_precision(self) -> None:
        """Brings the tensors back to what they are stored in, once the adapter is off again."""
        for name, tensor in every_tensor(self.vlm.model):
            tensor.data = tensor.data.to(self.stored[name])


def open_base(manifest: Manifest, adapter_dir: Path, trust_remote_code: bool = False) -> AdaptedBase:
    """Opens what an adapter stands on, the adapter not yet in its place. Raises UserError: see `merge`."""
    manifest.require_start()
    description = describe(manifest, trust_remote_code)
    adapter, tensors = read_adapter(adapter_dir, description.keywords)
    vlm = build(description, getattr(torch, adapter.origin.get("dtype", "float32")), manifest.called)
    rebuild(vlm, adapter.origin)
    restore_section(vlm, adapter.origin)
    stored = {name: tensor.dtype for name, tensor in every_tensor(vlm.model)}
    vlm.model.float()
    return AdaptedBase(vlm, adapter, tensors, adapter_dir, stored)


def merge(
    base: str, adapter_dir: Path, output_dir: Path, trust_remote_code: bool = False
) -> dict[str, dict[str, float]]:
    """Writes the merged folder.

    Args:
        base: the folder that the run with adapters started from.
        adapter_dir: the `adapter/` of that run, or one that peft wrote.
        output_dir: must not hold a model.
        trust_remote_code: run the Python code in the base's folder, for architectures that need it.

    Returns:
        What was compared -> probe -> max |Δ logit|: `adapter` (how far it moves the base), `merging`, `folder`.

    Raises:
        UserError: base and adapter do not belong together, or merging changes logits by more than rounding. Nothing
            is left in `output_dir` then.
    """
    manifest = read_folder(base, "--model-path", patterns=model_files(trust_remote_code))
    opened = open_base(manifest, adapter_dir, trust_remote_code)
    vlm, adapter, model = opened.vlm, opened.adapter, opened.vlm.model
    probes = vlm.probes()
    without = probe_logits(vlm, probes)
    opened.put_on()
    before = probe_logits(vlm, probes)
    detach(model, merged(model.state_dict(), adapter.scaling))
    after = probe_logits(vlm, probes)
    found = {"adapter": largest_difference(before, without), "merging": largest_difference(before, after)}
    refuse_if_above(found["merging"], ROUNDING, before, "Merging")
    opened.restore_precision()
    found["folder"] = write_compared(vlm, probes, output_dir, trust_remote_code)
    return found


def restore_section(vlm: VLM, origin: dict[str, Any]) -> None:
    """Brings config and processor up to the template, stage, image shape and data that the adapter's run has used."""
    said = section_of(origin)
    if said is not None:
        vlm.settle(said.version, said.image_aspect_ratio)
        note(vlm.model.config, stage=said.stage, made_of=said.made_of or vlm.section.made_of)


def write_compared(vlm: VLM, probes: Probes, output_dir: Path, trust_remote_code: bool = False) -> dict[str, float]:
    """Writes the folder aside, opens it, and moves it to its place if it computes what the model does: max |Δ|.

    Raises:
        UserError: it computes something else. Nothing is left then.
    """
    with staged(output_dir, STAGING) as staging:
        vlm.save(staging)
        logits = probe_logits(vlm, probes)
        reopened = open_vlm(staging, device="cpu", dtype=vlm.model.dtype, trust_remote_code=trust_remote_code)
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
