# SPDX-License-Identifier: Apache-2.0
"""Folders that are not what was written, and folders that bring code along."""

from __future__ import annotations

import ast
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from moellava.adapters.folder import read_adapter, write_adapter
from moellava.adapters.lora import Adapter, attach
from moellava.commands.verify import main as verify
from moellava.convert.export.export_folder import export_folder
from moellava.convert.export.llava import write_published
from moellava.convert.streaming import streamed
from moellava.convert.upcycle_folder import in_memory, stream
from moellava.errors import UserError
from moellava.files import DIGESTS, read_digests
from moellava.model.manifest import read_folder
from moellava.model.parts import LLAVA
from moellava.moe import MoESpec
from moellava.vlm import build, describe, open_encoder, open_vlm
from tests.tiny import compose_tiny, reopen

PACKAGE = Path(__file__).resolve().parents[2] / "moellava"
SPEC = MoESpec(num_experts=2, top_k_experts=1)


@pytest.fixture(scope="module")
def dense(make_base, clip_tower, tmp_path_factory) -> Path:
    """A stage-2 folder."""
    folder = tmp_path_factory.mktemp("integrity") / "dense"
    compose_tiny(make_base("llama").folder, clip_tower, "v1").save(folder, meta={"stage": "finetune"})
    return folder


@pytest.fixture
def copy(dense, tmp_path) -> Path:
    return shutil.copytree(dense, tmp_path / "copy")


