# SPDX-License-Identifier: Apache-2.0
"""A tiny CLIP vision tower, trained contrastively on the training images and captions made from their answers.

The image embedding is the maximum over the last layer's patch states: those states, not CLIP's class token, are what a
LLaVA-style projector reads, so they are what has to carry colour and shape.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from moellava.demo.easy_vqa_data import COLORS, SHAPES, Facts, TrainImage
from moellava.log import get_logger

log = get_logger("moellava.playground")

IMAGE_SIZE = 64
PATCH_SIZE = 16
EMBEDDING_DIM = 64
TEMPERATURE = 0.1
MAX_SHIFT = 12
"""Pixels that a training picture is moved at most, in each direction."""


def tower_config() -> CLIPVisionConfig:
    """About 0.8 M parameters."""
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=EMBEDDING_DIM,
        hidden_act="gelu",
    )


def image_processor() -> CLIPImageProcessorPil:
    """What `preprocessor_config.json` says: 64×64, each channel from -1 to 1."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


class CaptionEncoder(torch.nn.Module):
    """The text half of the pair: the mean of word embeddings, then an MLP. It is thrown away after training."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int = 128):
        super().__init__()
        self.tokenizer = tokenizer
        self.words = torch.nn.EmbeddingBag(len(tokenizer), width)
        self.head = torch.nn.Sequential(
            torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Linear(width, EMBEDDING_DIM)
        )

    def forward(self, captions: list[str]) -> torch.Tensor:
        """Unit vectors [len(captions), EMBEDDING_DIM]."""
        ids = [torch.tensor(self.tokenizer(caption).input_ids) for caption in captions]
        offsets = torch.tensor([0] + [len(row) for row in ids[:-1]]).cumsum(0)
        return F.normalize(self.head(self.words(torch.cat(ids), offsets)), dim=-1)


CAPTION_GROUPS = (
    tuple(Facts(color, shape) for color in COLORS for shape in SHAPES),
    tuple(Facts(color=color) for color in COLORS),
    tuple(Facts(shape=shape) for shape in SHAPES),
)
"""Captions that exclude each other: 'a red circle' …, 'a red shape' …, 'a circle' …"""


def targets(facts: list[Facts], group: tuple[Facts, ...]) -> torch.Tensor:
    """For each image the index of its true caption within one group, or -100 where the answers do not tell."""
    needs_color, needs_shape = group[0].color is not None, group[0].shape is not None
    wanted = [Facts(f.color if needs_color else None, f.shape if needs_shape else None) for f in facts]
    return torch.tensor([group.index(w) if w in group else -100 for w in wanted])


def contrastive_loss(image_ND: torch.Tensor, facts: list[Facts], encoder: CaptionEncoder) -> torch.Tensor:
    """InfoNCE (CLIP, Radford et al. 2021), image to caption, once per group of caption.

    There are only 24 full captions, so that CLIP's form, where the captions of the batch's other images count as wrong,
    would call many true ones wrong. Each image is held against the other captions of a group instead.
    """
    losses = []
    for group in CAPTION_GROUPS:
        logits_NC = image_ND @ encoder([f.caption for f in group]).T / TEMPERATURE
        losses.append(F.cross_entropy(logits_NC, targets(facts, group)))
    return torch.stack(losses).mean()


def embed(tower: CLIPVisionModel, projection: torch.nn.Linear, pixels_NCHW: torch.Tensor) -> torch.Tensor:
    """Unit vectors [N, EMBEDDING_DIM] of the patch states' maximum.

    The maximum finds the few patches that show the shape; a mean over all patches took three times as many steps.
    """
    states_NPH = tower(pixels_NCHW).last_hidden_state[:, 1:]
    return F.normalize(projection(states_NPH.amax(1)), dim=-1)


def augment(pixels_NCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirrors half of the pictures and moves each by up to MAX_SHIFT pixels; edges are repeated, nothing is rotated."""
    n, _, height, width = pixels_NCHW.shape
    mirrored = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    pixels_NCHW = torch.where(mirrored, pixels_NCHW.flip(-1), pixels_NCHW)
    dy, dx = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2, n, 1), generator=generator)
    rows = (torch.arange(height) + dy).clamp(0, height - 1)
    columns = (torch.arange(width) + dx).clamp(0, width - 1)
    picked = torch.arange(n)[:, None, None]
    return pixels_NCHW.permute(0, 2, 3, 1)[picked, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def load_pixels(images: list[TrainImage]) -> torch.Tensor:
    """[N, 3, 64, 64], prepared by the tower's own processor."""
    opened = [Image.open(image.path).convert("RGB") for image in images]
    return image_processor()(opened, return_tensors="pt")["pixel_values"]


def train_tower(
    images: list[TrainImage],
    tokenizer: PreTrainedTokenizerBase,
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    held_out: int = 0,
    seed: int = 0,
) -> CLIPVisionModel:
    """Trains the tower; the last `held_out` training images are kept back to report an accuracy."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tower = CLIPVisionModel(tower_config())
    projection = torch.nn.Linear(tower.config.hidden_size, EMBEDDING_DIM)
    encoder = CaptionEncoder(tokenizer)
    modules = torch.nn.ModuleList([tower, projection, encoder])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)

    pixels, facts = load_pixels(images), [image.facts for image in images]
    known = len(images) - held_out
    started = time.monotonic()
    for step in range(1, steps + 1):
        picked = torch.randint(known, (batch_size,), generator=generator)
        batch = augment(pixels[picked], generator)
        loss = contrastive_loss(embed(tower, projection, batch), [facts[i] for i in picked], encoder)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps:
            log.info("tower step %d of %d: loss %.4f (%.0f s)", step, steps, loss.item(), time.monotonic() - started)
            if held_out:
                report_accuracy(tower, projection, encoder, pixels[known:], facts[known:])
    return tower.eval()


@torch.no_grad()
def report_accuracy(
    tower: CLIPVisionModel,
    projection: torch.nn.Linear,
    encoder: CaptionEncoder,
    pixels_NCHW: torch.Tensor,
    facts: list[Facts],
) -> None:
    """Zero-shot accuracy of the three groups of captions on pictures that were kept back."""
    image_ND = torch.cat([embed(tower, projection, part) for part in pixels_NCHW.split(256)])
    for group in CAPTION_GROUPS:
        best = (image_ND @ encoder([f.caption for f in group]).T).argmax(1)
        wanted = targets(facts, group)
        share = (best == wanted)[wanted >= 0].float().mean().item()
        log.info("  %2d captions like %-16r %.2f%% right", len(group), group[0].caption, 100 * share)


def save_tower(tower: CLIPVisionModel, path: Path) -> None:
    """A folder that `--image_tower` takes."""
    tower.save_pretrained(path)
    image_processor().save_pretrained(path)
