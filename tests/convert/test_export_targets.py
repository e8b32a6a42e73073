# SPDX-License-Identifier: Apache-2.0
"""Every family of language models × every option of upcycling × what it is exported as: plain transformers computes
what the model does. In this process for the most part; tests/convert/test_export.py has real ones."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import LoraConfig

from moellava.adapters.folder import write_adapter
from moellava.adapters.lora import (
    Adapter,
    attach,
    lora_parameters,
    names_of,
    pattern_of,
    router_modules,
    target_names,
)
from moellava.convert.export import adapter as exporting_adapter
from moellava.convert.export import export_folder as exporting
from moellava.convert.export import reopened
from moellava.convert.export.adapter import export_adapter
from moellava.convert.export.export_folder import CODE, export_folder
from moellava.convert.export.native import AS_IT_IS
from moellava.convert.export.proof import Certificate
from moellava.convert.export.targets import TARGETS
from moellava.model.manifest import read_folder
from moellava.moe import MoESpec, moe_layers, upcycle
from moellava.vlm import VLM
from tests import tiny
from tests.lmm.tiny import NATIVE, TINY
from tests.model.tiny_language_models import tiny_language_model
from tests.tiny import TEXT, compose_tiny, reopen, weights_of

LAYERS = 4

GRANULAR = {"init": "granular", "granularity": 2, "top_k_experts": 2}

OPTIONS = {
    "copy": {},
    "noise": {"init": "noise", "init_noise": 0.1},
    "drop": {"init": "drop", "init_drop_ratio": 0.5},
    "shared": {"init": "shared"},
    "granular": GRANULAR,
    "granular in all": {**GRANULAR, "top_k_experts": 4, "moe_mode": "dense"},
    "residual": {"use_residual": True},
    "three": {"top_k_experts": 3, "moe_mode": "sparse"},
    "one": {"top_k_experts": 1},
    "one by its probability": {"top_k_experts": 1, "top1_gate": "probability"},
    "bias": {"router_balance": "bias"},
    "bias and shared": {"router_balance": "bias", "init": "shared"},
    "bias in steps": {"router_balance": "bias", "moe_layers_idx": [1, 3]},
    "bias elsewhere": {"router_balance": "bias", "moe_mode": "sparse"},
    "counts": {"num_experts": [2, 4]},
}
"""Name -> fields of `MoESpec` beside four experts in the second half."""

ERNIE = dict.fromkeys(("bias", "bias and shared", "bias in steps", "counts"), "ernie-moe")
LIKE_LLAMA = dict.fromkeys(OPTIONS, "qwen2-moe") | ERNIE | dict.fromkeys(("residual", "bias elsewhere"), CODE)
ALL_IN_CODE = dict.fromkeys(OPTIONS, CODE)
GRANITE = ("copy", "noise", "drop", "granular in all", "three", "one")
QWEN3 = ("copy", "noise", "drop", "granular", "granular in all", "three", "one", "one by its probability")

WRITTEN_AS = {
    "llama": LIKE_LLAMA,
    "mistral": LIKE_LLAMA | dict.fromkeys(ERNIE, CODE),  # its attention has a window, which Ernie's has not
    "qwen2": LIKE_LLAMA,
    "qwen": LIKE_LLAMA,
    "qwen3": ALL_IN_CODE | dict.fromkeys(QWEN3, "qwen3-moe"),
    "minicpm": ALL_IN_CODE | dict.fromkeys(GRANITE, "granite-moe") | {"shared": "granite-moe-shared"},
    "phi": ALL_IN_CODE,
    "stablelm": ALL_IN_CODE,
    "gemma2": ALL_IN_CODE,
}
"""Language model -> option -> what `auto` writes."""

QUICK = {("llama", "shared"), ("qwen2", "counts"), ("minicpm", "copy"), ("phi", "residual"), ("qwen3", "granular")}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch) -> None:
    """What plain transformers computes, without the seconds that a process takes to start."""

    def opened(folder: Path, probes: dict, with_code: bool, adapter: Path | None = None) -> dict[str, torch.Tensor]:
        return reopened.computed(reopened.open_plainly(str(folder), with_code, adapter and str(adapter)), probes)

    monkeypatch.setattr(exporting, "reopen", opened)
    monkeypatch.setattr(exporting_adapter, "reopen", opened)
    monkeypatch.setattr(reopened, "GREEDY", 2)


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tokenizer_folder, clip_tower) -> Callable[[str], VLM]:
    """name of `WRITTEN_AS` -> a composed model of four layers; not to be changed."""
    root = tmp_path_factory.mktemp("dense")

    @cache
    def make(name: str) -> VLM:
        sizes = {"num_hidden_layers": LAYERS}
        if name in tiny.FAMILIES:
            tiny.write_base(root / name, name, tokenizer_folder, noise=0.1, **sizes)
        else:
            torch.manual_seed(1)
            config = hf.AutoConfig.for_model(name, vocab_size=tiny.VOCABULARY, **TEXT | sizes | {"head_dim": 8})
            hf.AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
            shutil.copytree(tokenizer_folder, root / name, dirs_exist_ok=True)
        return compose_tiny(root / name, clip_tower, "plain", image_projector_type="mlp2x_gelu")

    return make


def made_sparse(vlm: VLM, **options: object) -> VLM:
    """An upcycled model whose routers and experts have gone their own ways."""
    spec = MoESpec(**{"num_experts": [4], **options})
    upcycle(vlm.model, spec)
    vlm.sparse(spec)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in vlm.model.state_dict().items():
            scale = 0.3 if ".router." in name else 0.05 if ".experts." in name or ".shared." in name else 0.0
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator))
    return vlm


def exported(vlm: VLM, folder: Path, to: str = "auto") -> Certificate:
    """The proof of a model's export."""
    vlm.save(folder / "ours", meta={"stage": "moe"})
    certificate = export_folder(read_folder(folder / "ours", "--model-path"), folder / "theirs", to)
    assert certificate is not None
    return certificate


