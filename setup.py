# SPDX-License-Identifier: Apache-2.0
"""Package metadata. CI installs with `-c constraints.txt`, which pins what was tested."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "moellava" / "__init__.py").read_text(encoding="utf-8"), re.M)

# What the code reads that is no code: settings of DeepSpeed, tables, the demo's base models.
DATA = ["py.typed", *(f"**/*.{ending}" for ending in ("json", "safetensors", "html", "css", "js", "yaml"))]

setup(
    name="moellava",
    version=VERSION[1],
    description="Build LLaVA-style vision-language models in stages, and upcycle them into Mixtures of Experts",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["moellava", "moellava.*"]),
    package_data={"moellava": DATA},
    install_requires=[
        "torch>=2.10",
        "transformers>=5.20",
        "tokenizers",
        "sentencepiece",
        "protobuf",
        "tiktoken",
        "einops",
        "numpy>=2.2",
        "pyarrow",
        "pillow>=12",
        "peft>=0.20",
        "accelerate>=1.10",
        "safetensors",
        "pyyaml",
        "packaging",
    ],
    extras_require={
        "train": ["deepspeed>=0.19.4", "ninja", "tensorboard"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow"],
        "trackio": ["trackio"],
        "video": ["av>=15"],
        "data": ["datasets>=4", "pyarrow", "pyyaml"],
        "quant": ["bitsandbytes>=0.48"],
        "vision": ["torchvision"],
        "smolvlm": ["num2words"],
        "serve": ["gradio>=6.31", "fastapi", "uvicorn", "httpx"],
        "vis": ["matplotlib>=3.9", "pyarrow"],
        "demo": ["easy-vqa", "matplotlib>=3.9", "pyarrow"],
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26", "ruff"],
        "test": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "num2words",
            "av>=15",
            "datasets>=4",
            "pyarrow",
            "matplotlib>=3.9",
            "pyyaml",
            "bitsandbytes>=0.48",
            "gradio>=6.31",
            "fastapi",
            "uvicorn",
            "httpx",
            "openai>=3",
            "ruff",
            "mypy",
            "pre-commit",
        ],
    },
    entry_points={
        "console_scripts": ["moellava=moellava.cli:main"],
        "lmms_eval.models": ["moellava=moellava.eval.lmms:MANIFEST"],
    },
)
