# SPDX-License-Identifier: Apache-2.0
"""Every causal language model of transformers, composed with a tower without an entry of ours.

python -m tests.model.any_language_model --all            the table of docs/LANGUAGE_MODELS.md
python -m tests.model.any_language_model qwen3 gemma2     some
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers as hf

from moellava.errors import UserError
from moellava.model.compose import Composition
from moellava.model.probes import FAILURES, first_line
from moellava.moe import MoESpec, upcycle
from moellava.vlm import VLM, compose
from tests import tiny
from tests.model.every_class import in_short, run, untrained
from tests.model.tiny_language_models import language_models, tiny_language_model

CLOSE = 1e-5
"""How far logits may be off, as a fraction of the largest."""

RECIPES = {
    "copies": MoESpec(moe_mode="dense", num_experts=[3]),
    "slices": MoESpec(moe_mode="dense", init="granular", granularity=2, num_experts=[4]),
}
"""Ways to make a dense model sparse, all of its layers, which keep what it says."""

TOKENS = 12
IMAGE = 4  # patches of the tiny tower


@dataclass
class Row:
    """What became of a language model.

    Args:
        model_type: of its config.
        verdict: how it was composed, or 'refused'.
        reason: of the refusal.
        off: name of a comparison -> the largest difference of a logit, as a fraction of the largest logit.
        problems: what did not hold.
        upcycles: recipe -> 'exact', or why it is refused.
    """

    model_type: str
    verdict: str = "as is"
    reason: str = ""
    off: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    upcycles: dict[str, str] = field(default_factory=dict)


def check(model_type: str, tokenizer: Path, tower: Path, folder: Path) -> Row:
    """Composes a tiny model of a type and holds it against its own class.

    Args:
        tokenizer, tower: folders of what goes with it.
        folder: an empty one to write to.
    """
    row = Row(model_type)
    try:
        _check(row, tokenizer, tower, folder)
    except FAILURES as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        row.problems.append(f"{first_line(error)} ({Path(place.filename).name}:{place.lineno})")
    return row


def _check(row: Row, tokenizer: Path, tower: Path, folder: Path) -> None:
    tiny_language_model(row.model_type).save_pretrained(folder / "base")
    # As it is opened: some do not give back what they have saved.
    base = hf.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    shutil.copytree(tokenizer, folder / "base", dirs_exist_ok=True)
    try:
        vlm = compose(folder / "base", str(tower), Composition(version="v1", image_projector_type="mlp2x_gelu"))
    except UserError as error:
        row.verdict, row.reason = "refused", str(error).partition("with a tower: ")[2] or str(error)
        return
    row.verdict = verdict_of(base, vlm)
    if shared := sharing(vlm.model):
        row.problems.append(f"parameters share memory: {', '.join(shared)}")
    ids = torch.randint(20, 250, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    compare(row, "composed", vlm.model, base, ids)
    train_step(row, vlm, ids)
    generate(row, vlm.model, base, ids)
    vlm.save(folder / "saved")
    is_extended = type(vlm.model) is not hf.LlavaForConditionalGeneration
    if not is_extended:
        plain = hf.LlavaForConditionalGeneration.from_pretrained(folder / "saved", dtype=torch.float32).eval()
        compare(row, "plain transformers", plain, base, ids)
    compare(row, "reopened", tiny.reopen(folder / "saved").model, base, ids)
    for name, spec in RECIPES.items():
        row.upcycles[name] = upcycled(tiny.reopen(folder / "saved"), spec, ids, folder / name)


def sharing(model: torch.nn.Module) -> list[str]:
    """Names of parameters that lie where another one lies, which a step of one would move with it."""
    first: dict[int, str] = {}
    return [name for name, one in model.named_parameters() if first.setdefault(one.data_ptr(), name) != name]


def upcycled(vlm: VLM, spec: MoESpec, ids: torch.Tensor, folder: Path) -> str:
    """'exact', or why not, of a dense model made sparse, saved and opened again."""
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        dense = vlm.model(**given).logits
        try:
            upcycle(vlm.model, spec)
        except UserError as error:
            return str(error)
        vlm.sparse(spec)
        vlm.save(folder)
        logits = [model(**given).logits for model in (vlm.model, tiny.reopen(folder).model)]
    off = [float((found - dense).abs().max() / dense.abs().max()) for found in logits]
    return "exact" if max(off) <= CLOSE else f"off by {off[0]:.0e}, reopened {off[1]:.0e}"


def verdict_of(base: torch.nn.Module, vlm: VLM) -> str:
    """How it was composed, told from what is there."""
    section, head = vlm.section, base.get_output_embeddings().weight
    if section.softcap is not None or section.head_bias:
        return "softcap" if section.softcap is not None else "head bias"
    new = vlm.model.get_output_embeddings().weight[: len(head)]
    words = base.get_input_embeddings().weight
    same = torch.equal(new, head) and torch.equal(vlm.model.get_input_embeddings().weight[: len(words)], words)
    if not same:
        return "folded"
    return "untied" if head is words and not vlm.model.config.text_config.tie_word_embeddings else "as is"


def compare(row: Row, name: str, model: torch.nn.Module, base: torch.nn.Module, ids: torch.Tensor) -> None:
    """Notes how far the logits of text are from the base model's."""
    with torch.no_grad():
        wanted = base(ids).logits
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    found = found[:, -wanted.shape[1] :, : wanted.shape[2]]
    row.off[name] = float((found - wanted).abs().max() / wanted.abs().max())
    if not row.off[name] <= CLOSE:
        row.problems.append(f"{name}: logits off by {row.off[name]:.1e}")


