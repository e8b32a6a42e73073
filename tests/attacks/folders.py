# SPDX-License-Identifier: Apache-2.0
"""Damaged model folders: each opens as what it was, or is named; none as another model.

    python -m tests.attacks.folders          # a share of seconds
    python -m tests.attacks.folders --all    # every file of every layout

Each file of each layout is cut, has a bit turned, is garbage, a Git-LFS pointer, or is missing; each JSON file is
everything that JSON should not be. A folder of ours is opened as a run starts from it, digests compared. What a foreign
folder should hold nobody can know: one that is well-formed and opens as another model is counted as 'not ours'.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers.utils import logging

from moellava.adapters.folder import read_adapter, write_adapter
from moellava.adapters.lora import Adapter, attach
from moellava.errors import UserError
from moellava.files import DIGESTS
from moellava.model.manifest import read_folder
from moellava.model.parts import LLAVA
from moellava.moe import MoESpec, upcycle
from moellava.vlm import build, describe
from tests import tiny
from tests.archives import unpack
from tests.attacks.media import Hang, at_most
from tests.attacks.outcome import Outcome
from tests.lmm.tiny import TINY

GOLDEN = Path(__file__).parents[1] / "golden"

QUICK = 32
"""Damages of the quick share."""

SECONDS = 30

DEEP = "[" * 100_000

BAD_JSON: dict[str, tuple[str, tuple[str, ...]]] = {
    "empty": ("", ("not valid JSON",)),
    "no JSON": ("not JSON", ("not valid JSON",)),
    "a list": ("[]", ("a list where a JSON object",)),
    "null": ("null", ("null where a JSON object",)),
    "a text": ('"config"', ("a text where a JSON object",)),
    "deep": (DEEP, ("nested too deeply",)),
    "a huge number": ('{"a": ' + "9" * 5000 + "}", ("not valid JSON",)),
    "cut": ('{"model_type": "lla', ("not valid JSON",)),
}
"""What a JSON file holds instead -> words that the error must contain."""

WRONG: dict[str, Any] = {"lists": [], "texts": "\ud800", "huge numbers": 10**300, "nulls": None, "objects": {"a": {}}}
"""What stands in the place of every value of a JSON object."""

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 1\n"


def cut(content: bytes, chance: random.Random) -> bytes:
    """Half of it."""
    return content[: len(content) // 2]


def turned(content: bytes, chance: random.Random) -> bytes:
    """One bit turned."""
    data = bytearray(content)
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def garbage(content: bytes, chance: random.Random) -> bytes:
    """Noise of the same length."""
    return chance.randbytes(len(content))


def pointer(content: bytes, chance: random.Random) -> bytes:
    """What Git leaves where Git-LFS has not been."""
    return POINTER


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": cut,
    "a bit turned": turned,
    "garbage": garbage,
    "a pointer": pointer,
}

MUST_SAY = {"a pointer": ("Git-LFS", "git lfs pull")}
"""Damage -> words that the error must contain, where the folder is none that opens all the same."""


@dataclass(frozen=True)
class Layout:
    """A folder as it lies on a disk.

    Args:
        write: makes a sound one in an empty folder.
        ours: whether it carries digests.
        opened: a digest of what it opens as. Raises UserError.
    """

    write: Callable[[Path], None]
    ours: bool
    opened: Callable[[Path], str]


def parts(root: Path) -> tuple[Path, Path]:
    """A language model and a tower."""
    if not (root / "lm").exists():
        tokenizer = tiny.write_tokenizer(root / "tokenizer")
        tiny.write_base(root / "lm", "llama", tokenizer)
        tiny.write_clip(root / "clip")
    return root / "lm", root / "clip"


def write_stage(stage: str, root: Path) -> Callable[[Path], None]:
    """A writer of a folder that a stage leaves."""

    def write(folder: Path) -> None:
        vlm = tiny.compose_tiny(*parts(root), "plain" if stage == "pretrain" else "v1")
        if stage == "moe":
            spec = MoESpec(num_experts=2, top_k_experts=1)
            upcycle(vlm.model, spec)
            vlm.sparse(spec)
        vlm.save(folder, meta={"stage": stage})

    return write


def without_digests(write: Callable[[Path], None], shards: bool = False) -> Callable[[Path], None]:
    """A writer of the same folder as older versions left it, in shards or not."""

    def write_old(folder: Path) -> None:
        write(folder)
        if shards:
            state = tiny.weights_of(folder)
            (folder / "model.safetensors").unlink()
            split = split_torch_state_dict_into_shards(state, max_shard_size=sum(map(_bytes, state.values())) // 3)
            for name, keys in split.filename_to_tensors.items():
                save_file({key: state[key] for key in keys}, folder / name, metadata={"format": "pt"})
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / DIGESTS).unlink()

    return write_old


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.nbytes


def write_released(name: str, root: Path) -> Callable[[Path], None]:
    """A writer of a released architecture's folder, as the hub holds it."""

    def write(folder: Path) -> None:
        for archive in (GOLDEN / "tokenizers").glob("*.tar.xz"):
            unpack(archive, root / "golden")
        TINY[name].save(root / "golden", folder)

    return write


