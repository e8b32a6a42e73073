"""Tiny random Llava models over the decoders that can be upcycled, and real processes under the deepspeed launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 96,
    "pad_token_id": 0,
}
IMAGE_TOKEN = 5


def text_config(family: str):
    import transformers

    configs = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "phi": transformers.PhiConfig,
        "phi3": transformers.Phi3Config,
        "qwen2": transformers.Qwen2Config,
        "stablelm": transformers.StableLmConfig,
    }
    return configs[family](**SIZES)


@pytest.fixture
def tiny_llava() -> Callable:
    """family -> a random Llava of 4 layers whose images are 4 patches; the same weights each time."""

    def make(family: str = "llama"):
        from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision = CLIPVisionConfig(image_size=16, patch_size=8, **shape)
        torch.manual_seed(0)
        config = LlavaConfig(
            vision_config=vision,
            text_config=text_config(family),
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-1,
            image_seq_length=4,
        )
        return LlavaForConditionalGeneration(config).eval()

    return make


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two sequences, one with an image, the other with padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, 96, (2, 12), generator=generator)
    ids[0, 2:6] = IMAGE_TOKEN
    mask = torch.ones_like(ids)
    mask[1, 7:], ids[1, 7:] = 0, 0
    pixels = torch.rand((1, 3, 16, 16), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


@pytest.fixture
def launch(tmp_path) -> Callable[..., list[dict]]:
    """(script, processes, *arguments) -> what each rank wrote, by the real `deepspeed` launcher on CPU.

    The script calls `report(value)` once per rank with something that json can hold.
    """
    prelude = (
        "import atexit, json, os, sys, torch, deepspeed\n"
        "torch.set_num_threads(1)\n"
        "from moellava.train.deepspeed.extensions import unlink_shared_buffer\n"
        "deepspeed.init_distributed()\n"
        "unlink_shared_buffer()\n"
        "atexit.register(torch.distributed.destroy_process_group)\n"
        "rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()\n"
        "folder, arguments = sys.argv[-1], sys.argv[1:-1]\n"
        "def report(value):\n"
        "    json.dump(value, open(f'{folder}/rank{rank}.json', 'w'))\n"
    )

    def run(script: str, processes: int, *arguments: object) -> list[dict]:
        path = tmp_path / "worker.py"
        path.write_text(prelude + script)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = Path(sys.executable).parent / "deepspeed"
        command = [sys.executable, str(launcher), "--num_accelerators", str(processes), "--master_port", str(port)]
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{launcher.parent}:{os.environ['PATH']}",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        done = subprocess.run(
            [*command, str(path), *map(str, arguments), str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(processes)]

    return run
