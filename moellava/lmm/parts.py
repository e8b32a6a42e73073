"""Parts by keywords, for classes whose layout `model.builder.parts_of` does not know."""

from __future__ import annotations

import functools
from typing import Any

from moellava.model.builder import has_known_parts
from moellava.model.parts import Keywords, parts_of


def bring_parts(model: Any, keywords: Keywords) -> None:
    """Gives a model of an unusual layout `own_parts`, which `parts_of` asks."""
    if not has_known_parts(model):
        model.own_parts = functools.partial(parts_of, model, keywords)
