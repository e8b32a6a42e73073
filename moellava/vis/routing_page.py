# SPDX-License-Identifier: Apache-2.0
"""The page of `moellava routing`: load, the picture and the text by experts, pathways, specialisation."""

from __future__ import annotations

from typing import Any

import numpy as np

from moellava.vis.collect import Collected, Picture
from moellava.vis.measures import FACTORS, Summary
from moellava.vis.page import data_uri, escaped, page

TEXT_TOKENS = 400
"""Tokens of a sample's text that are shown."""

BODY = """<p>{model}: {tokens:,} tokens of {samples} samples, {layers} sparse layers of {experts} experts. Point at
anything for its numbers; click a row of the load to choose its layer.</p>
<div class="bar"><label>layer <input type="range" id="layer" min="0" step="1"> <b id="name"></b></label>
<span class="legend" id="who"></span></div>
<h2>Load</h2>
<p class="note">Which share of the choices each expert gets, as a multiple of the even share: 1 is balance, 0 a dead
expert.</p>
<div class="row" id="load"></div>
<h2>Where each token went</h2>
<p class="note">Each patch of a picture and each piece of text in the colour of its first expert in the layer above.</p>
<div id="samples"></div>
<h2>Pathways</h2>
<p class="note">The first choices of tokens, layer after layer. Point at one to see it alone.</p>
<div id="paths"></div>
<h2>Specialisation</h2>
<p class="note">How many bits the choice of an expert tells of a token, less what chance alone would tell of so many; a
factor cannot tell more than its own entropy.</p>
<div class="row"><div id="information"></div><div><div id="entropy"></div><div id="dropped"></div></div></div>
<p><label>By <select id="factor"></select></label> Where an expert is bright in one row and dark in others, it has a
task.</p>
<div id="by"></div>"""


def routing_page(seen: Collected, summary: Summary, pictures: int) -> str:
    """The page.

    Args:
        pictures: how many samples are shown with their pictures and texts.
    """
    counts = sorted(set(seen.experts))
    body = BODY.format(
        model=escaped(seen.model),
        tokens=summary.tokens["all"],
        samples=len(seen.records),
        layers=len(seen.layers),
        experts=" or ".join(map(str, counts)),
    )
    return page("Routing", body, page_data(seen, summary, pictures), "routing.js")


def page_data(seen: Collected, summary: Summary, pictures: int) -> dict[str, Any]:
    """What the page draws."""
    factors = [
        {
            "label": factor.label,
            "names": factor.names,
            "bits": summary.information[name],
            "bound": summary.bound[name],
            "by_value": summary.by_value[name],
        }
        for name, factor in FACTORS.items()
    ]
    return {
        "layers": seen.layers,
        "experts": seen.experts,
        "wide": list(range(max(seen.experts))),
        "load": summary.load,
        "tokens": summary.tokens,
        "entropy": summary.entropy,
        "dropped": summary.dropped,
        "factors": factors,
        "pathways": {part: [path._asdict() for path in paths] for part, paths in summary.pathways.items()},
        "distinct": summary.distinct,
        "samples": [sample_data(seen, number) for number in shown_samples(seen, pictures)],
    }


def shown_samples(seen: Collected, pictures: int) -> list[int]:
    """The first samples that show something, or the first ones where none does."""
    with_pictures = sorted({int(seen.sample_T[picture.first]) for picture in seen.pictures})
    return (with_pictures or list(range(len(seen.records))))[:pictures]


def sample_data(seen: Collected, number: int) -> dict[str, Any]:
    """A sample's tokens, their experts, and its pictures."""
    rows = np.nonzero(seen.sample_T == number)[0]
    begin, pictures = int(rows[0]), [one for one in seen.pictures if seen.sample_T[one.first] == number]
    end = max([TEXT_TOKENS, *(one.first - begin + one.length for one in pictures)])
    rows = rows[:end]
    texts = [None if seen.image_T[row] else seen.text_T[row] for row in rows]
    return {
        "name": seen.records[number],
        "texts": texts,
        "first": seen.expert_TLk[rows, :, 0].T,
        "all": seen.expert_TLk[rows].transpose(1, 0, 2),
        "pictures": [picture_data(one, begin) for one in pictures],
    }


def picture_data(picture: Picture, begin: int) -> dict[str, Any]:
    """A picture and the grids that lie over it."""
    return {
        "image": data_uri(picture.image),
        "width": picture.image.width,
        "height": picture.image.height,
        "first": picture.first - begin,
        "length": picture.length,
        "grids": [grid._asdict() for grid in picture.grids],
    }
