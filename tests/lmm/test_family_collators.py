# SPDX-License-Identifier: Apache-2.0
"""Architectures whose models want more: PaliGemma's prefix, Llama 3.2 Vision's cross-attention."""

import pytest
import torch
from PIL import Image

from moellava.constants import IGNORE_INDEX
from moellava.data.render.chat import parts_of_text
from moellava.errors import DataError, UserError
from moellava.lmm.architectures.llama_3_2_vision import spans_read
from tests.lmm.tiny import batch_of
from tests.older import marked


def record(images, question, answer="A fractal."):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": question, "image": [f"{number}.png" for number in range(images)], "conversations": turns}


def rendered(processor, turns):
    parts = [
        [
            {"type": name} if name == "image" else {"type": name, "text": text}
            for name, text in parts_of_text(turn["value"], True)
        ]
        for turn in turns
    ]
    messages = [{"role": role, "content": content} for role, content in zip(("user", "assistant"), parts, strict=True)]
    return processor.apply_chat_template(messages, tokenize=False)


def opened_images(pictures, count):
    return [Image.open(path).convert("RGB") for path in pictures[:count]]


@pytest.mark.parametrize("count", [1, 2])
def test_paligemma_gets_what_its_processor_makes_of_a_suffix(count, samples_of, pictures):
    dataset = samples_of("paligemma", [record(count, "<image>" * count + "\nWhat is it?")])
    batch = batch_of("paligemma", dataset, 0)
    processor = dataset.encoder.reader.processor
    text = "<image>" * count + "What is it?"
    expected = processor(
        text=[text], suffix=["A fractal."], images=[opened_images(pictures, count)], return_tensors="pt"
    )
    assert set(batch) == set(expected)
    for name in expected:
        assert torch.equal(batch[name], expected[name]), name


