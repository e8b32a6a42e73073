# SPDX-License-Identifier: Apache-2.0
"""What a chat template would write differently at every rendering, so that training and answers would differ."""

from __future__ import annotations

import re

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import loopcontrols

from moellava.errors import UserError

_MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""The block that only transformers knows."""


def require_steady(template: str) -> None:
    """Raises UserError for a template that asks what time it is, other than `own_template` has answered already, or
    chooses by chance. One that is no Jinja is left to whoever renders it."""
    if "strftime_now" not in template and "random" not in template:
        return
    try:
        tree = Environment(extensions=[loopcontrols]).parse(_MARKS.sub("", template))
    except (TemplateSyntaxError, RecursionError):
        return
    called = {call.node.name for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Name)}
    filters = {used.name for used in tree.find_all(nodes.Filter)}
    for name in sorted({"strftime_now"} & called | {"random"} & filters):
        raise UserError(
            f"the chat template writes something else at every rendering, by {name}, so that training and answers "
            "would differ: write a fixed text in its place into chat_template.jinja"
        )
