# SPDX-License-Identifier: Apache-2.0
"""Mixtures of Experts: upcycling, routing, losses. Knows no model family; imports deepspeed when asked."""

from typing import TYPE_CHECKING

from moellava.startup import lazily

if TYPE_CHECKING:
    from moellava.moe.context import checkpoint_contexts
    from moellava.moe.losses import RouterLosses
    from moellava.moe.spec import MoESpec
    from moellava.moe.state import gather_moe_state_dict, native_names, spread_shapes
    from moellava.moe.upcycle import (
        change_spec,
        convert_engine,
        counted_routing,
        disable_gradient_checkpointing,
        enable_gradient_checkpointing,
        expert_parameters,
        moe_layers,
        routed_expert_parameters,
        router_losses,
        router_metrics,
        router_parameters,
        separate_experts,
        set_routing_context,
        upcycle,
        update_router_bias,
        use_kernel,
    )

__all__ = [
    "change_spec",
    "MoESpec",
    "RouterLosses",
    "checkpoint_contexts",
    "convert_engine",
    "counted_routing",
    "disable_gradient_checkpointing",
    "enable_gradient_checkpointing",
    "expert_parameters",
    "gather_moe_state_dict",
    "moe_layers",
    "native_names",
    "routed_expert_parameters",
    "router_losses",
    "router_metrics",
    "router_parameters",
    "separate_experts",
    "set_routing_context",
    "spread_shapes",
    "update_router_bias",
    "upcycle",
    "use_kernel",
]

lazily(__name__)
