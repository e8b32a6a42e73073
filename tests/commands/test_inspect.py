# SPDX-License-Identifier: Apache-2.0
"""`moellava inspect`."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import CLIPConfig, CLIPVisionConfig, PixtralVisionConfig, ResNetConfig

from moellava.cli import main
from moellava.data.tokenizer_facts import facts_of, fit_of
from tests.processes import ROOT

GREEN = "\033[32m"


@pytest.fixture
def run(capsys, golden_tokenizers):
    def call(name: str, *options: str) -> tuple[int, str]:
        status = main(["inspect", "--tokenizer", str(golden_tokenizers / name), *options])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


def test_records_without_colour(run, data_file, make_record):
    path = data_file([make_record("a", "<image>\nwhat </s>?", "a cat </s>", image="x.png"), make_record("b", "q", "r")])
    status, out = run("mistral", str(path), "--version", "v1", "--tokens-per-image", "4", "--ids")
    assert status == 0 and GREEN not in out
    assert "USER: <image>\nwhat </s>? ASSISTANT:« a cat </s></s>»" in out
    assert "== Record b of" in out and "1 images, 4 image tokens, 6 supervised tokens" in out
    assert "-200" in out and "«2»" in out


def test_colour(run):
    _, out = run("phi", "--version", "phi", "--color", "always", "--conversation", "hi", "ho")
    assert f"ASSISTANT:\033[0m{GREEN} ho<|endoftext|>\033[0m" in out


def test_one_conversation_as_json_is_a_golden_row(run, golden_rows):
    row = next(r for r in golden_rows if (r["template"], r["tokenizer"], r["name"]) == ("phi", "phi", "unicode"))
    said = [turn["value"] for turn in row["conversations"]]
    _, out = run("phi", "--version", "phi", "--json", "--conversation", *said)
    seen = json.loads(out)
    assert seen["input_ids"] == row["input_ids"] and seen["labels"] == row["labels"]
    assert seen["trained_text"] == f" {said[1]}<|endoftext|>"
    assert "".join(token["text"] for token in seen["tokens"]) == seen["text"]


def test_what_is_cut(run, data_file, make_record):
    path = str(data_file([make_record("a", "<image>\nq", "one two three", image="x.png")]))
    options = [path, "--version", "phi", "--tokens-per-image", "10"]
    length = json.loads(run("phi", *options, "--json")[1])["counts"]["positions"]
    status, out = run("phi", *options, "--max-length", str(length - 2))
    assert status == 0 and "cut: 2 text tokens, 0 images" in out
    status, out = run("phi", *options, "--max-length", "20")
    assert status == 1 and "NOTHING IS TRAINED" in out and "cut: " in out


def test_selected_records(run, data_file, make_record):
    path = str(data_file([make_record(n, "q", "a") for n in range(6)]))
    _, out = run("phi", path, "--version", "phi", "--records", "4", "1")
    assert out.index("Record 4") < out.index("Record 1") and "Record 2" not in out
    _, out = run("phi", path, "--version", "phi", "--limit", "2")
    assert "Record 1" in out and "Record 2" not in out
    status, out = run("phi", path, "--version", "phi", "--records", "6")
    assert status == 2 and "records 0 to 5" in out


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "mistral",
            ["adds BOS                  yes", "bos '<s>' = 1, eos '</s>' = 2", "--version                 v1,"],
        ),
        (
            "qwen",
            [
                "adds BOS                  no",
                "pad '<|extra_0|>' = 151646; none: bos",
                "--version                 qwen,",
            ],
        ),
        ("phi", ["eos '<|endoftext|>' = 50256", "--version                 phi,"]),
        (
            "stablelm",
            ["can add special tokens    no", "unk '<|reg0|>' = 100280", "--version                 stablelm,"],
        ),
    ],
)
def test_facts_of_a_tokenizer(run, name, lines):
    status, out = run(name)
    assert status == 0
    for line in lines:
        assert line in out
    assert "the mask decodes to exactly the answers and their terminators" in out
    assert "is text here, not one special token" in out


def test_facts_know_the_free_rows_of_a_model(tokenizers, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 51200}))
    facts = facts_of(tokenizers["phi"], tmp_path)
    assert (facts.tokens, facts.embedding_rows, facts.free_rows) == (50296, 51200, 904)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 50296}}))
    assert facts_of(tokenizers["phi"], tmp_path).free_rows == 0
    assert facts_of(tokenizers["phi"], tmp_path).image_token is None
    assert json.loads(facts.to_json())["special"]["eos"] == ["<|endoftext|>", 50256]


def test_a_template_that_does_not_fit_says_why(tokenizers):
    assert fit_of(tokenizers["mistral"], "v1").fits
    assert "'<|endoftext|>' is text here" in fit_of(tokenizers["mistral"], "qwen").verdict
    assert "needs a tokenizer with a chat template" in fit_of(tokenizers["mistral"], "chat_template").verdict


def test_a_models_folder_names_template_and_image_size(folder_without_weights, capsys):
    asked = ["inspect", "--model-path", str(folder_without_weights), "--conversation", "<image> q", "a"]
    assert main(asked) == 0
    out = capsys.readouterr().out
    assert "--version phi" in out and "1 images, 5 image tokens" in out
    assert main([*asked, "--version", "v1"]) == 0
    out = capsys.readouterr().out
    assert "--version v1" in out and "1 images, 5 image tokens" in out
    (folder_without_weights / "processor_config.json").unlink()
    assert main(asked) == 2
    assert "holds no processor: copy processor_config.json" in capsys.readouterr().err


def test_a_published_folder_is_read_as_its_model_reads(published_folder, golden_tokenizers, capsys):
    asked = ["inspect", "--model-path", str(published_folder), "--conversation", "<image> q", "a"]
    assert main(asked) == 2
    assert "holds no tokenizer. Copy the files" in capsys.readouterr().err
    shutil.copytree(golden_tokenizers / "mistral", published_folder, dirs_exist_ok=True)
    assert main(asked) == 0
    out = capsys.readouterr().out
    assert "--version v1" in out and "1 images, 16 image tokens" in out


def test_user_errors(run, data_file):
    status, out = run("phi", "--conversation", "q", "a")
    assert status == 2 and "--version" in out
    status, out = run("phi", "--version", "plain", "--conversation", "q", "a")
    assert status == 2 and "2 turns and 0 images" in out
    status, out = run("phi", str(data_file("[]")), "--version", "phi")
    assert status == 2 and "holds no records" in out


@pytest.mark.parametrize(("tokenizer", "said"), [("mistral", "added"), ("qwen", "none"), ("phi", "none")])
def test_the_space_before_a_word_is_told_also_where_the_word_has_several_tokens(run, tokenizer, said):
    _, out = run(tokenizer)
    assert f"{said} before the first word, {said} after a special token" in out


def test_a_tokenizer_that_cuts_the_probe_word_adds_no_space(capsys):
    assert main(["inspect", "--tokenizer", str(ROOT / "playground" / "base" / "lm")]) == 0
    assert "none before the first word" in capsys.readouterr().out


@pytest.mark.parametrize("whole", [False, True])
def test_a_tower_says_what_it_gives_and_which_flags_choose(tmp_path, capsys, whole):
    config = CLIPVisionConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=3, image_size=56, patch_size=14)
    (CLIPConfig(vision_config=config.to_dict()) if whole else config).save_pretrained(tmp_path)
    assert main(["inspect", "--model-path", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "4 x 4 of 14 pixels, each 16 numbers" in out and "-4 to 3" in out
    assert "patch: 16 tokens, cls_patch: 17 tokens, full: 17 tokens" in out and "native" not in out
    assert main(["inspect", "--model-path", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"]["patch"] == 16
    assert main(["inspect", "--model-path", str(tmp_path), "--version", "qwen"]) == 2
    assert "--version qwen: is a template's name" in capsys.readouterr().err


def test_a_tower_that_can_be_shown_images_in_their_own_shape_says_so(tmp_path, capsys):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32, "patch_size": 8}
    PixtralVisionConfig(num_hidden_layers=2, **sizes).save_pretrained(tmp_path)
    assert main(["inspect", "--model-path", str(tmp_path)]) == 0
    assert "32 x 32 pixels, or in their own shape" in capsys.readouterr().out


def test_a_vision_model_that_cannot_be_a_tower_says_why(tmp_path, capsys):
    ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]).save_pretrained(tmp_path)
    assert main(["inspect", "--model-path", str(tmp_path)]) == 2
    assert "(resnet) cannot be a tower: " in capsys.readouterr().err
