# SPDX-License-Identifier: Apache-2.0
"""Config of the stand-in for Qwen-VL-Chat."""

from transformers import PretrainedConfig


class QWenConfig(PretrainedConfig):
    model_type = "qwen"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=151936,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        visual=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.visual = visual or {"image_size": 28, "patch_size": 14, "width": 16, "image_start_id": 151857}
        super().__init__(**kwargs)
