# SPDX-License-Identifier: Apache-2.0
"""Which of DeepSpeed's settings a run's numbers depend on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_LOGGED = "what is logged and measured"
_TRAVELS = "in which pieces gradients and weights travel, and when; the sums are the same"
_LIES = "how long weights stay gathered, and through which memory they and the states come"
_SAVED = "how checkpoints are written; optimizer states are read by parameter"
_SPLIT = "how a step is split: its samples count"
_CHECKED = "what is refused"

WITHOUT_EFFECT: dict[str, str] = {
    **dict.fromkeys(
        (
            *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "tensorboard", "wandb"),
            *("comet", "csv_monitor", "flops_profiler", "comms_logger", "zero_optimization.log_trace_cache_warnings"),
        ),
        _LOGGED,
    ),
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), _SPLIT),
    **dict.fromkeys(
        (
            "zero_allow_untested_optimizer",
            *(f"zero_optimization.{name}" for name in ("ignore_unused_parameters", "enable_sanity_checks")),
        ),
        _CHECKED,
    ),
    **dict.fromkeys(("checkpoint.tag_validation", "checkpoint.use_node_local_storage", "checkpoint.writer"), _SAVED),
    **{
        f"zero_optimization.{name}": _SAVED
        for name in (
            *("stage3_gather_16bit_weights_on_model_save", "gather_16bit_weights_on_model_save"),
            *("stage3_gather_fp16_weights_on_model_save", "pipeline_loading_checkpoint"),
        )
    },
    **{
        f"zero_optimization.{name}": _TRAVELS
        for name in (
            *("reduce_bucket_size", "overlap_comm", "contiguous_gradients", "allgather_partitions"),
            *("allgather_bucket_size", "use_multi_rank_bucket_allreduce"),
            *("stage3_use_all_reduce_for_fetch_params", "use_all_reduce_for_fetch_params", "zero_hpz_partition_size"),
            *("stage3_allgather_sequential", "allgather_sequential"),
        )
    },
    **{
        f"zero_optimization.{name}": _LIES
        for name in (
            *("stage3_prefetch_bucket_size", "prefetch_bucket_size"),
            *("stage3_param_persistence_threshold", "param_persistence_threshold"),
            *("stage3_model_persistence_threshold", "model_persistence_threshold"),
            *("stage3_max_live_parameters", "max_live_parameters", "stage3_max_reuse_distance", "max_reuse_distance"),
            *("stage3_module_granularity_threshold", "module_granularity_threshold"),
            *(f"offload_param.{name}" for name in ("pin_memory", "buffer_count", "buffer_size", "max_in_cpu")),
            *(
                f"offload_optimizer.{name}"
                for name in (
                    *("pin_memory", "buffer_count", "pipeline_read", "pipeline_write", "fast_init"),
                    "cpuadam_cores_perc",
                )
            ),
        )
    },
    "aio": _LIES,
}
"""Keys that may differ between a run and its continuation, or all below them -> why. Every other one counts, those that
are not known, too. So do `offload_optimizer.device`, since another optimizer steps on the host, and `sub_group_size`
and `round_robin_gradients`, by which DeepSpeed's own states are cut: with others it cannot read them."""


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of DeepSpeed's settings, what a run's numbers depend on: dotted key -> value."""
    return {
        name: value
        for name, value in _leaves(settings)
        if not any(name == key or name.startswith(f"{key}.") for key in WITHOUT_EFFECT)
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, value before, value now) of what counts and differs; None: it is not set."""
    old, new = decisive(before), decisive(now)
    return [(key, old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)]


def _leaves(settings: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{inside}{key}.")
        else:
            yield f"{inside}{key}", value
