# SPDX-License-Identifier: Apache-2.0
"""Flags against the folder of a run: what is given acts and is saved, or is refused by name."""

from __future__ import annotations

from dataclasses import fields

import pytest

from moellava.errors import UserError
from moellava.moe import MoESpec, upcycle
from moellava.moe.upcycle import sparse_modules
from moellava.train.arguments import DataArguments, ModelArguments, MoEArguments
from moellava.train.reconcile import reconcile, retrain
from moellava.train.stages import FINETUNE, PRETRAIN
from tests.processes import train_here
from tests.tiny import compose_tiny

OTHER = {
    "moe_mode": "first_half",
    "moe_layers_idx": [0],
    "num_experts": [2],
    "top_k_experts": 1,
    "drop_tokens": True,
    "capacity_factor": 1.5,
    "eval_capacity_factor": 3.0,
    "min_capacity": 2,
    "use_residual": True,
    "init": "shared",
    "init_noise": 0.5,
    "init_drop_ratio": 0.5,
    "granularity": 2,
    "init_seed": 1,
    "router_aux_loss_coef": 0.5,
    "router_z_loss_coef": 0.5,
    "router_balance": "bias",
    "router_bias_rate": 0.5,
    "router_jitter": 0.5,
    "freeze_router": True,
    "second_expert": "sampled",
    "top1_gate": "probability",
    "aux_over_layers": "sum",
}
"""Option of a sparse model -> a value other than its default. A new option has to be judged here."""

IN_COMMON = {"router_bias_rate": {"router_balance": "bias"}}
"""Option -> what has to be given with it."""


@pytest.fixture
def dense(parts):
    return compose_tiny(parts / "lm", parts / "tower", "qwen")


@pytest.fixture
def sparse(dense):
    upcycle(dense.model, MoESpec())
    dense.sparse(MoESpec())
    return dense


@pytest.mark.parametrize("item", fields(MoESpec), ids=lambda item: item.name)
def test_each_option_of_a_sparse_folder_acts_and_is_saved_or_is_refused_by_name(item, sparse):
    flags = MoEArguments(**{item.name: OTHER[item.name]} | IN_COMMON.get(item.name, {}))
    if item.metadata["is_fixed"]:
        with pytest.raises(UserError, match=f"--{item.name} .*but"):
            retrain(sparse, flags)
        retrain(sparse, MoEArguments(**{item.name: getattr(MoESpec(), item.name)}))  # the same says nothing new
        return
    retrain(sparse, flags)
    assert sparse.model.config.moe[item.name] == OTHER[item.name]
    assert {getattr(layer.spec, item.name) for layer in sparse_modules(sparse.model)} == {OTHER[item.name]}


def test_a_bias_begins_at_zero_and_stays(sparse):
    retrain(sparse, MoEArguments(router_balance="bias"))
    assert all(not layer.router.state_dict()["bias"].any() for layer in sparse_modules(sparse.model))
    with pytest.raises(UserError, match="--router_balance sequence, but .* a bias that they have learnt"):
        retrain(sparse, MoEArguments(router_balance="sequence"))


def test_a_preset_resets_what_presets_set(sparse):
    retrain(sparse, MoEArguments(moe_preset="moe-llava"))
    assert sparse.spec.router_balance == "first_choice" and sparse.spec.drop_tokens
    retrain(sparse, MoEArguments(moe_preset="today"))
    assert sparse.spec == MoESpec()


@pytest.mark.parametrize("name", ["init_noise", "init_drop_ratio", "router_bias_rate"])
def test_a_number_that_nothing_reads_is_refused(name):
    with pytest.raises(UserError, match=f"--{name} 0.5 needs --"):
        MoEArguments(**{name: 0.5}).spec()


@pytest.mark.parametrize(
    ("name", "own", "other"),
    [
        ("mm_vision_select_layer", -1, -2),
        ("mm_vision_select_feature", "patch", "cls_patch"),
        ("image_projector_type", "linear", "mlp2x_gelu"),
        ("mm_use_im_start_end", False, True),
    ],
)
def test_a_folder_is_not_composed_anew(name, own, other, dense):
    reconcile(dense, FINETUNE, ModelArguments(**{name: own}), DataArguments())
    with pytest.raises(UserError, match=f"--{name} {other}, but .* put together with {own}"):
        reconcile(dense, FINETUNE, ModelArguments(**{name: other}), DataArguments())


@pytest.mark.parametrize(
    ("stage", "version", "words"),
    [
        (FINETUNE, "v1", "'</s>' is text here, not one special token. Templates that fit: .*qwen.* for qwen"),
        (FINETUNE, "plain", "plain is stage 1's, for captions"),
        (PRETRAIN, "phi", "stage 1 learns from captions, with plain"),
    ],
)
def test_a_template_that_does_not_fit_is_refused_unless_it_is_forced(stage, version, words, dense):
    with pytest.raises(UserError, match=f"--version {version} does not fit.*{words}.*--force_version True"):
        reconcile(dense, stage, ModelArguments(version=version), DataArguments())
    assert dense.section.version == "qwen", "nothing is noted of what is refused"
    reconcile(dense, stage, ModelArguments(version=version, force_version=True), DataArguments())
    assert dense.section.version == version


def test_stages_are_not_left_out(flags_for, tmp_path):
    flags = flags_for(tmp_path, "finetune") | {"pretrain_mm_mlp_adapter": None}
    with pytest.raises(UserError, match="its projector has learnt nothing. Run stage 1 first .*--untrained_projector"):
        train_here(flags)
    first = train_here(flags_for(tmp_path, "pretrain") | {"max_steps": 1, "save_strategy": "no"})
    with pytest.raises(UserError, match="is a stage-1 folder, whose language model has never seen an image"):
        train_here(flags_for(tmp_path, "moe") | {"model_name_or_path": first})
