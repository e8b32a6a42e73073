# SPDX-License-Identifier: Apache-2.0
"""Every file of code says under which licence it is."""

from __future__ import annotations

from tests.licences import LINE, ROOT, files_of_code, has_line, write_line


def test_every_file_names_its_licence():
    files = files_of_code()
    assert len(files) > 400 and ROOT / "moellava" / "cli.py" in files and ROOT / "scripts" / "demo.sh" in files
    lacking = [str(path.relative_to(ROOT)) for path in files if not has_line(path)]
    assert not lacking, f"run: python -m tests.licences   ({lacking})"


def test_the_line_goes_first_or_after_a_scripts_own(tmp_path):
    for text, written in (
        ("", LINE),
        ('"""Doc."""\n', f'{LINE}"""Doc."""\n'),
        ("#!/bin/sh\nls\n", f"#!/bin/sh\n{LINE}ls\n"),
    ):
        path = tmp_path / "a.py"
        path.write_text(text)
        assert not has_line(path)
        write_line(path)
        assert path.read_text() == written and has_line(path)
