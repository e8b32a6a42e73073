# SPDX-License-Identifier: Apache-2.0
"""Every class of transformers for images and text, opened, trained and saved, most of them without an entry of ours.

python -m tests.lmm.any_released_model --all            writes docs/SUPPORTED_MODELS.md; torchvision has to be installed
python -m tests.lmm.any_released_model --page           writes its first tables anew, those of what is registered
python -m tests.lmm.any_released_model glm4v aria       tries some
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from huggingface_hub.errors import StrictDataclassError
from PIL import Image

from moellava.commands.models import markdown
from moellava.constants import IGNORE_INDEX
from moellava.data.dataset import sample_of
from moellava.doctor import Diagnosis, diagnose
from moellava.errors import UserError
from moellava.lmm.any_released import is_real
from moellava.model.manifest import read_folder
from moellava.model.probes import FAILURES, first_line
from moellava.moe import MoESpec, upcycle
from moellava.vlm import VLM
from tests import tiny
from tests.lmm.tiny_released_models import EOS, released_models, tiny_processor, tiny_released_model, write_tokenizer
from tests.model.every_class import in_short

CLOSE = 1e-5
"""How far logits may be off, as a fraction of the largest."""

RECIPES = {
    "copies": MoESpec(moe_mode="dense", num_experts=[3]),
    "slices": MoESpec(moe_mode="dense", init="granular", granularity=2, num_experts=[4]),
}
"""What the doctor says of upcycling -> a recipe of it, for all layers."""

PICTURE = Image.effect_mandelbrot((56, 56), (-3, -2.5, 2, 2.5), 9).convert("RGB")

SAID = ("<image>\nWhat is it?", "A circle.")


UNDECIDED = ("it does not run on a text", "cannot be opened")
"""Refusals that may be due to the tiny sizes."""


@dataclass
class Row:
    """What became of a class.

    Args:
        model_type: of its config.
        found: what the doctor says.
        reason: why it cannot be trained.
        untried: why no tiny model of it was made.
        problems: what did not hold of what was said.
    """

    model_type: str
    found: Diagnosis | None = None
    reason: str = ""
    untried: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.untried or any(words in self.reason for words in UNDECIDED):
            return "undecided"
        return "refused" if self.reason else "fails" if self.problems else "trains"


def check(model_type: str, tokenizer: Path, folder: Path) -> Row:
    """Makes a tiny model of a class, and does what is done with a released one.

    Args:
        tokenizer: a folder.
        folder: an empty one to write to.
    """
    row = Row(model_type)
    try:
        write(model_type, tokenizer, folder / "hub")
    except UserError as error:
        row.reason = str(error)
        return row
    except (*FAILURES, ArithmeticError, StrictDataclassError) as error:
        row.untried = first_line(error)
        return row
    try:
        row.found = diagnose(read_folder(folder / "hub", "--model_local_path"))
        row.reason = in_words(row.found.problems, folder / "hub")
        if not row.reason:
            _train(row, folder)
    except FAILURES as error:
        row.problems.append(located(error))
    return row


def in_words(problems: list[str], folder: Path) -> str:
    """What the doctor says, without the name of a folder that is gone."""
    said = "; ".join(problems).replace(f"--model_local_path {folder}", "It").replace(str(folder), "It")
    return said.partition(" A file of it is damaged")[0]


def located(error: BaseException) -> str:
    """An error in one line, with the line that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{first_line(error)} ({Path(place.filename).name}:{place.lineno})"


def write(model_type: str, tokenizer: Path, folder: Path) -> None:
    """A tiny released model, as the hub would hold it."""
    processor = tiny_processor(model_type, tokenizer)
    tiny_released_model(model_type, processor).save_pretrained(folder)
    processor.save_pretrained(folder)


def _train(row: Row, folder: Path) -> None:
    vlm = tiny.reopen(folder / "hub")
    batch = batch_of(vlm)
    trained = batch["labels"] != IGNORE_INDEX
    said = vlm.tokenizer.decode(batch["labels"][trained])
    if said.strip() != f"{SAID[1]}{EOS}":
        row.problems.append(f"trains {said!r}")
    if batch["labels"][batch["input_ids"] == vlm.reader.placeholder_id].ne(IGNORE_INDEX).any():
        row.problems.append("trains image tokens")
    step(row, vlm, batch)
    wanted = logits_of(vlm.model, batch)
    vlm.save(folder / "saved")
    compare(row, "reopened", logits_of(tiny.reopen(folder / "saved").model, batch), wanted)
    plain, info = hf.AutoModelForImageTextToText.from_pretrained(
        folder / "saved", dtype=torch.float32, output_loading_info=True
    )
    if any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        row.problems.append("plain transformers misses weights")
    compare(row, "plain transformers", logits_of(plain.eval(), batch), wanted)
    for name, spec in RECIPES.items():
        upcycles(row, name, spec, tiny.reopen(folder / "saved"), batch, folder / name)


