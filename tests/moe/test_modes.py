# SPDX-License-Identifier: Apache-2.0
"""What a model drops at random while it learns: numbers by themselves, or rows as a whole."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.beit.modeling_beit import BeitDropPath
from transformers.models.convnext.modeling_convnext import ConvNextDropPath

from moellava.moe.modes import drops_rows, evaluating, has_dropout


class WithConfig(nn.Linear):
    def __init__(self, **settings):
        super().__init__(2, 2)
        self.config = SimpleNamespace(**settings)


@pytest.mark.parametrize(
    ("module", "drops", "by_row"),
    [
        (nn.Linear(2, 2), False, False),
        (nn.Dropout(0.0), False, False),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), True, False),
        (nn.Sequential(BeitDropPath(0.1)), False, True),
        (ConvNextDropPath(0.0), False, False),
        (WithConfig(attention_dropout=0.1), False, False),
        (WithConfig(drop_path_rate=0.0), False, False),
        (WithConfig(drop_path_rate=0.1), False, True),
    ],
    ids=str,
)
def test_what_is_dropped(module, drops, by_row):
    assert (has_dropout(module), drops_rows(module)) == (drops, by_row)


def test_every_part_is_back_in_its_mode():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5).eval())
    with evaluating(model):
        assert not model[0].training and torch.equal(model(torch.ones(1, 2)), model(torch.ones(1, 2)))
    assert model.training and model[0].training and not model[1].training
