# SPDX-License-Identifier: Apache-2.0
"""Stand-in for Qwen-VL-Chat's model: it reads paths out of the ids, and opens the files itself."""

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_qwen import QWenConfig

QUERIES = 256


class VisionTransformer(nn.Module):
    def __init__(self, image_size, patch_size, width, output_dim):
        super().__init__()
        self.image_size = image_size
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.randn((image_size // patch_size) ** 2, width) * 0.02)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList([nn.Linear(width, width)])})
        self.ln_post = nn.LayerNorm(output_dim)
        self.attn_pool = nn.Linear(width, output_dim)
        self.proj = nn.Parameter(torch.eye(output_dim))

    def encode(self, paths):
        pixels = []
        for path in paths:
            with Image.open(path) as image:
                array = np.asarray(image.convert("RGB").resize((self.image_size, self.image_size)), dtype=np.float32)
            pixels.append(torch.from_numpy(array.copy()).permute(2, 0, 1) / 255)
        return self(torch.stack(pixels))

    def forward(self, pixels):
        x = self.conv1(pixels.to(self.conv1.weight)).flatten(2).transpose(1, 2)
        x = self.ln_pre(x + self.positional_embedding[: x.shape[1]])
        for block in self.transformer["resblocks"]:
            x = x + block(x).tanh()
        pooled = self.ln_post(self.attn_pool(x)).repeat(1, QUERIES // x.shape[1], 1)
        return pooled @ self.proj


class QWenAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, mask):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        return self.c_proj(nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class QWenMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        half = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, half, bias=False)
        self.w2 = nn.Linear(config.hidden_size, half, bias=False)
        self.c_proj = nn.Linear(half, config.hidden_size, bias=False)

    def forward(self, x):
        return self.c_proj(self.w1(x) * nn.functional.silu(self.w2(x)))


class QWenBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.RMSNorm(config.hidden_size)
        self.attn = QWenAttention(config)
        self.ln_2 = nn.RMSNorm(config.hidden_size)
        self.mlp = QWenMLP(config)

    def forward(self, x, mask):
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class QWenPreTrainedModel(PreTrainedModel):
    config_class = QWenConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["QWenBlock"]
    _supports_sdpa = True


class QWenModel(QWenPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(QWenBlock(config) for _ in range(config.num_hidden_layers))
        self.ln_f = nn.RMSNorm(config.hidden_size)
        visual = {name: value for name, value in config.visual.items() if name != "image_start_id"}
        self.visual = VisionTransformer(**visual, output_dim=config.hidden_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        start = self.config.visual["image_start_id"]
        x = self.wte(input_ids)
        begins, ends = (input_ids == start).nonzero().tolist(), (input_ids == start + 1).nonzero().tolist()
        if begins:
            paths = []
            for (row, begin), (_, end) in zip(begins, ends, strict=True):
                ids = input_ids[row, begin + 1 : end - 1].tolist()
                paths.append(bytes(ids[: ids.index(start + 2)]).decode())
            x = x.clone()
            for (row, begin), (_, end), image in zip(begins, ends, self.visual.encode(paths), strict=True):
                x[row, begin + 1 : end] = image
        elif self.training:
            x = x + self.visual(torch.zeros(1, 3, self.visual.image_size, self.visual.image_size)).mean() * 0
        length = input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None]
        for block in self.h:
            x = block(x, mask)
        return self.ln_f(x)


class QWenLMHeadModel(QWenPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def get_input_embeddings(self):
        return self.transformer.wte

    def forward(self, input_ids=None, attention_mask=None, labels=None, use_cache=None, **kwargs):
        hidden = self.transformer(input_ids, attention_mask)
        if labels is None:
            return CausalLMOutputWithPast(logits=self.lm_head(hidden))
        # 151,936 logits for each of several hundred tokens of paths would be gigabytes: those that are trained will do.
        trained = labels[:, 1:] != -100
        logits = self.lm_head(hidden[:, :-1][trained])
        return CausalLMOutputWithPast(loss=nn.functional.cross_entropy(logits, labels[:, 1:][trained]), logits=logits)