def train_step(row: Row, vlm: VLM, ids: torch.Tensor) -> None:
    """One step on a question with an image: a finite loss, and a projector that gets a gradient."""
    model, side = vlm.model.train(), vlm.model.config.vision_config.image_size
    image = torch.full((2, IMAGE), model.config.image_token_index)
    given = torch.cat((ids[:, :2], image, ids[:, 2:]), 1)
    labels = torch.where(given == model.config.image_token_index, -100, given)
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(given)
    loss = model(input_ids=given, attention_mask=mask, pixel_values=pixels, labels=labels).loss
    if wrong := untrained(model, vlm.parts["projector"], loss):
        row.problems.append(f"training: {wrong}")
    model.eval()


def generate(row: Row, model: torch.nn.Module, base: torch.nn.Module, ids: torch.Tensor) -> None:
    """Greedy tokens of text, as the base model's."""
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    try:
        wanted = base.generate(ids, **options)
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        row.problems.append(f"its own class does not generate: {str(error).splitlines()[0]}")
        return
    found = model.generate(input_ids=ids, **options)
    if not torch.equal(found, wanted):
        row.problems.append("generates other tokens than its own class")


def check_all(names: list[str]) -> list[Row]:
    """A row for each of these types."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tokenizer, tower = tiny.write_tokenizer(root / "tokenizer"), tiny.write_clip(root / "tower")
        for model_type in names:
            folder = root / model_type
            folder.mkdir()
            rows.append(check(model_type, tokenizer, tower, folder))
            shutil.rmtree(folder)
    return rows


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| `model_type` | composed | logits off | copies | slices | why not |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (row.verdict == "refused", row.verdict, row.model_type)):
        off = f"{max(row.off.values()):.0e}" if row.off else ""
        said = "; ".join([row.reason, *row.problems]).strip("; ")
        ways = " | ".join(in_short(row.upcycles.get(name, "")) for name in RECIPES)
        lines.append(f"| {row.model_type} | {row.verdict} | {off} | {ways} | {said} |")
    return "\n".join(lines)


def main() -> int:
    """See `run`."""
    return run(__doc__, language_models, check_all, table, lambda row: row.verdict)


if __name__ == "__main__":
    sys.exit(main())
