# SPDX-License-Identifier: Apache-2.0
"""`moellava env`: what is installed, and what is missing for what."""

from __future__ import annotations

import importlib.util
import json
import re
from importlib.metadata import PackageNotFoundError, version

import setuptools
import torch
import transformers

from moellava import __version__
from moellava.cli import main
from moellava.commands import env
from tests.processes import ROOT


def test_versions_and_devices_are_this_machines(capsys):
    status = main(["env", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == int(bool(found["too_old"]))
    assert found["moellava"] == __version__
    assert torch.__version__.startswith(found["packages"]["torch"]), "a build may say more: +cu130"
    assert found["packages"]["transformers"] == transformers.__version__
    assert found["engines"] == {"native": True, "deepspeed": importlib.util.find_spec("deepspeed") is not None}
    assert found["devices"] and all(word in found["devices"][0] for word in ("cpu", "cores"))


def test_what_is_missing_is_told_with_its_purpose_and_command(monkeypatch, capsys):
    real = env.version

    def without_gradio(package: str) -> str:
        if package == "gradio":
            raise PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(env, "version", without_gradio)
    main(["env"])
    said = capsys.readouterr().out
    assert "moellava serve: the API and its page: gradio: pip install 'moellava[serve]'" in said
    assert re.search(r"gradio +-", said)


def test_what_is_too_old_is_told(monkeypatch, capsys):
    monkeypatch.setattr(env, "requires", lambda _: ["torch>=99", "numpy", 'nothing>=9; extra == "x"'])
    assert main(["env"]) == 1
    assert f"torch>=99 is needed, {version('torch')} is installed" in capsys.readouterr().out


def test_extras_are_those_of_the_package(monkeypatch):
    """What an extra brings, without ranges, as setup.py says."""
    told = {}
    monkeypatch.setattr(setuptools, "setup", lambda **settings: told.update(settings))
    spec = importlib.util.spec_from_file_location("setup_of_moellava", ROOT / "setup.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    for extra, (_, packages) in env.PURPOSES.items():
        brought = {re.split(r"[>=<;\[ ]", line)[0] for line in told["extras_require"][extra]}
        assert set(packages) <= brought, extra
    assert told["version"] == __version__
