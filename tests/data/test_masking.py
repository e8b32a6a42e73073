# SPDX-License-Identifier: Apache-2.0
"""Properties of the masking engine over random conversations, all templates and all tokenizers."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moellava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moellava.conversation import Origin, Piece, conv_templates
from moellava.data.encoder import CountedImages, Encoder
from moellava.data.masking import Encoded, MaskEngine, engine_for, labels_of
from moellava.data.preprocess import encode_conversation
from moellava.data.render import TemplateRenderer
from moellava.data.tokenizer_facts import mask_problem
from moellava.data.tokenizers import load_tokenizer, place_image_token

TOKENIZERS = ("mistral", "qwen", "phi", "stablelm")
VERSIONS = sorted({conv_templates[name].version for name in conv_templates})

SNIPPETS = [
    *("a", "cat", "The sky", "red.", "3.14", "x = [1, 2]", "naïve", "é", "e\u0301", "猫", "🐱", "👨‍👩‍👧", "ﬁ"),
    *(" ", "  ", "\n", "\n\n", "\t", " \n ", "\r\n", "\u00a0", "\u200b"),
    *("</s>", "<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|reg0|>", "<image>", "<unk>"),
    *("###", "USER:", " ASSISTANT: ", "[INST]", "[/INST]", "<<SYS>>", ":", "<", ">", "|", "</", "▁"),
]
texts = st.lists(st.sampled_from(SNIPPETS), max_size=8).map("".join) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=12
)
plain_texts = texts.map(lambda text: text.replace("<image>", "<img>").replace("▁", "_"))
quick = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def conversations(draw, text=plain_texts, most_rounds: int = 3) -> list[dict[str, str]]:
    """Questions and answers in turn; the first answer is not empty."""
    rounds = draw(st.lists(st.tuples(text, text), min_size=1, max_size=most_rounds))
    turns = [(("human", question), ("gpt", answer)) for question, answer in rounds]
    return [{"from": role, "value": value} for pair in turns for role, value in pair]


def encoded_whole(*args, **options) -> Encoded:
    """A conversation of a template that has one text for all answers."""
    [encoded] = encode_conversation(*args, **options)
    return encoded


def is_plain(version: str) -> bool:
    return TemplateRenderer(version).is_plain


def turns_for(version: str, conversation: list[dict[str, str]]) -> list[dict[str, str]]:
    return conversation[:2] if is_plain(version) else conversation


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("version", VERSIONS)
@quick
@given(conversation=conversations())
def test_the_labels_decode_to_the_answers_and_their_terminators(tokenizers, name, version, conversation):
    turns = turns_for(version, conversation)
    pieces = TemplateRenderer(version).pieces(turns, has_media=False)
    encoded = encoded_whole(turns, tokenizers[name], version, has_image=False)
    assert mask_problem(tokenizers[name], pieces, encoded) is None


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("version", VERSIONS)
@quick
@given(conversation=conversations(text=texts))
def test_typed_special_tokens_are_text(tokenizers, name, version, conversation):
    tokenizer, turns = tokenizers[name], turns_for(version, conversation)
    ids = encoded_whole(turns, tokenizer, version, has_image=False).ids
    silent = [{**turn, "value": "x"} for turn in turns]
    expected = encoded_whole(silent, tokenizer, version, has_image=False).ids
    special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for text, index in special.items():
        assert ids.count(index) == expected.count(index), text
    assert IMAGE_TOKEN_INDEX not in ids or is_plain(version)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("version", VERSIONS)
@quick
@given(conversation=conversations(), images=st.integers(0, 2))
def test_another_turn_never_changes_what_came_before(tokenizers, name, version, conversation, images):
    if is_plain(version):
        conversation = conversation[:2]
    conversation[0]["value"] = "<image>" * images + conversation[0]["value"]
    tokenizer = tokenizers[name]
    whole = encoded_whole(conversation, tokenizer, version, images > 0)
    assert whole.ids.count(IMAGE_TOKEN_INDEX) == images
    for end in range(2, len(conversation), 2):
        part = encoded_whole(conversation[:end], tokenizer, version, images > 0)
        assert whole.ids[: len(part.ids)] == part.ids
        assert whole.labels[: len(part.labels)] == part.labels


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("version", VERSIONS)
@quick
@given(conversation=conversations())
def test_a_prompt_is_what_training_saw_up_to_the_answer(tokenizers, name, version, conversation):
    if is_plain(version):
        conversation = [{"from": "human", "value": "<image>"}, *conversation[1:2]]
    encoder = Encoder(tokenizers[name], TemplateRenderer(version), CountedImages(1))
    shown = {"image": "a.png"} if is_plain(version) else {}
    trained = encoder.encode({"conversations": conversation, **shown})
    prompt = encoder.encode({"conversations": conversation[:-1], **shown}, opens=True).ids
    assert trained.ids[: len(prompt)] == prompt
    assert set(trained.labels[len(prompt) :]) != {IGNORE_INDEX}
    assert IGNORE_INDEX not in trained.labels[len(prompt) :]


@pytest.mark.parametrize("name", TOKENIZERS)
@quick
@given(conversation=conversations(text=texts))
def test_pieces_join_to_the_ids(tokenizers, name, conversation):
    engine = engine_for(tokenizers[name])
    pieces = TemplateRenderer("v1").pieces(conversation, has_media=True)
    ids = list(engine.leading)
    for stretch in engine.stretches(pieces, has_image=True):
        ids += engine.tokenize(stretch)[0] if stretch.ids is None else stretch.ids
    assert ids == engine.encode(pieces, has_image=True).ids


class Listened:
    """A tokenizer that notes the texts it is given."""

    def __init__(self, tokenizer: Tokenizer, heard: list[str]) -> None:
        self.tokenizer, self.heard = tokenizer, heard

    def encode(self, text: str, **options) -> object:
        self.heard.append(text)
        return self.tokenizer.encode(text, **options)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_character_is_tokenized_once_and_a_templates_own_text_never_again(tokenizers, name):
    """Where no token straddles a border: at one that is straddled, what lies on its two sides is tokenized anew."""
    engine, heard = MaskEngine(tokenizers[name]), []
    engine._twins = tuple(Listened(twin, heard) for twin in engine._twins)
    in_one_go = 0
    for version in VERSIONS:
        told = []
        for said in ("a cat on a mat", "the dog, of course"):
            turns = turns_for(version, [{"from": "human", "value": f"{said}?"}, {"from": "gpt", "value": said}] * 3)
            pieces = TemplateRenderer(version).pieces(turns, has_media=False)
            heard.clear()
            engine.encode(pieces)
            told.append(heard.copy())
            texts = [stretch for stretch in engine.stretches(pieces) if stretch.ids is None]
            borders = 2 * sum(len(stretch.trained) for stretch in texts)
            assert len(heard) <= len(texts) + 2 * borders, version
            if len(heard) <= len(texts):
                in_one_go += 1
                assert sum(map(len, heard)) <= sum(len(stretch.text) for stretch in texts), version
        assert not {*told[0]} & {*told[1]}, f"{version}: text of the template alone is kept"
    assert in_one_go >= 2 * len(VERSIONS) - 8, "few templates and tokenizers are not made for each other"


def test_a_token_belongs_to_the_range_it_begins_in():
    offsets = [(0, 2), (2, 3), (3, 3), (3, 6), (6, 7)]
    assert labels_of([1, 2, 3, 4, 5], offsets, [(2, 3), (4, 7)]) == [-100, 2, -100, -100, 5]
    assert labels_of([1, 2, 3, 4, 5], offsets, []) == [-100] * 5


def test_text_is_cut_where_a_token_would_straddle_a_border(tokenizers):
    engine = engine_for(tokenizers["qwen"])
    pieces = [Piece("answer:\n"), Piece("\nyes", True, Origin.ANSWER), Piece("|>", True), Piece("<|user"), Piece("x")]
    joined = tokenizers["qwen"]("answer:\n\nyes|><|userx").input_ids
    encoded = engine.encode(pieces)
    assert encoded.ids != joined
    supervised = [label for label in encoded.labels if label != IGNORE_INDEX]
    assert tokenizers["qwen"].decode(supervised) == "\nyes|>"
    assert tokenizers["qwen"].decode(encoded.ids) == "answer:\n\nyes|><|userx"


def test_wrapped_images(golden_tokenizers):
    tokenizer = load_tokenizer(golden_tokenizers / "phi")
    image, start, end = place_image_token(tokenizer, 51200, ("<image>", "<im_start>", "<im_end>"))
    turns = [{"from": "human", "value": "<image>\nhi <im_start>"}, {"from": "gpt", "value": "<im_end>"}]
    ids = encoded_whole(turns, tokenizer, "phi", True, (start, IMAGE_TOKEN_INDEX, end)).ids
    where = ids.index(IMAGE_TOKEN_INDEX)
    assert ids[where - 1 : where + 2] == [start, IMAGE_TOKEN_INDEX, end]
    assert ids.count(start) == ids.count(end) == 1
    assert image not in ids


def test_the_engine_follows_tokens_that_are_added(golden_tokenizers):
    tokenizer = load_tokenizer(golden_tokenizers / "mistral")
    before = encoded_whole(
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], tokenizer, "openchat", False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end_of_turn|>"]})
    after = encoded_whole(
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], tokenizer, "openchat", False
    )
    assert after.ids[-1] == 32000 == after.labels[-1]
    assert len(before.ids) > len(after.ids)


def test_special_tokens_that_are_typed_are_text_for_a_unigram_tokenizer_too():
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in "helo</>s▁")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text, _ in pieces[:3]])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    said = Piece("hello </s>", trained=True, origin=Origin.ANSWER)
    encoded = engine_for(tokenizer).encode([said, Piece("</s>", trained=True)])
    assert encoded.ids.count(2) == 1 and encoded.ids[-1] == 2
    assert "".join(tokenizer.convert_ids_to_tokens(encoded.ids[:-1])).endswith("hello▁</s>")
