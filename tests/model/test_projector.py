# SPDX-License-Identifier: Apache-2.0
"""Projectors: names, exactness of the padded ones, and the reference's layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from moellava.errors import UnknownNameError, UserError
from moellava.model.projectors import Sizes, parse_projector
from moellava.model.projectors.layers import (
    DeepProjector,
    FixedIdentity,
    from_published,
    initial_weights,
    pin_identities,
    to_published,
)


def reference(name: str, width: int, out: int) -> nn.Module:
    """The projector as LLaVA builds it."""
    spec = parse_projector(name)
    if spec.layers == 0:
        return nn.Identity()
    if name == "linear":
        return nn.Linear(width, out)
    layers: list[nn.Module] = [nn.Linear(width, out)]
    for _ in range(1, spec.layers):
        layers += [nn.GELU(), nn.Linear(out, out)]
    return nn.Sequential(*layers)


def ours(name: str, width: int, out: int) -> nn.Module:
    """The projector of a composed model, as Hugging Face's class or ours builds it."""
    spec = parse_projector(name)
    if spec.is_extended:
        return DeepProjector(width, out, spec.layers)
    vision = CLIPVisionConfig(hidden_size=width, num_attention_heads=2)
    text = LlamaConfig(hidden_size=out, num_attention_heads=2)
    return LlavaMultiModalProjector(
        LlavaConfig(vision_config=vision, text_config=text, projector_hidden_act=spec.activation)
    )


@pytest.mark.parametrize("name", ["linear", "identity", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "mlp4x_gelu"])
def test_each_computes_what_the_reference_does(name):
    width, out = (8, 8) if name == "identity" else (6, 8)
    torch.manual_seed(0)
    wanted, spec = reference(name, width, out), parse_projector(name)
    projector = ours(name, width, out)
    state = initial_weights(spec, Sizes(width, out, 5))
    state |= {from_published(key): tensor for key, tensor in wanted.state_dict().items()}
    projector.load_state_dict(state)
    features = torch.randn(2, 5, width)
    torch.testing.assert_close(projector(features), wanted(features))
    pin_identities(projector, spec)
    torch.testing.assert_close(projector(features), wanted(features))
    assert sum(p.numel() for p in projector.parameters()) == sum(p.numel() for p in wanted.parameters())
    names = {to_published(key, spec) for key, _ in projector.named_parameters()}
    assert names == set(wanted.state_dict())


def test_fixed_layers_are_stored_and_have_no_gradient():
    layer = FixedIdentity(4)
    assert set(layer.state_dict()) == {"weight", "bias"} and not list(layer.parameters())


def test_a_layer_that_should_be_the_identity_but_is_not_is_refused():
    spec = parse_projector("linear")
    projector = ours("linear", 6, 8)
    with pytest.raises(UserError, match="linear_2 is not the identity"):
        pin_identities(projector, spec)


@pytest.mark.parametrize("name", ["mlp_gelu", "mlp0x_gelu", "resampler", ""])
def test_unknown_names_list_the_known(name):
    with pytest.raises(UnknownNameError, match="Known: linear, identity, mlpNx_gelu"):
        parse_projector(name)


def test_identity_cannot_change_the_width():
    with pytest.raises(UserError, match="tower gives 6 and the language model takes 8"):
        parse_projector("identity").tokens(Sizes(6, 8, 4))
