# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5: Vicuna, a CLIP tower, an MLP between them."""

from moellava.lmm.architecture import Architecture, register_architecture
from moellava.lmm.templates import vicuna
from moellava.model.parts import LLAVA

LLAVA_1_5 = register_architecture(
    Architecture(
        name="llava-1.5",
        model_type="llava",
        text_model_types=("llama", "mistral"),
        keywords=LLAVA,
        template=vicuna("<image>\n"),
        models={
            "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
            "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
        },
    )
)
