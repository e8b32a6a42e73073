# SPDX-License-Identifier: Apache-2.0
"""A sparse vision-language model: the class of transformers that it was made from, with experts in place of MLPs.

Written by `moellava export`; it needs nothing but torch and transformers. The constants are this model's.
"""

import copy
import json

import torch
import transformers
from torch import nn

# constants
LAYERS = {"language_model.layers.0.mlp": 4}  # MLP -> its number of experts
TOP_K, TOP1_GATE = 2, "exact"
INPUTS, OUTPUT, SLICES = ("gate_proj", "up_proj"), "down_proj", 1
HAS_SHARED, HAS_MIX, HAS_BIAS = False, False, False
HEAD_BIAS, SOFTCAP = False, None
# end of constants


class TheConfig(transformers.LlavaConfig):
    disguise = "remote_"  # before the language model's type: without this file, the folder must not open half

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        content = copy.deepcopy(config_dict)
        content["text_config"]["model_type"] = content["text_config"]["model_type"].removeprefix(cls.disguise)
        return super().from_dict(content, **kwargs)

    def to_json_string(self, use_diff=True):
        content = json.loads(super().to_json_string(use_diff=use_diff))
        content["text_config"]["model_type"] = self.disguise + content["text_config"]["model_type"]
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


class Router(nn.Module):
    """Tokens [N, D] -> the experts of each [N, k] and their weights [N, k], in fp32."""

    def __init__(self, hidden, experts):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.register_buffer("bias", torch.zeros(experts) if HAS_BIAS else None)

    def forward(self, hidden_states):
        with torch.autocast(hidden_states.device.type, enabled=False):
            scores = nn.functional.linear(hidden_states.float(), self.weight.float())
        chances = scores.softmax(-1)
        scores = chances + self.bias.float() if HAS_BIAS else scores
        if SLICES > 1:  # slices of one MLP whose scores differ by rounding alone are chosen together
            sets = scores.unflatten(1, (-1, SLICES))
            is_tied = ((sets - sets[..., :1]).abs() <= 1e-5).all(-1, keepdim=True)
            scores = torch.where(is_tied, sets[..., :1], sets).flatten(1)
        chosen = scores.sort(dim=1, descending=True, stable=True).indices[:, :TOP_K]
        weights = chances.gather(1, chosen)
        if TOP_K > 1 or TOP1_GATE == "exact":
            weights = weights / weights.sum(1, keepdim=True)
        return chosen, weights


class Experts(nn.ModuleList):
    """Each token's chosen experts, added up by their weights."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            token, choice = torch.where(top_k_index == index)
            weighted = expert(hidden_states[token]) * top_k_weights[token, choice, None]
            output.index_add_(0, token, weighted.to(output.dtype))
        return output


class SparseMLP(nn.Module):
    def __init__(self, mlp, experts, hidden):
        super().__init__()
        part = copy.deepcopy(mlp)
        for name in (*INPUTS, OUTPUT) if SLICES > 1 else ():  # an expert has a share of the MLP's units
            linear = getattr(mlp, name)
            sizes = [linear.in_features, linear.out_features]
            sizes[name != OUTPUT] //= SLICES
            setattr(part, name, nn.Linear(*sizes, bias=linear.bias is not None))
        self.router, self.experts = Router(hidden, experts), Experts(copy.deepcopy(part) for _ in range(experts))
        self.shared = mlp if HAS_SHARED else nn.Identity()
        self.coefficient = nn.Linear(hidden, 2) if HAS_MIX else nn.Identity()

    def forward(self, hidden_states):
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        output = self.experts(flat, *self.router(flat))
        mix = self.coefficient(flat).softmax(-1) if HAS_MIX else flat.new_ones(len(flat), 2)
        if HAS_SHARED:
            output = output * mix[:, :1] + self.shared(flat) * mix[:, 1:]
        return output.view(hidden_states.shape)


def add_experts(body):
    for path, experts in LAYERS.items():
        owner, _, name = path.rpartition(".")
        layer, hidden = body.get_submodule(owner), body.config.get_text_config().hidden_size
        setattr(layer, name, SparseMLP(getattr(layer, name), experts, hidden))


class TheBody(transformers.LlavaModel):
    config_class, _keep_in_fp32_modules_strict = TheConfig, ("router",)

    def __init__(self, config):
        super().__init__(config)
        add_experts(self)


class TheModel(transformers.LlavaForConditionalGeneration):
    config_class, _keep_in_fp32_modules_strict = TheConfig, ("router",)

    def __init__(self, config):
        super().__init__(config)
        add_experts(self.model)
        if HEAD_BIAS:
            self.lm_head = nn.Linear(self.lm_head.in_features, self.lm_head.out_features)
        if SOFTCAP:
            self.lm_head.register_forward_hook(lambda head, given, logits: SOFTCAP * torch.tanh(logits / SOFTCAP))
