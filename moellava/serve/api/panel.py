# SPDX-License-Identifier: Apache-2.0
"""Shares of experts as a table of HTML: a row a layer, a column an expert, the darker the more."""

from __future__ import annotations

from moellava.serve.api.experts import PARTS, Shares

TITLES = {"pictures": "read the pictures", "words": "read the words", "answer": "wrote the answer"}

STYLE = "text-align:right;padding:2px 6px;background:rgba(249,115,22,{alpha:.2f})"
"""Of a cell: orange, by its share."""


def panel(shares: Shares) -> str:
    """A table for each part that has tokens: the share of a layer's choices that went to each expert."""
    return "".join(_table(part, shares) for part in PARTS if any(part in layer for layer in shares.values()))


def _table(part: str, shares: Shares) -> str:
    rows = {index: layer[part] for index, layer in shares.items() if part in layer}
    experts = max(len(row) for row in rows.values())
    head = "".join(f"<th>{expert}</th>" for expert in range(experts))
    body = "".join(_row(index, row) for index, row in rows.items())
    table = f'<table data-part="{part}"><tr><th>layer</th>{head}</tr>{body}</table>'
    return f'<div style="display:inline-block;margin-right:16px"><h4>Experts that {TITLES[part]}</h4>{table}</div>'


def _row(index: int, row: list[float]) -> str:
    cells = (
        f'<td style="{STYLE.format(alpha=0.75 * share)}" title="layer {index}, expert {expert}">{share:.0%}</td>'
        for expert, share in enumerate(row)
    )
    return f"<tr><th>{index}</th>{''.join(cells)}</tr>"
