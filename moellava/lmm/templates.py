# SPDX-License-Identifier: Apache-2.0
"""Building blocks of the chat templates on record, for models that are published without one that can be trained on.

They render the prompts that the models know. LLaVA's own end every answer with the end-of-sequence token, as LLaVA was
trained; the templates beside the converted models leave it out, so that a model trained on them would never stop.
Placeholders are written as the architecture's processor spells them.
"""

from __future__ import annotations

MEDIA = """{%- for part in message['content'] if part['type'] == 'image' %}IMAGE{% endfor %}\
{%- for part in message['content'] if part['type'] == 'video' %}VIDEO{% endfor %}\
{%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"""
"""A message whose images stand before its text, and videos between them."""

IN_ORDER = """{%- for part in message['content'] %}\
{%- if part['type'] == 'image' %}IMAGE{% elif part['type'] == 'video' %}VIDEO\
{% else %}{{ part['text'] }}{% endif %}{% endfor %}"""
"""A message in the order in which it was written."""


def filled(template: str, image: str, video: str = "") -> str:
    """A template with the placeholders of an architecture in it."""
    return template.replace("IMAGE", image).replace("VIDEO", video)


def vicuna(image: str, video: str = "") -> str:
    """Vicuna's turns, answers ended by the end-of-sequence token."""
    return filled(
        "{{ bos_token }}{%- for message in messages %}"
        "{%- if message['role'] == 'system' %}" + MEDIA + "{{ ' ' }}"
        "{%- elif message['role'] == 'user' %}{{ 'USER: ' }}" + MEDIA + "{{ ' ' }}"
        "{%- else %}{{ 'ASSISTANT: ' }}" + MEDIA + "{{ eos_token }}{% endif %}"
        "{%- endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        image,
        video,
    )


def chatml(image: str, video: str = "", system: str = "") -> str:
    """ChatML; `system` opens conversations that have no system prompt of their own."""
    opening = (
        "{%- if messages[0]['role'] != 'system' %}<|im_start|>system\n" + system + "<|im_end|>\n{% endif %}"
        if system
        else ""
    )
    return filled(
        opening
        + "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        + IN_ORDER
        + "{{ '<|im_end|>\n' }}{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        image,
        video,
    )
