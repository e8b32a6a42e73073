# SPDX-License-Identifier: Apache-2.0
"""What a vision tower's folder gives, and which flags choose among it; no weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moellava.model.tower_probes import TowerShape, reads_shapes
from moellava.model.towers import known_features, select_strategy, tower_config, tower_shape, tower_tokens


@dataclass(frozen=True)
class TowerFacts:
    """What a tower gives.

    Args:
        model_type: of its vision half.
        layers: `--mm_vision_select_layer` goes from -layers - 1 (embeddings) to layers.
        shape: of what it gives for one image.
        tokens: value of `--mm_vision_select_feature` -> tokens of an image.
        reads_shapes: whether `--image_aspect_ratio native` shows it images in their own shape.
    """

    model_type: str
    layers: int
    shape: TowerShape
    tokens: dict[str, int]
    reads_shapes: bool

    def to_json(self) -> str:
        """All of it as one JSON object."""
        return json.dumps(asdict(self), indent=1)

    def text(self) -> str:
        """One fact a line."""
        shape = self.shape
        lines = {
            "vision tower": self.model_type,
            "images": f"{shape.side} x {shape.side} pixels{', or in their own shape' if self.reads_shapes else ''}",
            "patches": f"{shape.grid} x {shape.grid} of {shape.patch_size} pixels, each {shape.width} numbers",
            "tokens before them": str(shape.extras),
            "--mm_vision_select_layer": f"{-self.layers - 1} to {self.layers}",
            "--mm_vision_select_feature": ", ".join(f"{name}: {count} tokens" for name, count in self.tokens.items()),
        }
        if self.reads_shapes:
            lines["--image_aspect_ratio"] = "native, too"
        return "\n".join(f"{name:28}{said}" for name, said in lines.items())


def tower_facts(raw: Mapping[str, Any], source: str) -> TowerFacts:
    """What the tower of a config.json gives. Raises UserError as `tower_config`.

    Args:
        raw: the file.
        source: where it lies, for messages.
    """
    config = tower_config(raw, source)
    tokens = {name: tower_tokens(config, select_strategy(config, name)) for name in known_features(config)}
    return TowerFacts(config.model_type, config.num_hidden_layers, tower_shape(config), tokens, reads_shapes(config))