def batch_of(vlm: VLM) -> dict[str, torch.Tensor]:
    """A question about a picture, and its answer."""
    record = tiny.record("the record", *SAID, image=[PICTURE])
    sample = sample_of(vlm.encoder.encode(record, "the record"), [PICTURE], "the record")
    batch = vlm.collator()([sample])
    return {name: value.float() if is_real(value) else value for name, value in batch.items()}


def step(row: Row, vlm: VLM, batch: dict[str, Any]) -> None:
    """A few steps: a finite loss that falls, and a gradient in every part."""
    optimizer, losses = torch.optim.AdamW(vlm.model.parameters(), lr=3e-3), []
    for _ in range(3):
        loss = vlm.model.train()(**batch, use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
        still = [
            name
            for name, part in vlm.parts.items()
            if any(True for _ in part.parameters()) and not any(moves(one) for one in part.parameters())
        ]
        if still:
            row.problems.append(f"no gradient in {', '.join(still)}")
            break
        optimizer.step()
        optimizer.zero_grad()
    if not min(losses) < losses[0] or not torch.tensor(losses).isfinite().all():
        row.problems.append(f"the loss does not fall: {losses}")
    vlm.model.eval()


def moves(parameter: torch.nn.Parameter) -> bool:
    """Whether it has a gradient."""
    return parameter.grad is not None and bool(parameter.grad.any())


def logits_of(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(
            **{name: value for name, value in batch.items() if name != "labels"}, use_cache=False
        ).logits


def compare(row: Row, name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Notes logits that are off."""
    off = float((found - wanted).abs().max() / wanted.abs().max())
    if not off <= CLOSE:
        row.problems.append(f"{name}: logits off by {off:.1e}")


def upcycles(row: Row, name: str, spec: MoESpec, vlm: VLM, batch: dict[str, Any], folder: Path) -> None:
    """Holds what the doctor says of upcycling against what becomes of it, saved and opened again."""
    dense, said = logits_of(vlm.model, batch), row.found.upcycles[name]
    try:
        upcycle(vlm.model, spec)
    except UserError as error:
        if said == "exact":
            row.problems.append(f"{name}: {error}")
        return
    if said != "exact":
        row.problems.append(f"{name} are refused: {said}")
        return
    vlm.sparse(spec)
    vlm.save(folder)
    compare(row, name, logits_of(tiny.reopen(folder).model, batch), dense)


def check_all(names: list[str]) -> list[Row]:
    """A row for each of these types."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        tokenizer = write_tokenizer(Path(name) / "tokenizer")
        for model_type in names:
            folder = Path(name) / model_type
            rows.append(check(model_type, tokenizer, folder))
            shutil.rmtree(folder, ignore_errors=True)
    return rows


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| `model_type` | trains | tokens of an image | copies | slices | why not |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (row.verdict, row.model_type)):
        images = ", ".join(str(count) for count in dict.fromkeys(row.found.images.values())) if row.found else ""
        ways = " | ".join(in_short(row.found.upcycles.get(name, "")) if row.found else "" for name in RECIPES)
        said = "; ".join(filter(None, [row.untried, row.reason, *row.problems])).replace("|", "\\|")
        lines.append(f"| {row.model_type} | {row.verdict} | {images} | {ways} | {said} |")
    return "\n".join(lines)


EVERY = """
## Every class of transformers for images and text

Below, each class of transformers 5.24 as a tiny random model with a processor of its parts: its parts found, its
answers masked, trained for a few steps, saved, opened again here and in plain transformers, and upcycled in all layers
by copies and by slices, saved and opened. Where an entry above names the class, it says where the parts are; of all
others probes find it, and `--model_local_path` trains them as they are. *Undecided* are those whose tiny model could
not be made, or does not run, in the sizes that the test gives it: what the doctor says of a real folder, decides.
Some need torchvision (`pip install 'moellava[vision]'`), which the doctor says where it is missing.

```bash
python -m tests.lmm.any_released_model --all
```

"""
"""What stands between the tables of what is registered and that of all classes."""

PAGE = Path(__file__).parents[2] / "docs" / "SUPPORTED_MODELS.md"


def page_rows() -> list[list[str]]:
    """The cells of the page's table of all classes."""
    lines = PAGE.read_text(encoding="utf-8").partition(EVERY)[2].splitlines()
    rows = [re.split(r"(?<!\\\\)\|", line.strip()[1:-1]) for line in lines if line.startswith("| ")][1:]
    return [[cell.strip() for cell in row] for row in rows]


def main() -> int:
    """Prints the table; 1 if anything that the doctor lets through does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_type", nargs="*")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--page", action="store_true", help="only what is registered, in its page")
    args = parser.parse_args()
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    if args.page:
        kept = PAGE.read_text(encoding="utf-8").partition(EVERY)[2]
        PAGE.write_text(markdown() + EVERY + kept, encoding="utf-8")
        return 0
    rows = check_all(released_models() if args.all else args.model_type)
    if args.all:
        PAGE.write_text(markdown() + EVERY + table(rows) + "\n", encoding="utf-8")
    else:
        print(table(rows))
    print("\n" + ", ".join(f"{verdict}: {count}" for verdict, count in Counter(row.verdict for row in rows).items()))
    return int(any(row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
