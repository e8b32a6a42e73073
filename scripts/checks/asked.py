# SPDX-License-Identifier: Apache-2.0
"""What an engine is asked and told: the questions of `own_answers.py` as messages of OpenAI's API, and settings.

Needs nothing installed: each engine has an environment of its own.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

IDENTITY = {"projector_hidden_act": "torch.nn.modules.linear.Identity"}
"""How vLLM calls the activation that Hugging Face calls 'linear'. No name is known to both."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The largest ranks that vLLM can be started for."""

ATTENTION = ("qkv_proj", "o_proj")
"""vLLM's names of the linears of attention."""


def read_answers(path: str | Path) -> dict[str, Any]:
    """A file of answers."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def messages(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """One question with its picture inside."""
    picture = base64.b64encode(Path(answer["image"]).read_bytes()).decode()
    return [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
                {"type": "text", "text": answer["question"]},
            ],
        }
    ]


def vllm_settings(folder: Path) -> dict[str, Any]:
    """What vLLM has to be told of a folder: `--model-impl`, `--trust-remote-code`, `--hf-overrides`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "auto_map" in config:  # else vLLM takes its own class of that name, which knows nothing of the code
        return {"model_impl": "transformers", "trust_remote_code": True}
    return {"hf_overrides": IDENTITY} if config.get("projector_hidden_act") == "linear" else {}


def adapter_settings(folder: Path) -> dict[str, Any]:
    """What vLLM has to be told of the folder of an adapter, beside what it has to be told of a model written as code.

    Its CPU build has no kernels for fused experts beside adapters: they run as the code has them, and have none.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    rank = next(rank for rank in RANKS if rank >= config["r"])
    unfused = {"text_config": {"num_experts": 0}}
    return {"enable_lora": True, "max_lora_rank": rank, "lora_target_modules": list(ATTENTION), "hf_overrides": unfused}
