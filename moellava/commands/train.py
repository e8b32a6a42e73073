# SPDX-License-Identifier: Apache-2.0
"""`moellava train`: one stage of training in one process; see docs/TRAIN.md for several."""

from moellava.train.entry import main

__all__ = ["main"]
