# SPDX-License-Identifier: Apache-2.0
"""`moellava upcycle`: the same weights as in memory, shard by shard, with a certificate and bounded memory."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from moellava import files
from moellava.cli import main
from moellava.files import read_config
from moellava.moe import MoESpec, upcycle
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
