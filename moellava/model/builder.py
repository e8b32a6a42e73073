# SPDX-License-Identifier: Apache-2.0
"""`load_pretrained_model`, as LLaVA calls it; what opens folders here is `moellava.vlm.open_vlm`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moellava.errors import UserError
from moellava.model.devices import default_device, default_dtype
from moellava.vlm import VLM, open_vlm


def load_pretrained_model(
    model_path: str | Path,
    model_base: str | Path | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | dict[str, Any] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    engine: str = "native",
) -> tuple[Any, Any, Any, int]:
    """Opens a vision-language model, released or composed, of any stage, or published by LLaVA or MoE-LLaVA.

    Args:
        model_name: not used; in its place since LLaVA's function has it. For the others see `open_vlm`.
        load_8bit, load_4bit: quantise the decoder's linears; needs the package bitsandbytes.
        device_map: a device, or {"": a device}; "auto" is the best one there is.

    Returns:
        tokenizer, model (in evaluation mode), processor, and the longest context in tokens. Tokenizer and processor are
        None where a published folder has no tokenizer and no `model_base` is given.

    Raises:
        UserError: see `open_vlm`; both 4 and 8 bits, a model that is to be cut over devices, or two devices.
    """
    if load_8bit and load_4bit:
        raise UserError("load_8bit=True and load_4bit=True: weights are in 8 bits or in 4, not in both.")
    if device_map is not None:
        device = device_of(device_map, device)
    bits = 8 if load_8bit else 4 if load_4bit else 16
    if bits == 16:
        vlm = open_vlm(model_path, base=model_base, device=device, dtype=dtype, engine=engine)
    else:
        vlm = open_quantised(model_path, model_base, torch.device(device or default_device()), dtype, engine, bits)
    return vlm.tokenizer, vlm.model, vlm.processor, vlm.context_length


def device_of(device_map: str | dict[str, Any], device: torch.device | str | None) -> torch.device | str | None:
    """The one device that a `device_map` means; None: the best there is. Raises UserError where it means several, or
    another than `device`."""
    places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if len(places) != 1 or places & {"disk", "balanced", "balanced_low_0", "sequential"}:
        raise UserError(
            f'device_map={device_map!r}: a model is opened on one device. Give device="cuda" (or cuda:1, cpu …); with '
            "load_4bit=True it takes a quarter of the memory."
        )
    place = places.pop()
    chosen = None if place == "auto" else f"cuda:{place}" if isinstance(place, int) else place
    if device is not None and chosen is not None and torch.device(device) != torch.device(chosen):
        raise UserError(f"device_map={device_map!r} and device={device!r} name two devices: give one of them.")
    return device if chosen is None else chosen


def open_quantised(
    path: str | Path, base: str | Path | None, device: torch.device, dtype: torch.dtype | None, engine: str, bits: int
) -> VLM:
    """A model whose decoder's linears are in 4 or 8 bits, as `train.py --bits` has them."""
    from moellava.adapters.lora import target_names
    from moellava.adapters.quantize import quantise

    vlm = open_vlm(path, base=base, device="cpu", dtype=dtype or default_dtype(device), engine=engine)
    names = target_names(vlm, only_experts=False)
    quantise(vlm.model, names, device, bits=bits, quant_type="nf4", double_quant=True)
    vlm.model.to(device)
    return vlm
