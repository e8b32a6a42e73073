# SPDX-License-Identifier: Apache-2.0
"""Weights that stay as they are stored become, cast, what Hugging Face's own loading gives."""

from __future__ import annotations

import shutil

import pytest
import torch

from moellava.model.compose import Composition
from moellava.model.stored import as_stored, meant
from moellava.train.masters import cast, dtypes_of
from moellava.vlm import compose
from tests import tiny
from tests.model.tiny_language_models import tiny_language_model


@pytest.mark.parametrize(("stored", "run"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "gemma2", "granite"])
def test_a_composed_model_is_the_same_when_it_is_cast_later(tmp_path, tokenizer_folder, model_type, stored, run):
    """Constants are folded into the weights of two of them; what is folded, and new rows, may be rounded later."""
    llm, tower = tmp_path / "llm", tiny.write_clip(tmp_path / "tower")
    tiny_language_model(model_type).to(stored).save_pretrained(llm)
    shutil.copytree(tokenizer_folder, llm, dirs_exist_ok=True)
    torch.manual_seed(0)
    wanted = compose(llm, str(tower), Composition("qwen"), run).model
    torch.manual_seed(0)
    with as_stored():
        model = compose(llm, str(tower), Composition("qwen"), run).model
    differ = {name for name, parameter in model.named_parameters() if parameter.dtype != meant(parameter)}
    assert bool(differ) == (run == torch.bfloat16), "fp32 stays as it is until it is cast; what is tried out is wide"
    cast(model, dtypes_of(model, None))
    for name, value in wanted.state_dict().items():
        found = model.state_dict()[name]
        assert found.dtype == value.dtype, name
        torch.testing.assert_close(found, value, rtol=0 if run == torch.float32 else 2**-7, atol=0, msg=name)
