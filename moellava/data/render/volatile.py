"""What a chat template would write differently tomorrow: the date.

Llama 3.2, gpt-oss and others write today's date by `strftime_now(format)`. A run that goes on over midnight would see
other prompts than it has measured, and a folder would ask its model what it was not trained on. So the date is written
into the template once, when training starts, and stays there.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from functools import lru_cache

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import loopcontrols

from moellava.errors import UserError

_NOW = re.compile(r"""\bstrftime_now\(\s*(?:"([^"\\]*)"|'([^'\\]*)')\s*\)""")
"""A call with a format that is written out."""


@lru_cache(maxsize=1)
def started() -> datetime:
    """When this process has first asked: the one date of all its prompts."""
    return datetime.now()


def frozen(template: str | None) -> str | None:
    """A chat template that writes the same text on any day.

    Raises:
        UserError: it has a date or a choice by chance that cannot be written out.
    """
    if template is None or ("strftime_now" not in template and "random" not in template):
        return template
    fixed = _NOW.sub(lambda found: json.dumps(started().strftime(found[1] or found[2] or "")), template)
    for name in _volatile(fixed):
        raise UserError(
            f"the chat template writes something else at every rendering ({name}), so that training and answers would "
            "differ: write a fixed text in its place into chat_template.jinja"
        )
    return fixed


def _volatile(template: str) -> list[str]:
    """What of a template depends on time or chance. One that is no Jinja is left to whoever renders it."""
    try:
        # Without the block that only transformers knows: whether an answer is marked changes nothing here.
        tree = Environment(extensions=[loopcontrols]).parse(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template))
    except TemplateSyntaxError:
        return []
    called = [call.node.name for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Name)]
    filters = [used.name for used in tree.find_all(nodes.Filter)]
    return [name for name in called if name == "strftime_now"] + [f"|{name}" for name in filters if name == "random"]
