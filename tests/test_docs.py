# SPDX-License-Identifier: Apache-2.0
"""The site: its table of contents has every page, links and anchors lead somewhere, its API pages name what exists, and
`bash scripts/docs.sh` builds it without a warning."""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.processes import ROOT, run

DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")])
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)\)")


def pages_of(nav: Any) -> Iterator[str]:
    """Files of a table of contents."""
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(item)


@cache
def anchors_of(page: Path) -> set[str]:
    """Anchors of a page's headings, as mkdocs and GitHub make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    found: Counter[str] = Counter()
    anchors = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        slug = re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())
        anchors.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return anchors


def test_the_table_of_contents_has_every_page_once():
    named = Counter(pages_of(SETTINGS["nav"]))
    assert named == Counter(path.name for path in DOCS.glob("*.md")), "mkdocs.yml: nav"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_a_page_and_to_a_heading_on_it(page):
    lost = []
    for target in LINK.findall(re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        outside = page.parent == DOCS and DOCS not in path.parents
        if not path.exists() or outside or (anchor and anchor not in anchors_of(path)):
            lost.append(target)
    assert not lost, f"{page.name}: {lost}; a page of the site links to files under docs/ alone"


def test_what_the_api_pages_show_exists():
    shown = re.findall(r"^::: ([\w.]+)$", (DOCS / "API.md").read_text(encoding="utf-8"), re.M)
    assert len(shown) > 10
    for name in shown:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name


def test_the_script_installs_what_the_extra_says():
    script = (ROOT / "scripts" / "docs.sh").read_text(encoding="utf-8")
    extra = re.search(r'"docs": \[(.*?)\]', (ROOT / "setup.py").read_text(encoding="utf-8").replace("[python]", "§"))
    assert extra
    for package in re.findall(r'"([^"]+)"', extra[1]):
        assert f"'{package.replace('§', '[python]')}'" in script
    assert "--strict" in script


def test_settings_ask_for_search_and_nothing_from_elsewhere():
    assert "search" in SETTINGS["plugins"] and SETTINGS["theme"]["name"] == "material"
    assert SETTINGS["theme"]["font"] is False
    assert set(SETTINGS["validation"].values()) == {"warn"}, "strict builds fail at warnings alone"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_can_be_searched(tmp_path):
    site = tmp_path / "site"
    places = {"SITE": str(site), "DOCS_VENV": str(tmp_path / "venv")}
    done = run(["bash", str(ROOT / "scripts" / "docs.sh")], env=places)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {page.stem: site / page.stem for page in DOCS.glob("*.md") if page.stem != "index"}
    assert all((folder / "index.html").is_file() for folder in pages.values())
    found = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    assert any("upcycle" in entry["location"] and "experts" in entry["text"] for entry in found), "docstrings, too"
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]* (?:src|href)="(https?:[^"]+)"', page.read_text()
        )
        assert not fetched, f"{page.name} fetches {fetched}"
