# SPDX-License-Identifier: Apache-2.0
"""Chat templates that would loop for ever or fill the memory."""

from __future__ import annotations

import time

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from moellava.conversation import conv_templates
from moellava.data.render.chat_template import ChatTemplate
from moellava.data.render.jinja import jinja_of
from moellava.errors import UserError

TURNS = [("user", "What is it?"), ("assistant", "A dog."), ("user", "Sure?"), ("assistant", "Yes.")]
LAUGHS = "{% set a=['ha'] %}" + "{% set a=[a,a] %}" * 40
LONG = "{% set a='x'*1000000 %}"

HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over constants": "{% for a in [1,2,3,4,5,6,7,8,9] %}" * 12 + "x" + "{% endfor %}" * 12,
    "recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "blocks": "{% block b %}{{ self.b() }}{% endblock %}",
    "a range": "{{ range(10**9)|list|length }}",
    "times": "{{ 'x' * 10**10 }}",
    "times a list": "{{ ([1] * 10**9)|length }}",
    "powers": "{% set ns=namespace(x=9) %}{% for i in range(1000) %}{% set ns.x = ns.x*ns.x %}{% endfor %}",
    "power": "{{ 9 ** (9**9) }}",
    "doubling +": "{% set a='x'*1000 %}" + "{% set a = a + a %}" * 40,
    "doubling ~": "{% set a='x'*1000 %}" + "{% set a = a ~ a %}" * 40,
    "doubling blocks": "{% set a='x'*1000 %}" + "{% set a %}{{a}}{{a}}{% endset %}" * 40,
    "slices": "{% set a='x'*10000000 %}{% for i in range(99999) %}{% set b=a[1:] %}{% endfor %}",
    "text in a loop": "{% macro f() %}{% for a in range(99999) %}"
    + "y" * 10000
    + "{% endfor %}{% endmacro %}{{ f() }}",
    "center": "{{ 'x'.center(10**10) }}",
    "center as a filter": "{{ 'x'|center(10000000000) }}",
    "zfill": "{{ '1'.zfill(10**10) }}",
    "expandtabs": "{% set a='\t'*1000000 %}{{ a.expandtabs(1000000) }}",
    "%": "{{ '%10000000000d' % 1 }}",
    "% *": "{{ '%*d' % (10000000000, 1) }}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "format in format": "{{ '{:{}}'.format(1, 10000000000) }}",
    "format as a filter": "{{ '%10000000000d'|format(1) }}",
    "replace": LONG + "{{ a.replace('x', a) }}",
    "replace as a filter": LONG + "{{ a|replace('x', a) }}",
    "translate": LONG + "{{ a.translate({120: a}) }}",
    "join": LONG + "{{ a.join(a) }}",
    "join as a filter": LONG + "{{ a|list|join(a) }}",
    "indent": "{% set a='\n'*1000000 %}{{ a|indent(1000000) }}",
    "tojson": "{{ [[1]]|tojson(indent=10**9) }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list|length }}",
    "laughs": LAUGHS + "{{ a }}",
    "laughs as JSON": LAUGHS + "{{ a|tojson }}",
    "laughs in %": LAUGHS + "{{ '%s' % (a,) }}",
    "laughs in format": LAUGHS + "{{ '{}'.format(a) }}",
    "laughs in ~": LAUGHS + "{{ a ~ 'x' }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "no number": "{{ 1 // 0 }}",
}
"""What a template does -> the template."""

SECONDS = 20


class Rendering:
    """What `ChatTemplate` asks of a tokenizer, by transformers' own function."""

    added_tokens_decoder: dict = {}

    def apply_chat_template(self, messages, chat_template, tokenize=False, add_generation_prompt=False):
        (text,), _ = chat_template_utils.render_jinja_template(
            conversations=[messages], chat_template=chat_template, add_generation_prompt=add_generation_prompt
        )
        return text


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_named_in_seconds(name):
    began = time.monotonic()
    with pytest.raises(UserError, match="the chat template cannot render 4 alternating messages: "):
        ChatTemplate(Rendering(), HOSTILE[name]).render(TURNS, opens=False)
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize("version", sorted(conv_templates))
def test_templates_render_as_they_do_without_limits(version, monkeypatch):
    limited = ChatTemplate(Rendering(), jinja_of(version)).render(TURNS, opens=True)
    monkeypatch.setattr(chat_template_utils, "ImmutableSandboxedEnvironment", ImmutableSandboxedEnvironment)
    chat_template_utils._compile_jinja_template.cache_clear()
    assert limited == ChatTemplate(Rendering(), jinja_of(version)).render(TURNS, opens=True)
    chat_template_utils._compile_jinja_template.cache_clear()


def test_what_templates_do_with_loops_and_filters_is_unchanged():
    text = (
        "{%- for m in messages -%}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}{{ m.role|upper }}"
        "{%- if not loop.last and loop.nextitem.role == 'user' %}>{% endif -%}{{ m.content[:3] ~ 1 }}{%- endfor -%}"
        "{{ messages|map(attribute='role')|join(',') }}{{ {'a': [1]}|tojson }}{{ '%03d' % 7 }}{{ '{:>4}'.format(1) }}"
        "{%- for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% else %}none{% endfor %}"
        "{%- for x in [] %}{% else %}nothing{% endfor %}{% set s %}a{{ 1 }}{% endset %}{{ s|trim }}"
    )
    said = ChatTemplate(Rendering(), text).render(TURNS[:2], opens=False)
    assert said == '0False2USERWha11True2ASSISTANTA d1user,assistant{"a": [1]}007   1a1nothinga1'


def test_a_long_conversation_is_within_the_limits():
    turns = [("user" if number % 2 == 0 else "assistant", "word " * 2000) for number in range(200)]
    assert len(ChatTemplate(Rendering(), jinja_of("v1")).render(turns, opens=False)) > 1_900_000
