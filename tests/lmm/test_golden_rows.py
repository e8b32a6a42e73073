# SPDX-License-Identifier: Apache-2.0
"""Golden rows of every architecture: what is rendered, its ids, and what of it is trained.

`tests/golden/released.jsonl` is written by

    pytest tests/lmm/test_golden_rows.py --write-goldens

after a deliberate change; look at the difference before you commit it. Ids that repeat are kept as [id, times].
`tests/lmm/tiny.py` says by hand what the prompts of the models' own pages look like, so that a row cannot be wrong
unnoticed.
"""

import itertools
import json
from pathlib import Path

import pytest

from moellava.constants import IGNORE_INDEX
from moellava.lmm.architecture import ARCHITECTURES
from tests.lmm.tiny import TINY, batch_of

GOLDEN = Path(__file__).parents[1] / "golden" / "released.jsonl"

CASES = {
    "image": {
        "image": "0.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A fractal."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    },
    "images": {
        "image": ["0.png", "1.png"],
        "conversations": [
            {"from": "human", "value": "First <image> then <image> which is larger?"},
            {"from": "gpt", "value": "The second."},
        ],
    },
    "text": {
        "system_prompt": "Be brief.",
        "conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}],
    },
}


def packed(ids):
    """Ids with those that repeat more than three times as [id, times]."""
    rows = [(token, len(list(same))) for token, same in itertools.groupby(ids)]
    return [entry for token, times in rows for entry in ([[token, times]] if times > 3 else [token] * times)]


def text_of(dataset, record):
    """As the template renders it: no placeholder is spelled out yet."""
    shown = {"has_media": "image" in record, "system": record.get("system_prompt")}
    return "".join(piece.text for piece in dataset.encoder.renderer.pieces(record["conversations"], **shown))


def row_of(family_id, case, samples_of):
    record = {"id": case, **CASES[case]}
    dataset = samples_of(family_id, [record], image_folder=Path())
    whole = batch_of(family_id, dataset, 0)
    batch = {name: whole[name][0] for name in ("input_ids", "labels", "attention_mask")}
    kept = batch["attention_mask"].bool()
    trained = batch["labels"][batch["labels"] != IGNORE_INDEX]
    return {
        "family": family_id,
        "case": case,
        "text": text_of(dataset, record),
        "ids": packed(batch["input_ids"][kept].tolist()),
        "trained": dataset.encoder.tokenizer.decode(trained),
    }


def golden_rows():
    lines = GOLDEN.read_text(encoding="utf-8").splitlines() if GOLDEN.exists() else []
    return {(row["family"], row["case"]): row for row in map(json.loads, lines)}


@pytest.mark.parametrize("family_id", list(ARCHITECTURES))
def test_rows_are_what_they_were(family_id, samples_of, pictures, monkeypatch, request):
    monkeypatch.chdir(pictures[0].parent)  # Qwen-VL's ids hold paths
    rows = [row_of(family_id, case, samples_of) for case in CASES]
    golden = golden_rows()
    if request.config.getoption("--write-goldens"):
        golden |= {(family_id, row["case"]): row for row in rows}
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in golden.values()]
        GOLDEN.write_text("".join(lines), encoding="utf-8")
    assert rows == [golden[family_id, case] for case in CASES]


@pytest.mark.parametrize("family_id", list(ARCHITECTURES))
def test_prompts_are_those_of_the_models_own_pages(family_id, samples_of):
    record = {"image": "0.png", "conversations": CASES["image"]["conversations"][:2]}
    dataset = samples_of(family_id, [{"id": "one", **record}])
    assert text_of(dataset, record) == TINY[family_id].prompt


def test_smolvlm_speaks_as_its_processor_does(samples_of):
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    for record in CASES.values():
        shown = {"id": "x", **record}
        dataset = samples_of("smolvlm", [shown])
        assert text_of(dataset, record) == text_of(
            samples_of("smolvlm", [shown], template=DEFAULT_CHAT_TEMPLATE), record
        )


@pytest.mark.parametrize(
    ("text_type", "special", "opening"),
    [("mistral", [], "[INST] "), ("llama", ["<|im_end|>"], "<|im_start|>user\n"), ("llama", ["</s>"], "USER: ")],
)
@pytest.mark.parametrize("family_id", ["llava-1.6", "llava-next-video"])
def test_models_of_one_architecture_speak_as_their_language_models_do(family_id, text_type, special, opening, opened):
    """Over Mistral, over Yi (34B) and over Vicuna."""
    template = ARCHITECTURES[family_id].template_for(text_type, special)
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": parts}]
    text = opened("llava-1.5").processor.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert f"{opening}<image>\nWhat is it?" in text


def test_every_answer_is_trained_with_what_ends_it_and_nothing_else():
    for row in golden_rows().values():
        answers = [turn["value"] for turn in CASES[row["case"]]["conversations"] if turn["from"] == "gpt"]
        rest = row["trained"]
        for answer in answers:
            before, found, rest = rest.partition(answer)
            assert found and before.strip() in ("", ends(row)), row
        assert rest.strip() == ends(row), row


def ends(row):
    """What ends an answer of this architecture, by its golden row."""
    return row["trained"].rpartition(".")[2].strip()
