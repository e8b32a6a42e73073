# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.6 (LLaVA-NeXT): images are cut into tiles; over Vicuna, Mistral or Yi, which have turns of their own."""

from collections.abc import Collection

from moellava.lmm.architecture import Architecture, Template, register_architecture
from moellava.lmm.templates import MEDIA, filled, vicuna
from moellava.model.parts import LLAVA

_MISTRAL = filled(
    "{{ bos_token }}{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}{{ ' ' }}" + MEDIA + "{{ eos_token }}"
    "{%- elif message['role'] == 'user' %}{{ '[INST] ' }}"
    + MEDIA
    + "{{ ' [/INST]' }}{% else %}{{ '<<SYS>>\n' }}"
    + MEDIA
    + "{{ '\n<</SYS>>\n\n' }}{% endif %}"
    "{%- endfor %}",
    "<image>\n",
    "<video>\n",
)

_CHATML_DIRECT = filled(
    "{%- if messages[0]['role'] != 'system' %}<|im_start|>system\nAnswer the questions.<|im_end|>{% endif %}"
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    + MEDIA
    + "{{ '<|im_end|>' }}{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "<image>\n",
    "<video>\n",
)
"""Over Yi (the 34B models): ChatML with no line breaks between its turns."""


def over_language_models(otherwise: str) -> Template:
    """Mistral's turns over Mistral, ChatML's over Yi, `otherwise` over Vicuna."""

    def choose(text_model_type: str, special: Collection[str]) -> str:
        if text_model_type == "mistral":
            return _MISTRAL
        return _CHATML_DIRECT if "<|im_end|>" in special else otherwise

    return choose


LLAVA_1_6 = register_architecture(
    Architecture(
        name="llava-1.6",
        model_type="llava_next",
        keywords=LLAVA._replace(others=("image_newline",)),
        template=over_language_models(vicuna("<image>\n")),
        models={
            "llava-1.6-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
            "llava-1.6-vicuna-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
            "llava-1.6-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
        },
    )
)
