# SPDX-License-Identifier: Apache-2.0
"""Every vision model of transformers as a tower, without an entry of ours.

python -m tests.model.any_tower --all            the table of docs/TOWERS.md
python -m tests.model.any_tower dinov2 pixtral   some
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from PIL import Image

from moellava.errors import UserError
from moellava.model.compose import Composition
from moellava.model.joined_towers import JoinedTowersConfig
from moellava.model.probes import FAILURES, first_line
from moellava.model.towers import tower_config, tower_shape
from moellava.vlm import VLM, compose
from tests import tiny
from tests.model.every_class import run, untrained
from tests.model.tiny_towers import tiny_config, tiny_vision_model, vision_models

CLOSE = 1e-5
"""How far features and logits may be off, as a fraction of the largest."""

LAYER = -2


@dataclass
class Row:
    """What became of a vision model.

    Args:
        model_type: of its config.
        extras: tokens before the patches; None: it is refused.
        reason: of the refusal.
        opens: `--mm_vision_select_feature` -> what opens the composed folder, 'transformers' or 'moellava'.
        off: name of a comparison -> the largest difference, as a fraction of the largest number.
        problems: what did not hold.
    """

    model_type: str
    extras: int | None = None
    reason: str = ""
    opens: dict[str, str] = field(default_factory=dict)
    off: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def write_tower(folder: Path, model_type: str, **fields: Any) -> Path:
    """A tiny vision model with an image processor beside it."""
    tiny_vision_model(model_type, **fields).save_pretrained(folder)
    side = tiny_config(model_type, **fields).image_size
    hf.SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def check(model_type: str, base: Path, folder: Path) -> Row:
    """Composes a tiny vision model of a type with a language model and holds it against its own class.

    Args:
        base: folder of the language model.
        folder: an empty one to write to.
    """
    row = Row(model_type)
    try:
        _check(row, base, folder)
    except (*FAILURES, UserError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        row.problems.append(f"{first_line(error)} ({Path(place.filename).name}:{place.lineno})")
    return row


def _check(row: Row, base: Path, folder: Path) -> None:
    tower = folder / "tower"
    tiny_config(row.model_type).save_pretrained(tower)
    try:  # what is refused is refused by its config, before weights are looked for
        compose(base, str(tower), Composition("v1"))
    except UserError as error:
        if "holds no weights" not in str(error) and "holds no preprocessor" not in str(error):
            row.reason = str(error).partition("cannot be a tower: ")[2] or str(error)
            return
    write_tower(tower, row.model_type)
    own = tiny_vision_model(row.model_type)
    raw = json.loads((tower / "config.json").read_text(encoding="utf-8"))
    row.extras = tower_shape(tower_config(raw, row.model_type)).extras
    for feature in ("patch", "full") if row.extras else ("patch",):
        options = Composition("v1", "mlp2x_gelu", LAYER, mm_vision_select_feature=feature)
        check_composed(row, feature, compose(base, str(tower), options), own, folder / feature)


def check_composed(row: Row, feature: str, vlm: VLM, own: torch.nn.Module, folder: Path) -> None:
    """Notes what does not hold of a composed model; `own` is its tower by its own class."""
    batch = question(vlm)
    left_out = row.extras if feature == "patch" else 0
    with torch.no_grad():
        states = own(batch["pixel_values"], output_hidden_states=True).hidden_states[LAYER]
        seen, logits = projector_input(vlm, batch)
    width = states.shape[-1]
    wanted = states.reshape(2, -1, width)[:, left_out:]
    compare(row, f"{feature}: features", seen.reshape(2, -1, width), wanted)
    train_step(row, feature, vlm, batch)
    said = vlm.model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=-1)
    if said.shape[1] != batch["input_ids"].shape[1] + 3:
        row.problems.append(f"{feature}: generates {tuple(said.shape)}")
    vlm.save(folder)
    again = tiny.reopen(folder)
    with torch.no_grad():
        compare(row, f"{feature}: reopened", again.model(**question(again)).logits, logits)
    check_plain(row, feature, vlm, folder, logits)


def check_plain(row: Row, feature: str, vlm: VLM, folder: Path, logits: torch.Tensor) -> None:
    """Opens the folder in plain transformers, or sees to it that it does not open."""
    is_joined = isinstance(vlm.model.config.vision_config, JoinedTowersConfig)
    row.opens[feature] = "moellava" if is_joined else "transformers"
    try:
        plain = hf.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    except (ValueError, KeyError) as error:
        if not is_joined:
            row.problems.append(f"{feature}: plain transformers does not open it: {first_line(error)}")
        return
    if is_joined:
        row.problems.append(f"{feature}: plain transformers opens it, and should not")
    processor = hf.AutoProcessor.from_pretrained(folder)
    texts = ["<image>what colour?"] * 2
    batch = processor(images=pictures(), text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        compare(row, f"{feature}: plain transformers", plain(**batch).logits, logits)


def pictures() -> list[Image.Image]:
    """Two of different shapes."""
    return [
        Image.effect_mandelbrot(size, (-3, -2.5, 2, 2.5), quality).convert("RGB")
        for size, quality in (((40, 24), 9), ((30, 50), 30))
    ]


def question(vlm: VLM) -> dict[str, torch.Tensor]:
    """Two questions about an image each."""
    texts = ["<image>what colour?"] * 2
    return dict(vlm.processor(images=pictures(), text=texts, padding=True, return_tensors="pt"))


def projector_input(vlm: VLM, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the projector reads of a batch, and the model's logits."""
    seen: list[torch.Tensor] = []
    (projector,) = vlm.parts["projector"]
    handle = projector.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits = vlm.model(**batch).logits
    handle.remove()
    return seen[0], logits


