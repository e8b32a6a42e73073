# SPDX-License-Identifier: Apache-2.0
"""A folder's own chat template as it is read: one of several, and with the date on which a run began."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moellava.log import get_logger

logger = get_logger(__name__)

DEFAULT = "default"

DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
"""How templates ask what day it is."""

_day = datetime.date.today()


def begin_on(day: str) -> None:
    """Sets the day, as YYYY-MM-DD, that templates are read with from here on: a run that goes on keeps its first."""
    global _day
    _day = datetime.date.fromisoformat(day)


def day() -> str:
    """The day that templates are read with, as YYYY-MM-DD."""
    return _day.isoformat()


def own_template(template: Any) -> str | None:
    """A chat template in Jinja, as a folder has it.

    Of several by name the one called 'default' is taken, or the only one. What the day is stands in it as a text: a run
    over midnight would otherwise end with other prompts than it began with, and chat would ask with yet another date.

    Args:
        template: of a tokenizer or processor: a text, or texts by name, as a mapping or as a list of `name` and
            `template`; None where there is none.
    """
    if isinstance(template, Sequence) and not isinstance(template, str):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, Mapping):
        names = list(template)
        chosen = DEFAULT if DEFAULT in template else names[0] if len(names) == 1 else None
        logger.info("Of the chat templates %s the one taken is: %s", ", ".join(names), chosen or "none")
        template = template[chosen] if chosen is not None else None
    if template is None:
        return None
    return DATE_CALL.sub(lambda call: repr(_day.strftime(call[2])), template)
