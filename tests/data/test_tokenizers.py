# SPDX-License-Identifier: Apache-2.0
"""Every sort of tokenizer: the ids of its own library, its special tokens, and what survives saving."""

from __future__ import annotations

import base64
import json
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from moellava.conversation import Origin, Piece, conv_templates
from moellava.data.fast_tokenizers import CL100K_DIGITS_APART, from_sentencepiece, from_tiktoken
from moellava.data.masking import engine_for
from moellava.data.preprocess import preprocess
from moellava.data.tokenizers import TOKENIZERS, leading_ids, load_tokenizer, place_image_token, spec_for
from moellava.errors import UnknownNameError, UserError

SNIPPETS = [
    *("the ", "quick", " brown", "fox", "x", "ab", "ababab", "3", "14", "0000", "é", "e\u0301", "猫", "🐱", "ﬁ", "ß"),
    *(" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\u00a0", "----", "====", "...", "!?", "((", "_", "'s", "'S"),
    *("</s>", "<s>", "<unk>", "<0x0A>", "▁", "<|endoftext|>", "<image>"),
]
texts = st.lists(st.sampled_from(SNIPPETS), max_size=30).map("".join) | st.text(
    st.characters(exclude_categories=["Cs"])
)
many = settings(max_examples=300, deadline=None)

SAMPLE = "  Hi </s>USER: x<|endoftext|> é 🐱\n\n\ta  b <image> <|extra_0|>q <|im_end|>"


@pytest.fixture(scope="module")
def sentencepiece_model(golden_tokenizers):
    return sentencepiece.SentencePieceProcessor(model_file=str(golden_tokenizers / "mistral" / "tokenizer.model"))


@pytest.fixture(scope="module")
def llama_backend(golden_tokenizers):
    backend = from_sentencepiece(golden_tokenizers / "mistral" / "tokenizer.model")
    backend.encode_special_tokens = True
    return backend


@many
@given(text=texts)
def test_llama_ids_are_sentencepieces(llama_backend, sentencepiece_model, text):
    assert llama_backend.encode(text).ids == sentencepiece_model.encode(text)


@pytest.mark.parametrize(
    "text", [" ", "  ", "   ", " hello", "  hello", "\n", " \n", "\t", "", "=", "\u0000", "é" * 40]
)
def test_llama_ids_of_odd_texts(llama_backend, sentencepiece_model, text):
    assert llama_backend.encode(text).ids == sentencepiece_model.encode(text)


