# SPDX-License-Identifier: Apache-2.0
"""`COLLATORS`, as docs/ADD_A_MODEL.md calls them. Most architectures are served by `moellava.data.collate` as it is."""

from moellava.data.collate import MediaCollator
from moellava.lmm.architecture import FieldView

__all__ = ["COLLATORS", "MediaCollator"]

COLLATORS = FieldView("collator", default=MediaCollator)
"""Architecture -> its collator, a subclass of `MediaCollator` where that does not do."""
