# SPDX-License-Identifier: Apache-2.0
"""Numbers of routing as Parquet files, each column with what it is in its metadata."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moellava.files import written
from moellava.vis.collect import Collected
from moellava.vis.measures import FACTORS, Summary
from moellava.vis.words import WORD_CLASSES

SCHEMAS: dict[str, dict[str, tuple[str, str]]] = {
    "tokens": {
        "token": ("int32", "number of the token over all samples; the key of choices.parquet"),
        "sample": ("int32", "number of the sample"),
        "record": ("string", "name of its record"),
        "position": ("int32", "place in the sample, media tokens counted"),
        "is_image": ("bool", "whether it is a token of an image or a video"),
        "id": ("int32", "id in the vocabulary"),
        "text": ("string", "what it reads"),
        "word_class": ("string", f"one of: {', '.join(WORD_CLASSES)}; empty for tokens of images"),
        "is_answer": ("bool", "whether it is part of an answer that is trained on"),
        "grid": ("int16", "which grid of its image it lies in (whole, tile, frame); -1: in none"),
        "row": ("int16", "row in that grid; -1: in none"),
        "column": ("int16", "column in that grid; -1: in none"),
    },
    "choices": {
        "token": ("int32", "number of the token; see tokens.parquet"),
        "layer": ("int16", "index of the decoder layer"),
        "choice": ("int8", "0 for the token's first expert, 1 for its second …"),
        "expert": ("int16", "index of the expert"),
        "gate": ("float32", "weight of the expert's output"),
        "kept": ("bool", "False where the expert was full, and the token dropped"),
    },
    "load": {
        "layer": ("int16", "index of the decoder layer"),
        "expert": ("int16", "index of the expert"),
        "part": ("string", "which tokens: all, image or text"),
        "share": ("float64", "of the choices of these tokens in this layer"),
    },
    "layers": {
        "layer": ("int16", "index of the decoder layer"),
        "part": ("string", "which tokens: all, image or text"),
        "entropy": ("float64", "mean entropy of the router, in nats; NaN where it does not show its logits"),
        "dropped": ("float64", "share of all choices of the layer that found their expert full"),
    },
    "specialisation": {
        "layer": ("int16", "index of the decoder layer"),
        "factor": ("string", f"one of: {', '.join(FACTORS)}"),
        "bits": ("float64", "mutual information of expert and factor, less what chance alone would give"),
        "bound": ("float64", "entropy of the factor in bits: the most that an expert can tell of it"),
    },
    "pathways": {
        "part": ("string", "which tokens: all, image or text"),
        "rank": ("int16", "0 for the most frequent"),
        "experts": ("list<int16>", "first choice in each sparse layer"),
        "share": ("float64", "of these tokens"),
    },
}
"""File -> column -> (type of pyarrow, what it is)."""


def columns_of(seen: Collected, summary: Summary) -> dict[str, dict[str, Any]]:
    """File of `SCHEMAS` -> column -> values."""
    total, layers, k = seen.expert_TLk.shape
    number = np.arange(total)
    chosen = (seen.expert_TLk >= 0).reshape(-1)
    flat = lambda values: values.reshape(-1)[chosen]  # noqa: E731
    grid = np.indices((total, layers, k))
    load = [
        (layer, expert, part, share)
        for part, rows in summary.load.items()
        for layer, row in zip(seen.layers, rows, strict=True)
        for expert, share in enumerate(row)
    ]
    by_layer = [
        (layer, part, value, dropped)
        for part, row in summary.entropy.items()
        for layer, value, dropped in zip(seen.layers, row, summary.dropped, strict=True)
    ]
    bits = [
        (layer, factor, value, summary.bound[factor])
        for factor, row in summary.information.items()
        for layer, value in zip(seen.layers, row, strict=True)
    ]
    paths = [(part, rank, *path) for part, found in summary.pathways.items() for rank, path in enumerate(found)]
    return {
        "tokens": {
            "token": number,
            "sample": seen.sample_T,
            "record": [seen.records[sample] for sample in seen.sample_T],
            "position": seen.position_T,
            "is_image": seen.image_T,
            "id": seen.token_T,
            "text": seen.text_T,
            "word_class": ["" if code < 0 else WORD_CLASSES[code] for code in seen.word_T],
            "is_answer": seen.trained_T,
            "grid": seen.grid_T,
            "row": seen.row_T,
            "column": seen.column_T,
        },
        "choices": {
            "token": flat(grid[0]),
            "layer": np.array(seen.layers)[flat(grid[1])],
            "choice": flat(grid[2]),
            "expert": flat(seen.expert_TLk),
            "gate": flat(seen.gate_TLk),
            "kept": flat(seen.kept_TLk),
        },
        "load": _named("load", load),
        "layers": _named("layers", by_layer),
        "specialisation": _named("specialisation", bits),
        "pathways": _named("pathways", paths),
    }


def _named(table: str, rows: list[tuple]) -> dict[str, list]:
    return dict(zip(SCHEMAS[table], map(list, zip(*rows, strict=True)), strict=True))


def write_tables(folder: Path, columns: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """Writes `tokens.parquet`, `choices.parquet` …; returns their paths."""
    arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    paths = []
    for name, schema in SCHEMAS.items():
        fields = [
            arrow.field(column, _type(arrow, spelled), metadata={"description": text})
            for column, (spelled, text) in schema.items()
        ]
        arrays = [arrow.array(columns[name][one.name], type=one.type) for one in fields]
        path = folder / f"{name}.parquet"
        with written(path) as temporary:
            parquet.write_table(arrow.Table.from_arrays(arrays, schema=arrow.schema(fields)), temporary)
        paths.append(path)
    return paths


def _type(arrow: Any, spelled: str) -> Any:
    if spelled.startswith("list<"):
        return arrow.list_(_type(arrow, spelled[5:-1]))
    return arrow.bool_() if spelled == "bool" else getattr(arrow, spelled)()
