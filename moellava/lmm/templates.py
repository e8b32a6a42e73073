"""Chat templates on record, for families whose models are published without one or with one that cannot be trained on.

They render the prompts that the models know. LLaVA's own end every answer with the end-of-sequence token, as LLaVA was
trained; the templates beside the converted models leave it out, so that a model trained on them would never stop. That
of OneVision and Interleave opens an answer in one way where it is given and in another where it is asked for; the one
here opens it as it is asked for.
Placeholders are written as the family's processor spells them.
"""

from __future__ import annotations

from collections.abc import Collection

_MEDIA = """{%- for part in message['content'] if part['type'] == 'image' %}IMAGE{% endfor %}\
{%- for part in message['content'] if part['type'] == 'video' %}VIDEO{% endfor %}\
{%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"""
"""A message whose images stand before its text, and videos between them."""

_IN_ORDER = """{%- for part in message['content'] %}\
{%- if part['type'] == 'image' %}IMAGE{% elif part['type'] == 'video' %}VIDEO\
{% else %}{{ part['text'] }}{% endif %}{% endfor %}"""
"""A message in the order in which it was written."""


def _filled(template: str, image: str, video: str = "") -> str:
    """A template with the family's placeholders in it."""
    return template.replace("IMAGE", image).replace("VIDEO", video)


def _vicuna(image: str, video: str = "") -> str:
    return _filled(
        "{{ bos_token }}{%- for message in messages %}"
        "{%- if message['role'] == 'system' %}" + _MEDIA + "{{ ' ' }}"
        "{%- elif message['role'] == 'user' %}{{ 'USER: ' }}" + _MEDIA + "{{ ' ' }}"
        "{%- else %}{{ 'ASSISTANT: ' }}" + _MEDIA + "{{ eos_token }}{% endif %}"
        "{%- endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        image,
        video,
    )


def _chatml(image: str, video: str = "", system: str = "") -> str:
    opening = (
        "{%- if messages[0]['role'] != 'system' %}<|im_start|>system\n" + system + "<|im_end|>\n{% endif %}"
        if system
        else ""
    )
    return _filled(
        opening
        + "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        + _IN_ORDER
        + "{{ '<|im_end|>\n' }}{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        image,
        video,
    )


_CHATML_DIRECT = _filled(
    "{%- if messages[0]['role'] != 'system' %}<|im_start|>system\nAnswer the questions.<|im_end|>{% endif %}"
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    + _MEDIA
    + "{{ '<|im_end|>' }}{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "<image>\n",
    "<video>\n",
)

_ONEVISION = _filled(
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + ('' if message['role'] == 'assistant' else ' ') }}"
    + _MEDIA.replace("{{ part['text'] }}", "{{ '\n' + part['text'] }}")
    + "{{ '<|im_end|>' }}{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "<image>",
    "<video>",
)

_MISTRAL = _filled(
    "{{ bos_token }}{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}{{ ' ' }}" + _MEDIA + "{{ eos_token }}"
    "{%- elif message['role'] == 'user' %}{{ '[INST] ' }}"
    + _MEDIA
    + "{{ ' [/INST]' }}{% else %}{{ '<<SYS>>\n' }}"
    + _MEDIA
    + "{{ '\n<</SYS>>\n\n' }}{% endif %}"
    "{%- endfor %}",
    "<image>\n",
    "<video>\n",
)

_GEMMA = _filled(
    "{{ bos_token }}{%- for message in messages %}"
    "{%- set opened = loop.previtem is defined and loop.previtem['role'] == 'system' %}"
    "{%- if not opened %}<start_of_turn>{{ ('model' if message['role'] == 'assistant' else 'user') + '\n' }}{% endif %}"
    + _IN_ORDER.replace("part['text']", "part['text'] | trim")
    + "{{ '\n\n' if message['role'] == 'system' else '<end_of_turn>\n' }}{%- endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "<start_of_image>",
)

