# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Interleave: LLaVA's class over Qwen2, trained on several images."""

from moellava.lmm.architecture import Architecture, register_architecture
from moellava.lmm.architectures.llava_onevision import TEMPLATE
from moellava.model.parts import LLAVA

LLAVA_INTERLEAVE = register_architecture(
    Architecture(
        name="llava-interleave",
        model_type="llava",
        text_model_types=("qwen2",),
        keywords=LLAVA,
        template=TEMPLATE,
        models={
            "llava-interleave-qwen-0.5b": "llava-hf/llava-interleave-qwen-0.5b-hf",
            "llava-interleave-qwen-7b": "llava-hf/llava-interleave-qwen-7b-hf",
        },
    )
)
