# SPDX-License-Identifier: Apache-2.0
"""Whether a chat template becomes the ids under the mask that plain transformers makes of it.

The mask engine cuts a prompt at special tokens by their rules, which are many. It is tried on conversations, once for
a tokenizer and a template: one whose ids would differ is refused, so that what is trained is what any other program
reads.
"""

from __future__ import annotations

from typing import Any

from moellava.conversation import Piece
from moellava.data.masking import engine_for
from moellava.data.render import Renderer
from moellava.errors import UserError

TALKS = (
    [
        {"from": "human", "value": "  What is this?\nAnd that?\n"},
        {"from": "gpt", "value": "A cat 🐱, as\tit seems. "},
        {"from": "human", "value": "thanks"},
        {"from": "gpt", "value": "\n3.14, roughly\n\n"},
    ],
    [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "bye"}],
)
"""What hides no special token, with spaces where tokens might swallow them, and words that end where messages do."""


def disagreement(tokenizer: Any, renderer: Renderer) -> str | None:
    """Where the ids of rendered conversations are others than the tokenizer makes of their texts; None if nowhere.
    One that the template cannot render is passed over: that is told by record."""
    for talk in TALKS:
        try:
            texts = renderer.texts(talk, has_media=False)
        except UserError:
            continue
        problem = next(filter(None, (_of_text(tokenizer, pieces) for pieces, _ in texts)), None)
        if problem:
            return problem
    return None


def _of_text(tokenizer: Any, pieces: list[Piece]) -> str | None:
    engine = engine_for(tokenizer)
    # Untrained: within an answer a token may end where it would go on in the text around, as it does in generation.
    ours = engine.encode([piece._replace(trained=False) for piece in pieces]).ids
    plain = tokenizer("".join(piece.text for piece in pieces), add_special_tokens=False).input_ids
    if ours == plain or ours == engine.leading + plain:
        return None
    ours = ours[len(engine.leading) :] if plain[: len(engine.leading)] != engine.leading else ours
    same = next((n for n, (a, b) in enumerate(zip(ours, plain, strict=False)) if a != b), min(len(ours), len(plain)))
    one, other = (tokenizer.convert_ids_to_tokens(ids[same : same + 4]) for ids in (ours, plain))
    return (
        f"this tokenizer reads the chat template's text as {other} where the template means {one}, a special token "
        'that has rules of its own. Set "normalized" and "single_word" to false for it in tokenizer.json, or name '
        "another template"
    )
