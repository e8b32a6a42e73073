# SPDX-License-Identifier: Apache-2.0
"""Weights as they lie in a folder: safetensors, or pickles of nothing but tensors."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moellava.errors import UserError
from moellava.files import read_object, refuse_pointer

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of an unsharded checkpoint's weights, best first; `NAME.index.json` lists the shards of a sharded one."""


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a whole checkpoint, sharded or not."""
    return any((folder / name).is_file() or (folder / f"{name}.index.json").is_file() for name in WEIGHTS)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, safetensors before pickles, and a single file before shards, as
    transformers takes them. Raises UserError if there are none."""
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return shards_of(index)
    raise UserError(f"{folder} holds no weights: neither {' nor '.join(WEIGHTS)}, nor an index of shards.")


def shards_of(index: Path) -> list[Path]:
    """The files that an index names. Raises UserError if it is damaged, or some of them are not there."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} is damaged: under 'weight_map' it names no files of tensors. Fetch it anew.")
    names = sorted(set(places.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise UserError(f"{index} names files that do not lie beside it: {', '.join(outside[:3])}")
    missing = [shard for shard in names if not (index.parent / shard).is_file()]
    if missing:
        raise UserError(
            f"{index} names {len(names)} shards, but {', '.join(missing)} are missing. Fetch them from where the "
            "folder comes from."
        )
    return [index.parent / shard for shard in names]


def shapes_in(folder: Path) -> list[tuple[int, ...]]:
    """The shapes of a folder's tensors, out of the headers of its safetensors; [] where it has none."""
    shapes = []
    for path in weight_files(folder) if has_weights(folder) else []:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as handle:
                shapes += [tuple(handle.get_slice(name).get_shape()) for name in handle.keys()]  # noqa: SIM118
    return shapes


DEPTHS = ("num_hidden_layers", "num_layers", "depth")
"""What configs call the number of layers of a part."""


def require_sizes(config: Any, shapes: Collection[tuple[int, ...]], called: str) -> None:
    """Looks whether a config can be that of some weights, before memory is taken for what it describes.

    One that has lost a part of itself means its class's defaults there, which are a model of 7 billion parameters.

    Args:
        config: of a model.
        shapes: of its tensors; none: nothing can be told.
        called: how messages name the folder.

    Raises:
        UserError: no tensor is as wide as its language model, or there are fewer tensors than layers or experts.
    """
    width, parts = getattr(config.get_text_config(), "hidden_size", None), [config, config.get_text_config()]
    parts += [getattr(config, name) for name in config.sub_configs]
    wrong = []
    if isinstance(width, int) and not any(width in shape for shape in shapes):
        wrong.append(f"hidden_size is {width}, but no tensor is that wide")
    for layers in {getattr(part, name, None) for part in parts for name in DEPTHS}:
        if isinstance(layers, int) and layers > len(shapes):
            wrong.append(f"{layers} layers, but there are {len(shapes)} tensors")
    named = (getattr(config, "moe", None) or {}).get("num_experts")
    for count in named if isinstance(named, list) else [named]:
        if isinstance(count, int) and count > len(shapes) and not any(count in shape for shape in shapes):
            wrong.append(f"{count} experts, but there are {len(shapes)} tensors")
    if shapes and wrong:
        raise UserError(
            f"{called}: config.json does not describe the weights beside it ({'; '.join(wrong)}). One of them is "
            "damaged, or of another model: fetch them anew."
        )


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder by name, mapped from disk where the format allows it, so that none is copied yet."""
    return {name: tensor for path in weight_files(folder) for name, tensor in read_file(path)}


def read_file(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one safetensors file or pickle (read with `weights_only=True`, so that no code in it runs).

    Raises:
        UserError: the file is damaged, or its pickle holds more than tensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file of weights.")
    refuse_pointer(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged or cut off: {error}. Fetch it anew.") from error
        return
    yield from _read_pickle(path).items()


DAMAGED = (RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""What torch raises on a pickle whose bytes are not what was written. (MemoryError is not among them.)"""


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):  # pickles from before torch 1.6 are no archives and cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} holds more than tensors and is not opened, since it could run code: {reason}"
        ) from error
    except DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or cut off: {reason}. Fetch it anew.") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path} holds no plain dictionary of tensors.")
    return content


HUB_NAMES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("vision_model.", "model.vision_model."),
    ("image_newline", "model.image_newline"),
    ("visual.", "model.visual."),
    ("model.", "model.language_model."),
)
"""How folders on the hub name what Hugging Face's class today calls otherwise: (there, here)."""

CONSTANTS = (".position_ids", ".inv_freq")
"""Endings of tensors that older versions saved and today's compute."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of the dense folder lies: the file, and its name there."""

    file: Path
    name: str

    def read(self) -> torch.Tensor:
        """The tensor."""
        with safe_open(self.file, framework="pt") as handle:
            return handle.get_tensor(self.name)


DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""torch dtype -> its name in a safetensors header."""


def headers(places: Mapping[str, Place]) -> dict[str, torch.Tensor]:
    """Name -> empty (meta) tensor of the dtype and shape that the files' headers say.

    Raises:
        UserError: a dtype that none of our models computes in, as that of weights in 8 bits.
    """
    by_name = {text: dtype for dtype, text in DTYPES.items()}
    found: dict[str, torch.Tensor] = {}
    for file, named in groupby(places.items(), key=lambda item: item[1].file):
        with safe_open(file, framework="pt") as handle:
            for name, place in named:
                stored = handle.get_slice(place.name)
                if stored.get_dtype() not in by_name:
                    raise UserError(
                        f"{file} holds {place.name} as {stored.get_dtype()}, which is neither trained nor converted. "
                        "Give the folder in 16 or 32 bits that it was made from."
                    )
                found[name] = torch.empty(stored.get_shape(), dtype=by_name[stored.get_dtype()], device="meta")
    return found


def file_dtypes(places: Mapping[str, Place]) -> dict[str, torch.dtype]:
    """Name -> dtype, from the files' headers alone. Raises UserError: see `headers`."""
    return {name: tensor.dtype for name, tensor in headers(places).items()}


def read_all(places: Mapping[str, Place]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by name, in the order of their places; each file is opened once, mapped, and let go at its end."""
    for file, named in groupby(places.items(), key=lambda item: item[1].file):
        with safe_open(file, framework="pt") as handle:
            yield from ((name, handle.get_tensor(place.name)) for name, place in named)


def locate(files: list[Path], model: torch.nn.Module) -> dict[str, Place]:
    """Name in the model class -> place, in the order of the files. Names without a counterpart stay as they are."""
    known = set(model.state_dict())
    places = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (no mapping)
                if name in known or not name.endswith(CONSTANTS):
                    places[todays_name(name, known)] = Place(file, name)
    return places


def todays_name(name: str, known: set[str]) -> str:
    """A name on the hub -> the one of those that are known that it stands for; itself where it stands for none."""
    if name not in known:
        for there, here in HUB_NAMES:
            if name.startswith(there) and (renamed := here + name.removeprefix(there)) in known:
                return renamed
    return name
