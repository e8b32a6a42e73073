# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL: Qwen2-VL with another encoder, laid out and spoken to alike."""

import dataclasses

from moellava.lmm.architecture import register_architecture
from moellava.lmm.architectures.qwen2_vl import QWEN2_VL

QWEN2_5_VL = register_architecture(
    dataclasses.replace(
        QWEN2_VL,
        name="qwen2.5-vl",
        model_type="qwen2_5_vl",
        models={
            "qwen2.5-vl-3b-instruct": "Qwen/Qwen2.5-VL-3B-Instruct",
            "qwen2.5-vl-7b-instruct": "Qwen/Qwen2.5-VL-7B-Instruct",
            "qwen2.5-vl-72b-instruct": "Qwen/Qwen2.5-VL-72B-Instruct",
        },
    )
)
