# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 with images."""

from moellava.lmm.architecture import Architecture, register_architecture
from moellava.lmm.templates import IN_ORDER, filled
from moellava.model.parts import LLAVA

_TEMPLATE = filled(
    "{{ bos_token }}{%- for message in messages %}"
    "{%- set opened = loop.previtem is defined and loop.previtem['role'] == 'system' %}"
    "{%- if not opened %}<start_of_turn>{{ ('model' if message['role'] == 'assistant' else 'user') + '\n' }}{% endif %}"
    + IN_ORDER.replace("part['text']", "part['text'] | trim")
    + "{{ '\n\n' if message['role'] == 'system' else '<end_of_turn>\n' }}{%- endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "<start_of_image>",
)

GEMMA3 = register_architecture(
    Architecture(
        name="gemma3",
        model_type="gemma3",
        keywords=LLAVA,
        template=_TEMPLATE,
        models={
            "gemma3-4b-it": "google/gemma-3-4b-it",
            "gemma3-12b-it": "google/gemma-3-12b-it",
            "gemma3-27b-it": "google/gemma-3-27b-it",
        },
    )
)
