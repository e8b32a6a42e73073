# SPDX-License-Identifier: Apache-2.0
"""An adapter of ours as one of peft's on an exported folder.

What the adapter's run trained in full (routers, the projector) goes into the exported weights: engines put
low-rank matrices on a model and nothing else. Hugging Face's classes hold the experts of a layer in two tensors, to
which peft adds by `target_parameters`; there w1 and w3 are one matrix, so that their adapters, of rank r each, are one
of rank 2 r. Every adapter has that rank, the others filled up with zeros: engines know no rank of its own for a module.

Legend: r rank, D hidden, I intermediate units, E experts; A [r, in], B [out, r].
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from moellava.adapters.folder import WEIGHTS
from moellava.adapters.lora import NAME, Adapter, lora_layers, pattern_of
from moellava.convert.export import AUTO, CODE
from moellava.convert.export.export_folder import choose, export_folder
from moellava.convert.export.native import layer_pieces
from moellava.convert.export.pieces import Piece
from moellava.convert.export.proof import Certificate, prove, reopen, said_by
from moellava.convert.export.source import Source, opened_source
from moellava.convert.export.targets import TARGETS
from moellava.convert.export.targets.target import LINEARS, n_experts
from moellava.convert.merge_lora import open_base
from moellava.errors import UserError
from moellava.files import STAGING, staged
from moellava.model.manifest import Manifest, read_folder
from moellava.vlm import VLM, Probes, describe

FOLDER = "adapter"

EXPERT = re.compile(r"(.+\.)experts\.(\d+)\.(gate_proj|up_proj|down_proj)")
"""A linear of an expert: what is before it, its number, which linear."""

STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The tensors in which Hugging Face's classes hold all experts of a layer -> the linears of each."""


@dataclass(frozen=True)
class Matrices:
    """An adapter of one linear: W + scaling · B A.

    Args:
        a: [r, in].
        b: [out, r].
    """

    a: Tensor
    b: Tensor

    def padded(self, rank: int) -> Matrices:
        """The same with that rank."""
        more = rank - len(self.a)
        return Matrices(torch.nn.functional.pad(self.a, (0, 0, 0, more)), torch.nn.functional.pad(self.b, (0, more)))


def above(parts: list[Matrices]) -> Matrices:
    """The adapter of a linear that holds several above each other: A's above each other, B's on the diagonal."""
    return Matrices(torch.cat([part.a for part in parts]), torch.block_diag(*[part.b for part in parts]))


def stacked_experts(experts: list[Matrices]) -> Matrices:
    """Of E experts, as peft lays them out for one tensor: A [E · r, in], expert by expert; B [out, r · E], of each rank
    the experts."""
    b = torch.stack([expert.b for expert in experts], dim=-1)
    return Matrices(torch.cat([expert.a for expert in experts]), b.flatten(1))


def export_adapter(
    manifest: Manifest,
    adapter_dir: Path,
    target: Path,
    to: str = AUTO,
    shard_bytes: int = 4 * 10**9,
    dropless: bool = False,
) -> tuple[Certificate, Certificate]:
    """Writes the model that an adapter stands on, and in `adapter/` the adapter for peft.

    Args:
        manifest: the folder that the run with adapters started from.
        adapter_dir: the `adapter/` of that run.
        target, to, shard_bytes, dropless: see `export_folder`.

    Returns:
        The proofs of the folder and of the folder with its adapter.

    Raises:
        UserError: base and adapter do not belong together, or see `export_folder`. Nothing is left then.
    """
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}-") as place:
        plain = Path(place) / "plain"
        adapter, matrices, probes, wanted = taken_apart(manifest, adapter_dir, plain)
        with ExitStack() as undo:
            undo.callback(shutil.rmtree, target, ignore_errors=True)
            base = export_folder(read_folder(plain, manifest.flag), target, to, True, shard_bytes, dropless)
            assert base is not None
            with staged(target / FOLDER, STAGING) as staging:
                write_adapter(read_folder(plain, manifest.flag), target, staging, base.target, adapter, matrices)
                said = reopen(target, probes, base.target == CODE, staging)
                proof = prove(probes, wanted, said, staging, f"{base.target} with an adapter", base.model_class)
                proof = replace(proof, moved=moved(said, reopen(target, probes, base.target == CODE), probes))
                if not min(proof.moved.values()) > 0:
                    raise UserError(f"{adapter_dir} changes nothing: it has learnt nothing, or peft does not apply it.")
                proof.save(staging)
            undo.pop_all()
    return base, proof


def taken_apart(
    manifest: Manifest, adapter_dir: Path, plain: Path
) -> tuple[Adapter, dict[str, Matrices], Probes, dict[str, Tensor]]:
    """Writes what an adapter stands on, without it.

    Returns:
        The adapter; its matrices by the name of their linear; probes; what the model computes with the adapter.
    """
    opened = open_base(manifest, adapter_dir)
    opened.put_on()
    probes, wanted = said_by(opened.vlm)
    matrices = take_off(opened.vlm)
    opened.restore_precision()
    opened.vlm.save(plain)
    return opened.adapter, matrices, probes, wanted


