# SPDX-License-Identifier: Apache-2.0
"""docs/ADD_A_MODEL.md: its lines for a program of one's own do what they say."""

import textwrap
from pathlib import Path

from moellava.lmm.collators import MediaCollator
from moellava.lmm.supported_models import SUPPORTED_MODELS
from moellava.model.parts import Keywords

PAGE = Path(__file__).parents[2] / "docs" / "ADD_A_MODEL.md"


class Mine(MediaCollator):
    """Somebody's collator."""


def test_the_four_steps_register_an_architecture(architectures):
    steps = PAGE.read_text(encoding="utf-8").split("in up to four steps:\n")[1].split("A plain list of keywords")[0]
    begun: list[str] = []
    code = textwrap.dedent(steps).replace("from moellava.train.train import main", "main = begun.append")
    code = code.replace("main() ", "main('trained') ")
    exec(code, {"load_mine": print, "MyCollator": Mine, "begun": begun})
    entry = architectures["my-family"]
    assert entry.keywords == Keywords.of_vision(["vision_tower", "multi_modal_projector"])
    assert (entry.load, entry.loads_images, entry.collator, entry.model_type) == (print, True, Mine, None)
    assert SUPPORTED_MODELS["mine"].architecture is entry and entry.models == {"mine": "somebody/mine"}
    assert begun == ["trained"]
