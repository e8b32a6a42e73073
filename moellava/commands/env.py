# SPDX-License-Identifier: Apache-2.0
"""`moellava env`: versions, devices, engines, and what is missing for what."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from moellava import __version__
from moellava.commands.values import CommandParser
from moellava.log import printable
from moellava.startup import importing

CORE = ("torch", "transformers", "tokenizers", "peft", "accelerate", "safetensors", "numpy", "pillow")
PURPOSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "train": ("training in several processes, ZeRO, TensorBoard", ("deepspeed", "ninja", "tensorboard")),
    "serve": ("moellava serve: the API and its page", ("gradio", "fastapi", "uvicorn", "httpx")),
    "quant": ("--bits 4 and 8 (QLoRA)", ("bitsandbytes",)),
    "data": ("Parquet and Arrow files, folders of datasets", ("datasets", "pyarrow")),
    "video": ("videos", ("av",)),
    "vision": ("image processors of some released models", ("torchvision",)),
    "demo": ("moellava demo", ("easy-vqa",)),
}
"""Extra of this package -> what it is for, and the packages that it brings."""


def installed(package: str) -> str | None:
    """A package's version, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions_of(packages: Iterable[str]) -> dict[str, str | None]:
    """Their versions, by name."""
    return {package: installed(package) for package in packages}


def devices() -> list[str]:
    """What torch computes on here."""
    with importing():
        import torch
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return [f"cuda:{index} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for index, gpu in enumerate(gpus)]
    if torch.backends.mps.is_available():
        return ["mps"]
    return [f"cpu, {os.cpu_count()} cores" + unused_gpus(torch.version.cuda)]


def unused_gpus(cuda: str | None) -> str:
    """What is said where the machine has GPUs that torch does not see."""
    program = shutil.which("nvidia-smi")
    listed = subprocess.run([program, "-L"], capture_output=True, text=True, check=False).stdout if program else ""
    if "GPU" not in listed:
        return ""
    why = f"torch is built for CUDA {cuda}: is the driver older?" if cuda else "torch is a build for CPUs"
    return f" (nvidia-smi lists a GPU, but {why})"


def compilers() -> dict[str, str | None]:
    """What DeepSpeed compiles its operators with."""
    return {name: shutil.which(name) for name in ("g++", "ninja", "nvcc")}


def report() -> dict[str, Any]:
    """Everything, as data."""
    missing = {}
    for extra, (purpose, packages) in PURPOSES.items():
        absent = [name for name, found in versions_of(packages).items() if found is None]
        if absent:
            missing[extra] = {"for": purpose, "packages": absent, "command": f"pip install 'moellava[{extra}]'"}
    further = [name for _, packages in PURPOSES.values() for name in packages]
    return {
        "moellava": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions_of((*CORE, *further)),
        "devices": devices(),
        "engines": {"native": True, "deepspeed": installed("deepspeed") is not None},
        "compilers": compilers(),
        "missing": missing,
        "too_old": too_old(),
    }


def too_old() -> list[str]:
    """What this package requires, where the installed version does not fit."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in requires("moellava") or ()]
    except PackageNotFoundError:  # run from its sources, without being installed
        return []
    found = [(need, installed(need.name)) for need in wanted if need.marker is None or need.marker.evaluate()]
    return [f"{need} is needed, {there} is installed" for need, there in found if there and there not in need.specifier]


def as_text(found: dict[str, Any]) -> str:
    """The report, for a terminal and for issues."""
    packages = [f"  {name:14} {there or '-'}" for name, there in found["packages"].items()]
    engines = ", ".join(name for name, there in found["engines"].items() if there)
    tools = ", ".join(f"{name} {path or '-'}" for name, path in found["compilers"].items())
    missing = [
        f"  {entry['for']}: {', '.join(entry['packages'])}: {entry['command']}" for entry in found["missing"].values()
    ]
    return "\n".join(
        [
            f"moellava {found['moellava']}, Python {found['python']}, {found['platform']}",
            *packages,
            f"devices: {'; '.join(found['devices'])}",
            f"engines of experts: {engines}",
            f"compilers: {tools}",
            *(["missing:", *missing] if missing else ["nothing is missing"]),
            *found["too_old"],
        ]
    )


def main(argv: list[str]) -> int:
    """The subcommand. Exit status 1 where an installed package is too old."""
    parser = CommandParser(prog="moellava env", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(argv)
    found = report()
    print(printable(json.dumps(found, indent=1) if args.json else as_text(found)))
    return int(bool(found["too_old"]))
