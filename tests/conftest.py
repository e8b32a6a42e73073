# SPDX-License-Identifier: Apache-2.0
"""What tests ask for by name: the tiny things of `tests/tiny.py`, made once a session, and `tests/processes.py`."""

from __future__ import annotations

import gc
import json
import lzma
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import pytest
from hypothesis import settings

from moellava.startup import importing
from tests.archives import unpack

with importing():
    import torch
    import torch.distributed as dist
    from accelerate.state import AcceleratorState
    from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from moellava.auto_classes import ConfigOnDemand
    from moellava.data.tokenizers import load_tokenizer
    from moellava.vlm import VLM
    from tests import order, processes, tiny
    from tests.cut_vocabulary import write_cut_tokenizer
    from tests.processes import Finished, Flags

# The same examples in every run: a run that has passed says something about the next one.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

GOLDEN = Path(__file__).parent / "golden"

LAUNCHERS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""What a launcher sets for each process that it starts."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """See `tests/order.py`."""
    order.mark_slow_cases(items)
    order.sort_files(items)


def pytest_collection_finish() -> None:
    """What libraries and thousands of tests are made of stays to the end: the garbage collector, which each run of the
    Trainer calls, took a quarter of the tests' time to walk through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def golden_tokenizers(tmp_path_factory) -> Path:
    """The folder of the unpacked golden tokenizers: mistral, qwen, phi, stablelm."""
    root = tmp_path_factory.mktemp("tokenizers")
    for archive in (GOLDEN / "tokenizers").glob("*.tar.xz"):
        unpack(archive, root)
    return root


@pytest.fixture(scope="session")
def small_tokenizers(golden_tokenizers, tmp_path_factory) -> Path:
    """Those of released models, mistral, qwen and phi, with small vocabularies. See `tests/cut_vocabulary.py`."""
    root = tmp_path_factory.mktemp("small")
    for name in ("mistral", "qwen", "phi"):
        write_cut_tokenizer(golden_tokenizers / name, root / name)
    return root


@pytest.fixture(scope="session")
def tokenizers(golden_tokenizers) -> dict[str, PreTrainedTokenizerFast]:
    """The golden tokenizers by name; not to be changed by a test."""
    return {folder.name: load_tokenizer(folder) for folder in golden_tokenizers.iterdir()}


@pytest.fixture(scope="session")
def golden_rows() -> list[dict]:
    """What the reference implementation computed (labels.jsonl.xz), and the rows of ours for what it has none of."""
    given = lzma.decompress((GOLDEN / "labels.jsonl.xz").read_bytes()).decode().splitlines()
    ours = (GOLDEN / "more_labels.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in [*given, *ours]]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    """Folders that the reference implementation saved, with what they must compute: phi/dense …, openai/clip-tiny."""
    folder = tmp_path_factory.mktemp("checkpoints")
    unpack(GOLDEN / "checkpoints.tar.xz", folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer of 280 tokens."""
    return tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def make_base(tmp_path_factory, tokenizer_folder) -> Callable[..., tiny.Base]:
    """(family, rows, tied) -> a base of that family with `rows` embeddings and the small tokenizer."""
    root = tmp_path_factory.mktemp("bases")

    @cache
    def make(name: str, rows: int = tiny.VOCABULARY, tied: bool = False) -> tiny.Base:
        options = {"noise": 0.1, "tie_word_embeddings": tied}
        return tiny.write_base(root / f"{name}-{rows}-{tied}", name, tokenizer_folder, rows, **options)

    return make


REAL_BASES = {
    "vicuna": ("llama", "mistral", 32000),
    "openchat": ("mistral", "mistral", 32000),
    "phi2": ("phi", "phi", 51200),
    "qwen": ("qwen", "qwen", 151936),
    "stablelm": ("stablelm", "stablelm", 100352),
}
"""Folder of scripts/v1 -> (family, golden tokenizer, rows of its embedding)."""


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory, golden_tokenizers) -> Callable[[str], Path]:
    """name of `REAL_BASES` -> the folder of a tiny language model with that model's real tokenizer."""
    root = tmp_path_factory.mktemp("real")

    @cache
    def make(name: str) -> Path:
        family, tokenizer, rows = REAL_BASES[name]
        return tiny.write_base(root / name, family, golden_tokenizers / tokenizer, rows, **tiny.NARROW).folder

    return make


