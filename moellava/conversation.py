# SPDX-License-Identifier: Apache-2.0
"""Conversation templates: how turns become text, and which of that text is trained on.

A template renders a conversation to `Piece`s. The prompt is their join and the mask is their flags, so what a model
reads when it answers and what it was trained on cannot drift apart. Separators and system texts are those of LLaVA and
MoE-LLaVA; a new template is one more entry here (docs/CUSTOM.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import lru_cache
from typing import NamedTuple

from moellava.constants import DEFAULT_IMAGE_TOKEN
from moellava.errors import UserError
from moellava.registry import Registry


class SeparatorStyle(Enum):
    """How roles, messages and separators are joined."""

    SINGLE = auto()
    """`system SEP role: message SEP role: message SEP …`"""
    TWO = auto()
    """As SINGLE, with `sep` after a question and `sep2` after an answer."""
    MPT = auto()
    """`system SEP role message SEP …`; the roles bring their own markers (ChatML)."""
    PLAIN = auto()
    """`<image> answer SEP`: of a question only its image tags are kept (stage 1)."""
    LLAMA_2 = auto()
    """`[INST] <<SYS>>…<</SYS>> question [/INST] answer </s><s>[INST] …`"""


class Origin(Enum):
    """Where a piece of text comes from."""

    TEMPLATE = auto()
    """Text of the template: special tokens spelled in it are special tokens."""
    SYSTEM = auto()
    """A system prompt that a record brings: plain text, whatever it spells."""
    QUESTION = auto()
    """A human message: plain text, but for the image tags of its record."""
    ANSWER = auto()
    """An answer: plain text, whatever it spells."""


class Piece(NamedTuple):
    """A stretch of rendered text.

    Attributes:
        text: the text itself.
        trained: whether the tokens that begin in it carry labels.
        origin: whose text it is.
    """

    text: str
    trained: bool = False
    origin: Origin = Origin.TEMPLATE


@dataclass
class Conversation:
    """A template and the messages said so far (the fields of LLaVA's class of that name).

    Attributes:
        system: what stands before the first message.
        roles: the names of the human and of the assistant, as they are rendered.
        messages: `[role, text]` in turn, human first; the text None asks for the beginning of an answer. A tuple in
            the shared templates, a list in their copies.
        offset: number of leading messages that belong to the template itself.
        sep_style: how all of it is joined.
        sep: what ends a question (SINGLE, MPT: any message).
        sep2: what ends an answer.
        version: the name that `--version` knows the template by.
        system_prompt: a record's own, behind `system`; None where it brings none.
    """

    system: str
    roles: tuple[str, str]
    messages: Sequence[Sequence[str | None]] = ()
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    system_prompt: str | None = None

    @property
    def terminator(self) -> str:
        """What ends an answer, hence what stops generation."""
        return self.sep if self.sep2 is None else self.sep2

    @property
    def image_tag(self) -> str:
        """What stands for one image in a question: bare, or wrapped where the system text announces a wrapping."""
        return f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>" if "mmtag" in self.version else DEFAULT_IMAGE_TOKEN

    def append_message(self, role: str, message: str | None) -> None:
        """Adds a message; None as the text asks for the beginning of an answer. Raises TypeError on a bare template."""
        if not isinstance(self.messages, list):
            raise TypeError("a template of conv_templates is shared: copy() it before adding messages")
        self.messages.append([role, message])

    def copy(self) -> Conversation:
        """A conversation of its own: messages are never shared."""
        return replace(self, messages=[list(message) for message in self.messages])

    def start(self) -> Conversation:
        """A copy without the messages that the template brings along."""
        # Spelled out: `replace` costs a tenth of what it takes to tokenize a short caption.
        return Conversation(self.system, self.roles, [], 0, self.sep_style, self.sep, self.sep2, self.version)

    def with_system(self, system: str) -> Conversation:
        """The conversation with a system prompt in place of the template's system text, whose marker stays (ChatML).

        Raises:
            UserError: the template has no place for one.
        """
        if not self.system:
            raise UserError(f"the template {self.version!r} has no place for a system prompt")
        marker, newline, _ = self.system.rpartition("\n") if self.sep_style is SeparatorStyle.MPT else ("", "", "")
        return replace(self, system=marker + newline, system_prompt=system)

    def pieces(self) -> list[Piece]:
        """The rendered text in order, each part with its flag; `get_prompt` is its join.

        Questions are kept even where nothing of them is shown: they part one answer from the next.
        """
        return [piece for piece in _RENDERERS[self.sep_style](self) if piece.text or piece.origin is Origin.QUESTION]

    def get_prompt(self) -> str:
        """The text of the conversation."""
        return "".join(piece.text for piece in self.pieces())


def _message(text: str, turn: int, lead: str = "") -> Piece:
    """A message after `lead`; in an answer the space that leads it is trained, as the tokens that begin there are."""
    return Piece(lead + text, True, Origin.ANSWER) if turn % 2 else Piece(lead + text, False, Origin.QUESTION)


def _system(conversation: Conversation, before: str, after: str) -> Iterator[Piece]:
    """The system text, or what a record brings in its place, and what stands around it."""
    if conversation.system_prompt is None:
        yield Piece(before + conversation.system + after)
        return
    yield Piece(before + conversation.system)
    yield Piece(conversation.system_prompt, False, Origin.SYSTEM)
    yield Piece(after)


def _render_colon(conversation: Conversation) -> Iterator[Piece]:
    """SINGLE and TWO: `role: message sep`."""
    two = conversation.sep_style is SeparatorStyle.TWO
    ends = Piece(conversation.sep), Piece(conversation.terminator if two else conversation.sep, True)
    yield from _system(conversation, "", conversation.sep)
    for turn, (role, text) in enumerate(conversation.messages):
        yield _opening(role)
        if text is not None:
            yield _message(text, turn, lead=" ")
            yield ends[turn % 2]


@lru_cache(maxsize=64)
def _opening(role: str) -> Piece:
    return Piece(f"{role}:")


def _render_mpt(conversation: Conversation) -> Iterator[Piece]:
    """MPT: `role message sep`; roles and separators are markers of the vocabulary."""
    yield from _system(conversation, "", conversation.sep)
    for turn, (role, text) in enumerate(conversation.messages):
        yield Piece(str(role))
        if text is not None:
            yield _message(text, turn)
            yield Piece(conversation.sep, bool(turn % 2))


def _render_plain(conversation: Conversation) -> Iterator[Piece]:
    """PLAIN: image tags, answer, sep."""
    yield Piece(conversation.system)
    for turn, (_, text) in enumerate(conversation.messages):
        if text is not None and turn % 2:
            yield _message(text, turn)
            yield Piece(conversation.sep, True)
        elif text is not None:
            yield _message(DEFAULT_IMAGE_TOKEN * text.count(DEFAULT_IMAGE_TOKEN), turn)


def _render_llama_2(conversation: Conversation) -> Iterator[Piece]:
    """LLAMA_2: `sep` opens every round but the first, which the tokenizer opens."""
    for turn, (_, text) in enumerate(conversation.messages):
        if text is None:
            continue
        if turn % 2:
            yield _message(text, turn, lead=" ")
            yield Piece(f" {conversation.terminator}", True)
        else:
            if turn:
                yield Piece(conversation.sep + "[INST] ")
            else:
                yield from _system(conversation, "[INST] <<SYS>>\n", "\n<</SYS>>\n\n")
            yield _message(text, turn)
            yield Piece(" [/INST]")


_RENDERERS = {
    SeparatorStyle.SINGLE: _render_colon,
    SeparatorStyle.TWO: _render_colon,
    SeparatorStyle.MPT: _render_mpt,
    SeparatorStyle.PLAIN: _render_plain,
    SeparatorStyle.LLAMA_2: _render_llama_2,
}

_USER_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_HUMAN_SYSTEM = _USER_SYSTEM.replace("user", "human")
_MMTAG_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_MPT_SYSTEM = (
    "<|im_start|>system\n"
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)
_V0_EXAMPLE = (
    ("Human", "What are the key differences between renewable and non-renewable energy sources?"),
    (
        "Assistant",
        "Renewable energy sources are those that can be replenished naturally in a relatively "
        "short amount of time, such as solar, wind, hydro, geothermal, and biomass. "
        "Non-renewable energy sources, on the other hand, are finite and will eventually be "
        "depleted, such as coal, oil, and natural gas. Here are some key differences between "
        "renewable and non-renewable energy sources:\n"
        "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
        "energy sources are finite and will eventually run out.\n"
        "2. Environmental impact: Renewable energy sources have a much lower environmental impact "
        "than non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, "
        "and other negative effects.\n"
        "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically "
        "have lower operational costs than non-renewable sources.\n"
        "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote "
        "locations than non-renewable sources.\n"
        "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different "
        "situations and needs, while non-renewable sources are more rigid and inflexible.\n"
        "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
        "non-renewable sources are not, and their depletion can lead to economic and social instability.\n",
    ),
)
"""The worked example that FastChat's first Vicuna prompt opens with; it is shown to a chat, never trained on."""


def _two(version: str, sep2: str, system: str = _USER_SYSTEM) -> Conversation:
    return Conversation(system, ("USER", "ASSISTANT"), (), 0, SeparatorStyle.TWO, " ", sep2, version)


def _single(version: str, system: str, messages: Sequence[Sequence[str | None]] = ()) -> Conversation:
    roles = ("Human", "Assistant")
    return Conversation(system, roles, messages, len(messages), SeparatorStyle.SINGLE, "###", None, version)


def _llama_2(version: str, system: str) -> Conversation:
    return Conversation(system, ("USER", "ASSISTANT"), (), 0, SeparatorStyle.LLAMA_2, "<s>", "</s>", version)


conv_vicuna_v0 = _single("v0", _HUMAN_SYSTEM, _V0_EXAMPLE)
conv_vicuna_v1 = _two("v1", "</s>")
conv_mistral = _two("mistral", "</s>")
conv_openchat = _two("openchat", "<|end_of_turn|>")
conv_minicpm = _two("minicpm", "</s>")
conv_qwen = _two("qwen", "<|endoftext|>")
conv_phi = _two("phi", "<|endoftext|>")
conv_stablelm = _two("stablelm", "<|endoftext|>")
conv_llama_2 = _llama_2("llama_2", _LLAMA_2_SYSTEM)
conv_llava_llama_2 = _llama_2("llava_llama_2", _LLAVA_LLAMA_2_SYSTEM)
conv_mpt = Conversation(
    _MPT_SYSTEM, ("<|im_start|>user\n", "<|im_start|>assistant\n"), (), 0, SeparatorStyle.MPT, "<|im_end|>", None, "mpt"
)
conv_llava_plain = Conversation("", ("", ""), (), 0, SeparatorStyle.PLAIN, "\n", None, "plain")
conv_llava_v0 = _single("llava_v0", _HUMAN_SYSTEM)
conv_llava_v0_mmtag = _single("v0_mmtag", _MMTAG_SYSTEM)
conv_llava_v1 = _two("llava_v1", "</s>", _HUMAN_SYSTEM)
conv_llava_v1_mmtag = _two("v1_mmtag", "</s>", _MMTAG_SYSTEM)

conv_templates: Registry[Conversation] = Registry("template (--version)")
for _name, _template in {
    "default": conv_vicuna_v0,
    "v0": conv_vicuna_v0,
    "v1": conv_vicuna_v1,
    "vicuna_v1": conv_vicuna_v1,
    "mistral": conv_mistral,
    "openchat": conv_openchat,
    "minicpm": conv_minicpm,
    "qwen": conv_qwen,
    "phi": conv_phi,
    "stablelm": conv_stablelm,
    "llama_2": conv_llama_2,
    "llava_llama_2": conv_llava_llama_2,
    "mpt": conv_mpt,
    "plain": conv_llava_plain,
    "v0_plain": conv_llava_plain,
    "llava_v0": conv_llava_v0,
    "v0_mmtag": conv_llava_v0_mmtag,
    "llava_v1": conv_llava_v1,
    "v1_mmtag": conv_llava_v1_mmtag,
}.items():
    conv_templates.register(_name, _template)

default_conversation: Conversation = conv_vicuna_v1
"""What `preprocess` takes where no template is named, as in LLaVA, whose guides set it. Commands always name theirs."""
