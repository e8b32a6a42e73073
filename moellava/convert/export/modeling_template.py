"""A sparse vision-language model for plain transformers: the class that it was made from, with experts for MLPs.

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

DISGUISE = "remote_"  # before the language model's type: without this file the folder must not open half


class TheConfig(transformers.LlavaConfig):
    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        content = copy.deepcopy(config_dict)
        content["text_config"]["model_type"] = content["text_config"]["model_type"].removeprefix(DISGUISE)
        return super().from_dict(content, **kwargs)

    def to_json_string(self, use_diff=True):
        content = json.loads(super().to_json_string(use_diff=use_diff))
        content["text_config"]["model_type"] = DISGUISE + content["text_config"]["model_type"]
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


class Router(nn.Module):
    """Tokens [N, D] -> the experts of each [N, k] and their weights [N, k], in fp32."""

    def __init__(self, hidden, experts):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        if HAS_BIAS:
            self.register_buffer("bias", torch.zeros(experts))

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
        if TOP_K > 1:
            weights = weights / weights.sum(1, keepdim=True)
        elif TOP1_GATE == "exact":
            weights = torch.ones_like(weights)
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


def sliced(mlp):
    """An MLP of a share of the units of another one."""
    part = copy.deepcopy(mlp)
    for name in (*INPUTS, OUTPUT) if SLICES > 1 else ():
        linear = getattr(mlp, name)
        sizes = [linear.in_features, linear.out_features]
        sizes[name != OUTPUT] //= SLICES
        setattr(part, name, nn.Linear(*sizes, bias=linear.bias is not None))
    return part


class SparseMLP(nn.Module):
    def __init__(self, mlp, experts, hidden):
        super().__init__()
        self.router = Router(hidden, experts)
        self.experts = Experts([sliced(mlp) for _ in range(experts)])
        if HAS_SHARED:
            self.shared = mlp
        if HAS_MIX:
            self.coefficient = nn.Linear(hidden, 2)

    def forward(self, hidden_states):
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        output = self.experts(flat, *self.router(flat))
        mix = self.coefficient(flat).softmax(-1) if HAS_MIX else torch.ones_like(flat[:, :2])
        if HAS_SHARED:
            output = output * mix[:, :1] + self.shared(flat) * mix[:, 1:]
        return output.view(hidden_states.shape)


def add_experts(body):
    """Replaces the MLPs of `LAYERS`."""
    hidden = body.config.get_text_config().hidden_size
    for path, experts in LAYERS.items():
        owner, _, name = path.rpartition(".")
        layer = body.get_submodule(owner)
        setattr(layer, name, SparseMLP(getattr(layer, name), experts, hidden))


class TheBody(transformers.LlavaModel):
    config_class = TheConfig
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        add_experts(self)


class TheModel(transformers.LlavaForConditionalGeneration):
    config_class = TheConfig
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        add_experts(self.model)
        if HEAD_BIAS:
            self.lm_head = nn.Linear(self.lm_head.in_features, self.lm_head.out_features)
        if SOFTCAP:
            self.lm_head.register_forward_hook(lambda head, given, logits: SOFTCAP * torch.tanh(logits / SOFTCAP))
