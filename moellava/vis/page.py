# SPDX-License-Identifier: Apache-2.0
"""A page that is one file: style, script and data inside, and nothing from any network."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from moellava.files import written
from moellava.log import printable
from moellava.vis.colours import IMAGE, OTHERS, PALETTE, TEXT

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""A browser that reads it loads nothing from anywhere, whatever a record's text holds."""


def page(title: str, body: str, data: Mapping[str, Any], script: str) -> str:
    """The page's HTML.

    Args:
        title: in words.
        body: HTML, of `escaped` texts.
        data: what `script` finds as `data`.
        script: name of the file beside this one that draws it, with the functions of charts.js.
    """
    beside = Path(__file__).parent
    style, charts, drawing = ((beside / name).read_text(encoding="utf-8") for name in ("page.css", "charts.js", script))
    constants = {"palette": PALETTE, "others": OTHERS, "image": IMAGE, "text": TEXT}
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width">
<title>{escaped(title)}</title>
<style>{style}</style>
</head>
<body>
<h1>{escaped(title)}</h1>
<noscript><p>The charts of this page are drawn by its script, which this browser does not run.</p></noscript>
{body}
<div id="tip"></div>
<script type="application/json" id="data">{as_json({**data, "colours": constants})}</script>
<script>{charts}
{drawing}</script>
</body>
</html>
"""


def as_json(data: Any) -> str:
    """JSON that may stand in a page: no tag can end it, and what JSON cannot hold is null."""
    text = json.dumps(finite(data), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def finite(data: Any) -> Any:
    """Numbers with five digits, those that are not finite as None, tuples as lists."""
    if isinstance(data, float):
        return float(f"{data:.5g}") if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(key): finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    if hasattr(data, "tolist"):
        return finite(data.tolist())
    return data


def escaped(text: object) -> str:
    """Text as HTML."""
    return html.escape(printable(text))


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table; numbers stand to the right."""
    cells = "".join(f"<th>{escaped(name)}</th>" for name in head)
    lines = []
    for row in rows:
        parts = []
        for value in row:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            shown = f"{value:,}" if isinstance(value, int) and is_number else escaped(value)
            parts.append(f'<td class="{"number" if is_number else "text"}">{shown}</td>')
        lines.append(f"<tr>{''.join(parts)}</tr>")
    return f"<table><tr>{cells}</tr>{''.join(lines)}</table>"


def data_uri(image: Image.Image) -> str:
    """A picture as PNG inside a page."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_page(path: Path, text: str) -> Path:
    """Writes a page; a reader sees the old file or the new one."""
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
