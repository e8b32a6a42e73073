"""The models that `--model_id` takes, by family. One more of a known kind is one more row."""

from __future__ import annotations

RELEASED_MODELS: dict[str, dict[str, str]] = {
    "llava-1.5": {
        "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
        "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
    },
    "llava-1.6": {
        "llava-1.6-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
        "llava-1.6-vicuna-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
        "llava-1.6-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
    },
    "llava-interleave": {
        "llava-interleave-qwen-0.5b": "llava-hf/llava-interleave-qwen-0.5b-hf",
        "llava-interleave-qwen-7b": "llava-hf/llava-interleave-qwen-7b-hf",
    },
    "llava-next-video": {
        "llava-next-video-7b": "llava-hf/LLaVA-NeXT-Video-7B-hf",
        "llava-next-video-7b-32k": "llava-hf/LLaVA-NeXT-Video-7B-32K-hf",
        "llava-next-video-34b": "llava-hf/LLaVA-NeXT-Video-34B-hf",
    },
    "llava-onevision": {
        "llava-onevision-0.5b-ov": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        "llava-onevision-7b-ov": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "llava-onevision-72b-ov": "llava-hf/llava-onevision-qwen2-72b-ov-hf",
    },
    "qwen2-vl": {
        "qwen2-vl-2b-instruct": "Qwen/Qwen2-VL-2B-Instruct",
        "qwen2-vl-7b-instruct": "Qwen/Qwen2-VL-7B-Instruct",
        "qwen2-vl-72b-instruct": "Qwen/Qwen2-VL-72B-Instruct",
    },
    "qwen2.5-vl": {
        "qwen2.5-vl-3b-instruct": "Qwen/Qwen2.5-VL-3B-Instruct",
        "qwen2.5-vl-7b-instruct": "Qwen/Qwen2.5-VL-7B-Instruct",
        "qwen2.5-vl-72b-instruct": "Qwen/Qwen2.5-VL-72B-Instruct",
    },
    "llama-3.2-vision": {
        "llama-3.2-11b-vision-instruct": "meta-llama/Llama-3.2-11B-Vision-Instruct",
        "llama-3.2-90b-vision-instruct": "meta-llama/Llama-3.2-90B-Vision-Instruct",
    },
    "phi3-v": {
        "phi3-v": "microsoft/Phi-3-vision-128k-instruct",
    },
    "qwen-vl": {
        "qwen-vl-chat": "Qwen/Qwen-VL-Chat",
    },
    "qwen3-vl": {
        "qwen3-vl-2b-instruct": "Qwen/Qwen3-VL-2B-Instruct",
        "qwen3-vl-4b-instruct": "Qwen/Qwen3-VL-4B-Instruct",
        "qwen3-vl-8b-instruct": "Qwen/Qwen3-VL-8B-Instruct",
    },
    "internvl": {
        "internvl3-1b": "OpenGVLab/InternVL3-1B-hf",
        "internvl3-2b": "OpenGVLab/InternVL3-2B-hf",
        "internvl3-8b": "OpenGVLab/InternVL3-8B-hf",
    },
    "smolvlm": {
        "smolvlm2-256m-video-instruct": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
        "smolvlm2-500m-video-instruct": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        "smolvlm2-2.2b-instruct": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    },
    "gemma3": {
        "gemma3-4b-it": "google/gemma-3-4b-it",
        "gemma3-12b-it": "google/gemma-3-12b-it",
        "gemma3-27b-it": "google/gemma-3-27b-it",
    },
    "paligemma": {
        "paligemma-3b-pt-224": "google/paligemma-3b-pt-224",
        "paligemma-3b-mix-224": "google/paligemma-3b-mix-224",
        "paligemma-3b-mix-448": "google/paligemma-3b-mix-448",
    },
}
"""Family id -> model id -> where the hub keeps it."""
