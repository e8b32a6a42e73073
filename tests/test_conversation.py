# SPDX-License-Identifier: Apache-2.0
"""Templates: rendered text, copies, and errors."""

from __future__ import annotations

import pytest

from moellava.conversation import Conversation, SeparatorStyle, conv_qwen, conv_templates
from moellava.errors import UnknownNameError

USER_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN_SYSTEM = USER_SYSTEM.replace("user", "human")
LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
MPT = (
    "<|im_start|>system\n"
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)


def filled(version: str, *texts: str | None) -> str:
    conversation = conv_templates[version].start()
    for number, text in enumerate(texts):
        conversation.append_message(conversation.roles[number % 2], text)
    return conversation.get_prompt()


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("v1", f"{USER_SYSTEM} USER: q ASSISTANT: a</s>USER: r ASSISTANT:"),
        ("mistral", f"{USER_SYSTEM} USER: q ASSISTANT: a</s>USER: r ASSISTANT:"),
        ("minicpm", f"{USER_SYSTEM} USER: q ASSISTANT: a</s>USER: r ASSISTANT:"),
        ("openchat", f"{USER_SYSTEM} USER: q ASSISTANT: a<|end_of_turn|>USER: r ASSISTANT:"),
        ("qwen", f"{USER_SYSTEM} USER: q ASSISTANT: a<|endoftext|>USER: r ASSISTANT:"),
        ("phi", f"{USER_SYSTEM} USER: q ASSISTANT: a<|endoftext|>USER: r ASSISTANT:"),
        ("stablelm", f"{USER_SYSTEM} USER: q ASSISTANT: a<|endoftext|>USER: r ASSISTANT:"),
        ("llava_v1", f"{HUMAN_SYSTEM} USER: q ASSISTANT: a</s>USER: r ASSISTANT:"),
        ("v0", f"{HUMAN_SYSTEM}###Human: q###Assistant: a###Human: r###Assistant:"),
        ("llava_v0", f"{HUMAN_SYSTEM}###Human: q###Assistant: a###Human: r###Assistant:"),
        (
            "mpt",
            f"{MPT}<|im_end|><|im_start|>user\nq<|im_end|><|im_start|>assistant\na<|im_end|>"
            "<|im_start|>user\nr<|im_end|><|im_start|>assistant\n",
        ),
        ("llava_llama_2", f"[INST] <<SYS>>\n{LLAVA_LLAMA_2}\n<</SYS>>\n\nq [/INST] a </s><s>[INST] r [/INST]"),
    ],
)
def test_prompts(version, expected):
    assert filled(version, "q", "a", "r", None) == expected


def test_plain_keeps_only_the_images_of_a_question():
    assert filled("plain", "Look: <image>\nWhat is it?", "A cat.") == "<image>A cat.\n"
    assert filled("plain", "<image> and <image>", None) == "<image><image>"


def test_an_empty_answer_is_still_ended():
    assert filled("v1", "q", "").endswith("ASSISTANT: </s>")
    assert filled("mpt", "q", "").endswith("assistant\n<|im_end|>")


def test_mmtag_templates_wrap_images():
    assert conv_templates["v1_mmtag"].image_tag == conv_templates["v0_mmtag"].image_tag == "<Image><image></Image>"
    assert conv_templates["v1"].image_tag == "<image>"


def test_v0_brings_an_example_that_is_not_trained_on():
    template = conv_templates["v0"]
    assert template.offset == len(template.messages) == 2
    assert "renewable energy" in template.copy().get_prompt()
    assert "renewable energy" not in filled("v0", "q", "a")


@pytest.mark.parametrize("version", conv_templates)
def test_copies_share_no_messages(version):
    template = conv_templates[version]
    before = template.get_prompt()
    one, other = template.copy(), template.copy()
    one.append_message(one.roles[0], "hi <image>")
    one.messages[0][1] = "changed"
    assert other.get_prompt() == template.get_prompt() == before
    further = one.copy()
    further.append_message(one.roles[1], "there")
    assert len(further.messages) == len(one.messages) + 1


def test_a_shared_template_takes_no_messages():
    with pytest.raises(TypeError, match="copy"):
        conv_qwen.append_message("USER", "hi")


def test_the_prompt_is_the_join_of_its_pieces():
    conversation = conv_qwen.copy()
    for number, text in enumerate(["<image>\nq", "a", "r", "b"]):
        conversation.append_message(conversation.roles[number % 2], text)
    pieces = conversation.pieces()
    assert "".join(piece.text for piece in pieces) == conversation.get_prompt()
    assert [piece.text for piece in pieces if piece.trained] == [" a", "<|endoftext|>", " b", "<|endoftext|>"]


def test_a_template_of_ones_own_as_in_the_guide():
    conversation = Conversation(
        system="Be brief.",
        roles=("USER", "ASSISTANT"),
        version="mine",
        messages=(),
        offset=0,
        sep_style=SeparatorStyle.TWO,
        sep=" ",
        sep2="<|endoftext|>",
    ).copy()
    conversation.append_message("USER", "q")
    conversation.append_message("ASSISTANT", None)
    assert conversation.get_prompt() == "Be brief. USER: q ASSISTANT:"
    assert conversation.terminator == "<|endoftext|>"


def test_an_unknown_version_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match="stablelm.*mmtag") as error:
        conv_templates["stabelm"]
    assert "Did you mean 'stablelm'?" in str(error.value)
