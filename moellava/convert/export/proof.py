# SPDX-License-Identifier: Apache-2.0
"""The proof of an export: what plain transformers computes from the new folder, in a process of its own, beside what
the model computed that it was made of.

Shapes: B rows, L positions, V entries of the vocabulary.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moellava.convert.export import reopened
from moellava.convert.export.reopened import GREEDY, by_probe, computed
from moellava.errors import UserError
from moellava.files import file_digest, write_json
from moellava.moe import set_routing_context
from moellava.moe.upcycle import change_spec
from moellava.vlm import VLM, Probes

FILE = "export_certificate.json"

LIMIT = 1e-4
"""What rounding may change in fp32, of a logit or as a fraction of the largest one where that is above 1. Measured: at
most 1e-5; a wrong rule changes logits by whole units."""

LIBRARIES = ("moellava", "torch", "transformers")


class NotProvenError(UserError):
    """The new folder computes something else, or does not open."""


@dataclass(frozen=True)
class Certificate:
    """What was compared.

    Args:
        target: what the model was written as.
        model_class: name of the class that opened it.
        limit: see `LIMIT`.
        probes: name -> tokens, max_abs_delta (largest difference of a logit), largest_logit, greedy_tokens (that were
            decoded and are equal).
        versions: library -> version that it was compared with.
        sha256: file of weights or code, or config -> its digest.
        moved: of an adapter, probe -> how far it moves the logits, at most.
    """

    target: str
    model_class: str
    limit: float
    probes: dict[str, dict[str, float]]
    versions: dict[str, str]
    sha256: dict[str, str]
    moved: dict[str, float] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The certificate in a few lines."""
        rows = [
            f"  {name}: max |Δlogit| {probe['max_abs_delta']:.2e} of {probe['largest_logit']:.3g}, "
            f"{probe['greedy_tokens']:.0f} greedy tokens equal"
            for name, probe in self.probes.items()
        ]
        opener = f"reopened by transformers {self.versions['transformers']} without moellava"
        title = f"{self.model_class} ({self.target}), {opener}:"
        rows += [f"  the adapter moves logits of {name} by up to {delta:.3g}" for name, delta in self.moved.items()]
        return [title, *rows]

    def save(self, folder: Path) -> None:
        """Writes it beside the weights."""
        write_json(folder / FILE, asdict(self))


def said_by(vlm: VLM) -> tuple[Probes, dict[str, Tensor]]:
    """Probes of a model, and what it computes from them where no token is dropped, in fp32."""
    if vlm.spec is not None:
        change_spec(vlm.model, replace(vlm.spec, drop_tokens=False))
    probes = vlm.probes()
    set_routing_context(vlm.model)
    return probes, computed(vlm.model, probes)


def reopen(folder: Path, probes: Probes, with_code: bool, adapter: Path | None = None) -> dict[str, Tensor]:
    """What plain transformers computes from a folder, in a process that knows no moellava.

    Args:
        folder: what was written.
        probes: inputs.
        with_code: run the code in it.
        adapter: what peft puts on it.

    Raises:
        NotProvenError: it does not open there; the last line of what was said is told.
    """
    with tempfile.TemporaryDirectory() as place:
        asked, said = Path(place) / "probes.safetensors", Path(place) / "said.safetensors"
        save_file(flat(probes), asked)
        words = [sys.executable, "-I", reopened.__file__, str(folder), str(asked), str(said), *["--code"] * with_code]
        words += [] if adapter is None else ["--adapter", str(adapter)]
        # What code is copied to must be new: transformers takes what lies there from another folder of that name.
        env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": place}
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
            raise NotProvenError(f"The exported folder does not open in plain transformers: {reason}")
        return {name: tensor.clone() for name, tensor in load_file(said).items()}


def flat(probes: Probes) -> dict[str, Tensor]:
    """probe -> input -> tensor, as probe/input -> tensor."""
    return {f"{name}/{key}": value.contiguous() for name, probe in probes.items() for key, value in probe.items()}


def prove(
    probes: Probes, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], folder: Path, target: str, name: str
) -> Certificate:
    """The certificate of an export.

    Args:
        probes: inputs of both models.
        ours, theirs: see `computed`.
        folder: what was written.
        target: what as.
        name: of the class.

    Raises:
        NotProvenError: logits differ by more than rounding, or a greedily decoded token is another one.
    """
    measured, wrong = {}, []
    for probe in by_probe(flat(probes)):
        mask = probes[probe]["attention_mask"].bool()
        before, after = ours[f"{probe}/logits"][mask], theirs[f"{probe}/logits"][mask]
        delta, largest = float((after - before).abs().max()), float(before.abs().max())
        tokens, limit = ours[f"{probe}/tokens"], LIMIT * max(largest, 1.0)
        first = torch.where(tokens.ne(theirs[f"{probe}/tokens"]).any(0))[0].tolist()
        if not delta <= limit:
            wrong.append(f"{probe}: logits differ by up to {delta:.3g}, and rounding explains {limit:.3g}")
        elif first:
            wrong.append(f"{probe}: the greedily decoded token {first[0]} of {GREEDY} is another one")
        measured[probe] = {"tokens": len(before), "max_abs_delta": delta, "largest_logit": largest}
        measured[probe] |= {"greedy_tokens": tokens.shape[1]}
    if wrong:
        raise NotProvenError(
            f"As {target}, the folder computes something else in plain transformers ({'; '.join(wrong)}), and is not "
            "written. Please report this; --to code keeps the model's own mathematics."
        )
    files = [file for pattern in ("*.safetensors", "*.py", "config.json") for file in sorted(folder.glob(pattern))]
    digests = {file.name: file_digest(file) for file in files}
    return Certificate(target, name, LIMIT, measured, {name: version(name) for name in LIBRARIES}, digests)


def class_named(config: Any) -> str:
    """The class that opens a folder."""
    return config.architectures[0]