_SMOLVLM = _filled(
    "<|im_start|>{%- for message in messages %}"
    "{{ message['role'].capitalize() + (':' if message['content'][0]['type'] == 'image' else ': ') }}"
    + _IN_ORDER
    + "{{ '<end_of_utterance>\n' }}{%- endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
    "<image>",
    "<video>",
)

_LLAMA = _filled(
    "{{ bos_token }}{%- for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    + _IN_ORDER
    + "{{ '<|eot_id|>' }}{%- endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "<|image|>",
)

_PALIGEMMA = (
    "{%- for message in messages %}"
    "{%- for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}{% endfor %}{{ bos_token }}"
    "{%- for message in messages %}"
    "{%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{- eos_token if message['role'] == 'assistant' else '\n' }}{%- endfor %}"
)
"""Images, then a prefix and what follows it, as big_vision trained it: no roles are marked."""

_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
_QWEN_SYSTEM = "You are a helpful assistant."

_QWEN_VL = (
    "{%- set seen = namespace(images=0) %}"
    "{%- if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- for part in message['content'] %}{%- if part['type'] == 'image' %}{% set seen.images = seen.images + 1 %}"
    "{{ 'Picture ' ~ seen.images ~ ': <img>' ~ part.get('image', '') ~ '</img>\n' }}"
    "{%- else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A part `{"type": "image", "image": PATH}` shows its path, as the model's own tokenizer wants it."""

_PHI3_V = (
    "{%- set seen = namespace(images=0) %}"
    "{%- for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{%- for part in message['content'] %}{%- if part['type'] == 'image' %}{% set seen.images = seen.images + 1 %}"
    "{{ '<|image_' ~ seen.images ~ '|>\n' }}"
    "{%- else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|end|>\n' }}{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

RECORDED_TEMPLATES: dict[str, str] = {
    "llava-1.5": _vicuna("<image>\n"),
    "llava-1.6": _vicuna("<image>\n"),
    "llava-next-video": _vicuna("<image>\n", "<video>\n"),
    "llava-interleave": _ONEVISION,
    "llava-onevision": _ONEVISION,
    "qwen2-vl": _chatml(_QWEN_IMAGE, _QWEN_VIDEO, _QWEN_SYSTEM),
    "qwen2.5-vl": _chatml(_QWEN_IMAGE, _QWEN_VIDEO, _QWEN_SYSTEM),
    "qwen3-vl": _chatml(_QWEN_IMAGE, _QWEN_VIDEO),
    "internvl": _chatml("<IMG_CONTEXT>\n", "<video>\n"),
    "gemma3": _GEMMA,
    "smolvlm": _SMOLVLM,
    "llama-3.2-vision": _LLAMA,
    "paligemma": _PALIGEMMA,
    "qwen-vl": _QWEN_VL,
    "phi3-v": _PHI3_V,
}
"""Family -> its template in Jinja, over messages whose content is a list of images, videos and texts."""

MISTRAL_TEMPLATE = _MISTRAL
"""Of LLaVA-1.6 and LLaVA-NeXT-Video over Mistral, which have Mistral's turns instead of Vicuna's."""

CHATML_DIRECT_TEMPLATE = _CHATML_DIRECT
"""Of the same over Yi (the 34B models), whose turns are ChatML's with no line breaks between them."""


def recorded_template(family_id: str, text_model_type: str, special: Collection[str] = ()) -> str | None:
    """The template on record for a model, None if there is none.

    Args:
        family_id: its family.
        text_model_type: `model_type` of its language model.
        special: the special tokens of its tokenizer; they tell Yi from Vicuna, which share a `model_type`.
    """
    if family_id in ("llava-1.6", "llava-next-video"):
        if text_model_type == "mistral":
            return MISTRAL_TEMPLATE
        if "<|im_end|>" in special:
            return CHATML_DIRECT_TEMPLATE
    return RECORDED_TEMPLATES.get(family_id)