@pytest.fixture(scope="module", params=["qwen/qwen.tiktoken", "stablelm/arcade100k.tiktoken"])
def tiktoken_pair(request, golden_tokenizers):
    path = golden_tokenizers / request.param
    lines = (line.split() for line in path.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    library = tiktoken.Encoding("x", pat_str=CL100K_DIGITS_APART, mergeable_ranks=ranks, special_tokens={})
    return from_tiktoken(path, CL100K_DIGITS_APART, {"<|end|>": max(ranks.values()) + 2}), library


@many
@given(text=texts)
def test_tiktoken_ids_are_tiktokens(tiktoken_pair, text):
    backend, library = tiktoken_pair
    assert backend.encode(text).ids == library.encode_ordinary(unicodedata.normalize("NFC", text))


def test_a_hole_in_a_vocabulary_is_not_taken_by_a_new_token(tiktoken_pair):
    backend, library = tiktoken_pair
    assert backend.get_vocab_size() == library.n_vocab + 2
    assert backend.encode(" x<|end|>").ids[-1] == library.n_vocab + 1


@pytest.mark.slow
def test_phi_ids_are_codegens(golden_tokenizers, tokenizers):
    theirs = AutoTokenizer.from_pretrained(golden_tokenizers / "phi")

    @many
    @given(text=texts)
    def check(text):
        assert tokenizers["phi"](text).input_ids == theirs(text).input_ids

    check()


@pytest.mark.parametrize(
    ("name", "row", "size", "bos", "eos", "unk", "pad", "leading"),
    [
        ("mistral", "llama", 32000, 1, 2, 0, 0, [1]),
        ("qwen", "qwen1", 151851, None, 151643, 151646, 151646, []),
        ("phi", "codegen", 50296, 50256, 50256, 50295, 50295, []),
        ("stablelm", "arcade100k", 100289, 100257, 100257, 100280, 100280, []),
    ],
)
def test_special_tokens_are_those_of_the_guide(tokenizers, name, row, size, bos, eos, unk, pad, leading):
    tokenizer = tokenizers[name]
    assert spec_for(tokenizer).name == row and len(tokenizer) == size
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    assert ids == (bos, eos, unk, pad)
    assert leading_ids(tokenizer) == leading and spec_for(tokenizer).adds_bos == bool(leading)
    assert tokenizer.padding_side == "right"


def test_the_guides_llama_example_pads_with_unk(tokenizers):
    batch = tokenizers["mistral"](["This is first sentence", "Test"], padding=True)
    assert [ids[0] for ids in batch["input_ids"]] == [1, 1]
    assert batch["input_ids"][1][2:] == [0] * (len(batch["input_ids"][0]) - 2)
    assert batch["attention_mask"][1] == [1, 1] + [0] * (len(batch["input_ids"][0]) - 2)


@pytest.mark.parametrize("name", ["mistral", "qwen", "phi", "stablelm"])
def test_a_saved_tokenizer_gives_the_same_ids_with_us_and_without(tokenizers, tmp_path, name):
    tokenizers[name].save_pretrained(tmp_path)
    expected = tokenizers[name](SAMPLE).input_ids
    reopened = load_tokenizer(tmp_path)
    assert reopened(SAMPLE).input_ids == expected
    assert spec_for(reopened) == spec_for(tokenizers[name])
    for model_type in (None, "llava", "stablelm"):
        if model_type:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert AutoTokenizer.from_pretrained(tmp_path)(SAMPLE).input_ids == expected, model_type


@pytest.mark.parametrize(
    ("name", "first"), [("mistral", 32000), ("qwen", 151851), ("phi", 50296), ("stablelm", 100289)]
)
def test_image_tokens_take_the_next_ids(golden_tokenizers, tmp_path, name, first):
    tokenizer = load_tokenizer(golden_tokenizers / name)
    before = tokenizer(SAMPLE.replace("<image>", "")).input_ids
    assert place_image_token(tokenizer, 200_000) == [first]
    assert place_image_token(tokenizer, 200_000) == [first], "asking twice adds nothing"
    assert place_image_token(tokenizer, 200_000, ("<image>", "<im_start>", "<im_end>")) == [first, first + 1, first + 2]
    assert tokenizer(SAMPLE.replace("<image>", "")).input_ids == before
    assert first in tokenizer("a<image>b").input_ids
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("a<image>b").input_ids == tokenizer("a<image>b").input_ids


def test_an_embedding_smaller_than_the_tokenizer_is_refused(tokenizers):
    with pytest.raises(UserError, match="50296 tokens.*50000 rows"):
        place_image_token(tokenizers["phi"], 50_000)


def folder_with_model(golden_tokenizers: Path, folder: Path, **config) -> Path:
    shutil.copy(golden_tokenizers / "mistral" / "tokenizer.model", folder)
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_with_only_tokenizer_model_adds_bos(golden_tokenizers, tmp_path):
    tokenizer = load_tokenizer(folder_with_model(golden_tokenizers, tmp_path))
    assert tokenizer("hi</s>USER").input_ids == [1, 12014, 2, 2223, 725]


def test_add_bos_token_false_is_heard_and_kept(golden_tokenizers, tmp_path):
    folder = folder_with_model(golden_tokenizers, tmp_path, add_bos_token=False)
    load_tokenizer(folder).save_pretrained(tmp_path / "saved")
    assert load_tokenizer(folder)("hi").input_ids == load_tokenizer(tmp_path / "saved")("hi").input_ids == [12014]


def test_without_legacy_no_space_is_put_after_special_tokens(golden_tokenizers, tmp_path):
    folder = folder_with_model(golden_tokenizers, tmp_path, legacy=False)
    tokenizer = load_tokenizer(folder)
    assert tokenizer("hi</s>USER").input_ids == [1, 12014, 2, 11123]
    turns = [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "yes"}] * 2
    turns[2] = {"from": "human", "value": "and"}
    ids = preprocess([turns], tokenizer, version="v1", has_image=True)["input_ids"][0].tolist()
    end = ids.index(2)
    assert tokenizer.convert_ids_to_tokens(ids[end : end + 3]) == ["</s>", "USER", ":"]
    after_image = ids.index(-200) + 1
    assert tokenizer.convert_ids_to_tokens(ids[after_image : after_image + 2]) == ["▁", "<0x0A>"]


@pytest.mark.parametrize("recorded", ["added_tokens.json", "tokenizer_config.json"])
def test_openchats_added_terminator(golden_tokenizers, tmp_path, recorded):
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    entries = {"32000": {"content": "<|end_of_turn|>", **flags}, "32001": {"content": "<|pad_0|>", **flags}}
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|end_of_turn|>"}
    if recorded == "added_tokens.json":
        (tmp_path / recorded).write_text(json.dumps({"<|end_of_turn|>": 32000, "<|pad_0|>": 32001}))
    else:
        config["added_tokens_decoder"] = entries
    tokenizer = load_tokenizer(folder_with_model(golden_tokenizers, tmp_path, **config), "openchat")
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "ends with <|end_of_turn|>"}]
    batch = preprocess([turns], tokenizer, version="openchat")
    labels = batch["labels"][0].tolist()
    assert labels[-1] == 32000 and labels.count(32000) == 1
    assert place_image_token(tokenizer, 32002) == [32002]


