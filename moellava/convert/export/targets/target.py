# SPDX-License-Identifier: Apache-2.0
"""Native targets: language models of Hugging Face's with experts, and the rules by which a sparse model of ours becomes
one of them. A target is an entry; which fits, follows from the model.

Each was measured against the model itself (docs/EXPORT.md). What looks alike and is not: OLMoE normalises queries and
keys, Qwen3-MoE of other decoders too, DeepSeek's and GLM's routers are sigmoids.

Legend: D hidden, E experts, I intermediate units of an expert, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moellava.convert.export.pieces import Piece, Pieces, zeros
from moellava.convert.export.source import Layer, Source
from moellava.registry import Registry

LINEARS = ("gate_proj", "up_proj", "down_proj")
"""The linears of a gated MLP (arXiv:2002.05202), and of each expert of a target."""

Place = dict[str, Any] | None
"""Fields that say which layers are sparse; None: the target's cannot lie there."""


@dataclass(frozen=True)
class Target:
    """An entry of `TARGETS`.

    Args:
        text_type: `model_type` of its language model.
        decoders: `model_type` of the dense language models whose attention, norms and embeddings it has.
        place: source -> the fields that say which layers are sparse.
        fields: source -> the other fields of its routing.
        mlp: (source, layer) -> tensors of a layer's MLP, by their names within the layer.
        attention: (source, layer) -> tensors that differ from the source's, by their names within the layer.
        gates: the `top1_gate`s that it computes with one expert a token.
        holds_shared: whether it has an MLP that every token visits.
        holds_bias: whether a bias takes part in choosing experts.
        holds_counts: whether layers may differ in their number of experts.
        holds_window: whether its attention can be limited to the latest tokens.
        vlm_type: `model_type` of the vision-language model, where its class is another one as well.
        experts: where its class has the experts of a layer, in two tensors.
        copies_dense: whether the MLP of a dense layer is each of its experts.
    """

    text_type: str
    decoders: tuple[str, ...]
    place: Callable[[Source], Place]
    fields: Callable[[Source], dict[str, Any]]
    mlp: Callable[[Source, Layer], Pieces]
    attention: Callable[[Source, Layer], Pieces] = lambda source, layer: {}
    gates: tuple[str, ...] = ("exact",)
    holds_shared: bool = False
    holds_bias: bool = False
    holds_counts: bool = False
    holds_window: bool = True
    vlm_type: str | None = None
    experts: str = "mlp.experts"
    copies_dense: bool = False

    def lacks(self, source: Source) -> list[str]:
        """Why a sparse model cannot become one of these; empty if it can."""
        spec, found = source.spec, []
        assert spec is not None
        found += [f"its {part} has biases" for part in _biased(source)]
        if spec.use_residual:
            found.append("its dense MLPs are mixed with the experts (use_residual)")
        if source.has_shared and not self.holds_shared and not spec.use_residual:
            found.append("it has a shared expert")
        if spec.router_balance == "bias" and not self.holds_bias:
            found.append("a bias takes part in choosing its experts")
        if spec.top_k_experts == 1 and spec.top1_gate not in self.gates:
            found.append(f"its top-1 gates are the {spec.top1_gate} ones")
        if len({layer.n_experts for layer in source.layers if layer.n_experts}) > 1 and not self.holds_counts:
            found.append("its layers differ in their number of experts")
        if window_of(source) and not self.holds_window:
            found.append(f"its attention looks back {window_of(source)} tokens alone")
        if self.place(source) is None:
            found.append("its sparse layers lie elsewhere")
        return found


TARGETS: Registry[Target] = Registry("export target")
"""name -> target, in the order in which they are tried."""


def _biased(source: Source) -> list[str]:
    """Parts of the layers that have biases, which no target has: the output of the attention, the MLPs."""
    names = {name for layer in source.layers for name in layer.names if name.endswith(".bias")}
    parts = {"attention's output": any("o_proj" in name for name in names)}
    parts["MLP"] = any(name.split(".")[-2] in LINEARS for name in names)
    return [part for part, is_biased in parts.items() if is_biased]


