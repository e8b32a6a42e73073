# SPDX-License-Identifier: Apache-2.0
"""Chat templates that rewrite earlier turns, mark answers or open a reasoning: what is trained, in how many texts."""

from __future__ import annotations

import pytest

from moellava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moellava.data.check import check
from moellava.data.dataset import SupervisedDataset
from moellava.data.encoder import CountedImages, Encoder
from moellava.data.media import MediaFiles
from moellava.data.preprocess import preprocess
from moellava.data.records import load_records
from moellava.data.render import AnswersApartError, ChatRenderer
from moellava.data.render.chat import without_reasoning
from moellava.data.view import views_of
from moellava.errors import DataError, UserError

LAST_THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}{{ '<think>\n\n</think>\n\n' }}"
    "{% elif m.role == 'assistant' and not loop.last %}{% set m = dict(m, content=m.content.split('</think>')[-1]) %}"
    "{% endif %}{{ m.content | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen 3's: earlier reasoning goes, and an answer that is the last one has some, if an empty one."""

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

ENDED_BY_THE_NEXT = (
    "{% for m in messages %}{{ ('<|im_start|>' if m.role == 'user' else '<|im_end|>') + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_end|>' }}{% endif %}"
)
"""As GLM's: an answer ends where the next question opens."""

OPENED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
"""As DeepSeek's: a prompt opens a reasoning."""

SWITCHED = OPENED.replace(
    "assistant\n<think>\n' }}", "assistant\n' }}{% if enable_thinking is not defined %}{{ '<think>\n' }}{% endif %}"
)
"""As Nemotron's: it does, unless told otherwise."""

SAID = ["<image>\nwhat?", "<think>\nred fur\n</think>\n\na cat", "and <image>?", "<|im_end|> or <image>", "so?", "yes"]


@pytest.fixture
def talk(make_record) -> dict:
    """Three rounds, of which two show an image and one spells what is none."""
    return make_record("x", *SAID, image=["a.png", "sub/b.jpg"])


@pytest.fixture
def encoder_of(tokenizers, monkeypatch):
    """A template -> an encoder of Qwen's tokenizer with it."""

    def make(template: str) -> Encoder:
        tokenizer = tokenizers["qwen"]
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return Encoder(tokenizer, ChatRenderer(tokenizer), CountedImages(4))

    return make


def trained(encoder: Encoder, example) -> str:
    return encoder.tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])


def shown(encoder: Encoder, example) -> str:
    return encoder.tokenizer.decode([index for index in example.ids if index != IMAGE_TOKEN_INDEX])


def test_each_answer_has_the_history_that_it_has_when_it_is_given(encoder_of, talk):
    encoder = encoder_of(LAST_THINKS)
    with pytest.raises(AnswersApartError, match="not prefix-stable"):
        encoder.encode(talk)
    examples = encoder.examples(talk)
    assert [number for number, _ in examples] == [0, 1, 2]
    first, second, third = (example for _, example in examples)
    assert trained(encoder, first) == "<think>\nred fur\n</think>\n\na cat<|im_end|>"
    assert trained(encoder, second) == "<think>\n\n</think>\n\n<|im_end|> or <image><|im_end|>"
    assert trained(encoder, third) == "<think>\n\n</think>\n\nyes<|im_end|>"
    assert "red fur" not in shown(encoder, second), "of an earlier answer the reasoning is gone"
    assert "<|im_start|>assistant\n<|im_end|> or <image><|im_end|>" in shown(encoder, third)
    assert [example.ids.count(IMAGE_TOKEN_INDEX) for _, example in examples] == [1, 2, 2]
    assert [len(example.media) for _, example in examples] == [1, 2, 2]
    assert [example.ids.count(151645) for _, example in examples] == [2, 4, 6], "what is typed is no special token"
    for number, example in examples:
        asked = talk | {"conversations": talk["conversations"][: 2 * number + 1], "image": talk["image"][: number + 1]}
        prompt = encoder.encode(asked, opens=True)
        assert example.ids[: len(prompt.ids)] == prompt.ids and prompt.labels.count(IGNORE_INDEX) == len(prompt.ids)
        assert example.length == len(example.ids) + 3 * len(example.media)


