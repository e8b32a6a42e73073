# SPDX-License-Identifier: Apache-2.0
"""`moellava routing`: tables with what they say, pictures, one page that loads nothing, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from moellava.cli import main
from moellava.commands.routing import said
from moellava.data.dataset import SupervisedDataset
from moellava.data.media import MediaFiles
from moellava.data.records import load_records
from moellava.moe import MoESpec, upcycle
from moellava.vis import needed
from moellava.vis.collect import collect
from moellava.vis.figures import DPI, draw_load, draw_map, draw_pathways, draw_specialisation
from moellava.vis.measures import summarise
from moellava.vis.page import as_json, table
from moellava.vis.routing_page import page_data, routing_page
from moellava.vis.tables import SCHEMAS
from tests import tiny
from tests.vis.test_measures import routing


@pytest.fixture(scope="module")
def folders(parts, tmp_path_factory) -> dict[str, Path]:
    """A dense folder, and a sparse one of two MoE layers."""
    root = tmp_path_factory.mktemp("routing")
    vlm = tiny.compose_tiny(parts / "lm", parts / "tower", "qwen")
    vlm.save(root / "dense")
    spec = MoESpec(num_experts=[4], moe_mode="sparse")
    upcycle(vlm.model, spec)
    vlm.sparse(spec)
    vlm.save(root / "sparse")
    return {"dense": root / "dense", "sparse": root / "sparse"}


def words(folder: Path, parts: Path, output: Path) -> list[str]:
    data = ["--data", str(parts / "sft.json"), "--image-folder", str(parts / "images"), "--limit", "8"]
    return ["routing", "--model-path", str(folder), *data, "--output", str(output), "--pictures", "1"]


def test_a_sparse_folder_is_looked_at(folders, parts, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(words(folders["sparse"], parts, output)) == 0
    printed = capsys.readouterr().out
    assert "tokens of 8 samples (24 of image" in printed and "in 2 layers" in printed and str(output) in printed
    files = {path.name for path in output.iterdir()}
    assert files == {*(f"{name}.parquet" for name in SCHEMAS), "routing.html"} | {
        *("load.png", "pathways.png", "specialisation.png", "map_1.png")
    }
    tables = {name: parquet.read_table(output / f"{name}.parquet") for name in SCHEMAS}
    for name, schema in SCHEMAS.items():
        fields = tables[name].schema
        assert fields.names == list(schema)
        told = [fields.field(column).metadata[b"description"].decode() for column in schema]
        assert told == [text for _, text in schema.values()]
    tokens, choices = tables["tokens"].to_pandas(), tables["choices"].to_pandas()
    assert len(choices) == len(tokens) * 2 * 2 and set(choices.layer) == {0, 2} and set(choices.choice) == {0, 1}
    image = tokens[tokens.is_image]
    assert sorted(set(zip(image.row, image.column, strict=True))) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert (tokens[~tokens.is_image].row == -1).all() and tokens.is_answer.any() and (image.word_class == "").all()
    assert "".join(tokens[tokens["sample"] == 1].text).count("ASSISTANT") == 2
    load = tables["load"].to_pandas()
    counted = choices[choices.layer == 2].expert.value_counts(normalize=True)
    stated = load[(load.layer == 2) & (load.part == "all")].set_index("expert").share
    assert all(stated[expert] == pytest.approx(share) for expert, share in counted.items())
    assert choices.groupby(["token", "layer"]).gate.sum().round(4).eq(1).all()
    check_page((output / "routing.html").read_text())


def test_a_token_goes_where_it_goes_whatever_its_batch(folders, parts):
    vlm = tiny.reopen(folders["sparse"])
    dataset = SupervisedDataset(load_records(parts / "sft.json"), vlm.encoder, MediaFiles(parts / "images"))
    alone, together = (collect(vlm, dataset, 8, size) for size in (1, 8))
    assert together.records == [dataset[3 * number]["record"] for number in range(8)]
    for name in ("expert_TLk", "sample_T", "position_T", "token_T", "trained_T", "row_T", "column_T"):
        assert np.array_equal(getattr(alone, name), getattr(together, name)), name
    np.testing.assert_allclose(alone.gate_TLk, together.gate_TLk, atol=1e-5)
    assert not np.isnan(together.entropy_TL).any() and [one.first for one in alone.pictures] == [
        one.first for one in together.pictures
    ]


def test_records_that_are_not_chosen_are_not_looked_at(parts):
    records = load_records(parts / "sft.json")
    few = records.picked([3, 9])
    assert len(few) == 2 and [*few] == [records[3], records[9]] and few.name(1) == records.name(9)


def check_page(text: str) -> dict:
    """That a page is whole and loads nothing; returns its data."""
    assert "default-src 'none'" in text and not re.search(r'(src|href)="?(https?:|//|file:)', text)
    assert len(re.findall("<script", text)) == 2 == len(re.findall("</script>", text))
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


def test_texts_of_records_end_no_tag():
    image = np.arange(32) < 16
    seen = routing(np.zeros((32, 1), dtype=int), image, 2, records=["</script><b>"])
    shown = check_page(routing_page(seen, summarise(seen), 1))
    assert shown["samples"][0]["name"] == "</script><b>" and "</script>" in shown["samples"][0]["texts"]
    assert (
        as_json({"a": float("nan"), "b": "<&>", "c": np.arange(2)}) == r'{"a":null,"b":"\u003c\u0026\u003e","c":[0,1]}'
    )
    assert "<b>" not in table(["a"], [["<b>"]]) and 'class="number">1,234<' in table(["a"], [[1234]])


def test_a_picture_without_a_grid_is_said_and_shown_in_a_row():
    seen = routing(np.zeros((32, 1), dtype=int), np.arange(32) < 16, 2)
    seen.pictures[0].grids.clear()
    summary = summarise(seen)
    assert "1 of 1 pictures have tokens that are no grid, and get no map" in said(seen, summary)
    (picture,) = page_data(seen, summary, 1)["samples"][0]["pictures"]
    assert picture["grids"] == [] and picture["length"] == 16


def many(layers: int, experts: int) -> tuple:
    """Routing of 2 × 64 tokens at random, and its numbers."""
    generator = np.random.default_rng(0)
    seen = routing(generator.integers(0, experts, (128, layers)), np.arange(128) < 64, experts)
    seen.kept_TLk[:9, 0] = False
    return seen, summarise(seen)


def texts_of(figure) -> str:
    """All that is written in a figure."""
    import matplotlib.text

    return " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), pytest.param(24, 64, marks=pytest.mark.slow)])
def test_figures_are_of_a_size_that_is_read(layers, experts, tmp_path):
    """The letters have at least 7 points, and nothing is wider than a screen."""
    import matplotlib.text

    seen, summary = many(layers, experts)
    figures = [draw_load(seen, summary), draw_pathways(seen, summary), draw_specialisation(seen, summary)]
    figures.append(draw_map(seen, seen.pictures[0]))
    for figure in figures:
        assert max(figure.get_size_inches() * DPI) <= 1700
        sizes = [text.get_fontsize() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]
        assert sizes and min(sizes) >= 7
    assert "image tokens (64)" in texts_of(figures[0]) and "layer" in texts_of(figures[0])
    assert f"layer {2 * layers - 2}" in texts_of(figures[3])
    figures[0].savefig(tmp_path / "load.png")
    assert Image.open(tmp_path / "load.png").width > 200


def test_a_dense_folder_is_refused(folders, parts, tmp_path, capsys):
    assert main(words(folders["dense"], parts, tmp_path / "out")) == 2
    assert "dense is dense: it has no experts" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_missing_packages_are_named(monkeypatch, folders, parts, tmp_path, capsys):
    monkeypatch.setattr(needed, "find_spec", lambda name: None)
    assert main(words(folders["sparse"], parts, tmp_path / "out")) == 2
    assert "needs matplotlib and pyarrow: pip install 'moellava[vis]'" in capsys.readouterr().err
