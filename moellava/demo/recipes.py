# SPDX-License-Identifier: Apache-2.0
"""The demo's three recipes: how much data each stage sees, and how it learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MOST_SHUFFLED = 0.65
MOST_LOST = 0.005

COMMON_FLAGS = {
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "model_max_length": 512,
    "overlong": "error",
    "logging_steps": 20,
    "save_strategy": "steps",
    "save_steps": 100,
    "report_to": "none",
    "seed": 0,
}
"""Flags of train.py that all stages share."""

STAGE_FLAGS: dict[str, dict[str, Any]] = {
    "stage1": {"version": "plain", "image_projector_type": "linear", "tune_mm_mlp_adapter": True},
    "stage2": {"version": "qwen"},
    "stage3": {"version": "qwen", "moe_enable": True, "moe_mode": "sparse", "num_experts": 4, "top_k_experts": 2},
}
"""Flags that make each stage what it is."""


@dataclass(frozen=True)
class StageRecipe:
    """How one stage trains.

    Args:
        copies: how often each image's record is in the data file; conversations are in a new order in each.
        batch_size: records per optimizer step, over all processes.
        learning_rate: its peak; cosine afterwards.
        max_steps: stop after so many optimizer steps; -1 reads the whole file once.
    """

    copies: int
    batch_size: int
    learning_rate: float
    max_steps: int = -1


@dataclass(frozen=True)
class Recipe:
    """All three stages, and how much of the test split is asked.

    Args:
        duration: how long it takes, in words, once the environment is there.
        least_accuracy: what stage 3 promises on the right images; None promises nothing.
        limit: questions that are scored; None is the whole official test split.
        seeds: of the comparison; stage 3 is the first one's sparse run.
    """

    name: str
    duration: str
    stage1: StageRecipe
    stage2: StageRecipe
    stage3: StageRecipe
    least_accuracy: float | None
    limit: int | None = None
    seeds: tuple[int, ...] = (0,)

    def missed(self, scores: dict[str, dict[str, float]]) -> list[str]:
        """The promises that scores do not keep, in words."""
        if self.least_accuracy is None:
            return []
        dense, sparse = scores["stage2"]["accuracy"], scores["stage3"]["accuracy"]
        shuffled = scores["stage3"]["accuracy_shuffled_images"]
        promises = {
            f"stage 3 answers at least {self.least_accuracy:.0%} right": sparse >= self.least_accuracy,
            f"with shuffled images at most {MOST_SHUFFLED:.0%}: it looks at the image": shuffled <= MOST_SHUFFLED,
            f"stage 3 is at most {100 * MOST_LOST:.1f} points under stage 2": sparse >= dense - MOST_LOST,
        }
        return [promise for promise, kept in promises.items() if not kept]


DEFAULT = Recipe(
    name="default",
    duration="about 10 minutes",
    stage1=StageRecipe(copies=3, batch_size=64, learning_rate=4e-3),
    stage2=StageRecipe(copies=2, batch_size=32, learning_rate=1.5e-3),
    stage3=StageRecipe(copies=1, batch_size=32, learning_rate=5e-4),
    least_accuracy=0.90,
)

FULL = Recipe(
    name="full",
    duration="about half an hour",
    stage1=StageRecipe(copies=6, batch_size=64, learning_rate=4e-3),
    stage2=StageRecipe(copies=6, batch_size=32, learning_rate=1.5e-3),
    stage3=StageRecipe(copies=2, batch_size=32, learning_rate=5e-4),
    least_accuracy=0.98,
    seeds=(0, 1),
)

SMOKE = Recipe(
    name="smoke",
    duration="one or two minutes",
    stage1=StageRecipe(copies=1, batch_size=8, learning_rate=4e-3, max_steps=3),
    stage2=StageRecipe(copies=1, batch_size=8, learning_rate=1.5e-3, max_steps=3),
    stage3=StageRecipe(copies=1, batch_size=8, learning_rate=5e-4, max_steps=3),
    least_accuracy=None,
    limit=64,
)

RECIPES = {recipe.name: recipe for recipe in (DEFAULT, FULL, SMOKE)}
