# SPDX-License-Identifier: Apache-2.0
"""Language models without an entry of ours: composed by what probes find, equal to their own class, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

from moellava.errors import UserError
from moellava.model.any_language_model import own_config
from moellava.model.compose import Composition, version_for
from moellava.model.extended import CappedHead
from moellava.model.manifest import read_folder
from moellava.model.probes import CannotComposeError, Head, anatomy_of, fit_head, logits_of
from moellava.moe import MoESpec, upcycle
from moellava.vlm import compose
from tests import tiny
from tests.model.any_language_model import Row, check, check_all, in_short, table
from tests.model.tiny_language_models import (
    CHATML,
    OVERRIDES,
    REFUSED,
    UPCYCLES,
    VERDICTS,
    expected,
    expected_upcycling,
    language_models,
    tiny_language_model,
)
from tests.older import PAGE

SAMPLE = ("qwen3_moe", "gpt2", "granite", "gemma2", "gptj", "openai-gpt")
"""One of each verdict; the first is sparse, the second has no parts of the usual names."""


def holds(row: Row) -> bool:
    verdict, reason = expected(row.model_type)
    upcycles = tuple(map(in_short, row.upcycles.values()))
    if verdict != "refused" and upcycles != expected_upcycling(row.model_type):
        return False
    return row.verdict == verdict and reason in row.reason and not row.problems


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample_is_composed_as_its_own_class_computes(model_type, tokenizer_folder, clip_tower, tmp_path):
    row = check(model_type, tokenizer_folder, clip_tower, tmp_path)
    assert holds(row), table([row])


@pytest.mark.slow
def test_language_models_of_transformers_are_composed_or_refused_with_their_reason():
    """Every eighth; all of them take minutes: `python -m tests.model.any_language_model --all`."""
    rows = check_all(language_models()[::8])
    wrong = [row for row in rows if not holds(row)]
    assert not wrong, table(wrong)
    assert len(rows) > 20


@PAGE
def test_the_tables_name_language_models_that_there_are():
    for tables in ([*VERDICTS.values(), *REFUSED.values()], UPCYCLES.values()):
        named = " ".join(tables).split()
        assert len(named) == len(set(named)) and {*named, *OVERRIDES} <= set(language_models())


@PAGE
def test_the_page_has_a_row_for_each():
    lines = (Path(__file__).parents[2] / "docs" / "LANGUAGE_MODELS.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]
    assert sorted(row[0] for row in rows) == sorted(language_models())
    for name, verdict, _, copies, slices, reason in rows:
        assert (verdict, True) == (expected(name)[0], expected(name)[1] in reason)
        assert verdict == "refused" or (copies, slices) == expected_upcycling(name)


def heads() -> dict[str, Head]:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(50, 8, generator=generator), torch.randn(50, generator=generator)
    return {
        "as it is": Head(weight),
        "scaled": Head(weight, scale=0.0625),
        "scaled by a hair": Head(weight, scale=1.01),
        "negative": Head(weight, scale=-2.0),
        "biased": Head(weight, bias=bias),
        "scaled and biased": Head(weight, scale=3.0, bias=bias),
        "capped": Head(weight, softcap=30.0),
        "capped low": Head(weight, softcap=1.5),
    }


@pytest.mark.parametrize("name", heads())
def test_a_head_is_told_from_its_logits(name):
    head = heads()[name]
    hidden = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    seen = [(hidden * factor, logits_of(head, hidden * factor)) for factor in (1.0, 8.0)]
    found = fit_head(head.weight, logits_of(head, hidden * 0), seen, 1e-4)
    assert found.scale == pytest.approx(head.scale, rel=1e-6) and found.softcap == head.softcap
    assert (found.bias is None) == (head.bias is None)
    if head.bias is not None:
        torch.testing.assert_close(found.bias, head.bias)


@pytest.mark.parametrize(
    "curve", [torch.relu, torch.square, lambda x: x / x.norm(), lambda x: 30 * torch.tanh(x / 15), torch.sin]
)
def test_what_no_linear_head_says_is_refused(curve):
    weight = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    seen = [(hidden * factor, curve(hidden @ weight.T * factor)) for factor in (1.0, 8.0)]
    with pytest.raises(CannotComposeError, match="no linear function"):
        fit_head(weight, torch.zeros(6, 50), seen, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("model_type", "verdict"), [("qwen3", "as is"), ("gemma2", "softcap"), ("granite", "folded")])
def test_half_precision_hides_nothing(model_type, verdict, dtype):
    anatomy = anatomy_of(tiny_language_model(model_type).to(dtype))
    assert anatomy.verdict == verdict
    assert anatomy.head.softcap in (None, pytest.approx(30.0, rel=1e-2))


def test_a_capped_head_stays_one_when_the_vocabulary_grows(tokenizer_folder, clip_tower, tmp_path):
    base = tiny_language_model("gemma2")
    base.resize_token_embeddings(tiny.VOCABULARY)  # no free row is left for <image>
    base.save_pretrained(tmp_path)
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    vlm = compose(tmp_path, str(clip_tower), Composition(version="v1"))
    head = vlm.model.get_output_embeddings()
    assert isinstance(head, CappedHead) and head.softcap == 30.0 and head.out_features == tiny.VOCABULARY + 1
    with torch.no_grad():
        assert head(1e6 * torch.ones(1, 32)).abs().max() <= 30.0


def test_the_chat_template_outlives_stage_1(tokenizer_folder, clip_tower, tmp_path):
    """Stage 1's folder has the template of captions; the next stage takes the language model's own again."""
    base = tmp_path / "base"
    tiny_language_model("qwen3").save_pretrained(base)
    tokenizer = hf.AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(base)
    assert version_for(read_folder(base, "--model_name_or_path")) == "chat_template"
    compose(base, str(clip_tower), Composition(version="plain")).save(tmp_path / "stage1")
    stage_1 = tiny.reopen(tmp_path / "stage1")
    assert stage_1.section.version == "plain" and stage_1.processor.chat_template != CHATML
    stage_1.settle("chat_template")
    stage_1.save(tmp_path / "stage2")
    plain = hf.AutoProcessor.from_pretrained(tmp_path / "stage2")
    assert plain.chat_template == tiny.reopen(tmp_path / "stage2").processor.chat_template
    assert plain.chat_template.endswith(CHATML), "behind what makes texts of messages in parts"


def test_a_folder_that_other_code_composed_is_opened(tokenizer_folder, clip_tower, tmp_path):
    tiny_language_model("qwen3").save_pretrained(tmp_path / "base")
    tokenizer = hf.AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "base")
    vlm = compose(tmp_path / "base", str(clip_tower), Composition("chat_template", "mlp2x_gelu"))
    vlm.save(tmp_path / "foreign")
    config = json.loads((tmp_path / "foreign" / "config.json").read_text())
    del config["moellava"]
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config))
    again = tiny.reopen(tmp_path / "foreign")
    assert (again.section.version, again.section.family) == ("chat_template", None)


def test_stage_3_says_that_a_sparse_language_model_is_sparse(tokenizer_folder, clip_tower, tmp_path):
    tiny_language_model("qwen3_moe").save_pretrained(tmp_path)
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    vlm = compose(tmp_path, str(clip_tower), Composition("qwen"))
    with pytest.raises(UserError, match="sparse already and needs no upcycling. Train it without --moe_enable"):
        upcycle(vlm.model, MoESpec())


def test_a_tokenizer_without_a_chat_template_takes_what_fits(make_base):
    folder = make_base("llama").folder
    assert version_for(read_folder(folder, "--model_name_or_path")) == "v1"  # its family's
    llm = read_folder(folder, "--model_name_or_path")
    other = llm.__class__(llm.folder, llm.name, llm.flag, {**llm.config, "model_type": "qwen3"})
    assert version_for(other) == "qwen"  # answers end with <|endoftext|>


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "no-such-model"}, "is a 'no-such-model' model.*has no class for causal language models"),
        ({"model_type": "t5"}, "is a 't5' model"),
        ({"model_type": "qwen3", "num_hidden_layers": "many"}, "does not read its config.json"),
    ],
)
def test_configs_that_no_class_reads_are_named(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        own_config(read_folder(tmp_path, "--model_name_or_path"))


def test_weights_that_do_not_fit_are_named(tokenizer_folder, clip_tower, tmp_path):
    base = tiny_language_model("qwen3")
    base.config.intermediate_size += 8
    base.save_pretrained(tmp_path)
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match="do not fit its config.json.*mlp"):
        compose(tmp_path, str(clip_tower), Composition(version="v1"))


def test_a_model_that_is_its_own_body_is_refused():
    model = tiny_language_model("llama")
    model.model = nn.Identity()
    with pytest.raises(CannotComposeError, match="LlamaModel for its body, of which LlamaForCausalLM has 0"):
        anatomy_of(model)


def test_constants_that_are_not_stored_are_computed_in_an_extended_class(tokenizer_folder, clip_tower, tmp_path):
    """Falcon-H1's decoder keeps its layers' multipliers, which transformers leaves empty for classes from elsewhere."""
    tiny_language_model("falcon_h1").save_pretrained(tmp_path / "base")
    shutil.copytree(tokenizer_folder, tmp_path / "base", dirs_exist_ok=True)
    dense = compose(tmp_path / "base", str(clip_tower), Composition("qwen"))
    wanted = {name: buffer.clone() for name, buffer in dense.model.named_buffers()}
    spec = MoESpec(num_experts=[2])
    upcycle(dense.model, spec)
    dense.sparse(spec)
    dense.save(tmp_path / "sparse")
    found = dict(tiny.reopen(tmp_path / "sparse").model.named_buffers())
    assert any(name.endswith("mup_vector") for name in found)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
