# SPDX-License-Identifier: Apache-2.0
"""The micro-batches that are traced are those that training's collator makes, in one row and padded."""

import json
from argparse import Namespace

import pytest
import torch

from moellava.data.collate import MediaCollator
from moellava.data.packing import Batches
from moellava.data.places import PLACES, Places
from moellava.plan.asking import data_of, flag_groups
from moellava.plan.model import model_maker
from moellava.plan.rows import shares_rows
from moellava.plan.samples import Batch, Sample, Samples
from moellava.plan.trace import StepTrace
from moellava.train.train import make_dataset, read_data
from moellava.vlm import VLM
from tests import tiny
from tests.plan.test_trace import model

LENGTHS = Samples(tuple(Sample((length,), supervised, 1) for length, supervised in ((4, 4), (9, 1), (5, 2), (2, 1))))


def test_the_largest_micro_batch_is_of_the_longest_and_a_typical_one_of_mean_samples():
    assert LENGTHS.largest(2, in_one_row=True) == Batch(1, 14, 6, 2, (9, 5))
    assert LENGTHS.largest(2, in_one_row=False) == Batch(2, 9, 4, 2)
    assert LENGTHS.largest(5, in_one_row=True).parts == (9, 5, 4, 2, 9)
    assert LENGTHS.typical(2, in_one_row=True) == Batch(1, 5, 2, 1)
    # The longer of two that are drawn is 2, 4, 5 and 9 in 1, 3, 5 and 7 of 16 cases.
    assert LENGTHS.typical(2, in_one_row=False) == Batch(1, round((2 + 12 + 25 + 63) / 16), 2, 1, padding=1)
    assert LENGTHS.times(2, in_one_row=True) == 2 and LENGTHS.times(3, in_one_row=False) == 3
    assert Samples((Sample((8,), 2), Sample((4,), 1))).times(2, in_one_row=True) == 1.5


def test_what_shows_nothing_shows_a_blank_image():
    text = Samples((Sample((8,), 2), Sample((4,), 1)), blank=3)
    assert text.largest(2, in_one_row=True) == Batch(1, 15, 3, 1, (8, 4), padding=3)
    assert text.largest(1, in_one_row=False) == Batch(1, 11, 2, 1)
    assert text.largest(2, in_one_row=False) == Batch(2, 8, 2, 1), "behind the shorter one there is room"


def test_what_a_batch_is_told_is_what_the_collator_says():
    labels, places, positions = Batch(1, 7, 2, parts=(3, 2), padding=2).told()
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 1]] and places.lengths == [3, 2, 2]
    assert places.real.tolist() == [0, 1, 2, 3, 4] and places.sequence.tolist() == [0, 0, 0, 1, 1]
    assert (labels != -100).sum() == 2
    _, places, positions = Batch(2, 3, 1, padding=1).told()
    assert positions is None and places.real.tolist() == [0, 1, 3, 4] and not places.is_packed


@pytest.fixture(scope="module")
def folders(parts, tmp_path_factory):
    """A folder of stage 2, and the same without its images."""
    folder = tmp_path_factory.mktemp("plan")
    vlm = tiny.compose_tiny(parts / "lm", parts / "tower", "qwen")
    vlm.save(folder / "model", meta={"stage": "finetune"})
    said = [tiny.record(str(number), "what?", "a circle " * number) for number in range(1, 9)]
    (folder / "text.json").write_text(json.dumps(said))
    return {"vlm": vlm, "model": folder / "model", "text": folder / "text.json", "shown": parts / "sft.json"}


def flags_of(folders, parts, **more) -> dict:
    shown = {"image_folder": str(parts / "images"), "model_max_length": 256, "output_dir": "out"}
    return {"model_name_or_path": str(folders["model"])} | shown | more


@pytest.mark.parametrize("name", ["shown", "text"])
def test_traced_positions_are_those_of_the_collator(name, folders, parts):
    given = flags_of(folders, parts, data_path=[str(folders[name])])
    groups = flag_groups(given, None)
    told = data_of(Namespace(tokens=None), groups, model_maker(groups, torch.float32)[0])
    vlm: VLM = folders["vlm"]
    dataset = make_dataset(read_data(*groups[:2])[0], vlm, groups[1], groups[3])
    collator: MediaCollator = vlm.collator()
    collator.is_told, collator.modalities = True, dataset.modalities
    longest = dataset.positions.argsort(kind="stable")[::-1]
    for count in (1, 2, 4):
        taken = longest[:count].tolist()
        for in_one_row in {count > 1, False}:
            batch = told.largest(count, in_one_row)
            dataset.in_one_row = in_one_row
            made = collator(Batches.__getitems__(dataset, taken))
            assert made["input_ids"].shape == (batch.samples, batch.length)
            assert len(made["pixel_values"]) == batch.images
            places = Places(**made[PLACES])
            assert places.lengths == batch.told()[1].lengths
            if in_one_row:
                assert torch.equal(places.real, batch.told()[1].real)
                assert torch.equal(made["position_ids"], batch.told()[2])
            assert len(places.supervised) <= batch.samples * batch.supervised
    assert told.largest(4, True).positions < told.largest(4, False).positions


@pytest.mark.parametrize(
    ("flags", "shares"),
    [
        ({}, True),
        ({"packing": True}, True),
        ({"lora_enable": True}, True),
        ({"attn_implementation": "flash_attention_2", "bf16": True}, True),
        ({"attn_implementation": "eager"}, False),
        ({"neftune_noise_alpha": 5.0}, False),
        ({"moe_enable": True}, True),
        ({"moe_enable": True, "router_balance": "first_choice"}, False),
    ],
    ids=str,
)
def test_rows_are_shared_where_training_shares_them(flags, shares, folders, parts):
    groups = flag_groups(flags_of(folders, parts, **flags), 64)
    vlm = model_maker(groups, torch.float32)[1](1)
    named, args = groups[0].attn_implementation, groups[3]
    assert shares_rows(vlm, args, named, 2) is shares
    assert shares_rows(vlm, args, named, 1) is (shares and args.packing)
    vlm.model.get_decoder().config.sliding_window = 8
    assert shares_rows(vlm, args, named, 2) is (named == "flash_attention_2")


@pytest.mark.slow
def test_a_row_of_samples_multiplies_less_than_padded_ones():
    trace = StepTrace(model(False, "meta"), on_gpu=False)
    shared, padded = (trace.step(LENGTHS.largest(4, in_one_row), False) for in_one_row in (True, False))
    assert shared.flops < padded.flops and shared.activations < padded.activations
    whole = trace.step(Batch(1, 20, 8, 4), False)
    assert shared.flops < whole.flops, "attention runs over each sample"
    tokens, padded = (trace.step(Batch(1, 48, 2, padding=padding), False) for padding in (0, 24))
    assert padded.flops < 0.9 * tokens.flops, "MLPs run over tokens"
