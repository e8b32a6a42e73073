# SPDX-License-Identifier: Apache-2.0
"""Writes the report of a run: a page and pictures, while it trains or afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moellava.vis.run_files import Run

REPORT = "report"
"""The folder of a run that its report is written to."""

PAGE = "report.html"


def write_report(run: Run, output: Path | None = None) -> list[Path]:
    """Writes report.html, run.png and, of a sparse model, experts.png, in place of those of an earlier report; returns
    the paths."""
    from moellava.vis.page import write_page
    from moellava.vis.run_figures import write_run_figures
    from moellava.vis.run_page import run_page

    output = output or run.folder / REPORT
    output.mkdir(parents=True, exist_ok=True)
    return [*write_run_figures(output, run), write_page(output / PAGE, run_page(run))]


def report_of(folder: Path) -> Path:
    """The page of a run's report, written anew. Raises UserError: see `open_run`."""
    from moellava.vis.run_files import open_run

    return write_report(open_run(folder))[-1]
