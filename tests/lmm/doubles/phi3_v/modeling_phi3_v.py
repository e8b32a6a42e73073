# SPDX-License-Identifier: Apache-2.0
"""Stand-in for Phi-3-Vision's model: image features take the places of the negative ids, in order."""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_phi3_v import Phi3VConfig

CROP = 28


class Phi3ImageEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.img_processor = nn.ModuleDict({"conv": nn.Conv2d(3, width, CROP, CROP)})
        self.img_projection = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, width))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, embedded, input_ids, pixel_values, image_sizes):
        places = (input_ids < 0).nonzero()
        if not len(places):
            return embedded
        features = []
        for crops, size in zip(pixel_values, image_sizes.tolist(), strict=True):
            parts = size[0] // CROP * (size[1] // CROP)
            image = self.img_processor["conv"](crops[: parts + 1]).flatten(1)
            image = torch.cat([image[:1] + self.glb_GN[0], image[1:] + self.sub_GN[0, 0]])
            features.append(self.img_projection(image))
        embedded = embedded.clone()
        embedded[places[:, 0], places[:, 1]] = torch.cat(features).to(embedded.dtype)
        return embedded


class Phi3Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.input_layernorm = nn.RMSNorm(width)
        self.self_attn = nn.ModuleDict(
            {"qkv_proj": nn.Linear(width, 3 * width, bias=False), "o_proj": nn.Linear(width, width, bias=False)}
        )
        self.post_attention_layernorm = nn.RMSNorm(width)
        self.mlp = nn.ModuleDict(
            {
                "gate_up_proj": nn.Linear(width, 2 * config.intermediate_size, bias=False),
                "down_proj": nn.Linear(config.intermediate_size, width, bias=False),
            }
        )

    def forward(self, x, mask):
        parts = self.self_attn["qkv_proj"](self.input_layernorm(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = x + self.self_attn["o_proj"](attended)
        gate, up = self.mlp["gate_up_proj"](self.post_attention_layernorm(x)).chunk(2, dim=-1)
        return x + self.mlp["down_proj"](nn.functional.silu(gate) * up)


class Phi3VPreTrainedModel(PreTrainedModel):
    config_class = Phi3VConfig
    base_model_prefix = "model"
    _no_split_modules = ["Phi3Layer"]
    _supports_sdpa = True


class Phi3VModel(Phi3VPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.vision_embed_tokens = Phi3ImageEmbedding(config)
        self.layers = nn.ModuleList(Phi3Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, pixel_values=None, image_sizes=None):
        x = self.embed_tokens(input_ids.clamp(min=0))
        if pixel_values is not None:
            x = self.vision_embed_tokens(x, input_ids, pixel_values, image_sizes)
        length = input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None]
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


class Phi3VForCausalLM(Phi3VPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = Phi3VModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        pixel_values=None,
        image_sizes=None,
        labels=None,
        use_cache=None,
        **kwargs,
    ):
        logits = self.lm_head(self.model(input_ids, attention_mask, pixel_values, image_sizes))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)
