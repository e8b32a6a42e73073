# SPDX-License-Identifier: Apache-2.0
"""`moellava upcycle`: the same weights as in memory, shard by shard, with a certificate and bounded memory."""

from __future__ import annotations

import copy
import json
import re
import shutil
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration

from moellava import files
from moellava.cli import main
from moellava.convert import upcycle_folder
from moellava.files import read_config
from moellava.moe import MoESpec, certificate, upcycle
from moellava.vlm import VLM
from tests.processes import run_python
from tests.tiny import compose_tiny, reopen, tiny_llava, weights_of


@pytest.fixture(scope="module")
def made(make_base, clip_tower) -> VLM:
    return compose_tiny(make_base("llama").folder, clip_tower, "v1", image_projector_type="mlp2x_gelu")


@pytest.fixture
def dense(made, tmp_path):
    """A folder as the hub has them: several shards, Hugging Face's older names, and nothing that we say of it."""
    folder, model = tmp_path / "dense", copy.deepcopy(made.model)
    del model.config.moellava
    model.save_pretrained(folder, max_shard_size="50KB")
    made.processor.save_pretrained(folder)
    (folder / "notes.txt").write_text("ours")
    return folder


def run(dense, target, *flags):
    return main(["upcycle", "--model-path", str(dense), "--output-dir", str(target), *flags])


@pytest.mark.parametrize(
    "flags",
    [
        ["--moe_mode", "sparse", "--num_experts", "2", "4"],
        ["--init", "drop", "--init_drop_ratio", "0.3", "--moe_layers_idx", "1"],
        ["--init", "noise", "--router_balance", "bias", "--use_residual"],
        ["--init", "granular", "--granularity", "2", "--top-k-experts", "2"],
        ["--init", "shared", "--init_seed", "5"],
    ],
)
def test_the_folder_holds_what_upcycling_in_memory_gives(made, dense, tmp_path, flags, capsys):
    assert run(dense, tmp_path / "moe", *flags) == 0
    raw = read_config(tmp_path / "moe", "test")
    expected = upcycle(copy.deepcopy(made.model), MoESpec.from_config(raw["moe"])).state_dict()
    found = weights_of(tmp_path / "moe")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    opened = reopen(tmp_path / "moe")
    assert opened.spec == MoESpec.from_config(raw["moe"])
    assert opened.section.stage == "moe" and opened.architecture.name == opened.section.architecture == "llava-1.5"
    assert "max |Δlogit|" in capsys.readouterr().out
    certificate = json.loads((tmp_path / "moe" / "moe_certificate.json").read_text())
    assert set(certificate["probes"]) == {"text", "image"}
    assert certificate["exact_in_theory"] == (certificate["recipe"]["init"] in ("copy", "granular", "shared"))
    if certificate["exact_in_theory"]:
        assert max(probe["max_abs_delta"] for probe in certificate["probes"].values()) < 1e-6


def test_bf16_weights_stay_bf16_and_routers_are_fp32(made, dense, tmp_path):
    copy.deepcopy(made.model).bfloat16().save_pretrained(dense, max_shard_size="50KB")
    assert run(dense, tmp_path / "moe", "--shard-size", "0.00005") == 0
    found = weights_of(tmp_path / "moe")
    assert len(list((tmp_path / "moe").glob("*.safetensors"))) > 2
    dtypes = {name.split(".mlp.")[-1]: tensor.dtype for name, tensor in found.items() if ".layers.3.mlp." in name}
    assert dtypes["router.weight"] == torch.float32 and dtypes["experts.3.up_proj.weight"] == torch.bfloat16


def rewritten(dense, change):
    """A dense folder in one file, its tensors changed: name, tensor -> tensor, or None for one that goes."""
    tensors = {name: change(name, tensor) for name, tensor in weights_of(dense).items()}
    for file in dense.glob("*.safetensors*"):
        file.unlink()
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, dense / "model.safetensors", metadata={"format": "pt"})


