# SPDX-License-Identifier: Apache-2.0
"""`TO_LOAD_IMAGE`, as docs/ADD_A_MODEL.md calls it. Samples are made by `moellava.data.dataset` for every model."""

from moellava.lmm.architecture import FieldView

TO_LOAD_IMAGE = FieldView("loads_images")
"""Architecture -> whether its collator gets images; False: their paths, which its tokenizer reads out of the prompt."""