def cases() -> Iterator[object]:
    """Every family with every option."""
    for family, row in WRITTEN_AS.items():
        for option, target in row.items():
            marks = [] if (family, option) in QUICK else [pytest.mark.slow]
            yield pytest.param(family, option, target, marks=marks, id=f"{family}-{option}")


@pytest.mark.parametrize(("family", "option", "target"), cases())
def test_plain_transformers_computes_what_the_sparse_model_does(family, option, target, dense, tmp_path):
    vlm = made_sparse(copy.deepcopy(dense(family)), **OPTIONS[option])
    certificate = exported(vlm, tmp_path)
    assert certificate.target == target
    assert set(certificate.probes) == {"text", "image"}
    for probe in certificate.probes.values():
        assert probe["max_abs_delta"] < 2e-5 and probe["largest_logit"] > 0.1
        assert probe["greedy_tokens"] == reopened.GREEDY
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert "moe" not in config and ("auto_map" in config) == (target == CODE)
    assert config["text_config"]["architectures"][0].endswith("ForCausalLM")
    if target == CODE:
        assert len((tmp_path / "theirs" / "modeling_sparse.py").read_text().splitlines()) <= 120


def test_every_target_is_written_by_a_case():
    written = {target for row in WRITTEN_AS.values() for target in row.values()} | {"qwen3-vl-moe", "mixtral"}
    assert written == {*TARGETS, CODE}


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_mixtral_is_written_where_it_is_asked_for(family, dense, tmp_path):
    certificate = exported(made_sparse(copy.deepcopy(dense(family)), moe_mode="dense"), tmp_path, "mixtral")
    assert certificate.target == "mixtral"
    names = weights_of(tmp_path / "theirs")
    assert "language_model.model.layers.0.block_sparse_moe.experts.3.w2.weight" in names


@pytest.mark.parametrize(("family", "target"), [("llama", AS_IT_IS), pytest.param("phi", CODE, marks=pytest.mark.slow)])
def test_a_dense_folder_has_the_names_of_the_hub(family, target, dense, tmp_path):
    certificate = exported(copy.deepcopy(dense(family)), tmp_path)
    assert certificate.target == target
    assert all(probe["max_abs_delta"] == 0 for probe in certificate.probes.values())
    if target == AS_IT_IS:
        beginnings = {name.split(".")[0] for name in weights_of(tmp_path / "theirs")}
        assert beginnings == {"language_model", "vision_tower", "multi_modal_projector"}
        assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in weights_of(tmp_path / "theirs")


SUBCLASSED = ("beam", "codegen", "ctrl", "gemma2", "gptj", "nanochat", "phi", "vaultgemma")
"""Language models whose head has a bias or whose logits are capped: Hugging Face's LLaVA lacks both."""


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SUBCLASSED)
def test_a_dense_model_of_a_subclass_becomes_code(model_type, tokenizer_folder, clip_tower, tmp_path):
    tiny_language_model(model_type).save_pretrained(tmp_path / "base")
    shutil.copytree(tokenizer_folder, tmp_path / "base", dirs_exist_ok=True)
    certificate = exported(compose_tiny(tmp_path / "base", clip_tower, "plain"), tmp_path)
    assert certificate.target == CODE
    assert all(probe["max_abs_delta"] < 1e-5 for probe in certificate.probes.values())


def test_moellava_opens_what_it_has_exported(dense, tmp_path):
    vlm = made_sparse(copy.deepcopy(dense("llama")))
    exported(vlm, tmp_path)
    again = reopen(tmp_path / "theirs")
    assert again.section.version == vlm.section.version
    for probe in vlm.probes().values():
        with torch.no_grad():
            assert torch.allclose(again.model(**probe).logits, vlm.model(**probe).logits, atol=1e-5)


RELEASED_AS = {
    "llava-1.5": "qwen2-moe",
    "llava-1.6": "qwen2-moe",
    "llava-interleave": "qwen2-moe",
    "llava-next-video": "qwen2-moe",
    "llava-onevision": "qwen2-moe",
    "internvl": "qwen2-moe",
    "smolvlm": "qwen2-moe",
    "qwen3-vl": "qwen3-vl-moe",
    **dict.fromkeys(("qwen2-vl", "qwen2.5-vl", "gemma3", "paligemma", "llama-3.2-vision"), CODE),
}
"""Released architecture -> what its sparse models are written as."""


