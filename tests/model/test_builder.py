"""Opening folders: what each kind is, what is missing from it, and which device wants which dtype."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from moellava.errors import UserError
from moellava.model.builder import (
    default_dtype,
    folder_kind,
    load_pretrained_model,
    load_projector,
    parts_of,
    save_pretrained_folder,
)
from moellava.model.compose import compose


@pytest.fixture(scope="module")
def made(make_base, clip_tower):
    return compose(str(make_base("llama").folder), str(clip_tower), version="plain", image_projector_type="mlp2x_gelu")


@pytest.fixture
def folder(made, tmp_path):
    path = tmp_path / "model"
    save_pretrained_folder(made.model, made.tokenizer, made.processor, path, meta={"stage": "pretrain"})
    return path


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_folders_are_told_apart_by_their_config(folder, make_base, clip_tower, checkpoints):
    kinds = {
        folder: "dense",
        make_base("llama").folder: "llm",
        clip_tower: "tower",
        checkpoints / "phi" / "dense": "dense",
        checkpoints / "phi" / "moe_sparse": "moe",
    }
    assert {path: folder_kind(path) for path in kinds} == kinds


def test_what_comes_back_is_what_was_saved(made, folder):
    tokenizer, model, processor, context = load_pretrained_model(folder, device="cpu")
    assert context == 512 and not model.training
    assert tokenizer.get_vocab() == made.tokenizer.get_vocab()
    assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert processor.chat_template == made.processor.chat_template
    for (name, tensor), (other, found) in zip(made.model.state_dict().items(), model.state_dict().items()):
        assert name == other and torch.equal(tensor, found)


def test_parts_cover_every_parameter_once(made):
    owners = [parameter for part in parts_of(made.model).values() for parameter in part.parameters()]
    assert len(owners) == len({id(parameter) for parameter in owners}) == len(list(made.model.parameters()))


@pytest.mark.parametrize("kind", ["llm", "tower"])
def test_a_part_alone_is_refused(kind, make_base, clip_tower):
    path = make_base("llama").folder if kind == "llm" else clip_tower
    with pytest.raises(
        UserError, match="Stage 1 composes the two: train.py --model_name_or_path LLM --image_tower TOWER"
    ):
        load_pretrained_model(path, device="cpu")


def test_missing_unexpected_and_misshapen_weights_are_errors(folder):
    weights = folder / "model.safetensors"
    state = load_file(weights)
    save_file({name: tensor for name, tensor in state.items() if "layers.2.mlp" not in name}, weights)
    with pytest.raises(UserError, match=r"missing: model.language_model.layers.2.mlp.down_proj"):
        load_pretrained_model(folder, device="cpu")
    save_file({**state, "model.surplus": torch.zeros(1)}, weights)
    with pytest.raises(UserError, match="unexpected: model.surplus"):
        load_pretrained_model(folder, device="cpu")
    save_file(state, weights)
    edit(folder, lambda config: config["text_config"].update(intermediate_size=40))
    with pytest.raises(UserError, match=r"\(48, 32\), but its config says \(40, 32\)"):
        load_pretrained_model(folder, device="cpu")


def test_a_config_that_does_not_belong_to_the_projector_is_refused(folder):
    edit(folder, lambda config: config["moellava"].update(image_projector_type="linear"))
    with pytest.raises(UserError, match="linear_2 is not the identity"):
        load_pretrained_model(folder, device="cpu")


def test_a_folder_that_other_code_composed_opens(folder):
    edit(folder, lambda config: config.pop("moellava"))
    _, model, _, _ = load_pretrained_model(folder, device="cpu")
    extras = model.config.moellava
    assert (extras["family"], extras["version"], extras["image_projector_type"]) == ("llama", "v1", "mlp2x_gelu")


def test_another_class_of_models_is_named(folder):
    edit(folder, lambda config: config.update(model_type="paligemma"))
    with pytest.raises(UserError, match="'paligemma' model, which no stage of ours writes"):
        load_pretrained_model(folder, device="cpu")


def test_dtype_follows_the_device(folder, monkeypatch):
    assert default_dtype(torch.device("cpu")) == torch.float32
    assert default_dtype(torch.device("mps")) == torch.float16
    for supported, wanted in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported: supported)
        assert default_dtype(torch.device("cuda")) == wanted
    _, model, _, _ = load_pretrained_model(folder, device="cpu", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_a_projector_comes_from_a_folder_or_a_file(made, folder, make_base, clip_tower, tmp_path):
    wanted = parts_of(made.model)["projector"].state_dict()
    theirs = {
        "model.mm_projector.image_spatial_proj.0.weight": wanted["linear_1.weight"],
        "model.mm_projector.image_spatial_proj.0.bias": wanted["linear_1.bias"],
        "model.mm_projector.image_spatial_proj.2.weight": wanted["linear_2.weight"],
        "model.mm_projector.image_spatial_proj.2.bias": wanted["linear_2.bias"],
    }
    torch.save(theirs, tmp_path / "mm_projector.bin")
    torch.save({key.replace("image_spatial_proj.", ""): value for key, value in theirs.items()}, tmp_path / "llava.bin")
    for source in (folder, tmp_path, tmp_path / "mm_projector.bin", tmp_path / "llava.bin"):
        fresh = compose(
            str(make_base("llama").folder), str(clip_tower), version="plain", image_projector_type="mlp2x_gelu"
        ).model
        load_projector(fresh, source)
        found = parts_of(fresh)["projector"].state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_tokens_around_an_image_come_with_the_projector(make_base, clip_tower, tmp_path):
    """Stage 1 with --mm_use_im_start_end trains their embeddings; stage 2 must not start without them."""

    def fresh(wrapped):
        base, tower = str(make_base("mistral").folder), str(clip_tower)
        return compose(base, tower, version="plain", use_im_start_end=wrapped)

    made = fresh(True)
    ids = made.model.config.moellava["image_token_ids"]
    assert made.tokenizer.convert_ids_to_tokens(ids) == ["<image>", "<im_start>", "<im_end>"]
    table = made.model.get_input_embeddings().weight
    with torch.no_grad():
        table[ids[1:]] = torch.randn(2, 32)
    save_pretrained_folder(made.model, made.tokenizer, made.processor, tmp_path / "folder")
    linear = parts_of(made.model)["projector"].linear_1
    theirs = {f"model.mm_projector.image_spatial_proj.{name}": tensor for name, tensor in linear.state_dict().items()}
    for number, rows in enumerate((table, table[ids[1:]])):
        torch.save({**theirs, "model.embed_tokens.weight": rows.detach().clone()}, tmp_path / f"{number}.bin")
    for source in ("folder", "0.bin", "1.bin"):
        model = fresh(True).model
        load_projector(model, tmp_path / source)
        assert torch.equal(model.get_input_embeddings().weight[ids[1:]], table[ids[1:]])
        with pytest.raises(UserError, match="was trained with <im_start>.*set --mm_use_im_start_end True"):
            load_projector(fresh(False).model, tmp_path / source)
    torch.save(theirs, tmp_path / "without.bin")
    with pytest.raises(UserError, match="was trained without <im_start>.*set --mm_use_im_start_end False"):
        load_projector(fresh(True).model, tmp_path / "without.bin")


def test_a_projector_of_another_shape_is_refused(folder, make_base, clip_tower):
    linear = compose(str(make_base("llama").folder), str(clip_tower), version="plain").model
    with pytest.raises(UserError, match=r"does not fit --image_projector_type: it holds .*linear_2.weight"):
        load_projector(linear, folder)
    with pytest.raises(UserError, match="holds no projector"):
        load_projector(linear, make_base("llama").folder)


@pytest.mark.slow
def test_inference_imports_no_deepspeed(folder):
    code = (
        "import sys; from moellava.model.builder import load_pretrained_model as load; "
        f"load({str(folder)!r}, device='cpu'); assert 'deepspeed' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_folder_without_tokenizer_is_named(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    with pytest.raises(UserError, match="tokenizer"):
        load_pretrained_model(folder, device="cpu")