def flip(path: Path) -> None:
    """Turns a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# -- digests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "processor_config.json"])
def test_a_flipped_byte_is_named_by_verify_and_before_a_run_starts(name, copy, capsys):
    assert verify([str(copy), "--files"]) == 0
    flip(copy / name)
    with pytest.raises(UserError, match=f"{name}"):
        read_folder(copy, "--model_name_or_path").require_start()
    capsys.readouterr()
    try:
        assert verify([str(copy), "--files"]) == 1
        assert f"{name:40} differs" in capsys.readouterr().out
    except UserError as error:  # no JSON any more
        assert name in str(error)


def test_a_changed_config_is_accepted_once_the_user_says_so(copy, capsys):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "chat_template.jinja").unlink()
    (copy / "added_tokens.json").write_text("{}")
    (copy / "README.md").write_text("mine")
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"chat_template.jinja is missing; config.json differs.*--files --update"):
        read_folder(copy, "--model_name_or_path").require_start()
    assert verify([str(copy), "--files"]) == 1
    assert "added_tokens.json                        is new" in capsys.readouterr().out
    assert verify([str(copy), "--files", "--update"]) == 0 and verify([str(copy), "--files"]) == 0
    recorded = read_digests(copy) or {}
    assert "added_tokens.json" in recorded and not recorded.keys() & {"chat_template.jinja", "README.md", "notes.txt"}
    read_folder(copy, "--model_name_or_path").require_start()


def test_a_foreign_folder_has_no_digests_until_it_is_given_some(copy):
    (copy / DIGESTS).unlink()
    read_folder(copy, "--model_name_or_path").require_start()
    with pytest.raises(UserError, match=f"carries no {DIGESTS}.*--update"):
        verify([str(copy), "--files"])
    assert verify([str(copy), "--files", "--update"]) == 0
    flip(copy / "model.safetensors")
    assert verify([str(copy), "--files"]) == 1
    with pytest.raises(UserError, match="--update notes the digests of files"):
        verify([str(copy), "--update"])


def test_every_writer_of_a_folder_notes_digests(dense, tmp_path):
    source = read_folder(dense, "--model-path")
    vlm = reopen(dense)
    vlm.save(tmp_path / "saved")
    write_published(reopen(dense), tmp_path / "published")
    described = describe(source)
    stream(described, streamed(described), tmp_path / "streamed", SPEC, 10**9)
    in_memory(describe(source), tmp_path / "in memory", SPEC, "it", 10**9)
    adapter = Adapter(LoraConfig(r=2, target_modules=["q_proj"]), {"base": "it"}, LLAVA)
    attach(vlm.model, adapter.config)
    write_adapter(vlm.model.state_dict(), adapter, tmp_path / "adapter")
    export_folder(read_folder(tmp_path / "in memory", "--model-path"), tmp_path / "exported", verify=False)
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 6
    for folder in folders:
        assert verify([str(folder), "--files"]) == 0
        written = {path.name for path in folder.iterdir()} - {DIGESTS, "README.md"}
        assert set(read_digests(folder) or {}) == written, folder


def test_no_other_module_writes_weights():
    """Whoever joins them has to note digests, and a place in the test above."""
    writers = {"save_file", "save_pretrained", "write_weights", "TensorFiles", "save_model"}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                is_torch = ast.unparse(node.func) == "torch.save"
                if name in writers or is_torch:
                    found.add(path.relative_to(PACKAGE).as_posix())
    exports = {f"convert/export/{name}.py" for name in ("adapter", "export_folder", "llava", "pieces")}
    known = {"model/saving.py", "convert/streaming.py", "adapters/folder.py", *exports}
    passing = {"convert/export/proof.py", "convert/export/reopened.py"}  # what two processes tell each other
    passing |= {"demo/base_lm.py", "demo/base_tower.py"}  # Hugging Face's own folders, as a demo starts from
    passing |= {"data/feature_store.py"}  # features of pictures, which are made again where they are lost
    others = {name for name in found - known - passing if not name.startswith("train/")}  # checkpoints are no folders
    assert known <= found and not others


def test_quantised_weights_are_refused_where_a_run_starts(copy):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quantised \(bitsandbytes load_in_4bit\).*--lora_enable True --bits 4"):
        read_folder(copy, "--model_name_or_path").require_start()


# -- code ----------------------------------------------------------------------------------------------------------

OPENERS = {"from_pretrained", "from_config"}
WITHOUT_CODE = {("adapters/folder.py", "LoraConfig.from_pretrained")}
WITHOUT_CODE |= {("convert/export/reopened.py", "PeftModel.from_pretrained")}
WITHOUT_CODE |= {("model/build.py", "GenerationConfig.from_pretrained")}
"""Calls that have no such argument: the settings of an adapter, or of answers, name no code that is run."""

ALLOWED_CODE = {"lmm/remote.py", "lmm/architectures/phi3_v.py"}
"""Reached with --trust_remote_code True alone. See `describe_released`."""


OWN_CODE = {"convert/export/adapter.py", "convert/export/reopened.py"}
"""They open what `moellava export` has just written, with its code where it has written some."""


def test_every_opener_says_whether_code_may_run():
    calls = []
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in OPENERS:
                if "MoESpec" in ast.unparse(node.func) or (name, ast.unparse(node.func)) in WITHOUT_CODE:
                    continue
                said = {word.arg: ast.unparse(word.value) for word in node.keywords}.get("trust_remote_code")
                calls.append((name, node.lineno, said))
    rules = dict.fromkeys(ALLOWED_CODE, "True") | dict.fromkeys(OWN_CODE, "with_code")
    wrong = [call for call in calls if call[2] != rules.get(call[0], "False")]
    assert len(calls) > 10 and not wrong


MAPS = {
    "config.json": ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"),
    "tokenizer_config.json": ("AutoTokenizer",),
    "processor_config.json": ("AutoProcessor", "AutoImageProcessor", "AutoVideoProcessor"),
    "preprocessor_config.json": ("AutoProcessor", "AutoImageProcessor"),
}


@pytest.mark.parametrize("opens", ["a model", "an encoder", "a tower"])
@pytest.mark.parametrize("name", MAPS)
def test_code_of_a_folder_does_not_run_whoever_opens_it(name, opens, copy, clip_tower, tmp_path, monkeypatch):
    """transformers asks on the terminal where nobody says no; here the answer would be yes."""
    if opens == "a tower":
        copy = shutil.copytree(clip_tower, tmp_path / "tower")
    (copy / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Planted: pass\n")
    path = copy / name
    raw = json.loads(path.read_text()) if path.is_file() else {}
    asked = io.StringIO("y\n" * 20)
    monkeypatch.setattr(sys, "stdin", asked)
    for disguise in ({}, {"model_type": "planted", "tokenizer_class": "Planted", "processor_class": "Planted"}):
        hooks = {"auto_map": dict.fromkeys(MAPS[name], "planted.Planted")}
        if name == "tokenizer_config.json":
            hooks = {"auto_map": {"AutoTokenizer": ["planted.Planted", "planted.Planted"]}}
        path.write_text(json.dumps(raw | hooks | disguise))
        try:
            if opens == "a model":
                build(describe(read_folder(copy, "--model-path")), torch.float32)
            elif opens == "an encoder":
                open_encoder(copy, flag="--tokenizer")
            else:
                tower_of(copy)
        except UserError as error:
            assert str(copy) in str(error)
    assert not (tmp_path / "ran").exists() and asked.tell() == 0


def tower_of(folder: Path) -> None:
    """Opens a tower as composing does."""
    from moellava.model.tower_images import tower_image_processor
    from moellava.model.towers import tower_config, tower_tensors

    manifest = read_folder(folder, "--image_tower")
    config = tower_config(manifest.config, manifest.called)
    tower_image_processor(folder, config)
    tower_tensors(folder, config, torch.float32)


def test_a_tokenizer_with_code_alone_names_the_flag(copy):
    raw = json.loads((copy / "tokenizer_config.json").read_text())
    hooks = {"auto_map": {"AutoTokenizer": ["planted.P", "planted.P"]}, "tokenizer_class": "Planted"}
    (copy / "tokenizer_config.json").write_text(json.dumps(raw | hooks))
    (copy / "tokenizer.json").unlink()
    (copy / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=str(copy)):
        open_vlm(copy, device="cpu")


# -- adapters of others --------------------------------------------------------------------------------------------


def old_adapter(dense: Path, folder: Path) -> dict[str, torch.Tensor]:
    """An adapter as peft wrote it before transformers 4.52, in a pickle; returns its tensors of today."""
    vlm = reopen(dense)
    adapter = Adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), {}, LLAVA)
    attach(vlm.model, adapter.config)
    write_adapter(vlm.model.state_dict(), adapter, folder)
    today = load_file(folder / "adapter_model.safetensors")
    there = {name.replace("model.model.language_model.", "model.language_model.model."): v for name, v in today.items()}
    torch.save(there, folder / "adapter_model.bin")
    for name in ("adapter_model.safetensors", DIGESTS, "origin.json"):
        (folder / name).unlink()
    return today


def test_an_adapter_of_older_peft_is_merged(dense, tmp_path):
    from moellava.convert.merge_lora import merge

    today = old_adapter(dense, tmp_path / "adapter")
    _, tensors = read_adapter(tmp_path / "adapter", LLAVA)
    assert any(".language_model.model.layers.0." in name for name in tensors) and tensors.keys() != today.keys()
    found = merge(str(dense), tmp_path / "adapter", tmp_path / "merged")
    assert max(found["adapter"].values()) > 1e-4 and max(found["folder"].values()) == 0.0


def test_llavas_lora_folder_opens_over_its_base(checkpoints, tokenizer_folder, tmp_path):
    """W + alpha / r · B A, and the projector, over the language model that --model-base gives."""
    whole = torch.load(checkpoints / "llama/dense/pytorch_model.bin", weights_only=True)
    base, folder = shutil.copytree(tokenizer_folder, tmp_path / "base"), tmp_path / "lora"
    folder.mkdir()
    shutil.copytree(checkpoints / "openai", tmp_path / "openai")
    language = {name: value for name, value in whole.items() if "mm_projector" not in name and "tower" not in name}
    raw = json.loads((checkpoints / "llama/dense/config.json").read_text())
    save_file({name: value.clone() for name, value in language.items()}, base / "model.safetensors")
    plain = {name: value for name, value in raw.items() if not name.startswith(("mm_", "image_"))}
    (base / "config.json").write_text(json.dumps(plain | {"model_type": "llama"}))
    (folder / "config.json").write_text(json.dumps(raw))
    target = "model.layers.0.self_attn.q_proj"
    rows, columns = whole[f"{target}.weight"].shape
    a, b = torch.randn(2, columns), torch.randn(rows, 2)
    prefix = "base_model.model."
    pair = {f"{prefix}{target}.lora_A.weight": a, f"{prefix}{target}.lora_B.weight": b}
    torch.save(pair, folder / "adapter_model.bin")
    others = {name: value for name, value in whole.items() if name not in language}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="holds an adapter, but no non_lora_trainables.bin"):
        open_vlm(folder, base=base, device="cpu")
    torch.save({prefix + name: value for name, value in others.items()}, folder / "non_lora_trainables.bin")
    with pytest.raises(UserError, match="holds a LoRA adapter alone.*--model-base"):
        open_vlm(folder, device="cpu")
    state = open_vlm(folder, base=base, device="cpu", dtype=torch.float32).model.state_dict()
    ours = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(state[ours], whole[f"{target}.weight"].float() + 4 * b @ a, atol=1e-5)
    (projector,) = (value for name, value in others.items() if name.endswith("image_spatial_proj.0.weight"))
    assert torch.equal(state["model.multi_modal_projector.linear_1.weight"], projector.float())
    torch.save({name.replace("q_proj", "x_proj"): v for name, v in pair.items()}, folder / "adapter_model.bin")
    with pytest.raises(UserError, match="no such tensor there: it is another one"):
        open_vlm(folder, base=base, device="cpu")


def test_a_folder_with_a_preprocessor_config_alone_reads_the_same(dense, tmp_path):
    """As llava-hf had them before transformers knew processor_config.json."""
    old = shutil.copytree(dense, tmp_path / "old")
    settings = json.loads((old / "processor_config.json").read_text())
    (old / "processor_config.json").unlink()
    (old / DIGESTS).unlink()
    image = settings["image_processor"] | {"processor_class": "LlavaProcessor"}
    (old / "preprocessor_config.json").write_text(json.dumps(image))
    ours, theirs = (open_vlm(folder, device="cpu").processor for folder in (dense, old))
    for name in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        assert getattr(ours, name) == getattr(theirs, name) is not None
