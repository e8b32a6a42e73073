# SPDX-License-Identifier: Apache-2.0
"""A plug-in that adds one of each: what the commonest changes are, and all that each of them takes.

tests/test_plugins.py runs it. In the package the same lines stand in the file that docs/CUSTOM.md, docs/ADD_A_MODEL.md
or the table of an option names.
"""

from dataclasses import replace
from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, CLIPVisionConfig, CLIPVisionModel

from moellava.conversation import conv_templates
from moellava.convert.export.targets import TARGETS
from moellava.data.tokenizers import TOKENIZERS, TokenizerSpec
from moellava.eval.benchmarks import BENCHMARKS, Benchmark, Question
from moellava.eval.easy_vqa import score_exact
from moellava.lmm.architecture import Architecture, register_architecture, register_model
from moellava.model.families import FAMILIES, Family
from moellava.model.parts import LLAVA
from moellava.model.projectors import PROJECTORS
from moellava.moe.spec import MODES, PRESETS

HERE = Path(__file__).parent

conv_templates.register("mine", replace(conv_templates["v1"], system="Answer in one word.", version="mine"))

TOKENIZERS.register(
    "mine",
    TokenizerSpec(
        "mine",
        classes=("MyTokenizer",),
        file="mine.json",
        build=lambda folder, config: Tokenizer.from_file(str(folder / "mine.json")),
        versions=("mine",),
        eos="<|endoftext|>",
    ),
)

FAMILIES.register(
    "mine",
    Family("mine", "qwen2", base_model_types=("my_llm",), published_types=("my_llm",), version="mine"),
)


class MyVisionConfig(CLIPVisionConfig):
    """Of a tower that transformers does not have: its Auto classes learn of it, and the rest is found by trying."""

    model_type = "my_tower"


class MyVisionModel(CLIPVisionModel):
    """The tower."""

    config_class = MyVisionConfig


AutoConfig.register("my_tower", MyVisionConfig, exist_ok=True)
AutoModel.register(MyVisionConfig, MyVisionModel, exist_ok=True)

PROJECTORS.register("mineNx_gelu", PROJECTORS["mlpNx_gelu"])

register_architecture(Architecture("mine", LLAVA, "vipllava", models={"my-vip-llava": "me/my-vip-llava"}))
register_model(model_id="my-llava", model_family_id="llava-1.5", model_hf_path="me/my-llava")

TARGETS.register("my-moe", TARGETS["qwen2-moe"])


def questions() -> list[Question]:
    """Two of them."""
    path = HERE / "square.png"
    Image.new("RGB", (40, 24), "red").save(path)
    return [Question("What is it?", answer, path, "all") for answer in ("a square", "red")]


BENCHMARKS.register(
    "mine", lambda folder, split: Benchmark("mine", "test", "made here", questions, max_new_tokens=4, score=score_exact)
)

MODES.register("last", lambda n_layers: [n_layers - 1])
PRESETS.register("mine", {"router_aux_loss_coef": 0.5})
