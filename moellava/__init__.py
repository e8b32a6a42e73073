"""moellava: build LLaVA-style vision-language models in stages, and upcycle dense ones into Mixtures of Experts."""

__version__ = "0.1.0"

import importlib
import logging
import sys

# It says at each start that an optional kernel is absent, also to those who quantise nothing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def register_auto_classes() -> None:
    """Lets transformers' Auto classes and pipelines open sparse folders. See `moellava/auto_classes.py`."""
    importlib.import_module("moellava.auto_classes").register_auto_classes()


if "transformers" in sys.modules:  # else it waits for whoever calls it: importing transformers takes seconds
    register_auto_classes()
