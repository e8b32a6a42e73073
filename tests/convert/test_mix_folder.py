# SPDX-License-Identifier: Apache-2.0
"""`moellava upcycle --from A B C`: each source is an expert, the rest their mean; routers know the sources' data."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch

from moellava.batches import batches_of, spread
from moellava.cli import main
from moellava.data.media import MediaFiles
from moellava.data.records import load_records
from moellava.moe import moe_layers
from moellava.moe.mix import CONFIDENCE, Moments
from tests.tiny import compose_tiny, record, reopen, weights_of

WORDS = ("what is red here", "is it a blue shape or not", "there you see no green square")


@pytest.fixture(scope="module")
def sources(make_base, clip_tower, tmp_path_factory):
    """Three folders whose language models have moved apart, and data of each."""
    root = tmp_path_factory.mktemp("mix")
    for number in range(3):
        vlm = compose_tiny(make_base("llama").folder, clip_tower, "v1")
        torch.manual_seed(number)
        for parameter in vlm.model.get_decoder().parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        vlm.save(root / f"source{number}", meta={"stage": "finetune"})
        records = []
        for i in range(6):
            shown = {"image": "0.png"} if i % 2 else {}
            records.append(record(f"r{i}", "<image>\n" * (i % 2) + WORDS[number], "no", WORDS[number], "no", **shown))
        (root / f"data{number}.json").write_text(json.dumps(records))
    return root


def mix(root, target, *flags, count=3):
    folders = [str(root / f"source{number}") for number in range(count)]
    return main(["upcycle", "--from", *folders, "--output-dir", str(target), *flags])


def test_each_source_is_an_expert_and_the_rest_is_their_mean(sources, tmp_path, capsys):
    assert mix(sources, tmp_path / "mixed", "--moe_mode", "sparse") == 0
    said = capsys.readouterr().out
    assert all(f"source{number}: a layer is off that source's MLP by 0.00e+00" in said for number in range(3))
    found = weights_of(tmp_path / "mixed")
    parts = [weights_of(sources / f"source{number}") for number in range(3)]
    for name in parts[0]:
        before, mlp, after = name.partition(".mlp.")
        if mlp and "language_model" in before and int(before.rsplit(".", 1)[-1]) % 2 == 0:
            for number in range(3):
                assert torch.equal(found[f"{before}.mlp.experts.{number}.{after}"], parts[number][name])
        else:
            torch.testing.assert_close(found[name], sum(part[name] for part in parts) / 3, rtol=1e-5, atol=1e-6)
    opened = reopen(tmp_path / "mixed")
    assert opened.section.stage == "moe" and opened.spec.num_experts == [3] and opened.spec.moe_mode == "sparse"
    told = json.loads((tmp_path / "mixed" / "moe_certificate.json").read_text())
    assert all(0 < one["kl"] < 1 for one in told["sources"].values())


def test_routers_send_tokens_to_the_source_of_their_data(sources, tmp_path, pictures):
    data = [str(sources / f"data{number}.json") for number in range(3)]
    flags = ["--data", *data, "--image-folder", str(pictures[0].parent), "--moe_mode", "dense", "--top_k_experts", "1"]
    assert mix(sources, tmp_path / "mixed", *flags) == 0
    vlm = reopen(tmp_path / "mixed")
    vlm.model.eval()
    means = []
    for file in data:  # layer 0: what reaches others depends on where this one sends tokens
        with watched(moe_layers(vlm.model)[0][1]) as logits, torch.no_grad():
            for batch in batches_of(vlm, load_records(file), MediaFiles(pictures[0].parent)):
                vlm.model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
                logits[-1] = logits[-1][batch["attention_mask"].bool()]
        means.append(torch.cat(logits).mean(0))
    likes_SS = torch.stack(means)  # row: data of a source; the templates' tokens are the same in all of them
    assert likes_SS.argmax(0).tolist() == [0, 1, 2], likes_SS


@contextmanager
def watched(layer):
    seen = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(module.router(inputs[0])))
    yield seen
    hook.remove()


def test_a_router_tells_apart_what_can_be_told_apart():
    moments = Moments(4, 2)
    moments.add(torch.eye(4)[:2], 0, 0.5)
    moments.add(torch.eye(4)[2:], 1, 0.5)
    gate = (moments.router() @ torch.eye(4)).t().softmax(1)
    torch.testing.assert_close(
        gate[:, 0], torch.tensor([1.0, 1, 0, 0]) * (2 * CONFIDENCE - 1) + 1 - CONFIDENCE, atol=0.01, rtol=0
    )


@pytest.mark.parametrize(
    ("flags", "count", "said"),
    [
        ([], 1, "at least two sources"),
        (["--init", "noise"], 3, "--init noise: with --from"),
        (["--use_residual", "True"], 3, "--use_residual True: with --from"),
        (["--num_experts", "4"], 3, "as many as sources, 3"),
        (["--data", "one.json"], 3, "--data names 1 files for 3 sources"),
    ],
    ids=lambda value: str(value),
)
def test_what_does_not_fit_is_refused(sources, tmp_path, capsys, flags, count, said):
    assert mix(sources, tmp_path / "mixed", *flags, count=count) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "mixed").exists()


def test_models_that_are_no_fine_tunes_of_one_are_refused(sources, make_base, clip_tower, tmp_path, capsys):
    compose_tiny(make_base("phi").folder, clip_tower, "v1").save(tmp_path / "phi")
    one = str(sources / "source0")
    words = ["upcycle", "--output-dir", str(tmp_path / "mixed"), "--from", one]
    assert main([*words, str(tmp_path / "phi")]) == 2
    assert "are not fine-tunes of one model" in capsys.readouterr().err
    assert main([*words, one]) == 2
    assert "named twice" in capsys.readouterr().err
    assert mix(sources, tmp_path / "mixed") == 0
    assert main([*words[:1], "--output-dir", str(tmp_path / "more"), "--from", one, str(tmp_path / "mixed")]) == 2
    assert "is sparse already" in capsys.readouterr().err


def test_numbers_are_spread_evenly():
    assert spread(10, 5) == [0, 2, 4, 6, 8] and spread(3, None) == spread(3, 9) == [0, 1, 2] and spread(0, 4) == []