@pytest.fixture(scope="session")
def clip_tower(tmp_path_factory) -> Path:
    """A CLIP tower of 28 × 28 pixels, 4 patches, with its image processor."""
    return tiny.write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def siglip_tower(tmp_path_factory) -> Path:
    """A SigLIP tower of 28 × 28 pixels, 4 patches, without an image processor beside it."""
    return tiny.write_siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="session")
def image_processor() -> CLIPImageProcessorPil:
    """CLIP's, for 32 × 32 pixels."""
    return tiny.clip_processor(32)


@pytest.fixture
def inputs() -> Callable[..., dict[str, torch.Tensor]]:
    """(composed model) -> a batch: a question with an image, and one that is shorter and padded."""
    return tiny.batch_for


@pytest.fixture
def tiny_llava() -> Callable:
    """model type of the decoder -> a random Llava in memory; the same weights each time."""
    return tiny.tiny_llava


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """One for `tiny_llava`."""
    return tiny.batch_for(tiny.tiny_llava())


@pytest.fixture
def plain_transformers(monkeypatch) -> None:
    """transformers as it is where no moellava is imported: its Auto classes know none of ours."""
    known = CONFIG_MAPPING._extra_content.items()
    others = {name: config for name, config in known if not issubclass(config, ConfigOnDemand)}
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", others)


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    """`--deepspeed` without a launcher makes this process a group of one, which the next test must not belong to.

    Whatever began it: the test itself, with a launcher's variables of its own, or what a whole file shares.
    """
    yield
    for name in LAUNCHERS - processes.OURS.keys():
        os.environ.pop(name, None)
    if dist.is_initialized():
        from deepspeed.comm import comm

        dist.destroy_process_group()
        comm.cdb = None
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def composed(tiny_base, clip_tower) -> VLM:
    """A random Llama with a Llama tokenizer, template v1, images padded to a square."""
    options = {"image_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"}
    return tiny.compose_tiny(tiny_base("vicuna"), clip_tower, "v1", **options)


@pytest.fixture(scope="session")
def taught_folder(tiny_base, clip_tower, pictures, tmp_path_factory) -> Path:
    """Stage 2 of such a model that has learnt to name the colours of the three pictures, and one answer without."""
    root = tmp_path_factory.mktemp("taught")
    shown = zip(("red", "green", "blue"), pictures, strict=True)
    records = [tiny.record(name, "<image>\nwhat colour is it?", name, image=path.name) for name, path in shown]
    (root / "data.json").write_text(json.dumps([*records, tiny.record("sky", "and the sky?", "blue it is")]))
    parts = {"model_name_or_path": tiny_base("vicuna"), "image_tower": clip_tower, "image_projector_type": "linear"}
    data = {"version": "v1", "data_path": root / "data.json", "image_folder": pictures[0].parent}
    data |= {"untrained_projector": True}
    long = {"max_steps": 120, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_strategy": "no"}
    folder = processes.train_here(COMMON | parts | data | long | {"output_dir": root / "stage2"})
    assert processes.losses_of(folder)[120] < 0.05, "the model has not learnt its four answers"
    return folder


@pytest.fixture(scope="session")
def taught(taught_folder) -> VLM:
    """The taught model, opened."""
    return tiny.reopen(taught_folder)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> list[Path]:
    """Three images of different shapes and colours."""
    return tiny.write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """A folder with good and bad videos. See `tiny.write_videos`."""
    return tiny.write_videos(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory) -> Path:
    """A folder with good and bad images. See `tiny.write_image_tree`."""
    return tiny.write_image_tree(tmp_path_factory.mktemp("images"))


@pytest.fixture
def make_record() -> Callable[..., dict]:
    """(id, question, answer, …, image=, video=) -> a record."""
    return tiny.record


@pytest.fixture
def data_file(tmp_path) -> Callable[..., Path]:
    """Writes records as JSON (or a text as it is) to a file of a name, and returns its path."""

    def write(content: object, name: str = "data.json") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


COMMON = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 2e-3}
COMMON |= {"lr_scheduler_type": "constant", "image_aspect_ratio": "pad", "model_max_length": 256, "report_to": "none"}
"""Flags that all runs of composed models share."""


