# SPDX-License-Identifier: Apache-2.0
"""`--cache_features DIR`: a frozen tower sees each picture once, before step 0 of the first run that shows it.

Later epochs, runs and stages read what it gave: no picture is opened, and the tower does not run. Beside what makes
pixels of files, the tower's weights, the layer that is read and the precision decide over its features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moellava.data.dataset import SupervisedDataset
from moellava.errors import UserError
from moellava.model.known_tower import FLAG, digest_of_weights, features_of, knows_features, tower_of
from moellava.model.shaped import NATIVE
from moellava.train.fsdp import gathered
from moellava.train.known_pictures import know, require_folder
from moellava.train.memory import zero_stage
from moellava.vlm import VLM


def refuse_features(vlm: VLM, folder: str, args: Any) -> None:
    """Raises UserError where features of pictures cannot be kept: the tower trains, or is not asked for them alone."""
    tower = tower_of(vlm.model)
    if any(parameter.requires_grad for parameter in tower.parameters()):
        raise UserError(f"{FLAG} {folder}: the vision encoder trains, so that its features change with every step.")
    if vlm.section.image_aspect_ratio == NATIVE:
        raise UserError(f"{FLAG} {folder}: --image_aspect_ratio native gives pictures of many shapes. Leave one out.")
    if zero_stage(args.deepspeed) == 3:
        raise UserError(f"{FLAG} {folder}: ZeRO-3 splits the tower over processes. Use --deepspeed zero2.")
    require_folder(FLAG, folder)


def know_features(trainer: Any, folder: Path, datasets: Sequence[SupervisedDataset]) -> None:
    """Has a trainer's model, data sets and collator use features of `folder`; those that are not there are computed.
    Raises UserError and BadFileError: see `know`."""
    features = Features(trainer)
    with gathered(trainer.model):  # processes share the pictures, and some have one more
        know(trainer, folder, datasets, features)
    knows_features(features.tower, features.layer)


class Features:
    """What a frozen tower gives for pixels, as a step of training would compute it. See `Kept`.

    Args:
        trainer: of the run.

    Attributes:
        tower, layer: what is read.
    """

    flag, called = FLAG, "Features"

    def __init__(self, trainer: Any):
        model, args = trainer.vlm.model, trainer.args
        self.trainer = trainer
        self.tower, self.layer = tower_of(model), model.config.vision_feature_layer
        self.settings = {
            "tower": type(self.tower).__name__,
            "weights": digest_of_weights(self.tower),
            "layer": self.layer,
            "attention": self.tower.config._attn_implementation,
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
            "engine": "deepspeed" if args.deepspeed else "native",
        }

    def require_repeatable(self, pixels: Tensor) -> None:
        """Raises UserError where the tower, as it trains, gives other features of the same picture each time."""
        with torch.random.fork_rng(devices=[]):
            once, again, alone = (self.of(some) for some in (pixels, pixels, pixels[:1]))
        if not torch.equal(once, again):
            raise UserError(
                f"{FLAG}: the tower gives other features each time that it sees the same picture (dropout)."
            )
        if not torch.allclose(once[:1].float(), alone.float(), rtol=1e-2, atol=1e-2 * float(once.abs().max())):
            raise UserError(f"{FLAG}: what the tower gives for a picture depends on the others of its batch.")

    @torch.no_grad()
    def of(self, pixels: Tensor) -> Tensor:
        """[N, P, D] of pixels [N, 3, H, W]."""
        self.tower.to(self.trainer.args.device).train()
        with self.trainer.accelerator.autocast(), self.trainer.tower:  # without the layers above the one that is read
            return features_of(self.tower, self.layer, self.trainer._prepare_input(pixels))

    def shown(self, kept: Tensor) -> Tensor:
        """A picture of one channel, [N, 1, P, D], which the tower hands on."""
        return kept.unsqueeze(1)
