# SPDX-License-Identifier: Apache-2.0
"""The `moellava` section of a config.json: what a folder says of itself that Hugging Face's config has no word for.

It is read and written here and nowhere else; on a config it is a plain dict, as JSON wants it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from moellava.constants import CHAT_TEMPLATE
from moellava.errors import UserError
from moellava.plugins import PLUGINS

KEY = "moellava"

FORMAT = 2
"""Version of the section. In 1 a released model's `architecture` was called `lmm_family`."""

TYPES: dict[str, type] = {
    **{"use_im_start_end": bool, "image_token_ids": list, "head_bias": bool, "softcap": float},
    **{"parts": dict, "plugins": list, "made_of": dict},
}
"""Field -> type, of those that are no texts."""

OLD_NAMES = {"lmm_family": "architecture"}


@dataclass(frozen=True)
class Section:
    """What a folder of ours says of itself.

    Attributes:
        version: the conversation template that it was trained with.
        stage: the stage that left it; None: it is as it was composed or released.
        architecture: of a released model, its entry in `ARCHITECTURES`; None for a composed one.
        family: of a composed model, the family of its language model.
        image_aspect_ratio: how images are brought to the tower's shape, a value of --image_aspect_ratio.
        image_projector_type: name of the projector.
        image_tower: where the tower came from; of several, joined by " + ".
        use_im_start_end: whether an image stands between `<im_start>` and `<im_end>`.
        image_token_ids: ids of `<image>` and, if they are used, of those two.
        head_bias: whether the language-model head has a bias.
        softcap: s, where logits are s · tanh(logits / s); None: they are not capped.
        parts: of a released model that no entry names, where its parts are; field of `Keywords` -> beginnings of names.
        chat_template: the language model's own, in Jinja, which a stage with another template keeps for the next.
        plugins: names of the plug-ins that it was made with; the folder carries copies of those that are files.
        made_of: names of the models and data that it was made of. See `origin.py`.
    """

    version: str = CHAT_TEMPLATE
    stage: str | None = None
    architecture: str | None = None
    family: str | None = None
    image_aspect_ratio: str = "square"
    image_projector_type: str | None = None
    image_tower: str | None = None
    use_im_start_end: bool = False
    image_token_ids: list[int] | None = None
    head_bias: bool = False
    softcap: float | None = None
    parts: dict[str, list[str]] | None = None
    chat_template: str | None = None
    plugins: list[str] | None = None
    made_of: dict[str, Any] | None = None

    def put(self, config: Any) -> None:
        """Writes the section into a config."""
        setattr(config, KEY, {"format": FORMAT, **asdict(self)})

    def but(self, **changes: Any) -> Section:
        """The section with other values."""
        return replace(self, **changes)


def section_of(config: Any) -> Section | None:
    """The section of a config, or of the content of a config.json; None where it has none. Raises UserError where one
    of its fields is of a type that it cannot be."""
    raw = config.get(KEY) if isinstance(config, Mapping) else getattr(config, KEY, None)
    if not raw:
        return None
    named = {OLD_NAMES.get(name, name): value for name, value in raw.items()}
    known = {field.name for field in fields(Section)}
    given = {name: value for name, value in named.items() if name in known and value is not None}
    for name, value in given.items():
        wanted = TYPES.get(name, str)
        if not isinstance(value, wanted):
            raise UserError(f"The config's section {KEY!r} is damaged: {name} is {value!r}, not of {wanted.__name__}.")
    return Section(**given)


def note(config: Any, **changes: Any) -> Section:
    """Changes the section of a config, which gets one where it has none; returns it."""
    section = (section_of(config) or Section()).but(**changes)
    section.put(config)
    return section


def plugins_of(config: Any) -> list[str]:
    """Names of the plug-ins that a config's model was made with."""
    return (section_of(config) or Section()).plugins or []


def note_plugins(config: Any) -> None:
    """Notes in the section of a config which plug-ins have run: they may have a share in its model."""
    if names := sorted({*plugins_of(config), *PLUGINS}):
        note(config, plugins=names)
