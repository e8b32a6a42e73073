# SPDX-License-Identifier: Apache-2.0
"""Every causal language model of transformers as a tiny one: the few config fields that make it so, as data."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

VOCABULARY = 288
"""Rows of the embedding: those of the tests' tokenizer, and a few that are free."""

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "hidden_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 512),
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    "num_experts_per_tok": 2,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Sizes by the names that configs have for them; a config takes those that it has."""

ALL_HEADS = {"num_key_value_heads": 4}
SCALES = {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
"""Default configs hide the scales of Granite's kin: they are 1 there."""
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16, "mamba_n_groups": 1}
HYBRID = ["mamba", "hybrid", "mamba", "hybrid"]
ROPE = {"rope_type": "default", "rope_theta": 1e4}

OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text"), ALL_HEADS),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "minicpm3", "sarvam_mla", "youtu"), ALL_HEADS),
    **dict.fromkeys(("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared"), SCALES),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), {"num_hidden_layers": 4, **LINEAR}),
    **dict.fromkeys(("codegen", "gptj"), {"rotary_dim": 4}),
    "bailing_hybrid": {"num_hidden_layers": 4, "layer_group_size": 2, "first_k_dense_replace": 1, **ALL_HEADS}
    | {"num_experts_per_token": 2, "num_expert_group": 1, "topk_group": 1, "num_experts": 4},
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}}
    | {"ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 32, "mamba_d_head": 8, "embedding_multiplier": 2.0, "lm_head_multiplier": 0.5}
    | {"key_multiplier": 0.7, "attention_out_multiplier": 0.8, "ssm_out_multiplier": 0.9},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 8}
    | {"hidden_size_per_layer_input": 8, "layer_types": ["full_attention"] * 2},
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], **MAMBA, **SCALES},
    "hyperclovax": SCALES,
    **dict.fromkeys(("inkling2_text", "inkling2_loop_text"), {"unpadded_vocab_size": VOCABULARY - 8}),
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"linear_attn_config": {"kda_layers": [1], "full_attn_layers": [2], "head_dim": 8, "num_heads": 4}}
    | {"num_experts_per_token": 2, "num_experts": 4, **ALL_HEADS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"num_hidden_layers": 4},
    "longcat_flash": {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 24, "zero_expert_num": 2, "moe_topk": 2}
    | ALL_HEADS,
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 16, "chunk_size": 16},
    "qwen4_exp_text": {"num_hidden_layers": 4, **LINEAR, "hc_lowrank": 8, "ngram_vocab_size_base": 64}
    | {"split_ngram_parts": 2, "make_ngram_vocab_size_divisible_by": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1}
    | {"indexer_head_dim": 8, "indexer_budget": 16, "indexer_compress_ratio": 4},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 2}
    | {"attention_head_size": 8, "feed_forward_size": 48},
    "roc_bert": {"pronunciation_embed_dim": 8, "pronunciation_vocab_size": 16, "shape_embed_dim": 8}
    | {"shape_vocab_size": 16},
    "xlm": {"emb_dim": 32},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0, "hidden_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": HYBRID, "attention_head_dim": 16, "n_mamba_heads": 2}
    | {"attention_hidden_size": 64, **ALL_HEADS},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": HYBRID, "n_mamba_heads": 8, "mamba_d_state": 16}
    | {"chunk_size": 16, "adapter_rank": 4, **ALL_HEADS},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""Fields of a config beside `COMMON`, by `model_type`."""

UNBUILT = {
    "blt": "reads bytes, in patches that a model of its own cuts",
    "gemma4_assistant": "drafts tokens for another model",
    "gemma4_unified_assistant": "drafts tokens for another model",
    "musicgen": "writes sound",
    "musicgen_melody": "writes sound",
    "phi4_multimodal": "brings a tower and a microphone along, of full size",
    "git": "brings a tower along",
}
"""Causal language models by the mapping that are none to compose with a tower."""


def is_whole(model_type: str) -> bool:
    """Whether a config holds a model for images or sound, whose language model is another entry."""
    return bool({"text_config", "vision_config", "audio_config"} & set(hf.CONFIG_MAPPING[model_type].sub_configs))


def language_models() -> list[str]:
    """The `model_type` of every causal language model of the installed transformers."""
    return [name for name in CLASSES if name not in UNBUILT and not is_whole(name)]


CHATML = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""A chat template that ends turns with the tests' only special token."""