def write_published(name: str, root: Path) -> Callable[[Path], None]:
    """A writer of a folder that LLaVA's or MoE-LLaVA's code has saved; its tower lies around it."""

    def write(folder: Path) -> None:
        tree = root / "published"
        if not tree.exists():
            unpack(GOLDEN / "checkpoints.tar.xz", tree)
        shutil.copytree(tree / name, folder, dirs_exist_ok=True)
        shutil.copytree(tree / "openai", folder.parent / "openai", dirs_exist_ok=True)
        shutil.copytree(tiny.write_tokenizer(root / "tokenizer"), folder, dirs_exist_ok=True)
        (folder / "golden.safetensors").unlink()

    return write


def write_lora(root: Path) -> Callable[[Path], None]:
    """A writer of an adapter's folder."""

    def write(folder: Path) -> None:
        vlm = tiny.compose_tiny(*parts(root), "v1")
        adapter = Adapter(_lora(), {"base": "lm"}, LLAVA)
        attach(vlm.model, adapter.config)
        write_adapter(vlm.model.state_dict(), adapter, folder)

    return write


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])


def opened_model(folder: Path) -> str:
    """What a run would start from: weights, config, tokenizer and processor."""
    manifest = read_folder(folder, "--model_name_or_path")
    manifest.require_start()
    vlm = build(describe(manifest), torch.float32)
    digest = hashlib.sha256(repr(vlm.model.config.to_dict()).encode("utf-8", "backslashreplace"))
    for name, tensor in sorted(vlm.model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    if vlm.tokenizer is not None:
        digest.update(vlm.tokenizer.backend_tokenizer.to_str().encode())
        digest.update(repr((vlm.processor.chat_template, vlm.tokenizer.special_tokens_map)).encode())
        digest.update(repr(vlm.processor.image_processor.to_dict()).encode())
    return digest.hexdigest()


def opened_adapter(folder: Path) -> str:
    """What `moellava merge-lora` reads of an adapter."""
    adapter, tensors = read_adapter(folder, LLAVA)
    digest = hashlib.sha256(repr((sorted(adapter.config.to_dict().items(), key=str), adapter.origin)).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def layouts(root: Path) -> dict[str, Layout]:
    """name -> layout; `root` is where what they are made of lies."""
    return {
        "stage 1": Layout(write_stage("pretrain", root), True, opened_model),
        "stage 2": Layout(write_stage("finetune", root), True, opened_model),
        "stage 3": Layout(write_stage("moe", root), True, opened_model),
        "stage 2 of before": Layout(without_digests(write_stage("finetune", root)), False, opened_model),
        "in shards": Layout(without_digests(write_stage("finetune", root), shards=True), False, opened_model),
        "adapter": Layout(write_lora(root), True, opened_adapter),
        "LLaVA": Layout(write_published("llama/dense", root), False, opened_model),
        "MoE-LLaVA": Layout(write_published("llama/moe_sparse", root), False, opened_model),
        "llava-1.5-hf": Layout(write_released("llava-1.5", root), False, opened_model),
        "qwen2-vl": Layout(write_released("qwen2-vl", root), False, opened_model),
    }


def damaged(path: Path, chance: random.Random) -> Iterator[tuple[str, bytes | None, tuple[str, ...]]]:
    """(damage, content, words that the error must contain) of a file; None: it is missing."""
    content = path.read_bytes()
    for name, damage in DAMAGES.items():
        yield name, damage(content, chance), MUST_SAY.get(name, ())
    yield "missing", None, ()
    if path.suffix == ".json":
        for name, (text, words) in BAD_JSON.items():
            yield name, text.encode(), words
        raw = json.loads(content)
        for name, value in WRONG.items():
            yield f"all {name}", json.dumps(dict.fromkeys(raw, value)).encode(), ()
            chosen = chance.choice(sorted(raw))
            yield f"{chosen} {name}", json.dumps({**raw, chosen: value}).encode(), ()
    if path.name == "config.json":
        for place in places_in(json.loads(content)):
            for name, value in (("lost", None), ("huge", 10**300)):
                yield f"{'.'.join(place)} {name}", json.dumps(changed(json.loads(content), place, value)).encode(), ()


def places_in(raw: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where the values of an object lie, those of objects in it too."""
    for name, value in raw.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from places_in(value, (*above, name))


def changed(raw: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The same object with another value at a place; None: without it."""
    within = raw
    for name in place[:-1]:
        within = within[name]
    within[place[-1]] = value
    if value is None:
        del within[place[-1]]
    return raw


def attack(layout: Layout, sound: Path, chance: random.Random) -> Iterator[tuple[str, Callable[[Path], None], Any]]:
    """(name, what damages a copy, words) of each damage to a layout."""
    for path in sorted(sound.iterdir()):
        if path.is_file():
            for name, content, words in damaged(path, chance):
                yield f"{path.name}: {name}", _damaging(path.name, content), (path.name, words)


def _damaging(name: str, content: bytes | None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)

    return damage


def judge(layout: Layout, folder: Path, sound: str, words: tuple[str, tuple[str, ...]]) -> tuple[str, str]:
    """(verdict, what is wrong; '' where nothing is) of a damaged folder."""
    file, said = words
    try:
        with at_most(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = layout.opened(folder)
    except UserError as error:
        missing = [word for word in said if word not in str(error)] if file in str(error) else []
        return "named", f"lacks {missing}: {error}" if missing else ""
    except (Exception, Hang):  # noqa: BLE001  # what is looked for
        return "traceback", traceback.format_exc()
    if found == sound:
        return "acts", ""
    return ("another model", "opens as another model") if layout.ours else ("not ours", "")


def attacks(everything: bool, folder: Path) -> dict[str, Outcome]:
    """Layout -> what became of its damages."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    outcomes, known = {}, layouts(folder / "parts")
    (folder / "parts").mkdir()
    names = list(known) if everything else ["stage 2", "in shards", "adapter", "LLaVA"]
    for name in names:
        layout, sound, copy = known[name], folder / name / "sound", folder / name / "copy"
        layout.write(sound)
        shutil.copytree(sound, copy)
        expected, chance = layout.opened(copy), random.Random(name)
        rows = list(attack(layout, sound, chance))
        if not everything:
            rows = chance.sample(rows, QUICK // len(names))
        outcome = outcomes[name] = Outcome()
        for row, damage, words in rows:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(sound, copy)
            damage(copy)
            verdict, wrong = judge(layout, copy, expected, words)
            if wrong:
                outcome.failures.append(f"{name}, {row}: {wrong}")
            else:
                outcome.counts[verdict] += 1
    return outcomes


def main(argv: list[str] | None = None) -> int:
    """Prints a table and every failure. Exit status 1 if there is one."""
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.folders", description="Damaged model folders.")
    parser.add_argument("--all", action="store_true", help="every file of every layout")
    args = parser.parse_args(argv)
    outcomes = attacks(args.all, Path(tempfile.mkdtemp(prefix="attacks-")))
    print("| folder | opens as it was | named | not ours | failures |\n|---|---|---|---|---|")
    for name, outcome in outcomes.items():
        counts = outcome.counts
        print(f"| {name} | {counts['acts']} | {counts['named']} | {counts['not ours']} | {len(outcome.failures)} |")
    failures = [failure for outcome in outcomes.values() for failure in outcome.failures]
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