def test_an_added_token_that_would_get_another_id_is_refused(golden_tokenizers, tmp_path):
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end_of_turn|>": 32005}))
    with pytest.raises(UserError, match="<|end_of_turn|>.*32005.*32000"):
        load_tokenizer(folder_with_model(golden_tokenizers, tmp_path))


def test_a_tokenizer_json_of_transformers_opens(golden_tokenizers, tmp_path):
    LlamaTokenizer.from_pretrained(golden_tokenizers / "mistral").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, "v1")
    assert not (tmp_path / "tokenizer.model").exists()
    assert tokenizer("hi</s>USER").input_ids == [1, 12014, 2, 2223, 725]
    assert tokenizer.pad_token == "<unk>"


def test_a_qwen2_tokenizer_needs_no_new_tokens(golden_tokenizers, tmp_path, tokenizers):
    tokenizers["qwen"].backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path, "qwen")
    assert spec_for(tokenizer).name == "qwen2" and len(tokenizer) == 151851
    assert tokenizer.pad_token_id == 151643 and leading_ids(tokenizer) == []
    assert tokenizer(SAMPLE).input_ids == tokenizers["qwen"](SAMPLE).input_ids


MODELS = {
    "identity": {},
    "no-prefix": {"add_dummy_prefix": False},
    "symbols": {"user_defined_symbols": ["<sym>", "the"]},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_other_sentencepiece_models(tmp_path, options):
    lines = (Path(__file__).parents[2] / "docs" / "CUSTOM.md").read_text(encoding="utf-8").splitlines()
    settings_ = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in lines if line.strip()),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=900,
        minloglevel=2,
        **settings_ | options,
    )
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(tmp_path)
    engine = engine_for(tokenizer)

    @settings(max_examples=150, deadline=None)
    @given(text=st.lists(st.sampled_from([*SNIPPETS, "<sym>", "the"]), max_size=12).map("".join))
    def check(text):
        # A byte's spelling that stands alone behind a symbol is read as the byte: known, and told from all else here.
        assume(not re.search(r"(<sym>|the)<0x[0-9A-F]{2}>($|<sym>|the)", text))
        ids = engine.encode([Piece(text, origin=Origin.ANSWER)]).ids[1:]
        assert ids == library.encode(text)

    check()


def test_a_vocabulary_that_merges_into_its_special_token(tmp_path):
    vocab = {text: index for index, text in enumerate(["<unk>", "</s>", "<", "/", "s", ">", "</", "s>", "a"])}
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    pieces = [Piece("</s>a", True, Origin.ANSWER), Piece("</s>", True)]
    assert engine_for(tokenizer).encode(pieces).ids == [6, 7, 8, 1]


def test_a_saved_folder_opens_where_its_row_is_unknown(tokenizers, tmp_path):
    tokenizers["phi"].save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"codegen"', '"acme"'))
    tokenizer = load_tokenizer(tmp_path)
    assert spec_for(tokenizer).name == "fast" and tokenizer.pad_token == "<|extra_0|>"


def test_every_row_names_known_templates():
    for spec in TOKENIZERS.values():
        assert all(version in conv_templates for version in spec.versions)


def test_errors_say_what_is_wrong(tmp_path, golden_tokenizers):
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="there is no such folder"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(UnknownNameError, match="stablelm"):
        load_tokenizer(golden_tokenizers / "phi", "stabelm")
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "QWenTokenizer"}')
    (tmp_path / "qwen.tiktoken").write_text("no ranks here\n")
    with pytest.raises(UserError, match="not a tiktoken file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json is not valid JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "not recorded"])
def test_a_tokenizer_json_wins_over_a_tokenizer_model_beside_it_where_they_differ(
    recorded, golden_tokenizers, tmp_path
):
    """Added tokens are in the first alone, under ids that the second would give to others."""
    folder = shutil.copytree(golden_tokenizers / "mistral", tmp_path / "both")
    same = load_tokenizer(folder)
    same.backend_tokenizer.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder)("Hello there").input_ids == same("Hello there").input_ids
    trained = load_tokenizer(folder)
    trained.add_tokens(["<pad>", "<tool>"], special_tokens=True)
    trained.backend_tokenizer.save(str(folder / "tokenizer.json"))
    if recorded:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        entries = {str(index): {"content": text, "special": True} for text, index in trained.get_added_vocab().items()}
        entries["32005"] = {"content": "<tool>", "special": True}  # as a tool that renumbers them writes
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": entries}))
    opened = load_tokenizer(folder)
    assert opened.convert_tokens_to_ids(["<pad>", "<tool>"]) == trained.convert_tokens_to_ids(["<pad>", "<tool>"])
