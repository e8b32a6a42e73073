# SPDX-License-Identifier: Apache-2.0
"""The pages in a real browser: they draw, they answer to the mouse, nothing fails and nothing is loaded."""

from __future__ import annotations

import pytest

from moellava.vis.page import write_page
from moellava.vis.routing_page import routing_page
from moellava.vis.run_files import open_run
from moellava.vis.run_page import run_page
from tests.serve.api.chromium import Tab, tab
from tests.vis.test_report import write_run
from tests.vis.test_routing import many

WATCH = """window.problems = [];
addEventListener('error', event => problems.push(String(event.message)));
document.addEventListener('securitypolicyviolation', event => problems.push(event.blockedURI));"""

FILLS = "[...document.querySelectorAll('rect.patch')].map(one => one.getAttribute('fill')).join()"
LAYER = "document.getElementById('name').textContent"
TIP = "document.getElementById('tip').style.display === 'block' ? document.getElementById('tip').textContent : ''"


def point_at(page: Tab, selector: str, number: int = 0) -> str:
    """What the tip says where the mouse is over an element."""
    page.run(
        f"(() => {{ const node = document.querySelectorAll('{selector}')[{number}], box = node.getBoundingClientRect();"
        "node.dispatchEvent(new MouseEvent('mousemove', {clientX: box.x + 2, clientY: box.y + 2})); })()"
    )
    return page.run(TIP)


def slide_to(page: Tab, layer: int) -> str:
    page.run(
        f"(() => {{ const node = document.getElementById('layer'); node.value = {layer};"
        "node.dispatchEvent(new Event('input')); })()"
    )
    return page.run(LAYER)


@pytest.mark.slow
def test_the_pages_draw_and_answer(tmp_path):
    for layers, experts in ((2, 4), (24, 64)):
        seen, summary = many(layers, experts)
        write_page(tmp_path / f"routing-{layers}.html", routing_page(seen, summary, 1))
    write_page(tmp_path / "report.html", run_page(open_run(write_run(tmp_path / "run", 5, layers=24, experts=64))))
    with tab(tmp_path) as page:
        page.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        for layers in (2, 24):
            page.open((tmp_path / f"routing-{layers}.html").as_uri())
            page.wait("document.readyState === 'complete' && document.querySelectorAll('rect.patch').length === 64")
            assert page.run(LAYER) == "layer 0"
            before = page.run(FILLS)
            assert slide_to(page, layers - 1) == f"layer {2 * layers - 2}" and page.run(FILLS) != before
            assert f"layer {2 * layers - 2}: expert" in point_at(page, "rect.patch", 9)
            assert "× the even share" in point_at(page, "#load rect", 1)
            assert "% of the tokens" in point_at(page, "#paths polyline")
            assert (
                "bits" in page.run("document.body.innerText")
                and page.run("document.querySelectorAll('svg').length") > 6
            )
            assert page.run("document.querySelectorAll('.token').length") == 64
            assert page.run("problems") == [] and page.run("document.body.scrollWidth <= innerWidth")
        page.open((tmp_path / "report.html").as_uri())
        page.wait("document.readyState === 'complete' && document.querySelectorAll('#charts svg').length === 6")
        assert slide_to(page, 23) == "layer 23" and "1 dead experts" in point_at(page, "#layers rect", 3)
        assert page.run("document.querySelectorAll('#experts rect').length") == 64 * 5
        assert page.run("problems") == [] and page.run("document.body.scrollWidth <= innerWidth")