def take_off(vlm: VLM) -> dict[str, Matrices]:
    """Takes the adapters off a model, in place; returns them by the names of their linears."""
    found = {}
    for name, layer in list(lora_layers(vlm.model)):
        weights = [side[NAME].weight.detach().clone() for side in (layer.lora_A, layer.lora_B)]
        found[name] = Matrices(*weights)
        vlm.model.set_submodule(name, layer.base_layer)
    return found


def write_adapter(
    plain: Manifest, target: Path, folder: Path, name: str, adapter: Adapter, matrices: Mapping[str, Matrices]
) -> None:
    """Writes the adapter for an exported folder.

    Args:
        plain: of the folder that was exported.
        target: the exported folder.
        folder: where to.
        name: what it was exported as.
        adapter: as it was.
        matrices: its matrices.
    """
    with opened_source(describe(plain), plain.called) as source:
        assert choose(source, name if name in (CODE, *TARGETS) else AUTO) == name
        linears, stacks = dict(matrices), dict[str, Matrices]()
        if name in TARGETS:
            linears, stacks = translated(source, name, matrices)
    model = on_meta(target, name == CODE)
    rank = 2 * adapter.config.r
    known = [path for path, _ in model.named_modules()]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * adapter.config.lora_alpha,
        target_modules=pattern_of(linears, known) or None,
        target_parameters=sorted({path.split(".layers.")[-1].partition(".")[2] for path in stacks}) or None,
        base_model_name_or_path=str(target),
        inference_mode=True,
    )
    wrapped = get_peft_model(model, config)
    state: dict[str, Tensor] = {}
    for path, layer in lora_layers(wrapped):
        own = path.removeprefix("base_model.model.")
        if hasattr(layer, "parameter_name"):
            own = f"{own.replace('.base_layer', '')}.{layer.parameter_name}"
        if own not in stacks and own not in linears:  # of a layer that peft adapts because others are
            stacks[own] = Matrices(*(torch.zeros(side[NAME].weight.shape) for side in (layer.lora_A, layer.lora_B)))
        part = stacks[own] if own in stacks else linears[own].padded(rank)
        for side, tensor in (("lora_A", part.a), ("lora_B", part.b)):
            state[f"{path}.{side}.{NAME}.weight"] = tensor.contiguous()
    missing = {name for name in wrapped.state_dict() if ".lora_" in name} ^ set(state)
    if missing:
        raise UserError(f"peft has no place for {len(missing)} matrices of the adapter, for instance {min(missing)}.")
    save_file(get_peft_model_state_dict(wrapped, state_dict=state), folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(folder)


def on_meta(folder: Path, with_code: bool) -> Any:
    """The structure of an exported folder's model, without memory. The code is what was just written."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=with_code)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=with_code)


def translated(
    source: Source, name: str, matrices: Mapping[str, Matrices]
) -> tuple[dict[str, Matrices], dict[str, Matrices]]:
    """Matrices by linears of the target's class, and by tensors that hold all experts of a layer."""
    rank, linears, stacks = 2 * next(len(part.a) for part in matrices.values()), {}, {}
    experts: dict[str, dict[tuple[int, str], Matrices]] = {}
    for linear, part in matrices.items():
        if match := EXPERT.fullmatch(linear):
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = part
    for path, piece in layer_pieces(source, TARGETS[name]).items():
        of = [source_name.removesuffix(".weight") for source_name in piece.sources]
        if of and all(linear in matrices and not EXPERT.fullmatch(linear) for linear in of) and path.endswith("weight"):
            linears[path.removesuffix(".weight")] = _through(piece, [matrices[linear] for linear in of])
    count, target = n_experts(source), TARGETS[name]
    for layer in source.layers:
        before = f"{layer.prefix}{layer.mlp}."
        own = experts.get(before, {})
        if not layer.n_experts and target.copies_dense and f"{before}down_proj" in matrices:
            own = {(expert, linear): matrices[before + linear] for expert in range(count) for linear in LINEARS}
        for stack, parts in STACKS.items() if own else ():
            each = [above([own[expert, part] for part in parts]).padded(rank) for expert in range(len(own) // 3)]
            each += [Matrices(torch.zeros_like(each[0].a), torch.zeros_like(each[0].b))] * (count - len(each))
            stacks[f"{layer.prefix}{target.experts}.{stack}"] = stacked_experts(each)
    return linears, stacks


def _through(piece: Piece, parts: list[Matrices]) -> Matrices:
    """What a rule does to the rows of weights, done to the rows of B."""
    if len(parts) == 1:
        return Matrices(parts[0].a, piece.make(parts[0].b))
    return above(parts)


def moved(said: Mapping[str, Tensor], without: Mapping[str, Tensor], probes: Probes) -> dict[str, float]:
    """probe -> how far an adapter moves the logits, at most."""
    return {name: float((said[f"{name}/logits"] - without[f"{name}/logits"]).abs().max()) for name in probes}
