# SPDX-License-Identifier: Apache-2.0
"""The DeepSpeed engine: `deepspeed.moe.layer.MoE` with this package's routing and dispatch.

What stays DeepSpeed's: the class that its engine recognises, process groups, ZeRO over expert groups, gradient
averaging, and checkpoints with one file per global expert. What is replaced, and why:
* stock gating knows no padding mask, z-loss or bias, samples second experts in evaluation too, and pads every expert
  to the fullest one; here the router is the native engine's, and rows travel unpadded;
* at ep_size 1 a layer performs no collective; at ep_size > 1 always three in a forward (counts, rows out, rows back)
  and two in a backward, whatever the ranks' lengths are, so that unequal ranks cannot wait for each other.

Legend: T tokens, D hidden, E experts, W = ep_size ranks, P = E / W experts of one rank, R rows that this rank sends,
Q rows that it receives.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from moellava.errors import UserError
from moellava.moe.experts import Dispatch, run_experts, sort_by_expert
from moellava.moe.layer import NativeMoE, RoutedMLP
from moellava.moe.router import Routing
from moellava.moe.spec import MoESpec
from moellava.processes import rank, world_size


class LocalExperts(Experts):
    """This rank's experts, marked as DeepSpeed wants them, so that they are averaged over their own group only.

    Args:
        experts: in the order of their global indices.
        group_name: expert group that owns them.
    """

    def __init__(self, experts: list[nn.Module], group_name: str):
        nn.Module.__init__(self)  # Experts.__init__ would copy one expert; these may differ
        self.deepspeed_experts = nn.ModuleList(experts)
        self.num_local_experts = len(experts)
        for parameter in self.parameters():
            parameter.allreduce = False
            parameter.group_name = group_name


class ExpertParallel(nn.Module):
    """Holds the experts under the name that DeepSpeed's checkpoints look for, and the group that shares them."""

    def __init__(self, experts: LocalExperts):
        super().__init__()
        self.experts = experts
        self.ep_group = None

    def _set_ep_group(self, group: dist.ProcessGroup) -> None:  # called by deepspeed.moe.layer.MoE
        self.ep_group = group


class DeepSpeedMoE(RoutedMLP, MoE):
    """The engine of training under the `deepspeed` launcher: ZeRO-0, 1, 2, expert parallel.

    Args:
        experts: this rank's experts, in the order of their global indices.
        spec: options.
        n_experts: E over all ranks.
        hidden: size D of a token.
        ep_size: W.
        shared: an MLP that every token visits, or None.

    Parameters: `router.weight`, `deepspeed_moe.experts.deepspeed_experts.{local e}.…`, `shared.…`, `coefficient.…`.
    `deepspeed.initialize` sets the process groups.
    """

    def __init__(
        self,
        experts: list[nn.Module],
        spec: MoESpec,
        n_experts: int,
        hidden: int,
        ep_size: int,
        shared: nn.Module | None = None,
    ):
        nn.Module.__init__(self)  # MoE.__init__ would build the stock gate and copy one expert
        self.ep_size, self.num_experts, self.num_local_experts = ep_size, n_experts, len(experts)
        self.expert_group_name = f"ep_size_{ep_size}"
        self.enable_expert_tensor_parallelism = False
        self.use_residual = False  # the residual MLP is `shared`
        self._start(spec, n_experts, hidden, shared, next(experts[0].parameters()))
        self.deepspeed_moe = ExpertParallel(LocalExperts(experts, self.expert_group_name))

    @property
    def first_expert(self) -> int:
        """Global index of this rank's first expert."""
        return (rank() % self.ep_size) * self.num_local_experts

    def local_experts(self) -> dict[int, nn.Module]:
        return dict(enumerate(self.deepspeed_moe.experts.deepspeed_experts, start=self.first_expert))

    def run(self, x_TD: Tensor, routing: Routing) -> Tensor:
        choice = routing.choice
        dispatch = sort_by_expert(choice, routing.gate_Nk, self.n_experts)
        experts = list(self.deepspeed_moe.experts.deepspeed_experts)
        if self.ep_size == 1:
            return run_experts(experts, x_TD, dispatch, self.context.kernel)
        return self._run_spread(experts, x_TD, dispatch)

    def _run_spread(self, experts: list[nn.Module], x_TD: Tensor, dispatch: Dispatch) -> Tensor:
        """Sends each row to the rank of its expert and adds what comes back."""
        group = self.deepspeed_moe.ep_group
        if group is None:
            raise RuntimeError(
                "A model with ep_size > 1 runs after deepspeed.initialize, which sets its process groups."
            )
        sent_WP = dispatch.count_E.view(self.ep_size, len(experts))
        received_WP = torch.empty_like(sent_WP)
        dist.all_to_all_single(received_WP, sent_WP, group=group)
        # The one wait for the device: a collective of unequal parts has to be told their sizes by the host.
        out_splits, in_splits = torch.stack((sent_WP.sum(1), received_WP.sum(1))).tolist()
        row_QD = Exchange.apply(x_TD.index_select(0, dispatch.token_R), out_splits, in_splits, group)
        expert_Q = torch.arange(len(experts), device=x_TD.device).repeat(self.ep_size)
        expert_Q = expert_Q.repeat_interleave(received_WP.flatten(), output_size=sum(in_splits))
        order_Q = expert_Q.argsort(stable=True)
        ones_Q = torch.ones(len(order_Q), device=x_TD.device)
        arrived = Dispatch(order_Q, ones_Q, received_WP.sum(0))
        back_RD = Exchange.apply(
            run_experts(experts, row_QD, arrived, self.context.kernel), in_splits, out_splits, group
        )
        weighted_RD = (back_RD * dispatch.gate_R.unsqueeze(1)).to(x_TD.dtype)
        return torch.zeros_like(x_TD).index_add(0, dispatch.token_R, weighted_RD)