def test_paligemma_reads_on_from_left_to_right_after_the_first_answer(samples_of):
    dataset = samples_of("paligemma")
    batch = batch_of("paligemma", dataset, 0, 1, 2)
    for types, labels, attended in zip(
        batch["token_type_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True
    ):
        first = int((labels != IGNORE_INDEX).nonzero()[0])
        assert not types[:first].any() and types[first:][attended[first:]].all() and not types[~attended].any()


def test_paligemma_does_not_train_on_what_reads_itself(samples_of):
    with pytest.raises(UserError, match="--mask_question_tokens False .* both directions"):
        batch_of("paligemma", samples_of("paligemma"), 0, train_questions=True)


def test_an_image_alone_is_a_question(samples_of):
    dataset = samples_of("paligemma", [record(1, "<image>")])
    shown = batch_of("paligemma", dataset, 0)["input_ids"][0]
    assert dataset.encoder.tokenizer.decode(shown) == "<image>" * 4 + "<bos>\nA fractal.<eos>"


def test_llama_3_2_gets_what_its_processor_makes_of_a_batch(samples_of, pictures):
    """Rows with one, two apart, and two adjoining images; the processor pads them as the collator does."""
    records = [
        record(1, "<image>\nWhat is it?"),
        record(2, "First <image> then <image> which?"),
        record(2, "<image><image>\nWhich of them?", "The second."),
    ]
    dataset = samples_of("llama-3.2-vision", records)
    processor = dataset.encoder.reader.processor
    batch = batch_of("llama-3.2-vision", dataset, 0, 1, 2)
    text = [rendered(processor, turns["conversations"]) for turns in records]
    images = [opened_images(pictures, count) for count in (1, 2, 2)]
    expected = processor(text=text, images=images, padding=True, return_tensors="pt", add_special_tokens=False)
    assert batch["cross_attention_mask"].shape[2:] == (2, 4)
    assert set(batch) == set(expected) | {"labels"}
    for name in expected:
        assert torch.equal(batch[name], expected[name]), name


def test_spans_of_images():
    assert spans_read([], 8) == []
    assert spans_read([2], 8) == [(2, 8)]
    assert spans_read([0, 3], 8) == [(0, 3), (3, 8)]
    assert spans_read([0, 1, 4, 5], 8) == [(0, 4), (1, 4), (4, 8), (5, 8)]


def test_llama_3_2_rows_read_their_own_images_alone(samples_of, opened, tiny_lmm):
    """A row without images computes what Hugging Face's class computes without any; one with images, what it computes
    for that row alone, the text before its first image included."""
    from transformers import MllamaForConditionalGeneration

    theirs = MllamaForConditionalGeneration.from_pretrained(tiny_lmm("llama-3.2-vision"), dtype=torch.float32).eval()
    ours = opened("llama-3.2-vision").model
    dataset = samples_of("llama-3.2-vision")
    one, two, text_alone = (batch_of("llama-3.2-vision", dataset, number) for number in range(3))
    together = batch_of("llama-3.2-vision", dataset, 0, 1, 2)
    ids = dataset[2]["input_ids"][None]
    with torch.no_grad():
        logits = ours(**together).logits
        torch.testing.assert_close(logits[1], theirs(**together).logits[1], rtol=1e-5, atol=1e-6)
        for row, batch in enumerate((one, two)):
            expected = theirs(**batch).logits[0]
            torch.testing.assert_close(logits[row, : len(expected)], expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(ours(**batch).logits[0], expected, rtol=1e-5, atol=1e-6)
        text = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        torch.testing.assert_close(logits[2, : len(text)], text, rtol=1e-5, atol=1e-6)
        alone = ours(**text_alone).logits[0]
        torch.testing.assert_close(alone[: len(text)], text, rtol=1e-5, atol=1e-6)
        together["pixel_values"][0] = 1 - together["pixel_values"][0]
        changed = (ours(**together).logits - logits).abs().amax(dim=(1, 2))
    assert changed[0] > 1e-4 and not changed[1:].any()


@pytest.mark.parametrize("family_id", marked(["llama-3.2-vision", "paligemma", "smolvlm"]))
def test_a_rank_without_images_has_a_gradient_for_every_part(family_id, samples_of, opened):
    dataset, model = samples_of(family_id), opened(family_id).model
    model.zero_grad()
    model(**batch_of(family_id, dataset, 0)).loss.backward()
    with_image = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**batch_of(family_id, dataset, 2)).loss.backward()
    without = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert set(without) == with_image
    parts = ("vision", "connector", "projector", "cross_attn")
    assert not any(gradient.any() for name, gradient in without.items() if any(part in name for part in parts))


OWN_TEMPLATE = (
    "{{ bos_token }}{%- set system = '' %}"
    "{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{%- set seen = namespace(images=false) %}"
    "{%- for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set seen.images = true %}{% endif %}{% endfor %}{% endfor %}"
    "{%- if seen.images and system %}{{ raise_exception('no images beside a system message') }}{% endif %}"
    "{%- if not seen.images %}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday\n\n' + system + '<|eot_id|>' }}"
    "{% endif %}{%- for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- for part in message['content'] %}{{ '<|image|>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""Built like the one beside Llama 3.2 Vision: text alone opens with a system message, text with images does not."""


def test_a_template_that_opens_text_and_images_differently(samples_of):
    text = {"id": "t", "conversations": record(0, "Hi.")["conversations"]}
    records = [record(1, "<image>\nWhat is it?"), text, text | {"system_prompt": "Be brief."}]
    dataset = samples_of("llama-3.2-vision", records, template=OWN_TEMPLATE)
    decode = dataset.encoder.tokenizer.decode
    shown = [decode([token for token in sample["input_ids"].tolist() if token >= 0]) for sample in dataset]
    assert [said.replace(" ", "").count("Today") for said in shown] == [0, 1, 1]
    assert "Be brief.<|eot_id|>" in shown[2] and "{" not in shown[2]
    both = record(1, "<image>\nWhat is it?") | {"system_prompt": "Be brief."}
    with pytest.raises(DataError, match="(?s)Record <image>.*no images beside a system message") as refused:
        samples_of("llama-3.2-vision", [both, text, both], template=OWN_TEMPLATE)
    assert len(refused.value.problems) == 2