def window_of(source: Source) -> int | None:
    """Tokens that its attention looks back; None: all of them."""
    window = getattr(source.text, "sliding_window", None)
    return window if window and getattr(source.text, "use_sliding_window", True) else None


def sparse_indices(source: Source) -> list[int]:
    """Indices of the sparse layers."""
    return [layer.index for layer in source.layers if layer.n_experts]


def is_whole(source: Source) -> bool:
    """Whether every layer is sparse."""
    return len(sparse_indices(source)) == len(source.layers)


def n_experts(source: Source) -> int:
    """E, or the largest."""
    return max(layer.n_experts for layer in source.layers)


def anywhere(source: Source) -> Place:
    """Any layers. (`decoder_sparse_step` could say the same of some models; engines read it differently.)"""
    dense = [layer.index for layer in source.layers if not layer.n_experts]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


def everywhere(source: Source) -> Place:
    """All layers, or none of this target."""
    return {} if is_whole(source) else None


def replicated(source: Source) -> Place:
    """All layers: one that is dense holds its MLP as each of its experts, unless experts are narrower than that."""
    return {} if is_whole(source) or source.width == source.text.intermediate_size else None


def in_steps(source: Source) -> Place:
    """Every n-th layer between two, where n - 1 counts as the first."""
    chosen = sparse_indices(source)
    for step in range(1, len(source.layers) + 1):
        if chosen == [i for i in range(chosen[0], chosen[-1] + 1) if (i + 1) % step == 0]:
            return {
                "moe_layer_interval": step,
                "moe_layer_start_index": chosen[0],
                "moe_layer_end_index": chosen[-1],
            }
    return None


def copied(there: str, here: str, names: tuple[str, str, str] = LINEARS) -> Pieces:
    """The linears of a gated MLP, by what their names begin with there and here; `names`: of the linears there."""
    return {
        f"{there}.{name}.weight": Piece((f"{here}.{own}.weight",)) for name, own in zip(names, LINEARS, strict=True)
    }


def silent(source: Source, layer: Layer, there: str, width: int) -> Pieces:
    """The linears of a gated MLP of that width that adds nothing."""
    hidden, dtype = source.text.hidden_size, dtype_of(source, layer)
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    return {f"{there}.{name}.weight": zeros(shape, dtype) for name, shape in zip(LINEARS, shapes, strict=True)}


def routed(layer: Layer, router: str, experts: str, names: tuple[str, str, str] = LINEARS) -> Pieces:
    """A sparse layer's router, and its experts one by one.

    Args:
        router: the router's weight there.
        experts: what an expert's tensors begin with there; {} stands for its number.
        names: of its linears there.
    """
    own = f"{layer.prefix}{layer.mlp}"
    pieces = {router: Piece((f"{own}.router.weight",))}
    for expert in range(layer.n_experts):
        pieces |= copied(experts.format(expert), f"{own}.experts.{expert}", names)
    return pieces


def unchanged(layer: Layer) -> Pieces:
    """The MLP of a dense layer under its own names."""
    own = [name for name in layer.names if name.startswith(f"{layer.mlp}.")]
    return {name: Piece((layer.prefix + name,)) for name in own}


def dtype_of(source: Source, layer: Layer) -> torch.dtype:
    """What the matrices of a layer are stored in."""
    return source.tensors[f"{layer.prefix}self_attn.q_proj.weight"].dtype


def stacked(*tensors: Tensor) -> Tensor:
    """[A, B] of each expert -> [E, A, B]."""
    return torch.stack(tensors)


def stacked_pairs(*tensors: Tensor) -> Tensor:
    """[I, D] twice of each expert -> [E, 2 I, D], the first above the second."""
    return torch.stack([torch.cat(pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)])


def expert_names(layer: Layer, count: int, *linears: str) -> tuple[str, ...]:
    """Tensors of all experts, for each expert those linears; `count` times the MLP of a layer that is dense."""
    own = f"{layer.prefix}{layer.mlp}."
    experts = [f"experts.{index}." if layer.n_experts else "" for index in range(count)]
    return tuple(f"{own}{expert}{linear}.weight" for expert in experts for linear in linears)
