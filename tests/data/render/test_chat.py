# SPDX-License-Identifier: Apache-2.0
"""`--version chat_template`: any tokenizer's own template."""

from __future__ import annotations

import pytest

from moellava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moellava.data.encoder import CountedImages, Encoder
from moellava.data.preprocess import preprocess
from moellava.data.render import ChatRenderer
from moellava.data.render.chat_template import ChatTemplate
from moellava.data.render.spans import chat_pieces, chat_terminator
from moellava.errors import DataError, UserError

CHATML = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{{ bos_token + '[INST] ' + message.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CONVERSATION = [
    {"from": "human", "value": "<image>\nWhat is <|im_end|>? "},
    {"from": "gpt", "value": " a cat <|im_end|>"},
    {"from": "human", "value": "user"},
    {"from": "gpt", "value": "assistant"},
]


@pytest.fixture
def with_template(monkeypatch):
    """A tokenizer with a chat template for the length of a test: a copy of one takes seconds."""

    def set_template(tokenizer, template):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return tokenizer

    return set_template


def supervised(batch, tokenizer) -> str:
    return tokenizer.decode([label for label in batch["labels"][0].tolist() if label != IGNORE_INDEX])


def test_chatml(tokenizers, with_template):
    tokenizer = with_template(tokenizers["qwen"], CHATML)
    batch = preprocess([CONVERSATION], tokenizer, version="chat_template", has_image=True)
    ids = batch["input_ids"][0].tolist()
    assert supervised(batch, tokenizer) == " a cat <|im_end|><|im_end|>assistant<|im_end|>"
    assert ids.count(151645) == 5 and ids.count(IMAGE_TOKEN_INDEX) == 1, "what is typed is no special token"
    assert ChatRenderer(tokenizer).terminator == "<|im_end|>" and ChatRenderer(tokenizer).ends_with_special_token
    encoder = Encoder(tokenizer, ChatRenderer(tokenizer), CountedImages(1))
    prompt = encoder.encode({"conversations": CONVERSATION[:3], "image": "a.png"}, opens=True).ids
    assert ids[: len(prompt)] == prompt


def test_ids_are_those_of_the_tokenizer_where_nothing_special_is_typed(tokenizers, with_template):
    tokenizer = with_template(tokenizers["qwen"], CHATML)
    said = ["hello", "I see.", "thanks", "bye"]
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    batch = preprocess([turns], tokenizer, version="chat_template")
    assert batch["input_ids"][0].tolist() == tokenizer.apply_chat_template(messages, return_dict=True).input_ids


def test_a_template_that_strips_messages_and_spells_bos(tokenizers, with_template):
    tokenizer = with_template(tokenizers["mistral"], LLAMA)
    batch = preprocess([CONVERSATION], tokenizer, version="chat_template", has_image=True)
    assert batch["input_ids"][0].tolist().count(1) == 2, "one BOS for each question, none from the tokenizer"
    assert supervised(batch, tokenizer) == "a cat <|im_end|> </s> assistant </s>"
    assert chat_terminator(ChatTemplate(tokenizer, tokenizer.chat_template)) == " </s>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "none.*chat_template.jinja"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "ends an answer with nothing"),
        ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", "leaves out, repeats or reorders"),
        ("{{ raise_exception('system role missing') }}", "system role missing"),
        ("{% for m in messages %}{{ m.content + m.content }}<|im_end|>{% endfor %}", "repeats"),
    ],
)
def test_unsound_templates_are_refused_with_the_reason(tokenizers, with_template, template, reason):
    tokenizer = with_template(tokenizers["qwen"], template)
    with pytest.raises(UserError, match=f"(?s){reason}"):
        preprocess([CONVERSATION], tokenizer, version="chat_template")


def test_a_template_that_rewrites_words_is_refused_by_record(tokenizers, with_template):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.content | replace('cat', 'dog') + '<|im_end|>' }}{% endfor %}"
    )
    tokenizer = with_template(tokenizers["qwen"], template)
    with pytest.raises(DataError, match="Record 7.*rewrites.*dog"):
        chat_pieces(ChatTemplate(tokenizer, template), [("user", "q"), ("assistant", "a cat")], "Record 7")
    assert chat_pieces(ChatTemplate(tokenizer, template), [("user", "q"), ("assistant", "a bird")])


SYSTEMS = [
    pytest.param(CHATML, "<|im_start|>system\n{}<|im_end|>\n", id="a turn of its own"),
    pytest.param(
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (system if loop.first else '') + m.content"
        " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>user\n{}\n\n",
        id="inside the first question",
    ),
]


@pytest.mark.parametrize(("template", "where"), SYSTEMS)
def test_a_system_prompt_is_plain_text_where_the_template_puts_it(tokenizers, with_template, template, where):
    tokenizer = with_template(tokenizers["qwen"], template)
    encoder = Encoder(tokenizer, ChatRenderer(tokenizer), CountedImages(1))
    record = {"conversations": CONVERSATION, "image": "a.png"}
    own = encoder.encode(record | {"system_prompt": "Be <|im_end|> and <image> brief."})
    bare = encoder.encode(record | {"system_prompt": "Be brief."})
    text = tokenizer.decode([index for index in own.ids if index != IMAGE_TOKEN_INDEX])
    assert text.startswith(where.format("Be <|im_end|> and <image> brief.")) and "You are" not in text
    assert own.ids.count(151645) == bare.ids.count(151645), "what is typed is no special token"
    assert own.ids.count(IMAGE_TOKEN_INDEX) == bare.ids.count(IMAGE_TOKEN_INDEX) == 1
    assert [label for label in own.labels if label >= 0] == [label for label in bare.labels if label >= 0]


def test_a_template_without_a_place_for_a_system_prompt_refuses_it_by_record(tokenizers, with_template):
    opening = "'<|im_start|>' + message.role"
    without = CHATML.replace(opening, f"'' if message.role == 'system' else {opening}")
    tokenizer = with_template(tokenizers["qwen"], without)
    encoder = Encoder(tokenizer, ChatRenderer(tokenizer), CountedImages(1))
    record = {"conversations": CONVERSATION[2:]}
    assert encoder.encode(record).is_trained
    with pytest.raises(DataError, match="Record 7.*leaves out"):
        encoder.encode(record | {"system_prompt": "Be brief."}, "Record 7")
