# SPDX-License-Identifier: Apache-2.0
"""Released vision-language models: one file an architecture, and what those files share."""

from moellava.lmm import architectures  # noqa: F401  (registers them)