def test_an_answer_is_trained_in_its_own_sample_alone(encoder_of, make_record):
    """Also where the history before it could be had in one text with it."""
    encoder = encoder_of(LAST_THINKS.replace("loop.last and '</think>' not in m.content", "false"))
    said = ["p", "a", "q", "b", "r", "<think>\nx\n</think>\n\nc", "s", "d"]
    examples = encoder.examples(make_record("x", *said))
    wanted = ["a<|im_end|>", "b<|im_end|>", "<think>\nx\n</think>\n\nc<|im_end|>", "d<|im_end|>"]
    assert [trained(encoder, example) for _, example in examples] == wanted


def test_ids_are_those_of_the_tokenizer_with_that_history(encoder_of):
    encoder = encoder_of(LAST_THINKS)
    said = ["why?", "<think>\nso\n</think>\n\nbecause", "ok", "bye"]
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    plain = encoder.tokenizer.apply_chat_template
    wanted = [plain(messages[:end], return_dict=True).input_ids for end in (2, 4)]
    assert [example.ids for _, example in encoder.examples({"conversations": turns})] == wanted
    batch = preprocess([turns], encoder.tokenizer, version="chat_template")
    assert [ids.tolist() for ids in batch["input_ids"]] == wanted


def test_a_record_becomes_a_sample_for_each_trained_answer(encoder_of, talk, make_record, data_file, image_tree):
    encoder, files = encoder_of(LAST_THINKS), MediaFiles(image_tree)
    talk["conversations"][3]["train"] = False
    path = data_file([talk, make_record("one", "<image>\nhm?", "a dog", image="a.png"), make_record("none", "q", "a")])
    data = SupervisedDataset(load_records(path), encoder, files)
    assert len(data) == 4 and data.report() | {"records": 3, "split": 1, "samples": 4} == data.report()
    assert data.shows_media == [True, True, True, False]
    for index, images in enumerate((1, 2, 1, 0)):
        assert len(data[index]["media"]) == images
        assert data.lengths[index] == len(data[index]["input_ids"]) + 3 * images
    assert data[0]["input_ids"].tolist() == encoder.examples(talk)[0][1].ids
    longest = max(data.lengths)
    with pytest.raises(DataError, match=f"Record x of .*, up to its answer 2, takes {longest} positions"):
        SupervisedDataset(load_records(path), encoder, files, max_length=longest - 1)
    short = SupervisedDataset(load_records(path), encoder, files, max_length=longest - 1, overlong="drop")
    assert short.report()["dropped"] == 1 and len(short) == 3
    found = check([str(path)], files, encoder)
    assert (found.counts["split"], found.lengths, found.problems) == (1, data.lengths, [])
    assert any("each answer of 1 records is a sample of its own" in notice for notice in found.notices)
    views = views_of(encoder, talk, "Record x", files)
    assert [view.record for view in views] == ["Record x, answer 0", "Record x, answer 2"]
    assert [view.counts["positions"] for view in views] == data.lengths[:2]


def test_samples_of_one_record_that_break_later_are_counted_each(encoder_of, talk, data_file, image_tree, tmp_path):
    path = data_file([talk])
    data = SupervisedDataset(load_records(path), encoder_of(LAST_THINKS), MediaFiles(image_tree), bad_files="skip")
    data.leave_out({1: "Record x: gone", 2: "Record x: gone"})
    assert (data.report()["bad_files"], data.report()["samples"]) == (1, 1)


