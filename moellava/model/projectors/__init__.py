# SPDX-License-Identifier: Apache-2.0
"""Projectors from the tower's features to the language model's embeddings, one entry of `PROJECTORS` each.

layers.py        linear, identity, mlpNx_gelu          as Hugging Face's LLaVA lays them out
grid.py          pool_mlpNx_gelu, pixel_shuffle        2 × 2 patches become one token
queries.py       qformerN_Q, resamplerN_Q              Q learnt queries read the patches
convolution.py   cabstractorN_Q, cblockN               convolutions over the grid of patches, then fewer tokens
"""

from moellava.model.projectors import layers, grid, queries, convolution  # noqa: F401, I001  (in the order that messages list them)
from moellava.model.projectors.entry import PROJECTORS, Projector, ProjectorSpec, Sizes, parse_projector

__all__ = ["PROJECTORS", "Projector", "ProjectorSpec", "Sizes", "parse_projector"]
