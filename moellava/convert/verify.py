# SPDX-License-Identifier: Apache-2.0
"""Recomputes the golden.safetensors that lies in a folder.

A golden file holds inputs (input_ids with -200 for an image, attention_mask, labels, images) and what the code that
wrote the folder computed from them. Its sequences were put together as LLaVA does: text embeddings, image features
in place of -200, zeros on the right of the shorter ones. Padding is routed and counted like any token by that code, so
the balancing loss needs those zeros as well.

What is recomputed follows from the folder alone. A tensor that does not is named, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from moellava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moellava.errors import UserError
from moellava.model.manifest import read_folder
from moellava.model.weights import read_file
from moellava.moe import counted_routing, moe_layers, router_losses
from moellava.vlm import describe

INPUTS = ("input_ids", "attention_mask", "labels", "images")
GOLDEN = "golden.safetensors"

PASSED, FAILED, UNDECIDED = 0, 1, 3
"""Exit status: all reproduced; one is not; none is wrong, but some are not computed (2 is an error of the user)."""


def spliced(model: Any, golden: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The batch as LLaVA puts it together.

    Returns:
        embeddings [B, L, D], attention mask [B, L], labels [B, L]; L counts image tokens.
    """
    features = model.get_image_features(golden["images"].to(model.dtype)).pooler_output
    images = iter(features)
    embed = model.get_input_embeddings()
    rows, targets = [], []
    for ids, mask, labels in zip(golden["input_ids"], golden["attention_mask"].bool(), golden["labels"], strict=True):
        ids, labels = ids[mask], labels[mask]
        row, target, start = [], [], 0
        places = torch.where(ids == IMAGE_TOKEN_INDEX)[0].tolist()
        if not places:
            next(images, None)  # that code gives a text-only sample an image too, and leaves it out
        for position in places:
            image = next(images)
            row += [embed(ids[start:position]), image]
            target += [labels[start:position], labels.new_full((len(image),), IGNORE_INDEX)]
            start = position + 1
        rows.append(torch.cat([*row, embed(ids[start:])]))
        targets.append(torch.cat([*target, labels[start:]]))
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    return pad(rows, batch_first=True), mask, pad(targets, batch_first=True, padding_value=IGNORE_INDEX)


def recompute(
    model: Any, golden: Mapping[str, torch.Tensor], vocabulary: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What a golden file may hold, from the model: logits, loss and, of a sparse model, its balancing losses.

    Args:
        model: on the CPU.
        golden: the file's tensors.
        vocabulary: words of the folder's model; opening it may have added rows for image tokens.

    Returns:
        tensors by their names in a golden file, and the expanded attention mask [B, L].
    """
    embeddings, mask, labels = spliced(model, golden)
    with counted_routing(model):
        logits = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits.float()
    logits = logits[..., :vocabulary]
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
    result = {"logits": logits}
    if moe_layers(model):
        routers = router_losses(model)
        result["moe_loss"] = routers.total.reshape(1)
        result["moe_loss_list"] = torch.stack([layer.reshape(()) for layer in routers.aux_per_layer])
        loss = loss + routers.total
    return result | {"loss": loss.reshape(1)}, mask.bool()


@torch.inference_mode()
def verify(folder: Path) -> dict[str, float | str]:
    """Compares each tensor of a folder's golden file with what the folder's model computes.

    Args:
        folder: a model folder that holds `golden.safetensors`.

    Returns:
        tensor name -> max |Δ|, or why it is not computed. Logits count where the expanded attention mask is 1.

    Raises:
        UserError: no golden file, one without inputs or without results, or a folder that does not open.
    """
    path = folder / GOLDEN
    if not path.is_file():
        raise UserError(f"{folder} holds no {GOLDEN}.")
    golden = dict(read_file(path))
    missing = [name for name in INPUTS if name not in golden]
    if missing:
        raise UserError(f"{path} lacks its inputs {', '.join(missing)}.")
    if len(golden) == len(INPUTS):
        raise UserError(f"{path} holds inputs alone: there is nothing to compare.")
    description = describe(read_folder(folder, "DIR"))
    vocabulary = description.config.get_text_config().vocab_size
    computed, mask = recompute(description.load(torch.float32), golden, vocabulary)
    result: dict[str, float | str] = {}
    for name in sorted(set(golden) - set(INPUTS)):
        if name in computed:
            result[name] = distance(computed[name], golden[name], mask if name == "logits" else None)
        else:
            result[name] = f"not computed: all that follows from this folder is {', '.join(sorted(computed))}"
    return result


def distance(found: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """max |Δ| over the positions where `mask` is true; infinite where shapes differ or a number is none."""
    if found.shape != wanted.shape:
        return float("inf")
    difference = (found - wanted.float()).abs()
    if mask is not None:
        difference = difference[mask]
    return difference.max().item() if difference.isfinite().all() else float("inf")