@pytest.fixture(scope="session")
def parts(tmp_path_factory, tokenizer_folder) -> Path:
    """A folder with a tiny random language model (`lm`), tower (`tower`), images and LLaVA records."""
    return write_parts(tmp_path_factory.mktemp("parts"), tokenizer_folder)


def write_parts(root: Path, tokenizer_folder: Path) -> Path:
    """See `parts`."""
    special = {"num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 0}
    tiny.write_base(root / "lm", "qwen2", tokenizer_folder, tiny.VOCABULARY + 8, **special)
    tiny.write_clip(root / "tower")
    tiny.write_pictures(root / "images")
    tiny.write_records(root)
    return root


@pytest.fixture(scope="session")
def flags_for(parts) -> Callable[[Path, str], Flags]:
    """(folder of the runs, stage) -> the flags of that stage; stages 2 and 3 start from the folders before them."""
    return stage_flags(parts)


def stage_flags(parts: Path) -> Callable[[Path, str], Flags]:
    """See `flags_for`."""
    new = {"model_name_or_path": parts / "lm", "image_tower": parts / "tower", "image_projector_type": "mlp2x_gelu"}
    sft = {"version": "qwen", "data_path": parts / "sft.json"}
    plain = {"version": "plain", "tune_mm_mlp_adapter": True, "data_path": parts / "captions.json"}
    sparse = {"moe_enable": True, "moe_mode": "sparse", "num_experts": 4, "top_k_experts": 2}

    def flags(runs: Path, stage: str) -> Flags:
        own = {
            "pretrain": new | plain,
            "finetune": new | sft | {"pretrain_mm_mlp_adapter": runs / "pretrain"},
            "moe": sft | sparse | {"model_name_or_path": runs / "finetune"},
        }[stage]
        return COMMON | own | {"image_folder": parts / "images", "output_dir": runs / stage}

    return flags


@pytest.fixture
def released_flags(pictures, tmp_path) -> Callable[..., Flags]:
    """(folder, run, flags) -> the flags of a short run of a released model: 8 records, every fourth without image."""
    roles, records = ("user", "bot"), []
    for number in range(8):
        question, image = ("<image>\nWhat is it?", {"image": f"{number % 3}.png"}) if number % 4 else ("Hello?", {})
        records.append(tiny.record(str(number), question, f"A fractal, number {number}.", roles=roles, **image))
    (tmp_path / "data.json").write_text(json.dumps(records))
    data = {"data_path": tmp_path / "data.json", "image_folder": pictures[0].parent}
    keys = dict(zip(("user_key", "assistant_key"), roles, strict=True))
    short = {"max_steps": 3, "learning_rate": 1e-2, "save_strategy": "no"}
    common = {name: COMMON[name] for name in COMMON.keys() - {"image_aspect_ratio", "save_steps"}}

    def make(folder: Path, name: str = "run", **flags: object) -> Flags:
        return common | data | keys | short | {"model_local_path": folder, "output_dir": tmp_path / name} | flags

    return make


@pytest.fixture(scope="session")
def run_train() -> Callable[..., Finished]:
    """See `processes.run_train`."""
    return processes.run_train


@pytest.fixture(scope="session")
def kill_train() -> Callable[..., None]:
    """See `processes.kill_train`."""
    return processes.kill_train


@pytest.fixture
def launch(tmp_path) -> Callable[..., list]:
    """(script, processes, *arguments) -> what each rank has reported. See `run_ranks`."""
    return partial(processes.run_ranks, tmp_path)


@pytest.fixture(scope="session")
def losses_of() -> Callable[[Path], dict[int, float]]:
    """folder of a finished run -> {step: loss}."""
    return processes.losses_of


@pytest.fixture(scope="session")
def begin_at() -> Callable[[int, Path, Path], Path]:
    """(step, finished run, new folder) -> the folder as a run leaves it that is killed after that checkpoint."""

    def copy(step: int, finished: Path, folder: Path) -> Path:
        folder.mkdir()
        shutil.copytree(finished / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        state = json.loads((finished / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(state | {"finished": False}))
        return folder

    return copy