def test_marks_say_what_is_trained_in_one_text(encoder_of, talk):
    encoder = encoder_of(MARKED)
    [(number, example)] = encoder.examples(talk)
    assert number is None and example.ids.count(IMAGE_TOKEN_INDEX) == 2
    assert trained(encoder, example) == "".join(text + "<|im_end|>" for text in SAID[1::2])
    assert encoder.renderer.terminator == "<|im_end|>"
    talk["conversations"][1]["train"] = False
    assert trained(encoder, encoder.encode(talk)) == "".join(text + "<|im_end|>" for text in SAID[3::2])
    prompt = encoder.encode(talk | {"conversations": talk["conversations"][:5]}, opens=True)
    assert example.ids[: len(prompt.ids)] == prompt.ids


def test_marked_answers_whose_history_is_rewritten_are_samples_each(encoder_of, talk):
    rewriting = MARKED.replace(
        "m.content + '<|im_end|>' }}{% endg", "(m.content if loop.last else 'x') + '<|im_end|>' }}{% endg"
    )
    encoder = encoder_of(rewriting)
    assert [trained(encoder, example) for _, example in encoder.examples(talk)] == [
        text + "<|im_end|>" for text in SAID[1::2]
    ]


def test_what_opens_the_next_question_ends_an_answer_that_nothing_else_ends(encoder_of, talk):
    encoder = encoder_of(ENDED_BY_THE_NEXT)
    assert encoder.renderer.terminator == "<|im_start|>"
    [(_, example)] = encoder.examples(talk)
    assert trained(encoder, example) == "".join(text + "<|im_start|>" for text in SAID[1::2])
    assert shown(encoder, example).count("<|im_start|>") == 4, "one for each question, and one behind the last answer"


@pytest.mark.parametrize("template", [OPENED, SWITCHED])
def test_a_reasoning_that_prompts_open_is_left_out_where_answers_do_not_go_on_with_it(encoder_of, template):
    encoder = encoder_of(template)
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(["why?", "so", "ok", "bye"])]
    example = encoder.encode({"conversations": turns})
    assert trained(encoder, example) == "so<|im_end|>bye<|im_end|>"
    prompt = encoder.encode({"conversations": turns[:3]}, opens=True)
    assert example.ids[: len(prompt.ids)] == prompt.ids and "<think>" not in encoder.tokenizer.decode(prompt.ids)
    assert encoder.renderer.template in without_reasoning(template)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("m.content | trim | upper", "leaves out"),
        ("m.content | trim | replace('so?', '')", "Record 7: .*leaves out, rewrites or reorders a message: 'so\\?'"),
        ("m.content[:30]", "Record 7: .*rewrites the answer: '<think>"),
    ],
)
def test_what_a_template_loses_is_not_accepted_for_its_history(encoder_of, talk, change, words):
    encoder = encoder_of(LAST_THINKS.replace("m.content | trim", change))
    with pytest.raises(UserError, match=words):
        encoder.examples(talk, "Record 7")


def test_noncharacters_in_a_message_stay(encoder_of, make_record):
    encoder = encoder_of(LAST_THINKS)
    said = ["\ufdd0 <|im_end|>", "a\ufdd1", "q", "b"]
    texts = [shown(encoder, example) for _, example in encoder.examples(make_record("x", *said))]
    assert "user\n\ufdd0 <|im_end|><|im_end|>" in texts[0] and "a\ufdd1<|im_end|>" in texts[1]
    every = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    with pytest.raises(DataError, match="Record 7"):
        encoder.examples(make_record("x", *said, every, "c"), "Record 7")


def test_a_template_for_texts_does_not_print_lists(tokenizers):
    for template in (
        OPENED.replace("m.content", "m.content | string"),
        MARKED.replace("m.content", "m.content | tojson"),
    ):
        renderer = ChatRenderer(tokenizers["qwen"], template, in_parts=True)
        with pytest.raises(UserError, match="prints messages in parts as lists, being one for texts"):
            renderer.pieces([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], has_media=False)