class Exchange(torch.autograd.Function):
    """All-to-all of rows with unequal splits; the gradient travels the other way."""

    @staticmethod
    def forward(ctx, row_RD: Tensor, out_splits: list[int], in_splits: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.splits = (out_splits, in_splits, group)
        row_QD = row_RD.new_empty(sum(in_splits), row_RD.shape[1])
        dist.all_to_all_single(row_QD, row_RD.contiguous(), in_splits, out_splits, group=group)
        return row_QD

    @staticmethod
    def backward(ctx, grad_QD: Tensor):
        out_splits, in_splits, group = ctx.splits
        return Exchange.apply(grad_QD, in_splits, out_splits, group), None, None, None


def to_deepspeed(layer: NativeMoE, ep_size: int) -> DeepSpeedMoE:
    """This rank's share of a native layer.

    Raises:
        UserError: `ep_size` that does not divide the experts or the processes.
    """
    if ep_size < 1 or layer.n_experts % ep_size:
        raise UserError(f"--ep_size {ep_size} does not divide --num_experts {layer.n_experts}.")
    if world_size() % ep_size:
        raise UserError(f"--ep_size {ep_size} does not divide the {world_size()} processes of this run.")
    width = layer.n_experts // ep_size
    first = (rank() % ep_size) * width
    sparse = DeepSpeedMoE(
        list(layer.experts[first : first + width]), layer.spec, layer.n_experts, layer.hidden, ep_size, layer.shared
    )
    return layer.hand_over(sparse)


def to_native(layer: DeepSpeedMoE) -> NativeMoE:
    """All experts of a layer on every rank. Collective when they are spread."""
    experts = list(layer.deepspeed_moe.experts.deepspeed_experts)
    if layer.ep_size > 1:
        experts = collect_experts(layer, experts)
    for expert in experts:
        for parameter in expert.parameters():
            for mark in ("allreduce", "group_name"):
                if hasattr(parameter, mark):
                    delattr(parameter, mark)
    return layer.hand_over(NativeMoE(experts, layer.spec, layer.hidden, layer.shared))


def collect_experts(layer: DeepSpeedMoE, own: list[nn.Module]) -> list[nn.Module]:
    """Every rank's experts in global order, by broadcasts within the expert group."""
    group = layer.deepspeed_moe.ep_group
    experts = []
    for index in range(layer.n_experts):
        owner, local = divmod(index, len(own))
        expert = copy.deepcopy(own[local])
        for parameter in expert.parameters():
            dist.broadcast(parameter.data, dist.get_global_rank(group, owner), group=group)
        experts.append(expert)
    return experts
