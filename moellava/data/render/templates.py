# SPDX-License-Identifier: Apache-2.0
"""The templates of `conversation.py` as renderers, and the choice of a renderer by its name."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from moellava.constants import CHAT_TEMPLATE, DEFAULT_IMAGE_TOKEN
from moellava.conversation import Conversation, Piece, SeparatorStyle, conv_templates
from moellava.data.records import MODALITIES, Source, media_of, paths_of
from moellava.data.render.chat import ChatRenderer
from moellava.data.render.renderer import Renderer, only_last, turns_of


class TemplateRenderer(Renderer):
    """A template of `conv_templates`.

    Args:
        version: its name. Raises UnknownNameError for another.
    """

    keeps_tags = True
    shows_videos = False

    def __init__(self, version: str):
        self.version = version
        self.template = conv_templates[version]

    @property
    def terminator(self) -> str:
        return self.template.terminator

    @property
    def is_plain(self) -> bool:
        """Whether it is that of stage 1, which keeps only the media tags of a question."""
        return self.template.sep_style is SeparatorStyle.PLAIN

    def places_media(self, has_media: bool) -> bool:
        return has_media or self.is_plain

    def pieces(
        self,
        source: Source,
        *,
        has_media: bool,
        name: str = "the conversation",
        opens: bool = False,
        system: str | None = None,
        last_only: bool = False,
    ) -> list[Piece]:
        conversation = self.filled(source, has_media, name)
        if system is not None:
            conversation = conversation.with_system(system)
        if opens:
            conversation.append_message(conversation.roles[1], None)
        return only_last(conversation.pieces()) if last_only else conversation.pieces()

    def filled(self, source: Source, has_media: bool = False, name: str = "the conversation") -> Conversation:
        """The template with a conversation in it. Raises DataError: see `turns_of`."""
        conversation = self.template.start()
        wrapped = conversation.image_tag != DEFAULT_IMAGE_TOKEN and has_media
        for number, (_, text) in enumerate(turns_of(source, name)):
            if wrapped and number % 2 == 0:
                bare = text.replace(conversation.image_tag, DEFAULT_IMAGE_TOKEN)
                text = bare.replace(DEFAULT_IMAGE_TOKEN, conversation.image_tag)
            conversation.append_message(conversation.roles[number % 2], text)
        return conversation

    def problem(self, record: dict[str, Any]) -> str | None:
        if record.get("system_prompt") is not None and not self.template.system:
            return f"has a system prompt, for which --version {self.version} has no place"
        turns = len(record["conversations"])
        if not self.is_plain or (turns == 2 and media_of(record)):
            return None
        counts = " and ".join(f"{len(paths_of(record, modality))} {modality}s" for modality in MODALITIES)
        return f"has {turns} turns and {counts}, but --version {self.version} trains on one caption of something shown"


def renderer_for(version: str, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """The renderer of a version: a template of ours, or the tokenizer's own chat template over plain messages."""
    return ChatRenderer(tokenizer) if version == CHAT_TEMPLATE else TemplateRenderer(version)
