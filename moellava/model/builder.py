"""`load_pretrained_model`, as LLaVA calls it; what opens folders here is `moellava.vlm.open_vlm`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moellava.vlm import open_vlm


def load_pretrained_model(
    model_path: str | Path,
    model_base: str | Path | None = None,
    model_name: str | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    engine: str = "native",
) -> tuple[Any, Any, Any, int]:
    """Opens a vision-language model, released or composed, of any stage, or published by LLaVA or MoE-LLaVA.

    Args:
        model_name: not used; in its place since LLaVA's function has it. For the others see `open_vlm`.

    Returns:
        tokenizer, model (in evaluation mode), processor, and the longest context in tokens. Tokenizer and processor are
        None where a published folder has no tokenizer and no `model_base` is given.

    Raises:
        UserError: see `open_vlm`.
    """
    vlm = open_vlm(model_path, base=model_base, device=device, dtype=dtype, engine=engine)
    return vlm.tokenizer, vlm.model, vlm.processor, vlm.context_length
