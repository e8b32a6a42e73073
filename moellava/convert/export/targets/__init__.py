# SPDX-License-Identifier: Apache-2.0
"""Native targets, one file per family of them. They are tried in the order in which they are registered here."""

from moellava.convert.export.targets import qwen2_moe, qwen3_moe, granite_moe, ernie_moe, mixtral  # noqa: F401, I001
from moellava.convert.export.targets.target import TARGETS, Target  # noqa: F401
