# SPDX-License-Identifier: Apache-2.0
"""What one of two processes holds of a sharded model. `test_fsdp.py` runs this in a process of its own, whose group is
a make-believe one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlavaForConditionalGeneration

from moellava.errors import UserError
from moellava.files import read_json
from moellava.model.build import open_config, read
from moellava.model.stored import as_stored
from moellava.train.fsdp import gathered, is_fsdp, own, shard, whole_state
from moellava.train.masters import cast, dtypes_of, masters_of
from moellava.train.optimizer import parameter_groups
from moellava.train.stopping import require_finite
from moellava.train.train import laid_out
from tests import tiny
from tests.model.tiny_language_models import OVERRIDES

EXPERTS = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}


@pytest.fixture
def two_of_them() -> Iterator[None]:
    """This process as the first of two, whose other one answers nothing."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def sparse_model() -> LlavaForConditionalGeneration:
    """A Llava whose language model has four experts a layer."""
    return tiny.tiny_llava("qwen2_moe", **EXPERTS)


def test_a_process_holds_half_of_all_and_whole_experts(two_of_them):
    whole, model = sparse_model(), sparse_model()
    shard(model, fsdp_size=2, ep_size=2, device=torch.device("cpu"))
    assert is_fsdp(model) and not is_fsdp(whole)
    wanted = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.shape == wanted[name].shape
        half = wanted[name][: (len(wanted[name]) + 1) // 2]
        assert torch.equal(own(parameter.detach()), half), name
        assert own(parameter).untyped_storage().nbytes() == half.nbytes, "the whole one stays in memory"
    assert model.model.language_model.layers[0].mlp.experts.num_experts == 2


def test_a_head_that_is_the_embedding_is_gathered_as_one_tensor(two_of_them):
    model = tiny.tiny_llava(tie_word_embeddings=True)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    shard(model, fsdp_size=2, ep_size=1, device=torch.device("cpu"))
    state = whole_state(model)
    assert state["lm_head.weight"] is state["model.language_model.embed_tokens.weight"]
    assert state.keys() == model.state_dict().keys() and len({id(value) for value in state.values()}) == len(state) - 1


def test_a_model_is_sharded_also_while_all_of_it_is_gathered(two_of_them):
    model = tiny.tiny_llava("dbrx", **OVERRIDES["dbrx"])  # whose layers have no groups of their own
    shard(model, fsdp_size=2, ep_size=1, device=torch.device("cpu"))
    with gathered(model):
        assert all(own(parameter) is parameter for parameter in model.parameters())
        assert is_fsdp(model)


def test_experts_are_in_a_group_of_their_own(two_of_them):
    """One step's kernel spans no two meshes."""
    model = sparse_model()
    shard(model, fsdp_size=2, ep_size=2, device=torch.device("cpu"))
    groups = parameter_groups(model, model.model.multi_modal_projector, weight_decay=0.0, learning_rate=1.0)
    experts = {id(p) for name, p in model.named_parameters() if ".experts." in name}
    assert {group["name"]: {id(p) in experts for p in group["params"]} for group in groups} == {
        "model_no_decay": {False},
        "model_no_decay_1": {True},
    }


def test_weights_that_are_not_finite_are_seen_in_a_share(two_of_them):
    model = sparse_model()
    shard(model, fsdp_size=2, ep_size=1, device=torch.device("cpu"))
    require_finite(model, 1, None)
    own(model.lm_head.weight.data)[0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite after step 1 .lm_head.weight"):
        require_finite(model, 1, None)


def test_masters_are_made_of_a_share(two_of_them):
    whole, model = (sparse_model().to(torch.bfloat16) for _ in range(2))
    model.lm_head.requires_grad_(False)
    masters = masters_of(model, torch.bfloat16)
    dtypes = dtypes_of(model, masters)
    shard(model, fsdp_size=2, ep_size=2, device=torch.device("cpu"), in_16_bits=True)
    held = dict(model.named_parameters())
    cast(model, dtypes)
    wanted = dict(whole.named_parameters())
    assert masters is not None and masters.names == wanted.keys() - {"lm_head.weight"}
    for name, parameter in model.named_parameters():
        half = wanted[name][: (len(wanted[name]) + 1) // 2]
        kept = torch.bfloat16 if name == "lm_head.weight" else torch.float32
        assert parameter is held[name] and parameter.dtype == own(parameter).dtype == kept, name
        assert torch.equal(own(parameter.detach()), half.to(kept)), name


def one_dtype(dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """Every tensor of a folder in one dtype."""
    return lambda name: dtype


def two_dtypes(name: str) -> torch.dtype:
    """As towers are released beside language models, and norms beside linears."""
    return torch.float32 if "vision" in name or "norm" in name else torch.float16


FOLDERS = {"fp32": one_dtype(torch.float32), "bf16": one_dtype(torch.bfloat16), "fp16": one_dtype(torch.float16)}
FOLDERS |= {"fp32 and fp16": two_dtypes}


@pytest.mark.parametrize("run", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", FOLDERS)
def test_a_share_begins_with_every_bit_of_the_folder(two_of_them, tmp_path, stored, run):
    """Whatever the two dtypes: what trains is in fp32, what rests in the run's, both of the folder's own numbers."""
    model = tiny.tiny_llava()
    model.config.vision_config.dtype = torch.float32
    state = {name: value.to(FOLDERS[stored](name)) for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    with as_stored():
        opened = read(tmp_path, open_config(tmp_path, read_json(tmp_path / "config.json")), run)
    for part in (opened.lm_head, opened.model.vision_tower):
        part.requires_grad_(False)
    args = SimpleNamespace(deepspeed=None, fp16=False, bf16=run == torch.bfloat16, fsdp_size=2, world_size=2)
    args.device = torch.device("cpu")
    masters = laid_out(SimpleNamespace(model=opened, source="this model"), 1, args)
    assert (masters is None) == (run == torch.float32)
    for name, parameter in opened.named_parameters():
        kept = torch.float32 if parameter.requires_grad else run
        wanted = state[name][: (len(state[name]) + 1) // 2].to(kept)
        assert parameter.dtype == kept and torch.equal(own(parameter.detach()), wanted), name
