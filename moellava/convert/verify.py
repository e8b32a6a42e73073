"""`moellava verify DIR`: recomputes the golden.safetensors that lies in a folder.

A golden file holds inputs (input_ids with -200 for an image, attention_mask, labels, images) and what the code that
wrote the folder computed from them. Its sequences were put together as LLaVA does: text embeddings, image features
in place of -200, zeros on the right of the shorter ones. Padding is routed and counted like any token by that code, so
the balancing loss needs those zeros as well.

`upcycled_logits` and `upcycled_loss` are those of the sparse model as upcycling left it: every expert a copy of the
dense model's MLP. Who made the golden files then moved routers and experts by noise from a seed, so that experts
differ. That noise is drawn again and taken off; that it was the right one shows in the experts, which must come out as
copies of one another. From a folder that was trained instead, the logits still follow from the dense model, if that
lies beside (`../dense`, or `--dense DIR`) and experts share each token in twos, so that the routers do not matter. The
loss does not: nothing in such a folder says what its routers were.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from moellava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moellava.errors import UserError
from moellava.files import read_config
from moellava.model.builder import is_published, read_composed
from moellava.model.families import published_family
from moellava.model.published import from_published, read_published
from moellava.model.weights import read_file, read_tensors
from moellava.moe import MoESpec, moe_layers, router_losses, upcycle

INPUTS = ("input_ids", "attention_mask", "labels", "images")
GOLDEN = "golden.safetensors"
ROUTERS_GONE = "depends on the routers before they learnt, which this folder does not hold"
NO_DENSE = "needs the dense model that it was upcycled from: --dense DIR"

NOISE_SEED = 5
NOISE = {".deepspeed_moe.gate.": 0.3, ".deepspeed_moe.experts.": 0.05, ".mlp.coefficient.": 0.05}
"""Standard deviation of the noise in a golden folder's tensors, by a part of their names; drawn in the file's order."""
COPIES_ATOL = 1e-6
"""How near to each other the experts must be once the noise is off; fp32 rounds at 3e-8 here."""

EXPERT = re.compile(r"\.experts\.\d+\.")

PASSED, FAILED, UNDECIDED = 0, 1, 3
"""Exit status: all reproduced; one is not; none is wrong, but some cannot be recomputed (2 is an error of the user)."""


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


def recompute(model: Any, golden: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What a golden file may hold, from the model: logits, loss and, of a sparse model, its balancing losses.

    Returns:
        tensors by their names in a golden file, and the expanded attention mask [B, L].
    """
    embeddings, mask, labels = spliced(model, golden)
    logits = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits.float()
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
    result = {"logits": logits}
    if moe_layers(model):
        routers = router_losses(model)
        result["moe_loss"] = routers.total.reshape(1)
        result["moe_loss_list"] = torch.stack([layer.reshape(()) for layer in routers.aux_per_layer])
        loss = loss + routers.total
    return result | {"loss": loss.reshape(1)}, mask.bool()


@torch.inference_mode()
def verify(folder: Path, dense: Path | None = None) -> dict[str, float | str]:
    """Compares each tensor of a folder's golden file with what the folder's model computes.

    Args:
        folder: a model folder that holds `golden.safetensors`.
        dense: the model that it was upcycled from.

    Returns:
        tensor name -> max |Δ|, or why it cannot be computed. Logits count where the expanded attention mask is 1.

    Raises:
        UserError: no golden file, an unknown tensor in it, or a folder that does not open.
    """
    path = folder / GOLDEN
    if not path.is_file():
        raise UserError(f"{folder} holds no {GOLDEN}.")
    golden = dict(read_file(path))
    missing = [name for name in INPUTS if name not in golden]
    if missing:
        raise UserError(f"{path} lacks its inputs {', '.join(missing)}.")
    model = open_any(folder)
    tensors, mask = recompute(model, golden)
    computed: dict[str, torch.Tensor | str] = dict(tensors)
    if any(name.startswith("upcycled_") for name in golden) and getattr(model.config, "moe", None):
        computed |= upcycled(folder, model, golden, dense)
    result: dict[str, float | str] = {}
    for name in sorted(set(golden) - set(INPUTS)):
        if name not in computed:
            raise UserError(f"{path} holds {name!r}, which this model does not compute.")
        found = computed[name]
        compared = mask if name.endswith("logits") else None
        result[name] = found if isinstance(found, str) else distance(found, golden[name], compared)
    return result


def open_any(folder: Path) -> Any:
    """The model of a folder of any kind in fp32, on the CPU."""
    raw = read_config(folder, "DIR")
    return read_published(folder, torch.float32) if is_published(raw) else read_composed(folder, raw, torch.float32)


def upcycled(
    folder: Path, model: Any, golden: Mapping[str, torch.Tensor], dense: Path | None
) -> dict[str, torch.Tensor | str]:
    """What the sparse model computed as upcycling left it, or why that cannot be told.

    Args:
        folder, model: the sparse model; its weights may be changed.
        dense: the folder of the dense model, if there is one.
    """
    spec = MoESpec.from_config(model.config.moe)
    loss: torch.Tensor | str = ROUTERS_GONE
    if (state := as_upcycled(folder)) is not None:
        model.load_state_dict(model.state_dict() | state)
        computed, _ = recompute(model, golden)
        logits, loss = computed["logits"], computed["loss"]
    elif spec.top_k_experts < 2:
        return {"upcycled_logits": ROUTERS_GONE, "upcycled_loss": ROUTERS_GONE}
    elif dense is None:
        return {"upcycled_logits": NO_DENSE, "upcycled_loss": ROUTERS_GONE}
    else:
        logits = recompute(upcycle(open_any(dense), spec), golden)[0]["logits"]
    return {"upcycled_logits": logits, "upcycled_loss": loss}


def as_upcycled(folder: Path) -> dict[str, torch.Tensor] | None:
    """The sparse layers' tensors without the golden files' noise, by the model's names; None if they have none."""
    raw = read_config(folder, "DIR")
    if not is_published(raw):
        return None
    family, generator = published_family(raw), torch.Generator().manual_seed(NOISE_SEED)
    state: dict[str, torch.Tensor] = {}
    for key, tensor in read_tensors(folder).items():
        for part, deviation in NOISE.items():
            if part in key:
                clean = tensor.float() - deviation * torch.randn(tensor.shape, generator=generator)
                state |= from_published(key, clean, family, raw, prefix="")
    first_of = {name: EXPERT.sub(".experts.0.", name) for name in state if EXPERT.search(name)}
    are_copies = all(distance(state[name], state[first]) <= COPIES_ATOL for name, first in first_of.items())
    return state if are_copies else None


def distance(found: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """max |Δ| over the positions where `mask` is true; infinite where shapes differ or a number is none."""
    if found.shape != wanted.shape:
        return float("inf")
    difference = (found - wanted.float()).abs()
    if mask is not None:
        difference = difference[mask]
    return difference.max().item() if difference.isfinite().all() else float("inf")
