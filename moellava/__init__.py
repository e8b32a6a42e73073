"""moellava: build LLaVA-style vision-language models in stages, and upcycle dense ones into Mixtures of Experts."""

__version__ = "0.1.0"

import logging

# It says at each start that an optional kernel is absent, also to those who quantise nothing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
