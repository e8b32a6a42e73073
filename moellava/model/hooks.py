# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's hooks, so that a model can be pickled and copied after a forward.

transformers notes hidden states through functions that it hangs on layers at the first forward that asks for them, as
each image does. Such a function lives inside another one and cannot be pickled; here an object takes its place.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import output_capturing


class Capture:
    """One of these hooks, told by what it was made of.

    Args:
        options: arguments of transformers' `install_output_capuring_hook` behind the module.
    """

    def __init__(self, **options: Any):
        self.options = options
        module = nn.Module()
        output_capturing.install_output_capuring_hook(module, **options)
        (self.hook,) = module._forward_hooks.values()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.hook(module, args, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return _capture, (self.options,)


def _capture(options: dict[str, Any]) -> Capture:
    return Capture(**options)


def hang_hooks(model: PreTrainedModel) -> None:
    """Hangs transformers' hooks on a model, which would come with a forward, as objects that can be pickled."""
    output_capturing.maybe_install_capturing_hooks(model)
    for module in model.modules():
        for number, hook in module._forward_hooks.items():
            if getattr(hook, "__module__", None) == output_capturing.__name__:
                known = inspect.getclosurevars(hook).nonlocals
                names = ("key", "index", "capture_initial_hidden_state")
                module._forward_hooks[number] = Capture(**{name: known[name] for name in names})