def test_every_released_architecture_has_a_row():
    assert set(RELEASED_AS) == set(NATIVE)


@pytest.mark.slow
@pytest.mark.parametrize("options", [None, {"moe_mode": "sparse"}, {"moe_mode": "dense", "top_k_experts": 1}])
@pytest.mark.parametrize("name", RELEASED_AS)
def test_released_models_are_written_too(name, options, small_tokenizers, tmp_path):
    TINY[name].save(small_tokenizers, tmp_path / "released")
    if options is None:
        certificate = export_folder(read_folder(tmp_path / "released", "--model-path"), tmp_path / "theirs")
    else:
        certificate = exported(made_sparse(reopen(tmp_path / "released"), **options), tmp_path)
    assert certificate.target == (AS_IT_IS if options is None else RELEASED_AS[name])
    assert all(probe["max_abs_delta"] < 1e-5 for probe in certificate.probes.values())


LORA_RANK = 3

ADAPTED = {
    ("llama", "shared"): "qwen2-moe",
    ("qwen2", "counts"): "ernie-moe",
    ("minicpm", "copy"): "granite-moe",
    ("minicpm", "shared"): "granite-moe-shared",
    ("qwen3", "granular"): "qwen3-moe",
    ("phi", "copy"): CODE,
}
"""(language model, option) -> what its adapted model is exported as."""


@pytest.mark.parametrize(
    ("family", "option"), [pytest.param(*key, marks=[pytest.mark.slow] * (key[0] != "llama")) for key in ADAPTED]
)
def test_an_adapter_goes_on_the_exported_folder(family, option, dense, tmp_path):
    """peft puts it there, and the model computes what it does here, and not what the folder does without it."""
    vlm = made_sparse(copy.deepcopy(dense(family)), **OPTIONS[option])
    vlm.save(tmp_path / "ours", meta={"stage": "moe"})
    wanted = write_random_adapter(vlm, tmp_path / "adapter")
    manifest = read_folder(tmp_path / "ours", "--model-path")
    base, proof = export_adapter(manifest, tmp_path / "adapter", tmp_path / "theirs")
    assert base.target == ADAPTED[family, option]
    assert min(proof.moved.values()) > 1e-2
    assert all(probe["max_abs_delta"] < 2e-5 for probe in proof.probes.values())
    config = json.loads((tmp_path / "theirs" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2 * LORA_RANK and not config["rank_pattern"]
    assert bool(config["target_parameters"]) == (base.target != CODE)
    text = vlm.probes()["text"]
    model = reopened.open_plainly(str(tmp_path / "theirs"), base.target == CODE, str(tmp_path / "theirs" / "adapter"))
    with torch.no_grad():
        assert torch.allclose(model(**text).logits, wanted(text), atol=2e-5)


def write_random_adapter(vlm: VLM, folder: Path, dtype: str = "float32") -> Callable[..., torch.Tensor]:
    """An adapter of every linear of the language model, with random matrices, and routers that have moved; returns the
    function from inputs to logits of the model with it."""
    targets = target_names(vlm, only_experts=False)
    known = [name for name, _ in vlm.model.named_modules()]
    config = LoraConfig(r=LORA_RANK, lora_alpha=5, target_modules=pattern_of(targets, known))
    attach(vlm.model, config, targets)
    routers = [part for _, layer in moe_layers(vlm.model) for part in router_modules(layer)]
    config.modules_to_save = names_of(vlm.model, routers)
    with torch.no_grad():
        for parameter in lora_parameters(vlm.model) + [p for router in routers for p in router.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    origin = {"base": "ours", "dtype": dtype, "moe": vlm.model.config.moe}
    write_adapter(vlm.model.state_dict(), Adapter(config, origin, vlm.keywords), folder)
    return lambda inputs: vlm.model(**inputs).logits


def test_routers_under_an_adapter_stay_fp32_beside_bf16_weights(dense, tmp_path):
    vlm = made_sparse(copy.deepcopy(dense("llama")))
    routers = {id(parameter) for _, layer in moe_layers(vlm.model) for parameter in layer.router.parameters()}
    for parameter in vlm.model.parameters():
        parameter.data = parameter.data.to(torch.float32 if id(parameter) in routers else torch.bfloat16)
    vlm.save(tmp_path / "ours", meta={"stage": "moe"})
    trained = reopen(tmp_path / "ours")
    write_random_adapter(trained, tmp_path / "adapter", "bfloat16")
    export_adapter(read_folder(tmp_path / "ours", "--model-path"), tmp_path / "adapter", tmp_path / "theirs")
    stored = {name.endswith(".gate.weight"): tensor.dtype for name, tensor in weights_of(tmp_path / "theirs").items()}
    assert stored == {True: torch.float32, False: torch.bfloat16}
