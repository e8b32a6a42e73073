# SPDX-License-Identifier: Apache-2.0
"""Composed vision-language models: language model families, vision towers, projectors, and folders of weights."""

from moellava.model import language_model  # noqa: F401  (registers the families)
