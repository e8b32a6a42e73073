# SPDX-License-Identifier: Apache-2.0
"""scripts/env.sh: which build of torch a new environment gets, and where it cannot be."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.processes import ROOT

PIP = """#!/bin/sh
case "$*" in
  *--report*) printf '%s' '{report}' ;;
  *"-m pip install"*) printf '%s' "$PIP_EXTRA_INDEX_URL" >{index} ;;
esac
"""
"""In place of an environment's Python: what `pip install --dry-run` reports, and what pip is told when it installs."""

CPU = "https://download.pytorch.org/whl/cpu"
NVIDIA_SMI = "#!/bin/sh\necho 'GPU 0: one'\n"


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def entered(venv: Path, home: Path) -> subprocess.CompletedProcess:
    env = {"VENV": str(venv), "PIP_EXTRA_INDEX_URL": "mine", "HOME": str(home)}
    env["PATH"] = f"{home / 'tools'}{os.pathsep}{os.environ['PATH']}"
    source = f"source {ROOT / 'scripts' / 'env.sh'}"
    return subprocess.run(["bash", "-c", source], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("needs", "gpu", "told"),
    [
        (
            ["filelock", "nvidia-cublas==13.1; platform_system == 'Linux'"],
            False,
            f"{CPU} mine",
        ),
        (["filelock", "cuda-toolkit[cublas]==13.0"], False, f"{CPU} mine"),
        (["filelock", "nvidia-cublas==13.1"], True, "mine"),
        (["filelock"], False, "mine"),
    ],
)
def test_without_a_gpu_torch_is_a_build_for_cpus_where_pip_would_take_cudas(needs, gpu, told, tmp_path):
    report = json.dumps({"install": [{"metadata": {"name": "torch", "requires_dist": needs}}]}).replace("'", "")
    program(tmp_path / "venv/bin/python", PIP.format(report=report, index=tmp_path / "index"))
    (tmp_path / "venv/bin/activate").write_text("")
    if gpu:
        program(tmp_path / "tools/nvidia-smi", NVIDIA_SMI)
    done = entered(tmp_path / "venv", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index").read_text().strip() == told
    assert ("there is no GPU" in done.stderr) == (told != "mine")


def test_an_environment_whose_path_has_a_space_is_refused_before_it_is_made(tmp_path):
    done = entered(tmp_path / "my venv", tmp_path)
    assert done.returncode == 1 and f"VENV={tmp_path}/moellava-venv" in done.stderr
    assert not (tmp_path / "my venv").exists()
