# SPDX-License-Identifier: Apache-2.0
"""Several fine-tunes of one model -> one sparse folder whose experts they are (`moellava upcycle --from A B C`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moellava.batches import batches_of
from moellava.convert.whole import build_whole
from moellava.data.media import MediaFiles
from moellava.data.records import load_records
from moellava.errors import UserError
from moellava.files import write_json
from moellava.model.manifest import read_folder
from moellava.moe import MoESpec, moe_layers, upcycle
from moellava.moe.certificate import FILE, ROUNDING, NotExactError, dense_logits, forward_of
from moellava.moe.decoder import decoder_layers, mlp_names
from moellava.moe.interventions import forced
from moellava.moe.mix import start_routers, take_expert
from moellava.vlm import VLM, Probes, describe

OWN_OPTIONS = {"init": "copy", "granularity": 1, "use_residual": False}
"""Options that would change an expert, or what stands beside it, and their values here."""


@dataclass(frozen=True)
class MixCertificate:
    """How far a mixed model is from each of its sources.

    Args:
        recipe: the `moe` section of the config.
        dtype: what was computed in.
        sources: name -> max_abs_delta (largest difference between a source's MLP and the layer whose tokens all visit
            its expert, over all sparse layers), kl (of the mixed model's next-token distribution, routed so, from the
            source's, in nats: what the mean of all that is not an expert has changed).
    """

    recipe: dict[str, Any]
    dtype: str
    sources: dict[str, dict[str, float]]

    def check(self) -> MixCertificate:
        """Itself; raises NotExactError where an expert is not its source's MLP."""
        for name, measured in self.sources.items():
            if not measured["max_abs_delta"] <= ROUNDING[getattr(torch, self.dtype)]:
                raise NotExactError(
                    f"The expert made of {name} differs from its MLP by {measured['max_abs_delta']:.3g}. "
                    "Please report this."
                )
        return self

    def lines(self) -> list[str]:
        """For the terminal."""
        return [
            f"Mixed of {len(self.sources)} sources ({self.dtype}); with all tokens sent to one source's expert:"
        ] + [
            f"  {name}: a layer is off that source's MLP by {one['max_abs_delta']:.2e}; the model's KL {one['kl']:.2e}"
            for name, one in self.sources.items()
        ]

    def save(self, folder: str | Path) -> None:
        """Writes it beside the weights, in the place of upcycling's certificate."""
        write_json(Path(folder) / FILE, asdict(self))


def mix_folders(
    names: Sequence[str], target: Path, spec: MoESpec, data: Sequence[str], files: MediaFiles, records: int
) -> MixCertificate:
    """Writes the sparse folder. In memory are the new model and one source.

    Args:
        names: dense folders, fine-tunes of one model.
        target: the new folder.
        spec: options, of as many experts as there are sources.
        data: a data file of each source, which its router row starts from; none: routers start at random.
        files: where the images of the data lie.
        records: of each data file.

    Raises:
        UserError: sources that do not fit together, or options that a mixture cannot have.
    """
    refuse(names, spec, data)
    each = [load_records(file) for file in data]  # what is wrong with one is said before a model is read
    mixed = opened(names[0])
    outline, probes, said, off = Outline.of(mixed), mixed.probes(), [], []
    upcycle(mixed.model, spec)
    for number, name in enumerate(names):
        source = opened(name)
        outline.require(source)
        said.append(dense_logits(forward_of(source.model), probes))
        off.append(take_experts(mixed.model, source.model, number))
        take_means(mixed.model, source.model, number)
        del source
    mixed.model.eval()
    if each:
        batches = [batches_of(mixed, one, files, records) for one in each]
        start_routers(mixed.model, batches, mixed.placeholder_ids)
    found = {
        name: {"max_abs_delta": off[number], "kl": divergence(mixed.model, number, probes, said[number])}
        for number, name in enumerate(names)
    }
    certificate = MixCertificate(spec.to_config(), str(mixed.model.dtype).removeprefix("torch."), found).check()
    mixed.sparse(spec)
    mixed.save(target, meta={"stage": "moe"}, beside=certificate.save)
    return certificate


def refuse(names: Sequence[str], spec: MoESpec, data: Sequence[str]) -> None:
    """Raises UserError for flags that a mixture cannot meet."""
    if len(set(names)) < len(names):
        raise UserError(f"--from {' '.join(names)}: a source is named twice; it would be one expert twice.")
    for option, value in OWN_OPTIONS.items():
        if getattr(spec, option) != value:
            raise UserError(f"--{option} {getattr(spec, option)}: with --from, each expert is a source's MLP as it is.")
    if set(spec.num_experts) != {len(names)}:
        raise UserError(f"--num_experts {spec.num_experts}: with --from there are as many as sources, {len(names)}.")
    if data and len(data) != len(names):
        raise UserError(f"--data names {len(data)} files for {len(names)} sources: give each its own, in their order.")


def opened(name: str) -> VLM:
    """A dense source in its own precision. Raises UserError for a sparse one, and for one without a tokenizer."""
    manifest = read_folder(name, "--from")
    if manifest.is_sparse:
        raise UserError(f"--from {name} is sparse already; sources are dense fine-tunes of one model.")
    manifest.require_start()
    return build_whole(describe(manifest), manifest.called)


@dataclass(frozen=True)
class Outline:
    """What sources have in common.

    Args:
        source: the first one, as messages call it.
        facts: what is compared -> its value.
    """

    source: str
    facts: dict[str, Any]

    @classmethod
    def of(cls, vlm: VLM) -> Outline:
        """The outline of a dense model."""
        facts: dict[str, Any] = {"class": type(vlm.model).__name__, "template": vlm.section.version}
        words = sorted(vlm.tokenizer.get_vocab().items())
        facts["vocabulary"] = f"{len(words)} tokens, {hashlib.sha256(repr(words).encode()).hexdigest()[:8]}"
        return cls(vlm.source, facts | {name: tuple(value.shape) for name, value in vlm.model.named_parameters()})

    def require(self, vlm: VLM) -> None:
        """Raises UserError unless a model has the same."""
        other = Outline.of(vlm)
        for name in self.facts | other.facts:
            if self.facts.get(name) != other.facts.get(name):
                raise UserError(
                    f"{self.source} and {vlm.source} are not fine-tunes of one model: {name} is "
                    f"{self.facts.get(name)} and {other.facts.get(name)}."
                )


def take_experts(sparse: Any, source: Any, number: int) -> float:
    """Makes a source's MLPs the experts `number` of a sparse model. Returns the largest difference; see
    `take_expert`."""
    layers, chosen = decoder_layers(source), moe_layers(sparse)
    names = mlp_names(source, [index for index, _ in chosen])
    return max(take_expert(layer, number, getattr(layers[index], names[index])) for index, layer in chosen)


@torch.no_grad()
def take_means(sparse: Any, source: Any, number: int) -> None:
    """Moves all that both models have towards a source, so that after source `number` (from 0) it is the mean."""
    own = dict(sparse.named_parameters())
    for name, value in source.named_parameters():
        if name in own:
            own[name].copy_(own[name].float().lerp(value.float(), 1 / (number + 1)))


def divergence(model: Any, number: int, probes: Probes, said: dict[str, Tensor]) -> float:
    """Kullback-Leibler divergence, in nats, of a mixed model all of whose tokens visit expert `number` from its source:
    the mean over a probe's tokens, of the probe where it is largest."""
    with forced(model, number):
        found = dense_logits(forward_of(model), probes)
    logs = [(said[name].log_softmax(-1), found[name].log_softmax(-1)) for name in probes]
    return max(0.0, *(float((one.exp() * (one - other)).sum(-1).mean()) for one, other in logs))
