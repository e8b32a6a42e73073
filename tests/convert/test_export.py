# SPDX-License-Identifier: Apache-2.0
"""`moellava export` as it is typed: a process of its own opens what was written; of what is wrong nothing is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moellava.cli import main
from moellava.convert.export import export_folder as exporting
from moellava.convert.export import modeling_template
from moellava.convert.export.code import CONSTANTS
from moellava.convert.export.proof import FILE
from moellava.convert.export.targets import qwen2_moe
from moellava.files import file_digest
from moellava.model.extended import REMOTE
from moellava.moe import MoESpec, upcycle
from moellava.vlm import VLM
from tests.processes import run_python
from tests.tiny import compose_tiny, tiny_llava


@pytest.fixture
def make_sparse(make_base, clip_tower, tmp_path):
    """(family, options) -> the folder of a sparse model whose routers have moved."""

    def make(family: str = "llama", **options: object) -> Path:
        vlm: VLM = compose_tiny(make_base(family).folder, clip_tower, "plain", image_projector_type="mlp2x_gelu")
        spec = MoESpec(**{"num_experts": [2], **options})
        upcycle(vlm.model, spec)
        vlm.sparse(spec)
        with torch.no_grad():
            for name, tensor in vlm.model.named_parameters():
                tensor.add_(0.1 * torch.randn_like(tensor) * ("router" in name or "experts" in name))
        vlm.save(tmp_path / "ours", meta={"stage": "moe"})
        return tmp_path / "ours"

    return make


def export(source: Path, *flags: str) -> tuple[int, Path]:
    """Exit status of the command, and where it has written to."""
    target = source.parent / "theirs"
    return main(["export", "--model-path", str(source), "--output-dir", str(target), *flags]), target


@pytest.mark.slow
@pytest.mark.parametrize(("family", "target"), [("llama", "qwen2-moe"), ("phi", "code")])
def test_the_folder_opens_in_a_process_without_moellava(family, target, make_sparse, capsys):
    status, folder = export(make_sparse(family))
    said = capsys.readouterr().out
    assert status == 0 and f"({target})" in said and "32 greedy tokens equal" in said
    certificate = json.loads((folder / FILE).read_text())
    assert set(certificate["versions"]) == {"moellava", "torch", "transformers"}
    assert certificate["sha256"]["model.safetensors"] == file_digest(folder / "model.safetensors")
    assert ("modeling_sparse.py" in certificate["sha256"]) == (target == "code")
    page = (folder / "README.md").read_text()
    lines = [
        line.strip() for line in page.splitlines() if line.startswith("    ") and ("import" in line or "=" in line)
    ]
    code = "import os, sys; os.chdir(sys.argv[1])\n" + "\n".join(lines) + "\nprint(type(processor).__name__)"
    assert run_python(code + "\nassert 'moellava' not in sys.modules", folder, fresh=True).split() == ["LlavaProcessor"]


def test_what_computes_something_else_is_not_written(make_sparse, monkeypatch, capsys):
    """A wrong rule: the shared expert is not doubled."""
    monkeypatch.setattr(qwen2_moe, "double", lambda tensor: tensor)
    source = make_sparse(init="shared")
    target = source.parent / "theirs"
    monkeypatch.setattr(exporting, "reopen", reopened_in_process)
    assert export(source)[0] == 1
    said = capsys.readouterr().err
    assert "logits differ by up to" in said and "is not written" in said
    assert not target.exists()


def reopened_in_process(folder: Path, probes: dict, with_code: bool) -> dict[str, torch.Tensor]:
    """What plain transformers computes, without the seconds that a process takes to start."""
    from moellava.convert.export import reopened

    return reopened.computed(reopened.open_plainly(str(folder), with_code), probes)


@pytest.mark.parametrize(
    ("options", "flags", "message"),
    [
        ({"drop_tokens": True}, (), "drops tokens beyond an expert's capacity"),
        ({}, ("--dropless", "True"), "drops no tokens"),
        ({"use_residual": True}, ("--to", "native"), "qwen2-moe: its dense MLPs are mixed with the experts"),
        ({"num_experts": [2, 3]}, ("--to", "qwen2-moe"), "differ in their number of experts"),
        ({}, ("--to", "mixtral"), "its sparse layers lie elsewhere"),
        ({}, ("--to", "granite-moe"), "its decoder is llama, and granite-moe has that of granite"),
    ],
)
def test_what_cannot_be_written_is_refused_with_the_reason(options, flags, message, make_sparse, capsys):
    status, folder = export(make_sparse(**options), "--verify", "False", *flags)
    assert status == 2 and message in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.slow
def test_a_process_that_cannot_open_the_folder_is_told(make_sparse, monkeypatch, capsys):
    monkeypatch.setattr(
        exporting, "write_config", lambda config, folder, disguise: (folder / "config.json").write_text("{}")
    )
    status, folder = export(make_sparse())
    assert status == 1 and "does not open in plain transformers" in capsys.readouterr().err
    assert not folder.exists()


def test_moellava_names_a_folder_with_code(make_sparse, capsys):
    status, folder = export(make_sparse("phi"), "--verify", "False")
    assert status == 0
    assert main(["chat", "--model-path", str(folder), "--question", "hi"]) == 2
    assert "Give the folder that it was exported from" in capsys.readouterr().err


def test_the_code_knows_how_it_is_disguised():
    assert modeling_template.TheConfig.disguise == REMOTE
    text = Path(modeling_template.__file__).read_text()
    assert len(CONSTANTS.findall(text)) == 1


MEMORY = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from moellava.convert.export.export_folder import export_folder
from moellava.model.manifest import read_folder
small, big, target = map(Path, sys.argv[1:4])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
export_folder(read_folder(small, "--model-path"), target / "small", verify=False)  # imports, buffers
before = peak()
export_folder(read_folder(big, "--model-path"), target / "big", verify=False, shard_bytes=30_000_000)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_stays_within_a_shard(make_sparse, tmp_path):
    """No tensor is kept: what grows is the file that is read, which is mapped."""
    small = make_sparse()
    model = tiny_llava(hidden_size=384, intermediate_size=1536, num_hidden_layers=8)
    upcycle(model, MoESpec(moe_mode="dense"))
    vlm = VLM(model, None, None, ())
    vlm.sparse(MoESpec(moe_mode="dense"))
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    big = tmp_path / "big"
    big.mkdir()
    for file in small.iterdir():
        if file.name not in ("config.json", "model.safetensors", "digests.json"):
            (big / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(big, max_shard_size="30MB")
    shard = max(file.stat().st_size for file in big.glob("*.safetensors"))
    del model, vlm
    extra = int(run_python(MEMORY, small, big, tmp_path, fresh=True).split()[-1])
    assert extra <= 1.5 * shard < 0.3 * total


def test_a_model_that_drops_tokens_is_written_without(make_sparse, monkeypatch, capsys):
    monkeypatch.setattr(exporting, "reopen", reopened_in_process)
    status, _ = export(make_sparse(drop_tokens=True, eval_capacity_factor=0.3), "--dropless", "True")
    assert status == 0 and "32 greedy tokens equal" in capsys.readouterr().out


def test_weights_stay_in_their_precision(make_sparse):
    source = make_sparse()
    status, folder = export(source, "--verify", "False")
    assert status == 0
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
