# SPDX-License-Identifier: Apache-2.0
"""The Jinja templates that saved folders carry."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moellava.conversation import conv_templates
from moellava.data.render.jinja import jinja_of, saved_chat_template

SNIPPETS = ["a", " ", "\n", "\n\n", "<image>", "{{ x }}", "{% raw %}", "'", '"', "\\n", "🐱", "</s>", "  end"]
texts = st.lists(st.sampled_from(SNIPPETS), max_size=6).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return copy.copy(tokenizers["phi"])


@pytest.mark.parametrize("version", conv_templates)
@settings(max_examples=25, deadline=None)
@given(said=st.lists(texts, min_size=1, max_size=5))
def test_jinja_renders_what_get_prompt_does(tokenizer, version, said):
    conversation = conv_templates[version].start()
    messages = []
    for number, text in enumerate(said):
        conversation.append_message(conversation.roles[number % 2], text)
        messages.append({"role": ("user", "assistant")[number % 2], "content": text})
    tokenizer.chat_template = jinja_of(version)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == conversation.get_prompt()
    if len(said) % 2:
        conversation.append_message(conversation.roles[1], None)
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert prompt == conversation.get_prompt()


def rendered(tokenizer, version, *messages) -> str:
    tokenizer.chat_template = jinja_of(version)
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


def test_content_in_parts_puts_images_on_lines_of_their_own(tokenizer):
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]
    assert "USER: <image><image>\nWhat? ASSISTANT:" in rendered(tokenizer, "v1", {"role": "user", "content": parts})
    parts = [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]
    assert "USER: <image>\nWhat? ASSISTANT:" in rendered(tokenizer, "v1", {"role": "user", "content": parts})
    assert "<Image><image></Image>\nWhat?" in rendered(tokenizer, "v1_mmtag", {"role": "user", "content": parts})


def test_a_system_message_replaces_the_system_text(tokenizer):
    messages = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}
    assert rendered(tokenizer, "qwen", *messages) == "Be brief. USER: q ASSISTANT:"
    assert rendered(tokenizer, "llama_2", *messages) == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nq [/INST]"
    assert rendered(tokenizer, "mpt", *messages).startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_the_version_chat_template_keeps_the_tokenizers_own(tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert saved_chat_template("chat_template", tokenizer).endswith("{{ messages[0].content }}")
    assert saved_chat_template("qwen", tokenizer) == jinja_of("qwen")