RECIPES = {
    "copy": [],
    "noise": ["--init", "noise"],
    "granular": ["--init", "granular", "--granularity", "2", "--top-k-experts", "2"],
    "shared": ["--init", "shared"],
    "residual": ["--use_residual"],
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("wide", ["gate_proj", "up_proj", "down_proj"])
def test_each_tensor_of_an_expert_has_the_dtype_of_what_it_is_made_of(dense, tmp_path, wide, recipe):
    """Also where the tensors of one MLP differ, as a folder whose output linears were kept in fp32 has them."""
    rewritten(dense, lambda name, tensor: tensor.to(torch.float32 if wide in name else torch.bfloat16))
    stored = weights_of(dense)
    assert run(dense, tmp_path / "moe", *RECIPES[recipe], "--moe_layers_idx", "1") == 0
    for name, tensor in weights_of(tmp_path / "moe").items():
        if ".router." in name:
            assert tensor.dtype == torch.float32, name
        elif ".coefficient." not in name:
            source = re.sub(r"\.(experts\.\d+|shared)\.", ".", name)
            old = source.replace("model.language_model.", "language_model.model.", 1)
            assert tensor.dtype == next(stored[each] for each in (source, old) if each in stored).dtype, name


def test_fp64_is_certified_as_fp32_is(dense, tmp_path):
    rewritten(dense, lambda name, tensor: tensor.double())
    config = read_config(dense, "test")
    (dense / "config.json").write_text(json.dumps(config | {"dtype": "float64"}))
    assert run(dense, tmp_path / "moe") == 0
    assert json.loads((tmp_path / "moe" / "moe_certificate.json").read_text())["dtype"] == "float64"


UNFIT = {
    "missing": (lambda name, tensor: None if "k_proj" in name else tensor, "do not fit.*missing: .*k_proj"),
    "missing in an MLP": (lambda name, tensor: None if "layers.3.mlp.up" in name else tensor, "missing: .*up_proj"),
    "missing head": (lambda name, tensor: None if "lm_head" in name else tensor, "missing: .*lm_head"),
    "shape": (
        lambda name, tensor: tensor[1:] if "layers.1.self_attn.o" in name else tensor,
        r"o_proj.* but its config",
    ),
    "shape in an MLP": (lambda name, tensor: tensor[1:] if "layers.3.mlp.up" in name else tensor, "up_proj.* but its"),
    "left over": (lambda name, tensor: tensor, "unexpected: .*q_norm"),
    "eight bits": (lambda name, tensor: tensor.to(torch.float8_e4m3fn) if "up_proj" in name else tensor, "F8_E4M3"),
}


@pytest.mark.parametrize("fault", UNFIT)
def test_weights_that_are_not_the_configs_are_named_before_anything_is_computed(dense, tmp_path, fault, capsys):
    change, message = UNFIT[fault]
    rewritten(dense, change)
    if fault == "left over":
        tensors = weights_of(dense) | {"model.language_model.layers.0.self_attn.q_norm.weight": torch.ones(3)}
        save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with mock.patch.object(upcycle_folder, "dense_logits", side_effect=AssertionError("it has begun")):
        assert run(dense, tmp_path / "moe") == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("declared", [None, "bfloat16"])
def test_a_pickle_keeps_its_precision_and_the_log_says_what_is_cast(dense, tmp_path, declared, caplog):
    """A folder that is opened as a whole has one dtype afterwards: its config's, else that which loses nothing."""
    state = {name: tensor.bfloat16() for name, tensor in weights_of(dense).items()}
    if declared:
        state |= {name: tensor.float() for name, tensor in state.items() if "projector" in name}
    for file in dense.glob("*.safetensors*"):
        file.unlink()
    torch.save(state, dense / "pytorch_model.bin")
    config = read_config(dense, "test")
    config.pop("dtype")
    (dense / "config.json").write_text(json.dumps(config | ({"dtype": declared} if declared else {})))
    assert run(dense, tmp_path / "moe") == 0
    dtypes = {tensor.dtype for name, tensor in weights_of(tmp_path / "moe").items() if ".router." not in name}
    assert dtypes == {torch.bfloat16}
    assert ("holds tensors in float32; they are written in bfloat16" in caplog.text) == (declared is not None)


@pytest.mark.parametrize("way", ["streamed", "as a whole"])
def test_both_ways_take_the_same_flags_and_bring_the_same_files(dense, tmp_path, way):
    """Pickles, and folders in LLaVA's own layout, are opened as a whole."""
    (dense / "LICENSE").write_text("a licence")
    (dense / "trainer_state.json").write_text("{}")
    if way == "as a whole":
        torch.save(weights_of(dense), dense / "pytorch_model.bin")
        for file in dense.glob("*.safetensors*"):
            file.unlink()
    with mock.patch.object(upcycle_folder, "in_memory", wraps=upcycle_folder.in_memory) as in_memory:
        assert run(dense, tmp_path / "moe", "--shard-size", "0.00005") == 0
    assert in_memory.called == (way == "as a whole")
    shards = list((tmp_path / "moe").glob("*.safetensors"))
    assert len(shards) > 4 and max(shard.stat().st_size for shard in shards) < 60_000
    assert (tmp_path / "moe" / "LICENSE").read_text() == "a licence"
    assert (tmp_path / "moe" / "notes.txt").is_file() and not (tmp_path / "moe" / "trainer_state.json").exists()
    assert {"LICENSE", "moe_certificate.json"} <= files.read_digests(tmp_path / "moe").keys()
    assert files.digest_problems(tmp_path / "moe", files.read_digests(tmp_path / "moe")) == {}
    assert reopen(tmp_path / "moe").spec.num_experts == [4]


def test_a_certificate_that_does_not_hold_leaves_nothing(dense, tmp_path, monkeypatch):
    """What is written is looked at before it moves to its place."""
    monkeypatch.setitem(certificate.ROUNDING, torch.float32, -1.0)
    with pytest.raises(certificate.NotExactError):
        run(dense, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_a_disk_without_room_is_told_of_before_anything_is_written(dense, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: mock.Mock(free=1000))
    assert run(dense, tmp_path / "moe") == 2
    assert "are free" in capsys.readouterr().err
    assert not (tmp_path / "moe").exists()


FOREIGN = ("tf_model.h5", "flax_model.msgpack", "model.onnx", "model.gguf", "rust_model.ot", "optimizer.pt")
OF_THE_RUN = ("run.json", "run.yaml", "run.log", "run_log.jsonl", "report.html", "parameters.json")
OF_THE_RUN += ("trainer_state.json", "training_args.bin")


def test_nothing_comes_along_that_is_true_of_the_dense_model_alone(dense, tmp_path):
    for name in (*FOREIGN, *OF_THE_RUN, "LICENSE"):
        (dense / name).write_text("{}")
    (dense / "additional_chat_templates").mkdir()
    (dense / "additional_chat_templates" / "tool.jinja").write_text("tools")
    assert run(dense, tmp_path / "moe") == 0
    found = {path.name for path in (tmp_path / "moe").iterdir()}
    assert not found & {*FOREIGN, *OF_THE_RUN}
    assert {"LICENSE", "notes.txt", "moe_certificate.json"} <= found
    assert (tmp_path / "moe" / "additional_chat_templates" / "tool.jinja").read_text() == "tools"
    assert "moe_certificate.json" in files.read_digests(tmp_path / "moe")


def test_an_output_that_is_a_file_is_refused_before_the_work(dense, tmp_path, capsys):
    (tmp_path / "moe").write_text("mine")
    assert run(dense, tmp_path / "moe") == 2
    assert "is a file, not a folder" in capsys.readouterr().err


def test_weights_are_digested_while_they_are_written(dense, tmp_path, monkeypatch):
    """And not read again for it, whatever comes in a layer; in several files, too."""
    read, digest = [], files.file_digest
    monkeypatch.setattr(files, "file_digest", lambda path: read.append(str(path)) or digest(path))
    assert run(dense, tmp_path / "moe", "--use_residual", "--shard-size", "0.00005") == 0
    assert read and not any(path.endswith(".safetensors") for path in read)
    recorded = files.read_digests(tmp_path / "moe")
    assert sum(name.endswith(".safetensors") for name in recorded) > 2
    assert files.digest_problems(tmp_path / "moe", recorded) == {}


def test_other_files_come_along_and_plain_transformers_refuses(dense, tmp_path):
    assert run(dense, tmp_path / "moe") == 0
    for name in ("notes.txt", "tokenizer.json", "processor_config.json", "chat_template.jinja"):
        assert (tmp_path / "moe" / name).read_bytes() == (dense / name).read_bytes()
    with pytest.raises((ValueError, KeyError)):
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "moe")


@pytest.mark.parametrize(
    ("prepare", "flags", "message"),
    [
        (None, ["--num_experts", "0"], "--num_experts"),
        (None, ["--moe_layers_idx", "7"], "0 … 3"),
        ("sparse", [], "sparse already"),
        ("full", [], "already holds a model"),
        ("damaged", [], "damaged|lacks tensors|missing"),
        ("without tokenizer", [], "tokenizer"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(dense, tmp_path, prepare, flags, message, capsys):
    target = tmp_path / "moe"
    if prepare == "sparse":
        assert run(dense, tmp_path / "first") == 0
        dense = tmp_path / "first"
    elif prepare == "full":
        target.mkdir()
        (target / "config.json").write_text("{}")
    elif prepare == "damaged":
        sorted(dense.glob("*.safetensors"))[1].unlink()
    elif prepare == "without tokenizer":
        for file in dense.glob("tokenizer*"):
            file.unlink()
    before = sorted(target.rglob("*")) if target.exists() else []
    assert run(dense, target, *flags) == 2
    assert re.search(message, capsys.readouterr().err)
    assert (sorted(target.rglob("*")) if target.exists() else []) == before


MEMORY = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from transformers import LlavaConfig
from moellava.convert.streaming import convert_files, sparse_config
from moellava.model.offload import without_weights
from moellava.moe import MoESpec
from safetensors import safe_open
small, big, target = map(Path, sys.argv[1:4])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def convert(folder, spec, shard_bytes):
    config = LlavaConfig.from_pretrained(folder)
    dense, sparse = without_weights(config), without_weights(sparse_config(config, spec))
    convert_files(folder, target / folder.name, dense, sparse, spec, shard_bytes)
convert(small, MoESpec(), 10**9)  # imports, buffers
before = peak()
convert(big, MoESpec(moe_mode="dense"), 30_000_000)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_stays_within_a_shard_or_a_layer(dense, tmp_path):
    """At most 1.2 × the larger of one shard and one layer's experts."""
    model = tiny_llava(hidden_size=384, intermediate_size=1536, num_hidden_layers=8)
    model.save_pretrained(tmp_path / "big", max_shard_size="30MB")
    shard = max(file.stat().st_size for file in (tmp_path / "big").glob("*.safetensors"))
    experts = 4 * 3 * 384 * 1536 * 4
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    del model
    extra = int(run_python(MEMORY, dense, tmp_path / "big", tmp_path, fresh=True).split()[-1])
    assert extra <= 1.2 * max(shard, experts) < 0.6 * total
