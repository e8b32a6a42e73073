# SPDX-License-Identifier: Apache-2.0
"""Our templates as Jinja, for the folders that we save: plain Hugging Face processors then give training's prompts.

A message's content is text, or a list of `{"type": "image"}` and `{"type": "text", "text": …}`. An image becomes
`<image>`, with a line break before the text that follows it unless that brings its own, as LLaVA's data has them. A
first message of the role 'system' replaces the template's system text.
"""

from __future__ import annotations

import json

from transformers import PreTrainedTokenizerBase

from moellava.constants import CHAT_TEMPLATE, DEFAULT_IMAGE_TOKEN
from moellava.conversation import Conversation, SeparatorStyle, conv_templates
from moellava.data.render.chat import ChatRenderer
from moellava.errors import UserError

_CONTENT = """{%- macro said(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' -%}{{ IMAGE }}
{%- if not loop.last and loop.nextitem.type == 'text' and not loop.nextitem.text.startswith('\\n') -%}
{{ '\\n' }}
{%- endif -%}
{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

_SYSTEM = """{%- set system = SYSTEM -%}
{%- if messages and messages[0].role == 'system' -%}
{%- set system = LEAD + said(messages[0].content) -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
"""

_ROUNDS = """{{- system + FIRST -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ USER + said(message.content) + SEP }}
{%- else -%}{{ ASSISTANT + said(message.content) + SEP2 }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ OPEN }}{%- endif -%}
"""
"""SINGLE, TWO and MPT: they differ in what stands around a message."""

_PLAIN = """{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ IMAGE * (said(message.content).split(IMAGE) | length - 1) }}
{%- elif message.role == 'assistant' -%}{{ said(message.content) + SEP }}{%- endif -%}
{%- endfor -%}
"""

_LLAMA_2 = """{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{ '' if loop.first else SEP }}{{ '[INST] ' }}
{%- if loop.first -%}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{%- endif -%}
{{ said(message.content) + ' [/INST]' }}
{%- else -%}{{ ' ' + said(message.content) + ' ' + SEP2 }}{%- endif -%}
{%- endfor -%}
"""


_PARTS = (
    _CONTENT.replace("IMAGE", json.dumps(DEFAULT_IMAGE_TOKEN))
    + """{%- set in_text = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.content is string or message.content is none or message.content is not defined -%}
{%- set in_text.messages = in_text.messages + [message] -%}
{%- else -%}
{%- set in_text.messages = in_text.messages + [dict(message, content=said(message.content))] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = in_text.messages -%}
"""
)
"""Stands before a template for texts: messages in parts become texts with tags."""


def saved_chat_template(version: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a folder trained with `version` carries: that template as Jinja, or the tokenizer's own for 'chat_template'.

    The tokenizer's own is as it is trained on, and takes lists of parts as well here: most are written for texts alone.

    Raises:
        UnknownNameError: no such template.
        UserError: the tokenizer has none of its own.
    """
    if version != CHAT_TEMPLATE:
        return jinja_of(version)
    own = ChatRenderer(tokenizer).template
    if own is None:
        raise UserError("--version chat_template needs a tokenizer with a chat template, and this one has none.")
    return own if own.startswith(_PARTS) else _PARTS + own


def jinja_of(version: str) -> str:
    """A chat template that renders exactly what `get_prompt` does, and with `add_generation_prompt` the role to answer.

    As in training, the worked example that `v0` brings along is left out.

    Args:
        version: a name of `conv_templates`.

    Raises:
        UnknownNameError: no such template.
    """
    conversation = conv_templates[version]
    names = _names(conversation)
    body = {SeparatorStyle.PLAIN: _PLAIN, SeparatorStyle.LLAMA_2: _SYSTEM + _LLAMA_2}
    text = _CONTENT + body.get(conversation.sep_style, _SYSTEM + _ROUNDS)
    used = [f"{{%- set {name} = {_literal(value)} -%}}\n" for name, value in names.items() if name in text]
    # A macro sees no variables of the template around it unless they are set before it.
    return "".join(used) + text


def _names(conversation: Conversation) -> dict[str, str]:
    """The constants of a template: what stands before, between and behind messages."""
    user, assistant = conversation.roles
    colon = "" if conversation.sep_style is SeparatorStyle.MPT else ": "
    system_lead, _, _ = conversation.system.rpartition("\n") if colon == "" else ("", "", "")
    return {
        "IMAGE": conversation.image_tag,
        "SYSTEM": conversation.system,
        "LEAD": system_lead + "\n" if system_lead else "",
        "FIRST": conversation.sep,
        "USER": user + colon,
        "ASSISTANT": assistant + colon,
        "OPEN": assistant + colon.rstrip(),
        "SEP2": conversation.terminator,
        "SEP": conversation.sep,
    }


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