def tiny_language_model(model_type: str, **fields: Any) -> torch.nn.Module:
    """A random one, every parameter moved, so that norms and biases are not all ones and zeros; `fields` are of the
    config, beside those above."""
    torch.manual_seed(1)
    config_class = hf.CONFIG_MAPPING[model_type]
    known = config_class().to_dict()
    sizes = {name: value for name, value in COMMON.items() if name in known}
    model = getattr(hf, CLASSES[model_type])(config_class(**sizes | OVERRIDES.get(model_type, {}) | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


VERDICTS = {
    "untied": "bloom falcon falcon_mamba gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox_japanese mamba mpt opt",
    "folded": "cohere cohere2 cohere2_moe falcon_h1 granite granite_swa granitemoe granitemoe_swa granitemoehybrid "
    "granitemoeshared hyperclovax inkling_text minicpm3",
    "head bias": "codegen ctrl gptj phi",
    "softcap": "beam gemma2 nanochat vaultgemma",
}
"""How language models are composed; all others but the refused ones are composed as they are."""

REFUSED = {
    "no key-value cache": "openai-gpt recurrent_gemma reformer rwkv",
    "its head is (280, 32), but": "inkling2_loop_text inkling2_text",
    "does not read on from a cache: AttributeError": "xlstm",
    "does not read on from a cache: RuntimeError": "dory",
    "does not read on from a cache: ValueError: MiniMax": "minimax",
    "something else from embeddings than from ids": "gemma3n_text",
    "does not run on embeddings": "cpmant deepseek_v4",
    "does not run on embeddings of no word": "gemma4_text",
    "no linear function of its body's output": "modernbert-decoder",
    "embeddings are": "electra rembert",
    "AutoModel builds no body": "trocr",
    "for its body, of which": "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart "
    "prophetnet whisper",
    "depend on later tokens": "bert bert-generation big_bird camembert data2vec-text ernie megatron-bert roberta "
    "roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod",
}
"""Words of the reason -> the language models that are refused for it."""


SPARSE = (
    "afmoe aria_text axk1 axk2 bailing_hybrid cohere2_moe deepseek_v2 dots1 dots3_note_text ernie4_5_moe "
    "exaone_moe flex_olmo glm4_moe glm4_moe_lite gpt_oss granitemoe granitemoe_swa granitemoehybrid "
    "granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling_text jamba jetmoe kimi_linear kolibri1 "
    "laguna lara_mini llama4_text longcat_flash mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text mixtral olmoe "
    "phimoe qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen4_exp_text sarvam_mla sarvam_moe solar_open zamba zaya"
)
"""Language models with experts of their own, which is where upcycling stops."""

UPCYCLES = {
    ("sparse already", "sparse already"): SPARSE,
    ("no MLP", "no MLP"): "biogpt bloom dbrx falcon_mamba mamba mamba2 moshi mpt nemotron_h opt xglm zamba2",
    ("exact", "no"): "bitnet gpt-sw3 gpt2",
}
"""(verdict on copies, on slices) -> language models; all others are exact both ways."""


def expected_upcycling(model_type: str) -> tuple[str, str]:
    """The verdicts on experts that are copies of MLPs, and on those that are slices."""
    return next((verdicts for verdicts, names in UPCYCLES.items() if model_type in names.split()), ("exact", "exact"))


def expected(model_type: str) -> tuple[str, str]:
    """The verdict on a language model, and words of its reason where it is refused."""
    for verdict, names in VERDICTS.items():
        if model_type in names.split():
            return verdict, ""
    for reason, names in REFUSED.items():
        if model_type in names.split():
            return "refused", reason
    return "as is", ""