def compare(row: Row, name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Notes how far two tensors are from each other."""
    if found.shape != wanted.shape:
        row.problems.append(f"{name}: {tuple(found.shape)}, not {tuple(wanted.shape)}")
        return
    row.off[name] = float((found - wanted).abs().max() / wanted.abs().max())
    if not row.off[name] <= CLOSE:
        row.problems.append(f"{name}: off by {row.off[name]:.1e}")


def train_step(row: Row, feature: str, vlm: VLM, batch: dict[str, torch.Tensor]) -> None:
    """One step on images: a finite loss, and a projector that gets a gradient."""
    model = vlm.model.train()
    image = model.config.image_token_index
    labels = torch.where(batch["input_ids"] == image, -100, batch["input_ids"])
    loss = model(**batch, labels=labels).loss
    if wrong := untrained(model, vlm.parts["projector"], loss):
        row.problems.append(f"{feature}: {wrong}")
    model.eval()


def check_all(names: list[str]) -> list[Row]:
    """A row for each of these types."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        base = tiny.write_base(root / "base", "llama", tiny.write_tokenizer(root / "tokenizer")).folder
        for model_type in names:
            folder = root / model_type
            folder.mkdir()
            rows.append(check(model_type, base, folder))
            shutil.rmtree(folder)
    return rows


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| `model_type` | before the patches | `patch` opens with | `full` opens with | off | why not |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row.extras is None, row.extras, row.model_type)):
        off = f"{max(row.off.values()):.0e}" if row.off else ""
        said = "; ".join([row.reason, *row.problems]).strip("; ")
        before = "refused" if row.extras is None else str(row.extras)
        patch, full = row.opens.get("patch", ""), row.opens.get("full", "")
        lines.append(f"| {row.model_type} | {before} | {patch} | {full} | {off} | {said} |")
    return "\n".join(lines)


def main() -> int:
    """See `run`."""
    return run(
        __doc__,
        vision_models,
        check_all,
        table,
        lambda row: "refused" if row.extras is None else row.opens.get("patch", "wrong"),
    )


if __name__ == "__main__":
    sys.exit(main())
