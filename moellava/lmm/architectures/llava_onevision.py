# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision: Qwen2 and a SigLIP tower, for an image in tiles, for several images, and for videos."""

from moellava.data.frame_processors import ONEVISION
from moellava.lmm.architecture import Architecture, register_architecture
from moellava.lmm.templates import MEDIA, filled
from moellava.model.parts import LLAVA

TEMPLATE = filled(
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + ('' if message['role'] == 'assistant' else ' ') }}"
    + MEDIA.replace("{{ part['text'] }}", "{{ '\n' + part['text'] }}")
    + "{{ '<|im_end|>' }}{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "<image>",
    "<video>",
)
"""The one beside the models opens an answer in one way where it is given and in another where it is asked for; this one
opens it as it is asked for."""

LLAVA_ONEVISION = register_architecture(
    Architecture(
        name="llava-onevision",
        model_type="llava_onevision",
        keywords=LLAVA._replace(others=("image_newline",)),
        template=TEMPLATE,
        video=ONEVISION,
        models={
            "llava-onevision-0.5b-ov": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
            "llava-onevision-7b-ov": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
            "llava-onevision-72b-ov": "llava-hf/llava-onevision-qwen2-72b-ov-hf",
        },
    )
)
