# SPDX-License-Identifier: Apache-2.0
"""Conversations -> pieces of text with their trained flags: by a template of ours, or by a Jinja chat template."""

from moellava.data.render.chat import ChatRenderer
from moellava.data.render.limits import limit_templates
from moellava.data.render.renderer import AnswersApartError, Renderer, turns_of, up_to
from moellava.data.render.templates import TemplateRenderer, renderer_for

__all__ = ["AnswersApartError", "ChatRenderer", "Renderer", "TemplateRenderer", "renderer_for", "turns_of", "up_to"]

limit_templates()
