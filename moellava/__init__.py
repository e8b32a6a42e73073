# SPDX-License-Identifier: Apache-2.0
"""moellava: build LLaVA-style vision-language models in stages, and upcycle dense ones into Mixtures of Experts.

from moellava import train, open_vlm, answer, upcycle        # docs/PYTHON.md
"""

import importlib
import logging
from typing import TYPE_CHECKING

from moellava.startup import lazily, once_imported

if TYPE_CHECKING:
    from moellava.moe import MoESpec, upcycle
    from moellava.serve.answer import Request, answer
    from moellava.train.python import train
    from moellava.vlm import VLM, open_vlm

__version__ = "0.2.0"

__all__ = ["VLM", "MoESpec", "Request", "__version__", "answer", "open_vlm", "train", "upcycle"]

# It says at each start that an optional kernel is absent, also to those who quantise nothing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

lazily(__name__)


def _register() -> None:
    importlib.import_module("moellava.auto_classes").register_auto_classes()


_TABLES = "transformers.models.auto"
# Auto classes and pipelines open sparse folders, whichever is imported first. Importing transformers takes seconds, and
# waits for whoever wants it.
once_imported(f"{_TABLES}.modeling_auto", _register)
once_imported(f"{_TABLES}.configuration_auto", lambda: importlib.import_module(f"{_TABLES}.modeling_auto"))
