# SPDX-License-Identifier: Apache-2.0
"""What ZeRO needs beside a JSON file: what the device decides, and, for ZeRO-3, parameters that are whole while a model
is put together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from moellava.errors import UserError
from moellava.train.memory import zero_stage


def settle_overlap(config: Any, has_streams: bool) -> None:
    """Fills in `"overlap_comm": "auto"`: gradients are summed beside the backward if the device has streams.

    A CPU has none. There DeepSpeed sums them in between all the same, and keeps a second buffer for nothing.

    Args:
        config: transformers' HfTrainerDeepSpeedConfig; a plain true or false in it stays.
    """
    config.fill_only("zero_optimization.overlap_comm", has_streams)


@contextmanager
def whole_parameters(args: Any) -> Iterator[None]:
    """Builds parameters whole. Under ZeRO-3 transformers would split each as it is made, and composing reads them.

    The engine splits them when it takes the model over; until then each process holds all of it in host memory.

    Args:
        args: the run's TrainingArguments.
    """
    config = getattr(args, "hf_deepspeed_config", None)
    if config is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def refuse_zero3_experts(deepspeed: str | dict[str, Any] | None, moe_enable: bool) -> None:
    """Raises UserError for experts under ZeRO-3, which DeepSpeed's engine does not take."""
    if moe_enable and zero_stage(deepspeed) == 3:
        raise UserError(
            f"--deepspeed {deepspeed} asks for ZeRO-3, which DeepSpeed refuses for --moe_enable True: use ZeRO-2 "
            "(--deepspeed zero2), with --ep_size to split the experts, or with the optimizer offloaded "
            "(--deepspeed zero2_offload)."
        )
